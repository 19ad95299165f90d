"""The latents that experiments on images look at: which they are, their prior spread, and which respond to images."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.uncertainty.decoding import mean_images
from calibrant.evaluation.uncertainty.moments import Array, Names, moments_of
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.inference.trees import SAMPLE, latent_names
from calibrant.program.latents import Site
from calibrant.program.simulation import sample_prior
from calibrant.program.supports import is_improper, is_positive
from calibrant.progress import Progress, silent

_INFORMATIVE = 0.1  # least sd over images of the posterior mean of an informative latent, in prior sds
_PRIOR_DRAWS = 20_000


def find_sites(
    found: Mapping[str, Site], data: Data, latent: str | None = None, scale: str | None = None
) -> tuple[Names, Site]:
    """The sites of an experiment, and the vector latent among them: those that are given, else the only ones.

    Args:
        found: the latent sites of the program.
        data: the images.
        latent: name of the vector latent; None for the only one.
        scale: name of the positive scalar latent; None for the only one, if there is one.

    Raises:
        InferenceError: for several observations, no vector latent, or several candidates of which none is named.
    """
    if len(data.observed_names) != 1:
        raise InferenceError(
            f"the data hold the observations {list(data.observed_names)}: experiments on images need exactly one"
        )
    local = {name: site for name, site in found.items() if site.local}
    vectors = [name for name, site in local.items() if site.event_shape.numel() > 1]
    latent = only_site("latent", "vector", vectors, latent)
    if not latent:
        raise InferenceError(f"experiments on images need a local vector latent, the program has only {list(local)}")
    scales = [n for n, site in local.items() if site.event_shape.numel() == 1 and is_positive(site.support)]
    return Names(data.observed_names[0], latent, only_site("scale", "positive scalar", scales, scale)), local[latent]


def only_site(argument: str, kind: str, names: list[str], asked: str | None) -> str:
    """The given site, else the only one of its kind; "" if there is none."""
    if asked is not None and asked not in names:
        raise InferenceError(f"{argument}={asked!r} is no {kind} among the local latents; such are {names}")
    if asked is None and len(names) > 1:
        raise InferenceError(f"the program has the {kind} latents {names}: name one with {argument}=")
    return asked or (names[0] if names else "")


def prior_sd_of(program: PyroModule, site: Site, data: Data, seed: int) -> Array:
    """Prior sd of every latent, `(latent,)`: in closed form if its prior has no parents, else from simulated draws.

    Args:
        program: the program.
        site: the vector latent.
        data: some of the data, whose covariates simulated draws are given.
        seed: random seed for simulated draws.

    Raises:
        InferenceError: for an improper prior.
    """
    if is_improper(site.prior):
        raise InferenceError(f"latent {site.name!r} has an improper prior: there is no prior sd to compare with")
    given = data.tensors()[1]
    if not (site.parents or given):
        try:
            prior: Any = site.prior
            return prior.stddev[0].detach().double().cpu().numpy().reshape(-1)
        except NotImplementedError:  # some families have no moments in closed form
            pass
    repeats = -(-_PRIOR_DRAWS // len(data))
    covariates = {name: torch.cat([value] * repeats) for name, value in given.items()}
    drawn = sample_prior(program, repeats * len(data), covariates, seed=seed)[site.name]
    return drawn.double().flatten(1).std(0).cpu().numpy()


def informative_of(natural: xr.DataTree, names: Names, prior_sd: Array) -> npt.NDArray[np.bool_]:
    """Which latents respond to images, `(latent,)`.

    An informative latent has posterior means whose standard deviation over images, free of Monte Carlo error, is above
    0.1 of its prior's.

    Args:
        natural: reference or guide draws of unchanged images.
        names: the sites.
        prior_sd: `(latent,)`.

    Raises:
        InferenceError: if fewer than two images pass the gate.
    """
    moments = moments_of(natural, names)
    passed = moments.passed
    if passed.sum() < 2:
        raise InferenceError(
            f"the reference of {(~passed).sum()} of {len(passed)} images fails the gate: use more draws, or another "
            "method="
        )
    signal = moments.mean[passed].var(0, ddof=1) - moments.mean_error[passed].mean(0)
    return signal > (_INFORMATIVE * prior_sd) ** 2


def reconstruction_changes(problem: Problem, names: Names, draws: int, seed: int, progress: Progress = silent) -> Array:
    """How much the reconstructions of images change without each latent, `(latent,)`, in squared data units.

    The reconstruction is the mean of the image, with all latents at the guide's posterior means. One latent at a time
    is replaced by its average over images; the squared changes are summed over pixels and averaged over images. Each is
    the product of the changes by two halves of the draws, so that the noise of draws adds nothing on average.

    Args:
        problem: program, guide and images, which should be training images.
        names: the sites.
        draws: number of guide draws per image.
        seed: random seed for the draws.
        progress: called with (stage, done, total, text).

    Raises:
        InferenceError: for a likelihood without a mean.
    """
    group, data = posterior_of(problem, draws, seed=seed)["posterior"].dataset, problem.data
    decoded = partial(mean_images, problem.program, names.observed, covariates=data.tensors()[1])
    halves = [group.isel(draw=slice(first, None, 2)) for first in (0, 1)]
    means = [{n: torch.as_tensor(h[n].mean(SAMPLE, dtype=np.float64).values) for n in latent_names(h)} for h in halves]
    whole, changes = [decoded(mean) for mean in means], []
    count = means[0][names.latent].flatten(1).shape[1]
    for latent in range(count):
        parts = [
            decoded(_without(mean, names.latent, latent)) - image for mean, image in zip(means, whole, strict=True)
        ]
        changes.append(float((parts[0] * parts[1]).flatten(1).sum(1).mean()))
        progress("reconstruction", latent + 1, count)
    return np.array(changes)


def _without(means: Mapping[str, Tensor], name: str, latent: int) -> dict[str, Tensor]:
    """Latents with one entry of a site at its average over images."""
    z = means[name].flatten(1).clone()
    z[:, latent] = z[:, latent].mean()
    return {**means, name: z.reshape(means[name].shape)}
