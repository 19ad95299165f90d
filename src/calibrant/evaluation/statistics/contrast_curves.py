"""The contrast experiment: how a posterior changes when the same image is shown at different contrasts.

The main normative test of Catoni et al. (arXiv 2404.15390, Fig. 1): far below the noise an image carries no
information, so the posterior is the prior; the higher the contrast, the more certain the latents. Whether that happens
is a property of the model, seen in its exact posterior; whether the guide follows it is a property of the guide. The
two are kept apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from pyro.nn import PyroModule
from scipy.stats import spearmanr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.noise import noise_equivalent_contrast
from calibrant.inference.diagnostics import ess
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import ReferencePlan, reference_of, structure_of
from calibrant.program.contract import Program
from calibrant.program.latents import Site, sites
from calibrant.program.simulation import sample_prior
from calibrant.program.supports import is_improper, is_positive
from calibrant.progress import Progress, silent
from calibrant.streams import stream

LEVELS = tuple(np.geomspace(0.1, 10.0, 13).tolist())
SOURCES = ("exact", "amortized")
STATISTICS = ("mean_norm", "signal_variance", "posterior_sd", "scale_cv")

_BLANK = 1e-3  # images with less contrast, relative to the data's root-mean-square contrast, cannot be scaled
_INFORMATIVE = 0.1  # least sd over images of the posterior mean of an informative latent, in prior sds
_PRIOR_DRAWS = 20_000
_BATCH = 4096
_TINY = 1e-150  # smallest sd that is divided by, for point masses

Array = npt.NDArray[np.float64]


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
    progress: Progress = silent,
    *,
    covariates: Mapping[str, Any] | None = None,
    warmup: int = 1000,
) -> xr.Dataset:
    """Posteriors of the same images at many contrasts, of the model (exact or reference) and of its guide.

    Every image is shifted to mean 0 and scaled to a root-mean-square contrast of `level` × σ, where σ is the standard
    deviation of the model's noise: level 1 is the noise-equivalent contrast. Images without contrast are not used. At
    each level, only images whose reference passes the gate are used, for both sources. The levels are computed one by
    one, to save memory.

    Averages run over the *informative* latents: those whose posterior mean has a standard deviation over images above
    0.1 of the prior's, by the reference posterior of the images at their own contrast (all latents if there is none).

    Args:
        model: the program, with one observed site.
        guide: its guide; both should be in `eval()`.
        observed: site → tensor (held-out images), or a `Data`.
        levels: contrasts, in units of the noise-equivalent contrast; None for 13 levels from 0.1 to 10.
        images: number of images, drawn at random from the data that have contrast (all of them if there are fewer).
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        noise: σ in data units; None for the result of `model.likelihood.noise_sd` (root mean square over pixels).
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent whose coefficient of variation is measured, if there is more than one.
        seed: random seed for the choice of images and the draws.
        method: method of `reference`.
        progress: called with (stage, done, total, text).
        covariates: keyword → tensor, leading dimension data.
        warmup: number of adaptation steps per reference chain (MCMC only).

    Returns:
        Dimensions `source` ("exact", "amortized"), `contrast`, `image` (the data's labels). Means over images, with
        standard errors `…_se` over images: `mean_norm`, the norm of the posterior mean over informative latents;
        `signal_variance`, the variance over images of the posterior mean, averaged over informative latents;
        `posterior_sd`, averaged over informative latents; `scale_cv`, standard deviation over mean of the scale. The
        first two are free of the bias by the posterior mean's Monte Carlo error. `posterior_sd_by_image` and
        `scale_cv_by_image` with their Monte Carlo errors `…_se` (NaN where the reference fails the gate);
        `images_passed` (contrast). Attributes: `noise` (σ),
        `latent`, `scale` ("" without one), `prior_sd` (of the informative latents), `n_informative`, `n_latents`,
        `spearman_exact` and `spearman_amortized` (of `posterior_sd` and contrast, over levels), `reference_method`,
        `share_reference` (of images × levels), `structure` ("linear-gaussian", "scaled linear-gaussian" or "").

    Raises:
        InferenceError: for levels, images, sites or a noise that the experiment can't use, for draws of the guide that
            are not finite, and where the gate leaves fewer than two images.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    experiment = ContrastPlan(levels, images, draws, chains, noise, latent, scale, method, warmup)
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

    @property
    def reference(self) -> ReferencePlan:
        return ReferencePlan(self.method, self.chains, self.warmup, self.draws)


def contrast_of(problem: Problem, plan: ContrastPlan, seed: int = 0, progress: Progress = silent) -> xr.Dataset:
    """Run the contrast experiment, like `contrast_experiment`, for a problem that is already checked."""
    program, data, of = problem.program, problem.data, partial(stream, seed, "contrast")
    contrasts = _checked_levels(LEVELS if plan.levels is None else plan.levels)
    few = data.batch(torch.arange(min(len(data), 16)))
    structure = structure_of(program, data)
    names, site = _find_sites(sites(program, *few), data, plan.latent, plan.scale)
    sigma = noise_equivalent_contrast(program, few[1]) if plan.noise is None else _checked_noise(plan.noise)
    patches = _choose(data, names.observed, plan.images, of("images"))
    prior_sd = _prior_sd(program, site, patches, of("prior"))
    shown = [problem.of_others(patches.shown(level * sigma)) for level in contrasts]  # refused before any sampling
    natural = _reference(problem.of_some(patches.shown(None)), plan, of("reference", "natural"))
    informative = _informative(natural, names, prior_sd)
    used = informative if informative.any() else ~informative
    rows: dict[str, list[_Summary]] = {source: [] for source in SOURCES}
    for i, level in enumerate(contrasts):
        exact = _summarise(_reference(shown[i], plan, of("reference", i)), names, used)
        amortized = _summarise(posterior_of(shown[i], plan.draws, seed=of("posterior", i)), names, used)
        rows["exact"].append(exact)
        rows["amortized"].append(amortized.where(exact.passed))
        progress("contrast", i + 1, len(contrasts), f"{level:.2g} × noise")
    result = _assemble(rows, contrasts, patches.labels)
    return result.assign_attrs(
        noise=sigma,
        latent=names.latent,
        scale=names.scale,
        prior_sd=float(prior_sd[used].mean()),
        n_informative=int(informative.sum()),
        n_latents=len(informative),
        spearman_exact=_spearman(result, "exact"),
        spearman_amortized=_spearman(result, "amortized"),
        reference_method=str(natural["posterior"].attrs["method"]),
        share_reference=float(np.mean([row.passed for row in rows["exact"]])),
        structure="" if structure is None else f"{'scaled ' if structure.scale else ''}linear-gaussian",
    )


def _reference(shown: Problem, plan: ContrastPlan, seed: int) -> xr.DataTree:
    tree = reference_of(shown.program, shown.data, plan.reference, seed=seed)
    if tree["posterior"].sizes["data"] < len(shown.data):  # after Ctrl-C, only some data were finished
        raise KeyboardInterrupt
    return tree


# -- what is shown -----------------------------------------------------------------------------------------------------


class _Names(NamedTuple):
    observed: str
    latent: str
    scale: str


@dataclass(frozen=True)
class _Patches:
    """Images `(image, *event)`, unchanged and with mean 0 and root mean square 1."""

    name: str
    original: Tensor
    unit: Tensor
    covariates: dict[str, Tensor]
    labels: np.ndarray

    def shown(self, contrast: float | None) -> Data:
        """The images at a contrast in data units; None for the unchanged images."""
        values = self.original if contrast is None else contrast * self.unit
        return Data({self.name: values}, self.covariates, coords={"data": self.labels})


def _checked_levels(levels: Iterable[float]) -> Array:
    found = np.array(sorted(float(level) for level in levels))
    if len(found) < 3 or not found[0] > 0 or not np.isfinite(found[-1]) or len(np.unique(found)) < len(found):
        raise InferenceError(f"levels are {found.tolist()}: give three or more different positive contrasts")
    return found


def _checked_noise(noise: float) -> float:
    if not (noise > 0 and math.isfinite(noise)):
        raise InferenceError(f"noise={noise}: give the standard deviation of the noise, a positive number")
    return float(noise)


def _find_sites(found: Mapping[str, Site], data: Data, latent: str | None, scale: str | None) -> tuple[_Names, Site]:
    """The sites of the experiment: those that are given, else the only ones of their kind."""
    if len(data.observed_names) != 1:
        raise InferenceError(
            f"the data hold the observations {list(data.observed_names)}: the contrast experiment needs exactly one"
        )
    local = {name: site for name, site in found.items() if site.local}
    vectors = [name for name, site in local.items() if site.event_shape.numel() > 1]
    latent = _only("latent", "vector", vectors, latent)
    if not latent:
        raise InferenceError(f"the contrast experiment needs a local vector latent, the program has only {list(local)}")
    scales = [n for n, site in local.items() if site.event_shape.numel() == 1 and is_positive(site.support)]
    return _Names(data.observed_names[0], latent, _only("scale", "positive scalar", scales, scale)), local[latent]


def _only(argument: str, kind: str, names: list[str], asked: str | None) -> str:
    """The given site, else the only one of its kind; "" if there is none."""
    if asked is not None and asked not in names:
        raise InferenceError(f"{argument}={asked!r} is no {kind} among the local latents; such are {names}")
    if asked is None and len(names) > 1:
        raise InferenceError(f"the program has the {kind} latents {names}: name one with {argument}=")
    return asked or (names[0] if names else "")


def _choose(data: Data, name: str, images: int, seed: int) -> _Patches:
    """Choose images with contrast at random, whatever the order of the data."""
    contrast = torch.cat([_contrast(data.batch(index)[0][name]) for index in torch.arange(len(data)).split(_BATCH)])
    usable = (contrast > _BLANK * contrast.square().mean().sqrt()).nonzero()[:, 0]
    if images < 2 or len(usable) < 2:
        raise InferenceError(f"images={images}, of {len(data)} data {len(usable)} have contrast: two are needed")
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    index = usable[order[:images]].sort().values
    rows, cols = data.batch(index)
    centred = _centred(rows[name])
    shape = (-1, *[1] * (centred.dim() - 1))
    return _Patches(
        name, rows[name], centred / _contrast(rows[name]).reshape(shape), cols, data.labels()[index.numpy()]
    )


def _contrast(x: Tensor) -> Tensor:
    """Root-mean-square deviation of each image from its own mean, `(image,)`."""
    return _centred(x).flatten(1).square().mean(1).sqrt()


def _centred(x: Tensor) -> Tensor:
    return x - x.flatten(1).mean(1).reshape(-1, *[1] * (x.dim() - 1))


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Summary:
    """Posterior moments of every image, NaN for images that are left out.

    The posterior mean and `mean_error`, its Monte Carlo variance, are `(image, latent)`; all other fields are
    `(image,)`, and `…_se` are their Monte Carlo standard errors.
    """

    mean: Array
    mean_error: Array
    posterior_sd: Array
    posterior_sd_se: Array
    scale_cv: Array
    scale_cv_se: Array
    passed: npt.NDArray[np.bool_]

    def where(self, passed: npt.NDArray[np.bool_]) -> _Summary:
        """The same moments, with NaN for all images that did not pass."""

        def keep(values: Array) -> Array:
            return np.where(passed.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)

        moments = {field.name: keep(getattr(self, field.name)) for field in fields(self) if field.name != "passed"}
        return _Summary(**moments, passed=passed)


def _summarise(tree: xr.DataTree, names: _Names, used: npt.NDArray[np.bool_] | slice = slice(None)) -> _Summary:
    """Posterior moments of the latents that are used.

    The Monte Carlo error of an sd is that of the mean of its influence, ((x − mean)² / sd − sd) / 2 for a draw x. The
    influence of an average over latents is the average of their influences, which accounts for their dependence.
    """
    group = tree["posterior"].dataset
    independent = bool(group.attrs["independent_draws"])
    draws = _draws(group[names.latent])[..., used]
    if "convergence" not in tree.children and not np.isfinite(draws).all():
        raise InferenceError(f"the guide's draws of {names.latent!r} are not finite")
    mean, sd = draws.mean((1, 2)), draws.std((1, 2), ddof=1)
    spread = np.maximum(sd, _TINY)[:, None, None]
    influence = ((draws - mean[:, None, None]) ** 2 / spread - spread) / 2
    scale_cv = scale_cv_se = np.full(len(draws), np.nan)
    if names.scale:
        scale_cv, scale_cv_se = _variation(_draws(group[names.scale]), independent)
    passed = np.ones(len(draws), dtype=bool)
    if "convergence" in tree.children:
        passed = np.asarray(tree["convergence"]["is_reference"].values, dtype=bool)
    return _Summary(
        mean,
        _error(draws, independent) ** 2,
        sd.mean(1),
        _error(influence.mean(-1, keepdims=True), independent)[:, 0],
        scale_cv,
        scale_cv_se,
        passed,
    ).where(passed)


def _draws(variable: xr.DataArray) -> Array:
    """The draws of a latent, `(image, chain, draw, latent)`."""
    values = np.asarray(variable.transpose("data", "chain", "draw", ...).values, dtype=np.float64)
    return values.reshape(*values.shape[:3], -1)


def _error(series: Array, independent: bool) -> Array:
    """Monte Carlo standard error `(image, latent)` of the mean of series `(image, chain, draw, latent)`."""
    size: Array | float = float(series.shape[1] * series.shape[2])
    if not independent:
        size = ess(np.moveaxis(series, 0, 2))
    return series.std((1, 2), ddof=1) / np.sqrt(size)


def _variation(scale: Array, independent: bool) -> tuple[Array, Array]:
    """Standard deviation over mean of every image's scale, and its Monte Carlo error."""
    mean, sd = scale.mean((1, 2), keepdims=True), scale.std((1, 2), ddof=1, keepdims=True)
    spread = np.maximum(sd, _TINY)
    influence = (((scale - mean) ** 2 / spread - spread) / 2 - sd * (scale - mean) / mean) / mean
    return (sd / mean)[:, 0, 0, 0], _error(influence, independent)[:, 0]


def _prior_sd(program: PyroModule, site: Site, patches: _Patches, seed: int) -> Array:
    """Prior standard deviation of every latent: of its own prior if it has no parents, else of simulated draws."""
    if is_improper(site.prior):
        raise InferenceError(f"latent {site.name!r} has an improper prior: there is no prior sd to compare with")
    if not (site.parents or patches.covariates):
        try:
            prior: Any = site.prior
            return prior.stddev[0].detach().double().cpu().numpy().reshape(-1)
        except NotImplementedError:  # some families have no moments in closed form
            pass
    repeats = -(-_PRIOR_DRAWS // len(patches.labels))
    covariates = {name: torch.cat([value] * repeats) for name, value in patches.covariates.items()}
    drawn = sample_prior(program, repeats * len(patches.labels), covariates, seed=seed)[site.name]
    return drawn.double().flatten(1).std(0).cpu().numpy()


def _informative(natural: xr.DataTree, names: _Names, prior_sd: Array) -> npt.NDArray[np.bool_]:
    """Which latents respond to the images at their own contrast, `(latent,)`."""
    summary = _summarise(natural, names)
    passed = summary.passed
    if passed.sum() < 2:
        raise InferenceError(
            f"the reference of {(~passed).sum()} of {len(passed)} images fails the gate: use more draws, or another "
            "method="
        )
    signal = summary.mean[passed].var(0, ddof=1) - summary.mean_error[passed].mean(0)
    return signal > (_INFORMATIVE * prior_sd) ** 2


def _assemble(rows: Mapping[str, list[_Summary]], levels: Array, labels: np.ndarray) -> xr.Dataset:
    found = [[_per_image(summary) for summary in rows[source]] for source in SOURCES]
    variables: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    for name in found[0][0]:
        values = np.array([[summary[name] for summary in source] for source in found])
        if name in STATISTICS:
            mean, error = mean_and_error(values)
            variables[name], variables[f"{name}_se"] = (("source", "contrast"), mean), (("source", "contrast"), error)
        if name not in ("mean_norm", "signal_variance"):
            stem = name.removesuffix("_se")
            by_image = f"{stem}_by_image{name.removeprefix(stem)}"
            variables[by_image] = (("source", "contrast", "image"), values)
    variables["images_passed"] = (("contrast",), np.array([int(row.passed.sum()) for row in rows["exact"]]))
    return xr.Dataset(variables, coords={"source": list(SOURCES), "contrast": levels, "image": labels})


def _per_image(summary: _Summary) -> dict[str, Array]:
    """The values of which the statistics are means, one per image."""
    mean, error, passed = summary.mean, summary.mean_error, summary.passed
    count = max(int(passed.sum()), 2)
    centre = mean[passed].mean(0) if passed.any() else np.nan
    return {
        "mean_norm": np.sqrt(np.maximum((mean**2 - error).sum(1), 0.0)),
        "signal_variance": ((mean - centre) ** 2 * count / (count - 1) - error).mean(1),
        "posterior_sd": summary.posterior_sd,
        "posterior_sd_se": summary.posterior_sd_se,
        "scale_cv": summary.scale_cv,
        "scale_cv_se": summary.scale_cv_se,
    }


def mean_and_error(values: Array) -> tuple[Array, Array]:
    """Mean over the last axis and its standard error, without NaN entries; NaN if fewer than two are left."""
    count = np.isfinite(values).sum(-1)
    enough = np.where(count >= 2, count, np.nan)
    mean = np.nansum(values, -1) / enough
    square = np.nansum((values - mean[..., None]) ** 2, -1)
    return mean, np.sqrt(square / (enough - 1) / enough)


def _spearman(result: xr.Dataset, source: str) -> float:
    """Rank correlation of contrast and posterior sd; NaN if the sd takes one value only."""
    sd = result["posterior_sd"].sel(source=source).values
    there = np.isfinite(sd)
    if there.sum() < 3 or np.ptp(sd[there]) == 0:
        return math.nan
    return float(spearmanr(result["contrast"].values[there], sd[there]).statistic)
