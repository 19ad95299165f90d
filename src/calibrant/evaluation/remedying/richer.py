"""Guides that are richer than the guide that is judged, trained for the unchanged model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyro.nn import PyroModule

from calibrant.binding import bind
from calibrant.data.dataset import Data
from calibrant.errors import InferenceError, NonFiniteLoss, ProgramError
from calibrant.evaluation.statistics.simulated_data import refuse_unsimulated_data
from calibrant.guides.amortized import AmortizedGuide
from calibrant.guides.amortizing import amortize
from calibrant.guides.collapsed import CollapsedGuide
from calibrant.guides.families.choosing import choose_family
from calibrant.inference.fitting.loop import fit
from calibrant.program.latents import sites
from calibrant.program.modules import copied, unchanging
from calibrant.program.simulation import sample_prior
from calibrant.progress import Progress
from calibrant.streams import stream

Family = dict[str, str]
_SIMULATED = 5_000  # number of simulated training data, if none are given
_BATCH, _LR, _LOWER_LR = 256, 5e-3, 1e-3  # batch size and learning rate; the lower rate is used if gradients overflow
_RANKS = {"mean-field": 0, "faithful": 1, "program": 1, "full": 2, "collapsed": 3}
_SMALL = 8  # largest number of entries of a site that gets a flow, if there are larger sites too
_FLEXIBLE = ("dense", "low-rank", "flow")  # families that may be richer than those of "auto"


def richer_guides(program: PyroModule, guide: PyroModule, data: Data, seed: int) -> dict[str, tuple[str, Family]]:
    """Name → structure and families of every guide that is richer than a given guide and that the program allows."""
    is_ours = isinstance(guide, (AmortizedGuide, CollapsedGuide))
    spec: dict[str, Any] = guide.spec if is_ours else {"structure": "mean-field"}
    few = data[: min(len(data), 64)]
    own = {site["name"]: site["family"].partition("@")[0] for site in spec.get("sites", [])}
    kept = {name: family for name, family in own.items() if family == "flow"}
    asked: dict[str, tuple[str, Family]] = {
        "faithful": ("faithful", {name: family for name, family in own.items() if family in _FLEXIBLE}),
        "full": ("full", kept),
        "full, flow": ("full", {**flows(program, few), **kept}),
        "collapsed": ("collapsed", {}),
    }
    found: dict[str, tuple[str, Family]] = {}
    seen = [_sites_of(spec)]
    for name, (structure, family) in asked.items():
        if _RANKS[structure] < _RANKS[spec["structure"]]:
            continue
        with suppress(ProgramError):  # the program does not allow this guide
            made = _sites_of(amortize(program, few, structure, family, seed=seed).spec)
            if made not in seen:
                found[name] = (structure, family)
                seen.append(made)
    return found


def flows(program: PyroModule, data: Data) -> Family:
    """A flow for every small latent, such as a scale, or for all if none is small; never for classes and directions.

    A flow of many entries takes some ten times as long as a dense Normal, which large latents get.
    """
    found = {}
    for name, site in sites(program, *data.tensors()).items():
        with suppress(ProgramError):
            choose_family(name, site.support, site.prior, "flow")
            found[name] = site.event_shape.numel()
    small = [name for name, entries in found.items() if entries <= _SMALL]
    return dict.fromkeys(small or found, "flow")


def _sites_of(spec: Mapping[str, Any]) -> Any:
    """The part of a guide's specification that two guides share if they differ only in their encoders."""
    parts = sorted((site["name"], tuple(site["parents"]), site["family"]) for site in spec.get("sites", []))
    return parts, sorted(spec.get("block", {}))


def encoder_kind(guide: PyroModule) -> Any:
    """The kind of encoder of a guide; richer guides get the same kind."""
    return guide.spec["encoder"] if isinstance(guide, (AmortizedGuide, CollapsedGuide)) else None


@dataclass(frozen=True)
class TrainingData:
    """Training data, their origin ("given", "simulated" or "nothing"), and the reason if there are none."""

    data: Data | None
    source: str
    reason: str = ""

    @classmethod
    def of(cls, program: PyroModule, judged: Data, train: Mapping[str, Any] | Data | None, seed: int) -> TrainingData:
        """The given training data, else simulated ones, with covariates drawn with replacement from the judged data."""
        if train is not None:
            return cls(bind(program, train), "given")
        rows = np.random.default_rng(stream(seed, "covariates")).integers(len(judged), size=_SIMULATED)
        covariates = judged.batch(rows)[1] if judged.covariate_names else {}
        try:
            refuse_unsimulated_data(program, judged)
            simulated = sample_prior(program, _SIMULATED, covariates, stream(seed, "simulated"))
        except ProgramError as error:
            return cls(None, "nothing", f"no data to train on were given, and none can be simulated: {error}")
        return cls(Data({name: simulated[name].cpu() for name in judged.observed_names}, covariates), "simulated")


def trained_guide(
    program: PyroModule,
    training: TrainingData,
    structure: str,
    family: Family,
    encoder: Any,
    steps: int,
    seed: int,
    progress: Progress,
) -> PyroModule:
    """Train a new guide for a copy of the program, whose weights and buffers do not change."""
    data = training.data
    if data is None:
        raise InferenceError(training.reason)
    frozen = copied(program)
    epochs = math.ceil(steps / max(1, int(0.9 * len(data)) // _BATCH))
    options: dict[str, Any] = {"epochs": epochs, "batch_size": _BATCH, "patience": epochs, "seed": seed}

    def fitted(lr: float) -> PyroModule:
        guide = amortize(frozen, data, structure, family, encoder, seed=seed)
        if has_weights(guide):
            with unchanging(frozen):
                fit(frozen, guide, data, lr=lr, **options, progress=progress)
        return guide

    try:
        guide = fitted(_LR)
    except NonFiniteLoss:
        guide = fitted(_LOWER_LR)
    return guide.attach(program) if isinstance(guide, CollapsedGuide) else guide


def has_weights(guide: PyroModule) -> bool:
    """Whether a guide has weights to train; a collapsed guide without a scale has none, and is exact."""
    return any(weight.requires_grad for weight in guide.parameters())
