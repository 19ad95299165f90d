"""Posteriors that are hard to sample: what passes the gate is right, and what is refused is refused for its reason."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from agreement import Array, Truth, limit, signed_scores
from awkward_programs import LEVELS, Case

import calibrant as cal

ABSOLUTE = np.array([0.02, 0.12, 0.02])  # largest errors of the shares below the 1, 50 and 99% quantiles
AMONG_ALL = 0.02  # largest error of the shares of all data together


def sampled(case: Case, **options: Any) -> xr.DataTree:
    settings = {"method": "nuts", "compile": False, "seed": 3, **case.options, **options}
    return cal.inference.reference(case.program, case.observed, covariates=case.covariates, **settings)


def of_data(truth: Truth, kept: Array) -> Truth:
    """The truth of some of the data."""
    parts = truth.mean[kept], truth.sd[kept], truth.quantiles[:, kept], truth.errors[:, kept]
    return Truth(*parts, truth.probabilities)


def found(draws: Mapping[str, Any], truth: Mapping[str, Truth], kept: Array) -> dict[str, dict[str, float]]:
    """The largest errors by quantity: |z| of a datum, |z| over all data, and errors of shares."""
    result = {}
    for name, whole in truth.items():
        values, true = np.asarray(draws[name], dtype=np.float64)[:, :, kept], of_data(whole, kept)
        scores, _ = signed_scores(values, true)
        shares = (values[:, :, None] < true.quantiles).mean((0, 1)) - LEVELS.reshape(3, *[1] * true.mean.ndim)
        together = np.nansum(scores, 1) / np.sqrt(np.maximum(1, np.isfinite(scores).sum(1)))
        result[name] = {
            "z": float(np.nanmax(np.abs(scores))),
            "z over all data": float(np.abs(together).max()),
            "share": float((np.abs(shares).reshape(3, -1).max(1) / ABSOLUTE).max()),
            "share over all data": float(np.abs(shares.mean(1)).max() / AMONG_ALL),
        }
    return result


def complaints(case: Case, draws: Mapping[str, Any], kept: Array) -> list[str]:
    """What is wrong with the draws of the data that passed."""
    if not kept.any():
        return []
    count = sum(5 * truth.mean[kept].size for truth in case.truth.values())
    limits = {"z": limit(count), "z over all data": limit(count), "share": 1.0, "share over all data": 1.0}
    return [
        f"{name}: {what} {value:.2f} (limit {limits[what]:.2f})"
        for name, errors in found(draws, case.truth, kept).items()
        for what, value in errors.items()
        if not value < limits[what]
    ]
