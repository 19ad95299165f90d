"""Posterior moments of every image, with their Monte Carlo errors, from a tree of draws of either source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import digamma
from scipy.stats import spearmanr

from calibrant.errors import InferenceError
from calibrant.inference.diagnostics import ess

_TINY = 1e-150  # smallest sd that is divided by, for point masses

Array = npt.NDArray[np.float64]
Which = npt.NDArray[np.bool_] | slice
ALL = slice(None)


class Names(NamedTuple):
    """The sites of an experiment: the observed images, the vector latent, and the positive scale ("" without one)."""

    observed: str
    latent: str
    scale: str


@dataclass(frozen=True)
class Moments:
    """Posterior moments of every image, NaN for images that are left out.

    The posterior `mean`, `mean_error` (its Monte Carlo variance) and the posterior `sd` are `(image, latent)`; all
    other fields are `(image,)`: `posterior_sd`, the sd averaged over latents; `scale_mean` and `scale_cv`, mean and
    standard deviation over mean of the scale (NaN without one); `…_se`, their Monte Carlo standard errors; `passed`,
    whether the draws passed the gate (draws of a guide always do).
    """

    mean: Array
    mean_error: Array
    sd: Array
    posterior_sd: Array
    posterior_sd_se: Array
    scale_mean: Array
    scale_mean_se: Array
    scale_cv: Array
    scale_cv_se: Array
    passed: npt.NDArray[np.bool_]

    def where(self, passed: npt.NDArray[np.bool_]) -> Moments:
        """The same moments, with NaN for all images that did not pass."""

        def keep(values: Array) -> Array:
            return np.where(passed.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)

        moments = {field.name: keep(getattr(self, field.name)) for field in fields(self) if field.name != "passed"}
        return Moments(**moments, passed=passed)

    def of_images(self, index: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> Moments:
        """The moments of some images, or of all of them in another order."""
        return Moments(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    @classmethod
    def joined(cls, parts: Sequence[Moments]) -> Moments:
        """The moments of several sets of images as one."""
        return cls(**{field.name: np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(cls)})

    @property
    def mean_norm(self) -> Array:
        """Norm of the posterior mean over latents, `(image,)`, free of the bias by its Monte Carlo error."""
        return np.sqrt(np.maximum((self.mean**2 - self.mean_error).sum(1), 0.0))

    @property
    def signal_variance(self) -> Array:
        """Terms `(image,)` whose mean is the variance over images of the posterior mean, averaged over latents, free of
        the bias by its Monte Carlo error.
        """
        count = max(int(self.passed.sum()), 2)
        centre = self.mean[self.passed].mean(0) if self.passed.any() else np.nan
        return ((self.mean - centre) ** 2 * count / (count - 1) - self.mean_error).mean(1)


def moments_of(tree: xr.DataTree, names: Names, used: Which = ALL, unit: Array | float = 1.0) -> Moments:
    """Posterior moments of the latents that are used.

    The Monte Carlo error of an sd is that of the mean of its influence, ((x − mean)² / sd − sd) / 2 for a draw x. The
    influence of an average over latents is the average of their influences, which accounts for their dependence.

    Args:
        tree: a tree of `inference.reference` or `inference.posterior`; images that fail the gate get NaN.
        names: the sites.
        used: which latents are used.
        unit: what the latents are divided by, such as their prior sds `(latent,)`; 1 for the latents as they are.

    Raises:
        InferenceError: for draws of a guide that are not finite.
    """
    group = tree["posterior"].dataset
    independent = is_independent(group)
    draws = (draws_of(group[names.latent]) / unit)[..., used]
    if "convergence" not in tree.children and not np.isfinite(draws).all():
        raise InferenceError(f"the guide's draws of {names.latent!r} are not finite")
    mean, sd = draws.mean((1, 2)), draws.std((1, 2), ddof=1)
    spread = np.maximum(sd, _TINY)[:, None, None]
    influence = ((draws - mean[:, None, None]) ** 2 / spread - spread) / 2
    unknown = np.full(len(draws), np.nan)
    of_scale = (unknown, unknown, unknown, unknown)
    if names.scale:
        of_scale = _of_scale(draws_of(group[names.scale]), independent)
    passed = passed_of(tree)
    return Moments(
        mean,
        error_of_mean(draws, independent) ** 2,
        sd,
        sd.mean(1),
        error_of_mean(influence.mean(-1, keepdims=True), independent)[:, 0],
        *of_scale,
        passed,
    ).where(passed)


def passed_of(tree: xr.DataTree) -> npt.NDArray[np.bool_]:
    """Whether the draws of each image passed the gate, `(image,)`; those of a guide need not."""
    if "convergence" not in tree.children:
        return np.ones(tree["posterior"].sizes["data"], dtype=bool)
    return np.asarray(tree["convergence"]["is_reference"].values, dtype=bool)


def is_independent(group: xr.Dataset) -> bool:
    """Whether the draws of a group `posterior` are independent; those of other samplers count as dependent."""
    return bool(group.attrs.get("independent_draws", 0))


def draws_of(variable: xr.DataArray) -> Array:
    """The draws of a latent, `(image, chain, draw, latent)`, in float64."""
    values = np.asarray(variable.transpose("data", "chain", "draw", ...).values, dtype=np.float64)
    return values.reshape(*values.shape[:3], -1)


def error_of_mean(series: Array, independent: bool) -> Array:
    """Monte Carlo standard error `(image, latent)` of the mean of series `(image, chain, draw, latent)`."""
    size: Array | float = float(series.shape[1] * series.shape[2])
    if not independent:
        size = ess(np.moveaxis(series, 0, 2))
    return series.std((1, 2), ddof=1) / np.sqrt(size)


def gaussian_entropy(draws: Array, independent: bool) -> Array:
    """Entropy of the Normal with the covariance of the draws, `(image,)`, in nats: an upper bound of the entropy.

    The log determinant of a sample covariance is too low, the more so the more latents there are for the draws; this
    bias is removed (Wishart), so that sources with different numbers of draws can be compared. Dependent draws count as
    their effective number, averaged over latents.

    Args:
        draws: `(image, chain, draw, latent)`, as `draws_of` returns them, of the latents that are used.
        independent: whether they are independent.

    Returns:
        −∞ where a latent is constant; NaN with fewer effective draws than latents, or draws that are not finite.
    """
    images, chains, length, latents = draws.shape
    flat = draws.reshape(images, chains * length, latents)
    sd = flat.std(1, ddof=1)
    whitened = (flat - flat.mean(1, keepdims=True)) / np.maximum(sd, _TINY)[:, None]
    correlation = np.einsum("ndi,ndj->nij", whitened, whitened) / (chains * length - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_det = np.linalg.slogdet(correlation)[1] + 2 * np.log(sd).sum(1)
    size = np.full(images, float(chains * length))
    if not independent:
        size = np.minimum(ess(np.moveaxis(draws, 0, 2)).mean(1), size)
    freedom = size - 1
    with np.errstate(invalid="ignore"):
        halves = (freedom[:, None] - np.arange(latents)) / 2
        bias = np.where(halves > 0, digamma(np.maximum(halves, _TINY)), np.nan).sum(1) - latents * np.log(freedom / 2)
    return 0.5 * (log_det - bias + latents * np.log(2 * np.pi * np.e))


def mean_and_error(values: Array) -> tuple[Array, Array]:
    """Mean over the last axis and its standard error, without NaN entries; NaN if fewer than two are left."""
    count = np.isfinite(values).sum(-1)
    enough = np.where(count >= 2, count, np.nan)
    mean = np.nansum(values, -1) / enough
    square = np.nansum((values - mean[..., None]) ** 2, -1)
    return mean, np.sqrt(square / (enough - 1) / enough)


def spearman(x: Array, y: Array) -> float:
    """Rank correlation of x and y where y is known; NaN for fewer than three values, or if y takes one value only."""
    there = np.isfinite(y)
    if there.sum() < 3 or np.ptp(y[there]) == 0:
        return math.nan
    return float(spearmanr(x[there], y[there]).statistic)


def _of_scale(scale: Array, independent: bool) -> tuple[Array, Array, Array, Array]:
    """Mean, and standard deviation over mean, of every image's scale, each with its Monte Carlo error."""
    mean, sd = scale.mean((1, 2), keepdims=True), scale.std((1, 2), ddof=1, keepdims=True)
    spread = np.maximum(sd, _TINY)
    influence = (((scale - mean) ** 2 / spread - spread) / 2 - sd * (scale - mean) / mean) / mean
    return (
        mean[:, 0, 0, 0],
        error_of_mean(scale, independent)[:, 0],
        (sd / mean)[:, 0, 0, 0],
        error_of_mean(influence, independent)[:, 0],
    )
