"""Batched NUTS on plain functions of tensors whose distributions are known: closed forms and quadrature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from agreement import Truth, assert_agrees, from_grid, from_scipy, known
from scipy import stats
from torch.distributions import constraints

import calibrant as cal
from calibrant.inference.references import plain

P = np.array([0.05, 0.5, 0.95])
CHAINS = 16  # few lanes cost as much as one
SHORT = {"warmup": 200, "draws": 500, "compile": False}


@dataclass
class Case:
    """A density, what it is called with, and what is known of its parameters."""

    log_density: Callable[..., torch.Tensor]
    start: Any
    truth: dict[str, Truth]
    options: dict[str, Any] = field(default_factory=dict)

    def draws(self, **options: Any) -> Mapping[str, Any]:
        tree = cal.inference.sample(self.log_density, self.start, seed=1, **{**SHORT, **self.options, **options})
        convergence = tree["convergence"].dataset
        assert bool(convergence["is_reference"].all()), convergence["reason"].values
        return tree["posterior"].dataset


def correlated_normals() -> Case:
    """Normal distributions in five dimensions with one covariance, and a mean for each posterior."""
    mean = torch.tensor([[-3.0, 0.0, 1.0, 10.0, 2.0], [0.5, 0.5, 0.5, 0.5, 0.5], [100.0, -7.0, 0.0, 1.0, -1.0]])
    factor = torch.tensor(
        [
            [1.0, 0.0, 0.0, 0.0, 0.0],
            [0.6, 0.8, 0.0, 0.0, 0.0],
            [-0.5, 0.1, 2.0, 0.0, 0.0],
            [0.0, 0.3, 0.3, 0.4, 0.0],
            [1.5, 0.0, 0.0, 0.2, 0.7],
        ],
        dtype=torch.float64,
    )
    covariance = factor @ factor.T
    precision = torch.linalg.inv(covariance)

    def log_density(q, mean):
        aside = q - mean
        return -0.5 * torch.einsum("ri,ij,rj->r", aside, precision, aside)

    sd = np.broadcast_to(covariance.diagonal().sqrt().numpy(), mean.shape)
    truth = from_scipy(stats.norm(mean.numpy(), sd))
    start = mean[:, None] + 3 * torch.randn(3, CHAINS, 5)
    return Case(log_density, start, {"q": truth}, {"data": mean, "dense": True})


def students() -> Case:
    """Student-t distributions with 5 degrees of freedom, a function of one point."""
    loc = torch.tensor([-20.0, 0.0, 3.0])

    def log_density(q, given):
        return torch.distributions.StudentT(5.0, given["loc"], 2.0).log_prob(q["z"]).sum()

    truth = from_scipy(stats.t(5.0, np.stack([loc.numpy()] * 2, 1), 2.0))
    start = {"z": loc[:, None, None] + torch.randn(3, CHAINS, 2)}
    return Case(log_density, start, {"z": truth}, {"data": {"loc": loc}, "batched": False})


def mean_and_scale() -> Case:
    """Normal observations under the prior 1/σ: σ² has an inverse Gamma distribution, and the mean is Student-t."""
    y = torch.tensor([[1.0, 2.0, 4.0, 2.5, 0.0, 1.5], [-0.02, 0.01, 0.0, 0.03, -0.05, 0.02]], dtype=torch.float64)

    def log_density(q, y):
        likelihood = torch.distributions.Normal(q["mu"][:, None], q["sigma"][:, None]).log_prob(y).sum(-1)
        return likelihood - q["sigma"].log()

    n, rest = y.shape[1], ((y - y.mean(1, keepdim=True)) ** 2).sum(1).numpy()
    variance = stats.invgamma((n - 1) / 2, scale=rest / 2)
    sigma = np.stack([variance.ppf(p) for p in P]) ** 0.5
    truth = {
        "mu": from_scipy(stats.t(n - 1, y.mean(1).numpy(), (rest / (n - 1) / n) ** 0.5)),
        "sigma": known(np.full(2, np.nan), np.nan, sigma),
    }
    spread = y.std(1)[:, None]
    start = {
        "mu": y.mean(1)[:, None] + spread * torch.randn(2, CHAINS),
        "sigma": spread * torch.randn(2, CHAINS).exp(),
    }
    return Case(log_density, start, truth, {"data": y, "supports": {"sigma": constraints.positive}})


def hierarchy() -> Case:
    """Eight groups, their mean and their scale τ, as one posterior; quadrature over τ, and Normals given τ."""
    y = torch.tensor([2.0, -4.0, 3.5, 0.5, -1.5, 5.0, 1.0, -2.0], dtype=torch.float64)

    def log_density(q):
        tau, mu = q["tau"][:, None], q["mu"][:, None]
        groups = -0.5 * ((q["theta"] - mu) / tau) ** 2 - tau.log()
        return (groups - 0.5 * (y - q["theta"]) ** 2).sum(-1) - 0.5 * (q["tau"] / 5.0) ** 2

    tau, mean = np.exp(np.linspace(-6.0, 4.0, 20_001)), float(y.mean())
    variance, rest = 1.0 + tau**2, float(((y - mean) ** 2).sum())
    log_weights = -3.5 * np.log(variance) - 0.5 * rest / variance - 0.5 * (tau / 5.0) ** 2 + np.log(tau)
    weights = np.exp(log_weights - log_weights.max())
    weights /= weights.sum()
    kept = (weights * tau**2 / variance).sum()
    truth = {
        "tau": from_grid(tau, log_weights),
        "mu": known(mean, (weights * variance / 8).sum() ** 0.5),
        "theta": known(mean + kept * (y.numpy() - mean)),
    }
    start = {
        "mu": torch.randn(CHAINS),
        "tau": 3 * torch.randn(CHAINS).exp(),
        "theta": y + torch.randn(CHAINS, 8),
    }
    return Case(log_density, start, truth, {"supports": {"tau": constraints.positive}})


def shares() -> Case:
    """Dirichlet distributions of shares, with a map from two numbers to three."""
    alpha = torch.tensor([[1.5, 2.0, 3.0], [10.0, 2.0, 0.8]], dtype=torch.float64)

    def log_density(q, alpha):
        return ((alpha - 1) * q["w"].log()).sum(-1)

    total = alpha.sum(1, keepdim=True)
    truth = from_scipy(stats.beta(alpha.numpy(), (total - alpha).numpy()))
    start = {"w": torch.distributions.Dirichlet(torch.ones(3)).sample((2, CHAINS)).double()}
    return Case(log_density, start, {"w": truth}, {"data": alpha, "supports": {"w": constraints.simplex}})


CASES = [correlated_normals, students, mean_and_scale, hierarchy, shares]


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_draws_are_of_the_density(make):
    case = make()
    assert_agrees(case.draws(), case.truth)


def test_a_missing_determinant_of_the_map_is_noticed(monkeypatch):
    to_support = plain.to_support
    monkeypatch.setattr(plain, "to_support", lambda site, raw: (to_support(site, raw)[0], 0.0 * raw))
    case = mean_and_scale()  # without the determinant, that of the shares is improper
    with pytest.raises(AssertionError, match="beyond"):
        assert_agrees(case.draws(), case.truth)


def test_data_of_another_posterior_are_noticed(monkeypatch):
    rows = plain.PlainTarget.rows
    monkeypatch.setattr(plain.PlainTarget, "rows", lambda self, index: rows(self, (index + 1) % self.total))
    case = students()
    with pytest.raises(AssertionError, match="beyond"):
        assert_agrees(case.draws(), case.truth)


@pytest.mark.truth
def test_draws_of_a_compiled_step_are_of_the_density():
    case = mean_and_scale()
    assert_agrees(case.draws(compile=True), case.truth)
