"""Von Mises–Fisher distributions in every dimension, and what the published sampler returns in their place."""

from math import lgamma, log, pi

import numpy as np
import pytest
import torch
from agreement import limit
from scipy.special import ive
from torch import Tensor

from calibrant.distributions import (
    PublishedVonMisesFisher,
    VonMisesFisher,
    log_normalizer,
    mean_cosine,
    published_mean_cosine,
)

DIMENSIONS = (3, 10, 128, 512, 2048)
CONCENTRATIONS = (0.1, 1.0, 16.0, 128.0, 1000.0, 3000.0)
DRAWS = 4000
FEW_DRAWS = 1000  # from 1,000 dimensions on


def ratio(order: float, argument: float) -> float:
    """I_{ν+1}(κ)/I_ν(κ) by its continued fraction, from far enough out, which neither underflows nor cancels."""
    found = 0.0
    for place in range(int(argument) + 400, 0, -1):
        found = 1.0 / (2 * (order + place) / argument + found)
    return found


def true_mean(dimension: int, concentration: float) -> float:
    return ratio(dimension / 2 - 1, concentration)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mean_cosines_to_three_digits_and_more(dimension: int, dtype: torch.dtype) -> None:
    found = mean_cosine(dimension, torch.tensor(CONCENTRATIONS, dtype=dtype))
    wanted = [true_mean(dimension, k) for k in CONCENTRATIONS]
    assert found.dtype == dtype
    np.testing.assert_allclose(found, wanted, rtol=2e-4 if dtype == torch.float32 else 1e-8, atol=1e-6)


def test_the_continued_fraction_is_that_of_scipy_where_scipy_has_values() -> None:
    for dimension in DIMENSIONS:
        for k in CONCENTRATIONS:
            above, below = ive(dimension / 2, k), ive(dimension / 2 - 1, k)
            if above > 1e-290:
                assert true_mean(dimension, k) == pytest.approx(above / below, rel=1e-9)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_mean_and_the_variance_of_the_cosine(dimension: int, dtype: torch.dtype) -> None:
    drawn = cosines(VonMisesFisher, dimension, dtype)
    worst = deviation(drawn, dimension)
    assert worst < limit(2 * len(CONCENTRATIONS))
    narrow = drawn.mean(0) + 0.85 * (drawn - drawn.mean(0))
    assert deviation(narrow, dimension) > limit(2 * len(CONCENTRATIONS))  # planted: sds 15% too small


def cosines(family: type[VonMisesFisher], dimension: int, dtype: torch.dtype) -> Tensor:
    """Cosines of draws to a mean direction that is no axis, `(draw, concentration)`, in float64."""
    torch.manual_seed(dimension)
    direction = torch.nn.functional.normalize(torch.randn(dimension, dtype=dtype), dim=0)
    drawn = family(direction, torch.tensor(CONCENTRATIONS, dtype=dtype)).sample((_draws(dimension),))
    torch.testing.assert_close(drawn.norm(dim=-1), torch.ones(drawn.shape[:-1], dtype=dtype))
    return (drawn.double() * direction.double()).sum(-1)


def deviation(drawn: Tensor, dimension: int) -> float:
    """The largest |z| of the mean and the variance of the cosine."""
    means = torch.tensor([true_mean(dimension, k) for k in CONCENTRATIONS], dtype=torch.float64)
    kappa = torch.tensor(CONCENTRATIONS, dtype=torch.float64)
    variances = 1 - means.square() - (dimension - 1) / kappa * means
    squares = (drawn - means).square()
    z = [(part.mean(0) - wanted) / part.std(0) for part, wanted in ((drawn, means), (squares, variances))]
    return float(torch.stack(z).abs().max()) * len(drawn) ** 0.5


def _draws(dimension: int) -> int:
    return DRAWS if dimension < 1000 else FEW_DRAWS


def log_area(dimension: int) -> float:
    return log(2) + dimension / 2 * log(pi) - lgamma(dimension / 2)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_the_log_normaliser_is_the_area_at_zero_and_steps_from_dimension_to_dimension(dimension: int) -> None:
    kappa = torch.tensor(CONCENTRATIONS, dtype=torch.float64)
    zero = log_normalizer(dimension, torch.zeros((), dtype=torch.float64))
    assert float(zero) == pytest.approx(-log_area(dimension), rel=1e-10)
    step = log_normalizer(dimension + 2, kappa) - log_normalizer(dimension, kappa)
    wanted = [log(k) - log(2 * pi) - log(true_mean(dimension, k)) for k in CONCENTRATIONS]
    np.testing.assert_allclose(step, wanted, atol=1e-6)


@pytest.mark.parametrize("dimension", [3, 10, 128])
def test_the_log_normaliser_is_that_of_scipy_where_scipy_has_values(dimension: int) -> None:
    order = dimension / 2 - 1
    for k in CONCENTRATIONS:
        scaled = ive(order, k)
        if scaled > 1e-290:
            wanted = order * log(k) - dimension / 2 * log(2 * pi) - log(scaled) - k
            assert float(log_normalizer(dimension, torch.tensor(k).double())) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_the_slope_of_the_log_normaliser_is_minus_the_mean_cosine(dimension: int) -> None:
    kappa = torch.tensor(CONCENTRATIONS, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_normalizer(dimension, kappa).sum(), kappa)
    np.testing.assert_allclose(-slope, [true_mean(dimension, k) for k in CONCENTRATIONS], rtol=1e-7, atol=1e-9)


PUBLISHED = {  # (dimension, concentration): expected cosine, and that of the published sampler
    (10, 16.0): (0.751, 0.750),
    (10, 32.0): (0.867, 0.868),
    (128, 16.0): (0.123, -0.328),
    (128, 64.0): (0.415, 0.335),
    (512, 16.0): (0.031, -0.777),
    (512, 128.0): (0.236, 0.001),
    (512, 300.0): (0.462, 0.402),
    (512, 1000.0): (0.777, 0.773),
    (2048, 128.0): (0.062, -0.600),
    (2048, 1000.0): (0.407, 0.323),
    (2048, 3000.0): (0.715, 0.708),
}


def test_the_published_sampler_points_away_from_the_mean_direction_in_high_dimension() -> None:
    for (dimension, k), (true, published) in PUBLISHED.items():
        kappa = torch.tensor(k, dtype=torch.float64)
        assert float(mean_cosine(dimension, kappa)) == pytest.approx(true, abs=1e-3)
        assert float(published_mean_cosine(dimension, kappa)) == pytest.approx(published, abs=2e-3)


def test_its_draws_have_the_cosine_that_quadrature_predicts_and_fail_the_test_of_draws() -> None:
    torch.manual_seed(0)
    kappa, direction = torch.tensor([16.0, 128.0, 300.0]), torch.nn.functional.normalize(torch.ones(512), dim=0)
    drawn = (PublishedVonMisesFisher(direction, kappa).sample((DRAWS,)) @ direction).double()
    z = (drawn.mean(0) - published_mean_cosine(512, kappa)) / drawn.std(0) * DRAWS**0.5
    assert float(z.abs().max()) < limit(len(kappa))
    assert deviation(cosines(PublishedVonMisesFisher, 512, torch.float32), 512) > 10 * limit(2 * len(CONCENTRATIONS))


def test_it_is_exact_where_its_b_is_exact() -> None:
    kappa = torch.tensor([0.5, 4.0, 10.0], dtype=torch.float64)
    for dimension in (3, 10, 512):
        torch.testing.assert_close(
            published_mean_cosine(dimension, kappa), mean_cosine(dimension, kappa), atol=1e-8, rtol=0
        )


def test_its_gradient_is_that_of_the_path() -> None:
    kappa = torch.tensor([16.0, 30.0], requires_grad=True)
    family = PublishedVonMisesFisher(torch.nn.functional.normalize(torch.ones(10), dim=0), kappa)
    (slope,) = torch.autograd.grad(family.rsample((500,)).sum(), kappa)
    assert ((slope > 0) & slope.isfinite()).all()
