"""Reference posteriors: effective draws per second of batched NUTS, Pyro's NUTS, and NumPyro's, one by one and vmapped.

    python -m benchmarks.reference [--quick] [--posteriors 1 64] [--problems mlp ea-vae] [--sides …] [--json FILE]

Every side samples the same posteriors with 4 chains, as many warm-up iterations and draws, the same target acceptance
and the same number of threads; ours with the defaults of `cal.inference.reference`,
which compile only where that saves time, and also always compiled, as NumPyro is. What counts is the smallest
effective sample size of a posterior's latents (bulk and tail) over the seconds of the whole call, summed over the
posteriors that pass the convergence gate; one that fails counts zero on every side. Times of compilation stand apart.
Pyro's NUTS and NumPyro one by one take each posterior in turn, so that a few of them tell the rate; on a CPU, NumPyro
vmapped is given 64 posteriors at a time: with more it waits longer for the longest tree.

`arithmetic` is the share of our seconds that the compiled gradient alone takes for as many leapfrogs of as many lanes:
1 is the limit of any sampler that makes these leapfrogs. With `--cpu-time`, seconds are those of the processor, for a
machine that also does other work. JAX keeps to one thread with
XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1".
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import nn

import calibrant as cal
from benchmarks.storing import keep
from calibrant.inference.graphs.recording import compiled
from calibrant.inference.references import lanes
from calibrant.inference.references.gate import mcmc_convergence
from calibrant.inference.references.sampling import ReferencePlan

CHAINS, TARGET = 4, 0.8
now = time.perf_counter
SIDES = ("calibrant", "calibrant-compiled", "pyro", "numpyro-each", "numpyro-vmap", "numpyro-vmap-float32")


class ScaleTimesMLP(PyroModule):
    """x ~ N(s · MLP(z), 0.5²), s ~ LogNormal(0, 1), z ~ N(0, 1)⁸: 9 latents, 8–64–64 units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64))

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
            pyro.sample("x", dist.Normal(scale[:, None] * self.net(z), 0.5).to_event(1))


def problem(name: str, posteriors: int, device: str) -> tuple[PyroModule, torch.Tensor]:
    """A model and data from its own prior."""
    if name == "mlp":
        model: PyroModule = ScaleTimesMLP()
    else:
        torch.manual_seed(0)
        model = cal.models.create("ea-vae", shape=(256,), latents=64, prior="laplace")
    model.eval()
    x = cal.program.sample_prior(model, posteriors, seed=1)["x"].detach()
    return model.to(device), x.to(device)


@dataclass(frozen=True)
class Row:
    """A line of the table; times in seconds, `rate` in effective draws a second."""

    problem: str
    posteriors: int
    side: str
    sampled: int
    seconds: float
    compiling: float
    passed: float
    min_ess: float
    leapfrogs: float
    rate: float
    arithmetic: float | None = None
    rounds: int = 1


@dataclass
class Drawn:
    """`(chain, draw, data, latent)`, `diverging` and `energy` `(chain, draw, data)`, mean leapfrogs an iteration."""

    draws: np.ndarray
    diverging: np.ndarray
    energy: np.ndarray
    leapfrogs: float
    seconds: float
    compiling: float
    subchains: int = 1
    arithmetic: float | None = None


def measure(name: str, posteriors: int, side: str, lengths: tuple[int, int], device: str) -> Row:
    """Sample on one side and judge the draws by the gate."""
    few = {"pyro": 2, "numpyro-each": 16}
    if device == "cpu":
        few |= {"numpyro-vmap": 64, "numpyro-vmap-float32": 64}
    model, x = problem(name, min(few.get(side, posteriors), posteriors), device)
    found = SAMPLERS[side](name, model, x, *lengths)
    names = {"latents": json.dumps(["q"]), "subchains": found.subchains}
    posterior = xr.Dataset({"q": (("chain", "draw", "data", "latent"), found.draws)}, attrs=names)
    plate = ("chain", "draw", "data")
    stats = xr.Dataset({"diverging": (plate, found.diverging), "energy": (plate, found.energy)})
    verdict = mcmc_convergence(posterior, stats)
    ess = np.minimum(verdict["ess_bulk"], verdict["ess_tail"]).values
    passed = verdict["is_reference"].values
    return Row(
        name,
        posteriors,
        side,
        len(x),
        found.seconds,
        found.compiling,
        float(passed.mean()),
        float(np.median(ess)),
        found.leapfrogs,
        float(ess[passed].sum() / found.seconds),
        found.arithmetic,
    )


def middle(rows: Sequence[Row]) -> Row:
    """The row of a side with the median rate; the first one's time of compiling, which later ones find in a cache."""
    typical = sorted(rows, key=lambda row: row.rate)[(len(rows) - 1) // 2]  # the lower of two
    return replace(typical, compiling=rows[0].compiling, rounds=len(rows))


# -- the sides ---------------------------------------------------------------------------------------------------------


class Meter:
    """Times recording and compiling the step apart from sampling, and counts the leapfrogs of all lanes."""

    def __init__(self) -> None:
        self.compiling = self.apart = self.gradient = self.leapfrogs = 0.0
        self.record = lanes._Run._record

    def __call__(self, run: Any, compile_it: bool) -> Any:
        """What `_Run._record` returns, with a count of its calls."""
        begin = time.perf_counter(), now()
        step = self.record(run, compile_it)
        gc.collect()  # what compiling left behind; else this half second falls into sampling
        self.compiling += time.perf_counter() - begin[0]  # with the C++ compiler, which is another process
        count = len(run.state.key)
        self.gradient = self.gradient or seconds_of_gradient(run) / count
        self.apart += now() - begin[1]

        def counted(*tensors: torch.Tensor) -> Any:
            self.leapfrogs += count
            return step(*tensors)

        return counted


def seconds_of_gradient(run: Any) -> float:
    """Seconds that the compiled log density of all lanes takes with its gradient."""
    fixed, names = run.state.fixed, tuple(run.state.fixed.rows)

    def value_and_slope(q: torch.Tensor, powers: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = q.detach().requires_grad_()
        value = run.density(q, powers, dict(zip(names, rows, strict=True)))
        return value.detach(), *torch.autograd.grad(value.sum(), q)

    inputs = run.state.lanes.q, fixed.powers, *fixed.rows.values()
    fast = compiled(value_and_slope, *inputs)
    times = []
    while len(times) < 200 and sum(times) < 2.0:
        begin = now()
        fast(*inputs)
        times.append(now() - begin)
    return float(np.median(times))


def ours(compile: Any) -> Callable[..., Drawn]:
    """`sample_nuts` alone: no gate, no repair, as on the other sides."""

    def sample(name: str, model: PyroModule, x: torch.Tensor, warmup: int, draws: int) -> Drawn:
        plan = ReferencePlan(
            method="nuts", chains=CHAINS, warmup=warmup, draws=draws, target_accept=TARGET, compile=compile
        ).nuts
        meter = Meter()
        lanes._Run._record = lambda run, compile_it: meter(run, compile_it)  # type: ignore[method-assign]
        start = now()
        found, _ = lanes.sample_nuts(model, cal.data.Data({"x": x}), plan, 0, cal.progress.silent)
        seconds = now() - start - meter.apart
        lanes._Run._record = meter.record  # type: ignore[method-assign]
        values = [found.draws[site].reshape(CHAINS, draws, len(x), -1).numpy() for site in found.latents]
        stats = found.stats
        return Drawn(
            np.concatenate(values, -1),
            stats["diverging"].numpy(),
            stats["energy"].numpy(),
            float(stats["n_steps"].float().mean()),
            seconds,
            meter.compiling,
            found.subchains,
            meter.gradient * meter.leapfrogs / seconds,
        )

    return sample


def pyros(name: str, model: PyroModule, x: torch.Tensor, warmup: int, draws: int) -> Drawn:
    """Pyro's NUTS, one chain after another."""
    from calibrant.inference.references import pyro_nuts

    pyro_nuts._TARGET_ACCEPT = TARGET
    start = now()
    data = cal.data.Data({"x": x})
    found = pyro_nuts.sample_pyro_nuts(model, data, CHAINS, warmup, draws, 0, cal.progress.silent)
    seconds = now() - start
    values = [found.draws[site].reshape(CHAINS, draws, len(x), -1).numpy() for site in found.latents]
    stats = found.stats
    leapfrogs = float(stats["n_steps"].float().mean())
    return Drawn(
        np.concatenate(values, -1), stats["diverging"].numpy(), stats["energy"].numpy(), leapfrogs, seconds, 0.0
    )


def numpyros(one_by_one: bool, double: bool) -> Callable[..., Drawn]:
    """NumPyro's NUTS on the same density written in JAX."""

    def sample(name: str, model: PyroModule, x: torch.Tensor, warmup: int, draws: int) -> Drawn:
        import jax
        from jax import numpy as jnp
        from numpyro.infer.hmc import hmc

        jax.config.update("jax_enable_x64", double)
        width, potential = _potential(name, model)
        start_kernel, kernel = hmc(potential_fn_gen=lambda datum: lambda q: potential(q, datum), algo="NUTS")

        def chain(key: Any, datum: Any) -> Any:
            first, second = jax.random.split(key)
            q = jax.random.normal(first, (width,))
            state = start_kernel(
                q, warmup, target_accept_prob=TARGET, model_args=(datum,), rng_key=second, adapt_step_size=True
            )
            warm = jax.lax.fori_loop(0, warmup, lambda _, s: kernel(s, model_args=(datum,)), state)

            def body(s: Any, _: Any) -> Any:
                s = kernel(s, model_args=(datum,))
                return s, (s.z, s.diverging, s.energy, s.num_steps)

            return jax.lax.scan(body, warm, None, length=draws)[1]

        data = jnp.asarray(np.repeat(x.cpu().numpy(), CHAINS, 0), dtype=jnp.float64 if double else jnp.float32)
        keys = jax.random.split(jax.random.PRNGKey(0), len(data))
        program = jax.jit(chain if one_by_one else jax.vmap(chain))
        begin = time.perf_counter()
        ready = program.lower(*((keys[0], data[0]) if one_by_one else (keys, data))).compile()
        compiling = time.perf_counter() - begin
        begin = now()
        if one_by_one:
            parts = [jax.block_until_ready(ready(key, datum)) for key, datum in zip(keys, data, strict=True)]
            found = [np.stack([np.asarray(part[i]) for part in parts]) for i in range(4)]
        else:
            found = [np.asarray(part) for part in jax.block_until_ready(ready(keys, data))]
        seconds = now() - begin
        q, diverging, energy, steps = (_by_chain(part, len(x)) for part in found)
        return Drawn(q, diverging, energy, float(steps.mean()), seconds, compiling)

    return sample


def _by_chain(values: np.ndarray, data: int) -> np.ndarray:
    """`(data · chain, draw, …)` → `(chain, draw, data, …)`."""
    return np.moveaxis(values.reshape(data, CHAINS, *values.shape[1:]), 0, 2)


def _potential(name: str, model: Any) -> tuple[int, Callable[..., Any]]:
    """The number of latents, and minus the log density of (log s, z) and x in JAX."""
    from jax import numpy as jnp

    weights = [tensor.detach().double().cpu().numpy() for tensor in model.state_dict().values()]
    if name == "mlp":
        first, first_bias, second, second_bias = weights

        def mlp(q: Any, x: Any) -> Any:
            hidden = jnp.tanh(first.astype(q.dtype) @ q[1:] + first_bias.astype(q.dtype))
            mean = jnp.exp(q[0]) * (second.astype(q.dtype) @ hidden + second_bias.astype(q.dtype))
            return 0.5 * (q**2).sum() + 0.5 * (((x - mean) / 0.5) ** 2).sum()

        return 9, mlp
    loading, bias = (getattr(model.decoder, part).detach().double().cpu().numpy() for part in ("weight", "bias"))
    noise = model.likelihood.scale.detach().double().cpu().numpy()

    def ea_vae(q: Any, x: Any) -> Any:
        mean = jnp.exp(q[0]) * (loading.astype(q.dtype) @ q[1:]) + bias.astype(q.dtype).reshape(-1)
        return 0.5 * q[0] ** 2 + jnp.abs(q[1:]).sum() + 0.5 * (((x - mean) / noise.astype(q.dtype)) ** 2).sum()

    return 65, ea_vae


SAMPLERS: dict[str, Callable[..., Drawn]] = {
    "calibrant": ours("auto"),
    "calibrant-compiled": ours(True),
    "pyro": pyros,
    "numpyro-each": numpyros(one_by_one=True, double=True),
    "numpyro-vmap": numpyros(one_by_one=False, double=True),
    "numpyro-vmap-float32": numpyros(one_by_one=False, double=False),
}


# -- the table ---------------------------------------------------------------------------------------------------------


def show(rows: list[Row]) -> None:
    """The table, and our rate over each of the others'."""
    best = {(row.problem, row.posteriors): row.rate for row in rows if row.side == "calibrant"}
    head = ("sampled", "seconds", "compile", "pass", "min-ESS", "leapfrogs", "ESS/s", "arithmetic", "ours/it")
    print(("{:>9}{:>11}{:>22}" + "{:>11}" * len(head)).format("problem", "posteriors", "side", *head))
    for row in rows:
        ratio = best.get((row.problem, row.posteriors), math.nan) / row.rate if row.rate else math.inf
        share = "" if row.arithmetic is None else f"{row.arithmetic:.0%}"
        print(
            f"{row.problem:>9}{row.posteriors:>11}{row.side:>22}{row.sampled:>11}{row.seconds:>11.1f}"
            f"{row.compiling:>11.1f}{row.passed:>11.0%}{row.min_ess:>11.0f}{row.leapfrogs:>11.1f}{row.rate:>11.1f}"
            f"{share:>11}{ratio:>11.2f}"
        )


def ratios(rows: list[Row]) -> None:
    """Our rate over that of NumPyro's better mode and of Pyro, by number of posteriors."""
    rates = {(row.problem, row.posteriors, row.side): row.rate for row in rows}
    for name, posteriors in dict.fromkeys((row.problem, row.posteriors) for row in rows):
        numpyro = max((rates.get((name, posteriors, side), 0.0) for side in SIDES if "numpyro" in side), default=0.0)
        others = {"NumPyro's better mode": numpyro, "Pyro": rates.get((name, posteriors, "pyro"), 0.0)}
        for side in ("calibrant", "calibrant-compiled"):
            found = rates.get((name, posteriors, side), math.nan)
            for other, rate in others.items():
                if rate and found == found:
                    print(f"{name}, {posteriors} posteriors: {side} is {found / rate:.2f} times {other}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["mlp", "ea-vae"], choices=["mlp", "ea-vae"])
    parser.add_argument("--posteriors", nargs="+", type=int, default=[1, 4, 16, 64, 1024, 8192])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of our side and Pyro's"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=1, help="rounds of all sides in turn; the median rate counts")
    parser.add_argument("--cpu-time", action="store_true", help="count seconds of the processor")
    parser.add_argument(
        "--quick", action="store_true", help="16 posteriors of the smaller problem, 500 iterations each"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file, anew after each number")
    asked = parser.parse_args()
    if asked.quick:
        asked.problems, asked.posteriors, asked.warmup, asked.draws = ["mlp"], [16], 500, 500
    if asked.cpu_time:
        global now
        now = time.process_time
    torch.set_num_threads(asked.threads)
    rows: list[Row] = []
    for name in asked.problems:
        for posteriors in asked.posteriors:
            settings = (asked.warmup, asked.draws), asked.device
            rounds = [[measure(name, posteriors, side, *settings) for side in asked.sides] for _ in range(asked.rounds)]
            rows += map(middle, zip(*rounds, strict=True))
            show(rows[-len(asked.sides) :])
            if asked.json:
                keep(asked.json, rows, threads=asked.threads, warmup=asked.warmup, draws=asked.draws)
    print()
    show(rows)
    ratios(rows)


if __name__ == "__main__":
    main()
