"""What the tests of experiments on images share: guides with planted defects, and references that are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from contrast_models import ExactGuide, PlainGuide, flat, images, model
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.evaluation.uncertainty import sources
from calibrant.inference.references.exact import solve
from calibrant.inference.references.sampling import exact_structure
from calibrant.inference.referencing import reference_for


class FixedScale(ExactGuide):
    """A planted defect: the exact posterior of the latents, had the scale its prior mean in every image."""

    def log_weights(self, error: Tensor) -> Tensor:
        mean = self.target.prior_of_scale().mean.log()
        return -1e4 * (self.grid - mean).square().expand(len(error), -1)


def guides(name: str) -> tuple[PyroModule, PyroModule]:
    """A model, and its guide by name: exact, blind to contrast, or with a scale that is fixed."""
    target = model("vae" if name == "vae" else "ea-vae")
    if name == "blind":
        return target, PlainGuide(flat(0.5), scale=True)
    return target, FixedScale(target) if name == "fixed scale" else ExactGuide(target)


def true_sd(target: PyroModule, x: Tensor) -> np.ndarray:
    """Posterior sd, averaged over latents, of every image; the prior sd is 1."""
    return solve(exact_structure(target, images()), x.double()).sd["z"].mean(1).numpy()


class Digits(PyroModule):
    """Binary images of two latents; for tests that need no reference."""

    def __init__(self, shape: tuple[int, ...] = (1, 6, 6)) -> None:
        super().__init__()
        self.shape = shape
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(2, 36, generator=generator))

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=(z @ self.weight).reshape(-1, *self.shape)).to_event(3))


class Watching(PyroModule):
    """A guide whose sd falls with the share of pixels that are on, and which notes the values that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[float] = set()

    def forward(self, observed: Mapping[str, Tensor], size: int) -> None:
        self.seen |= set(observed["x"].unique().tolist())
        sd = (1 - 0.8 * observed["x"].flatten(1).mean(1))[:, None]
        mean = observed["x"].flatten(1)[:, :2] - 0.5
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(mean, sd.expand(-1, 2)).to_event(1))


def digits(count: int, on: float, seed: int = 0) -> Tensor:
    """Binary images of which a share of the pixels is on, a share that differs from image to image."""
    generator = torch.Generator().manual_seed(seed)
    share = on * (0.5 + torch.rand(count, 1, 1, 1, generator=generator))
    return (torch.rand(count, 1, 6, 6, generator=generator) < share).float()


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], bool]], None]:
    """References some of which fail the gate: `fails(call, image)`; call 0 is that of the images as they are."""

    def install(fails: Callable[[int, int], bool]) -> None:
        calls = iter(range(1000))

        def reference(*arguments: Any, **options: Any) -> xr.DataTree:
            tree, call = reference_for(*arguments, **options), next(calls)
            passed = np.array([not fails(call, i) for i in range(tree["posterior"].sizes["data"])])
            tree["convergence"] = xr.DataTree(tree["convergence"].to_dataset().assign(is_reference=("data", passed)))
            return tree

        monkeypatch.setattr(sources, "reference_for", reference)

    return install
