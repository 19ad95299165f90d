"""The speed of a model on this machine: its training, the draws of its guide, and its reference posterior."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from math import ceil
from statistics import mean
from typing import Any

import numpy as np
import pyro
import torch
import xarray as xr
from torch.utils.flop_counter import FlopCounterMode

from calibrant.data.dataset import Data
from calibrant.errors import CalibrantError, InferenceError
from calibrant.inference.drawing import posterior_of
from calibrant.inference.fitting.loop import fit
from calibrant.inference.fitting.state import RECORDED_FROM, Modules, Plan, copy_of_weights, initial_state
from calibrant.inference.graphs.metering import Meter, metered
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import ReferencePlan, reference_of, refuse_without_latents
from calibrant.inference.speed.machine import machine, matrix_rate, now, seconds_of
from calibrant.program.contract import Program
from calibrant.program.environment import defaults, seeded
from calibrant.progress import Progress, reporting, silent
from calibrant.shown import Shown, table
from calibrant.streams import stream

TRAINING, POSTERIOR, REFERENCE = "training", "posterior", "reference"
_FIRST = 5  # steps of the training that shows how long a step takes
_LEAST, _BATCHES = 10, 200  # minibatches in an epoch that is measured, where there are so many
_HELD_OUT = 9  # training data for each held-out one, as `fit` splits them
_TURNS = 3  # calls of each part of a step after an epoch
_FEW_DRAWS, _MANY_DRAWS = 50, 2000
_PATIENCE = 6  # times as long as other parts a reference may take before it is stopped


@dataclass(frozen=True)
class Speed:
    """One figure of speed.

    Attributes:
        part: "training", "posterior" or "reference".
        what: what is measured.
        value: the figure; None if it could not be measured.
        unit: its unit.
        how: how it was measured, or why it was not.
    """

    part: str
    what: str
    value: float | None
    unit: str = ""
    how: str = ""

    @property
    def text(self) -> str:
        """The figure with three digits and its unit; a dash if there is none."""
        if self.value is None:
            return "–"
        figure = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.3g}"
        return f"{figure} {self.unit}".strip()


@dataclass(repr=False)
class Bench(Shown):
    """The speeds of a model on a machine; `print` shows them as a table.

    Attributes:
        name: name of the model.
        machine: processor, cores, threads, device and versions.
        rows: the figures.
    """

    name: str
    machine: dict[str, str]
    rows: list[Speed]

    @property
    def about(self) -> str:
        """The machine in one line."""
        place = self.machine
        device = "" if place["device"] == "cpu" else f", {place['device']}"
        return (
            f"{place['processor']}{device}, {place['cores']} cores, threads: {place['threads']}, "
            f"torch {place['torch']}, calibrant {place['calibrant']}"
        )

    def facts(self) -> dict[str, str]:
        """The machine and every figure."""
        return {"machine": self.about, **{f"{row.part}: {row.what}": row.text for row in self.rows}}

    def content(self) -> dict[str, Any]:
        """The figures in a form that JSON takes."""
        return {
            "model": self.name,
            "made": f"{date.today()}",
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
        }

    def __str__(self) -> str:
        cells = [(f"{row.part}: {row.what}", row.text, row.how) for row in self.rows]
        first, second = (max(len(line[i]) for line in cells) for i in range(2))
        lines = [f"{what:<{first}}  {text:>{second}}  {how}".rstrip() for what, text, how in cells]
        return "\n".join([f"{self.name} on {self.about}", *lines])

    def _repr_html_(self) -> str:
        rows = [(f"{row.part}: {row.what}", row.text, row.how) for row in self.rows]
        return table([("machine", self.about, ""), *rows], ["", self.name, ""])


@dataclass(frozen=True)
class BenchPlan:
    """What is measured, and for how long: the arguments of `bench`."""

    batch_size: int = 256
    objective: str = "stl"
    data: int = 16
    chains: int = 4
    warmup: int = 300
    draws: int = 1000
    starts: int = 32
    seconds: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "data"):
            if getattr(self, name) < 1:
                raise InferenceError(f"{name}={getattr(self, name)}: give a number of data, 1 or more")
        if not self.seconds > 0:
            raise InferenceError(f"seconds={self.seconds}: give a positive number of seconds")


def bench(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    *,
    covariates: Mapping[str, Any] | None = None,
    batch_size: int = 256,
    objective: str = "stl",
    data: int = 16,
    chains: int = 4,
    warmup: int = 300,
    draws: int = 1000,
    starts: int = 32,
    seconds: float = 5.0,
    seed: int = 0,
    progress: Progress | bool = True,
) -> Bench:
    """Measure how fast a model and its guide train, draw and get a reference on this machine.

    Nothing is changed: weights that the measured training moves are put back before anything else is measured. A part
    that the model does not have, or that its program does not allow, has one row without a figure that says why.

    Args:
        model: the program.
        guide: its guide.
        observed: site → tensor, or a `Data`: training data, the first of which are those of posterior and reference.
        covariates: keyword → tensor, leading dimension data.
        batch_size: number of data per training step.
        objective: objective of the training, as in `fit`.
        data: number of data whose posteriors are drawn.
        chains: number of chains per datum of the reference.
        warmup: number of adaptation steps per chain.
        draws: number of draws per chain that are kept.
        starts: number of short chains per datum that search for modes, as in `reference`.
        seconds: about how long training and draws of the guide are measured, each; a reference is stopped after six
            times as long, and compiling comes on top.
        seed: random seed for minibatches and draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        The figures with their units and the machine; `print` shows them as a table, `rows` holds them one by one.

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract.
        InferenceError: for numbers that are not positive.
    """
    plan = BenchPlan(batch_size, objective, data, chains, warmup, draws, starts, seconds, seed)
    problem = Problem.of_kind(model, guide, observed, covariates)
    name = type(problem.program).__name__
    return bench_of(name, problem, plan, reporting(progress))


def bench_of(
    name: str,
    problem: Problem,
    plan: BenchPlan,
    progress: Progress = silent,
    device: str | None = None,
    keep: bool = False,
) -> Bench:
    """Measure, like `bench`, for a problem that is already checked.

    Args:
        name: name of the model.
        problem: model, guide and training data.
        plan: what is measured.
        progress: called with (stage, done, total, text).
        device: device to train on; None for that of the model.
        keep: whether posterior and reference are those of the weights that the measured training reached.
    """
    modules = Modules(problem.program, problem.guide)
    before, place = copy_of_weights(modules), modules.device
    parts: dict[str, Callable[[], list[Speed]]] = {
        TRAINING: lambda: _training(modules, problem.data, plan),
        POSTERIOR: lambda: _posterior(problem, plan),
        REFERENCE: lambda: _reference(problem, plan, progress),
    }
    about, rows = machine(torch.device(device or place)), []
    for part, measured in parts.items():
        progress(part, 0, 1)
        try:
            if part == TRAINING and device is not None:
                modules.to(device)
            rows += measured()
        except CalibrantError as error:
            rows.append(Speed(part, "not measured", None, how=" ".join(str(error).split())))
        finally:
            if part == TRAINING:
                modules.to(place)
                if not keep:
                    modules.load_state_dict(before)
                modules.eval()
        progress(part, 1, 1)
    return Bench(name, about, rows)


# -- training ----------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Raised by a function of progress, to end a call that has been measured for long enough."""


def _training(modules: Modules, data: Data, plan: BenchPlan) -> list[Speed]:
    batch = min(plan.batch_size, len(data))
    first = _run(modules, data, plan, min(_FIRST, len(data) // batch), {})["step"]
    most = min(_BATCHES, max(_LEAST, ceil(0.2 * plan.seconds / first)))
    parts, work = _gradients(modules, data, batch, plan)
    times = _run(modules, data, plan, min(most, len(data) // batch), parts)
    kind = next((t.dtype for t in modules.parameters() if t.is_floating_point()), torch.get_default_dtype())
    limit, step = matrix_rate(modules.device, kind), times["step"]
    dtype = str(kind).removeprefix("torch.")
    rate = f"{work / 1e9:.3g} Gflop a step; large matrices are multiplied at {limit / 1e9:.3g} Gflop/s in {dtype}"
    row = partial(Speed, TRAINING)
    rows = [
        row("steps", 1 / step, "a second", f"batches of {batch}, as `fit` takes them, with its held-out evaluations"),
        row("data", batch / step, "a second"),
        row("share of the matrix rate", 100 * work / step / limit, "%", rate),
    ]
    what, ratio = "share of time outside arithmetic", "recorded over eager"
    if "graph" not in times:
        return [*rows, row(what, None, how="the program cannot be recorded as a graph, so that it runs in Python")]
    how = "1 − time of the recorded graph of objective and gradient, run by itself, over that of the whole step"
    return [
        *rows,
        row(what, 100 * max(0.0, 1 - times["graph"] / step), "%", how),
        row(ratio, times["eager"] / times["graph"], "times as fast", "objective and gradient alone"),
    ]


def _run(
    modules: Modules, data: Data, plan: BenchPlan, batches: int, parts: Mapping[str, Callable[[], object]]
) -> dict[str, float]:
    """Mean seconds of a "step" of `fit` on some of the data, held-out evaluations included, and of parts of a step.

    After every epoch, each part has its turn, so that what else runs on the machine slows all of them alike. The first
    epoch, in which memory is allocated, is left out. Without parts, there is one epoch that nothing is recorded for.
    """
    batch, device = min(plan.batch_size, len(data)), modules.device
    count = batches * batch
    held = data[len(data) - max(1, count // _HELD_OUT) :]
    found: dict[str, list[float]] = {name: [] for name in ("step", *parts)}
    begun = [now(device)]

    def watch(stage: str, done: int, total: int, text: str = "") -> None:
        if done > len(found["step"]):
            found["step"].append((now(device) - begun[0]) / batches)
            modules.train()
            for name, part in parts.items():
                found[name].append(seconds_of(part, device, _TURNS))
            if len(found["step"]) > 2 and batches * sum(found["step"][1:]) > plan.seconds:
                raise _Enough
        begun[0] = now(device)

    epochs = ceil(RECORDED_FROM / batches) + 1 if parts else 1
    with suppress(_Enough), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # advice on a training, which this one does not serve
        fit(
            modules.model,
            modules.guide,
            data[:count],
            validation=held,
            epochs=epochs,
            patience=epochs,
            batch_size=batch,
            objective=plan.objective,
            compile="auto" if parts else False,
            seed=plan.seed,
            progress=watch,
        )
    return {name: mean(times[1:] or times) for name, times in found.items()}


def _gradients(
    modules: Modules, data: Data, batch: int, plan: BenchPlan
) -> tuple[dict[str, Callable[[], object]], float]:
    """Objective and gradient of a minibatch, run in Python ("eager") and as a "graph", and floating-point operations.

    The graph is left out if the program cannot be recorded.
    """
    rows = data.batch(torch.arange(batch), modules.device)
    other = data.batch(torch.arange(len(data) - batch, len(data)), modules.device)
    fitting = Plan(plan.objective, 8, 1, batch, 1e-3, 10.0, 1, "auto", plan.seed)
    eager, recorded = (initial_state(modules, fitting, data, data).gradient for _ in range(2))
    with defaults(modules, rows[0]), pyro.validation_enabled(False), seeded(stream(plan.seed, "bench")):
        modules.train()
        recorded.record((*rows, {}), (*other, {}))
        with FlopCounterMode(display=False) as counter:
            recorded(*rows, {})
    parts: dict[str, Callable[[], object]] = {"eager": lambda: eager(*rows, {})}
    if recorded.is_graph:
        parts["graph"] = lambda: recorded(*rows, {})
    return parts, float(counter.get_total_flops())


# -- posteriors --------------------------------------------------------------------------------------------------------


def _posterior(problem: Problem, plan: BenchPlan) -> list[Speed]:
    some = problem.of_some(problem.data[: plan.data])
    refuse_without_latents(some.program, some.data)
    device = Modules(problem.program, problem.guide).device

    def seconds(draws: int) -> float:
        began = now(device)
        posterior_of(some, draws, seed=plan.seed)
        return now(device) - began

    seconds(_FEW_DRAWS)
    share = plan.seconds / seconds(_FEW_DRAWS)
    draws = int(min(max(0.5 * share * _FEW_DRAWS, _FEW_DRAWS), _MANY_DRAWS))
    how = f"draws of the guide with their log densities, in float64: {draws:,} for each of {len(some.data)} data"
    return [Speed(POSTERIOR, "draws", draws * len(some.data) / seconds(draws), "a second", how)]


def _reference(problem: Problem, plan: BenchPlan, progress: Progress) -> list[Speed]:
    data = problem.data[: plan.data]
    lengths = ReferencePlan("auto", plan.chains, plan.warmup, plan.draws, problem.guide, starts=plan.starts)
    device = Modules(problem.program, problem.guide).device
    limit, began, said = _PATIENCE * plan.seconds, now(device), ["at its start"]
    with metered() as meter:

        def watch(stage: str, done: int, total: int, text: str = "") -> None:
            said.append(f"at {text}" if "%" in text else f"with {done} of {total} data")
            progress(REFERENCE, 0, 1, text)
            if done < total and now(device) - began - meter.preparing > limit:
                raise _Enough

        try:
            tree = reference_of(problem.program, data, lengths, seed=plan.seed, progress=watch)
        except _Enough:
            seconds = now(device) - began - meter.preparing
            how = f"stopped after {seconds:.0f} seconds, {said[-1]}: {_lengths(plan)} of {len(data)} data at once"
            return [Speed(REFERENCE, "seconds per datum", None, how=how), *_of_sampler(meter, seconds)]
    return _of_tree(tree, now(device) - began - meter.preparing, meter, plan)


def _lengths(plan: BenchPlan) -> str:
    return f"{plan.chains} chains of {plan.warmup:,} + {plan.draws:,} iterations"


def _of_sampler(meter: Meter, seconds: float) -> list[Speed]:
    """The figures of batched NUTS that depend on its work alone, not on what it has found."""
    row = partial(Speed, REFERENCE)
    return [
        row("leapfrogs", meter.leapfrogs / seconds, "a second", "of all chains"),
        row("compiling", meter.preparing, "s", "recording and compiling, which the figures above leave out"),
    ]


def _of_tree(tree: xr.DataTree, seconds: float, meter: Meter, plan: BenchPlan) -> list[Speed]:
    """The figures of a reference that took some seconds without those of `_of_sampler`."""
    method, verdict = tree["posterior"].attrs["method"], tree["convergence"].dataset
    data = verdict.sizes["data"]
    each = partial(Speed, REFERENCE, "seconds per datum", seconds / data, "s")
    if method != "nuts":
        return [each(f"{method}: {plan.chains} × {plan.draws:,} independent draws of each of {data} data")]
    search = f", and their search for modes from {plan.starts} starts" if plan.starts else ""
    ess = np.minimum(verdict["ess_bulk"].values, verdict["ess_tail"].values)
    how = f"of the latent with the fewest; {int(verdict['is_reference'].sum())} of {data} data pass the gate"
    return [
        each(f"batched NUTS: {_lengths(plan)} for each of {data} data at once{search}"),
        Speed(REFERENCE, "effective draws", float(np.nansum(ess)) / seconds, "a second", how),
        *_of_sampler(meter, seconds),
    ]
