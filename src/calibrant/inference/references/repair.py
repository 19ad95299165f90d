"""Chains behind the gate: what fails is run again, treated by the cause of its failure.

Every datum gets at most three looks. Each is a run of its own with a warm-up of its own, so that draws of different
kernels are never mixed; longer chains are thinned to the length asked for, and judged at full length.
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

_LOOKS = 3
_LONGER = 4
_NEARLY = 1.5  # times the length that they have: chains that lack no more become twice as long
_MANY = 0.01  # share of divergent transitions from which the coordinates are doubted, not the step size alone

Sampler = Callable[[Tensor, NutsSettings], tuple[McmcDraws, Tensor]]
Groups = Callable[[McmcDraws], tuple[xr.Dataset, xr.Dataset]]


@dataclass(frozen=True)
class Treatment:
    """How a datum's chains differ from the first look's."""

    longer: int = 1
    target_accept: float | None = None
    other_powers: bool = False
    dense: bool = False

    def after(self, look: int, divergences: float, lacking: float) -> Treatment:
        """The next one, where a share of transitions diverged, or else chains have to be `lacking` times longer."""
        if look == 1:
            if divergences:
                return Treatment(target_accept=0.95, other_powers=divergences > _MANY)
            return Treatment(longer=2 if lacking <= _NEARLY else _LONGER)
        longer = self.longer if divergences else _LONGER
        return Treatment(longer, 0.99 if divergences else self.target_accept, dense=True)

    @property
    def text(self) -> str:
        """In words, for the results."""
        parts = [
            f"{self.longer} times longer" if self.longer > 1 else "",
            f"target acceptance {self.target_accept}" if self.target_accept else "",
            "other coordinates" if self.other_powers else "",
            "dense metric" if self.dense else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass
class _Course:
    """What has been drawn so far, the verdicts, and each datum's treatment and κ."""

    draws: McmcDraws
    convergence: xr.Dataset
    treatments: list[Treatment]
    powers: Tensor  # (data, pair)


def run_and_repair(
    sample: Sampler, groups: Groups, size: int, settings: NutsSettings, joint: bool
) -> tuple[McmcDraws, xr.Dataset]:
    """Sample, judge, and run again what fails.

    Args:
        sample: draws for the data at some positions, and κ `(data, chain, pair)` (of a single datum where joint).
        groups: the groups `posterior` and `sample_stats` that the gate reads.
        size: number of data.
        settings: of the first look.
        joint: all data have one posterior together, because latents are shared.

    Returns:
        Draws, and the group `convergence` with the variables `look` and `treatment`.
    """
    draws, powers = sample(torch.arange(size), settings)
    count = len(draws.data)
    course = _Course(draws, judge(draws, groups), [Treatment()] * count, powers[:, 0].expand(count, -1).clone())
    looks = np.ones(count, dtype=np.int64)
    try:
        for look in range(1, _LOOKS):
            for treatment, rows in _failures(course, look, joint).items():
                _run_again(course, treatment, rows, sample, groups, settings)
                looks[rows.numpy()] = look + 1
    except KeyboardInterrupt:  # what has been judged stands
        pass
    texts = np.array([treatment.text for treatment in course.treatments], dtype=str)
    return course.draws, course.convergence.assign(look=("data", looks), treatment=("data", texts))


def judge(draws: McmcDraws, groups: Groups) -> xr.Dataset:
    """The gate's verdict on every datum."""
    found = gate.mcmc_convergence(*groups(draws))
    lost = draws.lost.numpy()
    reason = np.where(lost, "no finite log density at any of 100 starts", found["reason"].values)
    found = found.assign(moved=("data", draws.moved.numpy()))
    return found.assign(reason=("data", reason), is_reference=("data", found["is_reference"].values & ~lost))


def _failures(course: _Course, look: int, joint: bool) -> Mapping[Treatment, Tensor]:
    """The data that fail, by the treatment they get next; lost ones can't be treated."""
    found = course.convergence
    transitions = next(iter(course.draws.stats.values()))[:, :, 0].numel()
    low_energy = ~(found["bfmi"].values >= gate.BFMI_LIMIT)  # that is treated as if all transitions had diverged
    share = np.where(low_energy, 1.0, found["divergences"].values / transitions)
    effective = np.minimum(found["ess_bulk"].values, found["ess_tail"].values)
    lacking = np.maximum((found["rhat"].values - 1) / (gate.RHAT_LIMIT - 1), gate.ESS_LIMIT / effective)
    failed = ~found["is_reference"].values & ~course.draws.lost.numpy()
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
    dense = settings.dense or treatment.dense
    powers = course.powers[rows].clone() if treatment.other_powers or dense else None
    plan = replace(
        settings,
        draws=settings.draws * treatment.longer,
        target_accept=max(treatment.target_accept or 0.0, settings.target_accept),
        dense=dense,
        powers=powers,
        other_powers=treatment.other_powers,
    )
    draws, used = sample(course.draws.data[rows], plan)
    if len(draws.data) < len(rows):  # Ctrl-C: of some there is nothing new
        raise KeyboardInterrupt
    course.powers[rows] = used[:, 0].expand(len(rows), -1)
    verdict = judge(draws, groups)
    course.draws = course.draws.replaced(rows, draws.thinned(settings.draws))
    for name, values in verdict.data_vars.items():
        course.convergence[name] = _with_rows(course.convergence[name], rows.numpy(), values.values)
    for row in rows.tolist():
        course.treatments[row] = treatment


def _with_rows(array: xr.DataArray, rows: np.ndarray, new: np.ndarray) -> xr.DataArray:
    """A copy with some rows replaced; strings may get longer."""
    values = array.values.astype(np.result_type(array.values, new))
    values[rows] = new
    return array.copy(data=values)
