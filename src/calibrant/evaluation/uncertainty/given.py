"""Moments and contrast curves of draws that are there already: trees of `posterior`, `reference`, or other samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.bins import BINS, bin_centres, binned
from calibrant.evaluation.uncertainty.images import contrast_of_images
from calibrant.evaluation.uncertainty.latents import only_site
from calibrant.evaluation.uncertainty.moments import (
    Array,
    Names,
    Which,
    draws_of,
    gaussian_entropy,
    is_independent,
    moments_of,
)
from calibrant.inference.trees import data_labels, latent_names

Informative = npt.ArrayLike | None


def posterior_moments(
    tree: xr.DataTree,
    latent: str | None = None,
    scale: str | None = None,
    *,
    prior_sd: npt.ArrayLike = 1.0,
    informative: Informative = None,
) -> xr.Dataset:
    """Posterior moments of every image, from draws that are there already, with their Monte Carlo errors.

    Args:
        tree: draws of `inference.posterior` or `inference.reference`, or any tree with a group `posterior` whose
            variables have the dimensions `chain`, `draw` and `data`.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        prior_sd: what the latents are divided by, one number or one per latent; 1 for the latents as they are.
        informative: which latents are used, `(latent,)`; None for all of them.

    Returns:
        Dimensions `image` and `latent` (the latents that are used): the posterior `mean` ± `mean_se` and `sd`;
        `posterior_sd` ± `posterior_sd_se`, averaged over latents; `entropy`, that of the Normal with the draws'
        covariance, in nats, an upper bound; `scale_mean` and `scale_cv` ± `…_se` (NaN without a scale); `passed`,
        whether the image passed the gate (draws without one do). Images that did not pass are NaN.

    Raises:
        InferenceError: for a tree without draws, or several candidates for a latent of which none is named.
    """
    names, (used, unit) = _names_in(tree, latent, scale), _used(informative, prior_sd)
    moments = moments_of(tree, names, used, unit)
    group = tree["posterior"].dataset
    entropy = gaussian_entropy((draws_of(group[names.latent]) / unit)[..., used], is_independent(group))
    both, one = ("image", "latent"), "image"
    variables: dict[str, Any] = {
        "mean": (both, moments.mean),
        "mean_se": (both, np.sqrt(moments.mean_error)),
        "sd": (both, moments.sd),
        "entropy": (one, np.where(moments.passed, entropy, np.nan)),
        "passed": (one, moments.passed),
    }
    for name in ("posterior_sd", "scale_mean", "scale_cv"):
        variables |= {field: (one, getattr(moments, field)) for field in (name, f"{name}_se")}
    return xr.Dataset(variables, {"image": data_labels(tree)}, {"latent": names.latent, "scale": names.scale})


def binned_moments(
    trees: Mapping[str, xr.DataTree],
    contrast: npt.ArrayLike | None = None,
    bins: int = BINS,
    latent: str | None = None,
    scale: str | None = None,
    *,
    prior_sd: npt.ArrayLike = 1.0,
    informative: Informative = None,
) -> xr.Dataset:
    """The curves of `contrast_bins` over any number of each image, from draws that are there already.

    Args:
        trees: source → draws of the same images in the same order, as for `posterior_moments`; for example `{"exact":
            reference(…), "amortized": posterior(…)}`.
        contrast: the number of each image that is binned; None for the contrast of the images in `observed_data`.
        bins: number of bins, evenly spaced from the smallest number to the largest.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        prior_sd: prior standard deviation, one number or one per latent.
        informative: which latents are used, `(latent,)`; None for all of them.

    Returns:
        The curves and the values of single images, as `contrast_bins` returns them.

    Raises:
        InferenceError: for trees of different images, or several candidates for a latent of which none is named.
    """
    if not trees:
        raise InferenceError("there is no tree: give draws by source, such as {'amortized': posterior(…)}")
    first, *others = trees.values()
    labels = data_labels(first)
    if any(not np.array_equal(labels, data_labels(tree)) for tree in others):
        raise InferenceError("the trees hold different images, or the same ones in another order: draw them together")
    names, (used, unit) = _names_in(first, latent, scale), _used(informative, prior_sd)
    x = _contrasts(first, names) if contrast is None else np.asarray(contrast, dtype=np.float64)
    if x.shape != labels.shape:
        raise InferenceError(
            f"contrast has shape {x.shape}, but the trees hold {len(labels)} images: give one number each"
        )
    found = {source: moments_of(tree, names, used) for source, tree in trees.items()}
    latents = next(iter(found.values())).mean.shape[1]
    sd = np.broadcast_to(unit, (latents,)) if np.ndim(unit) == 0 else np.asarray(unit)[used]
    return binned(found, x, bin_centres(x, bins), labels, sd).assign_attrs(latent=names.latent, scale=names.scale)


def _names_in(tree: xr.DataTree, latent: str | None, scale: str | None) -> Names:
    """The sites of a tree: those that are given, else the only ones of their kind."""
    if "posterior" not in tree.children:
        raise InferenceError(f"the tree has no group `posterior`, only {sorted(tree.children)}")
    group = tree["posterior"].dataset
    local = {name: draws_of(group[name]) for name in latent_names(group) if "data" in group[name].dims}
    vectors = [name for name, draws in local.items() if draws.shape[-1] > 1]
    scalars = [name for name, draws in local.items() if draws.shape[-1] == 1 and (draws > 0).all()]
    latent = only_site("latent", "vector", vectors, latent)
    if not latent:
        raise InferenceError(f"the tree has no vector latent, only {list(local)}")
    observed = list(tree["observed_data"].data_vars) if "observed_data" in tree.children else []
    return Names(str(observed[0]) if observed else "", latent, only_site("scale", "positive scalar", scalars, scale))


def _used(informative: Informative, prior_sd: npt.ArrayLike) -> tuple[Which, Array | float]:
    used: Which = slice(None) if informative is None else np.asarray(informative, dtype=bool)
    unit = np.asarray(prior_sd, dtype=np.float64)
    return used, unit if unit.ndim else float(unit)


def _contrasts(tree: xr.DataTree, names: Names) -> Array:
    if not names.observed:
        raise InferenceError("the trees hold no images (`observed_data`): give contrast=, one number per image")
    images = tree["observed_data"][names.observed].transpose("data", ...).values
    return contrast_of_images(torch.as_tensor(images, dtype=torch.float64)).numpy()
