"""Error versus reject: brute force over numbers of kept images, known areas, planted orders."""

from __future__ import annotations

import numpy as np
import pytest
from agreement import limit
from scipy.stats import binom

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import reject_curve
from calibrant.evaluation.representations.rejecting import area_of_order, kept_error

FEW = {"resamples": 100}


def area(errors: np.ndarray, by: np.ndarray, seed: int | None = None) -> float:
    """Mean over numbers of kept images of their mean error, image by image; ties in an order by `seed`."""
    rng = np.random.default_rng(seed)
    order = sorted(range(len(errors)), key=lambda i: (by[i], rng.random()))
    return float(np.mean([np.mean([errors[i] for i in order[: m + 1]]) for m in range(len(order))]))


def test_areas_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    errors, u = rng.gamma(1.0, size=60), rng.normal(size=60)
    found = reject_curve(errors, u, **FEW)
    assert float(found["area"]) == pytest.approx(area(errors, u))
    assert float(found["area_oracle"]) == pytest.approx(area(errors, errors))
    assert float(found["area_random"]) == pytest.approx(errors.mean())
    wanted = (errors.mean() - area(errors, u)) / (errors.mean() - area(errors, errors))
    assert float(found["normalised_area"]) == pytest.approx(wanted)
    order = np.argsort(u)
    for share in (0.0, 0.25, 0.5, 0.9):
        kept = order[: round(60 * (1 - share))]
        assert float(found["error"].sel(rejected=share)) == pytest.approx(errors[kept].mean())


def test_ties_are_the_mean_over_random_orders():
    rng = np.random.default_rng(0)
    errors, u = (rng.random(40) < 0.4).astype(float), rng.integers(0, 4, 40).astype(float)
    found = float(reject_curve(errors, u, **FEW)["area"])
    orders = [area(errors, u, seed) for seed in range(400)]
    assert abs(found - np.mean(orders)) < limit(1) * np.std(orders) / 20


def test_resampled_areas_are_those_of_repeated_images():

    rng = np.random.default_rng(0)
    errors, u, counts = rng.gamma(1.0, size=30), rng.normal(size=30), rng.poisson(1.0, (5, 30)).astype(float)
    shares = np.array([0.0, 0.3, 0.7])
    ours, kept = area_of_order(errors, u)(counts), kept_error(errors, u, shares)(counts)
    for row, count in enumerate(counts):
        repeated = np.repeat(np.arange(30), count.astype(int))
        whole = reject_curve(errors[repeated], u[repeated], shares=shares, **FEW)
        assert ours[row] == pytest.approx(float(whole["area"]))
        assert kept[row] == pytest.approx(whole["error"].values)


def test_known_values():
    """Half of the images are wrong. The oracle keeps only right ones down to one half."""
    errors = np.repeat([0.0, 1.0], 500)
    found = reject_curve(errors, errors, **FEW)
    assert float(found["normalised_area"]) == 1.0
    kept = 1 - found["rejected"].values
    assert found["error"].values == pytest.approx(np.maximum(0.0, 1 - 0.5 / kept))
    # ∫ max(0, 1 − 1/(2x)) dx from 0 to 1
    assert float(found["area"]) == pytest.approx(0.5 - 0.5 * np.log(2), abs=2e-3)
    assert float(reject_curve(errors, np.ones(1000), **FEW)["normalised_area"]) == pytest.approx(0.0)


def test_swapped_signs_and_shuffled_uncertainties_are_seen():
    rng = np.random.default_rng(0)
    u = rng.normal(size=500)
    errors = rng.random(500) < 1 / (1 + np.exp(-2 * u))
    found, swapped, shuffled = (reject_curve(errors, by, resamples=300) for by in (u, -u, rng.permutation(u)))
    assert float(found["normalised_area_low"]) > 0.3
    assert float(swapped["normalised_area_high"]) < 0
    assert abs(float(shuffled["normalised_area"])) < limit(1) * float(shuffled["normalised_area_se"])


def test_equal_errors_have_no_normalised_area():
    found = reject_curve(np.ones(10), np.arange(10.0), **FEW)
    assert float(found["area"]) == 1.0
    assert np.isnan(float(found["normalised_area"]))


def test_refusals():
    with pytest.raises(DataError, match="errors: give a finite error"):
        reject_curve(np.array([1.0, np.inf]), np.ones(2))
    with pytest.raises(DataError, match="give one number for each of the 2 images"):
        reject_curve(np.ones(2), np.ones(3))
    with pytest.raises(InferenceError, match="from 0 to below 1"):
        reject_curve(np.ones(2), np.ones(2), shares=[0.5, 1.0])
    with pytest.raises(InferenceError, match="needs the class of each image: give labels"):
        reject_curve(np.ones(2), np.ones(2), cluster="class")


@pytest.mark.slow
def test_intervals_cover_the_area_of_many_images():
    """At least 92% of them; a curve of 300 images has a bias that is small beside its error."""

    def drawn(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        u = rng.normal(size=count)
        return rng.random(count) < 1 / (1 + np.exp(1 - 1.5 * u)), u

    rng, names = np.random.default_rng(0), ("area", "area_random", "normalised_area")
    many, hits = reject_curve(*drawn(200_000, rng), **FEW), dict.fromkeys(names, 0)
    for _ in range(300):
        found = reject_curve(*drawn(300, rng), resamples=300)
        for name in names:
            hits[name] += bool(found[f"{name}_low"] <= many[name] <= found[f"{name}_high"])
    assert min(hits.values()) >= binom.ppf(1e-3, 300, 0.92), hits
