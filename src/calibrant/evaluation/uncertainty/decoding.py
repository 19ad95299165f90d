"""The images that a program expects at given values of its latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.entry_distributions import EntryDistributions
from calibrant.program.contract import Values
from calibrant.program.environment import cast, defaults, in_double, seeded
from calibrant.program.tracing import trace


def mean_images(
    program: PyroModule, name: str, latents: Mapping[str, Tensor], covariates: Values | None = None
) -> Tensor:
    """The mean of the observed site at values of all latents of a program, `(image, *event)`.

    Args:
        program: the program.
        name: the observed site.
        latents: latent site → values `(image, *event)`; shared latents without the first dimension.
        covariates: keyword → tensor, leading dimension image.

    Raises:
        InferenceError: for a likelihood whose entries have no mean.
    """
    size, told = max(len(value) for value in latents.values()), EntryDistributions(program)
    with torch.no_grad(), seeded(0), defaults(program, latents, torch.float64) as (device, dtype), told.kept():
        held = {latent: values.to(device, dtype) for latent, values in latents.items()}
        given = cast(covariates or {}, device, dtype)
        site: Any = trace(in_double(program), size, given, held).nodes[name]
        found: Tensor = told.of(name, site["fn"], site["value"]).mean
    images = found.double().cpu().expand(site["value"].shape)
    if not images.isfinite().all():
        raise InferenceError(
            f"the distribution of {name!r} has no finite mean at some latents, so that there is no mean image: use a "
            "likelihood whose entries have a mean"
        )
    return images
