"""The reference posterior: exact where the program allows it, else Markov chain Monte Carlo; behind a gate."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.binding import bind_fixed
from calibrant.data import Data
from calibrant.errors import InferenceError
from calibrant.inference.exact import ExactPosterior, solve, verify
from calibrant.inference.gate import exact_convergence, mcmc_convergence, require_passable
from calibrant.inference.predictive import add_groups
from calibrant.inference.pyro_nuts import sample_nuts
from calibrant.inference.trees import build_tree, require_memory, with_coords
from calibrant.models.linear_gaussian import LinearGaussian
from calibrant.program import Program, as_program, check_program, defaults, in_double, log_density, sites
from calibrant.progress import Progress, silent

METHODS = ("auto", "exact", "pyro-nuts")


def reference(
    model: Program,
    observed: Mapping[str, Any] | Data,
    method: str = "auto",
    chains: int = 4,
    warmup: int = 1000,
    draws: int = 1000,
    *,
    covariates: Mapping[str, Any] | None = None,
    groups: Iterable[str] = (),
    seed: int = 0,
    progress: Progress = silent,
) -> xr.DataTree:
    """`chains` × `draws` draws of the exact posterior of every datum, in float64, with the gate's verdict on each.

    Args:
        model: the program; it should be in `eval()`.
        observed: site → tensor, or a `Data`.
        method: "exact" (closed form, or quadrature over a scale), "pyro-nuts" (Pyro's NUTS, datum by datum), or "auto":
            exact where the program allows it.
        chains: number of chains (at least 4 for MCMC).
        warmup: adaptation steps of each chain (MCMC alone).
        draws: kept draws a chain (at least 500 for MCMC).
        covariates: keyword → tensor.
        groups: any of "prior", "prior_predictive", "posterior_predictive", "log_likelihood".
        seed: of the draws.
        progress: called with (stage, done, total, text).

    Returns:
        A tree as `posterior` gives, with the group `convergence` (dimension `data`): `is_reference`, `reason`, R-hat,
        ESS, divergences, E-BFMI; exact methods add `grid_error` (posterior sd) and `log_evidence` (nats).

    Raises:
        InferenceError: for an unknown method, one that the program does not allow, settings that can't pass the gate.
        ProgramError, DataError: for a model or data that break the contract.
    """
    if method not in METHODS:
        raise InferenceError(f"unknown method {method!r}; known: {METHODS}")
    data, program = bind_fixed(model, observed, covariates), as_program(model)
    check_program(program, *data.tensors())
    # A declared structure says nothing of covariates, so that data with covariates have no exact posterior here.
    structure = exact_structure(program) if method != "pyro-nuts" and not data.covariate_names else None
    if method == "exact" and structure is None:
        raise InferenceError(
            f"{type(program).__name__} has no exact posterior that is known here (linear decoder, Gaussian noise, "
            "Normal latents, at most one scale, no covariates): use method='pyro-nuts'"
        )
    entries = sum(site.event_shape.numel() for site in sites(program, *data.batch(torch.arange(1))).values())
    require_memory(chains * draws * len(data) * entries, f"{chains} × {draws} draws of {len(data)} data")
    if structure is not None:
        tree = _exact(program, structure, data, chains, draws, seed)
        progress("reference", len(data), len(data))
    else:
        require_passable(chains, draws)
        tree = _nuts(program, data, chains, warmup, draws, seed, progress)
    add_groups(tree, program, data, groups, seed)
    return tree


def exact_structure(model: PyroModule) -> LinearGaussian | None:
    """What the model declares for exact inference, or None."""
    if not hasattr(model, "linear_gaussian"):
        return None
    twin = copy.deepcopy(model).double()
    with torch.no_grad(), defaults(twin, {}, torch.float64):
        return twin.linear_gaussian()


def log_evidence(model: Program, observed: Mapping[str, Any] | Data) -> Tensor:
    """The exact log evidence of every datum, `(data,)`, in nats.

    Raises:
        InferenceError: for a program whose exact posterior is not known here.
    """
    data, program = bind_fixed(model, observed), as_program(model)
    structure = None if data.covariate_names else exact_structure(program)
    if structure is None:
        raise InferenceError(f"{type(program).__name__} has no exact evidence that is known here")
    return _solve(program, structure, data).log_evidence


def _solve(program: PyroModule, structure: LinearGaussian, data: Data) -> ExactPosterior:
    """Check the declared structure against the program's own density, then solve it."""
    double = in_double(program)

    def log_joint(values: Mapping[str, Tensor]) -> Tensor:
        return log_density(double, values, len(values[structure.observed]), observed=[structure.observed]).joint

    with torch.no_grad(), defaults(program, data.tensors()[0], torch.float64) as place:
        x = data.tensors(*place)[0][structure.observed]
        verify(structure, log_joint, x[:16], torch.Generator().manual_seed(0))
        return solve(structure, x)


def _exact(
    program: PyroModule, structure: LinearGaussian, data: Data, chains: int, draws: int, seed: int
) -> xr.DataTree:
    solution = _solve(program, structure, data)
    values = solution.sample(chains, draws, seed)
    tree = build_tree(
        values,
        model=program,
        data=data,
        local=values,
        latents=values,
        method="exact",
        independent=True,
        sample_stats={},
        settings={"chains": chains, "draws": draws, "seed": seed},
    )
    _attach_convergence(tree, exact_convergence(solution.grid_error, solution.log_evidence, data.coords["data"]))
    return tree


def _nuts(
    program: PyroModule, data: Data, chains: int, warmup: int, draws: int, seed: int, progress: Progress
) -> xr.DataTree:
    result = sample_nuts(program, data, chains, warmup, draws, seed, progress)
    tree = build_tree(
        result.draws,
        model=program,
        data=data.subset(torch.arange(result.finished)),
        local=result.local,
        latents=result.latents,
        method="pyro-nuts",
        independent=False,
        sample_stats=result.stats,
        settings={"chains": chains, "warmup": warmup, "draws": draws, "seed": seed},
    )
    convergence = mcmc_convergence(tree["posterior"].dataset, tree["sample_stats"].dataset)
    _attach_convergence(tree, convergence)
    return tree


def _attach_convergence(tree: xr.DataTree, convergence: xr.Dataset) -> None:
    tree["convergence"] = xr.DataTree(with_coords(convergence, {"data": tree["posterior"].coords["data"].values}))
