"""The question about the evidence gap, where the exact log evidence is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from calibrant.evaluation.judgements.decisions import Question, Statistic
from calibrant.evaluation.judgements.pooled import Limits, average

GAP_MARGIN = 0.1  # nats per datum
GAP_MARGIN_PER_LATENT = 0.002  # sds that are 3% off cost .0009 nats per latent


def questions(result: xr.Dataset, limits: Limits) -> list[Question]:
    """Is the ELBO close enough to the log evidence, on average over the data?"""
    if "evidence_gap" not in result:
        return []
    return [Question("all latents", "evidence gap", [_gap(result, limits)])]


def _gap(result: xr.Dataset, limits: Limits) -> Statistic:
    error, se = result["evidence_gap"].values[:, None], result["evidence_gap_se"].values[:, None]
    margin = GAP_MARGIN + GAP_MARGIN_PER_LATENT * result.sizes["latent"]
    if np.isposinf(error).any():  # a guide that leaves the support has no finite ELBO
        return Statistic("", "", np.inf, 0.0, np.inf, np.inf, 0.0, margin)
    return replace(average("", "", error, se, margin, limits), entry="")
