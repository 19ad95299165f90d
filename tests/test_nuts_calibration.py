"""Simulation-based calibration of batched NUTS, and of the test itself by planted defects of the sampler.

Latents are drawn from the prior and data from the latents (Talts, Betancourt, Simpson, Vehtari & Gelman 2018, arXiv
1804.06788). Among draws of the posterior the latents that made the data have every rank equally often; so has their
log density (Modrák et al. 2023, Bayesian Analysis 20(2)), which sees what no single latent shows.

Ranks are turned into Normal scores; their mean, spread and skewness are tested together (a smooth test in Neyman's
sense, χ² with 3 degrees of freedom), with a false-alarm rate of 1e-5 a model. With 1,500 data it notices a location
.15 sd off three times in four, an sd 12% too small nearly always; bins of ranks would need several times as many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import small_models
import torch
from scipy import stats
from torch import Tensor

import calibrant as cal
from calibrant.inference.references import nuts, target

pytestmark = pytest.mark.slow

DATA = 1500
THINNED = 20  # of 500 draws a chain, so that 4 × 25 remain, nearly independent
RANKS = 100
ALARM = 1e-5

Program = Callable[[int], Any]


def counts(size):
    """A positive latent whose data say little."""
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate))


def energy(size):
    """A scale that multiplies two Normal latents."""
    with pyro.plate("data", size):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        mixed = z @ torch.tensor([[1.0, 0.5, -0.5], [0.0, 1.0, 1.0]], dtype=z.dtype)
        pyro.sample("x", dist.Normal(scale[:, None] * mixed, 0.5).to_event(1))


def shares(size):
    """A simplex, and a bounded latent."""
    with pyro.plate("data", size):
        w = pyro.sample("w", dist.Dirichlet(torch.tensor([1.5, 1.0, 2.0])))
        p = pyro.sample("p", dist.Beta(1.5, 2.0))
        pyro.sample("x", dist.Multinomial(4, w))
        pyro.sample("k", dist.Binomial(3, p))


MODELS: dict[str, tuple[Program, tuple[str, ...]]] = {
    "counts": (counts, ("x",)),
    "energy": (energy, ("x",)),
    "shares": (shares, ("x", "k")),
}


def without_jacobian(fn: Any, raw: Tensor) -> tuple[Tensor, Tensor]:
    value, log_det = to_support(fn, raw)
    return value, torch.zeros_like(log_det)


def without_half_steps(slope_at: Any, q: Tensor, p: Tensor, grad: Tensor, time: Tensor, metric: Tensor) -> Any:
    """Whole kicks, without the half step that brings momentum and position to the same time."""
    half = 0.5 * time[:, None]
    q, p, after, log_density = leapfrog(slope_at, q, p + half * grad, grad, time, metric)
    return q, p - half * after, after, log_density


def always(delta: Tensor, log_weight: Tensor, level: Tensor) -> Tensor:
    return torch.ones_like(level, dtype=torch.bool)


to_support, leapfrog = target.to_support, nuts.leapfrog
DEFECTS = {
    "wrong Jacobian": (target, "to_support", without_jacobian),
    "missed half step": (nuts, "leapfrog", without_half_steps),
    "ignored acceptance": (nuts, "takes_leaf", always),
}


def p_values(program: Program, observed: tuple[str, ...]) -> dict[str, float]:
    """Of the test of every latent's ranks, and of their log density's."""
    truth = {name: value.double() for name, value in cal.program.sample_prior(program, DATA, seed=3).items()}
    x = {name: truth[name] for name in observed}
    tree = cal.inference.reference(program, x, method="nuts", warmup=200, draws=500, seed=4, compile=False)
    group = tree["posterior"].dataset.isel(draw=slice(None, None, THINNED)).stack(each=("chain", "draw"))
    draws = {name: torch.tensor(var.transpose("each", "data", ...).values).double() for name, var in group.items()}
    draws = {name: value[1:] for name, value in draws.items()}  # 99, so that there are 100 ranks
    found = {name: rank(draws[name], truth[name]) for name in draws}
    count = len(next(iter(draws.values())))
    flat = {name: value.flatten(0, 1) for name, value in draws.items()}
    flat |= {name: value.repeat(count, *[1] * (value.dim() - 1)) for name, value in x.items()}
    density = cal.program.log_density(program, flat, count * DATA).joint.reshape(count, DATA)
    found["log density"] = rank(density, cal.program.log_density(program, truth, DATA).joint)
    return {f"{name}{i}": uniformity(row) for name, ranks in found.items() for i, row in enumerate(ranks)}


def rank(draws: Tensor, truth: Tensor) -> np.ndarray:
    """How many draws `(draw, data, …)` lie below the truth: `(scalar, data)`."""
    return (draws < truth).sum(0).reshape(DATA, -1).T.numpy()


def uniformity(ranks: np.ndarray) -> float:
    """p of the ranks 0 … 99 of all data being equally frequent."""
    scores = stats.norm.ppf((np.arange(RANKS) + 0.5) / RANKS)
    basis = np.linalg.qr(scores[:, None] ** np.arange(4))[0][:, 1:] * np.sqrt(RANKS)  # orthonormal for uniform ranks
    return float(stats.chi2(3).sf(DATA * np.square(basis[ranks].mean(0)).sum()))


@pytest.fixture(autouse=True)
def one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that fail the gate stay as they are: what is tested is the sampler."""
    small_models.one_look(monkeypatch)


@pytest.mark.parametrize("name", MODELS)
def test_draws_are_calibrated(name: str) -> None:
    found = p_values(*MODELS[name])
    assert min(found.values()) > ALARM / len(found), found


@pytest.mark.parametrize(
    ("defect", "name"),
    [
        ("wrong Jacobian", "counts"),
        ("wrong Jacobian", "energy"),
        ("missed half step", "counts"),
        ("ignored acceptance", "counts"),
    ],
)
def test_planted_defect_is_noticed(defect: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last two bias most where the steps are longest: with one latent. (Simplices have no proper posterior without
    the Jacobian.)"""
    monkeypatch.setattr(*DEFECTS[defect])
    found = p_values(*MODELS[name])
    assert min(found.values()) < ALARM / len(found), found
