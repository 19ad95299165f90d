"""AUROC with intervals: by hand, at the edges, and in repeated samples of known truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from agreement import limit
from scipy.special import ndtr, ndtri

from calibrant.evaluation.statistics.separation import (
    LEVEL,
    Separation,
    difference,
    placements,
    pooled,
    separation,
    stratified,
)
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
Sampler = Callable[[np.random.Generator, int, int], tuple[Array, Array]]


def by_pairs(positive: Array, negative: Array) -> Array:
    """1, ½ or 0 for every pair, `(positive, negative)`."""
    return (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)


@pytest.mark.parametrize("values", [4, 10_000], ids=["with ties", "without"])
def test_the_auroc_and_its_error_are_those_of_all_pairs(values):
    rng = np.random.default_rng(stream(0, "pairs", values))
    positive, negative = rng.integers(1, values + 1, 30).astype(float), rng.integers(0, values, 20).astype(float)
    pairs = by_pairs(positive, negative)
    found = separation(positive, negative)
    assert found.auroc == pytest.approx(pairs.mean())
    assert found.se**2 == pytest.approx(pairs.mean(1).var(ddof=1) / 30 + pairs.mean(0).var(ddof=1) / 20)
    assert found.low < found.auroc < found.high
    other = separation(negative, positive)
    assert (other.auroc, other.low, other.high) == pytest.approx((1 - found.auroc, 1 - found.high, 1 - found.low))


def test_sets_that_do_not_overlap_leave_room_for_an_overlap():
    apart = separation(np.arange(50.0) + 100, np.arange(64.0))
    assert (apart.auroc, apart.high) == pytest.approx((1.0, 1.0))
    assert apart.se == 0
    assert apart.low == pytest.approx(50 / (50 + ndtri(0.975) ** 2))  # Wilson's bound for 50 of 50
    assert separation(np.arange(64.0), np.arange(50.0) + 100).auroc == 0
    assert separation(np.ones(5), np.ones(9)).auroc == 0.5


def test_images_without_a_score_are_left_out_and_two_are_needed():
    scores = np.array([1.0, np.nan, 2.0, np.nan])
    assert separation(scores, np.array([0.0, 1.5])) == separation(scores[[0, 2]], np.array([0.0, 1.5]))
    assert all(math.isnan(value) for value in separation(scores[:2], scores))
    assert all(math.isnan(value) for value in pooled([]))


def binormal(auroc: float) -> Sampler:
    shift = math.sqrt(2) * float(ndtri(auroc))
    return lambda rng, n, m: (rng.normal(shift, 1, n), rng.normal(0, 1, m))


def narrow(auroc: float) -> Sampler:
    """Positive scores that are nearly alike: the largest variance that an AUROC can have."""
    return lambda rng, n, m: (rng.normal(float(ndtri(auroc)), 0.01, n), rng.normal(0, 1, m))


def tied(rng: np.random.Generator, n: int, m: int) -> tuple[Array, Array]:
    return rng.choice(4, n, p=[0.1, 0.2, 0.3, 0.4]).astype(float), rng.choice(4, m, p=[0.4, 0.3, 0.2, 0.1]).astype(
        float
    )


P = np.array([0.1, 0.2, 0.3, 0.4])
CASES: dict[str, tuple[Sampler, float]] = {
    "same distribution": (binormal(0.5), 0.5),
    "binormal .8": (binormal(0.8), 0.8),
    "binormal .98": (binormal(0.98), 0.98),
    "narrow .5": (narrow(0.5), 0.5),
    "narrow .97": (narrow(0.97), 0.97),
    "tied": (tied, float(P @ (np.tril(np.ones((4, 4)), -1) + 0.5 * np.eye(4)) @ P[::-1])),
}
REPEATS = 800


def wald(found: Separation) -> tuple[float, float]:
    half = float(ndtri((1 + LEVEL) / 2)) * found.se
    return found.auroc - half, found.auroc + half


def misses(case: str, interval: Callable[[Separation], tuple[float, float]]) -> float:
    """Share of samples whose interval misses the truth."""
    sample, truth = CASES[case]
    rng = np.random.default_rng(stream(0, "coverage", case))
    found = [interval(separation(*sample(rng, 64, 48))) for _ in range(REPEATS)]
    return float(np.mean([not low <= truth <= high for low, high in found]))


@pytest.mark.parametrize("case", CASES)
def test_intervals_cover_the_truth_as_often_as_they_say(case):
    """At most 6.5% may miss, an allowance for the approximation; 13% would be seen with certainty."""
    allowed = 0.065
    bound = allowed + limit(len(CASES)) * math.sqrt(allowed * (1 - allowed) / REPEATS)
    assert misses(case, lambda found: (found.low, found.high)) < bound


def test_the_same_test_sees_that_plain_intervals_of_delong_miss_near_one():
    allowed = 0.065
    bound = allowed + limit(len(CASES)) * math.sqrt(allowed * (1 - allowed) / REPEATS)
    assert misses("binormal .98", wald) > bound


def test_strata_undo_what_comes_from_a_confounder():
    """Scores that depend on contrast alone, of two sets whose contrasts differ: nothing is left within strata."""
    rng = np.random.default_rng(stream(0, "strata"))
    contrast = [rng.integers(0, 4, 400), rng.integers(1, 5, 300)]
    scores = [-values + rng.normal(0, 0.5, len(values)) for values in contrast]
    crude, within = separation(scores[1], scores[0]), stratified(scores[1], scores[0], (contrast[1], contrast[0]))
    assert crude.high < 0.4
    assert abs(within.auroc - 0.5) < limit(1) * within.se
    shares = [[(part == level).sum() for part in contrast] for level in (1, 2, 3)]
    one_by_one = [
        separation(scores[1][contrast[1] == level], scores[0][contrast[0] == level]).auroc for level in (1, 2, 3)
    ]
    assert within.auroc == pytest.approx(np.average(one_by_one, weights=[n * m / (n + m) for n, m in shares]))


def test_the_error_of_strata_is_that_of_repeated_samples():
    rng = np.random.default_rng(stream(0, "errors of strata"))
    found = []
    for _ in range(400):
        labels = (rng.integers(0, 3, 60), rng.integers(0, 3, 60))
        scores = [label + rng.normal(0, 1, 60) for label in labels]
        found.append(stratified(scores[0] + 0.5, scores[1], labels))
    aurocs = np.array([one.auroc for one in found])
    ratio = np.mean([one.se**2 for one in found]) / aurocs.var(ddof=1)
    assert abs(math.log(ratio)) < limit(2) * math.sqrt(2 / 400)
    truth = float(ndtr(0.5 / math.sqrt(2)))
    assert abs(aurocs.mean() - truth) < limit(2) * aurocs.std() / math.sqrt(400)


def test_paired_differences_know_that_both_scores_are_of_the_same_images():
    """Two scores that are nearly the same: their difference is known far better than either AUROC."""
    rng, truth = np.random.default_rng(stream(0, "pairs of scores")), 0.0
    covered, narrower, unpaired = [], [], []
    for _ in range(400):
        images = rng.normal(0.5, 1, 50), rng.normal(0, 1, 60)
        one, other = ([placements(*(part + rng.normal(0, 0.3, len(part)) for part in images))] for _ in "12")
        found = difference(one, other)
        covered.append(found.low <= truth <= found.high)
        narrower.append((found.high - found.low) / (pooled(one).high - pooled(one).low))
        unpaired.append(found.se < 0.5 * math.hypot(pooled(one).se, pooled(other).se))
    assert np.mean(covered) > 0.95 - limit(1) * math.sqrt(0.05 * 0.95 / 400)
    assert np.mean(narrower) < 0.6
    assert np.mean(unpaired) > 0.9


def test_differences_of_scores_that_both_separate_keep_an_interval():
    high, low = np.arange(50.0) + 100, np.arange(60.0)
    found = difference([placements(high, low)], [placements(high + 1, low)])
    assert (found.auroc, found.se) == (0, 0)
    assert found.low == pytest.approx(-found.high)
    assert 0.05 < found.high < 0.1
    same = [placements(np.arange(9.0), np.arange(12.0) - 1)]
    assert difference(same, same)[:2] == pytest.approx((0, 0), abs=1e-9)
    assert difference(same, same).high < 0.1 * (pooled(same).high - pooled(same).low)
    assert all(math.isnan(value) for value in difference([], []))
