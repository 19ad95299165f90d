"""The corruption experiment: how posteriors change when images are corrupted, in five ways and from mild to strong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.corruptions import KINDS, chosen_levels, corrupted, known
from calibrant.evaluation.uncertainty.measuring import Instrument, Measured, some_images
from calibrant.evaluation.uncertainty.moments import mean_and_error
from calibrant.evaluation.uncertainty.refused import is_decided, with_refused
from calibrant.evaluation.uncertainty.sources import SourcePlan
from calibrant.evaluation.uncertainty.trends import Trend, trend
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program
from calibrant.program.simulation import sample_prior
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

STATISTICS = ("posterior_sd", "entropy", "shift")

Array = npt.NDArray[np.float64]
Variables = dict[str, tuple[tuple[str, ...], Any]]


def corruption_experiment(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    kinds: Sequence[str] = tuple(KINDS),
    levels: int = 5,
    images: int = 32,
    simulated: int = 0,
    draws: int = 500,
    chains: int = 4,
    latent: str | None = None,
    scale: str | None = None,
    seed: int = 0,
    method: str = "auto",
    progress: Progress | bool = True,
    *,
    covariates: Mapping[str, Any] | None = None,
    warmup: int = 1000,
    reference: bool = True,
) -> xr.Dataset:
    """Posteriors of the same images under corruption, of the model (exact or reference) and of its guide.

    Each kind of corruption has five levels from mild to strong, which we define, since neither the paper's text that is
    available nor its code does (arXiv 2404.15390):

    - "noise": Gaussian noise with an sd of 1/8, 1/4, 1/2, 1, 2 contrasts (mean over images of the root mean square
      deviation of their pixels).
    - "blur": Gaussian blur with an sd of .03, .06, .1, .16, .25 sides of the image.
    - "occlusion": a square in the colour of the background (the median pixel) over .05, .1, .2, .4, .8 of the image.
    - "contrast": .3, .5, .7, .85, .95 of the contrast is removed, about each image's mean.
    - "permutation": .1, .25, .5, .75, 1 of the pixels are exchanged among themselves.

    All levels show the same images and use the same random numbers. Values are clipped to the support of the site, and
    binary images are binarised again. The results describe the images that are given; what they say of calibration
    comes from `simulated` images alone, whose latents are known.

    Averages run over the informative latents, chosen on the uncorrupted images as in `contrast_experiment`.

    Args:
        model: the program, with one observed site of images.
        guide: its guide; both should be in `eval()`.
        observed: site → tensor (held-out images), or a `Data`.
        kinds: the corruptions.
        levels: how many of the five levels are used, from 2 to 5, with both ends.
        images: number of images, drawn at random from the data.
        simulated: number of images that are simulated from the model and corrupted likewise, for the coverage of true
            latents; 0 for none.
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        seed: random seed for the choice of images, the corruptions and the draws.
        method: method of `reference`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        covariates: keyword → tensor, leading dimension data.
        warmup: number of adaptation steps per reference chain (MCMC only).
        reference: whether the exact posterior, or its reference, is drawn beside the guide.

    Returns:
        Dimensions `source` ("exact", "amortized"), `corruption`, `level` (0 for the uncorrupted images), `image`.
        Per image, NaN where the reference fails the gate: `posterior_sd`, posterior sd over prior sd, averaged over
        informative latents, with its Monte Carlo error `posterior_sd_se`; `entropy` of the Normal with the posterior's
        covariance, in nats; `shift` of the posterior mean from that of the uncorrupted image, root mean square over
        informative latents, in prior sds and free of Monte Carlo bias. `…_mean` with standard errors `…_mean_se` over
        the images whose reference passed, for both sources; with references also `…_mean_guide_passed`,
        `…_mean_guide_refused`, and `…_mean_low`, `…_mean_high`, the reference's mean with refused images at either
        extreme; `share_reference` (corruption, level). `trend`, `p_rises` and `p_falls` (source, corruption,
        statistic): mean over images of the rank correlation with the level, and the p values of Page's test in both
        directions, over images that pass at all levels (for the shift, without level 0), and `decided` (corruption),
        whether these are at least 90% of the images. With simulated images: `coverage` of central 90% intervals for the
        true latents, and `coverage_se` over images. `strength` (corruption, level) and `unit` (corruption). Attributes:
        `latent`, `scale`, `n_informative`, `n_latents`, `prior_sd`, `prior_entropy` (of the informative latents),
        `reference_method`.

    Raises:
        InferenceError: for kinds, levels, images or sites that the experiment can't use, and where the gate leaves
            fewer than two images.
        ProgramError, DataError: for a model, guide or data that break the contract, and a model that can't be
            simulated.
    """
    progress = reporting(progress)
    sources = SourcePlan(draws, chains, warmup, method, reference)
    if simulated < 0 or simulated == 1:
        raise InferenceError(f"simulated={simulated}: give 0 for no simulated images, or two or more")
    kinds = (kinds,) if isinstance(kinds, str) else kinds
    plan = CorruptionPlan(tuple(kinds), levels, images, simulated, latent, scale, sources)
    return corruption_of(Problem.of_kind(model, guide, observed, covariates), plan, seed, progress)


@dataclass(frozen=True)
class CorruptionPlan:
    """The settings of a corruption experiment: arguments of `corruption_experiment`."""

    kinds: tuple[str, ...] = tuple(KINDS)
    levels: int = 5
    images: int = 32
    simulated: int = 0
    latent: str | None = None
    scale: str | None = None
    sources: SourcePlan = field(default_factory=SourcePlan)

    def strengths(self) -> dict[str, list[float]]:
        """Kind → strength of every level, 0 for the uncorrupted images.

        Raises:
            InferenceError: for unknown kinds or numbers of levels.
        """
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise InferenceError(f"kinds={list(self.kinds)}: give one or more different corruptions of {list(KINDS)}")
        return {k: [0.0, *(known(k).levels[i - 1] for i in chosen_levels(self.levels))] for k in self.kinds}


def corruption_of(problem: Problem, plan: CorruptionPlan, seed: int = 0, progress: Progress = silent) -> xr.Dataset:
    """Run the corruption experiment, like `corruption_experiment`, for a problem that is already checked."""
    of, strengths = partial(stream, seed, "corruption"), plan.strengths()
    chosen = problem.of_some(some_images(problem.data, plan.images, of("images")))
    instrument, natural = Instrument.of(chosen, plan.sources, plan.latent, plan.scale, of("instrument"))
    shown = _Shown(instrument, chosen.data, strengths, of("shown"))
    found = shown.measured(natural, progress)
    result = _assemble(found, shown)
    if plan.simulated:
        result = result.assign(_coverage(instrument, plan, strengths, of("simulated"), progress))
    return result.assign_attrs(instrument.attributes)


@dataclass(frozen=True)
class _Shown:
    """Images of one set at every level of every corruption, and their true latents where they are known."""

    instrument: Instrument
    data: Data
    strengths: Mapping[str, Sequence[float]]
    seed: int
    truth: Tensor | None = None

    def measured(
        self, natural: Mapping[str, Measured] | None = None, progress: Progress = silent
    ) -> dict[str, list[list[Measured]]]:
        """Source → for every corruption, what is measured at every level; `natural` is that of the images as they are,
        which are measured too where it is not given.
        """
        changed = [self._at(kind, s) for kind, (_, *strengths) in self.strengths.items() for s in strengths]
        parts = changed if natural is not None else [self.data, *changed]
        measured = self.instrument(parts, stream(self.seed, "draws"), self.truth, progress)
        first = measured.pop(0) if natural is None else natural
        count = len(measured) // len(self.strengths)
        return {
            source: [
                [first[source], *(level[source] for level in measured[start : start + count])]
                for start in range(0, len(measured), count)
            ]
            for source in first
        }

    def _at(self, kind: str, strength: float) -> Data:
        images = self.data.tensors()[0][self.instrument.names.observed]
        changed = corrupted(images, kind, strength, self.seed)
        return self.instrument.changed(self.data, changed, stream(self.seed, "binarised"))


def _assemble(found: Mapping[str, list[list[Measured]]], shown: _Shown) -> xr.Dataset:
    every = ("source", "corruption", "level", "image")
    values = {name: np.array([[_values(name, row) for row in rows] for rows in found.values()]) for name in STATISTICS}
    passed = np.isfinite(values["posterior_sd"]).all(0)
    errors = [[[level.moments.posterior_sd_se for level in row] for row in rows] for rows in found.values()]
    variables: Variables = {name: (every, array) for name, array in values.items()}
    variables["posterior_sd_se"] = (every, np.array(errors))
    for name, array in values.items():
        mean, error = mean_and_error(np.where(passed, array, np.nan))
        variables[f"{name}_mean"], variables[f"{name}_mean_se"] = (every[:3], mean), (every[:3], error)
        if len(found) == 2:
            variables |= with_refused(f"{name}_mean", every[1:3], array[0], array[1], passed)
    trends = np.array([[_trends(values, passed, i, j) for j in range(passed.shape[0])] for i in range(len(found))])
    for k, name in enumerate(("trend", "p_rises", "p_falls")):
        variables[name] = (("source", "corruption", "statistic"), trends[..., k])
    variables["share_reference"] = (every[1:3], passed.mean(-1))
    decided = [is_decided(share) for share in passed.all(1).mean(-1)]
    variables["decided"] = (every[1:2], np.array(decided))
    variables["strength"] = (every[1:3], np.array(list(shown.strengths.values())))
    variables["unit"] = (every[1:2], [known(kind).unit for kind in shown.strengths])
    coords = {
        "source": list(found),
        "corruption": list(shown.strengths),
        "level": [0, *chosen_levels(passed.shape[1] - 1)],
        "image": shown.data.labels(),
        "statistic": list(STATISTICS),
    }
    return xr.Dataset(variables, coords=coords)


def _values(statistic: str, levels: Sequence[Measured]) -> Array:
    """A statistic of the levels of one corruption, `(level, image)`."""
    if statistic == "shift":
        return np.array([_shift(level, levels[0]) for level in levels])
    if statistic == "entropy":
        return np.array([level.entropy for level in levels])
    return np.array([level.moments.posterior_sd for level in levels])


def _shift(level: Measured, natural: Measured) -> Array:
    """Root mean square shift of the posterior mean over latents, `(image,)`, without what Monte Carlo errors add."""
    if level is natural:
        return np.where(natural.moments.passed, 0.0, np.nan)
    (now, error), (before, other) = ((m.moments.mean, m.moments.mean_error) for m in (level, natural))
    return np.sqrt(np.maximum(((now - before) ** 2 - error - other).mean(1), 0.0))


def _trends(values: Mapping[str, Array], passed: npt.NDArray[np.bool_], source: int, kind: int) -> list[Trend]:
    """Trends of every statistic, over the images that every source has at all levels."""
    there = passed[kind].all(0)
    return [trend(values[name][source, kind][int(name == "shift") :, there].T) for name in STATISTICS]


def _coverage(
    instrument: Instrument,
    plan: CorruptionPlan,
    strengths: Mapping[str, Sequence[float]],
    seed: int,
    progress: Progress,
) -> Variables:
    """Coverage of central 90% intervals for the true latents of simulated images, at every level."""
    rows = torch.arange(plan.simulated) % len(instrument.problem.data)
    covariates = instrument.problem.data.batch(rows)[1]
    drawn = sample_prior(instrument.problem.program, plan.simulated, covariates, seed=stream(seed, "prior"))
    name, truth = instrument.names.observed, drawn[instrument.names.latent].cpu()
    data = Data({name: drawn[name].cpu()}, covariates)
    found = _Shown(instrument, data, strengths, stream(seed, "shown"), truth).measured(progress=progress)
    covered = [[[level.covered for level in levels] for levels in rows] for rows in found.values()]
    mean, error = mean_and_error(np.array(covered))
    dims = ("source", "corruption", "level")
    return {"coverage": (dims, mean), "coverage_se": (dims, error)}
