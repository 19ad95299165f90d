"""Sampling a plain log density: `inference.sample`, NumPyro vmapped, and Pyro's NUTS, on the same posteriors.

    python -m benchmarks.densities [--quick] [--posteriors 1 64 512] [--sides calibrant numpyro pyro] [--json FILE]

The density is that of a curve of decay, y = a·exp(−b t) + noise of scale σ, with 20 observations: three numbers (log
a, log b, log σ) with Normal priors for each posterior. All sides run 4 chains of as many iterations from the same
starts, in float64. What counts is the smallest effective sample size of a posterior (bulk and tail), summed over those
that pass the convergence gate, by CPU time of the whole call; compiling stands apart. Pyro takes one posterior at a
time, so that two tell the rate. For one thread of XLA, set
`XLA_FLAGS="--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

import calibrant as cal
from benchmarks.storing import keep
from calibrant.inference.graphs.metering import metered
from calibrant.inference.references.gate import mcmc_convergence

CHAINS, TARGET, TIMES = 4, 0.8, 20
PYRO = 2  # posteriors that Pyro samples


@dataclass(frozen=True)
class Row:
    """A line of the table; CPU seconds of the whole call without compiling, `rate` in effective draws a second."""

    posteriors: int
    side: str
    sampled: int
    seconds: float
    compiling: float
    passed: float
    min_ess: float
    rate: float


def curves(posteriors: int) -> Tensor:
    """Curves from the prior, `(posteriors, 20)`."""
    torch.manual_seed(0)
    log_a, log_b, log_s = 0.5 * torch.randn(3, posteriors, 1, dtype=torch.float64)
    t = torch.linspace(0.0, 3.0, TIMES, dtype=torch.float64)
    mean = log_a.exp() * (-log_b.exp() * t).exp()
    return mean + 0.2 * log_s.exp() * torch.randn_like(mean)


def starts(posteriors: int) -> Tensor:
    """Draws of the prior, `(posteriors, 4, 3)`."""
    torch.manual_seed(1)
    return 0.5 * torch.randn(posteriors, CHAINS, 3, dtype=torch.float64)


def log_density(q: Tensor, y: Tensor) -> Tensor:
    """The log posterior of rows `q` `(rows, 3)` given curves `y` `(rows, 20)`."""
    t = torch.linspace(0.0, 3.0, TIMES)
    a, b, scale = q[:, :1].exp(), q[:, 1:2].exp(), 0.2 * q[:, 2:].exp()
    z = (y - a * (-b * t).exp()) / scale
    return -0.5 * (z**2).sum(1) - TIMES * q[:, 2] - 0.5 * ((q / 0.5) ** 2).sum(1)


@dataclass(frozen=True)
class Drawn:
    """`(chain, draw, data, number)`; `diverging` and `energy` `(chain, draw, data)`; CPU seconds."""

    draws: Any
    diverging: Any
    energy: Any
    seconds: float
    compiling: float


def ours(y: Tensor, q: Tensor, warmup: int, draws: int) -> Drawn:
    """The public call, with its checks, its gate, and further looks at what fails."""
    begin = time.process_time()
    with metered(time.process_time) as meter:
        tree = cal.inference.sample(log_density, q, data=y, warmup=warmup, draws=draws, target_accept=TARGET)
    seconds = time.process_time() - begin - meter.preparing
    stats = tree["sample_stats"]
    return Drawn(
        tree["posterior"]["q"].values, stats["diverging"].values, stats["energy"].values, seconds, meter.preparing
    )


def numpyros(y: Tensor, q: Tensor, warmup: int, draws: int) -> Drawn:
    """NumPyro's NUTS on the same density written in JAX, vmapped over chains and posteriors."""
    import jax
    from jax import numpy as jnp
    from numpyro.infer.hmc import hmc

    jax.config.update("jax_enable_x64", True)
    t = jnp.linspace(0.0, 3.0, TIMES)

    def potential(q: Any, y: Any) -> Any:
        a, b, scale = jnp.exp(q[0]), jnp.exp(q[1]), 0.2 * jnp.exp(q[2])
        z = (y - a * jnp.exp(-b * t)) / scale
        return 0.5 * (z**2).sum() + TIMES * q[2] + 0.5 * ((q / 0.5) ** 2).sum()

    start, kernel = hmc(potential_fn_gen=lambda y: lambda q: potential(q, y), algo="NUTS")

    def chain(key: Any, q: Any, y: Any) -> Any:
        state = start(q, warmup, target_accept_prob=TARGET, model_args=(y,), rng_key=key, adapt_step_size=True)
        state = jax.lax.fori_loop(0, warmup, lambda _, s: kernel(s, model_args=(y,)), state)

        def body(s: Any, _: Any) -> Any:
            s = kernel(s, model_args=(y,))
            return s, (s.z, s.diverging, s.energy)

        return jax.lax.scan(body, state, None, length=draws)[1]

    rows = jnp.asarray(y.repeat_interleave(CHAINS, 0).numpy())
    arguments = jax.random.split(jax.random.PRNGKey(0), len(rows)), jnp.asarray(q.flatten(0, 1).numpy()), rows
    begin = time.process_time()
    ready = jax.jit(jax.vmap(chain)).lower(*arguments).compile()
    compiling, begin = time.process_time() - begin, time.process_time()
    found = [np.asarray(part) for part in jax.block_until_ready(ready(*arguments))]
    seconds = time.process_time() - begin
    parts = [part.reshape(len(y), CHAINS, draws, *part.shape[2:]) for part in found]
    return Drawn(*(np.moveaxis(part, 0, 2) for part in parts), seconds, compiling)


def pyros(y: Tensor, q: Tensor, warmup: int, draws: int) -> Drawn:
    """Pyro's NUTS with the same function as potential, one chain after another; it keeps no energies."""
    from pyro.infer import MCMC, NUTS

    y, q, begin = y[:PYRO], q[:PYRO], time.process_time()
    found = np.zeros((CHAINS, draws, len(y), 3))
    diverging = np.zeros((CHAINS, draws, len(y)), dtype=bool)
    for at, own in enumerate(y):
        for chain in range(CHAINS):
            kernel = NUTS(
                potential_fn=lambda z, own=own: -log_density(z["q"][None], own[None])[0], target_accept_prob=TARGET
            )
            mcmc = MCMC(kernel, draws, warmup, initial_params={"q": q[at, chain]}, disable_progbar=True)
            mcmc.run()
            found[chain, :, at] = mcmc.get_samples()["q"].numpy()
            diverging[chain, mcmc.diagnostics()["divergences"]["chain 0"], at] = True
    return Drawn(found, diverging, None, time.process_time() - begin, 0.0)


SIDES = {"calibrant": ours, "numpyro": numpyros, "pyro": pyros}


def measure(posteriors: int, side: str, warmup: int, draws: int) -> Row:
    """Sample on one side, and judge the draws by the gate."""
    torch.set_default_dtype(torch.float64)
    found = SIDES[side](curves(posteriors), starts(posteriors), warmup, draws)
    plate = ("chain", "draw", "data")
    stats = xr.Dataset({"diverging": (plate, found.diverging)})
    if found.energy is not None:
        stats["energy"] = (plate, found.energy)
    verdict = mcmc_convergence(xr.Dataset({"q": ((*plate, "number"), found.draws)}), stats)
    ess, passed = np.minimum(verdict["ess_bulk"], verdict["ess_tail"]).values, verdict["is_reference"].values
    return Row(
        posteriors,
        side,
        len(ess),
        found.seconds,
        found.compiling,
        float(passed.mean()),
        float(np.median(ess)),
        float(ess[passed].sum() / found.seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posteriors", nargs="+", type=int, default=[1, 64, 512])
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--warmup", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="16 posteriors, 500 + 500 iterations")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    asked = parser.parse_args()
    if asked.quick:
        asked.posteriors, asked.warmup, asked.draws = [16], 500, 500
    torch.set_num_threads(1)
    rows = []
    print(("{:>12}" * 8).format("posteriors", "side", "sampled", "seconds", "compiling", "pass", "min ESS", "ESS/s"))
    for posteriors in asked.posteriors:
        for side in asked.sides:
            row = measure(posteriors, side, asked.warmup, asked.draws)
            rows.append(row)
            print(
                f"{row.posteriors:>12}{row.side:>12}{row.sampled:>12}{row.seconds:>12.1f}{row.compiling:>12.1f}"
                f"{row.passed:>12.0%}{row.min_ess:>12.0f}{row.rate:>12.1f}",
                flush=True,
            )
            if asked.json:  # after every row, so that a run that is stopped leaves what it has
                keep(asked.json, rows)


if __name__ == "__main__":
    main()
