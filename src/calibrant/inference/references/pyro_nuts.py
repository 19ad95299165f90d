"""Pyro's NUTS, datum by datum; programs with shared latents are sampled for all data at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.infer.mcmc import NUTS
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.inference.references.chains import STATISTICS, McmcDraws
from calibrant.inference.references.coordinates import at_an_edge
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.environment import defaults, in_double, seeded
from calibrant.program.supports import from_line, is_circular
from calibrant.program.tracing import deterministic, is_local, messages, sampled, trace
from calibrant.progress import Progress
from calibrant.streams import stream

_STARTS = 100  # random starts that are tried per chain
_TARGET_ACCEPT = 0.95  # one divergent transition of thousands fails the gate


def sample_pyro_nuts(
    model: PyroModule, data: Data, chains: int, warmup: int, draws: int, seed: int, progress: Progress
) -> McmcDraws:
    """Sample with Pyro's NUTS in unconstrained space, with a diagonal metric, in float64; starts are U(−2, 2).

    Raises:
        InferenceError: for discrete latents or angles, or if no start with a finite density is found.
    """
    given = data.tensors()[0]
    with defaults(model, given, torch.float64) as place, pyro.validation_enabled(False), torch.enable_grad():
        double, (rows, covariates) = in_double(model), data.tensors(*place)
        latent = _latent_sites(double, rows, covariates)
        if all(is_local(site) for site in latent.values()):
            return _datum_by_datum(double, latent, rows, covariates, (chains, warmup, draws), seed, progress)
        target = _Target(double, latent, rows, covariates)
        runs = [_chain(target, warmup, draws, (seed, 0, chain), progress) for chain in range(chains)]
        values, stats, edges = _stack(runs)
        shares = {name: edge.double().mean().expand(len(data)) for name, edge in edges.items()}
        local = [name for name in values if is_local(target.example[name])]
        stats = {name: value[..., None].expand(*value.shape, len(data)) for name, value in stats.items()}
        return McmcDraws(values, stats, list(latent), local, *_complete(len(data)), shares)


def _latent_sites(model: Program, rows: Values, covariates: Values) -> dict[str, dict[str, Any]]:
    size = len(next(iter(rows.values())))
    with torch.no_grad(), seeded(0):
        run = trace(model, size, covariates, rows)
    latent = {name: site for name, site in sampled(run).items() if name not in rows}
    if discrete := [name for name, site in latent.items() if site["fn"].support.is_discrete]:
        raise InferenceError(
            f"latents {discrete} are discrete: Pyro's NUTS moves continuous ones alone; use method='nuts'"
        )
    if angles := [name for name, site in latent.items() if is_circular(site["fn"])]:
        raise InferenceError(
            f"latents {angles} are angles, whose density has no integral on the line: use method='nuts'"
        )
    return latent


class _Target:
    """The posterior of some data in unconstrained space."""

    def __init__(self, model: Program, latent: Mapping[str, Any], rows: Values, covariates: Values) -> None:
        self.model, self.rows, self.covariates = model, rows, covariates
        self.size = len(next(iter(rows.values())))
        with torch.no_grad(), seeded(0):
            self.example = messages(trace(model, self.size, covariates, rows))
        self.transforms = {name: from_line(self.example[name]["fn"].support) for name in latent}

    def potential(self, raw: dict[str, Tensor]) -> Tensor:
        values = self.constrain(raw)
        held = {**self.rows, **values}
        density = density_of(trace(self.model, self.size, self.covariates, held), self.size, held)
        jacobians = (self.transforms[name].log_abs_det_jacobian(raw[name], values[name]).sum() for name in raw)
        return -(density.local.sum() + density.shared + sum(jacobians))

    def constrain(self, raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.transforms[name](value) for name, value in raw.items()}

    def edges(self, raw: Values, values: Values) -> dict[str, Tensor]:
        """Latents whose values are `at_an_edge` of the support, in any entry."""
        return {name: at_an_edge(self.example[name]["fn"], raw[name], values[name]).any() for name in raw}

    def record(self, values: Values) -> dict[str, Tensor]:
        """The latents, and the deterministic sites of the program at these latents."""
        run = trace(self.model, self.size, self.covariates, {**self.rows, **values})
        return {**values, **{name: site["value"] for name, site in deterministic(run).items()}}

    def start(self) -> dict[str, Tensor]:
        for _ in range(_STARTS):
            shapes = {n: t.inverse_shape(self.example[n]["value"].shape) for n, t in self.transforms.items()}
            raw = {name: torch.empty(shape).uniform_(-2.0, 2.0) for name, shape in shapes.items()}
            with torch.no_grad():
                if self.potential(raw).isfinite():
                    return raw
        raise InferenceError(f"no finite log density at {_STARTS} random starts: look at the program and these data")


class _RecordingNUTS(NUTS):
    """Pyro's NUTS, with the statistics of each transition kept."""

    def __init__(self, target: _Target, initial: dict[str, Tensor]) -> None:
        super().__init__(potential_fn=target.potential, target_accept_prob=_TARGET_ACCEPT)
        self.initial_params = initial
        self.statistics: list[dict[str, float]] = []

    def _sample_r(self, name: str) -> tuple[Any, Any]:
        momentum, unscaled = super()._sample_r(name)
        self._kinetic = float(self._kinetic_energy(unscaled))
        return momentum, unscaled

    def _build_basetree(self, *args: Any) -> Any:
        leaf = super()._build_basetree(*args)
        self._leaves.append(float(leaf.sum_accept_probs))
        return leaf

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        self._leaves: list[float] = []
        _, before, _ = self._fetch_from_cache()
        diverged = len(self._divergences)
        result = super().sample(params)
        _, after, _ = self._fetch_from_cache()
        steps = len(self._leaves)
        row = {
            "lp": -float(after),
            "energy": float(after if before is None else before) + self._kinetic,
            "acceptance_rate": sum(self._leaves) / steps,
            "step_size": float(self.step_size),
            "tree_depth": math.ceil(math.log2(steps + 1)),
            "n_steps": steps,
            "diverging": len(self._divergences) > diverged,
        }
        self.statistics.append(row)
        return result


Run = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def _chain(target: _Target, warmup: int, draws: int, key: tuple[int, int, int], progress: Progress | None) -> Run:
    """Run one chain; returns site → `(draw, size, *event)` (shared sites without `size`), statistic → `(draw,)`, and
    latent → whether its draws are `at_an_edge`, `(draw,)`."""
    seed, datum, chain = key
    kept, edges = [], []
    with seeded(stream(seed, "datum", datum, "chain", chain)):
        kernel = _RecordingNUTS(target, target.start())
        kernel.setup(warmup)
        raw = kernel.initial_params
        for step in range(warmup + draws):
            raw = kernel.sample(raw)
            if step >= warmup:
                with torch.no_grad():
                    values = target.constrain(raw)
                    kept.append({n: v.cpu() for n, v in target.record(values).items()})
                    edges.append({n: v.cpu() for n, v in target.edges(raw, values).items()})
            if progress is not None:
                progress(f"reference, chain {chain + 1}", step + 1, warmup + draws)
    stats = {name: torch.tensor([row[name] for row in kernel.statistics[warmup:]]) for name in STATISTICS}
    values, near = ({name: torch.stack([k[name] for k in part]) for name in part[0]} for part in (kept, edges))
    return values, stats, near


def _stack(runs: list[Run]) -> Run:
    values, stats, edges = ({n: torch.stack([run[i][n] for run in runs]) for n in runs[0][i]} for i in range(3))
    return values, stats, edges


def _datum_by_datum(
    model: Program,
    latent: Mapping[str, Any],
    rows: Values,
    covariates: Values,
    lengths: tuple[int, int, int],
    seed: int,
    progress: Progress,
) -> McmcDraws:
    chains, warmup, draws = lengths
    size = len(next(iter(rows.values())))
    done: list[Run] = []
    try:
        for datum in range(size):
            one = [{n: v[datum : datum + 1] for n, v in part.items()} for part in (rows, covariates)]
            target = _Target(model, latent, *one)
            done.append(_stack([_chain(target, warmup, draws, (seed, datum, c), None) for c in range(chains)]))
            diverged = int(sum(stats["diverging"].sum() for _, stats, _ in done))
            progress("reference", datum + 1, size, f"{diverged} divergences")
    except KeyboardInterrupt:
        if not done:
            raise
    local = [name for name in done[0][0] if is_local(target.example[name])]
    values = {name: torch.cat([draw[name] for draw, _, _ in done], 2) for name in local}
    constants = {name: value for name, value in done[0][0].items() if name not in local}
    stats = {name: torch.stack([stat[name] for _, stat, _ in done], -1) for name in done[0][1]}
    shares = {name: torch.stack([edge[name].double().mean() for _, _, edge in done]) for name in latent}
    return McmcDraws({**values, **constants}, stats, list(latent), local, *_complete(len(done)), shares)


def _complete(count: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.arange(count), torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
