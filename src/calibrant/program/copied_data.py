"""Covariates that hold the observed data, as in programs of a time series that read its past as a covariate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from calibrant.program.contract import Values

_NUMBERS = 20_000  # numbers of an observation that are compared
_LAGS = 8  # largest shift along the data, or the first dimension of the event
_SURE = 20.0  # bits: shorter equal stretches may be chance


def covariate_with_data(observed: Values, covariates: Values) -> tuple[str, str] | None:
    """The first covariate that holds data of an observed site, with the name of the site; None if none does.

    It may hold all of them or a part, and shifted by a few steps, along the first dimension of the event or the data.

    Args:
        observed: site → tensor, leading dimension data.
        covariates: keyword → tensor, leading dimension data.
    """
    for name, site in ((name, site) for name in covariates for site in observed):
        data = observed[site]
        rows = max(1, _NUMBERS // max(1, data[0].numel()))
        if any(_overlap(part, data[:rows]) for part in _parts(covariates[name][:rows], data)):
            return name, site
    return None


def _parts(covariate: Tensor, data: Tensor) -> Iterator[Tensor]:
    """The covariate, or the entries of its last dimension, with as many dimensions as the data."""
    if covariate.dim() == data.dim() + 1:
        yield from covariate.unbind(-1)
    if covariate.dim() == data.dim() or {covariate.dim(), data.dim()} == {1, 2}:
        yield covariate


def _overlap(covariate: Tensor, data: Tensor) -> bool:
    """Whether the two are equal, at some lag along their first or second dimension, where they overlap."""
    a, b = (value if value.dim() > 1 else value[:, None] for value in (covariate, data))
    if a.shape[2:] != b.shape[2:] or a.is_complex() or b.is_complex():
        return False
    a, b = a.double(), b.to(a.device).double()
    return any(_overlap_along(dim, a, b) for dim in (1, 0))


def _overlap_along(dim: int, a: Tensor, b: Tensor) -> bool:
    for lag in range(max(-_LAGS, 1 - a.shape[dim]), min(_LAGS, b.shape[dim] - 1) + 1):
        start = max(0, -lag)
        length = min(a.shape[dim], b.shape[dim] - lag) - start
        ours, theirs = a.narrow(dim, start, length), b.narrow(dim, start + lag, length)
        if torch.equal(ours.float(), theirs.float()) and _bits(ours) >= _SURE:
            return True
    return False


def _bits(values: Tensor) -> float:
    """The information in the numbers, if they were drawn independently from their own frequencies."""
    counts = values.unique(return_counts=True)[1].double()
    return float((counts * (counts.sum() / counts).log2()).sum())
