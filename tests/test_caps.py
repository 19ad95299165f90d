"""Caps of von Mises–Fisher distributions: closed forms, Beta numbers, quadrature, draws, and a planted defect."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from agreement import limit
from scipy import integrate, stats

from calibrant.distributions import VonMisesFisher, cap_cosine, cap_probability

LEVELS = (1e-4, 0.05, 0.5, 0.95, 1 - 1e-4)
CONCENTRATIONS = (0.0, 0.1, 1.0, 16.0, 300.0, 3000.0)


@pytest.mark.parametrize("level", LEVELS)
def test_on_the_sphere_caps_have_a_closed_form(level):
    kappa = np.array(CONCENTRATIONS[1:])
    expected = 1 + np.log1p(level * np.expm1(-2 * kappa)) / kappa
    found = cap_cosine(3, torch.tensor(kappa), level)
    assert found.numpy() == pytest.approx(expected, abs=1e-9)
    assert cap_probability(3, torch.tensor(kappa), found).numpy() == pytest.approx(np.full(len(kappa), level), abs=1e-9)


@pytest.mark.parametrize("p", [2, 3, 16, 512])
def test_caps_of_the_uniform_distribution_follow_a_beta(p):
    m = (p - 1) / 2
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    expected = 2 * stats.beta.isf(LEVELS, m, m) - 1
    assert cap_cosine(p, torch.tensor(0.0), levels).numpy() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("p", "kappa"), [(2, 3.0), (5, 0.5), (16, 20.0), (512, 300.0)])
def test_caps_agree_with_quadrature(p, kappa):
    def log_density(w):
        return kappa * w + (p - 3) / 2 * np.log1p(-w * w)

    grid = np.linspace(-1, 1, 10_001)[1:-1]
    highest = log_density(grid).max()
    ends = [-1.0, float(grid[log_density(grid).argmax()]), 1.0]

    def mass(low, high):
        return integrate.quad(lambda w: np.exp(log_density(w) - highest), low, high, epsabs=1e-13, limit=500)[0]

    total = mass(ends[0], ends[1]) + mass(ends[1], ends[2])
    for level in (0.05, 0.5, 0.95):
        edge = cap_cosine(p, torch.tensor(kappa), level).item()
        middle = (edge + 1) / 2
        assert (mass(edge, middle) + mass(middle, 1.0)) / total == pytest.approx(level, abs=1e-6)


@pytest.mark.parametrize(("p", "kappa"), [(3, 5.0), (16, 20.0), (512, 300.0)])
def test_draws_lie_in_their_caps_as_often_as_the_level_says(p, kappa):
    torch.manual_seed(0)
    count = 4000
    direction = torch.nn.functional.normalize(torch.ones(p, dtype=torch.float64), dim=0)
    draws = VonMisesFisher(direction, torch.tensor(kappa, dtype=torch.float64).expand(count)).sample()
    cosines = draws @ direction
    for level in (0.05, 0.5, 0.95):
        right, doubled = (cap_cosine(p, torch.tensor(k), level) for k in (kappa, 2 * kappa))
        scores = [
            ((cosines >= edge).double().mean().item() - level) / math.sqrt(level * (1 - level) / count)
            for edge in (right, doubled)
        ]
        assert abs(scores[0]) < limit(18)
        assert abs(scores[1]) > limit(18)
    inside = cap_probability(p, torch.tensor(kappa), cosines)
    assert stats.kstest(inside.numpy(), "uniform").pvalue > 1e-5


def test_shapes_broadcast_and_edges_are_kept():
    edges = cap_cosine(8, torch.rand(5, 1) * 100, torch.tensor([0.5, 0.9, 0.99]))
    assert edges.shape == (5, 3)
    assert edges.dtype == torch.float64
    assert (edges.diff(dim=1) < 0).all()
    assert cap_cosine(8, torch.zeros(0), 0.5).shape == (0,)
    around = cap_probability(8, torch.tensor(10.0), torch.tensor([1.0, -1.0]))
    assert around.tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
