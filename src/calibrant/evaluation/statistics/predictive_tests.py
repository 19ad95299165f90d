"""Predictive checks of a model and its guide on real data: does the model generate data like these?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.data_statistics import Function, differences, moments, transport
from calibrant.evaluation.statistics.entries import Variables, average_shares, null_of
from calibrant.evaluation.statistics.predictive_tallies import MIN_DRAWS, Runs, Tally
from calibrant.inference.problem import Problem
from calibrant.inference.trees import model_sha256
from calibrant.program.contract import Program
from calibrant.program.environment import defaults, in_double, seeded
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

Array = npt.NDArray[np.float64]

_SHOWN = 1000  # number of simulated values that are returned, for pictures


def predictive_check(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    *,
    covariates: Mapping[str, Any] | None = None,
    draws: int = 200,
    statistics: Mapping[str, Function] | None = None,
    level: float = 0.9,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Compare real data with data that the model generates, from its prior and from the posteriors of the data.

    There are four comparisons. Two of them test the model and the guide: under a true model with exact posteriors,
    observed and simulated values are draws of one distribution.

    - *Prior predictive*: a statistic T over the data set, compared with T over data that the model simulates.
    - *Aggregate posterior*: one guide draw per datum, pooled, compared with draws of the prior. A difference is an
      error of the model or of the guide; simulated data, on which the guide can be judged alone, show which.

    Two comparisons use each datum twice: to find its posterior, and to be compared with it.

    - *Posterior predictive tails*: T of a datum among T of new data from its own posterior (Gelman, Meng & Stern 1996,
      Statistica Sinica 6). Even for the true model these probabilities are not uniform: they gather around 1/2. An
      extreme probability is a misfit; one that is not extreme does not prove a fit.
    - *Entries*: the position of each entry (pixel) in its posterior predictive distribution. Intervals hold *more* than
      their level even for the true model; if they hold less, the spread of the prediction is too small.

    The values of these two comparisons for a true model are therefore found by repeating them with data that the model
    simulates, one for every datum (`…_null`; the idea of Hjort, Dahl & Steinbakk 2006, JASA 101). They use the guide's
    posterior of simulated data, on which the guide may not have been trained: if the prior predictive is far from
    the data, this null may be far off too.

    Default statistics, over the entries of an event: `mean`; for continuous sites `contrast` (sd), `minimum`,
    `maximum`, `kurtosis` (from 8 entries on); for counts and classes `dispersion` (variance over mean), `zeros`
    (share), `maximum`; for images from 8 × 8 pixels on `power low`, `power middle`, `power high`, the log power (nats)
    in bands of radial frequency, equally wide on a log scale up to the Nyquist frequency. For a scalar, its `value`.

    Masked entries are ignored: simulated data have the observed values there. Simulations use the covariates of the
    data.

    Args:
        model: the program, in `eval()`, without shared latents.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`: some hundreds of data on which the guide was not trained.
        covariates: keyword → tensor, leading dimension data.
        draws: number of posterior draws per datum, and of replicates of the data set (fewer if they would take much
            memory).
        statistics: further statistics, name → function of a float64 tensor `(rows, *event)` that returns `(rows,)`;
            they are applied to every observed site.
        level: mass of the central interval outside which a tail probability is extreme, and of the entries' intervals.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimensions `data`, `statistic`, `latent`, `observed` (site), `level`, `u`, `draw`; docs/checks.md has a table of
        all variables. Standard errors `…_se` treat data, not entries, as independent. A program with an improper prior
        has no `…_null`, `prior_…` and `aggregate_…`; if a statistic or latent is constant over the data, variables in
        units of its sd are NaN.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract, or a program with a factor.
        InferenceError: for a program with shared latents, a statistic of another shape or that is not finite, a level
            outside (0, 1), or too few draws or data.
    """
    progress = reporting(progress)
    problem = Problem.of(model, guide, observed, covariates)
    return predictive_check_of(problem, draws, statistics, level, seed, progress)


def predictive_check_of(
    problem: Problem,
    draws: int = 200,
    statistics: Mapping[str, Function] | None = None,
    level: float = 0.9,
    seed: int = 0,
    progress: Progress = silent,
) -> xr.Dataset:
    """Run a predictive check, like `predictive_check`, for a problem that is already checked."""
    program, data = problem.program, problem.data
    if not 0.0 < level < 1.0:
        raise InferenceError(f"level={level}: give the mass of a central interval, between 0 and 1")
    if draws < MIN_DRAWS or len(data) < 2:
        raise InferenceError(
            f"draws={draws}, number of data {len(data)}: give draws >= {MIN_DRAWS}, and two data or more"
        )
    given, draws_of = data.batch([0])[0], seeded(stream(seed, "predictive check"))
    with torch.no_grad(), draws_of, defaults(program, given, torch.float64) as (device, _):
        runs = Runs.read(in_double(program), in_double(problem.guide), data, device, statistics, level)
        found = _after(runs, draws, progress)
        variables = {**_tails(found, level), **average_shares(found)}
        if runs.proper:
            own = _after(runs, draws, progress, own=True)
            variables |= null_of({**_tails(own, level), **average_shares(own)}, ("extreme", "coverage", "pit_ecdf"))
            variables |= _before(runs, draws, found, progress)
        replicates = {dim: runs.replicates(draws, len(getattr(runs, f"{dim}s"))) for dim in ("statistic", "latent")}
    attrs = {"draws": draws, "level": level, "seed": seed, "model_sha256": model_sha256(program)}
    attrs |= {f"{dim}_replicates": count for dim, count in replicates.items()}
    return xr.Dataset(variables, runs.coords(), attrs)


# -- after the data ----------------------------------------------------------------------------------------------------


def _after(runs: Runs, draws: int, progress: Progress, own: bool = False) -> dict[str, Array]:
    """Posterior predictive results of `Tally`, computed block by block; leading dimension data.

    With `own`, they are those of data that the model simulates in place of the observed data.
    """
    stage = "posterior predictive" + " of simulated data" * own
    parts: list[dict[str, Array]] = []
    for index, repeats in runs.blocks(draws):
        observed, covariates = runs.data.batch(index, runs.device, torch.float64)
        if own:
            observed = dict(runs.simulate(observed, covariates, 1, from_guide=False).values)
        tally = Tally(runs, observed)
        for count in repeats:
            for part in runs.of_guide(observed, covariates, count):
                tally.add(part)
        parts.append(tally.found())
        progress(stage, int(index[-1]) + 1, len(runs.data))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _tails(found: Mapping[str, Array], level: float) -> Variables:
    names = ("observed_statistic", "tail_probability", "predictive_mean", "predictive_sd")
    outside = np.abs(found["tail_probability"] - 0.5) > 0.5 * level
    variables: Variables = {name: (("statistic", "data"), found[name].T) for name in names}
    variables["extreme"] = (("statistic",), outside.mean(0))
    variables["extreme_se"] = (("statistic",), outside.std(0, ddof=1) / np.sqrt(len(outside)))
    return variables


# -- before the data ---------------------------------------------------------------------------------------------------


def _before(runs: Runs, draws: int, found: Mapping[str, Array], progress: Progress) -> Variables:
    """Compare replicates of the data set with the observed statistics, and their latents with the guide's."""
    simulated, latents = _replicates(runs, draws, progress)
    rows = []
    for ours, theirs in zip(found["observed_statistic"].T, simulated, strict=True):
        data, model = moments(ours), moments(theirs.ravel())
        compared = {**differences(model, data), **_in_units(transport(ours, theirs), data.sd)}
        rows.append({"mean": model.mean, "sd": model.sd, **compared})
    variables = _columns("prior", "statistic", rows)
    rows = []
    for i, theirs in enumerate(latents):
        guide, prior = moments(found["latent_mean"][:, i], found["latent_square"][:, i]), moments(theirs.ravel())
        moved = transport(found["latent"][:, i], theirs)
        rows.append({**differences(guide, prior), **_in_units(moved, prior.sd)})
    variables |= _columns("aggregate", "latent", rows)
    variables["prior_statistic"] = (("statistic", "draw"), _thinned(simulated))
    variables["prior_draw"] = (("latent", "draw"), _thinned(latents))
    variables["aggregate_draw"] = (("latent", "data"), found["latent"].T)
    return variables


def _replicates(runs: Runs, draws: int, progress: Progress) -> tuple[Array, Array]:
    """Statistics and latents of replicates of the data set, `(statistic or latent, replicate, data)`."""
    kept = [runs.replicates(draws, len(columns)) for columns in (runs.statistics, runs.latents)]
    blocks = []
    for index, repeats in runs.blocks(max(kept)):
        observed, covariates = runs.data.batch(index, runs.device, torch.float64)
        drawn = [runs.simulate(observed, covariates, count, from_guide=False) for count in repeats]
        pairs = zip(*((d.by_datum(runs.of(d.values)), d.by_datum(d.latents)) for d in drawn), strict=True)
        joined = (torch.cat(parts, 1)[:, :count] for parts, count in zip(pairs, kept, strict=True))
        blocks.append([values.permute(2, 1, 0).cpu().numpy() for values in joined])
        progress("prior predictive", int(index[-1]) + 1, len(runs.data))
    statistics, latents = (np.concatenate(parts, 2) for parts in zip(*blocks, strict=True))
    return statistics, latents


def _in_units(found: dict[str, float], unit: float) -> dict[str, float]:
    return {name: value if name == "p" else value / unit if unit else np.nan for name, value in found.items()}


def _columns(prefix: str, dim: str, rows: list[dict[str, float]]) -> Variables:
    names = rows[0] if rows else ()
    return {f"{prefix}_{name}": ((dim,), np.array([row[name] for row in rows])) for name in names}


def _thinned(values: Array) -> Array:
    """Some of the replicated values, `(…, draw)`, evenly spaced over all replicates and data."""
    flat = values.reshape(len(values), -1)
    count = min(_SHOWN, MIN_DRAWS * values.shape[2])
    return flat[:, np.linspace(0, flat.shape[1] - 1, count).astype(int)]
