"""Divisive normalisation on responses that are normalised, linear or noise, with known weights; and bow ties."""

import math

import numpy as np
import pytest
import torch
from agreement import limit
from contrast_models import ExactGuide, model
from scipy.optimize import brentq
from scipy.stats import norm

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation import (
    bow_tie,
    divisive_normalisation,
    filter_responses,
    posterior_means,
    weights_distance,
    white_noise_fields,
)

UNITS, IMAGES = 6, 1500


def drives(count=IMAGES, units=UNITS, seed=0, strength=0.8):
    """Linear responses that vary together: Normals with one scale an image."""
    generator = np.random.default_rng(seed)
    scale = np.exp(strength * generator.normal(size=(count, 1)))
    found = scale * generator.normal(size=(count, units))
    return found / found.std(0)


def normalised(linear, weights, variance=1.0):
    return linear / np.sqrt(variance + linear**2 @ weights)


def fitted(linear, response, **options):
    return divisive_normalisation(linear, response, **{"folds": 2, **options})


# -- known truth -------------------------------------------------------------------------------------------------------


def test_weights_of_responses_that_are_normalised_are_found():
    """Unit 1 is divided by unit 4 alone, all others by themselves: the weights' two dimensions are not confused."""
    linear, weights = drives(1200), 0.3 * np.eye(UNITS)
    weights[1, 1], weights[4, 1] = 0.0, 2.0
    response = normalised(linear, weights)
    found = fitted(linear, response)
    assert float(found["explained_variance"].sel(model="divisive")) > 0.99
    assert float(found["gain"]) > 5 * float(found["gain_se"])
    ours = found["weights"].mean("fit").values / response.std(0) ** 2  # in units of the responses as they are
    large = np.argwhere(ours > 0.1).tolist()
    assert [4, 1] in large
    assert [1, 4] not in large
    assert ours[4, 1] == pytest.approx(2.0, rel=0.25)
    assert np.diag(ours)[[0, 2, 3, 5]] == pytest.approx(0.3, rel=0.3)


def test_an_exact_gaussian_scale_mixture_is_nearly_divisive():
    """Its posterior means are filter outputs over a function of their power: the linear control misses much of them."""
    target = model("ea-vae")
    x = cal.program.sample_prior(target, 1200, seed=1)["x"]
    means = posterior_means(target, ExactGuide(target), {"x": x}, draws=2)
    response = means["mean"].sel(source="exact").values
    linear = filter_responses(model("vae").decoder.weight.detach().T.reshape(5, 1, 4, 4), x)
    fields = white_noise_fields(target, ExactGuide(target), {"x": x}, noise=0.3, draws=2)
    drive = filter_responses(fields["field"].sel(source="exact").values, x)
    for used in (drive, linear):
        assert used.std(0) == pytest.approx(1.0)
    found = fitted(drive, response)
    assert float(found["gain"]) > 5 * float(found["gain_se"])
    assert float(found["explained_variance"].sel(model="divisive")) > 0.9
    assert bow_tie(response)["flare"] < 0.5 * bow_tie(drive)["flare"]


def test_a_linear_vae_gains_nothing_from_division():
    target = model("vae")
    x = torch.randn(800, 1, generator=torch.Generator().manual_seed(0)).exp().reshape(-1, 1, 1, 1) * torch.randn(
        800, 1, 4, 4, generator=torch.Generator().manual_seed(1)
    )
    means = posterior_means(target, ExactGuide(target), {"x": x}, draws=60)
    fields = white_noise_fields(target, ExactGuide(target), {"x": x}, draws=2)
    drive = filter_responses(fields["field"].sel(source="exact").values, x)
    exact = fitted(drive, means["mean"].sel(source="exact"))
    assert exact["explained_variance"].values[0] == pytest.approx(1.0, abs=1e-6)
    assert float(exact["gain"]) <= 1e-6
    guide = means.sel(source="amortized")
    noisy = fitted(drive, guide["mean"], response_error=guide["mean_error"])
    assert abs(noisy["gain"]) < limit(1) * noisy["gain_se"]
    assert abs(noisy["explained_variance"][0] - 1) < limit(1) * noisy["explained_variance_se"][0]
    plain = fitted(drive, guide["mean"])  # the draws' noise is counted as unexplained
    assert (1 - plain["explained_variance"][0]) > 5 * abs(1 - noisy["explained_variance"][0])


def test_errors_of_the_gain_are_right_where_there_is_none():
    squares = []
    for seed in range(24):
        generator = np.random.default_rng(100 + seed)
        linear = drives(300, 4, seed)
        found = fitted(linear, linear + generator.normal(size=linear.shape), epochs=20, seed=seed)
        assert float(found["gain"]) < limit(24) * float(found["gain_se"])
        truth = 1 - (1 / (linear + generator.normal(size=linear.shape)).var(0)).mean()
        squares.append(float((found["explained_variance"][0] - truth) / found["explained_variance_se"][0]) ** 2)
    assert np.mean(squares) < 1 + limit(1) * math.sqrt(2 / 24)


def test_a_weak_pool_is_seen():
    linear = drives(3000, strength=0.4)
    generator = np.random.default_rng(5)
    response = normalised(linear, np.full((UNITS, UNITS), 0.05)) + 0.5 * generator.normal(size=linear.shape)
    found = fitted(linear, response)
    assert float(found["gain"]) > limit(1) * float(found["gain_se"])


def test_responses_of_noise_are_not_explained():
    linear = drives(400, 5)
    noise = np.random.default_rng(3).normal(size=linear.shape)
    found = fitted(linear, noise)
    assert float(found["explained_variance"][1]) < 0.05  # within the images of a fit it would be positive
    assert found["predicted"].shape == (2, 400, 5)


def test_one_seed_gives_one_result():
    linear = drives(200, 3)
    response = normalised(linear, np.full((3, 3), 0.3))
    first, again, other = (fitted(linear, response, epochs=3, seed=seed) for seed in (0, 0, 1))
    assert first.identical(again)
    assert not np.array_equal(first["weights"], other["weights"])


def test_fits_of_one_pool_are_as_close_as_their_floor():
    linear, generator = drives(600, strength=0.4), np.random.default_rng(4)
    pools = [generator.lognormal(centre, 1.0, size=(UNITS, UNITS)) for centre in (-2.0, -4.0)]
    first, second = (fitted(linear, normalised(linear, pool)) for pool in pools)
    again = fitted(linear, normalised(linear, pools[0]), seed=1)
    near, far = weights_distance(first, again), weights_distance(first, second)
    assert float(near["distance"]) < 1.5 * float(near["floor"])
    assert float(far["distance"]) > 2 * float(far["floor"])
    assert float(far["p_value"]) < 1e-4
    assert float(far["distance"]) == pytest.approx(float(weights_distance(second, first)["distance"]))


REFUSED = {
    "shape": ({"response": np.ones((100, 2))}, "arrays .image, unit. of one shape"),
    "finite": ({"response": np.full((100, 3), np.nan)}, "leave these images out"),
    "flat": ({"response": np.ones((100, 3))}, r"responses of the units \[0, 1, 2\]"),
    "folds": ({"folds": 1}, "two folds or more"),
    "epochs": ({"epochs": 0}, "give positive numbers"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_fitted_is_refused(change, message):
    linear = drives(100, 3)
    with pytest.raises(InferenceError, match=message):
        divisive_normalisation(**{"drive": linear, "response": linear, **change})


def test_filters_have_the_shape_of_the_images():
    with pytest.raises(InferenceError, match="one event shape"):
        filter_responses(np.ones((3, 1, 4, 4)), np.ones((9, 16)))
    with pytest.raises(InferenceError, match=r"filters of the units \[1\]"):
        filter_responses(np.stack([np.eye(3), np.zeros((3, 3))]), np.random.default_rng(0).normal(size=(9, 3, 3)))


# -- bow ties ----------------------------------------------------------------------------------------------------------


def two_scales(count, low, high, units=5):
    generator = np.random.default_rng(2)
    return generator.choice([low, high], size=(count, 1)) * generator.normal(size=(count, units))


def test_the_bow_tie_of_two_scales_is_known():
    """Given that another unit lies in a part, the scale has known probabilities, and the variance is their mean."""
    low, high = 0.5, 2.0
    found = bow_tie(two_scales(40_000, low, high))

    def below(place):
        return 0.5 * (norm.cdf(place / low) + norm.cdf(place / high))

    quarter = brentq(lambda place: below(place) - 0.25, -5, 0)
    tail = np.array([0.5 * norm.cdf(quarter / scale) for scale in (low, high)])
    squares = np.array([low**2, high**2])
    flank, centre = (np.sqrt((part * squares).sum() / part.sum()) for part in (tail, 0.5 - 2 * tail))
    assert abs(found["flare"] - (flank / centre - 1)) < limit(1) * found["flare_se"]
    total = np.sqrt(squares.mean())
    assert found["sd"].sel(part="central").mean().item() == pytest.approx(centre / total, rel=0.02)
    assert found["sd"].sel(part="upper").mean().item() == pytest.approx(flank / total, rel=0.02)
    assert float(found["effect"]) > 10


def test_independent_responses_have_no_bow_tie():
    z = []
    for seed in range(20):
        found = bow_tie(np.random.default_rng(seed).normal(size=(600, 4)))
        z.append([float(found[name] / found[f"{name}_se"]) for name in ("flare", "effect")])
    assert np.abs(z).max() < 5.5  # Student's t of 19 blocks
    assert np.sqrt(np.mean(np.square(z))) < 1.6
    assert np.isnan(found["sd"].sel(part="central").values.diagonal()).all()


def test_the_conditional_histogram():
    found = bow_tie(two_scales(20_000, 0.5, 2.0))["histogram"]
    assert found.sum("bin").values == pytest.approx(1.0)
    wide, narrow = (float((found[:, place] * found["bin"] ** 2).sum()) for place in (2, 10))
    assert wide > 1.5 * narrow


def test_few_or_flat_responses_are_refused():
    with pytest.raises(InferenceError, match="200 images or more"):
        bow_tie(np.random.default_rng(0).normal(size=(100, 4)))
    with pytest.raises(InferenceError, match="leave out"):
        bow_tie(np.ones((300, 4)))
