"""Small models that several tests share: registered ones with every ingredient away from zero, and programs."""

from __future__ import annotations

import importlib
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

import calibrant as cal
from calibrant.inference.references import repair


def build(name: str, latents: int, **options: Any) -> tuple[PyroModule, dict[str, torch.Tensor]]:
    """A model of 5 pixels, and three data: weak, typical, strong."""
    torch.manual_seed(7)
    model = cal.models.create(name, shape=(5,), latents=latents, **options)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
            if parameter_name.endswith("log_scale"):
                parameter.fill_(-0.5).add_(0.2 * torch.randn_like(parameter))
    model.eval()
    image = torch.randn(5)
    return model, {"x": torch.stack([0.1 * image, image, 4 * image])}


def coin(size):
    """A local latent that is discrete, and no other."""
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0))


def coin_guide(observed, size):
    """Its prior."""
    with pyro.plate("data", size):
        pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(size)))


X = {"x": torch.tensor([0.3, -1.2, 0.8, 2.5])}


def hierarchical(size):
    centre = pyro.sample("centre", dist.Normal(3.0, 0.5))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(centre, 1.0))
        pyro.deterministic("double", 2 * z)
        pyro.sample("x", dist.Normal(z, 0.5))
    pyro.deterministic("square", centre.square())


def three_levels(size):
    """Normals on three levels, of which the first is shared."""
    centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(centre, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))


def conjugate(size):
    """Posterior Normal(0.8 x, √0.2), evidence Normal(0, √1.25)."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))


# -- for batched NUTS --------------------------------------------------------------------------------------------------

COUNTS = {"x": torch.tensor([0.0, 2.0, 7.0, 1.0, 4.0, 30.0])}
MIXED = {"x": torch.tensor([[0.0, 0.0, 0.0], [0.3, -0.2, 0.4], [6.0, -4.0, 8.0]])}


def elementwise(size):
    """Gamma–Poisson: the posterior is Gamma(2 + x, 2)."""
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate))


def scale_mixture(size, prior=dist.Normal):
    """A scale that multiplies three latents."""
    with pyro.plate("data", size):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", prior(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(scale[:, None] * z, 0.5).to_event(1))


def laplace_mixture(size):
    """The same with sparse latents."""
    scale_mixture(size, dist.Laplace)


def nuts(program, observed, **options):
    """A reference by four chains of batched NUTS, of 500 draws (the fewest that may pass), not compiled."""
    short = {"warmup": 100, "draws": 500, "compile": False, "seed": 1}
    return cal.inference.reference(program, observed, method="nuts", **{**short, **options})


def one_look(patch: pytest.MonkeyPatch) -> None:
    """Chains that fail the gate are not run again."""
    patch.setattr(repair, "_LOOKS", 1)


def any_length(patch: pytest.MonkeyPatch) -> None:
    """Chains may be too short for the gate, and are run once: enough for the form of a tree."""
    patch.setattr(
        importlib.import_module("calibrant.inference.references.sampling"), "require_passable", lambda *_: None
    )
    one_look(patch)
