"""One call from a model and its guide to verdicts: posterior, reference, comparison, gaps, contrast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from pyro.nn import PyroModule

from calibrant.binding import bind
from calibrant.data import Data
from calibrant.evaluation.compare import compare
from calibrant.evaluation.contrast import contrast_experiment
from calibrant.evaluation.contrast_verdicts import contrast_verdicts
from calibrant.evaluation.gap import gap_or_note
from calibrant.evaluation.judging import Verdict
from calibrant.evaluation.report import report
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.verdicts import verdicts
from calibrant.inference.posterior import posterior
from calibrant.inference.reference import exact_structure
from calibrant.inference.reference import reference as sample_reference
from calibrant.program import Program, as_program
from calibrant.progress import Progress, silent


@dataclass
class Check:
    """What a check found; printed, a plain table.

    Attributes:
        result: trees and statistics.
        verdicts: on the comparison, then on the contrast experiment.
    """

    result: RunResult
    verdicts: list[Verdict]

    def save(self, path: str | Path, command: str = "") -> Path:
        """Write the report, one HTML file; `command` is what it says was run."""
        return report([self.result], path, command)

    def summary(self) -> str:
        """A line for every verdict."""
        rows = [(verdict.status, verdict.sentence) for verdict in self.verdicts]
        width = max((len(status) for status, _ in rows), default=0)
        return "\n".join([self.result.name, *(f"  {status:<{width}}  {sentence}" for status, sentence in rows)])

    def __str__(self) -> str:
        return self.summary()


def check(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    reference: xr.DataTree | None = None,
    *,
    covariates: Mapping[str, Any] | None = None,
    draws: int = 1000,
    chains: int = 4,
    warmup: int = 1000,
    seed: int = 0,
    progress: Progress = silent,
) -> Check:
    """Compare a guide with the reference posterior of every datum.

    What the ELBO leaves is split into approximation and amortization gap where all latents are local and the guide can
    be refined. The contrast experiment is part of it where the posterior is known exactly, the data are images, and the
    model has a Gaussian noise to measure contrast in.

    Args:
        model: the program, in `eval()`.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`: some tens of data, which the guide was not trained on.
        reference: a reference tree of the same data, where there is one; else it is sampled.
        covariates: keyword → tensor.
        draws: draws of the guide, and of each chain of the reference.
        chains: chains of the reference.
        warmup: adaptation steps of a chain (MCMC alone).
        seed: of the draws.
        progress: called with (stage, done, total, text).

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for settings that can't pass the gate, or a reference of other data or weights.
    """
    data, program = bind(model, observed, covariates), as_program(model)
    amortized = posterior(program, guide, data, draws, seed=seed, progress=progress)
    if reference is None:
        reference = sample_reference(program, data, "auto", chains, warmup, draws, seed=seed + 1, progress=progress)
    comparison = compare(amortized, reference)
    contrast = None
    if has_contrast(program, data):
        contrast = contrast_experiment(program, guide, data, chains=chains, seed=seed + 2, progress=progress)
    split, note = gap_or_note(program, guide, data, reference, draws=draws, seed=seed + 3, progress=progress)
    config = {"notes": [note]} if note else {}
    result = RunResult(_name(program), program, config, amortized, reference, comparison, contrast, split)
    return Check(result, [*verdicts(comparison), *(contrast_verdicts(contrast) if contrast is not None else [])])


def _name(program: PyroModule) -> str:
    recipe = getattr(program, "recipe", None)
    target = getattr(program, "function", program)
    return recipe.name if recipe is not None else getattr(target, "__name__", type(target).__name__)


def has_contrast(program: PyroModule, data: Data) -> bool:
    """Whether the contrast experiment has a meaning, one vector latent, and an exact posterior that makes it quick."""
    structure = exact_structure(program, data)
    if structure is None or getattr(getattr(program, "likelihood", None), "scale", None) is None:
        return False
    if sum(prod(event) > 1 for event in structure.latents.values()) != 1:
        return False
    shape = np.shape(data.batch([0])[0][data.observed_names[0]])[1:]
    return len(data.observed_names) == 1 and len(data) >= 2 and len(shape) >= 2
