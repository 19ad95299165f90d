"""Statistics of counts against repeated data, and the coverage of bootstrap intervals where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from agreement import limit
from scipy.special import ndtr
from scipy.stats import binom, spearmanr

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.counted import counted_auroc, counted_mean, counted_spearman
from calibrant.evaluation.statistics.resampling import Estimate, bootstrap
from calibrant.evaluation.statistics.separation import separation

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(1.0, (6, 40)).astype(float)


def repeated(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.repeat(values, counts.astype(int), axis=0)


@pytest.mark.parametrize("decimals", [0, 9])
def test_counts_give_what_repeated_images_give(decimals):
    x, y = RNG.normal(size=(2, 40)).round(decimals)
    positive = RNG.random(40) < 0.4
    means, aurocs, ranks = (
        statistic(COUNTS)
        for statistic in (counted_mean(np.stack([x, y], 1)), counted_auroc(x, positive), counted_spearman(x, y))
    )
    for place, counts in enumerate(COUNTS):
        some_x, some_y, marked = (repeated(values, counts) for values in (x, y, positive))
        assert means[place] == pytest.approx([some_x.mean(), some_y.mean()])
        assert aurocs[place] == pytest.approx(separation(some_x[marked], some_x[~marked]).auroc)
        assert ranks[place] == pytest.approx(spearmanr(some_x, some_y).statistic)


def test_correlation_within_classes_is_a_loop_over_classes():
    x, y, classes = RNG.normal(size=40).round(1), RNG.normal(size=40).round(1), RNG.integers(0, 5, 40)
    found = counted_spearman(x, y, classes)(COUNTS)
    for place, counts in enumerate(COUNTS):
        sums = np.zeros(3)
        for label in range(5):
            some = [repeated(values[classes == label], counts[classes == label]) for values in (x, y)]
            a, b = ([(np.sum(v < one) + np.sum(v <= one)) / 2 / len(v) - 0.5 for one in v] for v in some)
            sums += [np.dot(a, b), np.dot(a, a), np.dot(b, b)]
        assert found[place] == pytest.approx(sums[0] / np.sqrt(sums[1] * sums[2]))
    alone = counted_spearman(x, y, np.zeros(40, dtype=int))(COUNTS)
    assert alone == pytest.approx(counted_spearman(x, y)(COUNTS))


def test_what_is_not_defined_is_nan():
    ones = np.ones((1, 4))
    assert np.isnan(counted_auroc(np.arange(4.0), np.ones(4, bool))(ones)).all()
    assert np.isnan(counted_spearman(np.ones(4), np.arange(4))(ones)).all()
    few = bootstrap(counted_mean(np.arange(4.0)), [np.zeros(4, dtype=int)], 100, 0)
    assert float(few.value) == 1.5
    assert np.isnan([few.se, few.low, few.high]).all()
    with pytest.raises(InferenceError, match="resamples=99"):
        bootstrap(counted_mean(np.arange(4.0)), [np.arange(4)], 99, 0)


def test_intervals_of_a_mean_are_those_of_students_t():
    x = RNG.normal(size=8)
    found = bootstrap(counted_mean(x), [np.arange(8)], 40_000, 0)
    half = 2.3646 * x.std(ddof=1) / np.sqrt(8)
    assert float(found.se) == pytest.approx(x.std(ddof=1) / np.sqrt(8), rel=0.02)
    assert float(found.high - found.low) == pytest.approx(2 * half, rel=0.06)


def test_sets_are_resampled_on_their_own_and_clusters_as_a_whole():
    seen: list[np.ndarray] = []

    def watch(counts: np.ndarray) -> np.ndarray:
        seen.append(counts)
        return counts.mean(1)

    bootstrap(watch, [np.arange(10), np.repeat([0, 1, 2], 4)], 200, 0)
    counts = seen[1]
    assert (counts[:, :10].sum(1) == 10).all()
    assert (counts[:, 10:].sum(1) == 12).all()
    assert (np.ptp(counts[:, 10:].reshape(-1, 3, 4), axis=2) == 0).all()


# -- coverage ----------------------------------------------------------------------------------------------------------

REPETITIONS = 300


def drawn(kind: str, rng: np.random.Generator) -> tuple[Estimate, float]:
    """An estimate from simulated images, and the truth."""
    if kind == "mean of clusters":  # 25 classes, whose shares differ
        classes = np.arange(500) % 25
        x = rng.random(500) < ndtr(rng.normal(0, 1, 25))[classes]
        return bootstrap(counted_mean(x), [classes], 400, int(rng.integers(1 << 30))), 0.5
    if kind == "auroc":
        positive = rng.random(150) < 0.6
        score = rng.normal(size=150) + positive
        truth = float(ndtr(1 / np.sqrt(2)))
        return bootstrap(counted_auroc(score, positive), [np.arange(150)], 400, int(rng.integers(1 << 30))), truth
    rho = 0.5
    x, y = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 150).T
    truth = 6 / np.pi * np.arcsin(rho / 2)
    return bootstrap(counted_spearman(x, y), [np.arange(150)], 400, int(rng.integers(1 << 30))), truth


def covers(kind: str, repetitions: int) -> int:
    rng, hits = np.random.default_rng(1), 0
    for _ in range(repetitions):
        found, truth = drawn(kind, rng)
        hits += bool(found.low <= truth <= found.high)
    return hits


@pytest.mark.parametrize("kind", ["mean of clusters", "auroc", "spearman"])
def test_intervals_cover_the_truth(kind):
    """At least 92% of them: fewer than the lower limit would be seen by chance once in 1,000."""
    assert covers(kind, REPETITIONS) >= binom.ppf(1e-3, REPETITIONS, 0.92)


def test_intervals_over_images_do_not_cover_where_classes_differ():
    """The planted defect: images of a class are not independent."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        classes = np.arange(500) % 25
        x = rng.random(500) < ndtr(rng.normal(0, 1, 25))[classes]
        found = bootstrap(counted_mean(x), [np.arange(500)], 200, int(rng.integers(1 << 30)))
        hits += bool(found.low <= 0.5 <= found.high)
    assert hits < binom.ppf(1e-3, 100, 0.92)


def test_standard_errors_are_the_spread_of_estimates():
    rng = np.random.default_rng(2)
    found = [drawn("auroc", rng)[0] for _ in range(100)]
    spread, mean = np.std([float(one.value) for one in found], ddof=1), np.mean([float(one.se) for one in found])
    assert abs(mean / spread - 1) < limit(1) / np.sqrt(200)
