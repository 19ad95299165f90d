"""The contrast curves of Catoni et al. (arXiv 2404.15390, Fig. 1): images at their own contrast, in bins.

The contrast experiment shows the same images at every contrast. Here every image is shown as it is, once, so that bins
of different contrast hold different images: the statistics are those of the paper, and contrast is one of the things in
which the bins differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from calibrant.binding import bind_fixed
from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.images import contrasts_of
from calibrant.evaluation.uncertainty.latents import find_sites, prior_sd_of, reconstruction_changes
from calibrant.evaluation.uncertainty.moments import Array, Moments, mean_and_error, spearman
from calibrant.evaluation.uncertainty.refused import with_refused
from calibrant.evaluation.uncertainty.sources import SourcePlan, source_moments
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program
from calibrant.program.latents import sites
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

BINS = 101
THRESHOLD = 0.036  # squared data units: 1e-3 of the authors, in whose units the pixels' sd is a sixth of that of ours

_CURVES = ("signal_mean", "signal_variance", "noise_variance", "scale_mean")
_PRIOR_DATA = 200  # data whose covariates prior draws are given


def contrast_bins(
    model: Program,
    guide: Program,
    images: Mapping[str, Any] | Data,
    train: Mapping[str, Any] | Data,
    bins: int = BINS,
    threshold: float = THRESHOLD,
    draws: int = 500,
    chains: int = 4,
    warmup: int = 1000,
    method: str = "auto",
    reference: bool = True,
    latent: str | None = None,
    scale: str | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
    *,
    covariates: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Posteriors of images at their own contrast, in bins of contrast, of the model and of its guide.

    The contrast of an image is the root-mean-square deviation from its own mean, in data units; it goes to the nearest
    of `bins` values, evenly spaced from the smallest contrast to the largest. Averages run over the *informative*
    latents: those without which the reconstruction of training images changes by more than `threshold`, when the
    guide's posterior mean of one latent is replaced by its average over images.

    Args:
        model: the program, with one observed site.
        guide: its guide; both should be in `eval()`.
        images: site → tensor (held-out images), or a `Data`.
        train: training images, by which informative latents are chosen; a few hundred are enough.
        bins: number of bins.
        threshold: least change of the reconstruction, in squared data units, summed over pixels and averaged over
            images.
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        warmup: number of adaptation steps per reference chain (MCMC only).
        method: method of `reference`.
        reference: whether the reference is computed; without it, there is the guide alone.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        covariates: keyword → tensor, leading dimension data, for `images`.

    Returns:
        Dimensions `source` ("exact", "amortized"), `contrast` (the bins), `image`, `latent`. Means over the images of a
        bin with standard errors `…_se` over these images, NaN in bins with fewer than two: `signal_mean`, the norm of
        the posterior mean; `signal_variance`, the variance over images of the posterior mean, averaged over latents
        (both free of the bias by Monte Carlo errors); `noise_variance`, the posterior variance over the prior variance,
        averaged over latents; `scale_mean`, the posterior mean of the scale. `images` and `images_passed` count the
        images of each bin; for both sources, those without a reference are left out, and what they could change of the
        mean `noise_variance` over all images is in `noise_variance_low`, `…_high`, `…_guide_passed`, `…_guide_refused`.
        `contrast_by_image`, `noise_variance_by_image`, `scale_mean_by_image`; `informative` and `reconstruction_change`
        of every latent. Attributes: `spearman_exact` and `spearman_amortized` (of `noise_variance` and contrast, over
        bins), `n_informative`, `n_latents`, `share_reference`, `latent`, `scale`, `threshold`.

    Raises:
        InferenceError: for sites that the experiment can't use, images of one contrast only, and where no latent is
            informative.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    progress = reporting(progress)
    plan = BinsPlan(bins, threshold, SourcePlan(draws, chains, warmup, method, reference), latent, scale)
    problem = Problem.of(model, guide, images, covariates)
    return contrast_bins_of(problem, bind_fixed(problem.program, train), plan, seed, progress)


@dataclass(frozen=True)
class BinsPlan:
    """The settings of `contrast_bins`."""

    bins: int = BINS
    threshold: float = THRESHOLD
    sources: SourcePlan = field(default_factory=SourcePlan)
    latent: str | None = None
    scale: str | None = None


def contrast_bins_of(
    problem: Problem, train: Data, plan: BinsPlan, seed: int = 0, progress: Progress = silent
) -> xr.Dataset:
    """Bin images by contrast, like `contrast_bins`, for a problem that is already checked."""
    program, data, of = problem.program, problem.data, partial(stream, seed, "contrast bins")
    found = sites(program, *data.batch(torch.arange(min(len(data), 16))))
    names, site = find_sites(found, data, plan.latent, plan.scale)
    contrast = contrasts_of(data, names.observed).double().cpu().numpy()
    centres = bin_centres(contrast, plan.bins)
    prior_sd = prior_sd_of(program, site, data[:_PRIOR_DATA], of("prior"))
    change = reconstruction_changes(problem.of_others(train), names, plan.sources.draws, of("train"), progress)
    informative = change > plan.threshold
    if not informative.any():
        raise InferenceError(
            f"no latent changes the reconstruction of training images by more than threshold={plan.threshold} (the "
            f"largest change is {change.max():.2g}): give a smaller threshold, or a model that uses its latents"
        )
    moments = source_moments(problem, plan.sources, names, informative, of("images"), progress)
    result = binned(moments, contrast, centres, data.labels(), prior_sd[informative])
    result["informative"] = ("latent", informative)
    result["reconstruction_change"] = ("latent", change)
    return result.assign_attrs(latent=names.latent, scale=names.scale, threshold=plan.threshold)


def bin_centres(contrast: Array, bins: int) -> Array:
    """Evenly spaced contrasts from the smallest to the largest.

    Raises:
        InferenceError: for fewer than three bins, or images that all have one contrast.
    """
    if bins < 3:
        raise InferenceError(f"bins={bins}: give three or more")
    if not np.ptp(contrast) > 0:
        raise InferenceError("all images have the same contrast: there is nothing to bin")
    return np.linspace(contrast.min(), contrast.max(), bins)


def binned(
    found: Mapping[str, Moments], contrast: Array, centres: Array, labels: npt.NDArray[Any], prior_sd: Array
) -> xr.Dataset:
    """Curves over bins of contrast, from the moments of every source.

    Args:
        found: source → moments of the latents that are used.
        contrast: of every image, `(image,)`.
        centres: of the bins, evenly spaced.
        labels: of the images.
        prior_sd: of the latents that are used.
    """
    passed = np.logical_and.reduce([moments.passed for moments in found.values()])
    place = np.rint((contrast - centres[0]) / (centres[1] - centres[0])).astype(int)
    noise = {source: (moments.sd**2 / prior_sd**2).mean(1) for source, moments in found.items()}
    dims, size = ("source", "contrast"), (len(found), len(centres))
    curves = {name: (np.full(size, np.nan), np.full(size, np.nan)) for name in _CURVES}
    for i, (source, moments) in enumerate(found.items()):
        for k in np.unique(place[passed]):
            inside = passed & (place == k)
            part = moments.of_images(inside)
            values = (part.mean_norm, part.signal_variance, noise[source][inside], part.scale_mean)
            for name, terms in zip(_CURVES, values, strict=True):
                curves[name][0][i, k], curves[name][1][i, k] = mean_and_error(terms)
    variables: dict[str, Any] = {}
    for name, (mean, error) in curves.items():
        variables |= {name: (dims, mean), f"{name}_se": (dims, error)}
    count = partial(np.bincount, minlength=len(centres))
    variables |= {"images": ("contrast", count(place)), "images_passed": ("contrast", count(place[passed]))}
    by_image = {"noise_variance": noise, "scale_mean": {s: moments.scale_mean for s, moments in found.items()}}
    for name, of_source in by_image.items():
        variables[f"{name}_by_image"] = (("source", "image"), np.stack(list(of_source.values())))
    variables["contrast_by_image"] = ("image", contrast)
    if not passed.all() and {"exact", "amortized"} <= set(found):
        variables |= with_refused("noise_variance", (), noise["exact"], noise["amortized"], passed)
    attrs: dict[str, Any] = {
        f"spearman_{s}": spearman(centres, curves["noise_variance"][0][i]) for i, s in enumerate(found)
    }
    attrs |= {"n_informative": len(prior_sd), "share_reference": float(passed.mean())}
    return xr.Dataset(variables, {"source": list(found), "contrast": centres, "image": labels}, attrs)
