"""Batched NUTS of all data: ordinary chains where a search finds one mode, and chains in every mode elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.inference.references.chains import McmcDraws, joined
from calibrant.inference.references.composing import NO_MASS, Mode, composed, imbalance, modes_of, softness, weights_of
from calibrant.inference.references.lanes import NutsSettings, sample_nuts
from calibrant.inference.references.partition import Places, fitted, stacked
from calibrant.inference.references.repair import run_and_repair
from calibrant.inference.references.searching import Groups, search
from calibrant.program.contract import Program
from calibrant.progress import Progress
from calibrant.streams import stream

Judged = tuple[McmcDraws, xr.Dataset]
GroupsOf = Callable[[McmcDraws, Data], tuple[xr.Dataset, xr.Dataset]]
_MOST = 8  # modes of a posterior at most
_SE = 0.01  # standard error of a weight above which draws are no reference
_CUT = 0.005  # mass that a boundary may cut off a mode
_SOFT = 0.05  # mean share of other groups in a mode: with more, a target may hold modes that its chains do not reach
_WORST: dict[str, Any] = {"rhat": np.max, "ess_bulk": np.min, "ess_tail": np.min, "divergences": np.sum, "bfmi": np.min}
_WORST |= {"moved": np.sum, "look": np.max, "at_edge": np.max}


@dataclass(frozen=True)
class Runs:
    """What all runs of a reference have in common.

    Attributes:
        program: the program.
        settings: lengths and tuning of the chains.
        joint: whether all data have one joint posterior.
        groups: function of draws and their data that returns the groups `posterior` and `sample_stats`.
        guide: guide at whose draws chains may start, or None.
        progress: called after every part.
    """

    program: PyroModule
    settings: NutsSettings
    joint: bool
    groups: GroupsOf
    guide: Program | None
    progress: Progress

    def judged(self, data: Data, seed: int, places: Places | None = None, looks: int | None = None) -> Judged:
        """Sample some data, judge them, and sample again those that fail."""

        def sample(rows: Tensor, plan: NutsSettings) -> tuple[McmcDraws, Tensor]:
            arguments = self.program, data.subset(rows), plan, seed, self.progress
            if places is None:
                drawn, powers = sample_nuts(*arguments, self.guide)
            else:
                drawn, powers = sample_nuts(*arguments, places=places if self.joint else places[rows])
            return replace(drawn, data=rows[drawn.data]), powers

        def groups(drawn: McmcDraws) -> tuple[xr.Dataset, xr.Dataset]:
            return self.groups(drawn, data.subset(drawn.data))

        return run_and_repair(sample, groups, len(data), self.settings, self.joint, looks)


@dataclass(frozen=True)
class _Part:
    """The chains of one mode: their draws, the verdict of the gate, and the mode's mass."""

    draws: McmcDraws
    convergence: xr.Dataset
    mode: Mode


def sample_all(runs: Runs, data: Data, starts: int, seed: int) -> Judged:
    """Sample all data, in all modes that `starts` short chains find; 0 starts search for none.

    Returns:
        Draws, and the group `convergence` with the variables `modes` and `apart` and the attributes `starts` and
        `expected_wrong`.
    """
    if not starts:
        return runs.judged(data, stream(seed, "reference"))
    starts = max(4, starts // 2) if runs.joint else starts
    found = search(runs.program, data, starts, runs.settings, runs.guide, seed, runs.progress)
    parts: list[Judged] = []
    plain = [] if runs.joint and found else [row for row in range(len(data)) if row not in found]
    complete = True
    if plain:
        some = data.subset(plain) if found else data
        draws, convergence = runs.judged(some, stream(seed, "reference"))
        complete = len(draws.data) == len(plain)
        parts.append((_placed(draws, plain), _told(convergence, 1, False)))
    if found and complete:
        parts += _apart(runs, data, found, seed)
    draws = joined([draws for draws, _ in parts]) if len(parts) > 1 else parts[0][0]
    rows = np.concatenate([part.data.numpy() for part, _ in parts])
    convergence = xr.concat(
        [told for _, told in parts],
        "data",
        coords="minimal",
        compat="override",
        join="override",
        combine_attrs="override",
    )
    convergence = convergence.isel(data=np.argsort(rows))
    exploring = starts if runs.guide is None else starts - starts // 2  # draws of a guide find what it knows
    wrong = float(convergence["apart"].sum()) / (2.0 ** (exploring - 1) - 1)
    return draws, convergence.assign_attrs(starts=starts, expected_wrong=wrong)


def _placed(draws: McmcDraws, rows: list[int]) -> McmcDraws:
    return replace(draws, data=torch.tensor(rows)[draws.data])


def _told(
    convergence: xr.Dataset, modes: int | np.ndarray, apart: bool | np.ndarray, reasons: list[str] | None = None
) -> xr.Dataset:
    """The group with the number of modes, and with other reasons if there are any."""
    size = convergence.sizes["data"]
    found = {"modes": np.broadcast_to(modes, size).copy(), "apart": np.broadcast_to(apart, size).copy()}
    if reasons is not None:
        found |= {"reason": np.array(reasons, dtype=str), "is_reference": np.array([not text for text in reasons])}
    return convergence.assign({name: ("data", values) for name, values in found.items()})


def _apart(runs: Runs, data: Data, found: dict[int, Groups], seed: int) -> list[Judged]:
    """The data whose starts ended in groups between which no chain moved."""
    few = {row: groups for row, groups in found.items() if len(groups) <= _MOST}
    result, again = [], {}
    for row, parts in _in_modes(runs, data, few, seed).items():
        one = _assembled(parts, found[row].apart, stream(seed, "modes", "order", str(data.labels()[row])))
        if one is None:
            again[row] = found[row]
        else:
            result.append((one[0] if runs.joint else _placed(one[0], [row]), one[1]))
    if again:
        result.append(_across(runs, data, again, seed, None))
    if many := {row: groups for row, groups in found.items() if len(groups) > _MOST}:
        result.append(_across(runs, data, many, seed, 1))
    return result


def _in_modes(runs: Runs, data: Data, found: dict[int, Groups], seed: int) -> dict[int, list[_Part]]:
    """Chains in every mode of every posterior; after Ctrl-C only those that are complete."""
    tables = {row: fitted(groups.draws) for row, groups in found.items()}
    units = [(row, mode) for row, groups in found.items() for mode in range(len(groups))]
    if not units:
        return {}
    partition = stacked([tables[row] for row, _ in units], [mode for _, mode in units])
    places = Places(torch.stack([found[row].starts[mode] for row, mode in units]), partition)
    of = stream(seed, "modes", "chains")
    parts: dict[int, list[_Part]] = {row: [] for row in found}
    if runs.joint:
        for unit, (row, mode) in enumerate(units):
            one = torch.tensor([unit])
            draws, convergence = runs.judged(data, stream(of, mode), places[one])
            known = modes_of(runs.program, data, draws, partition[one], stream(of, "evidence", mode))
            parts[row].append(_Part(draws, convergence, known[0]))
        return parts
    rows = torch.tensor([row for row, _ in units])
    observed, covariates = ({name: value[rows] for name, value in part.items()} for part in data.tensors())
    labels = [f"{data.labels()[row]}/{mode}" for row, mode in units]
    repeated = Data(observed, covariates, {"data": labels})
    draws, convergence = runs.judged(repeated, of, places)
    own = partition[draws.data]
    known = modes_of(runs.program, repeated.subset(draws.data), draws, own, stream(of, "evidence"))
    for at, unit in enumerate(draws.data.tolist()):
        part = draws.part(torch.tensor([at]))
        parts[units[unit][0]].append(
            _Part(replace(part, data=torch.zeros(1, dtype=torch.int64)), convergence.isel(data=[at]), known[at])
        )
    return {row: modes for row, modes in parts.items() if len(modes) == len(found[row])}


def _assembled(parts: list[_Part], apart: bool, seed: int) -> Judged | None:
    """The draws of a posterior from those of its modes; None if the partition cuts through a mode."""
    modes = [part.mode for part in parts]
    weights, errors = weights_of(modes)
    if imbalance(modes, weights) > _CUT or softness(modes) > _SOFT:
        return None
    kept = [at for at, weight in enumerate(weights) if not weight < NO_MASS]
    share = np.where(np.isfinite(weights[kept]), weights[kept], 1.0)
    share = share / share.sum()
    parts, error = [parts[at] for at in kept], float(errors[kept].max())
    draws = composed([part.draws for part in parts], share, seed)
    reasons = []
    if len(parts) > 1 and not error < _SE:
        known = f"known only within {error:.0%}" if np.isfinite(error) else "unknown"
        reasons.append(f"{_named(len(parts), apart)}; weights {known} (limit {_SE:.0%})")
    for weight, part in zip(share, parts, strict=True):
        if text := str(part.convergence["reason"].values[0]):
            reasons.append(text if len(parts) == 1 else f"in a mode of weight {weight:.2f}: {text}")
    merged = _merged([part.convergence for part in parts])
    return draws, _told(merged, len(parts), apart, ["; ".join(reasons)] * merged.sizes["data"])


def _merged(parts: list[xr.Dataset]) -> xr.Dataset:
    """The worst values of all modes."""
    result = parts[0]
    for name, worst in _WORST.items():
        result = result.assign({name: ("data", worst([part[name].values for part in parts], axis=0))})
    texts = sorted({str(part["treatment"].values[0]) for part in parts} - {""})
    return result.assign(treatment=("data", np.full(result.sizes["data"], "; ".join(texts))))


def _across(runs: Runs, data: Data, found: dict[int, Groups], seed: int, looks: int | None) -> Judged:
    """Chains that start in all groups in turn, so that R-hat shows whether they mix."""
    rows = list(found)
    starts = torch.stack([groups.across(runs.settings.chains) for groups in found.values()])
    some = data if runs.joint else data.subset(rows)
    draws, convergence = runs.judged(some, stream(seed, "modes", "across"), Places(starts), looks)
    groups = [found[0 if runs.joint else rows[int(at)]] for at in draws.data]
    passed = [ok and len(each) <= _MOST for ok, each in zip(convergence["is_reference"].values, groups, strict=True)]
    counts = np.where(passed, 1, [len(each) for each in groups])
    apart = np.array([each.apart for each in groups]) & ~np.array(passed)
    reasons = [
        "" if ok else "; ".join(filter(None, [_named(len(each), each.apart), str(text)]))
        for ok, each, text in zip(passed, groups, convergence["reason"].values, strict=True)
    ]
    return (draws if runs.joint else _placed(draws, rows)), _told(convergence, counts, apart, reasons)


def _named(count: int, apart: bool) -> str:
    """What is wrong with so many modes, in words."""
    number = f"more than {_MOST}" if count > _MOST else str(count)
    return f"{number} modes between which {'no chain moves' if apart else 'few chains move'}"
