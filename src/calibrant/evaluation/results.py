"""The results of one run, as the report and the store use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import xarray as xr
from pyro.nn import PyroModule


@dataclass
class RunResult:
    """The results of one model's run.

    Attributes:
        name: the model's registered name, or `FILE.py:Class`.
        model: the model with its trained weights.
        config: content of `config.json`; empty without a run folder.
        amortized: the guide's posterior of the held-out data.
        reference: the reference posterior of the held-out data.
        comparison: result of `compare`, with that of `c2st` if it was computed.
        contrast: result of `contrast_experiment`.
        gap: result of `gap`.
        weights: result of `weights`.
        calibration: result of `calibration`.
        predictive: result of `predictive_check`.
        remedies: result of `remedies`.
        probabilities: result of `predicted_probabilities`; then the predictions are judged, and nothing else.
        history: one row per epoch: `epoch`, `train` and `validation` ELBO (nats per datum), `lr`.
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
    probabilities: xr.Dataset | None = None
    history: list[dict[str, float]] = field(default_factory=list)
