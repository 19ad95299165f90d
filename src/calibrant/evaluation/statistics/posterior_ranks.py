"""Calibration around the observed data: is a procedure that infers shared latents right where it is used?

Shared latents θ are drawn from the posterior that the procedure finds for the observed data y, and new data y′ are
simulated given them. If the procedure is exact, θ is also a draw from the posterior given y and y′ together, so that
its rank among the draws that the procedure finds for both is uniform (Säilynoja, Schmitt, Bürkner & Vehtari 2025,
"Posterior SBC", arXiv 2502.03279). The procedure infers again for every simulation: for shared latents there is no
other way, since a guide learns their posterior for one data set.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.rank_trees import Recovered, pit_values, rank_tree
from calibrant.evaluation.statistics.simulated_data import simulated
from calibrant.inference.diagnostics import ess
from calibrant.inference.problem import checked
from calibrant.inference.trees import model_sha256
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.environment import cast, defaults, in_double, seeded
from calibrant.program.latents import Site, sites
from calibrant.program.simulation import refuse_unsimulated
from calibrant.program.tracing import trace
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
Infer = Callable[..., xr.DataTree]

LEAST_SIMULATIONS, LEAST_DRAWS = 20, 20
JOINT = ("log_likelihood", "log_joint")
_NAME = "posterior calibration"
_ENTRIES = 2**22  # observed numbers of all points whose density is computed at once


def posterior_calibration(
    model: Program,
    infer: Infer,
    observed: Mapping[str, Any] | Data,
    simulations: int = 100,
    draws: int = 100,
    *,
    covariates: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.DataTree:
    """Ranks of shared latents among the draws of a procedure that infers again, for data simulated near yours.

    The procedure is run once for the observed data and once for every simulation, for the observed and the simulated
    data together. An error shows less than in `calibration`, because the truth is drawn from the same procedure: if it
    finds an sd that is r times the right one, the `spread` of `uniformity` is √((1 + r²)/2) / r (1.23 for r = 0.7, not
    1.43), and an error of the mean by one posterior sd is a `bias` of 0.3 (Normal posterior, weak prior). Compare a
    guide with `inference.reference` too, where that is possible. For example, with a reference and with a guide:

        posterior_calibration(model, lambda data, seed: reference(model, data, seed=seed), observed)

        def infer(data, seed):
            guide = amortize(model, data)
            fit(model, guide, data, validation=data, seed=seed)  # after model.requires_grad_(False)
            return posterior(model, guide, data, seed=seed)

        posterior_calibration(model, infer, Data(observed))

    Args:
        model: the program, in `eval()`, with shared latents, and without factors and scaled observations.
        infer: a function of data that returns a tree with a group `posterior`, as `posterior` and `reference` do: draws
            of all shared latents, `(chain, draw, …)`. It gets the data as you give `observed`: a `Data`, or a dict of
            tensors with observations and covariates. If it has an argument `seed`, it gets another seed each time. Let
            it use this seed: the ranks are not independent if every posterior is drawn with the same random numbers.
        observed: site → tensor, or a `Data`.
        simulations: number of simulated data sets, each as large as the observed one, with the same covariates.
        draws: number of draws among which a value is ranked. Draws of chains are thinned to as many as are effectively
            independent, if these are fewer.
        covariates: keyword → tensor, leading dimension data.
        seed: random seed for the simulations, and for `infer`.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        A tree as that of `calibration`, which `uniformity` and `arviz_plots.plot_ecdf_pit` take. Group `prior_sbc`: PIT
        values of every shared latent, exactly uniform if the procedure is exact. If the posteriors hold all local
        latents as well, also those of `log_likelihood` and `log_joint`, of all data together: they see a procedure that
        ignores the data. Group `recovery`: `z_score`, and `contraction`, 1 − variance of the draws / variance of the
        posterior of the observed data. Attributes: `latents`, the number of entries of the shared latents, and
        `guide_draws`, the smallest number of draws among which a value is ranked.

    Raises:
        ProgramError, DataError: for a model or data that break the contract, or a program that can't be simulated.
        InferenceError: for a program without shared latents; fewer than 20 simulations or 20 draws; an `infer` that
            returns no draws of the shared latents, draws of another shape, draws that are not finite, or too few that
            are independent, or that changes the weights of the model; simulated data that are not finite.
    """
    progress = reporting(progress)
    if simulations < LEAST_SIMULATIONS or draws < LEAST_DRAWS:
        raise InferenceError(
            f"{simulations} simulations with {draws} draws each are too few to tell anything: use at least "
            f"{LEAST_SIMULATIONS} and {LEAST_DRAWS}"
        )
    program, data = checked(model, observed, covariates)
    rows, cols = data.tensors()
    refuse_unsimulated(program, rows, cols)
    found = sites(program, rows, cols)
    _require_shared(found)
    run = _Run(program, infer, found, rows, cols, isinstance(observed, Data), draws, seed, model_sha256(program))
    known = _drawn(run.inferred(rows, cols, "observed"), found, len(data), "the observed data")
    _require_draws(known.effective, known.worst, simulations, "the observed data")
    ranks = []
    for number, place in enumerate(_spread(known.size, simulations)):
        ranks.append(run.ranked({name: np.asarray(value[place]) for name, value in known.values.items()}, number))
        progress(_NAME, number + 1, simulations)
    _require_typical_draws(ranks)
    settings = {"simulations": simulations, "draws": draws, "seed": seed}
    attrs = {"settings": json.dumps(settings), "model_sha256": run.weights}
    return _tree(ranks, known, found, program, attrs)


def _require_shared(found: Mapping[str, Site]) -> None:
    if all(site.local for site in found.values()):
        raise InferenceError(
            f"all latents, {list(found)}, are local: the posterior of a datum does not change when other data are "
            "added, so that nothing has to be inferred again. Use evaluation.calibration"
        )


# -- draws of the procedure --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draws:
    """Draws of a procedure: name → `(draw, …)`, chain after chain, and how many are effectively independent."""

    values: Mapping[str, npt.NDArray[Any]]
    size: int
    effective: int
    worst: str  # the latent with the fewest


def _drawn(tree: Any, found: Mapping[str, Site], size: int, what: str) -> _Draws:
    """The draws in a tree: of all shared latents, and of the local ones if all of them are there."""
    if not isinstance(tree, xr.DataTree) or "posterior" not in tree.children:
        raise InferenceError(
            f"infer returned {type(tree).__name__} without a group 'posterior' for {what}: let it return what "
            "inference.posterior or inference.reference returns"
        )
    group = tree["posterior"].dataset
    shared = [name for name, site in found.items() if not site.local]
    if absent := [name for name in shared if name not in group]:
        raise InferenceError(
            f"infer returned no draws of the shared latents {absent} for {what}: its posterior has {list(group)}"
        )
    local = [name for name, site in found.items() if site.local]
    names = [*shared, *local] if all(name in group for name in local) else shared
    values = {name: _values(group[name], found[name], size, what) for name in names}
    arrays = {name: values[name].reshape(*values[name].shape[:2], -1) for name in shared}
    chains, length = next(iter(arrays.values())).shape[:2]
    total, effective = chains * length, {name: float(chains * length) for name in shared}
    if length < 4 or total < LEAST_DRAWS:
        raise InferenceError(f"infer returned {chains} × {length} draws for {what}: let it draw more")
    if not group.attrs.get("independent_draws"):
        effective = {name: min(total, *_ess(array).tolist()) for name, array in arrays.items()}
    worst = min(effective, key=lambda name: effective[name])
    flat = {name: value.reshape(total, *value.shape[2:]) for name, value in values.items()}
    return _Draws(flat, total, int(effective[worst]), worst)


def _values(array: xr.DataArray, site: Site, size: int, what: str) -> npt.NDArray[Any]:
    leading = ("chain", "draw", "data") if site.local else ("chain", "draw")
    wanted = ((size,) if site.local else ()) + tuple(site.event_shape)
    if not set(leading) <= set(array.dims) or array.transpose(*leading, ...).shape[2:] != wanted:
        raise InferenceError(
            f"infer returned draws of {site.name!r} with dimensions {dict(array.sizes)} for {what}, wanted "
            f"{leading} and then {tuple(site.event_shape)}" + (f", with {size} data" if site.local else "")
        )
    values = array.transpose(*leading, ...).values
    if not np.isfinite(values).all():
        raise InferenceError(f"infer returned draws of {site.name!r} that are not finite for {what}")
    return values


def _ess(draws: npt.NDArray[Any]) -> Array:
    """Effective sample sizes `(entries,)`; an entry that never changes has as many as there are draws."""
    found = ess(draws)
    return np.where(np.isfinite(found), found, draws.shape[0] * draws.shape[1])


def _require_draws(effective: int, worst: str, wanted: int, what: str) -> None:
    if effective < wanted:
        raise InferenceError(
            f"infer returned {effective} effectively independent draws of {worst!r} for {what}, and at least {wanted} "
            "are needed: let it draw more"
        )


def _require_typical_draws(ranks: list[_Ranks]) -> None:
    """An estimate of a single posterior may be too low by chance, but not that of half of them."""
    middle = sorted(ranks, key=lambda one: one.effective)[len(ranks) // 2]
    _require_draws(middle.effective, middle.worst, LEAST_DRAWS, "half of the simulations")


def _spread(size: int, count: int) -> npt.NDArray[np.intp]:
    """Positions of `count` of the draws, evenly spaced along the chains."""
    return np.linspace(0, size - 1, count).round().astype(np.intp)


# -- ranks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranks:
    """What one simulation adds to the result.

    Attributes:
        pits: name → PIT values, in the shape of the event.
        draws: number of draws among which they are ranked.
        effective: estimated number of independent draws of the latent `worst`, which has the fewest.
        worst: its name.
        moments: name of a continuous latent → true value, and mean and variance of the draws, each flat.
    """

    pits: Mapping[str, Array]
    draws: int
    effective: int
    worst: str
    moments: Mapping[str, tuple[Array, Array, Array]]


@dataclass(frozen=True)
class _Run:
    """The computation for one simulated data set."""

    program: PyroModule
    infer: Infer
    found: Mapping[str, Site]
    observed: Values
    covariates: Values
    as_data: bool
    draws: int
    seed: int
    weights: str  # hash of the model's weights

    def inferred(self, observed: Values, covariates: Values, purpose: str | int) -> Any:
        """What the procedure returns for these data, with random numbers of its own."""
        seed = stream(self.seed, _NAME, "infer", purpose)
        options = {"seed": seed} if "seed" in inspect.signature(self.infer).parameters else {}
        given = Data(dict(observed), dict(covariates)) if self.as_data else {**observed, **covariates}
        with seeded(seed):
            found = self.infer(given, **options)
        if model_sha256(self.program) != self.weights:
            raise InferenceError(
                "infer changed the weights of the model, so that it finds posteriors of other models: fix them with "
                "model.requires_grad_(False) before fit"
            )
        return found

    def ranked(self, truth: Mapping[str, npt.NDArray[Any]], number: int) -> _Ranks:
        """Simulate data given one draw for the observed data, infer with both, and rank the draw.

        Args:
            truth: name → draw of all shared latents, and of the local latents of the observed data or of none.
            number: number of the simulation.
        """
        size, what = len(next(iter(self.observed.values()))), f"simulation {number}"
        shared = {name: truth[name] for name, site in self.found.items() if not site.local}
        local = [name for name, site in self.found.items() if site.local]
        seed, names = stream(self.seed, _NAME, "data", number), [*local, *self.observed]
        new = simulated(self.program, names, size, self.covariates, seed, _tensors(shared))
        rows = {name: torch.cat([value, new[name].to(value)]) for name, value in self.observed.items()}
        cols = {name: torch.cat([value, value]) for name, value in self.covariates.items()}
        drawn = _drawn(self.inferred(rows, cols, number), self.found, 2 * size, what)
        count = max(LEAST_DRAWS, min(self.draws, drawn.effective))
        kept = {name: value[_spread(drawn.size, count)] for name, value in drawn.values.items()}
        pairs = {name: (value, kept[name]) for name, value in shared.items()}
        if set(truth) == set(self.found):
            if absent := [name for name in local if name not in kept]:
                raise InferenceError(f"infer returned draws of {absent} for the observed data, but none for {what}")
            both = {name: np.concatenate([truth[name], new[name].cpu().numpy()]) for name in local}
            pairs |= self._densities({**shared, **both}, kept, rows, cols, number)
        generator = np.random.default_rng(stream(self.seed, _NAME, "ties", number))
        pits = {}
        for name, (one, values) in pairs.items():
            less, equal = ((part.sum(0) + np.zeros(part.shape[1:])) for part in (values < one, values == one))
            pits[name] = pit_values(less, equal, count, generator)
        return _Ranks(
            pits,
            count,
            drawn.effective,
            drawn.worst,
            {name: _moments(shared[name], drawn.values[name]) for name in shared},
        )

    def _densities(
        self,
        truth: Mapping[str, npt.NDArray[Any]],
        draws: Mapping[str, npt.NDArray[Any]],
        observed: Values,
        covariates: Values,
        number: int,
    ) -> dict[str, tuple[Array, Array]]:
        """Log likelihood and log joint of all data: at the truth, and at the draws."""
        points = {name: np.concatenate([truth[name][None], values]) for name, values in draws.items()}
        with torch.no_grad(), defaults(self.program, observed, torch.float64) as place:
            rows, cols = cast(observed, *place), cast(covariates, *place)
            found = _densities(self.program, cast(_tensors(points), *place), rows, cols)
        if np.isnan(found).any():
            raise InferenceError(f"the log joint is not a number at draws that infer returned for simulation {number}")
        return {name: (column[0], column[1:]) for name, column in zip(JOINT, found.T, strict=True)}


def _tensors(values: Mapping[str, npt.NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def _moments(truth: npt.NDArray[Any], draws: npt.NDArray[Any]) -> tuple[Array, Array, Array]:
    flat = draws.reshape(len(draws), -1).astype(np.float64)
    return truth.reshape(-1).astype(np.float64), flat.mean(0), flat.var(0, ddof=1)


def _densities(program: PyroModule, points: Values, observed: Values, covariates: Values) -> Array:
    """Log likelihood and log joint of all data, `(point, 2)`, at points: name → `(point, …)`, in float64."""
    double, size = in_double(program), len(next(iter(observed.values())))

    def at(latents: Values) -> Tensor:
        held = {**observed, **latents}
        density = density_of(trace(double, size, covariates, held), size, held, observed)
        return torch.stack([density.observed.sum(), density.joint])

    entries = sum(value.numel() for value in observed.values())
    with pyro.validation_enabled(False):
        try:
            found = torch.func.vmap(at, chunk_size=max(1, _ENTRIES // entries))(dict(points))
        except RuntimeError:  # control flow that depends on values
            count = len(next(iter(points.values())))
            found = torch.stack([at({name: value[point] for name, value in points.items()}) for point in range(count)])
    return found.cpu().numpy()


def _tree(
    ranks: list[_Ranks], known: _Draws, found: Mapping[str, Site], program: PyroModule, attrs: Mapping[str, Any]
) -> xr.DataTree:
    pits = {name: np.stack([one.pits[name] for one in ranks]) for name in ranks[0].pits}
    shared = {name: site for name, site in found.items() if not site.local}
    names = [name for name, site in shared.items() if not site.support.is_discrete]
    empty = np.zeros((len(ranks), 0))
    value, mean, variance = (
        np.concatenate([empty, *(np.stack([one.moments[name][which] for one in ranks]) for name in names)], 1)
        for which in range(3)
    )
    before = np.concatenate([np.zeros(0), *(_moments(known.values[n][0], known.values[n])[2] for n in names)])
    counts = {"guide_draws": min(one.draws for one in ranks)}
    counts["latents"] = sum(site.event_shape.numel() for site in shared.values())
    return rank_tree(program, pits, Recovered(names, value, mean, variance, before), {**attrs, **counts})
