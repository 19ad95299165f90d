"""The results of one run, as the report and the store use them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.shown import Shown, counted


@dataclass(repr=False)
class RunResult(Shown):
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
        folder: the run folder, if the results are stored in one.
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
    folder: Path | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """The name, the number of data, and which results there are."""
        count = self.amortized["posterior"].sizes.get("data", 1)
        parts = [one.name for one in fields(self) if isinstance(getattr(self, one.name), xr.Dataset | xr.DataTree)]
        return {"": f"`{self.name}`, {counted(count, 'datum', 'data')}", "results": ", ".join(parts)}

    def rows(self, group: str, count: int) -> dict[str, Tensor]:
        """The first `count` data of "observed_data" or "constant_data" (the covariates), `(count, *event)` each."""
        given = self.amortized[group].dataset if group in self.amortized.children else xr.Dataset()
        variables = ((str(n), v.transpose("data", ...)) for n, v in given.data_vars.items() if "data" in v.dims)
        return {name: torch.as_tensor(variable.values[:count]) for name, variable in variables}
