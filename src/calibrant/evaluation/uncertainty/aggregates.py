"""The aggregate posterior, the average of the posteriors of all images, beside the prior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.evaluation.uncertainty.means import MeansPlan, means_of
from calibrant.evaluation.uncertainty.moments import Array
from calibrant.evaluation.uncertainty.sources import SourcePlan
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program
from calibrant.progress import Progress, reporting
from calibrant.streams import stream


def aggregate_posterior(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    draws: int = 500,
    chains: int = 4,
    reference: bool = True,
    latent: str | None = None,
    scale: str | None = None,
    seed: int = 0,
    method: str = "auto",
    progress: Progress | bool = True,
    *,
    covariates: Mapping[str, Any] | None = None,
    warmup: int = 1000,
) -> xr.Dataset:
    """The variance of each latent under the average of all posteriors, over its prior variance.

    For data that follow the model the exact posteriors give 1.

    The variance is the mean of the posterior variances plus the variance of the posterior means over images, free of
    the part that comes from draws (arXiv 2404.15390).

    Args:
        model: the program, with one observed site.
        guide: its guide; both should be in `eval()`.
        observed: site → images, or a `Data`.
        draws: number of draws per reference chain, and of guide draws per image.
        chains: number of reference chains.
        reference: whether the model's posteriors are used; else there is the guide alone.
        latent: name of the vector latent, if there is more than one.
        scale: name of the positive scalar latent, if there is more than one.
        seed: random seed for the draws.
        method: method of `reference`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        covariates: keyword → tensor, leading dimension data.
        warmup: number of adaptation steps per reference chain (MCMC only).

    Returns:
        Dimensions `source` ("exact", "amortized"), `latent`: `variance` and its parts `within` (mean of the posterior
        variances) and `between` (variance of the posterior means), all over the prior variance, and the averages over
        latents `average_variance`, `average_within`, `average_between`; each with `…_se` over images. `images`
        (source), the number of images that are used.

    Raises:
        InferenceError: for sites that it cannot use, or draws of the guide that are not finite.
        ProgramError, DataError: for a model, guide or data that break the contract.
    """
    progress = reporting(progress)
    plan = MeansPlan(latent, scale, SourcePlan(draws, chains, warmup, method, reference))
    problem = Problem.of(model, guide, observed, covariates)
    return aggregate_of(means_of(problem, plan, stream(seed, "aggregate posterior"), progress))


def aggregate_of(means: xr.Dataset) -> xr.Dataset:
    """The aggregate posterior, like `aggregate_posterior`, from the result of `posterior_means`."""
    unit, rows = means["prior_sd"].values ** 2, list[dict[str, Array]]()
    for source in means["source"].values:
        part = means.sel(source=source)
        there = np.isfinite(part["mean"].values).all(1)
        mean, error, within = (part[name].values[there] for name in ("mean", "mean_error", "variance"))
        count = max(len(mean), 2)
        between = (mean - mean.mean(0)) ** 2 * count / (count - 1) - error
        terms = {"variance": within + between, "within": within, "between": between}
        row = {"images": np.array(len(mean))}
        for name, values in ((name, values / unit) for name, values in terms.items()):
            for key, of_images in ((name, values), (f"average_{name}", values.mean(1))):
                row |= {key: of_images.mean(0), f"{key}_se": of_images.std(0, ddof=1) / np.sqrt(count)}
        rows.append(row)
    variables: dict[str, Any] = {
        name: (("source", "latent")[: 1 + rows[0][name].ndim], np.stack([row[name] for row in rows]))
        for name in rows[0]
    }
    return xr.Dataset(variables, {"source": means["source"].values}, {"latent": means.attrs["latent"]})
