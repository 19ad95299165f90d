"""Probability integral transforms of the entries (pixels) of observations: shares of each datum, and their averages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[np.float64]
Variables = dict[str, tuple[tuple[str, ...], Array]]

GRID = np.linspace(0.0, 1.0, 101)


def shares(pit: Tensor, kept: Tensor, levels: Iterable[float]) -> tuple[Tensor, Tensor]:
    """For every datum, the shares of entries with a PIT of at most each u of `GRID`, and inside each central interval.

    Args:
        pit: PIT of every entry, `(data, *event)`.
        kept: which entries are not masked, in the same shape.
        levels: masses of the central intervals.

    Returns:
        `(data, u)` and `(data, level)`; NaN for data without unmasked entries.
    """
    pit, kept = (values.reshape(len(values), -1) for values in (pit, kept))
    known = kept.sum(1).double()
    grid = torch.as_tensor(GRID, dtype=pit.dtype)
    cells = torch.where(kept, torch.searchsorted(grid, pit.contiguous()), len(grid))
    counts = torch.zeros(len(pit), len(grid) + 1, dtype=pit.dtype).scatter_add_(1, cells, torch.ones_like(pit))
    inside = [((pit - 0.5).abs() <= 0.5 * level) & kept for level in levels]
    coverage = torch.stack([held.sum(1) / known for held in inside], 1)
    return counts[:, :-1].cumsum(1) / known[:, None], coverage


def average_shares(found: Mapping[str, Array]) -> Variables:
    """Averages over data of the shares `(data, observed, …)`, which are NaN for data without unmasked entries."""
    variables: Variables = {"coverage_data": (("observed", "data", "level"), found["coverage"].transpose(1, 0, 2))}
    for name, dim in (("pit_ecdf", "u"), ("coverage", "level")):
        known = np.isfinite(found[name]).sum(0)
        variables[name] = (("observed", dim), np.nansum(found[name], 0) / known)
        variables[f"{name}_se"] = (("observed", dim), np.nanstd(found[name], 0, ddof=1) / np.sqrt(known))
    return variables


def null_of(variables: Variables, names: Iterable[str]) -> Variables:
    """Variables of data that the model simulates, and their errors, named `…_null` after those that they belong to."""
    return {f"{name}_null{end}": variables[f"{name}{end}"] for name in names for end in ("", "_se")}
