"""Calibration of entries (pixels): the position of each in its posterior predictive distribution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.entries import GRID, Array, Variables, average_shares, null_of, shares
from calibrant.evaluation.statistics.entry_distributions import EntryDistributions, probabilities
from calibrant.guides.many_draws import encoded_once, fixed
from calibrant.inference.problem import Problem
from calibrant.inference.scoring import ROWS, repeated
from calibrant.inference.trees import model_sha256
from calibrant.memory import FEW, blocks, measured_rows, within_memory
from calibrant.program.contract import Program, Values
from calibrant.program.environment import defaults, in_double, seeded
from calibrant.program.simulation import refuse_unsimulated
from calibrant.program.supports import is_improper
from calibrant.program.tracing import guide_trace, latent_values, sampled, trace
from calibrant.program.weighting import kept
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

LEVELS = (0.5, 0.8, 0.95)
_BINS = 20  # of the histograms; every bin is some steps of the grid
_CHANCE = np.sqrt(2.0 / np.pi)  # mean absolute value of a standard Normal


def pixel_calibration(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    draws: int = 100,
    *,
    covariates: Mapping[str, Any] | None = None,
    levels: Iterable[float] = LEVELS,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Where the entries (pixels) of data lie in their posterior predictive distributions, for data and the model's own.

    The randomised PIT of an entry x is uniform between P(X < x) and P(X ≤ x), both averaged over draws of the guide:
    of the mixture p(x' | x) = E_q(z | x) p(x' | z), whose distribution functions are exact given the draws.

    The posterior has seen x, so that the PIT is not uniform even for a true model with exact posteriors: intervals hold
    more than their level. What a true model shows is found with data that the model simulates, one for each datum
    (`…_null`; docs/analysis.md): compare the two, not the data with the uniform distribution. The null uses the guide's
    posteriors of simulated data; if these look nothing like the data, the guide may not know them.

    Unlike `predictive_check`, which compares entries with replicates, the spread of the observation noise is averaged
    exactly, so that some ten draws suffice, and pixels of discretised likelihoods get their probabilities.

    Args:
        model: the program, in `eval()`, without shared latents.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`: some hundreds of data on which the guide was not trained.
        draws: number of draws of the guide per datum.
        covariates: keyword → tensor, leading dimension data.
        levels: masses of central intervals.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimensions `observed` (site), `u`, `level`, `bin`, `data`. `pit_ecdf`, `coverage`, `pit_density` (1 if uniform),
        each with `…_se`, and `coverage_data`; the same of simulated data, `…_null`. `distance` is ∫|F(u) − u| du,
        `distance_null` that of simulated data, and `difference` ± `difference_se` the distance ∫|F − F_null|
        between the two, beside `difference_floor`, its expectation if nothing but chance differs. Standard errors treat
        data, not entries, as independent. A program with an improper prior has nothing of its own data.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract, or a program that cannot be
            simulated.
        InferenceError: for shared latents, entries without a distribution function, a level outside (0, 1), fewer
            than two data, or no draws.
    """
    progress = reporting(progress)
    problem = Problem.of(model, guide, observed, covariates)
    return pixel_calibration_of(problem, draws, levels, seed, progress)


def pixel_calibration_of(
    problem: Problem,
    draws: int = 100,
    levels: Iterable[float] = LEVELS,
    seed: int = 0,
    progress: Progress = silent,
) -> xr.Dataset:
    """Calibration of entries, like `pixel_calibration`, for a problem that is already checked."""
    masses, size = tuple(levels), len(problem.data)
    if draws < 1 or size < 2 or not masses or not all(0.0 < level < 1.0 for level in masses):
        raise InferenceError(
            f"draws={draws}, data: {size}, levels={masses}: give one draw or more, two data or more, and levels "
            "between 0 and 1"
        )
    problem.require_local("a draw of them changes the predictions for all data at once", "to check the rest")
    given = problem.data.batch([0])[0]
    noise = seeded(stream(seed, "pixel calibration"))
    with torch.no_grad(), noise, fixed(problem.guide), defaults(problem.program, given, torch.float64) as (device, _):
        runs = _Runs.read(problem, draws, masses, device)
        found = runs.all_data(False, progress)
        variables = _summaries(found)
        if runs.proper:
            null = runs.all_data(True, progress)
            variables |= null_of(_summaries(null), ("coverage", "pit_ecdf", "pit_density", "distance"))
            variables |= _differences(found["pit_ecdf"], null["pit_ecdf"])
    middles = (np.arange(_BINS) + 0.5) / _BINS
    coords = {"data": problem.data.labels(), "observed": list(problem.data.observed_names)}
    coords |= {"level": np.array(masses), "u": GRID, "bin": middles}
    attrs = {"draws": draws, "seed": seed, "model_sha256": model_sha256(problem.program)}
    return xr.Dataset(variables, coords, attrs)


@dataclass(frozen=True)
class _Runs:
    """Model, guide and data, with which PITs are computed one block of data after the other."""

    problem: Problem
    pair: tuple[Program, Program]
    draws: int
    levels: tuple[float, ...]
    device: torch.device
    proper: bool  # whether the program can be simulated from its prior
    told: EntryDistributions

    @classmethod
    def read(cls, problem: Problem, draws: int, levels: tuple[float, ...], device: torch.device) -> _Runs:
        program, data = problem.program, problem.data
        pair = in_double(program), in_double(problem.guide)
        rows, cols = data.batch(torch.arange(min(len(data), FEW)), device, torch.float64)
        refuse_unsimulated(program, rows, cols)
        size = len(next(iter(rows.values())))
        improper = any(is_improper(site["fn"]) for site in sampled(trace(pair[0], size, cols, rows)).values())
        return cls(problem, pair, draws, levels, device, not improper, EntryDistributions(program))

    def all_data(self, own: bool, progress: Progress) -> dict[str, Array]:
        """Shares of all data, leading dimension data; with `own`, of data that the model simulates in their place."""
        data, parts = self.problem.data, list[dict[str, Array]]()
        few = data.batch(torch.arange(min(len(data), FEW)), self.device, torch.float64)
        largest = measured_rows(ROWS, len(next(iter(few[0].values()))), lambda times: self.sums(*few, times))
        for index, draws in blocks(len(data), self.draws, largest):
            given, covariates = data.batch(index, self.device, torch.float64)
            seen, values = self.simulated(given, covariates) if own else self.as_given(given, covariates)
            sums = [self.sums(values, covariates, len(part)) for part in draws]
            parts.append(self.shares({name: sum(one[name] for one in sums) for name in values}, seen))
            progress("pixel calibration" + " of simulated data" * own, int(index[-1]) + 1, len(data))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def as_given(self, observed: Values, covariates: Values) -> tuple[Values, Values]:
        """Which entries of the data are not masked, and the data."""
        nodes = sampled(trace(self.pair[0], len(next(iter(observed.values()))), covariates, observed))
        return {name: kept(nodes[name]) for name in observed}, observed

    def simulated(self, observed: Values, covariates: Values) -> tuple[Values, Values]:
        """Which entries are not masked, and data that the model simulates, with the observed values elsewhere."""
        nodes = sampled(trace(self.pair[0], len(next(iter(observed.values()))), covariates))
        seen = {name: kept(nodes[name]) for name in observed}
        return seen, {name: torch.where(seen[name], nodes[name]["value"], observed[name]) for name in observed}

    def sums(self, observed: Values, covariates: Values, repeats: int) -> dict[str, Tensor]:
        """P(X < x) and P(X ≤ x), summed over draws of the guide, `(2, data, *event)`; in halves if memory is short."""
        found = within_memory(lambda: self._sums(observed, covariates, repeats), repeats == 1)
        if found is not None:
            return found
        first, second = (self.sums(observed, covariates, half) for half in (repeats // 2, repeats - repeats // 2))
        return {name: first[name] + second[name] for name in first}

    def _sums(self, observed: Values, covariates: Values, repeats: int) -> dict[str, Tensor]:
        rows, cols = (repeated(part, repeats) for part in (observed, covariates))
        size = len(next(iter(rows.values())))
        with encoded_once(self.problem.guide, repeats):
            drawn = latent_values(guide_trace(self.pair[1], rows, size, cols))
        with self.told.kept() as told:
            nodes = sampled(trace(self.pair[0], size, cols, {**rows, **drawn}))
        result = {}
        for name, value in rows.items():
            both = torch.stack(probabilities(name, told.of(name, nodes[name]["fn"], value), value))
            result[name] = both.reshape(2, -1, repeats, *value.shape[1:]).sum(2)
        return result

    def shares(self, sums: Mapping[str, Any], seen: Values) -> dict[str, Array]:
        """The shares of `entries.shares`, `(data, observed, …)`, at one random PIT for each entry."""
        found = []
        for name, (below, upto) in sums.items():
            pit = (below + torch.rand_like(below) * (upto - below)) / self.draws
            found.append(shares(pit, seen[name], self.levels))
        ecdf, coverage = (torch.stack(parts, 1).cpu().numpy() for parts in zip(*found, strict=True))
        return {"pit_ecdf": ecdf, "coverage": coverage}


# -- summaries ---------------------------------------------------------------------------------------------------------


def _summaries(found: Mapping[str, Array]) -> Variables:
    """Averages over data, with histogram and distance, from the shares of every datum."""
    variables = average_shares(found)
    ecdf = found["pit_ecdf"]
    cells = np.diff(ecdf[:, :, :: (len(GRID) - 1) // _BINS], axis=2) * _BINS
    cells[:, :, 0] += ecdf[:, :, 0] * _BINS  # a PIT of exactly zero
    known = np.isfinite(cells).sum(0)
    variables["pit_density"] = (("observed", "bin"), np.nanmean(cells, 0))
    variables["pit_density_se"] = (("observed", "bin"), np.nanstd(cells, 0, ddof=1) / np.sqrt(known))
    value, influence = _distance(ecdf, np.zeros_like(ecdf) + GRID)
    variables["distance"] = (("observed",), value)
    variables["distance_se"] = (("observed",), _error(influence))
    return variables


def _differences(ecdf: Array, null: Array) -> Variables:
    """The distance between the average distribution functions of data and the model's own, and its floor."""
    value, ours = _distance(ecdf, np.nanmean(null, 0, keepdims=True))
    _, theirs = _distance(null, np.nanmean(ecdf, 0, keepdims=True))
    error = np.sqrt(_error(ecdf) ** 2 + _error(null) ** 2)  # of the two functions at every u
    return {
        "difference": (("observed",), value),
        "difference_se": (("observed",), np.hypot(_error(ours), _error(theirs))),
        "difference_floor": (("observed",), _CHANCE * error.mean(-1)),
    }


def _distance(ecdf: Array, other: Array) -> tuple[Array, Array]:
    """∫|F − G| du with F the average of `(data, observed, u)`, and the influence of every datum on it."""
    gap = np.nanmean(ecdf, 0) - other.mean(0)
    influence = (np.sign(gap) * (ecdf - np.nanmean(ecdf, 0))).mean(-1)
    return np.abs(gap).mean(-1), influence


def _error(values: Array) -> Array:
    """Standard error of the mean over the leading dimension; NaN entries are left out."""
    return np.nanstd(values, 0, ddof=1) / np.sqrt(np.isfinite(values).sum(0))
