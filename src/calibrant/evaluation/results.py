"""All that one run found, as the report and the store pass it on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import xarray as xr
from pyro.nn import PyroModule


@dataclass
class RunResult:
    """A model's run.

    Attributes:
        name: the model's registered name, or `FILE.py:Class`.
        model: the model with its trained weights.
        config: what `config.json` holds; empty without a run folder.
        amortized: the guide's posterior of the held-out data.
        reference: their reference posterior.
        comparison: what `compare` and, where it was asked for, `c2st` found.
        contrast: what `contrast_experiment` found.
        gap: what `gap` found.
        weights: what `weights` found.
        calibration: what `calibration` found.
        predictive: what `predictive_check` found.
        remedies: what `remedies` found.
        history: a row an epoch: `epoch`, `train` and `validation` ELBO (nats per datum), `lr`.
    """

    name: str
    model: PyroModule
    config: dict[str, Any]
    amortized: xr.DataTree
    reference: xr.DataTree | None = None
    comparison: xr.Dataset | None = None
    contrast: xr.Dataset | None = None
    gap: xr.Dataset | None = None
    weights: xr.Dataset | None = None
    calibration: xr.DataTree | None = None
    predictive: xr.Dataset | None = None
    remedies: xr.Dataset | None = None
    history: list[dict[str, float]] = field(default_factory=list)
