"""Credible-interval retrieval: brute force, coverage that is known, and planted defects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from agreement import limit

from calibrant.distributions import VonMisesFisher
from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import credible_retrieval
from calibrant.evaluation.representations import credible

LEVELS = (0.5, 0.9, 0.95)


def simulated(count: int, features: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Directions, concentrations, and a draw of each posterior as its match."""
    torch.manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(count, features).double(), dim=-1)
    kappa = 5 + 40 * torch.rand(count).double()
    return directions.numpy(), kappa.numpy(), VonMisesFisher(directions, kappa).sample().numpy()


@pytest.mark.parametrize("features", [3, 16, 128])
def test_draws_of_the_posterior_are_covered_as_often_as_the_level_says(features):
    count = 2000
    mu, kappa, z = simulated(count, features)
    right, doubled = (credible_retrieval(mu, k, z, match=np.arange(count), levels=LEVELS) for k in (kappa, 2 * kappa))
    level = np.array(LEVELS)
    error = np.sqrt(level * (1 - level) / count)
    assert (abs(right["coverage"].values - level) / error < limit(9)).all()
    assert ((right["coverage_low"] < level) & (right["coverage_high"] > level)).sum() >= 2
    assert ((level - doubled["coverage"].values) / error > limit(9)).all()  # planted: κ doubled
    assert (doubled["size_mean"] < right["size_mean"]).all()


@pytest.mark.parametrize("block", [1 << 25, 100], ids=["one block", "many blocks"])
def test_numbers_are_those_of_a_loop(monkeypatch, block):
    monkeypatch.setattr(credible, "_BLOCK", block)
    mu, kappa, z = simulated(40, 5)
    labels = np.arange(40) % 7
    names = np.array(list("abcdefg"))[labels]
    found = credible_retrieval(3 * mu, kappa, 2 * z, labels=(names, names), own=np.arange(40), levels=(0.8,)).isel(
        level=0
    )
    for query in range(40):
        inside = [i for i in range(40) if i != query and mu[query] @ z[i] >= float(found["threshold"][query])]
        mates = [i for i in range(40) if i != query and labels[i] == labels[query]]
        both = set(inside) & set(mates)
        assert float(found["size"][query]) == len(inside)
        assert float(found["covered"][query]) == pytest.approx(len(both) / len(mates))
        expected = len(both) / len(inside) if inside else math.nan
        assert float(found["precision"][query]) == pytest.approx(expected, nan_ok=True)
    assert float(found["coverage"]) == pytest.approx(float(found["covered"].mean()))
    assert float(found["size_median"]) == np.median(found["size"])


def test_a_query_in_its_own_database_is_no_match():
    mu, kappa, _ = simulated(300, 16)
    labels = np.arange(300) % 100
    honest, leaked = (
        credible_retrieval(mu, kappa, mu, labels=(labels, labels), own=own, levels=(0.9,))["coverage"].item()
        for own in (np.arange(300), None)
    )
    assert leaked > honest + 0.2  # planted: every query finds itself
    with pytest.raises(InferenceError, match="300 queries are their own match"):
        credible_retrieval(mu, kappa, mu, match=np.arange(300), own=np.arange(300))
    shuffled = credible_retrieval(mu, kappa, mu, match=np.roll(np.arange(300), 1), own=np.arange(300), levels=(0.9,))
    assert shuffled["coverage"].item() < 0.3


def test_queries_without_a_match_do_not_count():
    mu, kappa, z = simulated(50, 4)
    found = credible_retrieval(mu, kappa, z, labels=(np.arange(50), np.arange(50) % 10), levels=(0.5,))
    assert np.isnan(found["covered"].values[0, 10:]).all()
    assert float(found["coverage"][0]) == pytest.approx(found["covered"].values[0, :10].mean())


def test_refusals_say_what_to_do():
    mu, kappa, z = simulated(10, 4)
    every = np.arange(10)
    with pytest.raises(InferenceError, match="give either match="):
        credible_retrieval(mu, kappa, z)
    with pytest.raises(InferenceError, match="give either match="):
        credible_retrieval(mu, kappa, z, match=every, labels=(every, every))
    with pytest.raises(DataError, match="not an uncertainty"):
        credible_retrieval(mu, -kappa, z, match=every)
    with pytest.raises(InferenceError, match="position from 0 to 9"):
        credible_retrieval(mu, kappa, z, match=every + 1)
    with pytest.raises(InferenceError, match="between 0 and 1"):
        credible_retrieval(mu, kappa, z, match=every, levels=(95,))
    with pytest.raises(DataError, match="have no direction"):
        credible_retrieval(0 * mu, kappa, z, match=every)
    with pytest.raises(DataError, match="from one representation"):
        credible_retrieval(mu[:, :3], kappa, z, match=every)
    with pytest.raises(DataError, match=r"labels of the database have the shape .*10 images"):
        credible_retrieval(mu, kappa, z, labels=(every, every[:5]))
