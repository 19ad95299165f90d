"""The average rate, split into what the latents say about a datum and how far they lie from the prior in all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.critic import Bound, marginal_bound
from calibrant.evaluation.statistics.guide_densities import log_densities
from calibrant.evaluation.statistics.rates import require_rates
from calibrant.guides.many_draws import fixed
from calibrant.inference.problem import Problem
from calibrant.inference.scoring import ROWS, Array, at_draws, averages, mean_and_error, scored
from calibrant.inference.trees import model_sha256
from calibrant.memory import FEW, in_blocks, measured_rows
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.environment import cast, defaults, in_double
from calibrant.program.simulation import sample_prior
from calibrant.program.tracing import trace
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

_MARGIN = 1.0  # nats below its ceiling from which an estimate of the mutual information says little
# Nats from its lower to its upper bound from which it says little: where some posteriors are sharp and others wide, the
# sharp ones may be at the ceiling although the average is far below it.
_APART = 1.0
_BLOCK = 1000  # prior draws in one run of the program


def information(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    points: int = 2000,
    *,
    covariates: Mapping[str, Any] | None = None,
    prior_draws: int = 20_000,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Split the average rate of N data into mutual information and marginal KL (Hoffman & Johnson 2016).

    With the aggregate posterior m(z) = 1/N Σ q(z | x_i),

        E KL(q(z | x) ‖ p(z)) = I(x; z) + KL(m(z) ‖ p(z)).

    The mutual information is what the latents say about a datum. The marginal KL is how far the latents of data lie
    from the prior, from which the model's own samples come: samples are bad where it is large.

    m is the average of all N posteriors, at draws of the same posteriors (Rosca et al. 2018, arXiv 1802.06847). The
    mutual information with N posteriors cannot exceed log N, however large the true one is, and the rest of the rate
    then looks like marginal KL. Bounds hold in any case, in expectation over samples of N data: the information of a
    datum is too low with its own posterior in m, and too high without it (Poole et al. 2019, arXiv 1905.06922). So no
    split is given if the lower bound, which is the estimate, is above log N − 1, or more than one nat below the upper
    one.

    The classifier's bound on the marginal KL needs no m: a small classifier learns to tell draws of the posteriors of
    one half of the data from draws of the prior, and the bound is evaluated on the other half.

    Args:
        model: the program, in `eval()`, without shared latents; its latents' priors do not depend on covariates.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`; all N of these data are in m.
        points: number of draws at which m is evaluated, in all: of N data or as many as this, one or more draws each.
            N · `points` densities of the guide are computed.
        covariates: keyword → tensor, leading dimension data.
        prior_draws: number of draws of the prior, for the classifier.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Numbers in nats, each with `…_se` (the data as a sample; Monte Carlo error included) and `…_mc_se` (Monte Carlo
        alone; NaN for one draw per datum): `rate` and its parts `mutual_information` and `marginal_kl`, which add up to
        it and are NaN if `split_known` is False; `mutual_information_low`, `mutual_information_high`, `marginal_kl_low`
        and `marginal_kl_high`, the bounds from m with and without the own posterior. `ceiling` is log N.
        `classifier_kl` ± `classifier_kl_se` is a lower bound on the marginal KL, which cannot exceed
        `classifier_ceiling`. The attribute `sentence` says it in words.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for shared latents, an improper prior, a prior that depends on covariates, fewer than 4 data, or
            too few draws.
    """
    progress = reporting(progress)
    return information_of(Problem.of(model, guide, observed, covariates), points, prior_draws, seed, progress)


def information_of(
    problem: Problem, points: int = 2000, prior_draws: int = 20_000, seed: int = 0, progress: Progress = silent
) -> xr.Dataset:
    """Split the rate, like `information`, for a problem that is already checked."""
    size, of = len(problem.data), partial(stream, seed, "information")
    if size < 4 or points < 4 or prior_draws < 1000:
        raise InferenceError(
            f"{size} data, points={points}, prior_draws={prior_draws}: give 4 data and points or more, and 1,000 draws "
            "of the prior or more"
        )
    require_rates(problem)
    drawn = _drawn(problem, points, of("draws"))
    _require_one_prior(problem, drawn)
    others = _log_others(problem, drawn, progress)
    variables = _split(drawn, others, size)
    prior = _prior_draws(problem, list(drawn.values), prior_draws, of("prior"))
    found = marginal_bound(_flat(drawn.values, 2), _flat(prior, 1), of("classifier"))
    variables |= {"classifier_kl": found.value, "classifier_kl_se": found.se, "classifier_ceiling": found.ceiling}
    attrs: dict[str, Any] = {"points": drawn.log_q.size, "data": size, "prior_draws": prior_draws, "seed": seed}
    attrs |= {"sentence": _sentence(variables, found, size), "model_sha256": model_sha256(problem.program)}
    return xr.Dataset(variables, attrs=attrs)


@dataclass(frozen=True)
class _Drawn:
    """Draws of the posteriors of some of the data, with their log densities `(data, draws)`."""

    index: npt.NDArray[np.intp]  # positions of these data among all
    values: dict[str, Array]  # site → (data, draws, *event)
    log_q: Array
    log_p: Array


def _drawn(problem: Problem, points: int, seed: int) -> _Drawn:
    size = len(problem.data)
    index = np.sort(np.random.default_rng(seed).permutation(size)[:points])
    names: list[str] = []

    def rows(*given: Any) -> list[Tensor]:
        found = scored(*given)
        names[:] = found.latents
        return [*(found.values[name] for name in names), found.log_q.local, found.log_p.latent]

    draws = -(-points // len(index))
    *values, log_q, log_p = at_draws(problem.program, problem.guide, problem.data[index], draws, seed, rows)
    return _Drawn(index, dict(zip(names, values, strict=True)), log_q, log_p)


def _log_others(problem: Problem, drawn: _Drawn, progress: Progress) -> Array:
    """log Σ q_j(z) over all data j but the one whose draw z is, `(data, draws)`, for the draws of some data."""
    guide, data = problem.guide, problem.data
    draws = drawn.log_q.shape[1]
    owner = torch.as_tensor(np.repeat(drawn.index, draws))
    few = torch.arange(min(len(data), FEW), device="cpu")
    with torch.no_grad(), fixed(guide), defaults(problem.program, data.batch([0])[0], torch.float64) as place:
        points = cast({n: torch.as_tensor(v).flatten(0, 1) for n, v in drawn.values.items()}, *place)
        log_q = log_densities(guide, *data.batch(few, *place), {n: v[: 2 * FEW] for n, v in points.items()})

        def run(index: Tensor, at: Tensor) -> list[Tensor]:
            found = log_q(*data.batch(index, *place), {name: value[at] for name, value in points.items()})
            others = found.cpu().masked_fill(owner[at][:, None] == index, -torch.inf)
            return [others.logsumexp(1, keepdim=True)]  # one column for all these data

        largest = measured_rows(ROWS, len(few), lambda times: run(few, torch.arange(times, device="cpu") % len(owner)))
        told = partial(_told, progress, len(data))
        found = in_blocks(run, len(data), len(owner), largest, told)[0].logsumexp(1)
    return found.reshape(-1, draws).numpy()


def _told(progress: Progress, size: int, done: int) -> None:
    progress("aggregate posterior", done, size)


def _require_one_prior(problem: Problem, drawn: _Drawn) -> None:
    """Refuse latents whose prior depends on covariates: the aggregate posterior then has no prior of its own."""
    if not problem.data.covariate_names:
        return
    program, some = problem.program, drawn.index[: 4 * FEW]
    shifted = problem.data[(some + 1) % len(problem.data)]
    with torch.no_grad(), defaults(program, {}, torch.float64) as place:
        rows, cols = shifted.batch(np.arange(len(some)), *place)
        held = {**rows, **cast({n: torch.as_tensor(v[: len(some), 0]) for n, v in drawn.values.items()}, *place)}
        size = len(some)
        log_p = density_of(trace(in_double(program), size, cols, held), size, held, rows).latent
    if not np.allclose(log_p.cpu().numpy(), drawn.log_p[:size, 0]):
        raise InferenceError(
            "the prior of the latents depends on the covariates of a datum, so that the posteriors of all data "
            "together have no one prior to be compared with: give data with the same covariates"
        )


def _split(drawn: _Drawn, others: Array, size: int) -> dict[str, Any]:
    """The rate and its parts, with bounds; the parts are unknown near the ceiling, or if the bounds lie far apart."""
    log_m = np.logaddexp(others, drawn.log_q) - math.log(size)
    without = others - math.log(size - 1)
    terms = {
        "rate": drawn.log_q - drawn.log_p,
        "mutual_information_low": drawn.log_q - log_m,
        "mutual_information_high": drawn.log_q - without,
        "marginal_kl_low": without - drawn.log_p,
        "marginal_kl_high": log_m - drawn.log_p,
    }
    found: dict[str, Any] = {}
    for name, values in terms.items():
        of_all = averages(name, *mean_and_error(values))
        found |= {f"{name}{end}": float(of_all[f"average_{name}{end}"]) for end in ("", "_se", "_mc_se")}
    low, high = (found[f"mutual_information_{end}"] for end in ("low", "high"))
    known = low <= math.log(size) - _MARGIN and high - low <= _APART
    for end in ("", "_se", "_mc_se"):
        found[f"mutual_information{end}"] = found[f"mutual_information_low{end}"] if known else math.nan
        found[f"marginal_kl{end}"] = found[f"marginal_kl_high{end}"] if known else math.nan
    return {**found, "ceiling": math.log(size), "split_known": known}


def _prior_draws(problem: Problem, names: list[str], count: int, seed: int) -> dict[str, Array]:
    """Draws of the latents from the prior, site → `(count, *event)`."""
    data, parts = problem.data, list[Values]()
    chosen = np.random.default_rng(seed).integers(len(data), size=count)
    for block, index in enumerate(np.array_split(chosen, -(-count // _BLOCK))):
        cols = data.batch(index)[1] if data.covariate_names else {}
        drawn = sample_prior(problem.program, len(index), cols, seed=stream(seed, "block", block))
        parts.append({name: drawn[name].cpu().double() for name in names})
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in names}


def _flat(values: Mapping[str, Array], leading: int) -> Array:
    """All entries of all sites along the last axis, after the leading axes."""
    return np.concatenate([value.reshape(*value.shape[:leading], -1) for value in values.values()], -1)


def _sentence(found: Mapping[str, Any], bound: Bound, size: int) -> str:
    rate, low = found["rate"], found["mutual_information_low"]
    least = max(0.0, bound.value - 2.0 * bound.se)
    if not found["split_known"]:
        return (
            f"The rate of {rate:.2f} nats cannot be split: the mutual information is estimated at {low:.2f}, and with "
            f"{size} data no datum can show more than log N = {found['ceiling']:.2f}. It may be anything from there "
            f"up to the rate. The classifier shows a marginal KL of at least {least:.2f} nats. More data raise the "
            "ceiling."
        )
    return (
        f"Of the rate of {rate:.2f} nats, {low:.2f} are mutual information and {found['marginal_kl']:.2f} marginal KL, "
        f"of which the classifier shows at least {least:.2f}."
    )
