"""Calibration of match probabilities: simulated outcomes are calibrated, logits that are too large are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from agreement import limit
from scipy.special import expit, logit
from scipy.stats import binom
from sklearn.linear_model import LogisticRegression

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import match_calibration

FEW = {"resamples": 200}


def pairs(count: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities, and matches that are simulated with them."""
    rng = np.random.default_rng(seed)
    p = expit(rng.normal(-0.5, 1.5, count))
    return p, (rng.random(count) < p).astype(float)


def test_simulated_matches_are_calibrated():
    p, y = pairs()
    found = match_calibration(p, y, **FEW)
    for name, truth in (("slope", 1.0), ("intercept", 0.0), ("brier", (p * (1 - p)).mean())):
        assert abs(float(found[name]) - truth) < limit(5) * float(found[f"{name}_se"])
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    assert abs(float(found["log_score"]) - entropy) < limit(5) * float(found["log_score_se"])
    assert abs(float(found["calibration_error_squared"])) < limit(5) * float(found["calibration_error_squared_se"])
    assert float(found["calibration_p"]) > 1e-2
    assert float(found["calibration_error"]) < 2 * float(found["calibration_error_calibrated"])
    assert found["count"].values.sum() == 4000
    assert np.ptp(found["count"].values) <= 2
    se = found["observed_se"].values
    assert (np.abs(found["observed"] - found["predicted"]).values < limit(15) * se).all()


def test_logits_three_times_too_large_are_seen():
    p, y = pairs()
    found = match_calibration(expit(3 * logit(p)), y, **FEW)
    assert abs(float(found["slope"]) - 1 / 3) < limit(2) * float(found["slope_se"])
    assert float(found["slope_high"]) < 0.5
    assert float(found["calibration_p"]) == pytest.approx(1 / 201)
    assert float(found["calibration_error"]) > 2 * float(found["calibration_error_calibrated_high"])
    square = float(found["calibration_error_squared"])
    assert square > limit(1) * float(found["calibration_error_squared_se"])
    sound = match_calibration(p, y, **FEW)
    assert float(found["brier_low"]) > float(sound["brier_high"])
    assert float(found["log_score_low"]) > float(sound["log_score_high"])


def test_swapped_and_shuffled_matches_are_seen():
    p, y = pairs()
    swapped = match_calibration(p, 1 - y, **FEW)
    assert float(swapped["slope_high"]) < 0
    shuffled = match_calibration(p, np.random.default_rng(0).permutation(y), **FEW)
    assert abs(float(shuffled["slope"])) < limit(1) * float(shuffled["slope_se"])
    assert float(shuffled["calibration_p"]) < 0.01


@pytest.mark.parametrize("spacing", ["equal-mass", "equal-width"])
def test_numbers_are_those_of_loops(spacing):
    p, y = pairs(300)
    found = match_calibration(p, y, bins=6, spacing=spacing, **FEW)
    if spacing == "equal-width":
        of = np.minimum(np.floor(p * 6), 5)
        error = sum(abs(p[of == b].mean() - y[of == b].mean()) * (of == b).sum() for b in range(6) if (of == b).any())
        assert float(found["calibration_error"]) == pytest.approx(error / 300)
    weights = found["count"].values / 300
    gaps = np.abs(found["predicted"] - found["observed"]).values
    assert float(found["calibration_error"]) == pytest.approx(np.nansum(weights * gaps))
    assert float(found["brier"]) == pytest.approx(np.mean([(a - b) ** 2 for a, b in zip(p, y, strict=True)]))
    fit = LogisticRegression(C=np.inf, tol=1e-9).fit(logit(p)[:, None], y)
    assert float(found["slope"]) == pytest.approx(float(fit.coef_[0, 0]), rel=1e-3)
    assert float(found["intercept"]) == pytest.approx(float(fit.intercept_[0]), abs=1e-3)


def test_the_squared_error_has_no_bias_and_the_plain_one_has():
    squares, errors = [], []
    for seed in range(80):
        found = match_calibration(*pairs(200, seed), bins=8, resamples=100)
        squares.append(float(found["calibration_error_squared"]))
        errors.append((float(found["calibration_error_squared_se"]), float(found["calibration_error"])))
    assert abs(np.mean(squares)) < limit(1) * np.std(squares) / np.sqrt(80)
    assert np.mean([e[0] for e in errors]) == pytest.approx(np.std(squares), rel=0.4)
    assert np.mean([e[1] for e in errors]) > 0.05


@pytest.mark.slow
def test_intervals_cover_the_truth_and_p_values_are_uniform():
    hits, small = {"slope": 0, "intercept": 0, "brier": 0}, 0
    truth = {"slope": 1.0, "intercept": 0.0, "brier": float(np.mean([p * (1 - p) for p in pairs(10**6)[0]]))}
    for seed in range(300):
        found = match_calibration(*pairs(300, seed + 1), resamples=300)
        for name in hits:
            hits[name] += bool(found[f"{name}_low"] <= truth[name] <= found[f"{name}_high"])
        small += float(found["calibration_p"]) < 0.05
    assert min(hits.values()) >= binom.ppf(1e-3, 300, 0.92), hits
    assert small <= binom.ppf(1 - 1e-3, 300, 0.05)


def test_pairs_of_the_same_image_belong_together():
    """Every pair twice: intervals over groups are those of the single pairs, and wider than those over pairs."""
    p, y = pairs(500)
    twofold = (np.repeat(p, 2), np.repeat(y, 2))
    options: dict[str, Any] = {"spacing": "equal-width", "bins": 5, "resamples": 400}
    once, alone = match_calibration(p, y, **options), match_calibration(*twofold, **options)
    twice = match_calibration(*twofold, np.repeat(np.arange(500), 2), **options)
    for name in ("brier", "slope"):
        assert float(twice[f"{name}_se"]) == pytest.approx(float(once[f"{name}_se"]), rel=0.15)
        assert float(alone[f"{name}_se"]) < 0.8 * float(once[f"{name}_se"])
    assert float(twice["calibration_error_squared"]) == pytest.approx(
        float(once["calibration_error_squared"]), abs=1e-9
    )


def test_certain_predictions_and_separated_matches():
    y = np.array([0.0, 0.0, 1.0, 1.0])
    right, wrong = (match_calibration(p, y, **FEW) for p in (y, 1 - y))
    assert float(right["brier"]) == float(right["log_score"]) == float(right["calibration_error"]) == 0.0
    assert float(wrong["log_score"]) == np.inf
    assert np.isnan(float(wrong["log_score_high"]))
    assert np.isnan(float(right["slope"]))
    constant = match_calibration(np.full(40, 0.5), np.arange(40) % 2, **FEW)
    assert constant.sizes["bin"] == 1
    assert float(constant["calibration_error"]) == 0.0


def test_refusals():
    for p, y in (([0.5, 1.5], [0, 1]), ([0.5, 0.5], [0, 2])):
        with pytest.raises(DataError, match="give matches that are 0 or 1"):
            match_calibration(np.array(p), np.array(y))
    with pytest.raises(DataError, match="probabilities has the shape"):
        match_calibration(np.array([0.5]), np.array([0, 1]))
    with pytest.raises(InferenceError, match="bins=0"):
        match_calibration(np.array([0.5, 0.1]), np.array([0, 1]), bins=0)
