"""The amortized posterior of every datum, as an ArviZ `DataTree`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any

import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.guides.many_draws import encoded_once, fixed
from calibrant.inference.graphs.of_modules import Recorded
from calibrant.inference.groups import add_groups
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import refuse_without_latents
from calibrant.inference.scoring import ROWS, scored
from calibrant.inference.trees import SAMPLE, add_group, build_tree, require_memory
from calibrant.memory import in_blocks, limited, measured_rows
from calibrant.program.contract import Program, Values
from calibrant.program.environment import defaults, in_double, seeded
from calibrant.progress import Progress, reporting, silent
from calibrant.streams import stream

_RECORDED_FROM = 200  # least number of joint draws of all data for which a graph is recorded


def posterior(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    draws: int = 1000,
    *,
    covariates: Mapping[str, Any] | None = None,
    groups: Iterable[str] = (),
    memory: float | None = None,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.DataTree:
    """Draw independently from the guide for every datum, with log densities under model and guide.

    Draws are computed in float64, whatever the dtype of the weights, and stored like those of `reference`: in float32
    where rounding changes nothing. float64 has no number between 1 and 1 − 1.1e-16. A guide that puts mass there (a
    Beta with a concentration below 0.2, a Normal on the log odds beyond 36) draws 1 − 2.2e-16 instead.

    Args:
        model: the program, in `eval()`.
        guide: its guide, in `eval()`.
        observed: site → tensor, or a `Data`.
        draws: number of draws per datum; they form one chain.
        covariates: keyword → tensor.
        groups: any of "prior", "prior_predictive", "posterior_predictive", "log_likelihood".
        memory: GiB that one run of model and guide may take; None for half of the memory that is free. Runs of more
            than 2 GiB are made in blocks anyway, so that draws depend on the seed alone; only if less is allowed, or
            an allocation fails, blocks are halved, and the draws come from the same stream in another order.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        A tree with `posterior`, `sample_stats` (`log_p`, `log_q` in nats, `(chain, draw, data)`; for programs with
        shared latents also `log_p_shared`, `log_q_shared`, `(chain, draw)`), `observed_data`, `constant_data`.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for a program without latents, and if the draws would not fit into memory.
    """
    progress = reporting(progress)
    _check_draws(draws)
    problem = Problem.of(model, guide, observed, covariates)
    refuse_without_latents(problem.program, problem.data)
    with limited(memory):
        return posterior_of(problem, draws, groups, seed, progress)


def _check_draws(draws: Any) -> None:
    if isinstance(draws, bool) or not isinstance(draws, Integral) or draws < 1:
        raise InferenceError(f"draws={draws!r}: give a whole number, 1 or more")


def posterior_of(
    problem: Problem, draws: int, groups: Iterable[str] = (), seed: int = 0, progress: Progress = silent
) -> xr.DataTree:
    """Draw from the guide, like `posterior`, for a problem that is already checked."""
    program, guide, data = problem.program, problem.guide, problem.data
    groups = list(groups)
    scored_sites = list(data.observed_names) if "log_likelihood" in groups else []
    few = torch.arange(min(len(data), 4))
    pair, given = (in_double(program), in_double(guide)), data.batch(few)[0]
    place, random = defaults(program, given, torch.float64), seeded(stream(seed, "posterior"))
    with torch.no_grad(), random, place as (device, _), fixed(guide):
        some = data.batch(few, device, torch.float64)
        probe = scored(*pair, *some, repeats=1)
        entries = sum(probe.values[name][0].numel() for name in probe.local)
        require_memory(draws * len(data) * entries, f"{draws} draws of {len(data)} data", width=8)
        progress("posterior", 0, len(data))
        if set(probe.latents) <= set(probe.local):
            rows = measured_rows(ROWS, len(few), partial(scored, *pair, *some), problem.peaks)
            drawn = _draw_each(_Each(pair, guide, data, device, scored_sites), draws, rows, progress)
        else:
            drawn = _draw_jointly(pair, data, draws, device, scored_sites, progress)
    tree = build_tree(
        drawn.values,
        model=program,
        data=data,
        local=probe.local,
        latents=probe.latents,
        method="amortized",
        independent=True,
        sample_stats=drawn.stats,
        settings={"draws": draws, "seed": seed},
    )
    if drawn.likelihood:
        add_group(tree, "log_likelihood", drawn.likelihood, program, SAMPLE, drawn.likelihood)
    add_groups(tree, program, data, [group for group in groups if group != "log_likelihood"], seed)
    return tree


Pair = tuple[Program, Program]


@dataclass(frozen=True)
class _Drawn:
    """Values of sites, statistics, and log likelihoods of observed sites, each `(1, draws, …)`."""

    values: dict[str, Tensor]
    stats: dict[str, Tensor]
    likelihood: dict[str, Tensor]


@dataclass(frozen=True)
class _Each:
    """Draws of a guide without shared latents, for some data: every datum is repeated along the plate.

    A call returns the values of the local sites, log p, log q, and the log likelihoods of the sites in `likelihood`,
    `(draws, data, …)`, on the CPU.
    """

    pair: Pair
    guide: PyroModule
    data: Data
    device: torch.device
    likelihood: list[str]
    names: list[str] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, index: Tensor, draws: Tensor) -> list[Tensor]:
        repeats = len(draws)
        with encoded_once(self.guide, repeats):
            score = scored(*self.pair, *self.data.batch(index, self.device, torch.float64), repeats)
        self.names[:] = score.local
        self.constants.update({name: value.cpu() for name, value in score.values.items() if name not in score.local})
        densities = (score.log_p.local, score.log_q.local, *(score.log_p[name] for name in self.likelihood))
        rows = [*(score.values[name] for name in score.local), *densities]
        return [row.reshape(len(index), repeats, *row.shape[1:]).transpose(0, 1).cpu() for row in rows]


def _draw_each(each: _Each, draws: int, rows: int, progress: Progress) -> _Drawn:
    """Draws of a guide without shared latents, at most `rows` rows in a run."""
    size = len(each.data)
    found = in_blocks(each, size, draws, rows, lambda done: progress("posterior", done, size))
    names = [*each.names, "log_p", "log_q", *each.likelihood]
    named = list(zip(names, (value[None] for value in found), strict=True))
    sites = len(each.names)
    constants = {name: value.expand(1, draws, *value.shape) for name, value in each.constants.items()}
    return _Drawn({**dict(named[:sites]), **constants}, dict(named[sites : sites + 2]), dict(named[sites + 2 :]))


def _draw_jointly(
    pair: Pair, data: Data, draws: int, device: torch.device, likelihood: list[str], progress: Progress
) -> _Drawn:
    """Draws of a guide with shared latents: one run over all data per draw, so that shared and local values match."""
    rows = data.batch(torch.arange(len(data), device="cpu"), device, torch.float64)
    names = list(scored(*pair, *rows, repeats=1).values)

    def run(observed: Values, covariates: Values) -> tuple[Tensor, ...]:
        score = scored(*pair, observed, covariates, repeats=1)
        densities = (score.log_p.local, score.log_q.local, score.log_p.shared, score.log_q.shared)
        return *(score.values[name] for name in names), *densities, *(score.log_p[name] for name in likelihood)

    drawn, outputs = Recorded(nn.Module(), run), []
    if draws >= _RECORDED_FROM:
        drawn.record(rows, rows)
    for done in range(draws):
        outputs.append([output.cpu() for output in drawn(*rows)])
        progress("posterior", done + 1, draws)
    stacked = [torch.stack(parts)[None] for parts in zip(*outputs, strict=True)]
    stats = ["log_p", "log_q", "log_p_shared", "log_q_shared"]
    named = list(zip([*names, *stats, *likelihood], stacked, strict=True))
    sites, ends = len(names), len(names) + len(stats)
    return _Drawn(dict(named[:sites]), dict(named[sites:ends]), dict(named[ends:]))
