"""The contrast experiment: how a posterior changes when the same image is shown at different contrasts.

The main normative test of Catoni et al. (arXiv 2404.15390, Fig. 1): far below the noise an image carries no
information, so the posterior is the prior; the higher the contrast, the more certain the latents. Whether that happens
is a property of the model, seen in its exact posterior; whether the guide follows it is a property of the guide. The
two are kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.noise import noise_equivalent_contrast
from calibrant.evaluation.uncertainty.images import (
    REAL,
    ImageSupport,
    centred,
    contrast_of_images,
    contrasts_of,
    support_of,
    uniforms_of,
)
from calibrant.evaluation.uncertainty.latents import find_sites, informative_of, prior_sd_of
from calibrant.evaluation.uncertainty.moments import Array, Moments, mean_and_error, moments_of, spearman
from calibrant.evaluation.uncertainty.refused import with_refused
from calibrant.evaluation.uncertainty.sources import SOURCES, SourcePlan, reference_draws
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import POOL, structure_of
from calibrant.program.contract import Program, Values
from calibrant.program.latents import sites
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

LEVELS = tuple(np.geomspace(0.1, 10.0, 13).tolist())
SHARES = tuple(np.linspace(0.1, 1.0, 10).tolist())
ABOUT = ("mean", "black", "mid-grey")
GREY = {"mean": 0.0, "black": 0.0, "mid-grey": 0.5}  # the grey value that is left without contrast
UNITS = {name: "× noise" if name == "mean" else "of the contrast" for name in ABOUT}
STATISTICS = ("mean_norm", "signal_variance", "posterior_sd", "scale_cv")

_BY_IMAGE = ("posterior_sd", "scale_cv")  # statistics that single images have

_BLANK = 1e-3  # images with less contrast, relative to the data's root-mean-square contrast, cannot be scaled


def contrast_experiment(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    levels: Sequence[float] | None = None,
    images: int = 32,
    draws: int = 500,
    chains: int = 4,
    noise: float | None = None,
    latent: str | None = None,
    scale: str | None = None,
    seed: int = 0,
    method: str = "auto",
    progress: Progress | bool = True,
    *,
    covariates: Mapping[str, Any] | None = None,
    warmup: int = 1000,
    about: str = "mean",
) -> xr.Dataset:
    """Posteriors of the same images at many contrasts, of the model (exact or reference) and of its guide.

    Contrast is what is left of an image's deviation from a grey value, and `about` says from which one:

    - "mean", for images with noise: every image is shifted to mean 0 and scaled to a root-mean-square contrast of
      `level` × σ, where σ is the standard deviation of the model's noise. Level 1 is the noise-equivalent contrast.
    - "black" and "mid-grey", for images with values between 0 and 1: a pixel x becomes c·x, or ½ + c (x − ½), with c
      from 0 to 1, so that level 1 is the image itself. Grey values go to the nearest one. Binary images are drawn again
      at every level, with the same uniform random number u per pixel: a pixel is on where u lies below its new value.

    A blank image is not the same in the two: all black is one of the images that a model of digits knows, and mid-grey
    is what a scale of the logits makes when it goes to 0. Only about the mean, and far below the noise, does an image
    carry no information.

    Images without contrast are not used. At each level, only images whose reference passes the gate are used, for both
    sources. The levels are computed one by one, to save memory.

    Averages run over the *informative* latents: those whose posterior mean has a standard deviation over images above
    0.1 of the prior's, by the reference posterior of the images at their own contrast (all latents if there is none).

    Args:
        model: the program, with one observed site.
        guide: its guide; both should be in `eval()`.
        observed: site → tensor (held-out images), or a `Data`.
        levels: contrasts: about the mean in units of the noise-equivalent contrast (None for 13 levels from 0.1 to 10),
            else the share of the image's own contrast, at most 1 (None for 10 levels from 0.1 to 1).
        images: number of images, drawn at random from the data that have contrast (all of them if there are fewer).
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        noise: σ in data units; None for the result of `model.likelihood.noise_sd` (root mean square over pixels). It
            has a meaning about the mean only.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent whose coefficient of variation is measured, if there is more than one.
        seed: random seed for the choice of images and the draws.
        method: method of `reference`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        covariates: keyword → tensor, leading dimension data.
        warmup: number of adaptation steps per reference chain (MCMC only).
        about: the grey value about which images lose contrast: "mean", "black" or "mid-grey".

    Returns:
        Dimensions `source` ("exact", "amortized"), `contrast`, `image` (the data's labels). Means over images, with
        standard errors `…_se` over images: `mean_norm`, the norm of the posterior mean over informative latents;
        `signal_variance`, the variance over images of the posterior mean, averaged over informative latents;
        `posterior_sd`, averaged over informative latents; `scale_cv`, standard deviation over mean of the scale. The
        first two are free of the bias by the posterior mean's Monte Carlo error. `posterior_sd_by_image` and
        `scale_cv_by_image` with their Monte Carlo errors `…_se` (NaN where the reference fails the gate);
        `images_passed` (contrast). Where some references are refused, the guide's means over passed and refused images
        and the bounds of the reference's mean with the refused at either extreme (the smallest and the largest value of
        any image): `posterior_sd_guide_passed`, `…_guide_refused`, `…_low`, `…_high`, and the same for `scale_cv`.
        Attributes: `about`, `noise` (σ; NaN about black and mid-grey), `latent`, `scale` ("" without one), `prior_sd`
        (of the informative latents), `n_informative`, `n_latents`, `spearman_exact` and `spearman_amortized` (of
        `posterior_sd` and contrast, over levels), `reference_method`, `share_reference` (of images × levels),
        `structure` ("linear-gaussian", "scaled linear-gaussian" or "").

    Raises:
        InferenceError: for levels, images, sites or a noise that the experiment can't use, for draws of the guide that
            are not finite, and where the gate leaves fewer than two images.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    progress = reporting(progress)
    experiment = ContrastPlan(levels, images, draws, chains, noise, latent, scale, method, warmup, about)
    return contrast_of(Problem.of_kind(model, guide, observed, covariates), experiment, seed, progress)


@dataclass(frozen=True)
class ContrastPlan:
    """The settings of a contrast experiment: arguments of `contrast_experiment`."""

    levels: Sequence[float] | None = None
    images: int = 32
    draws: int = 500
    chains: int = 4
    noise: float | None = None
    latent: str | None = None
    scale: str | None = None
    method: str = "auto"
    warmup: int = 1000
    about: str = "mean"
    pool: int = POOL

    def __post_init__(self) -> None:
        if self.about not in ABOUT:
            raise InferenceError(f"about={self.about!r}: give one of {', '.join(map(repr, ABOUT))}")
        if self.about != "mean" and self.noise is not None:
            raise InferenceError(
                f"noise={self.noise} is the unit of contrast about the mean, and levels about {self.about} are shares "
                "of an image's own contrast: leave out noise="
            )

    @property
    def sources(self) -> SourcePlan:
        return SourcePlan(self.draws, self.chains, self.warmup, self.method, pool=self.pool)


def contrast_of(problem: Problem, plan: ContrastPlan, seed: int = 0, progress: Progress = silent) -> xr.Dataset:
    """Run the contrast experiment, like `contrast_experiment`, for a problem that is already checked."""
    program, data, of = problem.program, problem.data, partial(stream, seed, "contrast")
    contrasts = _checked_levels(plan)
    progress("contrast", 0, len(contrasts))
    few = data.batch(torch.arange(min(len(data), 16)))
    structure = structure_of(program, data)
    names, site = find_sites(sites(program, *few), data, plan.latent, plan.scale)
    support = support_of(program, data, names.observed)
    sigma = _noise_of(program, few[1], plan, support)
    patches = _choose(data, names.observed, plan, support, of)
    prior_sd = prior_sd_of(program, site, patches.unchanged(), of("prior"))
    unit = sigma if plan.about == "mean" else 1.0
    shown = [problem.of_others(patches.shown(level * unit)) for level in contrasts]  # refused before any sampling
    natural = reference_draws(problem.of_some(patches.unchanged()), plan.sources, of("reference", "natural"))
    informative = informative_of(natural, names, prior_sd)
    used = informative if informative.any() else ~informative
    rows: dict[str, list[Moments]] = {source: [] for source in SOURCES}
    for i, level in enumerate(contrasts):
        exact = moments_of(reference_draws(shown[i], plan.sources, of("reference", i)), names, used)
        amortized = moments_of(posterior_of(shown[i], plan.draws, seed=of("posterior", i)), names, used)
        rows["exact"].append(exact)
        rows["amortized"].append(amortized)
        progress("contrast", i + 1, len(contrasts), f"{level:.2g} {UNITS[plan.about]}")
    result = _assemble(rows, contrasts, patches.labels)
    return result.assign_attrs(
        about=plan.about,
        noise=sigma,
        latent=names.latent,
        scale=names.scale,
        prior_sd=float(prior_sd[used].mean()),
        n_informative=int(informative.sum()),
        n_latents=len(informative),
        **{f"spearman_{s}": spearman(contrasts, result["posterior_sd"].sel(source=s).values) for s in SOURCES},
        reference_method=str(natural["posterior"].attrs["method"]),
        share_reference=float(np.mean([row.passed for row in rows["exact"]])),
        structure="" if structure is None else f"{'scaled ' if structure.scale else ''}linear-gaussian",
    )


# -- what is shown -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Patches:
    """Images `(image, *event)`: unchanged, and what a contrast of 1 adds to the grey value about which it changes."""

    name: str
    original: Tensor
    grey: float
    deviation: Tensor
    support: ImageSupport
    uniforms: Tensor
    covariates: dict[str, Tensor]
    labels: np.ndarray

    def unchanged(self) -> Data:
        """The images as they are."""
        return self._data(self.original)

    def shown(self, contrast: float) -> Data:
        """The images at a contrast: in data units about the mean, else as a share of their own."""
        return self._data(self.support.nearest(self.grey + contrast * self.deviation, self.uniforms))

    def _data(self, values: Tensor) -> Data:
        return Data({self.name: values}, self.covariates, coords={"data": self.labels})


def _checked_levels(plan: ContrastPlan) -> Array:
    usual = LEVELS if plan.about == "mean" else SHARES
    found = np.array(sorted(float(level) for level in (usual if plan.levels is None else plan.levels)))
    if len(found) < 3 or not found[0] > 0 or not np.isfinite(found[-1]) or len(np.unique(found)) < len(found):
        raise InferenceError(f"levels are {found.tolist()}: give three or more different positive contrasts")
    if plan.about != "mean" and found[-1] > 1:
        raise InferenceError(
            f"levels are {found.tolist()}: about {plan.about} they are shares of an image's own contrast, at most 1"
        )
    return found


def _noise_of(program: PyroModule, covariates: Values, plan: ContrastPlan, support: ImageSupport) -> float:
    """σ in data units, the unit of contrast about the mean; NaN for other units."""
    if plan.about != "mean":
        return math.nan
    if support.kind == "binary":
        raise InferenceError(
            "binary images have no contrast about their mean, and no noise to measure it in: give about='black' or "
            "about='mid-grey'"
        )
    if plan.noise is None:
        return noise_equivalent_contrast(program, covariates)
    if not (plan.noise > 0 and math.isfinite(plan.noise)):
        raise InferenceError(f"noise={plan.noise}: give the standard deviation of the noise, a positive number")
    return float(plan.noise)


def _choose(data: Data, name: str, plan: ContrastPlan, support: ImageSupport, of: Callable[..., int]) -> _Patches:
    """Choose images with contrast at random, whatever the order of the data."""
    contrast = contrasts_of(data, name)
    usable = (contrast > _BLANK * contrast.square().mean().sqrt()).nonzero()[:, 0]
    if plan.images < 2 or len(usable) < 2:
        raise InferenceError(f"images={plan.images}, of {len(data)} data {len(usable)} have contrast: two are needed")
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(of("images")))
    index = usable[order[: plan.images]].sort().values
    rows, cols = data.batch(index)
    x, grey = rows[name], GREY[plan.about]
    deviation = x - grey
    if plan.about == "mean":
        shape = (-1, *[1] * (x.dim() - 1))
        deviation = centred(x) / contrast_of_images(x).reshape(shape)
        support = REAL  # what lies outside the support is refused, and not moved
    uniforms = uniforms_of(x, of("uniforms"))
    return _Patches(name, x, grey, deviation, support, uniforms, cols, data.labels()[index.numpy()])


# -- what is measured --------------------------------------------------------------------------------------------------


def _assemble(rows: Mapping[str, list[Moments]], levels: Array, labels: np.ndarray) -> xr.Dataset:
    passed = np.stack([row.passed for row in rows["exact"]])
    both = [[row.where(p) for row, p in zip(rows[source], passed, strict=True)] for source in SOURCES]
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in STATISTICS:
        values, *errors = (
            np.array([[getattr(row, field) for row in source] for source in both])
            for field in ((name, f"{name}_se") if name in _BY_IMAGE else (name,))
        )
        mean, error = mean_and_error(values)
        variables[name], variables[f"{name}_se"] = (("source", "contrast"), mean), (("source", "contrast"), error)
        for se in errors:
            variables[f"{name}_by_image"] = (("source", "contrast", "image"), values)
            variables[f"{name}_by_image_se"] = (("source", "contrast", "image"), se)
    variables["images_passed"] = (("contrast",), passed.sum(1))
    for name in _BY_IMAGE if not passed.all() else ():
        exact, guide = (np.stack([getattr(row, name) for row in rows[source]]) for source in SOURCES)
        variables |= with_refused(name, ("contrast",), exact, guide, passed)
    return xr.Dataset(variables, coords={"source": list(SOURCES), "contrast": levels, "image": labels})
