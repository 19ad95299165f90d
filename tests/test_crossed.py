"""Intervals over repetitions and images together: repeated experiments of known truth, and DeLong's variance."""

from __future__ import annotations

import math

import numpy as np
import pytest
from agreement import limit

from calibrant.evaluation.representations.crossed import crossed_difference, crossed_share, ranked

COUNT = 400  # repeated experiments


def crossed(rng: np.random.Generator, repeats: int, images: int) -> np.ndarray:
    """Values with the mean 0 and variances of repetitions, images and the rest."""
    return rng.normal(0, 0.3, (repeats, 1)) + rng.normal(0, 1, images) + rng.normal(0, 1, (repeats, images))


@pytest.mark.parametrize(("repeats", "images"), [(1, 80), (8, 60), (20, 200)])
def test_intervals_of_differences_hold_the_mean_as_often_as_they_say(repeats, images):
    rng = np.random.default_rng(repeats)
    sets = [crossed(rng, repeats, images) if repeats > 1 else rng.normal(size=(1, images)) for _ in range(COUNT)]
    found = [crossed_difference(values) for values in sets]
    missed = np.mean([not (one.low <= 0 <= one.high) for one in found])
    assert (missed - 0.05) / math.sqrt(0.05 * 0.95 / COUNT) < limit(6)
    if repeats > 1:
        pooled = [abs(values.mean()) > 1.96 * values.std() / math.sqrt(values.size) for values in sets]
        assert (np.mean(pooled) - 0.05) / math.sqrt(0.05 * 0.95 / COUNT) > limit(6)  # planted: all values independent


def test_intervals_of_shares_hold_the_share_as_often_as_they_say():
    rng = np.random.default_rng(0)
    missed = []
    for _ in range(COUNT):
        hard = rng.normal(0, 1, 100) + rng.normal(0, 0.3, (10, 1))
        hits = (rng.normal(size=(10, 100)) + hard > 0).astype(float)
        found = crossed_share(hits)
        missed.append(not (found.low <= 0.5 <= found.high))
    assert (np.mean(missed) - 0.05) / math.sqrt(0.05 * 0.95 / COUNT) < limit(1)


def test_images_that_take_no_part_are_left_out():
    values = np.array([[1.0, 0.0, np.nan, 1.0], [np.nan, 0.0, np.nan, 1.0]])
    found = crossed_share(values)
    assert found.value == pytest.approx(0.6)
    assert found.se > 0
    assert np.isnan(crossed_share(np.full((3, 4), np.nan)).value)
    assert crossed_share(np.ones((2, 50))).low == pytest.approx(50 / (50 + 1.959964**2))


def test_ranks_have_the_mean_and_the_error_of_an_auroc():
    rng = np.random.default_rng(3)
    u, correct = rng.integers(0, 6, 70).astype(float), rng.random(70) < 0.6
    values = ranked(u, correct)
    pairs = (u[~correct, None] > u[correct]) + 0.5 * (u[~correct, None] == u[correct])
    assert values.mean() == pytest.approx(pairs.mean())
    delong = pairs.mean(1).var() / len(pairs) + pairs.mean(0).var() / pairs.shape[1]
    assert values.var() / 70 == pytest.approx(delong)
    assert np.isnan(ranked(u, np.arange(70) > 0)).all()
