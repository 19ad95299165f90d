"""A program with a shared latent whose joint posterior can be sampled exactly, and guides with planted defects.

μ ~ N(0, 3²),  z_i ~ N(μ, 1),  x_i ~ N(z_i, 0.5²)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Generator, Tensor

from benchmarks.fooled import bumps, normal
from calibrant.inference.references.gate import exact_convergence
from calibrant.inference.trees import SAMPLE

PRIOR, SPREAD, NOISE = 3.0, 1.0, 0.5
_LOCAL = 1 / math.sqrt(1 / SPREAD**2 + 1 / NOISE**2)  # posterior sd of z given μ

Noise = Callable[[tuple[int, ...], Generator], Tensor]


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return normal(shape, generator).double()


def _narrow(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return 0.8 * _normal(shape, generator)


@dataclass(frozen=True)
class JointGuide:
    """The joint posterior, with other noise for the shared latent or for the local ones given it."""

    shared: Noise = _normal
    local: Noise = _normal

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draws of μ `(draws,)` and of z `(draws, data)`."""
        precision = 1 / PRIOR**2 + len(x) / (SPREAD**2 + NOISE**2)
        mean = x.sum() / (SPREAD**2 + NOISE**2) / precision
        mu = mean + self.shared((draws,), generator) / math.sqrt(precision)
        return mu, self.given(mu[:, None], x, (draws, len(x)), generator)

    def given(self, mu: Tensor, x: Tensor, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Draws of z given μ, of a shape to which both broadcast."""
        return conditional_mean(mu, x) + _LOCAL * self.local(shape, generator)


def conditional_mean(mu: Tensor, x: Tensor) -> Tensor:
    """The posterior mean of z given μ."""
    return _LOCAL**2 * (mu / SPREAD**2 + x / NOISE**2)


GUIDES = {
    "exact": JointGuide(),
    "three bumps in the shared latent": JointGuide(shared=bumps),
    "shared sd × 0.8": JointGuide(shared=_narrow),
    "three bumps in the local latents": JointGuide(local=bumps),
    "local sd × 0.8": JointGuide(local=_narrow),
}


class Hierarchy:
    """Draws of guides and of the exact posterior, in the format of `inference`."""

    guides = GUIDES

    def sampled(
        self, defect: str, data: int, draws: int, simulations: int, reference: int, ranked: int, seed: int
    ) -> tuple[xr.DataTree, xr.DataTree, None, xr.DataTree]:
        """Trees of guide and reference, no directions, and ranks of local latents given draws of the shared one."""
        generator, guide = Generator().manual_seed(seed), GUIDES[defect]
        mu = PRIOR * _normal((), generator)
        z = mu + SPREAD * _normal((data,), generator)
        x = z + NOISE * _normal((data,), generator)
        ours, theirs = guide.draw(x, draws, generator), GUIDES["exact"].draw(x, 4 * reference, generator)
        labels = np.arange(data)
        post = {"/posterior": _group(ours, (1, draws), labels)}
        gate = exact_convergence(np.zeros(data), np.zeros(data), labels).drop_vars("log_evidence")
        ref = {"/posterior": _group(theirs, (4, reference), labels), "/convergence": gate}
        ranks = _ranks(guide, x, simulations, ranked, generator)
        return xr.DataTree.from_dict(post), xr.DataTree.from_dict(ref), None, ranks


def _group(drawn: tuple[Tensor, Tensor], shape: tuple[int, int], labels: np.ndarray) -> xr.Dataset:
    mu, z = (part.reshape(*shape, *part.shape[1:]).numpy().astype(np.float32) for part in drawn)
    attrs = {"latents": json.dumps(["mu", "z"]), "independent_draws": 1}
    return xr.Dataset({"mu": (SAMPLE, mu), "z": ((*SAMPLE, "data"), z)}, {"data": labels}, attrs)


def _ranks(guide: JointGuide, x: Tensor, simulations: int, ranked: int, generator: Generator) -> xr.DataTree:
    """What `evaluation.calibration` finds: data simulated given draws of the guide, ranked with the same draws."""
    mu, _ = guide.draw(x, simulations, generator)
    z = mu + SPREAD * _normal((simulations,), generator)
    y = z + NOISE * _normal((simulations,), generator)
    drawn = guide.given(mu, y, (ranked, simulations), generator)
    quantities = {"z": lambda v: v, "log_likelihood": lambda v: -(((y - v) / NOISE) ** 2)}
    quantities["log_joint"] = lambda v: -(((y - v) / NOISE) ** 2) - ((v - mu) / SPREAD) ** 2
    pits = {}
    for name, function in quantities.items():
        rank = (function(drawn) < function(z)).sum(0)
        noise = torch.rand(simulations, generator=generator, dtype=torch.float64)
        pits[name] = (SAMPLE, ((rank + noise) / (ranked + 1))[None].numpy())
    attrs = {"guide_draws": ranked, "latents": 1, "shared_held": json.dumps(["mu"])}
    return xr.DataTree.from_dict({"/prior_sbc": xr.Dataset(pits, attrs=attrs)})
