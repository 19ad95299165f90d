"""Interpolation: how a posterior changes while one image is blended into another (arXiv 2404.15390)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from scipy.special import entr
from torch import Tensor

from calibrant.data.dataset import Data, as_data
from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.uncertainty.images import ImageSupport, support_of, uniforms_of
from calibrant.evaluation.uncertainty.latents import find_sites, prior_sd_of
from calibrant.evaluation.uncertainty.moments import Array, Names, draws_of, mean_and_error, moments_of
from calibrant.evaluation.uncertainty.quadratic_fits import THRESHOLDS, quadratics
from calibrant.evaluation.uncertainty.refused import Variables, is_decided, with_refused
from calibrant.evaluation.uncertainty.sources import SOURCES, SourcePlan, reference_draws
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program, as_program
from calibrant.program.latents import sites
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

Places = npt.NDArray[np.intp]
ReadOut = Callable[[Array], Array]  # draws (image, draw, latent) → class probabilities (image, draw, class)

_TOGETHER = 512  # images whose guide draws are held at a time
_MEASURED = ("posterior_sd", "posterior_sd_se", "scale_mean", "label_entropy")


def interpolation_experiment(
    model: Program,
    guide: Program,
    starts: Mapping[str, Any] | Data,
    ends: Mapping[str, Any] | Data,
    steps: int = 51,
    reference_pairs: int = 10,
    reference_steps: int = 5,
    draws: int = 500,
    chains: int = 4,
    read_out: ReadOut | None = None,
    binarisations: int = 1,
    latent: str | None = None,
    scale: str | None = None,
    seed: int = 0,
    method: str = "auto",
    progress: Progress | bool = True,
    *,
    warmup: int = 1000,
) -> xr.Dataset:
    """Posterior uncertainty along blends (1 − λ) A + λ B of pairs of images, of the model and of its guide.

    Uncertainty is the posterior standard deviation over that of the prior, averaged over latents. A quadratic is fitted
    to each pair's curve; an uncertainty that is largest between the images makes it concave, with its vertex near ½. A
    fit whose curvature is within its Monte Carlo error is not called concave. The guide is asked at every step of every
    pair, the reference at some steps of some pairs, at which the two are also compared.

    Blends of grey values are rounded to grey values. Blends of binary images, or of images of probabilities, are
    probabilities, and are binarised with the same uniform numbers at every λ of a pair.

    Args:
        model: the program, with one observed site and without covariates.
        guide: its guide; both should be in `eval()`.
        starts: site → images A, `(pair, *event)`, such as `class_mean_images`, or a `Data`.
        ends: site → images B, in the same shape.
        steps: number of λ from 0 to 1.
        reference_pairs: number of pairs, evenly spread, whose reference is drawn; 0 for the guide alone.
        reference_steps: number of λ, evenly spread, at which it is drawn: five or more.
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        read_out: a function from draws of the vector latent in prior standard deviations, `(image, draw, latent)`, to
            class probabilities `(image, draw, class)`, such as `label_read_out(…).probabilities`; gives the entropy of
            the average probabilities of a blend.
        binarisations: number of times that blends of binary images are binarised, with other uniform numbers.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        seed: random seed for the draws and the uniform numbers.
        method: method of `reference`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        warmup: number of adaptation steps per reference chain (MCMC only).

    Returns:
        Dimensions `source` ("exact", "amortized"), `pair`, `step` (λ), `threshold`. `posterior_sd` (source, pair, step)
        in prior standard deviations with `posterior_sd_se` (Monte Carlo), `scale_mean`, the posterior mean of the
        scale, and `label_entropy` (nats), with `read_out`; averages over binarisations, NaN where nothing was drawn or
        a reference fails the gate. Of the fits (source, pair): `bulge`, the height of the fit's middle above the line
        between its ends, in prior standard deviations, and `vertex`, both with `…_se`; `concave`. `share_concave` and
        `share_concave_by_sign` (source, threshold), the shares of pairs whose fit is concave, with a vertex in ½ ±
        threshold; the latter, as in the paper, whatever the errors. `mean_bulge` ± `mean_bulge_se` (source), over
        pairs, and `middle_over_ends`, the sd at λ = ½ over the mean of both ends. The same with the prefix `compared_`
        at the pairs and steps that both sources have.

        Where references are refused: `share_concave_low` and `…_high`, `mean_bulge_low` and `…_high`, the reference's
        numbers over its pairs with the refused ones at either extreme; `mean_bulge_guide_passed` and `…_refused` ±
        `…_se`, the guide's over passed and refused pairs. Attributes: `share_reference`, the share of the reference's
        images that pass the gate; `decided`, 1 if it is 90% or more, so that a verdict may rest on it.

    Raises:
        InferenceError: for pairs, steps or sites that the experiment cannot use.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    progress = reporting(progress)
    first, second = as_data(starts), as_data(ends)
    plan = InterpolationPlan(
        steps,
        reference_pairs,
        reference_steps,
        read_out,
        binarisations,
        latent,
        scale,
        SourcePlan(draws, chains, warmup, method, reference_pairs > 0),
    )
    return interpolation_of(Problem.of_kind(model, guide, _as_shown(model, first)), first, second, plan, seed, progress)


@dataclass(frozen=True)
class InterpolationPlan:
    """The settings of an interpolation: arguments of `interpolation_experiment`."""

    steps: int = 51
    reference_pairs: int = 10
    reference_steps: int = 5
    read_out: ReadOut | None = None
    binarisations: int = 1
    latent: str | None = None
    scale: str | None = None
    sources: SourcePlan = field(default_factory=SourcePlan)

    def checked(self) -> InterpolationPlan:
        if self.steps < 5 or self.binarisations < 1:
            raise InferenceError(
                f"steps={self.steps}, binarisations={self.binarisations}: give five steps or more, from one image to "
                "the other, and one binarisation or more"
            )
        if self.sources.reference and (self.reference_pairs < 1 or not 5 <= self.reference_steps <= self.steps):
            raise InferenceError(
                f"reference_pairs={self.reference_pairs}, reference_steps={self.reference_steps} of {self.steps}: give "
                "five steps of the reference or more, since a quadratic goes through any three"
            )
        return self


def interpolation_of(
    problem: Problem, starts: Data, ends: Data, plan: InterpolationPlan, seed: int = 0, progress: Progress = silent
) -> xr.Dataset:
    """Interpolate, like `interpolation_experiment`, for a problem that is already checked; its data show the sites."""
    plan, of = plan.checked(), partial(stream, seed, "interpolation")
    names, site = find_sites(sites(problem.program, *problem.data.batch([0])), problem.data, plan.latent, plan.scale)
    blends = _Blends.of(problem, starts, ends, names.observed, plan, of("uniforms"))
    unit = prior_sd_of(problem.program, site, problem.data, of("prior"))
    measure = partial(_measured, names=names, unit=unit, read_out=plan.read_out)
    found = {source: blends.nothing(plan.binarisations) for source in SOURCES}
    pairs, length = blends.starts.shape[0], len(blends.steps)
    asked = _spread_over(pairs, plan.reference_pairs), _spread_over(length, plan.reference_steps)
    together = max(1, _TOGETHER // length)
    for repeat in range(plan.binarisations):
        for part in np.array_split(np.arange(pairs), -(-pairs // together)):
            shown = problem.of_others(blends.shown(repeat, part, np.arange(length)))
            tree = posterior_of(shown, plan.sources.draws, seed=of("guide", repeat, int(part[0])))
            found["amortized"][:, repeat, part] = measure(tree).reshape(-1, len(part), length)
            progress("interpolation", repeat * pairs + int(part[-1]) + 1, pairs * plan.binarisations)
        if plan.sources.reference:
            shown = problem.of_others(blends.shown(repeat, *asked))
            tree = reference_draws(shown, plan.sources, of("reference", repeat), progress)
            values = measure(tree).reshape(-1, len(asked[0]), len(asked[1]))
            found["exact"][:, repeat, asked[0][:, None], asked[1]] = values
    passed = np.isfinite(found["exact"][0]).all(0).sum() / max(1, len(asked[0]) * len(asked[1]))
    result = _assemble(found, blends.steps, starts.labels())
    if plan.sources.reference:
        result = result.assign(_of_refused(found, blends.steps, *asked))
    return result.assign_attrs(
        latent=names.latent,
        scale=names.scale,
        decided=int(plan.sources.reference and is_decided(float(passed))),
        share_reference=float(passed) if plan.sources.reference else np.nan,
        binarisations=plan.binarisations,
        seed=seed,
    )


def _as_shown(model: Program, data: Data) -> Data:
    """The images as values that their site can have, with which model and guide are checked."""
    name, program = data.observed_names[0], as_program(model)
    values = data.tensors()[0][name]
    try:
        support = support_of(program, data, name)
    except KeyError:  # the program has no such site, which the check of the data refuses
        return data
    except DataError:  # probabilities of binary pixels, or numbers beside grey values: 0 and 1 are values of both
        support = support_of(program, Data({name: (values > 0.5).to(values.dtype)}), name)
    return Data({name: support.nearest(values, torch.full_like(values, 0.5))})


def _spread_over(size: int, count: int) -> Places:
    """At most `count` places among `size`, evenly spread from the first to the last."""
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(np.intp))


@dataclass(frozen=True)
class _Blends:
    """Pairs of images `(pair, *event)`, the steps from one to the other, and how blends are made into observations."""

    name: str
    starts: Tensor
    ends: Tensor
    steps: Array
    support: ImageSupport
    seed: int

    @classmethod
    def of(cls, problem: Problem, starts: Data, ends: Data, name: str, plan: InterpolationPlan, seed: int) -> _Blends:
        first, second = (data.tensors()[0].get(name) for data in (starts, ends))
        if first is None or second is None or first.shape != second.shape:
            shapes = [None if images is None else tuple(images.shape) for images in (first, second)]
            raise InferenceError(
                f"starts have images {name!r} of the shape {shapes[0]}, ends {shapes[1]}: give both as many images of "
                "one shape"
            )
        steps = np.linspace(0.0, 1.0, plan.steps)
        return cls(name, first, second, steps, support_of(problem.program, problem.data, name), seed)

    def nothing(self, repeats: int) -> Array:
        return np.full((len(_MEASURED), repeats, len(self.starts), len(self.steps)), np.nan)

    def shown(self, repeat: int, pairs: Places, steps: Places) -> Data:
        """Blends of some pairs at some steps, the steps of a pair side by side."""
        first, second = (images[pairs, None] for images in (self.starts, self.ends))
        weight = torch.as_tensor(self.steps[steps], dtype=first.dtype).reshape(1, -1, *[1] * (first.dim() - 2))
        uniforms = uniforms_of(self.starts, stream(self.seed, "binarised", repeat))[pairs, None]
        values = self.support.nearest((1 - weight) * first + weight * second, uniforms)
        return Data({self.name: values.flatten(0, 1)})


def _measured(tree: xr.DataTree, names: Names, unit: Array, read_out: ReadOut | None) -> Array:
    """What is measured of the images of a tree, `(measure, image)`."""
    moments = moments_of(tree, names, unit=unit)
    entropy = np.full(len(moments.passed), np.nan)
    if read_out is not None:
        draws = draws_of(tree["posterior"].dataset[names.latent]) / unit
        probabilities = read_out(draws.reshape(len(draws), -1, draws.shape[-1])).mean(1)
        entropy = np.where(moments.passed, entr(probabilities).sum(-1), np.nan)
    return np.stack([moments.posterior_sd, moments.posterior_sd_se, moments.scale_mean, entropy])


# -- what is told ------------------------------------------------------------------------------------------------------


def _assemble(found: Mapping[str, Array], steps: Array, labels: np.ndarray) -> xr.Dataset:
    """The dataset, from arrays `(measure, repeat, pair, step)` of every source."""
    variables: dict[str, Any] = {}
    for place, name in enumerate(_MEASURED):
        values = np.stack([found[source][place] for source in SOURCES])
        values = np.sqrt((values**2).mean(1) / values.shape[1]) if name.endswith("_se") else values.mean(1)
        if np.isfinite(values).any():
            variables[name] = (("source", "pair", "step"), values)
    common = np.isfinite(found["exact"][0]) & np.isfinite(found["amortized"][0])
    for prefix, kept in (("", True), ("compared_", common)):
        parts = [
            _of_source(np.where(kept, found[source][0], np.nan), found[source][1] ** 2, steps) for source in SOURCES
        ]
        for name, (dims, _) in parts[0].items():
            variables[prefix + name] = (("source", *dims), np.stack([part[name][1] for part in parts]))
    coords = {"source": list(SOURCES), "pair": labels, "step": steps, "threshold": list(THRESHOLDS)}
    return xr.Dataset(variables, coords)


def _of_refused(found: Mapping[str, Array], steps: Array, pairs: Places, at: Places) -> Variables:
    """How far pairs without a reference could move what is told of the reference, at its pairs and steps."""
    exact, guide = (
        quadratics(steps[at], *(part[:, pairs][:, :, at] for part in (found[source][0], found[source][1] ** 2)))
        for source in SOURCES
    )
    low, high = exact.bounds()
    bounds: Variables = {"share_concave_low": (("threshold",), low), "share_concave_high": (("threshold",), high)}
    return bounds | with_refused("mean_bulge", (), exact.bulge, guide.bulge, exact.known)


def _of_source(curves: Array, variances: Array, steps: Array) -> dict[str, tuple[tuple[str, ...], Array]]:
    """Fits of the curves `(repeat, pair, step)` of one source, and what they have in common."""
    fits = quadratics(steps, curves, variances)
    mean, error = mean_and_error(fits.bulge)
    curve = curves.mean(0)
    ends = (curve[:, 0] + curve[:, -1]) / 2
    middle = np.interp(0.5, steps, np.arange(len(steps)))
    centre = curve[:, [int(np.floor(middle)), int(np.ceil(middle))]].mean(1)
    there = np.isfinite(centre / ends)
    return {
        **{name: (("pair",), values) for name, values in fits._asdict().items()},
        "concave": (("pair",), fits.concave),
        "share_concave": (("threshold",), fits.shares()),
        "share_concave_by_sign": (("threshold",), fits.shares(beyond_error=False)),
        "mean_bulge": ((), mean),
        "mean_bulge_se": ((), error),
        "middle_over_ends": ((), centre[there].mean() / ends[there].mean() if there.any() else np.array(np.nan)),
    }
