"""Timing guards: ratios of our times to plain PyTorch's, Pyro's and NumPyro's, which a regression would multiply.

    python -m benchmarks.guards [--only NAME …] [--json FILE]

Both sides of a ratio run in turn in one process on one thread. What counts is the time of the processor, not that of
the clock on the wall, and the median over rounds, so that a loaded machine changes little. A ratio that exceeds its
limit, about three times the value at which it was set, makes the exit code 1. Times themselves are never judged, since
processors differ. Beside each ratio stands the one of benchmarks/results/guards-cpu.json, which --json replaces.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn

import calibrant as cal
from benchmarks import reference
from benchmarks.storing import keep
from calibrant.inference.diagnostics import diagnose

RESULTS = Path(__file__).parent / "results" / "guards-cpu.json"
ROUNDS, STEPS = 6, 84  # epochs of our training, and steps in each; the graph is recorded for 500 steps or more
OTHERS = 12  # steps of another side in a round
FEW, MANY = 16, 256  # posteriors, with 4 chains each
LENGTHS = {FEW: (300, 500), MANY: (30, 60)}  # warm-up and draws; of MANY, only the cost of a leapfrog counts


@dataclass(frozen=True)
class Row:
    """A ratio; None, with the reason, if a side is missing."""

    name: str
    ratio: float | None
    limit: float
    note: str = ""

    @property
    def is_crossed(self) -> bool:
        return self.ratio is not None and self.ratio > self.limit


# -- training ----------------------------------------------------------------------------------------------------------


class VAE(PyroModule):
    """x ~ Bernoulli(σ(W₂ tanh(W₁ z))), z ~ N(0, 1)."""

    def __init__(self, width: int, hidden: int, latents: int) -> None:
        super().__init__()
        self.latents = latents
        self.net = nn.Sequential(nn.Linear(latents, hidden), nn.Tanh(), nn.Linear(hidden, width))

    def forward(self, size: int, observed: Tensor | None = None) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.latents]).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=observed)


class Encoder(PyroModule):
    """q(z | x), Normal with independent entries."""

    def __init__(self, width: int, hidden: int, latents: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, 2 * latents))

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.net(x).chunk(2, -1)
        return mean, log_scale.exp()

    def forward(self, observed: dict[str, Tensor], size: int) -> None:
        mean, scale = self.moments(observed["x"])
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(mean, scale).to_event(1))


def pair(sizes: tuple[int, int, int]) -> tuple[VAE, Encoder]:
    """A model and its guide, with weights that follow from the sizes alone."""
    torch.manual_seed(0)
    return VAE(*sizes), Encoder(*sizes)


def by_hand(sizes: tuple[int, int, int], x: Tensor) -> Callable[[], object]:
    """A step as one writes it in plain PyTorch: closed-form KL, fused Adam."""
    model, guide = pair(sizes)
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()], 1e-3, fused=True)

    def step() -> float:
        mean, scale = guide.moments(x)
        logits = model.net(mean + scale * torch.randn_like(mean))
        error = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        divergence = 0.5 * (mean**2 + scale**2 - 1).sum() - scale.log().sum()
        loss = (error + divergence) / len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def by_pyro(sizes: tuple[int, int, int], x: Tensor) -> Callable[[], object]:
    """A step of Pyro's SVI on the same program."""
    model, guide = pair(sizes)

    def conditioned(given: Tensor) -> None:
        pyro.module("model", model)
        model(len(given), given)

    def guided(given: Tensor) -> None:
        pyro.module("guide", guide)
        guide({"x": given}, len(given))

    svi = SVI(conditioned, guided, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    return lambda: svi.step(x)


@cache
def training(sizes: tuple[int, int, int], batch: int) -> dict[str, float]:
    """Seconds of a step of `fit`, of plain PyTorch and of Pyro, in turn: after every epoch, the others take steps."""
    x = (torch.rand(STEPS * batch, sizes[0], generator=torch.Generator().manual_seed(0)) < 0.3).float()
    pyro.clear_param_store()
    others = {"by hand": by_hand(sizes, x[:batch]), "Pyro": by_pyro(sizes, x[:batch])}
    found: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    begun = [0.0]

    def watch(stage: str, done: int, total: int, text: str = "") -> None:
        if done > len(found["ours"]):
            found["ours"].append((time.process_time() - begun[0]) / STEPS)
        for name, step in others.items():
            found[name].append(seconds_of(step, OTHERS))
        begun[0] = time.process_time()

    model, guide = pair(sizes)
    cal.inference.fit(model, guide, {"x": x}, validation={"x": x[:16]}, epochs=ROUNDS, batch_size=batch, progress=watch)
    pyro.clear_param_store()
    return {name: median(times[1:]) for name, times in found.items()}


def seconds_of(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the processor for a call, as the mean of some."""
    began = time.process_time()
    for _ in range(repeats):
        function()
    return (time.process_time() - began) / repeats


# -- references --------------------------------------------------------------------------------------------------------


@cache
def sampled(posteriors: int, side: str) -> reference.Drawn:
    """Draws of a side of `benchmarks/reference.py`, in seconds of the processor."""
    model, x = reference.problem("mlp", posteriors, "cpu")
    before, reference.now = reference.now, time.process_time
    try:
        return reference.SAMPLERS[side]("mlp", model, x, *LENGTHS[posteriors])
    finally:
        reference.now = before


def leapfrog(posteriors: int) -> float:
    """Our seconds for a leapfrog over those of the gradient in it."""
    share = sampled(posteriors, "calibrant").arithmetic
    assert share is not None
    return 1 / share


def effective_draw(side: str) -> float:
    """Seconds for an effective draw of the latent with the fewest, of few posteriors."""
    found = sampled(FEW, side)
    each = diagnose(found.draws)
    return found.seconds / float(np.minimum(each["ess_bulk"], each["ess_tail"]).min(-1).sum())


# -- the guards --------------------------------------------------------------------------------------------------------

MLP, SMALL = (784, 400, 20), (20, 32, 2)


def over(sizes: tuple[int, int, int], batch: int, side: str) -> Callable[[], float]:
    """Our step over that of another side."""
    return lambda: training(sizes, batch)["ours"] / training(sizes, batch)[side]


# Name → the ratio, and the limit above which something is wrong.
GUARDS: dict[str, tuple[Callable[[], float], float]] = {
    "training step, MLP 784-400-20, over plain PyTorch": (over(MLP, 128, "by hand"), 4.0),
    "training step, MLP 784-400-20, over Pyro": (over(MLP, 128, "Pyro"), 2.0),
    "training step, MLP 20-32-2, over plain PyTorch": (over(SMALL, 64, "by hand"), 6.0),
    "training step, MLP 20-32-2, over Pyro": (over(SMALL, 64, "Pyro"), 1.0),
    "leapfrog of 16 posteriors over its gradient": (lambda: leapfrog(FEW), 30.0),
    "leapfrog of 256 posteriors over its gradient": (lambda: leapfrog(MANY), 15.0),
    "effective draw of 16 posteriors over NumPyro vmapped": (
        lambda: effective_draw("calibrant") / effective_draw("numpyro-vmap"),
        24.0,
    ),
}


def guard(name: str) -> Row:
    """Measure one ratio."""
    ratio, limit = GUARDS[name]
    try:
        return Row(name, ratio(), limit)
    except ImportError as error:
        return Row(name, None, limit, f"not measured: {error.name} is not installed")


def show(rows: list[Row], before: dict[str, float]) -> None:
    """The ratios beside those that are stored."""
    print(f"{'ratio of processor times, one thread':<56}{'now':>8}{'stored':>8}{'limit':>8}")
    for row in rows:
        now, stored = (f"{value:.2f}" if value is not None else "–" for value in (row.ratio, before.get(row.name)))
        said = "  CROSSED" if row.is_crossed else f"  {row.note}".rstrip()
        print(f"{row.name:<56}{now:>8}{stored:>8}{row.limit:>8.1f}{said}")


def main() -> int:
    """Measure and print; the exit code is 1 if a limit is crossed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(GUARDS), choices=list(GUARDS), metavar="NAME")
    parser.add_argument("--json", help="write the ratios to this file", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    torch.set_num_threads(1)
    stored = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    rows = [guard(name) for name in asked.only]
    show(rows, {row["name"]: row["ratio"] for row in stored["rows"]})
    if asked.json:
        keep(asked.json, rows)
    return int(any(row.is_crossed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
