"""Repeated sampling of the data that fail the gate, with settings that depend on the cause of the failure.

There are at most three runs per datum, which are called looks. Each has its own warm-up, so that draws from different
kernels are never mixed. Longer chains are judged at full length, and then thinned to the requested length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from calibrant.inference.references import gate
from calibrant.inference.references.chains import McmcDraws
from calibrant.inference.references.lanes import NutsSettings

_LOOKS = 3  # runs per datum at most
_LONGER = 4  # factor by which chains are made longer
_NEARLY = 1.5  # chains that need at most this factor become only twice as long
_MANY = 0.01  # share of divergent transitions above which the coordinates change, not only the step size

Sampler = Callable[[Tensor, NutsSettings], tuple[McmcDraws, Tensor]]
Groups = Callable[[McmcDraws], tuple[xr.Dataset, xr.Dataset]]


@dataclass(frozen=True)
class Treatment:
    """How the settings for a datum differ from those of the first look."""

    longer: int = 1
    target_accept: float | None = None
    other_powers: bool = False
    dense: bool = False

    def after(self, look: int, divergences: float, lacking: float) -> Treatment:
        """The next treatment.

        Args:
            look: number of looks so far.
            divergences: share of divergent transitions.
            lacking: without divergences, the factor by which chains would have to be longer to pass.
        """
        if look == 1:
            if divergences:
                return Treatment(target_accept=0.95, other_powers=divergences > _MANY)
            return Treatment(longer=2 if lacking <= _NEARLY else _LONGER)
        longer = self.longer if divergences else _LONGER
        return Treatment(longer, 0.995 if divergences else self.target_accept, dense=True)

    def warmup(self, subchains: int) -> int:
        """The factor by which the warm-up of sub-chains is longer; in the last look it is that of a whole chain."""
        return subchains if self.dense else min(self.longer, subchains)

    @property
    def text(self) -> str:
        """Description for the results."""
        parts = [
            f"{self.longer} times longer" if self.longer > 1 else "",
            f"target acceptance {self.target_accept}" if self.target_accept else "",
            "other coordinates" if self.other_powers else "",
            "dense metric" if self.dense else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass
class _Course:
    """The draws so far, with the verdict, the treatment and κ of each datum."""

    draws: McmcDraws
    convergence: xr.Dataset
    treatments: list[Treatment]
    powers: Tensor  # (data, pair)


def run_and_repair(
    sample: Sampler, groups: Groups, size: int, settings: NutsSettings, joint: bool, most: int | None = None
) -> tuple[McmcDraws, xr.Dataset]:
    """Sample, judge, and sample again the data that fail.

    Args:
        sample: a function that samples the data at the given positions; it returns draws and κ `(data, chain, pair)`,
            with one entry along `data` if `joint`.
        groups: a function that returns the groups `posterior` and `sample_stats` of draws, which the gate reads.
        size: number of data.
        settings: settings of the first look.
        joint: whether all data have one joint posterior, because latents are shared.
        most: number of looks at most, 3 by default.

    Returns:
        Draws, and the group `convergence` with the variables `look` and `treatment`.
    """
    draws, powers = sample(torch.arange(size), settings)
    count = len(draws.data)
    course = _Course(draws, judge(draws, groups), [Treatment()] * count, powers[:, 0].expand(count, -1).clone())
    looks = np.ones(count, dtype=np.int64)
    try:
        for look in range(1, most or _LOOKS):
            for treatment, rows in _failures(course, look, joint).items():
                _run_again(course, treatment, rows, sample, groups, settings)
                looks[rows.numpy()] = look + 1
    except KeyboardInterrupt:  # keep the draws that have been judged
        pass
    texts = np.array([treatment.text for treatment in course.treatments], dtype=str)
    return course.draws, course.convergence.assign(look=("data", looks), treatment=("data", texts))


def judge(draws: McmcDraws, groups: Groups) -> xr.Dataset:
    """The verdict of the gate on every datum."""
    found = gate.mcmc_convergence(*groups(draws))
    lost = draws.lost.numpy()
    shares, edges = gate.edge_reasons(draws.edges, len(lost))
    reasons = ["; ".join(filter(None, both)) for both in zip(found["reason"].values.tolist(), edges, strict=True)]
    reason = np.where(lost, "no finite log density at any of 100 starts", np.array(reasons, dtype=str))
    found = found.assign(moved=("data", draws.moved.numpy()), at_edge=("data", shares))
    return found.assign(reason=("data", reason), is_reference=("data", reason == ""))


def _failures(course: _Course, look: int, joint: bool) -> Mapping[Treatment, Tensor]:
    """The data that fail, by their next treatment; no treatment helps without a finite start, or at an edge."""
    found = course.convergence
    transitions = next(iter(course.draws.stats.values()))[:, :, 0].numel()
    low_energy = ~(found["bfmi"].values >= gate.BFMI_LIMIT)  # treated as if all transitions had diverged
    share = np.where(low_energy, 1.0, found["divergences"].values / transitions)
    effective = np.minimum(found["ess_bulk"].values, found["ess_tail"].values)
    lacking = np.maximum((found["rhat"].values - 1) / (gate.RHAT_LIMIT - 1), gate.ESS_LIMIT / effective)
    hopeless = course.draws.lost.numpy() | (found["at_edge"].values > gate.EDGE_LIMIT)
    failed = ~found["is_reference"].values & ~hopeless
    chosen: dict[Treatment, list[int]] = {}
    for row in np.flatnonzero(failed).tolist():
        treatment = course.treatments[row].after(look, float(share[row]), float(lacking[row]))
        chosen.setdefault(treatment, []).append(row)
    if joint and chosen:  # one verdict holds for all data
        return {next(iter(chosen)): torch.arange(len(failed))}
    return {treatment: torch.tensor(rows) for treatment, rows in chosen.items()}


def _run_again(
    course: _Course, treatment: Treatment, rows: Tensor, sample: Sampler, groups: Groups, settings: NutsSettings
) -> None:
    dense = True if treatment.dense else settings.dense
    powers = course.powers[rows].clone() if treatment.other_powers or treatment.dense else None
    plan = replace(
        settings,
        warmup=settings.warmup * treatment.warmup(settings.subchains),
        draws=settings.draws * treatment.longer,
        target_accept=max(treatment.target_accept or 0.0, settings.target_accept),
        dense=dense,
        powers=powers,
        other_powers=treatment.other_powers,
    )
    draws, used = sample(course.draws.data[rows], plan)
    if len(draws.data) < len(rows):  # after Ctrl-C, some data have no new draws
        raise KeyboardInterrupt
    course.powers[rows] = used[:, 0].expand(len(rows), -1)
    verdict = judge(draws, groups)
    course.draws = course.draws.replaced(rows, draws.thinned(settings.draws * settings.subchains))
    for name, values in verdict.data_vars.items():
        course.convergence[name] = _with_rows(course.convergence[name], rows.numpy(), values.values)
    for row in rows.tolist():
        course.treatments[row] = treatment


def _with_rows(array: xr.DataArray, rows: np.ndarray, new: np.ndarray) -> xr.DataArray:
    """A copy with some rows replaced; new strings may be longer than the old ones."""
    values = array.values.astype(np.result_type(array.values, new))
    values[rows] = new
    return array.copy(data=values)
