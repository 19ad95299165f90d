"""Batched NUTS on the posterior of every datum: the assignment of chains to lanes.

`sample_nuts` assigns chains to lanes, starts them, moves them with `nuts.step`, stores their draws, assigns free lanes
to the next data, and drops lanes once no data are left.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import ceil
from typing import Any, Literal

import torch
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.inference.graphs.metering import preparing, running_meter
from calibrant.inference.graphs.recording import TensorFunction, compiled, record
from calibrant.inference.references import adaptation, lane_state, nuts
from calibrant.inference.references.approaching import approached
from calibrant.inference.references.chains import STATISTICS, McmcDraws
from calibrant.inference.references.coordinates import beside
from calibrant.inference.references.partition import Places, log_own_share
from calibrant.inference.references.powers import Coordinates
from calibrant.inference.references.random_numbers import fold, uniform
from calibrant.inference.references.starts import Starts, keys_of, prior_and_guide
from calibrant.inference.references.target import target_of
from calibrant.inference.references.targets import Sampled
from calibrant.program.contract import Program
from calibrant.program.environment import in_double
from calibrant.progress import Progress

_LANES = {"cpu": 4096, "cuda": 65_536}  # lanes at most
_LANE_BYTES = {"cpu": 2**28, "cuda": 2**34}  # bytes for the state of all lanes, and their data
_CACHE_BYTES = {"cpu": 3 * 2**23, "cuda": 2**34}  # with more, a step takes longer per lane
_FEW_LANES = 256  # lanes that are worth the fixed cost of a step
_FEW_NUMBERS = 2**14  # numbers in the vectors of all lanes below which a step takes about as long as for one lane
_COMPILING = 0.05  # seconds that compiling takes per operator of a step
_SAVED = {"cpu": 3e-6, "cuda": 5e-6}  # seconds per operator and step that compiling saves for one lane,
_SAVED_EACH = {"cpu": 4e-10, "cuda": 1e-12}  # and for every number in the vectors of the lanes, or datum of joint lanes
_FEW_LEAPFROGS = 7  # of an iteration, before there are iterations that tell
_KEPT = 16  # calls of `lane_state.tend` after which draws are written to their places
_MANY_STEPS = 8000  # steps that cost as much, for three quarters of the lanes, as recording or compiling a step
_DENSE = 50  # dimensions up to which the metric of a joint posterior is dense
_RECORD_ROWS = 16_384  # rows in one run that records deterministic sites
_LEVEL = 1 << 20  # folded into the key of a datum for draws of discrete latents; no chain has this number


@dataclass(frozen=True)
class NutsSettings:
    """Lengths and tuning of the chains.

    Attributes:
        chains: number of chains.
        warmup: number of warm-up iterations per chain, or per sub-chain if there are several.
        draws: number of draws per chain, or per sub-chain, that are kept.
        target_accept: target for the mean acceptance probability.
        dense: whether the metric is dense; "auto" is for single posteriors (joint ones, and densities without data) of
            at most 50 dimensions.
        powers: fixed κ, `(data, pair)`; None adapts κ.
        other_powers: whether to use other candidates for κ than those in `powers`.
        compile: whether to compile the leapfrog step; "auto" does where this is expected to save time.
        depth: number of doublings of a tree at most.
        subchains: number of chains with random numbers of their own that share one start; one after another, they are
            what users know as a chain.
    """

    chains: int = 4
    warmup: int = 1000
    draws: int = 1000
    target_accept: float = 0.8
    dense: bool | Literal["auto"] = "auto"
    powers: Tensor | None = None
    other_powers: bool = False
    compile: bool | Literal["auto"] = False
    depth: int = nuts.MAX_DEPTH
    subchains: int = 1

    @property
    def lanes(self) -> int:
        """Number of lanes of a datum."""
        return self.chains * self.subchains


def sample_nuts(
    model: PyroModule,
    data: Data,
    settings: NutsSettings,
    seed: int,
    progress: Progress,
    guide: Program | None = None,
    places: Places | None = None,
) -> tuple[McmcDraws, Tensor]:
    """Sample by batched NUTS in float64; also returns κ of every complete datum and pair, `(data, lane, pair)`.

    Chains start at the places of their units. Without `places`, they start at draws of the prior, every second one at a
    draw of the guide where one is given, and nearer where these are hopelessly far away.

    Raises:
        InferenceError: for latents that the sampler cannot move.
    """
    with target_of(model, data) as target:
        keys = keys_of(target, data, seed)
        if places is None:
            starts = prior_and_guide(target, keys, settings.chains, in_double(guide) if guide is not None else None)
            places = Places(approached(target, starts))
        return sample_target(target, keys, places, settings, progress)


def sample_target(
    target: Sampled, keys: Tensor, places: Places, settings: NutsSettings, progress: Progress
) -> tuple[McmcDraws, Tensor]:
    """Like `sample_nuts`, for any density, with a random key for every unit; the defaults of torch are float64."""
    run = _Run(target, keys, places, settings, progress)
    run.sample()
    return run.result(), run.powers[run.complete_units].cpu()


def short_chains(
    model: PyroModule, data: Data, settings: NutsSettings, seed: int, progress: Progress, starts: Starts
) -> Tensor:
    """Vectors of chains at κ = 0, `(unit, chain, draw, width)`, that only serve to look for modes; NaN for lost chains.

    Args:
        starts: function of the target and the keys of the units that returns starts `(unit, chain, width)`.
    """
    with target_of(model, data) as target:
        keys = keys_of(target, data, seed)
        run = _Run(target, keys, Places(starts(target, keys)), settings, progress, "modes")
        run.sample()
        if not run.complete.all():
            raise KeyboardInterrupt
        return run.q.double().cpu()


class _Run:
    """The chains of one call of `sample_nuts`, in units (data, or all data jointly) that wait, run or are complete."""

    def __init__(
        self,
        target: Sampled,
        keys: Tensor,
        places: Places,
        settings: NutsSettings,
        progress: Progress,
        stage: str = "reference",
    ) -> None:
        self.target, self.keys, self.settings, self.progress, self.stage = target, keys, settings, progress, stage
        self.places = places
        self.dense = _is_dense(settings.dense, target)
        units, chains, draws = len(keys), settings.lanes, settings.draws
        starts, device = places.starts, keys.device
        where = coordinates_of(target, device)
        fixed = settings.powers
        self.first_powers = where.first().expand(units, -1) if fixed is None else fixed.to(device)
        if settings.other_powers:
            self.first_powers = where.other(self.first_powers)
        self.powers = starts.new_zeros(units, chains, len(where.table))
        self.q = torch.full((units, chains, draws, target.width), torch.nan, dtype=torch.float64, device=device)
        self.stats = {
            name: torch.zeros(units, chains, draws, dtype=kind, device=device) for name, kind in STATISTICS.items()
        }
        self.lost = torch.zeros(units, dtype=torch.bool, device=device)
        self.moved = torch.zeros(units, dtype=torch.int64, device=device)
        self.complete = torch.zeros(units, dtype=torch.bool, device=device)
        self.divergences = self.tenths = 0
        self.kept: list[dict[str, Tensor]] = []
        self.plan = nuts.Plan(
            schedule=adaptation.schedule(settings.warmup, chains),
            iterations=settings.warmup + draws,
            chains=chains,
            subchains=settings.subchains,
            target_accept=settings.target_accept,
            coordinates=where,
            choose_powers=settings.powers is None and len(where.table) > 0,
            depth=settings.depth,
        )

    def sample(self) -> None:
        """Run all chains to their end, or until Ctrl-C."""
        rounds = ceil(len(self.keys) / max(1, self._capacity() // self.plan.chains))
        slots = ceil(len(self.keys) / rounds)  # the same number in every round
        self.unit = torch.arange(slots, device=self.keys.device)
        self.next = slots
        self.state = self._new_lanes(self.unit)
        self.compiles = self.settings.compile is True or self._is_worth_compiling()
        self.step = self._record(self.compiles)
        try:
            while self._advance():
                pass
        except KeyboardInterrupt:
            if not self.complete.any():
                raise

    def _advance(self) -> bool:
        """Take a few steps, and update the lanes; returns False if all chains are over."""
        state = self.state
        chances = nuts.chances(state.key, state.clock)
        state.lanes, ended = nuts.steps(self.step, state.lanes, state.fixed, chances)
        state.clock += nuts.TENDED
        if not (torch.stack([one.over for one in ended]).any() or (state.lanes.phase == nuts.FRESH).any()):
            return True  # all lanes are inside their trees
        over = nuts.joined(ended)
        lane_state.tend(state, over, self.plan)
        self._store(over)
        if (meter := running_meter()) is not None:
            meter.leapfrogs += int(over.n_steps[over.over].sum())
        running = (state.lanes.phase != nuts.OVER).reshape(-1, self.plan.chains).any(1)
        if running.all():
            self._tell_share()
            if not self.compiles and self._is_worth_compiling():
                self.compiles, self.step = True, self._record(True)
            return True
        self._write()  # before lanes change their units
        self._retire(~running)
        return self._refill(running)

    def _tell_share(self) -> None:
        """Report every tenth of the iterations of the first chains: until these are over, no datum is complete."""
        tenths = int(10 * float(self.state.lanes.iteration.double().mean()) / self.plan.iterations)
        if tenths > self.tenths:
            self.tenths = tenths
            text = f"{10 * tenths}% of the iterations"
            self.progress(self.stage, int(self.complete.sum()), len(self.keys), text)

    def _is_worth_compiling(self) -> bool:
        """Whether compiling takes less time than it saves in the steps that are left, as far as iterations tell.

        Nothing is timed: as draws are equal only up to rounding once the step is compiled, they would not repeat.
        """
        if self.settings.compile != "auto":
            return False
        state, waiting = self.state, len(self.keys) - self.next
        done = float(state.lanes.iteration.double().mean())
        each = float(state.clock.double().mean()) / done if done >= 1 else _FEW_LEAPFROGS
        left = self.plan.iterations * (1 + waiting / len(self.unit)) - done
        rows = self.target.total if self.target.joint else 0
        device, numbers = self.keys.device.type, len(state.key) * (self.target.width + rows)
        return left * each * (_SAVED[device] + _SAVED_EACH[device] * numbers) > _COMPILING

    def _capacity(self) -> int:
        windows, candidates = max(self.plan.schedule.windows, 1), 3 if len(self.target.pairs) else 1
        square = self.target.width if self.dense else 1
        per_lane = 8 * self.target.width * (60 + 2 * windows * candidates * (1 + square))
        rows = {} if self.target.joint else {**self.target.covariates, **self.target.observed}
        own = sum(value.nbytes // len(value) for value in rows.values())  # data, which every lane has a copy of
        device = self.keys.device.type
        cached = max(_FEW_LANES, _CACHE_BYTES[device] // per_lane)
        return min(_LANES[device], _LANE_BYTES[device] // (per_lane + own), cached)

    def _new_lanes(self, units: Tensor) -> lane_state.State:
        chains = self.plan.chains
        key = fold(self.keys[units][:, None], torch.arange(chains, device=units.device)).reshape(-1)
        powers = self.first_powers[units].repeat_interleave(chains, 0)
        places = self.places[units]
        start = places.starts.repeat_interleave(self.plan.subchains, 1).reshape(len(units) * chains, -1)
        start = self.plan.coordinates.move(start, torch.zeros_like(powers), powers)
        rows: dict[str, Tensor] = {}
        if not self.target.joint:
            covariates, observed = self.target.rows(units.repeat_interleave(chains))
            rows = {**covariates, **observed}
        if places.partition is not None:
            rows |= {name: value.repeat_interleave(chains, 0) for name, value in places.partition.rows().items()}
        return lane_state.init(key, start, powers, rows, self.plan, self.dense)

    def _record(self, compile_it: bool) -> TensorFunction:
        """Record, or compile, the step for the current number of lanes."""
        if compile_it:
            self.progress(self.stage, int(self.complete.sum()), len(self.keys), "compiling the step")
        state = self.state
        chance = nuts.chances(state.key, state.clock)[0]
        function = nuts.step_function(self.density, self.plan, tuple(state.fixed.rows))
        with preparing():
            return (compiled if compile_it else record)(function, *nuts.arguments(state.lanes, state.fixed, chance))

    def density(self, q: Tensor, powers: Tensor, rows: dict[str, Tensor]) -> Tensor:
        """The log density of lanes in their own coordinates, `(lane,)`."""
        target = self.target
        parts: Any = (target.covariates, target.observed)
        if not target.joint:
            parts = ({name: rows[name] for name in part} for part in parts)
        value = target.log_density(q, powers, *parts)
        if self.places.partition is None:
            return value
        return value + log_own_share(self.plan.coordinates.plain(q, powers), rows)

    def _store(self, ended: nuts.Ended) -> None:
        """Keep the draws among the ended iterations, and write them once there are many: few are as slow to write."""
        lane = (ended.over & (ended.iteration >= self.settings.warmup)).nonzero()[:, 0]
        if len(lane):
            values = {field.name: getattr(ended, field.name)[lane] for field in fields(ended)}
            self.kept.append({"lane": lane % len(self.state.key), **values})
        if len(self.kept) == _KEPT:
            self._write()

    def _write(self) -> None:
        """Write the draws that were kept since the last call to their places."""
        if not self.kept:
            return
        found = {name: torch.cat([one[name] for one in self.kept]) for name in self.kept[0]}
        self.kept = []
        lane, draw = found["lane"], found["iteration"] - self.settings.warmup
        at = self.unit[lane // self.plan.chains], lane % self.plan.chains
        powers = self.state.fixed.powers[lane]
        self.q[*at, draw] = self.plan.coordinates.move(found["q"], powers, torch.zeros_like(powers))
        self.powers[at] = powers
        found |= {"lp": found["log_density"], "tree_depth": (found["n_steps"] + 1).log2().ceil()}
        for name, values in self.stats.items():
            values[*at, draw] = found[name].to(values.dtype)
        self.divergences += int(found["diverging"].sum())

    def _retire(self, free: Tensor) -> None:
        """Store the outcome of the units in free slots."""
        free = free & (self.unit >= 0)
        unit = self.unit[free]
        if not len(unit):
            return
        lost, moved = (part.reshape(-1, self.plan.chains)[free] for part in (self.state.lost, self.state.moved))
        moved = (moved > 0).unflatten(1, (self.settings.chains, -1)).any(2)
        self.lost[unit], self.moved[unit] = lost.any(1), moved.sum(1)
        self.complete[unit] = True
        self.unit[free] = -1
        text = f"{self.divergences} divergences, ESS of the density {self._ess():.0f}"
        self.progress(self.stage, int(self.complete.sum()), len(self.keys), text)

    def _ess(self) -> float:
        """The effective sample size of the log density by batch means, as the median over complete data."""
        lp = self.stats["lp"][self.complete & ~self.lost][:256]
        if not len(lp):
            return torch.nan
        lp = self._in_chains(lp)
        draws = lp.shape[-1]
        blocks = int(draws**0.5)
        if blocks < 2:
            return torch.nan
        length = draws // blocks
        means = lp[..., : blocks * length].unflatten(-1, (blocks, length)).mean(-1)
        share = lp.var((1, 2)) / (length * means.var((1, 2)))
        return float((lp[0].numel() * share).median())

    def _refill(self, running: Tensor) -> bool:
        """Assign waiting units to free slots, or drop these slots; returns False if no unit is left."""
        free, left = (~running).nonzero()[:, 0], running.nonzero()[:, 0]
        waiting = len(self.keys) - self.next
        if waiting and (16 * len(free) >= len(running) or not len(left)):
            free = free[:waiting]
            unit = torch.arange(self.next, self.next + len(free), device=free.device)
            self.next += len(free)
            self.unit[free] = unit
            lane_state.put(self.state, self._lanes_of(free), self._new_lanes(unit))
        elif not waiting and len(left) and self._worth_dropping(len(left), len(running)):
            self.state, self.unit = lane_state.select(self.state, self._lanes_of(left)), self.unit[left]
            self.step = self._record(self.compiles)
        return bool(len(left) or waiting)

    def _worth_dropping(self, left: int, slots: int) -> bool:
        """Whether recording a step of fewer lanes saves time, given the number of remaining steps."""
        if left > slots // 4 or slots * self.plan.chains * self.target.width <= _FEW_NUMBERS:
            return False
        done = self.state.lanes.iteration
        steps = (self.plan.iterations - done) * self.state.clock / done.clamp_min(1)
        return float(steps.max()) > _MANY_STEPS

    def _lanes_of(self, slots: Tensor) -> Tensor:
        chains = self.plan.chains
        return (slots[:, None] * chains + torch.arange(chains, device=slots.device)).reshape(-1)

    @property
    def complete_units(self) -> Tensor:
        """Positions of the complete units."""
        return self.complete.nonzero()[:, 0]

    def result(self) -> McmcDraws:
        """Map the draws to their supports, and compute the deterministic sites of the program."""
        unit = self.complete_units
        lost, moved = self.lost[unit], self.moved[unit]
        stats = {name: self._in_chains(value[unit]).permute(1, 2, 0) for name, value in self.stats.items()}
        if self.target.joint:
            draws, edges = self._record_jointly()
            everything = torch.arange(self.target.total)
            stats = {name: value.expand(*value.shape[:2], self.target.total) for name, value in stats.items()}
            lost, moved = lost.expand(self.target.total), moved.expand(self.target.total)
        else:
            (draws, edges), everything = self._record_units(unit), unit
        local = [name for name in draws if name in self.target.local_sites]
        stats = {name: value.cpu() for name, value in stats.items()}
        vectors = self._in_chains(self.q[unit]).permute(1, 2, 0, 3).cpu() if self.places.partition is not None else None
        found = self.target.latents, local, everything.cpu(), lost.cpu(), moved.cpu(), edges, vectors
        return McmcDraws(draws, stats, *found, self.settings.subchains)

    def _in_chains(self, values: Tensor) -> Tensor:
        """Values `(unit, lane, draw, …)` of sub-chains as those of chains, in which sub-chains follow each other."""
        return values.reshape(len(values), self.settings.chains, -1, *values.shape[3:])

    def _levels(self, key: Tensor, shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        return uniform(fold(key, _LEVEL), torch.arange(count, device=key.device)).reshape(shape)

    def _record_units(self, units: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Draws by site, and the share of draws at an edge by latent, `(data,)`."""
        chains, draws = self.settings.chains, self.settings.subchains * self.settings.draws
        rows = max(1, _RECORD_ROWS // (chains * draws))
        parts, edges = [], []
        with torch.no_grad():
            for index in units.split(rows):
                q = self.q[index].reshape(-1, self.target.width)
                levels = torch.cat([self._levels(self.keys[unit], (chains * draws,)) for unit in index])
                given = self.target.rows(index.repeat_interleave(chains * draws))
                values, edge = self.target.record(q, levels, *given)
                edges.append({n: v.reshape(len(index), -1).double().mean(1).cpu() for n, v in edge.items()})
                parts.append(
                    {
                        n: _by_chain(v, len(index), chains, draws, n in self.target.local_sites)
                        for n, v in values.items()
                    }
                )
        shares = {name: torch.cat([edge[name] for edge in edges]) for name in edges[0]}
        return {name: torch.cat([part[name] for part in parts], 2) for name in parts[0]}, shares

    def _record_jointly(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Like `_record_units`; an edge of any datum counts for all."""
        chains, draws = self.settings.chains, self.settings.subchains * self.settings.draws
        rows = max(1, _RECORD_ROWS // self.target.total)
        parts = []
        q = self.q[0].reshape(-1, self.target.width)
        levels = self._levels(self.keys[0], (len(q), self.target.total))
        with torch.no_grad():
            for some in torch.arange(len(q), device=q.device).split(rows):
                given = self.target.covariates, self.target.observed
                parts.append(self.target.record(q[some], levels[some], *given))
        joined, edges = ({n: torch.cat([part[i][n] for part in parts]) for n in parts[0][i]} for i in (0, 1))
        shares = {name: edge.double().mean().expand(self.target.total).cpu() for name, edge in edges.items()}
        return {name: value.reshape(chains, draws, *value.shape[1:]).cpu() for name, value in joined.items()}, shares


def _is_dense(dense: bool | Literal["auto"], target: Sampled) -> bool:
    is_one = target.joint or not target.observed  # a density without data is a single posterior, too
    return is_one and target.width <= _DENSE if dense == "auto" else dense


def _by_chain(value: Tensor, data: int, chains: int, draws: int, local: bool) -> Tensor:
    """Reshape rows `(data · chain · draw, …)` to `(chain, draw, data, …)` on the CPU."""
    if not local:  # a constant of the program
        value = value.expand(data * chains * draws, *value.shape)
    shaped = value.reshape(data, chains, draws, *value.shape[1:])
    return shaped.movedim(0, 2).cpu()


def coordinates_of(target: Sampled, device: torch.device) -> Coordinates:
    """The pairs of a target as tables over the entries of its vectors."""
    pair_of = torch.full((target.width,), -1, device=device)
    for index, pair in enumerate(target.pairs):
        pair_of[pair.vector.start : pair.vector.stop] = index
    table = torch.tensor([pair.powers for pair in target.pairs], dtype=torch.float64, device=device).reshape(-1, 3)
    scale_of = torch.tensor([pair.scale.start for pair in target.pairs], dtype=torch.int64, device=device)
    kinked = torch.zeros(target.width, dtype=torch.bool, device=device)
    loc, scale = torch.zeros(target.width, device=device), torch.ones(target.width, device=device)
    for name, prior in target.kinked.items():
        entries = slice(target.blocks[name].start, target.blocks[name].stop)
        kinked[entries] = True
        loc[entries], scale[entries] = (part.expand(1, *target.blocks[name].shape).reshape(-1) for part in prior)
    offset, centre_of = torch.zeros(target.width, device=device), torch.full((target.width,), -1, device=device)
    for pair in target.pairs:
        entries = slice(pair.vector.start, pair.vector.stop)
        offset[entries] = pair.offset.reshape(-1).to(offset)
        if pair.centre is not None:
            own = torch.arange(pair.centre.start, pair.centre.stop, device=device).reshape(pair.centre.shape)
            centre_of[entries] = beside(own, pair.offset).expand_as(pair.offset).reshape(-1)
    return Coordinates(table, pair_of, kinked, loc, scale, offset, centre_of, scale_of)
