"""Reference posteriors: exact where the program allows it, otherwise Markov chain Monte Carlo with a gate."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from numbers import Integral
from typing import Any, Literal

import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.binding import bind, bind_fixed
from calibrant.data.dataset import Data
from calibrant.errors import InferenceError, warn
from calibrant.inference.groups import add_groups
from calibrant.inference.references.chains import McmcDraws
from calibrant.inference.references.exact import ExactPosterior, solve
from calibrant.inference.references.finite import FinitePosterior, finite_latents, sum_out
from calibrant.inference.references.gate import exact_convergence, require_passable
from calibrant.inference.references.lanes import NutsSettings
from calibrant.inference.references.modal import Runs, sample_all
from calibrant.inference.references.pyro_nuts import sample_pyro_nuts
from calibrant.inference.references.repair import judge
from calibrant.inference.references.searching import FEW_STARTS
from calibrant.inference.references.target import target_of
from calibrant.inference.trees import build_tree, data_labels, require_memory, with_coords
from calibrant.linear_gaussian.detection import detect
from calibrant.linear_gaussian.parameters import LinearGaussian
from calibrant.program.contract import Program, as_program
from calibrant.program.enumeration import combinations
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import sites
from calibrant.program.losses import refuse_training_losses
from calibrant.program.tracing import sampled, trace
from calibrant.progress import Progress, silent
from calibrant.streams import stream

METHODS = ("auto", "exact", "importance", "importance-only", "nuts", "pyro-nuts")
POOL = 10_000  # draws of a guide per datum, of which importance keeps some
_FEW = 4  # data that show whether a program has a reference at all
_MOST_SUBCHAINS = 16
_SUBCHAIN_WARMUP, _SUBCHAIN_DRAWS = 120, 50  # iterations of a sub-chain at least; warm-up is pooled over all chains


@dataclass(frozen=True)
class ReferencePlan:
    """How a reference is sampled: the arguments of `reference`."""

    method: str = "auto"
    chains: int = 4
    warmup: int = 1000
    draws: int = 1000
    init: Program | None = None
    target_accept: float = 0.8
    dense: bool | Literal["auto"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    starts: int = 32
    pool: int = POOL
    subchains: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("warmup", "draws"):
            if not isinstance(value := getattr(self, name), Integral) or value < 0:
                raise InferenceError(f"{name}={value!r}: give a whole number of iterations, 0 or more")
        for name in ("dense", "compile"):
            if (value := getattr(self, name)) not in (True, False, "auto"):
                raise InferenceError(f'{name}={value!r}: give True, False or "auto"')
        if self.subchains not in ("auto", 1) and not _divides(self.subchains, self.draws):
            raise InferenceError(
                f"subchains={self.subchains}: give 1 for ordinary chains, or a number that divides draws={self.draws} "
                f"and leaves at least {_SUBCHAIN_DRAWS} draws"
            )
        if self.starts and self.starts < FEW_STARTS:
            raise InferenceError(
                f"starts={self.starts}: give at least {FEW_STARTS} starts of the search for modes, or 0 for no search"
            )
        if self.method not in METHODS:
            raise InferenceError(f"unknown method {self.method!r}; known: {METHODS}")

    @property
    def nuts(self) -> NutsSettings:
        """The settings of batched NUTS.

        Raises:
            InferenceError: for a mean acceptance that no chain can adapt to.
        """
        if not 0.5 <= self.target_accept < 1:
            raise InferenceError(f"target_accept={self.target_accept}: give a mean acceptance from 0.5 to below 1")
        each = subchains_of(self.warmup, self.draws) if self.subchains == "auto" else self.subchains
        lengths = ceil(self.warmup / each), self.draws // each
        return NutsSettings(self.chains, *lengths, self.target_accept, self.dense, compile=self.compile, subchains=each)


def subchains_of(warmup: int, draws: int) -> int:
    """The number of sub-chains of a chain, 16 at most: the largest divisor of `draws` that leaves them long enough.

    It depends on nothing else, so that the draws of a datum do not depend on which other data there are.

    Args:
        warmup: number of adaptation steps of the chain.
        draws: number of draws of the chain that are kept.
    """
    most = min(_MOST_SUBCHAINS, warmup // _SUBCHAIN_WARMUP)
    return max((count for count in range(1, most + 1) if _divides(count, draws)), default=1)


def _divides(count: Any, draws: int) -> bool:
    """Whether chains of so many draws can consist of `count` sub-chains."""
    return isinstance(count, int) and count >= 1 and draws % count == 0 and draws // count >= _SUBCHAIN_DRAWS


def reference_of(
    program: PyroModule,
    data: Data,
    plan: ReferencePlan,
    groups: Iterable[str] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> xr.DataTree:
    """Sample a reference, like `reference`, for a program and data that are already checked."""
    chains, draws = plan.chains, plan.draws
    refuse_without_latents(program, data)
    progress("reference", 0, len(data))
    exact = _exact_solution(program, data, plan.method)
    _require_memory(program, data, plan)
    if exact is not None:
        tree = _exact(program, exact, data, chains, draws, seed)
        progress("reference", len(data), len(data))
    else:
        require_passable(chains, draws)
        if plan.method == "pyro-nuts":
            tree = _one_by_one(program, data, plan, seed, progress)
        else:
            tree = _batched(program, data, plan, seed, progress)
    add_groups(tree, program, data, groups, seed)
    return tree


def exact_structure(model: Program, observed: Mapping[str, Any] | Data) -> LinearGaussian | None:
    """The structure that makes the posterior exact, or None."""
    return structure_of(as_program(model), bind(model, observed))


def structure_of(program: PyroModule, data: Data) -> LinearGaussian | None:
    """Like `exact_structure`, for a program with data that are already bound."""
    return detect(program, *data.batch(torch.arange(min(len(data), 16))))


def log_evidence(
    model: Program, observed: Mapping[str, Any] | Data, *, covariates: Mapping[str, Any] | None = None
) -> Tensor:
    """The exact log evidence of every datum, `(data,)`, in nats; without latents, it is log p(y | covariates).

    Args:
        model: the program.
        observed: site → tensor, or a `Data`.
        covariates: keyword → tensor, leading dimension data.

    Raises:
        InferenceError: for a program whose exact posterior is not known here.
        ProgramError: for a likelihood that is a training loss.
    """
    program, data = as_program(model), bind_fixed(model, observed, covariates)
    refuse_training_losses(program, *data.batch(torch.arange(min(len(data), 2))))
    return log_evidence_of(program, data)


def log_evidence_of(program: PyroModule, data: Data) -> Tensor:
    """Like `log_evidence`, for a program with data that are already bound."""
    solution = _solution(program, data)
    if solution is None:
        raise InferenceError(f"{type(program).__name__} has no exact evidence that is known here")
    return solution.log_evidence


def refuse_without_latents(program: PyroModule, data: Data) -> None:
    """Refuse a program that has no latents, and so no posterior.

    Raises:
        InferenceError: with what there is in its place.
    """
    if not has_latents(program, data):
        raise InferenceError(
            "the program has no latents, so that there is no posterior: inference.log_evidence gives log p of the "
            "observations, and evaluation.check judges the predictions"
        )


def has_latents(program: PyroModule, data: Data) -> bool:
    """Whether a program has anything but observed sites."""
    return finite_latents(program, data) != {}


def is_exact(program: PyroModule, data: Data) -> bool:
    """Whether the reference of a program with data that are already bound is exact, so that no chains are needed."""
    return finite_latents(program, data) is not None or structure_of(program, data) is not None


def _require_memory(program: PyroModule, data: Data, plan: ReferencePlan) -> None:
    observed, covariates = data.batch(torch.arange(1))
    with torch.no_grad(), seeded(0), defaults(program, {**observed, **covariates}) as place:
        run = sampled(trace(program, 1, cast(covariates, *place), cast(observed, *place)))
    entries = sum(site["value"].numel() for name, site in run.items() if name not in observed)
    what = f"{plan.chains} × {plan.draws} draws of {len(data)} data"
    require_memory(plan.chains * plan.draws * len(data) * entries, what, width=8)


def require_reference(program: PyroModule, data: Data, plan: ReferencePlan) -> None:
    """Refuse a program that a reference cannot take, before it is trained: neither weights nor most values take part.

    Raises:
        InferenceError: with what there is in its place.
    """
    few = data[:_FEW]
    discrete = finite_latents(program, few)
    _require_memory(program, data, plan)
    if discrete:
        sum_out(program, few, discrete)
    elif discrete is None and structure_of(program, few) is None:
        with target_of(program, few):
            return


def _exact_solution(program: PyroModule, data: Data, method: str) -> ExactPosterior | FinitePosterior | None:
    """The exact posterior for the methods that take it; None for Markov chains.

    Raises:
        InferenceError: if the method needs an exact posterior that is not known, or continuous latents.
    """
    if method in ("auto", "exact"):
        solution = _solution(program, data)
        if solution is None and method == "exact":
            raise InferenceError(
                f"{type(program).__name__} has no exact posterior that is known here (it takes discrete latents alone, "
                "or an affine decoder, Gaussian noise, Gaussian local latents, at most one scale, and no covariates): "
                "use method='nuts'"
            )
        return solution
    if discrete := finite_latents(program, data):
        combinations(discrete)  # says why, if the exact method could not take them either
        raise InferenceError(
            f"all latents ({', '.join(discrete)}) are discrete, and NUTS moves continuous ones alone: use "
            "method='exact', which sums over their values"
        )
    return None


def _solution(program: PyroModule, data: Data) -> ExactPosterior | FinitePosterior | None:
    discrete = finite_latents(program, data)
    if discrete is not None:
        return sum_out(program, data, discrete)
    structure = structure_of(program, data)
    if structure is None:
        return None
    with torch.no_grad(), defaults(program, data.tensors()[0], torch.float64) as place:
        return solve(structure, data.tensors(*place)[0][structure.observed])


def _exact(
    program: PyroModule,
    solution: ExactPosterior | FinitePosterior,
    data: Data,
    chains: int,
    draws: int,
    seed: int,
) -> xr.DataTree:
    values = solution.sample(chains, draws, stream(seed, "reference"))
    local = latents = list(values)
    if isinstance(solution, FinitePosterior):
        local, latents = [n for n in values if n not in solution.constants], list(solution.values)
    tree = build_tree(
        values,
        model=program,
        data=data,
        local=local,
        latents=latents,
        method="exact",
        independent=True,
        sample_stats={},
        settings={"chains": chains, "draws": draws, "seed": seed},
    )
    _attach_convergence(tree, exact_convergence(solution.grid_error, solution.log_evidence, data.coords["data"]))
    return tree


def _one_by_one(program: PyroModule, data: Data, plan: ReferencePlan, seed: int, progress: Progress) -> xr.DataTree:
    lengths = {"chains": plan.chains, "warmup": plan.warmup, "draws": plan.draws}
    result = sample_pyro_nuts(program, data, **lengths, seed=stream(seed, "reference"), progress=progress)
    tree = _mcmc_tree(program, data.subset(result.data), result, "pyro-nuts", {**lengths, "seed": seed})
    _attach_convergence(tree, judge(result, lambda _: _gated(tree)))
    return tree


def _batched(program: PyroModule, data: Data, plan: ReferencePlan, seed: int, progress: Progress) -> xr.DataTree:
    latents = sites(program, *data.batch(torch.arange(1)))
    joint = any(not site.local for site in latents.values())
    if joint:
        _warn_of_turns(program, data)
    continuous = [name for name, site in latents.items() if not site.support.is_discrete]
    stored = {"chains": plan.chains, "warmup": plan.warmup, "draws": plan.draws, "seed": seed}

    def groups(drawn: McmcDraws, own: Data) -> tuple[xr.Dataset, xr.Dataset]:
        """The groups that the gate judges, without discrete latents, which are drawn independently given all others."""
        posterior, stats = _gated(_mcmc_tree(program, own, drawn, "nuts", stored))
        return posterior.assign_attrs(latents=json.dumps(continuous)) if continuous else posterior, stats

    runs = Runs(program, plan.nuts, joint, groups, plan.init, progress)
    draws, convergence = sample_all(runs, data, plan.starts if continuous else 0, seed)
    tree = _mcmc_tree(program, data.subset(draws.data), draws, "nuts", stored)
    _attach_convergence(tree, convergence)
    return tree


def _warn_of_turns(program: PyroModule, data: Data) -> None:
    """Warn that the chains of a program that vmap cannot run are slow."""
    with target_of(program, data) as target:
        if target.in_turn:
            warn(
                "torch.func.vmap cannot run this program with shared latents, so that its chains run one after the "
                "other, which is slower. It can run operations that do not write into the entries of a tensor: "
                f"torch.stack, torch.cat, torch.where. It stopped at: {target.in_turn[:200]}",
                RuntimeWarning,
            )


def _gated(tree: xr.DataTree) -> tuple[xr.Dataset, xr.Dataset]:
    return tree["posterior"].dataset, tree["sample_stats"].dataset


def _mcmc_tree(
    program: PyroModule, data: Data, result: McmcDraws, method: str, settings: Mapping[str, Any]
) -> xr.DataTree:
    tree = build_tree(
        result.draws,
        model=program,
        data=data,
        local=result.local,
        latents=result.latents,
        method=method,
        independent=False,
        sample_stats=result.stats,
        settings=settings,
    )
    tree["posterior"].attrs |= result.notes
    return tree


def _attach_convergence(tree: xr.DataTree, convergence: xr.Dataset) -> None:
    tree["convergence"] = xr.DataTree(with_coords(convergence, {"data": data_labels(tree)}))
