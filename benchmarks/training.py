"""Training: processor time of a step, beside a loop that is written by hand in PyTorch, and beside Pyro's SVI.

    python -m benchmarks.training [--quick] [--problems mlp conv ea-vae] [--threads 1 2] [--json FILE]

Every side trains the same modules from the same weights on the same minibatches of 128 data in float32. The loop by
hand computes the ELBO with as few operations as its author could, without trace, check or clip, and has torch's fused
Adam. Its gradient is the path derivative where that costs it nothing (one latent), as ours is; under two latents it is
the plain one, whose backward pass is shorter, and so is Pyro's everywhere. A round is some steps of every side, one
after the other in one process; the ratio to the loop by hand is the median over the rounds of the quotient of processor
times, so that what else runs on the machine falls out. Recording and compiling stand apart. Our sides are the steps of
`inference.fit` itself: minibatch, objective, gradient, clip, Adam.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import calibrant as cal
from benchmarks.storing import keep
from calibrant.data import Data
from calibrant.guides import amortize, from_encoder
from calibrant.inference.fitting import loop, state
from calibrant.program.environment import defaults

BATCH, ROWS, LR = 128, 1024, 1e-3
HALF_LOG_2PI = 0.9189385332046727
Step = Callable[[Tensor], Any]
Pair = tuple[PyroModule, PyroModule]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        ms: median processor time of a step, milliseconds.
        ratio: median over the rounds of the time of this side over that of the loop by hand.
        wall_ratio: likewise of wall times, which count with several threads, on a machine that does nothing else.
        starting: processor seconds until the first step has ended, with recording and compiling.
        rounds, steps: number of rounds, and of steps in each.
    """

    problem: str
    side: str
    threads: int
    ms: float
    ratio: float
    wall_ratio: float
    starting: float
    rounds: int
    steps: int


def mlp() -> tuple[Pair, Tensor]:
    """A VAE 784–400–20 of binary images."""
    encoder = nn.Sequential(nn.Linear(784, 400), nn.ReLU(), nn.Linear(400, 40))
    decoder = nn.Sequential(nn.Linear(20, 400), nn.ReLU(), nn.Linear(400, 784))
    model = cal.models.create("vae", shape=(784,), latents=20, decoder=decoder, likelihood="bernoulli")
    return (model, from_encoder(encoder, "loc, log_variance")), (torch.rand(ROWS, 784) < 0.3).float()


def conv() -> tuple[Pair, Tensor]:
    """The convolutional VAE of the EA-VAE's paper, of binary images of 32×32 pixels."""
    model, x = cal.models.create("vae", preset="mnist"), (torch.rand(ROWS, 1, 32, 32) < 0.3).float()
    return (model, amortize(model, {"x": x}, "mean-field", encoder={"name": "ea-vae-conv", "scalars": 0})), x


def ea_vae() -> tuple[Pair, Tensor]:
    """The linear EA-VAE of 256 pixels and 64 latents, with the default guide, whose latents see the scale."""
    model = cal.models.create("ea-vae", shape=(256,), latents=64)
    x = cal.program.sample_prior(model, ROWS, seed=1)["x"].detach()
    return (model, amortize(model, {"x": x})), x


def by_hand_of_bernoulli(model: Any, encode: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Step:
    """The loss of a VAE with Normal latents and binary images; the constants of the two Normals cancel."""

    def loss(x: Tensor) -> Tensor:
        loc, sd = encode(x)
        z = loc + sd * torch.randn_like(loc)
        log_q = -(((z - loc.detach()) / sd.detach()).square() / 2 + sd.detach().log()).sum(1)
        log_p = -z.square().sum(1) / 2
        error = binary_cross_entropy_with_logits(model.decoder(z), x, reduction="none").flatten(1).sum(1)
        return (error + log_q - log_p).mean()

    return loss


def by_hand_mlp(model: Any, guide: Any) -> Step:
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        loc, log_variance = guide.encoder(x).chunk(2, 1)
        return loc, (log_variance / 2).exp()

    return by_hand_of_bernoulli(model, encode)


def by_hand_conv(model: Any, guide: Any) -> Step:
    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        normal = guide.heads[0](guide.encoder({"x": x}), None).base_dist
        return normal.loc, normal.scale

    return by_hand_of_bernoulli(model, encode)


def by_hand_ea_vae(model: Any, guide: Any) -> Step:
    """s = exp(u), u ~ N(0, 1) under the model; the density of exp falls out of log q − log p."""

    def loss(x: Tensor) -> Tensor:
        features = guide.encoder({"x": x})
        of_log = guide.heads[0](features, None).base_dist
        u = of_log.loc + of_log.scale * torch.randn_like(of_log.loc)
        of_z = guide.heads[1](features, guide.heads[0].to_line(u.exp())).base_dist
        noise = torch.randn_like(of_z.loc)
        z = of_z.loc + of_z.scale * noise
        log_q = -(((u - of_log.loc) / of_log.scale).square() / 2 + of_log.scale.log())
        log_q = log_q - (noise.square() / 2 + of_z.scale.log()).sum(1)
        log_p = -u.square() / 2 - z.square().sum(1) / 2
        mean, scale = model.decoder(u.exp()[:, None] * z), model.likelihood.scale
        log_x = -(((x - mean) / scale).square() / 2 + scale.log() + HALF_LOG_2PI).sum(1)
        return (log_q - log_p - log_x).mean()

    return loss


PROBLEMS: dict[str, tuple[Callable[[], tuple[Pair, Tensor]], Callable[[Any, Any], Step]]] = {
    "mlp": (mlp, by_hand_mlp),
    "conv": (conv, by_hand_conv),
    "ea-vae": (ea_vae, by_hand_ea_vae),
}
HAND = "by hand"
OURS: dict[str, Any] = {"calibrant": "auto", "calibrant compile=True": True, "calibrant compile=False": False}
SIDES = (HAND, *OURS, "Pyro SVI.step", "by hand, torch.compile")


def steps_by_hand(pair: Pair, loss: Step, compiled: bool) -> Step:
    optimizer = torch.optim.Adam(list(nn.ModuleList(pair).parameters()), LR, fused=True)
    fast = torch.compile(loss) if compiled else loss

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        value = fast(x)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


def steps_of_pyro(pair: Pair) -> Step:
    """Pyro's own step on the same program; its guides take the data as an argument, as ours do."""
    model, guide = pair
    pyro.clear_param_store()

    def conditioned(x: Tensor) -> None:
        pyro.condition(model, {"x": x})(len(x))

    svi = SVI(
        lambda x: conditioned(x),
        lambda x: guide({"x": x}, len(x)),
        pyro.optim.Adam({"lr": LR, "fused": True}),
        Trace_ELBO(),
    )
    for name, part in zip(("model", "guide"), pair, strict=True):
        pyro.module(name, part)
    return lambda x: svi.step(x)


def steps_of_ours(pair: Pair, x: Tensor, compile_it: Any) -> Callable[[Tensor], Any]:
    """The step of `inference.fit`, from the positions of a minibatch."""
    modules, data = state.Modules(*pair), Data({"x": x})
    plan = state.Plan("stl", 1, 100, BATCH, LR, 10.0, 100, compile_it, 0)
    started = state.initial_state(modules, plan, data, data)
    if plan.records(10_000):
        loop._record(started, plan, data, data)
    modules.train()
    return lambda index: loop._step(started, plan, data, index, 1.0)


@contextmanager
def unchecked(pair: Pair, x: Tensor) -> Iterator[None]:
    """As in a training: Pyro does not check distributions, and the defaults are those of the weights."""
    with defaults(nn.ModuleList(pair), {"x": x}), pyro.validation_enabled(False):
        yield


def made(side: str, problem: str) -> tuple[Step, float]:
    """The step of a side, a function of positions of data, and the seconds until its first one has ended."""
    torch.manual_seed(0)
    build, hand = PROBLEMS[problem]
    pair, x = build()
    pair = copy.deepcopy(pair)
    began = time.process_time()
    with unchecked(pair, x):
        if side in OURS:
            inner = steps_of_ours(pair, x, OURS[side])
        else:
            of_rows = steps_of_pyro(pair) if side == "Pyro SVI.step" else steps_by_hand(pair, hand(*pair), side != HAND)
            inner = lambda index: of_rows(x[index])  # noqa: E731 - one line for two kinds of steps

        def step(index: Tensor) -> None:
            with unchecked(pair, x):
                inner(index)

        step(torch.arange(BATCH))
    return step, time.process_time() - began


def measure(problem: str, sides: list[str], threads: int, rounds: int, steps: int) -> list[Row]:
    """Rounds of all sides in turn, of which the first counts for nothing."""
    torch.set_num_threads(threads)
    functions = {}
    for side in sides:
        try:
            functions[side] = made(side, problem)
        except Exception as error:  # torch.compile takes what it can
            print(f"{problem}: {side} does not run ({str(error).strip().splitlines()[0][:100]})")
    batches = torch.randperm(ROWS).split(BATCH)
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in functions}
    for _ in range(rounds + 1):
        for side, (step, _) in functions.items():
            began, on_the_wall = time.process_time(), time.perf_counter()
            for number in range(steps):
                step(batches[number % len(batches)])
            times[side].append((time.process_time() - began, time.perf_counter() - on_the_wall))
    found = []
    for side, each in times.items():
        pairs = list(zip(each[1:], times[HAND][1:], strict=True))
        ratios = [median(ours[clock] / theirs[clock] for ours, theirs in pairs) for clock in (0, 1)]
        ms = median(ours for ours, _ in each[1:]) / steps * 1000
        found.append(Row(problem, side, threads, ms, *ratios, functions[side][1], rounds, steps))
    return found


def table(rows: list[Row]) -> str:
    """In Markdown."""
    head = ("problem", "threads", "side", "ms a step", "ratio to the loop by hand", "of wall times", "start, s")
    lines = [f"| {' | '.join(head)} |", "|---|--:|---|--:|--:|--:|--:|"]
    for row in rows:
        numbers = f"{row.ms:.2f} | {row.ratio:.2f} | {row.wall_ratio:.2f} | {row.starting:.1f}"
        lines.append(f"| {row.problem} | {row.threads} | {row.side} | {numbers} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="3 rounds of 8 steps, whose figures say little")
    options.add_argument("--rounds", type=int, default=15, help="rounds of 40 steps")
    options.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS))
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    options.add_argument("--threads", nargs="+", type=int, default=[1])
    options.add_argument("--json", type=Path, help="write the rows to this file, anew after each problem")
    asked = options.parse_args()
    rounds, steps = (3, 8) if asked.quick else (asked.rounds, 40)
    sides = [HAND, *(side for side in asked.sides if side != HAND)]
    rows: list[Row] = []
    for problem in asked.problems:
        for threads in asked.threads:
            found = measure(problem, sides, threads, rounds, steps)
            print(table(found), flush=True)
            rows += found
            if asked.json:
                keep(asked.json, rows, batch=BATCH)


if __name__ == "__main__":
    main()
