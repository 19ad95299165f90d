"""The public reference: exact, by chains, or by importance from a guide where its weights show that it is good enough.

If the guide is good, importance is the cheapest reference of a program without a closed form: all draws are
independent, and one run of model and guide gives thousands. Weights tell datum by datum whether they may be believed
(`reweighting`); where they may not, chains take over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.guides.fitted import FittedGuide
from calibrant.inference.drawing import posterior_of
from calibrant.inference.groups import add_groups
from calibrant.inference.problem import Problem, checked
from calibrant.inference.references.gate import importance_convergence, require_passable
from calibrant.inference.references.sampling import POOL, ReferencePlan, reference_of, refuse_without_latents
from calibrant.inference.reweighting import importance, log_weights
from calibrant.inference.trees import SAMPLE, data_labels
from calibrant.program.contract import Program
from calibrant.program.latents import Site, sites
from calibrant.program.supports import bounds, from_line, is_on_a_line
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

IMPORTANCE = ("importance", "importance-only")
_ROUNDING = 1e-15  # relative distance from a bound at which float64 has no more than a few numbers
_FITS = 6  # most rounds in which a proposal is fitted to the draws before
_ENTRIES = 2**25  # most numbers in the pools of a block of data: 256 MiB of float64

_NOTE = (
    "by datum (`treatment` of the group `convergence`): copies of independent draws of the guide, resampled by PSIS "
    "weights, those of one draw side by side, or draws of Markov chains; count both by autocorrelation"
)

Rows = npt.NDArray[np.bool_]


def reference(
    model: Program,
    observed: Mapping[str, Any] | Data,
    method: str = "auto",
    chains: int = 4,
    warmup: int = 1000,
    draws: int = 1000,
    *,
    covariates: Mapping[str, Any] | None = None,
    init: Program | None = None,
    target_accept: float = 0.8,
    dense: bool | Literal["auto"] = "auto",
    compile: bool | Literal["auto"] = "auto",
    starts: int = 32,
    pool: int = POOL,
    subchains: int | Literal["auto"] = "auto",
    groups: Iterable[str] = (),
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.DataTree:
    """Draw `chains` × `draws` times from the exact posterior of every datum, and judge the draws by the gate.

    Draws are computed in float64. A variable is stored in float32 where rounding changes nothing, and in float64 where
    it would: a mean that is a million times the sd, or draws next to a bound of the support. Draws so close to a bound
    that float64 cannot represent them either (nearer to 1 than 1e-16, for example) are counted in `at_edge`; with more
    than 0.5% of them, a datum fails. The remedy is a latent on another scale: log odds in place of a probability.

    Args:
        model: the program, in `eval()`.
        observed: site → tensor, or a `Data`.
        method: "exact" (closed form, quadrature over a scale, or the sum over all values where all latents are
            discrete), "nuts" (batched NUTS; data that fail the gate are run again up to twice, with settings that
            depend on the cause), "pyro-nuts" (Pyro's NUTS, datum by datum), "importance" (`pool` draws of the guide
            `init` per datum, resampled by their weights, where k-hat is below 0.5 and the weights are worth 400 draws
            or more; for other data, as many draws of a multivariate t that is fitted to the weighted draws, in six
            rounds at most; batched NUTS for what is left), "importance-only" (the same without NUTS, so that some data
            have no reference), or "auto" (exact where the program allows it, otherwise batched NUTS). Weights are known
            only where the guide draws: a mode that the guide misses altogether leaves no trace in k-hat, and importance
            then passes draws of the other modes. NUTS searches for modes by itself.
        chains: number of chains (at least 4 for MCMC).
        warmup: number of adaptation steps per chain (MCMC only).
        draws: number of draws per chain that are kept (at least 500 for MCMC).
        init: a guide; every second chain of batched NUTS starts at a draw of it, all other chains at draws of the
            prior. Draws that lie hopelessly far from the posterior are brought nearer, but stay far outside it. Method
            "importance" draws from it.
        target_accept: mean acceptance rate to which batched NUTS adapts its step sizes; data with divergences are run
            again with a higher rate.
        dense: whether batched NUTS estimates a dense metric, for few, strongly correlated latents (a Gaussian process);
            "auto" does for joint posteriors (shared latents) of at most 50 dimensions.
        compile: whether batched NUTS compiles its step; "auto" does for long chains and for many data, for which it
            saves more time than it takes.
        starts: number of short chains per datum with which batched NUTS searches for modes before its chains (half as
            many with shared latents); half of them start at draws of the guide `init`, the others at draws of the prior
            and farther out. A mode to which 10% of starts lead is missed by 32 starts in 3% of cases. 0 for no search.
        pool: number of draws per datum from which importance resamples, at least `chains` × `draws`.
        subchains: number of sub-chains into which batched NUTS divides every chain. They start at the same place, run
            side by side with random numbers of their own, and follow each other in the chain that is returned. Warm-up
            and draws are divided among them, so that few posteriors take far less time. R-hat is nested then: it
            compares chains, that is, starts. "auto" takes 8 for 1,000 + 1,000 iterations, 4 for 500 + 500, and 1 for
            short chains; 1 stands for ordinary chains.
        covariates: keyword → tensor, leading dimension data.
        groups: any of "prior", "prior_predictive", "posterior_predictive", "log_likelihood".
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        A tree like that of `posterior`, with the group `convergence` (dimension `data`): `is_reference`, `reason`,
        R-hat, ESS, divergences, E-BFMI. Markov chains add `at_edge`, the share of draws that are closer to the edge of
        the support than float64 resolves; batched NUTS also `look` (number of the run) and `treatment` of the last run,
        and `moved`, the number of chains that were moved out of a mode without mass in warm-up. The search for modes
        adds `modes`, the number of modes with mass; `apart`, whether its starts ended in groups between which no chain
        moved; and the attributes `starts` and `expected_wrong`, the expected number of data that pass although a mode
        was missed. Exact methods add
        `grid_error` (posterior sds) and `log_evidence` (nats). With importance, `treatment` starts with
        "importance" or "NUTS" (and `look` is 0 or the number of the run), `pareto_k` and `ess_weights` are those of the
        last weights of all data, and `log_evidence` ± `log_evidence_se` (nats) are known where importance passed
        and NaN elsewhere.

    Raises:
        InferenceError: for an unknown method, a method that the program does not allow, importance without a guide,
            settings with which no datum could pass the gate, and a program without latents.
        ProgramError, DataError: for a model or data that break the contract.
    """
    progress = reporting(progress)
    plan = ReferencePlan(method, chains, warmup, draws, init, target_accept, dense, compile, starts, pool, subchains)
    if method not in IMPORTANCE:
        return reference_of(*checked(model, observed, covariates), plan, groups, seed, progress)
    if init is None:
        raise InferenceError(f"method={method!r} draws from a guide: give one with init=guide")
    return reference_for(Problem.of(model, init, observed, covariates), plan, groups, seed, progress)


def reference_for(
    problem: Problem, plan: ReferencePlan, groups: Iterable[str] = (), seed: int = 0, progress: Progress = silent
) -> xr.DataTree:
    """Sample a reference by any method, like `reference`, for a problem that is already checked.

    Method "importance" draws from the problem's guide.
    """
    program, data = problem.program, problem.data
    if plan.method not in IMPORTANCE:
        return reference_of(program, data, plan, groups, seed, progress)
    refuse_without_latents(program, data)
    require_passable(plan.chains, plan.draws)
    problem.require_local(
        "a draw of them has one importance weight for all data together", "or sample the reference by method='nuts'"
    )
    found = _resampled(problem, plan, stream(seed, "importance"), progress)
    gate = found["convergence"].to_dataset()
    passed = np.asarray(gate["is_reference"].values, dtype=bool)
    if not passed.all() and plan.method == "importance":
        others = replace(plan, method="nuts", init=problem.guide)
        rest = reference_of(program, data[~passed], others, seed=stream(seed, "rest"), progress=progress)
        rest["convergence"] = xr.DataTree(_after_importance(rest["convergence"].to_dataset(), gate))
        found = _side_by_side(found, rest, passed)
    settings = {"chains": plan.chains, "warmup": plan.warmup, "draws": plan.draws, "pool": _pool(plan), "seed": seed}
    attrs = {"method": plan.method, "independent_draws": 0, "settings": json.dumps(settings), "draws_note": _NOTE}
    for name in ("posterior", "sample_stats"):
        found[name] = xr.DataTree(found[name].to_dataset().assign_attrs(attrs))
    kept = np.isin(data.labels(), data_labels(found))  # after Ctrl-C, some data have no chains
    add_groups(found, program, data if kept.all() else data[kept], groups, seed)
    return found


# -- importance --------------------------------------------------------------------------------------------------------


def _pool(plan: ReferencePlan) -> int:
    return max(plan.pool, plan.chains * plan.draws)


def _resampled(problem: Problem, plan: ReferencePlan, seed: int, progress: Progress) -> xr.DataTree:
    """Resampled draws of the guide for all data, with the gate's verdict on each; few data at a time, for memory."""
    data, pool = problem.data, _pool(plan)
    latents = sites(problem.program, *data.batch(torch.arange(1, device="cpu")))
    one = posterior_of(problem.of_some(data[:1]), 1, seed=seed)["posterior"].dataset
    entries = sum(variable.size for variable in one.data_vars.values())
    parts: list[dict[str, xr.Dataset]] = []
    for index in torch.arange(len(data), device="cpu").split(max(1, _ENTRIES // (pool * max(1, entries)))):
        block = problem.of_some(data[index])
        parts.append(_of_block(block, latents, plan, stream(seed, "block", len(parts))))
        progress("importance", int(index[-1]) + 1, len(data))
    together = {name: _joined([part[name] for part in parts]) for name in parts[0]}
    return xr.DataTree.from_dict({f"/{name}": group for name, group in together.items()})


def _of_block(problem: Problem, latents: Mapping[str, Site], plan: ReferencePlan, seed: int) -> dict[str, xr.Dataset]:
    """Resampled draws of a block of data: of the guide, or where its weights are bad, of a t that is fitted to them."""
    drawn = posterior_of(problem, _pool(plan), seed=stream(seed, "pool"))
    found = _judged(drawn, latents, plan, stream(seed, "resampling"), "importance")
    if not all(is_on_a_line(site.support, site.prior) for site in latents.values()):
        return found
    for fit in range(_FITS):
        passed = np.asarray(found["convergence"]["is_reference"].values, dtype=bool)
        if passed.all():
            break
        others = problem.of_some(problem.data[~passed])
        fitted = _fitted(others, drawn.sel(data=others.data.labels()), latents)
        drawn = posterior_of(others.with_guide(fitted), _pool(plan), seed=stream(seed, "pool", fit))
        again = _judged(drawn, latents, plan, stream(seed, "resampling", fit), "importance, fitted proposal")
        both = _side_by_side(xr.DataTree.from_dict(found), xr.DataTree.from_dict(again), passed)
        found = {str(name): group.to_dataset() for name, group in both.children.items()}
    return found


def _judged(
    drawn: xr.DataTree, latents: Mapping[str, Site], plan: ReferencePlan, seed: int, treatment: str
) -> dict[str, xr.Dataset]:
    """Resample draws of a guide, and judge each datum by its weights."""
    logs = log_weights(drawn)
    broken = (np.isnan(logs) | np.isposinf(logs)).any(1) | ~np.isfinite(logs).any(1)
    unusable = np.asarray(broken, dtype=bool)
    for name in ("log_p", "log_q"):
        drawn["sample_stats"][name] = drawn["sample_stats"][name].where(xr.DataArray(~unusable, dims="data"), 0.0)
    kept = importance(drawn, plan.chains * plan.draws, seed)
    groups = {str(name): group.to_dataset() for name, group in kept.children.items()}
    summary = groups.pop("importance")
    groups |= {name: _in_chains(groups[name], plan.chains) for name in ("posterior", "sample_stats")}
    edges = {name: _at_bounds(groups["posterior"][name], site.support) for name, site in latents.items()}
    groups["convergence"] = importance_convergence(groups["posterior"], summary, unusable, edges, treatment)
    return groups


def _fitted(problem: Problem, drawn: xr.DataTree, latents: Mapping[str, Site]) -> FittedGuide:
    """A multivariate t for each datum, fitted to weighted draws.

    Weights are cut off at √n times their mean (Ionides 2008), so that no single draw decides the fit.
    """
    order = [name for name in latents if name in drawn["posterior"].data_vars]
    logs = log_weights(drawn)
    relative = np.exp(logs - logs.max(1, keepdims=True))
    cut = np.minimum(relative, np.sqrt(logs.shape[1]) * relative.mean(1, keepdims=True))
    weights = torch.as_tensor(cut / cut.sum(1, keepdims=True))
    supports = {name: latents[name].support for name in order}
    draws = {}
    for name in order:
        values = drawn["posterior"][name].transpose("data", *SAMPLE, ...).values[:, 0]
        draws[name] = from_line(supports[name]).inv(torch.as_tensor(values, dtype=torch.float64))
    observed, covariates = problem.data.tensors()
    return FittedGuide({**observed, **covariates}, supports, draws, weights).eval()


def _at_bounds(draws: xr.DataArray, support: Any) -> npt.NDArray[np.float64]:
    """Share of the draws of each datum that float64 does not tell from a bound of the support, `(data,)`."""
    values = draws.transpose("data", *SAMPLE, ...).values.astype(np.float64)
    at = np.zeros(values.shape, dtype=bool)
    for bound in bounds(support):
        if bound.numel() == 1:
            at |= np.abs(values - float(bound)) <= _ROUNDING * abs(float(bound))
    return at.reshape(*at.shape[:3], -1).any(-1).mean((1, 2))


def _in_chains(group: xr.Dataset, chains: int) -> xr.Dataset:
    """One chain of draws cut into several, which are consecutive parts, so that copies of a draw stay side by side."""
    variables = {
        name: (variable.dims, variable.values.reshape(chains, -1, *variable.shape[2:]))
        for name, variable in group.data_vars.items()
    }
    coords = {name: values for name, values in group.coords.items() if name not in SAMPLE}
    length = group.sizes["draw"] // chains
    coords |= {"chain": np.arange(chains), "draw": np.arange(length)}
    return xr.Dataset(variables, coords=coords, attrs=group.attrs)


# -- chains for the rest -----------------------------------------------------------------------------------------------


def _after_importance(rest: xr.Dataset, gate: xr.Dataset) -> xr.Dataset:
    """The gate's verdict on chains, with what importance had found for the same data."""
    tried = gate.sel(data=rest["data"].values)
    treatment = [", ".join(filter(None, ("NUTS", text))) for text in rest["treatment"].values.tolist()]
    pairs = zip(tried["reason"].values.tolist(), rest["reason"].values.tolist(), strict=True)
    reason = [f"{first}; by NUTS: {second}" if second else "" for first, second in pairs]
    texts = {
        name: ("data", np.array(values, dtype=str)) for name, values in (("treatment", treatment), ("reason", reason))
    }
    return rest.assign({**texts, **{name: tried[name] for name in ("pareto_k", "ess_weights")}})


def _side_by_side(found: xr.DataTree, rest: xr.DataTree, passed: Rows) -> xr.DataTree:
    """Importance for the data that pass, chains for the others, in the order of the data."""
    order = {label: place for place, label in enumerate(data_labels(found).tolist())}
    parts = {}
    for name, group in found.children.items():
        one, two = group.to_dataset().isel(data=passed, missing_dims="ignore"), rest[str(name)].to_dataset()
        both = _joined([one, two])
        if "data" in both.dims:
            both = both.isel(data=np.argsort([order[label] for label in both["data"].values.tolist()]))
        parts[f"/{name}"] = both
    return xr.DataTree.from_dict(parts)


def _joined(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Datasets of different data as one; variables that one of them lacks are NaN, 0, False or empty there."""
    like = {name: variable for part in parts for name, variable in part.data_vars.items() if "data" in variable.dims}
    if len(parts) == 1 or not like:
        return parts[0]
    full = [part.assign({n: _blank(v, part) for n, v in like.items() if n not in part}) for part in parts]
    options: dict[str, Any] = {"coords": "minimal", "compat": "override", "join": "override"}
    return xr.concat(full, "data", data_vars="minimal", combine_attrs="override", **options)


def _blank(like: xr.DataArray, part: xr.Dataset) -> xr.DataArray:
    shape = [part.sizes.get(dim, size) for dim, size in like.sizes.items()]
    values = np.zeros(shape, like.dtype)
    if like.dtype.kind == "f":
        values[:] = np.nan
    return xr.DataArray(values, dims=like.dims)
