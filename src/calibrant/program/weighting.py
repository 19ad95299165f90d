"""Masks and scales around sites: what they may stand around, and what they keep from being simulated.

On an observation, a mask says which entries are missing, and a scale makes a weighted likelihood, which is a density
that no simulation follows. On a latent, of a program or of a guide, both are refused: draws of a latent always follow
its distribution, so that a masked or scaled log density is not the density of the draws, and an ELBO has no bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from calibrant.errors import ProgramError
from calibrant.program.supports import masks
from calibrant.program.tracing import sampled


def refuse_weighted_latent(name: str, site: Mapping[str, Any]) -> None:
    """Refuse a mask or a scale of a latent, whether it is written around the site or in its distribution.

    Raises:
        ProgramError: naming the latent and the remedy.
    """
    if is_scaled(site):
        raise ProgramError(
            f"latent {name!r} has a scale of {_number(site['scale'])}, but its draws do not follow a density to that "
            "power: leave the scale out, of the program and of the guide, and to change the weight of prior and data, "
            "put poutine.scale with the inverse scale around the observations"
        )
    if is_masked_at_all(site):
        raise ProgramError(
            f"latent {name!r} is masked, but its draws do not follow a masked density: leave the mask out, of the "
            "program and of the guide, and mask the observations alone (where all that depends on a latent is masked, "
            "its posterior is its prior)"
        )


def refuse_moving_masks(run: Trace, again: Trace, observed: Iterable[str]) -> None:
    """Refuse a mask of an observation that differs between two runs at the same data: it is a weight, not a mask.

    Raises:
        ProgramError: naming the site and the remedy.
    """
    for name in observed:
        if not torch.equal(kept(sampled(run)[name]), kept(sampled(again)[name])):
            raise ProgramError(
                f"the mask of observed site {name!r} changes with a latent, so that it is no pattern of missing "
                "entries: take the mask from a covariate or a buffer, or say what the entries follow where it is "
                "False, with dist.MaskedMixture(mask, otherwise, distribution)"
            )


def scaled(run: Trace) -> list[str]:
    """The sample sites of a run whose density is scaled, which nothing simulates."""
    return [name for name, site in sampled(run).items() if is_scaled(site)]


def is_scaled(site: Mapping[str, Any]) -> bool:
    """Whether a scale other than one stands around a site."""
    return not _is_one(site["scale"])


def is_masked_at_all(site: Mapping[str, Any]) -> bool:
    """Whether a mask stands around a site or in its distribution; a tensor may be True in this run by chance."""
    return any(isinstance(mask, Tensor) or not mask for mask, _ in _masks(site))


def kept(site: Mapping[str, Any]) -> Tensor:
    """Which entries of a site are not masked, with the shape of its value."""
    value: Tensor = site["value"]
    found = torch.ones(value.shape, dtype=torch.bool, device=value.device)
    for mask, batch in _masks(site):
        expanded = torch.as_tensor(mask, dtype=torch.bool, device=value.device).expand(batch)
        found = found & expanded.reshape(*batch, *[1] * (value.dim() - len(batch)))
    return found


def _masks(site: Mapping[str, Any]) -> Iterator[tuple[Any, torch.Size]]:
    """The masks of a site with the batch shapes that they have or expand to, from the outermost inwards."""
    if site["mask"] is not None:
        yield site["mask"], site["fn"].batch_shape
    yield from masks(site["fn"])


def _is_one(weight: Any) -> bool:
    """Whether a mask or scale is the number one (or True), which changes nothing."""
    return bool(weight == 1) if not isinstance(weight, Tensor) else weight.numel() == 1 and bool((weight == 1).all())


def _number(scale: Any) -> str:
    values = torch.as_tensor(scale).unique()
    return f"{float(values[0]):.4g}" if len(values) == 1 else "several numbers"
