"""Guides that `fit` trained, and the same with planted defects: in the distribution that a site is drawn from.

Programs, guides, references and calibration are the package's own; nothing here is replaced by tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor

import calibrant as cal
from benchmarks.planted import contrast_factor, low_threshold
from calibrant.evaluation import calibration, informed_directions
from calibrant.inference import fit, posterior
from calibrant.inference import reference as sample_reference
from calibrant.program import sample_prior

AS_TRAINED = "as trained"
SHAPE, LATENTS = (1, 3, 3), 4

# Mean and Cholesky factor of a Normal distribution, `(rows, n)` and `(rows, n, n)`, and the observations → others.
Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# Given the data that the guide was trained on: a distribution and the observations → another distribution.
Defect = Callable[[Tensor], Callable[[Any, Tensor], Any]]


def _times(factor: float, mean: Tensor, root: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return mean, factor * root


def _plus(sds: float, mean: Tensor, root: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return mean + sds * root.norm(dim=-1), root


def _uncorrelated(mean: Tensor, root: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return mean, root.norm(dim=-1).diag_embed()


def _prior(mean: Tensor, root: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(mean), torch.eye(mean.shape[-1], dtype=mean.dtype).expand_as(root)


def _one_narrow(mean: Tensor, root: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    factors = torch.ones(mean.shape[-1], dtype=mean.dtype)
    factors[0] = 0.7
    return mean, factors[:, None] * root


def _low_contrast(threshold: float, mean: Tensor, root: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return mean, contrast_factor(x.flatten(1), threshold).to(root.dtype)[..., None] * root


class UniformNoise(dist.TorchDistribution):
    """A Normal vector without its tails: uniform noise of the same mean and covariance."""

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, mean: Tensor, root: Tensor) -> None:
        self.mean_, self.root, self.noise = mean, root, dist.Uniform(-(3.0**0.5), 3.0**0.5, validate_args=False)
        super().__init__(mean.shape[:-1], mean.shape[-1:], validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        noise = self.noise.rsample((*sample_shape, *self.mean_.shape))
        return self.mean_ + (self.root @ noise[..., None])[..., 0]

    def log_prob(self, value: Tensor) -> Tensor:
        centred = (value - self.mean_)[..., None]
        noise = torch.linalg.solve_triangular(self.root, centred, upper=False)[..., 0]
        inside = (noise.abs() <= 3.0**0.5).all(-1)
        volume = noise.shape[-1] * math.log(12**0.5) + self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return torch.where(inside, -volume, -math.inf)


class _Planted(Messenger):
    """Inside, a site is drawn from another distribution."""

    def __init__(self, site: str, change: Callable[[Any], Any]) -> None:
        super().__init__()
        self.site, self.change = site, change

    def _pyro_sample(self, message: Any) -> None:
        if message["name"] == self.site:
            message["fn"] = self.change(message["fn"])


def _changed(change: Change, fn: Any, x: Tensor) -> Any:
    """A Normal vector: as such, or as white noise that is coloured."""
    if isinstance(fn, dist.MultivariateNormal):
        mean, root = change(fn.loc, fn.scale_tril, x)
        return dist.MultivariateNormal(mean, scale_tril=root)
    mean, root = change(fn.base_dist.mean, fn.base_dist.stddev.diag_embed(), x)
    white = dist.Normal(mean, root.diagonal(dim1=-2, dim2=-1)).to_event(1)
    return dist.TransformedDistribution(white, fn.transforms)


@dataclass(frozen=True)
class Recipe:
    """What is trained, and what is planted into it.

    Attributes:
        site: that the defects change.
        defects: by name.
    """

    model: Callable[[], PyroModule]
    structure: str
    site: str
    epochs: int
    defects: Mapping[str, Defect]


def explaining_away() -> PyroModule:
    """Probabilistic PCA with two latents that explain each other away: posterior correlation −0.8."""
    model = cal.models.create("ppca", shape=SHAPE, latents=LATENTS)
    weights = torch.zeros(9, LATENTS)
    weights[:4, :2] = 0.5
    weights[4, 2], weights[5, 3] = 1.0, 0.7
    model.decoder.directions.data = weights
    return model


def scale_mixture() -> PyroModule:
    """A Gaussian scale mixture."""
    torch.manual_seed(0)
    return cal.models.create("gsm", shape=SHAPE, latents=LATENTS)


def _always(change: Change) -> Defect:
    """A change that knows no training data."""
    return lambda train: partial(_changed, change)


def _without_tails(fn: Any, x: Tensor) -> UniformNoise:
    return UniformNoise(fn.loc, fn.scale_tril)


_SPREAD: Mapping[str, Defect] = {
    **{f"sd × {factor}": _always(partial(_times, factor)) for factor in (0.8, 0.9, 1.1, 1.25)},
    "low contrast": lambda train: partial(_changed, partial(_low_contrast, low_threshold(train.flatten(1)))),
}
_REST: Mapping[str, Defect] = {
    **{f"mean + {sds} sd": _always(partial(_plus, sds)) for sds in (0.3, 0.1)},
    "correlation ignored": _always(_uncorrelated),
    "prior as posterior": _always(_prior),
    "one latent × 0.7": _always(_one_narrow),
    "tails lost": lambda train: _without_tails,
}
_CLEAR = ("sd × 0.8", "sd × 1.25", "low contrast")
_RECIPES = {
    "ppca, trained": Recipe(explaining_away, "full", "z", 60, {**_SPREAD, **_REST}),
    # In y given the scale; factors of 0.9 and 1.1 would leave the posterior within the margins.
    "gsm, trained": Recipe(scale_mixture, "collapsed", "y", 40, {n: _SPREAD[n] for n in _CLEAR}),
}
TRAINED: Mapping[str, tuple[str, ...]] = {name: (*recipe.defects, AS_TRAINED) for name, recipe in _RECIPES.items()}


class Trained:
    """A model and its guide, trained on 20,000 simulated data or read from the folder that keeps it.

    Args:
        epochs: None for as many as the recipe has.
    """

    def __init__(self, program: str, folder: Path, epochs: int | None = None) -> None:
        self.recipe = _RECIPES[program]
        self.model = self.recipe.model().eval().requires_grad_(False)
        self.train = sample_prior(self.model, 20_000, {}, seed=1)["x"]
        data = {"x": self.train}
        self.guide = cal.guides.amortize(self.model, data, self.recipe.structure, seed=0)
        path = folder / (f"{program}.pt" if epochs is None else f"{program}, {epochs} epochs.pt")
        if path.is_file():
            self.guide.load_state_dict(torch.load(path))
        else:
            epochs = epochs or self.recipe.epochs
            fit(self.model, self.guide, data, epochs=epochs, batch_size=256, lr=5e-3, patience=epochs)
            torch.save(self.guide.state_dict(), path)
        self.guide.eval()

    def sampled(
        self, defect: str, data: int, draws: int, simulations: int, reference: int, ranked: int, seed: int
    ) -> tuple[xr.DataTree, xr.DataTree, xr.Dataset, xr.DataTree]:
        """Draws of the guide and of the reference for new data, informed directions, and a calibration."""
        seeds = [int(number) for number in np.random.SeedSequence(seed).generate_state(4)]  # no stream is used twice
        held = {"x": sample_prior(self.model, data, {}, seed=seeds[0])["x"]}
        guide = self.planted(defect)
        theirs = sample_reference(self.model, held, draws=reference, seed=seeds[2])
        return (
            posterior(self.model, guide, held, draws, seed=seeds[1]),
            theirs,
            informed_directions(self.model, held, theirs),
            calibration(self.model, guide, held, simulations, ranked, seed=seeds[3]),
        )

    def planted(self, defect: str) -> PyroModule:
        """The guide with a defect."""
        guide = copy.deepcopy(self.guide)
        if defect == AS_TRAINED:
            return guide
        whole, change = guide.forward, self.recipe.defects[defect](self.train)

        def forward(observed: Mapping[str, Tensor], size: int) -> None:
            with _Planted(self.recipe.site, lambda fn: change(fn, observed["x"])):
                whole(observed, size)

        guide.forward = forward
        return guide
