"""Distances in feature space, and pairs of scalars: brute force, pairs that are known to win, and planted defects."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import feature_distance, uncertainty_pair

RNG = np.random.default_rng(0)


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    return float(((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)).mean())


# -- distances ---------------------------------------------------------------------------------------------------------


def test_distances_to_neighbours_are_those_of_a_loop():
    base, x = RNG.normal(size=(50, 6)), RNG.normal(size=(9, 6))
    cosines = (x / np.linalg.norm(x, axis=1)[:, None]) @ (base / np.linalg.norm(base, axis=1)[:, None]).T
    assert feature_distance(x, base, k=3) == pytest.approx(1 - np.sort(cosines, 1)[:, -3])
    itself = feature_distance(base, base, k=1, own=np.arange(50))
    assert itself.min() > 1e-3
    assert feature_distance(base, base, k=1) == pytest.approx(np.zeros(50), abs=1e-9)  # planted: each finds itself
    assert feature_distance(base, base, k=2) == pytest.approx(itself)


def test_mahalanobis_distances_are_those_of_the_formula():
    labels = np.arange(80) % 3
    base = RNG.normal(size=(80, 4)) @ RNG.normal(size=(4, 4)) + 3 * np.eye(4)[labels]
    means = np.stack([base[labels == c].mean(0) for c in range(3)])
    inverse = np.linalg.inv(ledoit_wolf(base - means[labels], assume_centered=True)[0])
    x = RNG.normal(size=(7, 4))
    expected = [min(np.sqrt((row - mean) @ inverse @ (row - mean)) for mean in means) for row in x]
    names = np.array(list("abc"))[labels]
    assert feature_distance(x, base, method="mahalanobis", labels=names) == pytest.approx(expected)
    shifted = feature_distance(x + 10, base + 10, method="mahalanobis", labels=names)
    assert shifted == pytest.approx(expected)


@pytest.mark.parametrize("method", ["neighbour", "mahalanobis"])
def test_images_from_elsewhere_lie_farther_away(method):
    labels = np.arange(300) % 3
    means = RNG.normal(size=(3, 20))
    base, inside = (means[labels] + 0.4 * RNG.normal(size=(300, 20)) for _ in range(2))
    outside = RNG.normal(size=(300, 20))
    near, far = (feature_distance(x, base, method=method, labels=labels) for x in (inside, outside))
    assert auroc(far, near) > 0.95


# -- pairs -------------------------------------------------------------------------------------------------------------


def two_kinds(count: int = 1200) -> dict[str, np.ndarray]:
    """An aleatoric scalar that knows errors but not other images, and an epistemic one that is the other way round."""
    aleatoric, epistemic = RNG.exponential(size=(2, count))
    wrong = RNG.random(count) < 0.7 * (1 - np.exp(-aleatoric))
    outside = RNG.exponential(size=count), RNG.exponential(size=count) + 1.5
    return {"aleatoric": aleatoric, "epistemic": epistemic, "correct": ~wrong, "outside": outside}


def test_aurocs_are_those_of_all_pairs():
    given = two_kinds(60)
    also = np.arange(60) < 20
    found = uncertainty_pair(**given, outside_correct=also, held_out=0.4, resamples=100)
    inside, other = found["judged"].values, found["judged_outside"].values
    assert (inside.sum(), other.sum()) == (36, 36)
    both = zip((given["aleatoric"], given["epistemic"]), given["outside"], strict=True)
    ranks, known = [], []
    for of, elsewhere in both:
        fitted = of[~inside]
        ranks.append([(fitted < value).mean() for value in np.r_[of[inside], elsewhere[other]]])
        known.append((of[inside], elsewhere[other]))
    first, second = (np.array(part) for part in ranks)
    right, right_outside = given["correct"][inside], also[other]
    scores = {
        "aleatoric": np.concatenate(known[0]),
        "epistemic": np.concatenate(known[1]),
        "largest rank": np.maximum(first, second),
        "sum of ranks": first + second,
    }
    wrong = np.r_[~right, ~right_outside]
    for name, score in scores.items():
        one = found["auroc"].sel(score=name)
        assert float(one.sel(task="errors")) == pytest.approx(auroc(score[:36][~right], score[:36][right])), name
        assert float(one.sel(task="outside")) == pytest.approx(auroc(score[36:], score[:36])), name
        assert float(one.sel(task="mixed")) == pytest.approx(auroc(score[wrong], score[~wrong])), name
    worst = found["auroc"].sel(task=["errors", "outside"]).min("task")
    assert found["worst"].values == pytest.approx(worst.values)


def test_a_pair_wins_where_each_alone_fails_and_a_shuffled_one_does_not():
    given = two_kinds()
    found = uncertainty_pair(**given)
    worst = found["worst"]
    assert (worst.sel(score=["aleatoric", "epistemic"]) < 0.6).all()
    assert (found["worst_wins"] == 1).all()
    better = found["auroc"].sel(score=["aleatoric", "epistemic"]).max("score")
    for name in ("largest rank", "logistic"):
        over = found["auroc"].sel(score=name) - better
        assert found["gain_over_better"].sel(pair=name).values == pytest.approx(over.values)
    assert (found["wins"] == (found["gain_over_better_low"] > 0)).all()
    assert (found["worst_gain_low"].sel(pair="largest rank") > 0).all()
    mixed = found["gain_low"].sel(task="mixed", single="aleatoric")
    assert (mixed > 0).all()
    gain = found["auroc"].sel(score="sum of ranks") - found["auroc"].sel(score="epistemic")
    assert found["gain"].sel(pair="sum of ranks", single="epistemic").values == pytest.approx(gain.values)
    noise = {
        **given,
        "epistemic": RNG.permutation(given["epistemic"]),
        "outside": tuple(RNG.exponential(size=(2, 1200))),
    }
    assert (uncertainty_pair(**noise)["worst_wins"] == 0).all()  # planted: the second scalar knows nothing
    swapped = {**given, "aleatoric": -given["aleatoric"], "outside": (-given["outside"][0], given["outside"][1])}
    assert float(uncertainty_pair(**swapped)["auroc"].sel(task="errors", score="aleatoric")) < 0.4


def test_only_the_order_of_the_scalars_counts():
    given = two_kinds(300)
    moved = {
        **given,
        "aleatoric": np.exp(given["aleatoric"]),
        "epistemic": given["epistemic"] ** 3,
        "outside": (np.exp(given["outside"][0]), given["outside"][1] ** 3),
    }
    one, other = (uncertainty_pair(**both, resamples=100) for both in (given, moved))
    assert one["auroc"].values == pytest.approx(other["auroc"].values)


def test_refusals_say_what_to_do():
    given = two_kinds(20)
    with pytest.raises(InferenceError, match="leave at least two images"):
        uncertainty_pair(**given, held_out=0.01)
    with pytest.raises(DataError, match="give one number for each"):
        uncertainty_pair(**{**given, "correct": np.ones(3, dtype=bool)})
    with pytest.raises(DataError, match="give one number for each of the 20"):
        uncertainty_pair(**{**given, "epistemic": np.ones(3)})
    with pytest.raises(InferenceError, match="needs labels="):
        feature_distance(np.ones((3, 2)), np.ones((5, 2)), method="mahalanobis")
    with pytest.raises(InferenceError, match='"neighbour" or "mahalanobis"'):
        feature_distance(np.ones((3, 2)), np.ones((5, 2)), method="euclid")
