"""The probability that two von Mises–Fisher latents match: beside quadrature, draws and finite differences."""

from math import log, pi

import pytest
import torch
from agreement import limit
from scipy import integrate, special

from calibrant.distributions import VonMisesFisher, match_constant, match_probability

K = 20.0
CASES = [(0.9, 16.0, 32.0), (0.2, 1.0, 3.0), (0.6, 60.0, 200.0)]


def on_the_circle(cosine, first, second, slope):
    """E σ(k cos(a − b) + c) over two von Mises angles, on a grid."""
    angle = torch.arange(800, dtype=torch.float64) * 2 * pi / 800
    one = (first * angle.cos()).softmax(0)
    two = (second * (angle - torch.tensor(cosine).double().arccos()).cos()).softmax(0)
    match = (slope * (angle[:, None] - angle).cos() + match_constant(2, slope)).sigmoid()
    return float(one @ match @ two)


def given(m, cosine, first, second, dtype=torch.float64, **options):
    values = (torch.tensor([value], dtype=dtype) for value in (cosine, first, second))
    return match_probability(*values, m, K, **options)


@pytest.mark.parametrize("case", CASES)
def test_on_the_circle_it_is_the_integral(case):
    truth = on_the_circle(*case, K)
    assert abs(float(given(2, *case)) - truth) < 1e-6
    assert abs(float(given(2, *case, dtype=torch.float32)) - truth) < 1e-5


@pytest.mark.parametrize("m", [3, 10])
def test_at_one_point_it_is_a_single_integral(m):
    """With κ₂ huge, z₂ = μ₂, and with μ₁ = μ₂ only the cosine of z₁ is left."""
    kappa, order = 20.0, m / 2 - 1
    density = lambda t: torch.tensor(kappa * (t - 1)).exp().item() * (1 - t * t) ** (order - 0.5)  # noqa: E731
    match = lambda t: special.expit(K * t + match_constant(m, K)) * density(t)  # noqa: E731
    truth = integrate.quad(match, -1, 1)[0] / integrate.quad(density, -1, 1)[0]
    assert abs(float(given(m, 1.0, kappa, 1e6, largest=2e3)) - truth) < 1e-4


@pytest.mark.parametrize("m", [3, 10, 128])
def test_it_is_the_mean_over_draws(m):
    torch.manual_seed(0)
    scores, other = [], []
    for cosine, first, second in CASES:
        mu = torch.zeros(2, m, dtype=torch.float64)
        mu[:, 0] = torch.tensor([1.0, cosine])
        mu[1, 1] = (1 - cosine**2) ** 0.5
        z = VonMisesFisher(mu, torch.tensor([first, second]).double()).sample((4000,))
        match = (K * z.prod(1).sum(-1) + match_constant(m, K)).sigmoid()
        error = match.std() / len(match) ** 0.5
        scores.append(float((match.mean() - given(m, cosine, first, second)).abs() / error))
        other.append(float((match.mean() - given(m, cosine, first / 2, second / 2)).abs() / error))
    assert max(scores) < limit(len(CASES)), scores
    assert max(other) > limit(len(CASES)), other


def test_its_derivatives_are_those_of_the_series():
    values = tuple(torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.4, 12.0, 25.0))
    assert torch.autograd.gradcheck(lambda *at: match_probability(*at, 10, K), values, eps=1e-5, atol=1e-8)


@pytest.mark.parametrize("m", [2, 10, 128, 1280])
def test_the_constant_is_the_mean_over_uniform_directions(m):
    mean = special.hyp0f1(m / 2, K**2 / 4)  # E exp(k t) of the cosine t to a uniform direction
    assert abs(match_constant(m, K) + log(mean)) < 1e-9
    assert match_constant(m, 0) == 0
