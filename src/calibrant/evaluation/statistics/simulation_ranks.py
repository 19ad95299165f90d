"""Simulation-based calibration: is the guide right on average over data that the model simulates?

Latents θ ~ p(θ) and data x ~ p(x | θ) are simulated. If the guide is the posterior, θ and its draws given x have the
same distribution, so that the rank of any quantity f(θ, x) among its values at the draws is uniform (Talts, Betancourt,
Simpson, Vehtari & Gelman 2018, arXiv 1804.06788), also where f depends on the data (Modrák, Moon, Kim, Bürkner, Huurre,
Faltejsková, Gelman & Vehtari 2023, arXiv 2211.02383). The latents' own ranks can't see a guide that returns the
prior; the log joint's can. No reference posterior is needed.

A shared latent has one posterior for the whole data set, which the guide has learned and can't infer anew for simulated
data. Where a program has some, they are drawn from the guide at the observed data; local latents and data are simulated
given these draws, and ranked among draws of the guide given the same values. This judges the guide's local latents,
q(z | x, shared latents), where they are used. `posterior_calibration` judges shared latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyro
import torch
import xarray as xr
from pyro.nn import PyroModule
from scipy.special import chdtr, chdtrc, ndtr, ndtri
from scipy.stats import kstest
from torch import Tensor, nn

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.rank_trees import Recovered, pit_values, rank_tree
from calibrant.evaluation.statistics.simulated_data import Simulated, simulated_data
from calibrant.guides.many_draws import encoded_once, fixed
from calibrant.inference.graphs.of_modules import Recorded
from calibrant.inference.problem import Problem
from calibrant.inference.trees import SAMPLE, model_sha256, scalars
from calibrant.memory import FEW, limited, measured_rows, within_memory
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import Site, sites
from calibrant.program.tracing import guide_trace, latent_values, trace
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
Quantity = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]

DENSITIES = ("log_likelihood", "log_joint", "hpd")
MIN_SIMULATIONS, MIN_DRAWS = 100, 50

_ROWS = 4096  # number of rows of a run, few enough for the processor's cache
_POINT, _SHARED = "point/", "shared/"  # no site has a name with a slash
_SAME_SHARED = 8  # most simulated data with the same draw of the shared latents
_RECORDED_FROM = 40  # least number of runs for which they are recorded as a graph


def calibration(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    simulations: int = 2000,
    draws: int = 1000,
    *,
    covariates: Mapping[str, Any] | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    memory: float | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.DataTree:
    """Ranks of simulated latents, and of functions of them, among the guide's draws for the simulated data.

    Everything is computed in the dtype of the program's weights, because only comparisons matter.

    Args:
        model: the program, in `eval()`, with local latents; no factors, and no improper priors of local latents.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`, which tells the observed sites. Covariates are drawn from these data, with
            replacement. The values of the observations are used only to draw shared latents from the guide.
        simulations: number of simulated data.
        draws: number of guide draws per simulated datum.
        covariates: keyword → tensor, leading dimension data.
        quantities: name → function of (latents, observations), each a dict of tensors with leading dimension `rows`,
            that returns one number per row: a quantity whose uncertainty matters to you. The latents include shared
            ones, which are repeated along the rows.
        memory: GiB that one run of model and guide may take, as in `inference.posterior`.
        seed: random seed for the simulations and all draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        A tree. Group `prior_sbc`, dimensions `chain` (one), `draw` (the simulations) and those of the site: PIT values,
        (rank + U) / (draws + 1) with ties broken at random, exactly uniform if the guide is the posterior. Variables:
        every local latent; `log_likelihood`, `log_joint` (of the program); `hpd`, the rank of log q, whose upper tail
        is the coverage of highest-density regions of the guide; `tarp`, the rank of the distance from a point that is
        drawn from the prior, in prior sds (Lemos, Coogan, Hezaveh & Perreault-Levasseur 2023, arXiv 2302.03026); and
        the `quantities`. All densities are those of one datum and its latents. `arviz_plots.plot_ecdf_pit(tree)` takes
        it. Attributes: `latents`, the number of entries of the ranked latents, and `shared_held`, a JSON list of the
        names of the shared latents. Given these, everything is simulated and ranked; a new draw of them is taken from
        the guide at the observed data for at most 8 simulations.
        Group `recovery`, dimensions `draw` and `latent` (continuous latents only): `z_score`, (truth − mean) / sd of
        the draws, and `contraction`, 1 − variance of the draws / prior variance.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract, a program that can't be simulated,
            or a guide whose local latents depend on other data although the shared latents are fixed.
        InferenceError: for a program without local latents; fewer than 100 simulations or 50 draws; a quantity that is
            not one number per row or has a name that is taken; simulated data that are not finite, and values that are
            NaN.
    """
    progress = reporting(progress)
    with limited(memory):
        problem = Problem.of_kind(model, guide, observed, covariates)
        return calibration_of(problem, simulations, draws, quantities, seed, progress)


def calibration_of(
    problem: Problem,
    simulations: int,
    draws: int,
    quantities: Mapping[str, Quantity] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> xr.DataTree:
    """Calibrate, like `calibration`, for a problem that is already checked."""
    _check_counts(simulations, draws)
    program, data = problem.program, problem.data
    few = data.batch(torch.arange(min(len(data), 4)))
    found = sites(program, *few)
    shared = [name for name, site in found.items() if not site.local]
    _refuse_shared_alone(found, shared)
    step = max(1, min(_ROWS // draws, _SAME_SHARED if shared else _ROWS))
    made = simulated_data(problem, found, simulations, step, seed)
    local = {name: site for name, site in found.items() if site.local}
    run = _Run(program, problem.guide, local, dict(quantities or {}), draws, _prior_sd(made.values, local))
    _check_names(run.quantities, found)
    quiet, of = pyro.validation_enabled(False), stream(seed, "calibration", "draws")
    with torch.no_grad(), seeded(of), quiet, fixed(problem.guide), defaults(program, few[0]) as place:
        batches = _batches(made, run.continuous, step, place)
        results = _run_all(run.in_parts(_draws_of_run(run, *batches[0])), batches, simulations, progress)
    settings = {"simulations": simulations, "draws": draws, "seed": seed}
    attrs = {"settings": json.dumps(settings), "model_sha256": model_sha256(program), "guide_draws": draws}
    attrs |= {"latents": sum(site.event_shape.numel() for site in local.values()), "shared_held": json.dumps(shared)}
    return _tree(results, run, made.values, program, seed, attrs)


def uniformity(tree: xr.DataTree) -> xr.Dataset:
    """Measure and test how far the PIT values of each quantity of a calibration are from uniform.

    For an exact guide, s = Φ⁻¹(PIT) is a standard Normal. If truth and draws of a quantity are Normal, the mean of s is
    the error of the draws' mean in posterior sds (truth − draws), and its sd is the posterior's sd over the draws',
    which is 1.25 if the guide is too narrow by a fifth.

    Args:
        tree: the result of `calibration` or of `posterior_calibration`.

    Returns:
        Dimension `quantity` (labels such as `z[3]`, `log_joint`; coordinate `site`): `bias` ± `bias_se` and `spread` ±
        `spread_se`, mean and sd of s; `ecdf_difference`, the largest distance between the PIT's distribution function
        and the uniform one; `p_value` of uniformity, for one quantity at a time: three times the smallest of the exact
        p-values of the mean of s, its sd, and the largest distance (Kolmogorov and Smirnov). Attributes: `simulations`,
        `guide_draws`, and `latents`, the number of entries of all latents.
    """
    group = tree["prior_sbc"].dataset
    names = [str(name) for name in group.data_vars]
    labels, owners, columns = [], [], []
    for name in names:
        array = group[name].transpose(*SAMPLE, ...).values.astype(np.float64)
        labels += [latent.label for latent in scalars(group, [name])]
        columns.append(array.reshape(array.shape[1], -1))
        owners += [name] * columns[-1].shape[1]
    pit = np.concatenate(columns, 1)
    scores = ndtri(np.clip(pit, 1e-12, 1 - 1e-12))
    count, mean, sd = len(scores), scores.mean(0), scores.std(0, ddof=1)
    centred = scores - mean
    spread_se = np.sqrt(np.maximum((centred**4).mean(0) / sd**4 - 1, 0) / (4 * count)) * sd
    distance = [kstest(column, "uniform") for column in pit.T]
    low, high = chdtr(count - 1, (centred**2).sum(0)), chdtrc(count - 1, (centred**2).sum(0))
    tests = [2 * ndtr(-np.abs(mean) * np.sqrt(count)), 2 * np.minimum(low, high), [d.pvalue for d in distance]]
    variables = {
        "bias": mean,
        "bias_se": sd / np.sqrt(count),
        "spread": sd,
        "spread_se": spread_se,
        "ecdf_difference": np.array([d.statistic for d in distance]),
        "p_value": np.minimum(1.0, len(tests) * np.min(tests, 0)),
    }
    coords = {"quantity": np.array(labels, dtype=str), "site": ("quantity", np.array(owners, dtype=str))}
    attrs = {"simulations": count, **{name: group.attrs[name] for name in ("guide_draws", "latents")}}
    return xr.Dataset({name: ("quantity", value) for name, value in variables.items()}, coords, attrs)


# -- what is refused ---------------------------------------------------------------------------------------------------


def _check_counts(simulations: int, draws: int) -> None:
    if simulations < MIN_SIMULATIONS or draws < MIN_DRAWS:
        raise InferenceError(
            f"{simulations} simulations with {draws} draws each are too few to tell anything: use at least "
            f"{MIN_SIMULATIONS} and {MIN_DRAWS}, and 2,000 and 1,000 for a verdict"
        )


def _refuse_shared_alone(found: Mapping[str, Site], shared: list[str]) -> None:
    if len(shared) == len(found):
        raise InferenceError(
            f"all latents, {shared}, are shared: the guide has learned their posterior for one data set, not for "
            "simulated data. Use evaluation.posterior_calibration with a function that infers again, or compare the "
            "guide with inference.reference"
        )


def _check_names(quantities: Mapping[str, Quantity], found: Mapping[str, Site]) -> None:
    if taken := sorted(set(quantities) & {*found, *DENSITIES, "tarp"}):
        raise InferenceError(f"quantities {taken}: these names are taken by latents or by built-in quantities")


def _prior_sd(truth: Values, found: Mapping[str, Site]) -> dict[str, Tensor]:
    """The prior sd of every entry of the continuous latents; 1 for entries without any spread."""
    spreads = {n: truth[n].double().std(0) for n, site in found.items() if not site.support.is_discrete}
    return {name: torch.where(sd > 0, sd, 1.0).to(truth[name].dtype) for name, sd in spreads.items()}


# -- ranks -------------------------------------------------------------------------------------------------------------


def below(truth: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """How many draws `(draw, simulation, …)` are less than the truth `(simulation, …)`, and how many equal it."""
    return (draws < truth).sum(0).float(), (draws == truth).sum(0).float()


def tarp_distance(theta: Tensor, reference: Tensor, scale: Tensor) -> Tensor:
    """Euclidean distance between latents `(…, latents)`, each in units of its scale."""
    return ((theta - reference) / scale).square().sum(-1).sqrt()


@dataclass(frozen=True)
class _Rows:
    """What is given in a run of program or guide: data, points and covariates by row, and shared latents."""

    observed: Values
    covariates: Values
    points: Values
    shared: Values
    size: int

    def repeated(self, count: int) -> _Rows:
        """Every row `count` times in succession."""
        observed, covariates, points = (
            {name: value.repeat_interleave(count, 0) for name, value in part.items()}
            for part in (self.observed, self.covariates, self.points)
        )
        return _Rows(observed, covariates, points, self.shared, self.size * count)


@dataclass(frozen=True)
class _Run:
    """The computation for one batch of simulations."""

    program: PyroModule
    guide: PyroModule
    found: Mapping[str, Site]
    quantities: Mapping[str, Quantity]
    draws: int
    prior_sd: Mapping[str, Tensor]
    parts: tuple[int, ...] = ()  # numbers of draws that are made together, if not all of them are

    def in_parts(self, most: int) -> _Run:
        """The same with at most so many draws at a time."""
        full, rest = divmod(self.draws, most)
        return replace(self, parts=(most,) * full + (rest,) * (rest > 0))

    @property
    def continuous(self) -> list[str]:
        return list(self.prior_sd)

    @property
    def ranked(self) -> list[str]:
        tarp = ["tarp"] if self.continuous else []
        return [*self.found, *DENSITIES, *tarp, *self.quantities]

    def __call__(self, given: Values, covariates: Values) -> tuple[Tensor, ...]:
        """For everything in `ranked`: the numbers of draws less than and equal to the truth, and whether any is NaN;
        then mean and variance of the draws of the continuous latents."""
        truth = {name: given[name] for name in self.found}
        size = len(next(iter(truth.values())))
        observed = {name: value for name, value in given.items() if name not in truth and "/" not in name}
        rows = _Rows(observed, covariates, _named(given, _POINT), _named(given, _SHARED), size)
        once = self._scored(truth, rows)
        found = [self._drawn(rows.repeated(part), size, part) for part in self.parts]
        many, repeated = ({name: _joined([part[i][name] for part in found]) for name in found[0][i]} for i in (0, 1))
        outputs: list[Tensor] = []
        for name in self.ranked:
            values = many[name].transpose(0, 1)
            undefined = values.isnan().any(0) | once[name].isnan()
            outputs += [*below(once[name], values), undefined.float()]
        for name in self.continuous:
            outputs += [repeated[name].mean(1), repeated[name].var(1)]
        return tuple(outputs)

    def _drawn(self, rows: _Rows, size: int, draws: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Everything in `ranked` at draws of the guide, `(size, draws, …)`, and the draws themselves."""
        with encoded_once(self.guide, draws):
            run = guide_trace(self.guide, rows.observed, rows.size, rows.covariates, rows.shared)
        latents = latent_values(run)
        values = {name: latents[name] for name in self.found}
        many = self._quantities(values, rows, density_of(run, rows.size, latents).local)
        by_draw = lambda part: {n: v.reshape(size, draws, *v.shape[1:]) for n, v in part.items()}  # noqa: E731
        return by_draw({name: many[name] for name in self.ranked}), by_draw({n: values[n] for n in self.continuous})

    def _scored(self, values: Values, rows: _Rows) -> dict[str, Tensor]:
        latents = {**rows.shared, **values}
        run = guide_trace(self.guide, rows.observed, rows.size, rows.covariates, latents)
        return self._quantities(values, rows, density_of(run, rows.size, latents).local)

    def _quantities(self, values: Values, rows: _Rows, log_q: Tensor) -> dict[str, Tensor]:
        size, points = rows.size, rows.points
        held = {**rows.observed, **rows.shared, **values}
        density = density_of(trace(self.program, size, rows.covariates, held), size, held, rows.observed)
        found = {**values, "log_likelihood": density.observed, "log_joint": density.local, "hpd": log_q}
        if self.continuous:
            theta, point = (torch.cat([p[n].reshape(size, -1) for n in self.continuous], 1) for p in (values, points))
            scale = torch.cat([self.prior_sd[name].reshape(-1) for name in self.continuous])
            found["tarp"] = tarp_distance(theta, point, scale.to(theta))
        repeated = {name: value.expand(size, *value.shape) for name, value in rows.shared.items()}
        for name, function in self.quantities.items():
            found[name] = function({**repeated, **values}, dict(rows.observed))
            if not isinstance(found[name], Tensor) or found[name].shape != (size,):
                shape = tuple(getattr(found[name], "shape", ()))
                raise InferenceError(f"quantity {name!r} has shape {shape}, wanted one number per row, ({size},)")
        return found


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _draws_of_run(run: _Run, given: Values, covariates: Values) -> int:
    """How many draws per simulation are made together: all of them, where the memory suffices."""
    size = len(given[next(iter(run.found))])
    few = min(size, FEW)
    some = {name: value if name.startswith(_SHARED) else value[:few] for name, value in given.items()}
    cols = {name: value[:few] for name, value in covariates.items()}

    def small(times: int) -> tuple[Tensor, ...]:
        draws = times * FEW
        return replace(run, draws=draws, parts=(draws,))(some, cols)

    most = size * run.draws
    return max(1, min(run.draws, measured_rows(most, few * FEW, small) // size))


def _named(values: Values, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _run_all(run: _Run, batches: list[tuple[Values, Values]], size: int, progress: Progress) -> list[Array]:
    """The outputs of `run` for all simulations, batch by batch."""
    recorded, parts, done = Recorded(nn.Module(), run), list[list[Array]](), 0
    progress("calibration", 0, size)
    if len(batches) >= _RECORDED_FROM:
        recorded.record(batches[0], batches[1])
    for batch in batches:
        while (outputs := within_memory(partial(recorded, *batch), smallest=max(run.parts) == 1)) is None:
            run = run.in_parts(max(run.parts) // 2)
            recorded = Recorded(nn.Module(), run)
        parts.append([output.cpu().numpy().copy() for output in outputs])  # a view would keep the memory of the draws
        done += len(parts[-1][0])
        progress("calibration", min(size, done), size)
    return [np.concatenate(outputs)[:size].astype(np.float64) for outputs in zip(*parts, strict=True)]


def _batches(
    made: Simulated, continuous: list[str], step: int, place: tuple[torch.device, torch.dtype]
) -> list[tuple[Values, Values]]:
    """What `_Run` takes, for `step` simulations at a time; the last batch is padded with the first simulations."""
    size = len(next(iter(made.values.values())))
    points = {_POINT + name: made.points[name] for name in continuous}
    held, cols = cast({**made.values, **points}, *place), cast(made.covariates, *place)
    shared, found = cast(made.shared, *place), list[tuple[Values, Values]]()
    for batch, start in enumerate(range(0, size, step)):
        index = torch.arange(start, start + step, device=place[0]) % size
        given = {name: value[index] for name, value in held.items()}
        given |= {_SHARED + name: value[batch] for name, value in shared.items()}
        found.append((given, {name: value[index] for name, value in cols.items()}))
    return found


# -- the tree ----------------------------------------------------------------------------------------------------------


def _tree(
    results: list[Array], run: _Run, truth: Values, program: PyroModule, seed: int, attrs: Mapping[str, Any]
) -> xr.DataTree:
    generator, outputs = np.random.default_rng(stream(seed, "calibration", "ties")), iter(results)
    pits = {}
    for name in run.ranked:
        less, equal, undefined = next(outputs), next(outputs), next(outputs)
        if undefined.any():
            raise InferenceError(
                f"{name!r} is not a number for {int(undefined.reshape(len(undefined), -1).any(1).sum())} of "
                f"{len(undefined)} simulations or their draws: it can't be ranked (does the guide leave the support?)"
            )
        pits[name] = pit_values(less, equal, run.draws, generator)
    moments, size = list(outputs), len(results[0])
    value = _columns([truth[name].double().cpu().numpy() for name in run.continuous], size)
    before = value.var(0, ddof=1)
    recovered = Recovered(run.continuous, value, _columns(moments[::2], size), _columns(moments[1::2], size), before)
    return rank_tree(program, pits, recovered, attrs)


def _columns(arrays: list[Array], size: int) -> Array:
    return np.concatenate([np.zeros((size, 0)), *(array.reshape(size, -1) for array in arrays)], 1)
