"""Standard errors of the statistics over directions, quantiles, shapes and shared draws, against their scatter."""

from __future__ import annotations

import numpy as np
import pytest
from agreement import limit

from calibrant.evaluation.judgements.pooled import Limits, Together, average, root
from calibrant.evaluation.statistics.directions import HalfOfData, along, choose, covariance, own_direction
from calibrant.evaluation.statistics.draws import BLOCKS, Draws
from calibrant.evaluation.statistics.heavy_tails import quantile_blocks, quantile_statistics, tails_of
from calibrant.evaluation.statistics.marginals import moments
from calibrant.evaluation.statistics.scatter import Scatter
from calibrant.evaluation.statistics.shapes import Shapes

REPEATS = 300


def calibrated(z: np.ndarray, width: float = 0.15) -> bool:
    """Whether z-scores have mean 0 and sd 1; three statistics of each."""
    return abs(z.mean()) < 0.05 + limit(3) / np.sqrt(z.size) and abs(z.std() - 1.0) < width + 2.0 / np.sqrt(z.size)


def independent(values: np.ndarray) -> Draws:
    """Draws `(draw, latent)` of one chain."""
    return Draws(values[None], True)


# -- quantiles ---------------------------------------------------------------------------------------------------------

HEAVY = {
    "Cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "t, 2 degrees": lambda rng, shape: rng.standard_t(2, shape),
    "LogNormal 1.5": lambda rng, shape: rng.lognormal(0.0, 1.5, shape),
}
LIGHT = {
    "Normal": lambda rng, shape: rng.normal(size=shape),
    "Laplace": lambda rng, shape: rng.laplace(size=shape),
    "uniform": lambda rng, shape: rng.uniform(size=shape),
    "Beta(.1, .1)": lambda rng, shape: rng.beta(0.1, 0.1, shape),
    "LogNormal 0.3": lambda rng, shape: rng.lognormal(0.0, 0.3, shape),
    "small mode far away": lambda rng, shape: np.where(rng.random(shape) < 0.03, 6.0, 0.0) + rng.normal(size=shape),
}


@pytest.mark.parametrize("name", [*HEAVY, *LIGHT])
def test_the_rule_for_heavy_tails_is_the_same_for_all_data(name):
    rng, sample = np.random.default_rng(0), (HEAVY | LIGHT)[name]
    draws = [sample(rng, (4000, 20)) for _ in range(16)]
    tails = tails_of(map(independent, draws), np.min(draws, axis=(0, 1)) > 0.0)
    assert tails.heavy.all() if name in HEAVY else not tails.heavy.any()
    assert tails.log_scale.all() == (name == "LogNormal 1.5")


def test_a_constant_latent_has_no_tail():
    tails = tails_of([independent(np.zeros((500, 1)))], np.zeros(1, dtype=bool))
    assert not tails.heavy.any()


def test_heavy_tails_in_some_of_the_data_decide():
    """The median over data is light, but a fifth of the posteriors have no variance."""
    rng = np.random.default_rng(1)
    draws = [rng.standard_t(1, (2000, 1)) if i % 5 == 0 else rng.normal(size=(2000, 1)) for i in range(20)]
    assert tails_of(map(independent, draws), np.zeros(1, dtype=bool)).heavy.all()


@pytest.mark.parametrize("name", HEAVY)
def test_errors_of_quantiles_are_those_of_their_scatter(name):
    rng = np.random.default_rng(1)
    a, r = (HEAVY[name](rng, (count, REPEATS)) for count in (1000, 2000))
    if name == "LogNormal 1.5":
        a, r = np.log(a), np.log(r)
    found = quantile_statistics(independent(a), independent(r))
    assert calibrated(found["median_error"] / found["median_error_se"])
    for width in ("width_50", "width_80"):
        z = np.log(found[f"{width}_ratio"]) / (found[f"{width}_ratio_se"] / found[f"{width}_ratio"])
        assert calibrated(z)


# -- shapes ------------------------------------------------------------------------------------------------------------


def test_errors_of_shapes_are_those_of_their_scatter():
    rng, shapes = np.random.default_rng(2), Shapes(together=False)
    for _ in range(4):
        shapes.add(independent(rng.normal(size=(500, REPEATS))), independent(rng.normal(size=(1000, REPEATS))))
    found = shapes.statistics()
    assert calibrated((found["shape_difference"] / found["shape_difference_se"])[[1, 9, 17]])


def test_a_wrong_shape_with_the_right_moments_is_measured():
    rng, shapes = np.random.default_rng(3), Shapes(together=False)
    bumps = np.sqrt(1.5 * (1 - 0.25**2)) * rng.integers(-1, 2, size=(20_000, 1)) + 0.25 * rng.normal(size=(20_000, 1))
    shapes.add(independent(bumps), independent(rng.normal(size=(20_000, 1))))
    assert np.abs(shapes.statistics()["shape_difference"]).max() > 0.08


# -- directions --------------------------------------------------------------------------------------------------------


def test_a_direction_chosen_on_one_half_of_the_draws_is_judged_without_bias_on_the_other():
    rng, z = np.random.default_rng(4), []
    for _ in range(REPEATS):
        a, r = independent(rng.normal(size=(400, 12))), independent(rng.normal(size=(800, 12)))
        direction = own_direction(covariance(a.half(0)), covariance(r.half(0)))
        found = moments(*along(a.half(1), r.half(1), direction))
        z.append(np.log(found["sd_ratio"]) / (found["sd_ratio_se"] / found["sd_ratio"]))
    assert calibrated(np.array(z))


def test_judging_on_the_half_that_chose_is_biased():
    """The planted defect of the test above."""
    rng, z = np.random.default_rng(4), []
    for _ in range(REPEATS):
        a, r = independent(rng.normal(size=(400, 12))), independent(rng.normal(size=(800, 12)))
        direction = own_direction(covariance(a.half(0)), covariance(r.half(0)))
        found = moments(*along(a.half(0), r.half(0), direction))
        z.append(np.log(found["sd_ratio"]) / (found["sd_ratio_se"] / found["sd_ratio"]))
    assert not calibrated(np.array(z))


def test_the_common_direction_and_the_pair_are_found():
    rng, half, pairs = np.random.default_rng(5), HalfOfData(), 6 * 5 // 2
    v = np.array([0.6, 0.8, 0.0, 0.0, 0.0, 0.0])
    guide, reference = np.eye(6), np.eye(6) - 0.7 * np.outer(v, v)
    for _ in range(10):
        squares = rng.normal(size=pairs) * 0.01
        squares[0] = 0.5
        shift = np.array([0, 0, 0, 0, 1.0, 0]) * rng.choice([-1.0, 1.0])
        half.add((guide, reference), (shift, np.full(6, 0.01)), squares)
    choice = choose(half)
    widest = choice.directions[:, 0] / np.linalg.norm(choice.directions[:, 0])
    assert abs(widest @ v) > 0.999
    shifted = choice.directions[:, 4] / np.linalg.norm(choice.directions[:, 4])
    assert abs(shifted[4]) > 0.99
    assert choice.pair.tolist() == [0, 1]


# -- errors that data share --------------------------------------------------------------------------------------------


def hierarchical(rng: np.random.Generator, draws: int, data: int, share: float) -> np.ndarray:
    """Standard Normal draws `(draw, data)` of which a share of the variance is common to all data."""
    common = rng.normal(size=(draws, 1))
    return np.sqrt(share) * common + np.sqrt(1 - share) * rng.normal(size=(draws, data))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_errors_of_pooled_statistics_of_data_that_share_draws(share):
    """z-scores of the average and of the mean square over 128 data, whose draws are correlated."""
    rng, averages, squares = np.random.default_rng(6), [], []
    for _ in range(REPEATS):
        x = hierarchical(rng, 800, 128, share)
        blocks = x.reshape(BLOCKS, -1, 128).mean(1).T
        scatter = Scatter()
        for row in blocks:
            scatter.add(row[None])
        found = {name: float(value[0]) for name, value in scatter.statistics().items()}
        mean, noise = x.mean(0), x.var(0, ddof=1) / len(x)
        averages.append(mean.mean() / found["average_se"])
        squares.append((mean**2 - noise).mean() / np.sqrt(2 * found["trace_square"]))
    assert calibrated(1.15 * np.array(averages))
    assert abs(np.std(squares) - 1.0) < 0.35
    assert abs(np.mean(squares)) < 0.25


def test_errors_as_if_data_were_independent_are_too_small():
    """The planted defect of the test above."""
    rng, averages = np.random.default_rng(6), []
    for _ in range(REPEATS):
        x = hierarchical(rng, 800, 128, 0.1)
        averages.append(x.mean() / (x.std() / np.sqrt(x.size)))
    assert not calibrated(np.array(averages))


def test_a_shared_error_widens_the_interval_of_a_root_mean_square():
    square, noise = np.full((128, 1), 0.0), np.full((128, 1), 0.00125)
    alone = root("", "", square, noise, 0.1, Limits())
    correlated = Together(0.03, 0.9 * 0.00125**2, 0.00125)
    together = root("", "", square, noise, 0.1, Limits(), correlated)
    assert alone.is_inside
    assert together.high > alone.high


# -- data without a reference ------------------------------------------------------------------------------------------


def test_a_fail_counts_data_without_a_reference_as_right():
    """An error of 0.15 in half of the data is not outside a margin of 0.1 for all of them."""
    error, se = np.full((64, 1), 0.15), np.full((64, 1), 0.02)
    assert average("", "", error, se, 0.1, Limits()).p_inside < 1e-6
    assert average("", "", error, se, 0.1, Limits(kept=0.5)).p_inside > 0.5
    assert root("", "", error**2, se**2, 0.1, Limits()).p_inside < 1e-6
    assert root("", "", error**2, se**2, 0.1, Limits(kept=0.4)).p_inside > 0.5
    assert average("", "", error + 0.2, se, 0.1, Limits(kept=0.5)).p_inside < 1e-6


def test_heavy_tails_of_data_that_share_draws_are_judged_by_the_errors_of_quantiles():
    """z_i = c + e_i with Cauchy draws of both: the average over data errs as much as its standard error says."""
    rng, averages = np.random.default_rng(8), []
    for _ in range(60):
        scatter, errors = Scatter(), []
        shared = [rng.standard_cauchy((count, 1)) for count in (800, 1600)]
        for _ in range(20):
            a, r = (independent(c + rng.standard_cauchy(c.shape)) for c in shared)
            scatter.add(quantile_blocks(a, r)[0])
            errors.append(float(quantile_statistics(a, r)["median_error"][0]))
        averages.append(np.mean(errors) / float(scatter.statistics()["average_se"][0]))
    assert calibrated(1.15 * np.array(averages))


def test_a_covariance_that_is_none_gives_no_direction():
    with pytest.raises(np.linalg.LinAlgError, match="not positive definite"):
        own_direction(np.eye(2), -10.0 * np.eye(2))
