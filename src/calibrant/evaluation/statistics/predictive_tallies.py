"""Posterior and prior predictive draws for a predictive check, one block of data after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.data_statistics import Function, Statistic, choose_statistics
from calibrant.evaluation.statistics.entries import GRID, shares
from calibrant.inference.trees import Latent
from calibrant.memory import FEW, blocks, measured_rows, within_memory
from calibrant.program.contract import Program, Values
from calibrant.program.simulation import refuse_unsimulated
from calibrant.program.supports import is_improper
from calibrant.program.tracing import guide_trace, is_local, latent_values, sampled, trace
from calibrant.program.weighting import kept

Array = npt.NDArray[np.float64]

LEVELS = (0.5, 0.8, 0.9, 0.95)
MIN_DRAWS = 20
ELEMENTS = 2**21  # largest number of entries that one run of the program draws
KEPT = 2**22  # largest number of replicated statistics or prior draws that are kept


@dataclass(frozen=True)
class Runs:
    """The model, guide, data and statistics of a predictive check."""

    model: Program
    guide: Program
    data: Data
    device: torch.device
    statistics: list[Statistic]
    latents: list[Latent]
    discrete: frozenset[str]  # observed sites on a grid
    largest: int  # largest number of rows in one run
    levels: tuple[float, ...]
    level: float
    proper: bool

    @classmethod
    def read(
        cls,
        model: Program,
        guide: Program,
        data: Data,
        device: torch.device,
        own: Mapping[str, Function] | None,
        level: float,
    ) -> Runs:
        rows, cols = data.batch(torch.arange(min(len(data), 1000), device="cpu"), device, torch.float64)
        size = len(next(iter(rows.values())))
        values = latent_values(guide_trace(guide, rows, size, cols))
        refuse_unsimulated(model, rows, cols)
        nodes = sampled(trace(model, size, cols, values))
        if shared := [name for name in values if not is_local(nodes[name])]:
            raise InferenceError(
                f"latents {shared} are shared: their draw changes all data at once, so that replicates of a datum are "
                "not independent; fix these latents in the program (for example, at their posterior mean in a buffer) "
                "to check the rest"
            )
        statistics = choose_statistics({name: nodes[name]["fn"] for name in rows}, rows, own)
        latents = [Latent(name, index) for name, value in values.items() for index in np.ndindex(*value.shape[1:])]
        entries = len(latents) + sum(prod(value.shape[1:]) for value in rows.values())
        proper = not any(is_improper(site["fn"]) for site in nodes.values())
        levels = tuple(sorted({*LEVELS, level}))
        discrete = frozenset(name for name in rows if nodes[name]["fn"].support.is_discrete)
        largest = ELEMENTS // max(1, entries)
        runs = cls(model, guide, data, device, statistics, latents, discrete, largest, levels, level, proper)
        few = data.batch(torch.arange(min(len(data), FEW), device="cpu"), device, torch.float64)
        largest = measured_rows(runs.largest, len(next(iter(few[0].values()))), partial(runs.of_guide, *few))
        return replace(runs, largest=largest)

    def coords(self) -> dict[str, Any]:
        return {
            "data": self.data.labels(),
            "statistic": np.array([s.label for s in self.statistics], dtype=str),
            "observation": ("statistic", np.array([s.site for s in self.statistics], dtype=str)),
            "latent": np.array([x.label for x in self.latents], dtype=str),
            "site": ("latent", np.array([x.site for x in self.latents], dtype=str)),
            "index": ("latent", np.array([x.position for x in self.latents], dtype=str)),
            "observed": np.array(self.data.observed_names, dtype=str),
            "level": np.array(self.levels),
            "u": GRID,
        }

    def replicates(self, draws: int, columns: int) -> int:
        """The number of replicates that are kept, with `columns` numbers per datum."""
        return min(draws, max(MIN_DRAWS, KEPT // (len(self.data) * max(1, columns))))

    def blocks(self, draws: int) -> Iterator[tuple[Tensor, list[int]]]:
        """Blocks of data: their positions, and the numbers of draws per datum in each run."""
        for index, parts in blocks(len(self.data), draws, max(1, self.largest)):
            yield index, [len(part) for part in parts]

    def of_guide(self, observed: Values, covariates: Values, repeats: int) -> list[Simulated]:
        """As `simulate`, from the guide; in several parts if memory is short."""
        found = within_memory(lambda: self.simulate(observed, covariates, repeats, from_guide=True), repeats == 1)
        if found is not None:
            return [found]
        halves = (repeats // 2, repeats - repeats // 2)
        return [one for half in halves for one in self.of_guide(observed, covariates, half)]

    def simulate(self, observed: Values, covariates: Values, repeats: int, from_guide: bool) -> Simulated:
        """Draw latents from the guide or the prior and simulate observations, `repeats` consecutive rows per datum."""
        rows, cols = (
            {name: value.repeat_interleave(repeats, 0) for name, value in part.items()}
            for part in (observed, covariates)
        )
        size = len(next(iter(rows.values())))
        held = latent_values(guide_trace(self.guide, rows, size, cols)) if from_guide else {}
        nodes = sampled(trace(self.model, size, cols, held))
        names = list(dict.fromkeys(latent.site for latent in self.latents))
        flat = [nodes[name]["value"].double().reshape(size, -1) for name in names]
        seen = {name: kept(nodes[name]) for name in rows}
        values = {name: torch.where(seen[name], nodes[name]["value"].double(), rows[name]) for name in rows}
        return Simulated(torch.cat(flat, 1) if flat else torch.zeros(size, 0), self.comparable(values), seen, repeats)

    def comparable(self, values: Values) -> Values:
        """Values whose ties are exact: k/255 in float32, as data hold it, is another number in float64."""
        return {name: value.float().double() if name in self.discrete else value for name, value in values.items()}

    def of(self, values: Values) -> Tensor:
        """The statistics of rows, `(rows, statistic)`."""
        return torch.stack([statistic(values) for statistic in self.statistics], 1)


@dataclass(frozen=True)
class Simulated:
    """Draws for some data; the draws for one datum are consecutive rows."""

    latents: Tensor  # (data · draws, latent)
    values: Values  # site → (data · draws, *event)
    kept: Values  # site → whether each entry of the values is not masked
    repeats: int

    def by_datum(self, values: Tensor) -> Tensor:
        """Reshape rows to `(data, draws, …)`."""
        return values.reshape(-1, self.repeats, *values.shape[1:])


class Tally:
    """Running sums over the posterior draws for some data; for entries, the number of draws that lie below."""

    def __init__(self, runs: Runs, observed: Values) -> None:
        self.runs, self.observed = runs, runs.comparable(observed)
        self.below = {name: torch.zeros_like(value) for name, value in observed.items()}
        self.ties = {name: torch.zeros_like(value) for name, value in observed.items()}
        self.kept: Values = {}
        self.draws = 0
        self.statistics: list[Tensor] = []
        self.latents: list[Tensor] = []

    def add(self, run: Simulated) -> None:
        self.draws += run.repeats
        self.kept = {name: run.by_datum(kept)[:, 0] for name, kept in run.kept.items()}
        for name, value in self.observed.items():
            drawn = run.by_datum(run.values[name])
            self.below[name] += (drawn < value[:, None]).sum(1)
            self.ties[name] += (drawn == value[:, None]).sum(1)
        self.statistics.append(run.by_datum(self.runs.of(run.values)))
        self.latents.append(run.by_datum(run.latents))

    def found(self) -> dict[str, Array]:
        drawn, latents = torch.cat(self.statistics, 1), torch.cat(self.latents, 1)
        observed = self.runs.of(self.observed)
        below, ties = ((drawn < observed[:, None]).sum(1), (drawn == observed[:, None]).sum(1))
        found = [self._shares(name) for name in self.observed]
        tensors = {
            "observed_statistic": observed,
            "tail_probability": self._pit(below.double(), ties.double()),
            "predictive_mean": drawn.mean(1),
            "predictive_sd": drawn.std(1),
            "pit_ecdf": torch.stack([ecdf for ecdf, _ in found], 1),
            "coverage": torch.stack([coverage for _, coverage in found], 1),
            "latent": latents[:, 0],
            "latent_mean": latents.mean(1),
            "latent_square": latents.square().mean(1),
        }
        return {name: value.cpu().numpy() for name, value in tensors.items()}

    def _pit(self, below: Tensor, ties: Tensor) -> Tensor:
        return (below + torch.rand_like(below) * (ties + 1.0)) / (self.draws + 1)

    def _shares(self, name: str) -> tuple[Tensor, Tensor]:
        """For every datum, the shares of entries with a PIT of at most each u, and inside each central interval."""
        return shares(self._pit(self.below[name], self.ties[name]), self.kept[name], self.runs.levels)
