"""The probabilities that a program predicts for the values of its observed sites: p(y | x), with z averaged out.

Where the encoder of a program is the prior of its latents, this is what the program says about y before y is seen. It
can be held against the y that are observed: no reference posterior is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.inference.problem import Problem
from calibrant.inference.scoring import at_draws, repeated
from calibrant.inference.trees import model_sha256
from calibrant.program.contract import Program, Values
from calibrant.program.density import likelihood_of
from calibrant.program.enumeration import combinations
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import Site, sites
from calibrant.program.supports import is_masked
from calibrant.program.tracing import is_local, sampled, trace
from calibrant.program.weighting import is_scaled
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
_NUMBERS = 2**23  # probabilities that are held at a time: 64 MiB of float64


def predicted_probabilities(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    draws: int = 1000,
    *,
    covariates: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """The predicted probability of every value of the observed sites, for every datum.

    Args:
        model: the program, in `eval()`.
        guide: `guides.prior(model)`: the latents are drawn from the model's own prior, which does not see `observed`.
        observed: site → tensor, or a `Data`.
        draws: number of draws of the prior per datum, two or more; without latents, two runs are made.
        covariates: keyword → tensor, leading dimension data.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        A dataset with dimension `data`. `log_p` ± `log_p_se` (nats; Monte Carlo, delta method) is log p(y | x) of the
        observed values together. For every site with finitely many values (1,024 at most): `NAME_probability`, `(half,
        data, NAME_value)`, the mean probabilities over two halves of the draws; and `NAME_observed`, `(data,)`, the
        place of the observed value. The attribute `sites` lists these sites, `observed_sites` is the number of all, and
        `latents` lists the latents that are averaged out.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for a program with shared latents, or for one draw.
    """
    progress = reporting(progress)
    return predicted_of(Problem.of(model, guide, observed, covariates), draws, seed, progress)


def predicted_of(problem: Problem, draws: int = 1000, seed: int = 0, progress: Progress = silent) -> xr.Dataset:
    """The predicted probabilities, like `predicted_probabilities`, for a problem that is already checked."""
    if draws < 2:
        raise InferenceError(f"draws={draws}: give two draws of the prior or more")
    problem.require_local("their draws belong to all data together", "and check the predictions given these values")
    latents = list(sites(problem.program, *problem.data.batch(torch.arange(1))))
    draws = draws if latents else 2  # without latents, all runs are equal
    tables = _tables(problem)
    found = [_half(problem, tables, draws // 2, stream(seed, "predicted", half), progress) for half in range(2)]
    variables: dict[str, Any] = {}
    for name, table in tables.items():
        variables[f"{name}_probability"] = (
            ("half", "data", f"{name}_value"),
            np.stack([h.values[name] for h in found]),
        )
        variables[f"{name}_observed"] = ("data", _places(problem.data, name, table))
    mean = np.logaddexp(found[0].log_p, found[1].log_p) - log(2)
    relative = np.stack([h.variance * np.exp(2 * (h.log_p - mean)) for h in found])
    variables |= {"log_p": ("data", mean), "log_p_se": ("data", np.sqrt(relative.sum(0)) / 2)}
    values = {f"{name}_value": [_label(value) for value in table] for name, table in tables.items()}
    attrs: dict[str, Any] = {"draws": draws, "seed": seed, "model_sha256": model_sha256(problem.program)}
    attrs |= {
        "latents": json.dumps(latents),
        "sites": json.dumps(list(tables)),
        "observed_sites": len(problem.data.observed_names),
    }
    return xr.Dataset(variables, {"data": problem.data.labels(), **values}, attrs)


@dataclass(frozen=True)
class _Half:
    """Results of half of the draws: mean probabilities by site `(data, value)`, log p, and its relative variance."""

    values: dict[str, Array]
    log_p: Array
    variance: Array


def _half(problem: Problem, tables: Values, draws: int, seed: int, progress: Progress) -> _Half:
    width = 1 + sum(len(table) for table in tables.values())

    def function(model: Program, guide: Program, observed: Values, covariates: Values, repeats: int) -> list[Tensor]:
        rows, cols = repeated(observed, repeats), repeated(covariates, repeats)
        size = len(next(iter(rows.values())))
        run = trace(model, size, cols, rows)
        log_p = likelihood_of(run, size).local
        return [log_p, *(_probabilities(run.nodes[name]["fn"], table.to(log_p)) for name, table in tables.items())]

    sums: list[Array] = []
    logs: list[Array] = []
    each, done = max(1, min(draws, _NUMBERS // (width * len(problem.data)))), 0
    while done < draws:
        count = min(each, draws - done)
        noise = stream(seed, "block", done)
        log_p, *values = at_draws(problem.program, problem.guide, problem.data, count, noise, function)
        logs.append(log_p)
        sums = [a + b.sum(1) for a, b in zip(sums or [np.zeros(1)] * len(values), values, strict=True)]
        done += count
        progress("predictions", done, draws)
    every = np.concatenate(logs, 1)
    mean = np.logaddexp.reduce(every, axis=1) - log(draws)
    variance = np.exp(every - mean[:, None]).var(1) / draws
    return _Half({name: part / draws for name, part in zip(tables, sums, strict=True)}, mean, variance)


def _probabilities(fn: Any, table: Tensor) -> Tensor:
    """The probability of every value of a site, `(rows, value)`."""
    return fn.log_prob(table[:, None].expand(-1, *fn.batch_shape, *table.shape[1:])).exp().T


def _tables(problem: Problem) -> dict[str, Tensor]:
    """All values of the observed sites that have finitely many, and are neither masked nor weighted."""
    observed, covariates = problem.data.batch(torch.arange(1))
    with torch.no_grad(), seeded(0), defaults(problem.program, observed) as place:
        run = sampled(trace(problem.program, 1, cast(covariates, *place), cast(observed, *place)))
        found: dict[str, Tensor] = {}
        for name in observed:
            site = run[name]
            if is_local(site) and not is_masked(site["fn"]) and not is_scaled(site) and site["mask"] is None:
                one = Site(name, site["fn"].support, site["value"].shape[1:], site["fn"], True, (), ())
                with suppress(InferenceError):  # infinitely many values, or too many
                    found |= combinations({name: one}) if site["fn"].support.is_discrete else {}
    return found


def _places(data: Data, name: str, table: Tensor) -> npt.NDArray[np.int64]:
    """The place of every observed value among all values of its site."""
    values = data.tensors()[0][name].cpu().reshape(len(data), 1, -1).double()
    return (values == table.cpu().reshape(1, len(table), -1).double()).all(2).int().argmax(1).numpy().astype(np.int64)


def _label(value: Tensor) -> str:
    entries = [f"{entry:g}" for entry in value.flatten().tolist()]
    return entries[0] if value.dim() == 0 else f"[{', '.join(entries)}]"
