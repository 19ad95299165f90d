"""What the tests of check and report share: small models and images, a check of little effort, trees of plain draws."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from pyro.nn import PyroModule

import calibrant as cal
from calibrant.data import Data
from calibrant.evaluation import Check, checking
from calibrant.evaluation.statistics.gaps import gap_of
from calibrant.evaluation.uncertainty.contrast import ContrastPlan, contrast_of
from calibrant.inference.problem import Problem

SHAPE, SIMULATIONS = (1, 5, 5), 100
CHECKED = ("bands", "coverage", "recovery", "importance", "classifier", "pairs")  # pictures


def build(name: str, **arguments: Any) -> PyroModule:
    torch.manual_seed(0)
    return cal.models.create(name, **{"shape": list(SHAPE), "latents": 3, **arguments}).eval()


def images(count: int = 6, shape: tuple[int, ...] = SHAPE) -> Data:
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))
    return Data({"x": x}, coords={"data": np.arange(100, 100 + count)})


def checked(model: PyroModule, data: Data, **options: Any) -> Check:
    """A check of a guide that has not been trained."""
    guide = cal.guides.amortize(model, data).eval()
    few: dict[str, Any] = {"draws": 100, "chains": 2, "simulations": SIMULATIONS, **options}
    return cal.evaluation.check(model, guide, data, **few)


def refine_hardly(patch: pytest.MonkeyPatch) -> None:
    """Checks split gaps by a guide that is refined in a few steps: the part that takes longest."""
    patch.setattr(checking, "gap_of", partial(gap_of, steps=5))


def show_few_contrasts(patch: pytest.MonkeyPatch) -> None:
    """Checks have a contrast experiment of three levels and few draws."""

    def experiment(problem: Problem, plan: ContrastPlan, *given: Any) -> xr.Dataset:
        return contrast_of(problem, replace(plan, levels=[0.1, 1.0, 10.0], draws=100), *given)

    patch.setattr(checking, "contrast_of", experiment)


def tree(seed: int, method: str) -> xr.DataTree:
    """Draws of a shared and of a local latent, as a reference or a guide would give them."""
    generator = np.random.default_rng(seed)
    posterior = xr.Dataset(
        {
            "centre": (("chain", "draw"), generator.normal(size=(4, 500))),
            "z": (("chain", "draw", "data"), generator.normal(size=(4, 500, 3))),
        },
        coords={"data": ["a", "b", "c"]},
        attrs={"latents": '["centre", "z"]', "independent_draws": 1, "method": method},
    )
    observed = xr.Dataset({"x": ("data", generator.normal(size=3))}, coords={"data": ["a", "b", "c"]})
    groups = {
        "/posterior": posterior,
        "/sample_stats": xr.Dataset(),
        "/observed_data": observed.assign(x=observed.x * 0),
    }
    return xr.DataTree.from_dict(groups)
