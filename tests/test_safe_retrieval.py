"""Safe retrieval: brute force, effects that are known, positions after images are left out, and leaked labels."""

from __future__ import annotations

import numpy as np
import pytest
from agreement import limit

from calibrant.errors import InferenceError
from calibrant.evaluation import safe_retrieval
from calibrant.evaluation.representations import safe

RNG = np.random.default_rng(0)


def junk(count: int = 60, wrong: float = 0.2, classes: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images around class means, of which some have a label that is wrong for their place, and large uncertainty."""
    labels = RNG.integers(classes, size=count)
    of_place = np.where(RNG.random(count) < wrong, RNG.integers(classes, size=count), labels)
    x = np.eye(8)[of_place] + 0.3 * RNG.normal(size=(count, 8))
    return x, labels, (of_place != labels) + 0.5 * RNG.random(count)


def brute(x: np.ndarray, labels: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Whether the nearest stored image, beside the query, has the query's class, by a loop over original positions."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    right = []
    for query in range(len(x)):
        others = [i for i in range(len(x)) if stored[i] and i != query]
        right.append(labels[max(others, key=lambda i: unit[query] @ unit[i])] == labels[query])
    return np.array(right)


@pytest.mark.parametrize("near", [1, 50], ids=["searched again", "looked up"])
def test_all_numbers_are_those_of_a_loop(monkeypatch, near):
    monkeypatch.setattr(safe, "_NEAR", near)
    x, labels, u = junk()
    found = safe_retrieval(x, labels, u, keep=(0.5, 0.8))
    every = np.ones(60, dtype=bool)
    full = brute(x, labels, every)
    for keep in (0.5, 0.8):
        kept = u <= np.quantile(u, keep)
        one = found.sel(keep=keep)
        assert (one["kept"].values == kept).all()
        reduced = brute(x, labels, kept)
        recall = [full.mean(), reduced.mean(), full[kept].mean(), reduced[kept].mean()]
        assert one["recall"].values == pytest.approx(recall)
        assert one["before"].values == pytest.approx([full.mean(), full.mean(), full[kept].mean(), full[kept].mean()])
        assert one["recall_all"].values == pytest.approx([full.mean(), reduced.mean()] * 2)
        assert one["queries"].values.tolist() == [60, 60, kept.sum(), kept.sum()]
        assert one["database"].values.tolist() == [60, kept.sum(), 60, kept.sum()]
    effects = found["recall"].sel(dropped="nothing") + found["selection"] + found["gain"]
    assert found["recall"].values == pytest.approx(effects.values)


def test_positions_in_the_reduced_database_are_not_those_of_the_images():
    """Planted: own positions of all images, used in a database that lacks some, leave other images out."""
    x, labels, u = junk()
    kept = u <= np.quantile(u, 0.5)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines = unit[kept] @ unit[kept].T
    places = np.flatnonzero(kept)
    cosines[np.arange(len(places)), np.minimum(places, len(places) - 1)] = -np.inf  # the wrong one is left out
    trapped = (labels[kept][cosines.argmax(1)] == labels[kept]).mean()
    found = safe_retrieval(x, labels, u, keep=(0.5,))["recall"].sel(dropped="both").values[0]
    assert found == pytest.approx(brute(x, labels, kept)[kept].mean())
    assert trapped > found + 0.05  # most queries find themselves


def test_effects_that_are_known():
    x, labels, u = junk(800)
    right = safe_retrieval(x, labels, u, keep=(0.8,)).isel(keep=0)
    both = right.sel(dropped="both")
    assert float(both["gain_over_random_low"]) > 0
    assert float(both["gain_low"]) > 0
    assert float(both["selection_low"]) > 0  # hard queries left out raise R@1 with the same database
    assert float(right["gain"].sel(dropped="queries")) == 0
    nothing = right.sel(dropped="nothing")
    assert [float(nothing[name]) for name in ("gain", "selection", "gain_over_random", "without_match")] == [0] * 4
    by_chance = safe_retrieval(x, labels, RNG.permutation(u), keep=(0.8,)).isel(keep=0).sel(dropped="both")
    for name in ("gain_over_random", "selection"):
        assert abs(float(by_chance[name] / by_chance[f"{name}_se"])) < limit(2)
    swapped = safe_retrieval(x, labels, -u, keep=(0.8,)).isel(keep=0).sel(dropped="both")
    assert float(swapped["gain_over_random_high"]) < 0


@pytest.mark.parametrize("quantile", ["all", "neighbourhood", "predicted class", "true class"])
def test_labels_decide_nothing_unless_the_quantile_is_that_of_true_classes(quantile):
    x, labels, u = junk(200)
    u = u + labels  # classes differ in uncertainty
    predicted = RNG.permutation(labels)
    one, other = (
        safe_retrieval(x, given, u, keep=(0.7,), quantile=quantile, predicted=predicted, controls=1)
        for given in (labels, RNG.permutation(labels))
    )
    same = bool((one["kept"] == other["kept"]).all())
    labelled = quantile == "true class"
    assert same != labelled
    assert (one.attrs["needs_labels"], one.attrs["safe"]) == (int(labelled), int(not labelled))
    assert ("needs the labels" in one.attrs["note"]) == labelled
    groups = {"all": np.zeros(200), "predicted class": predicted, "true class": labels}
    if quantile in groups:
        of = groups[quantile]
        expected = [value <= np.quantile(u[of == group], 0.7) for value, group in zip(u, of, strict=True)]
        assert one["kept"].values[0].tolist() == expected


def test_standard_errors_are_those_over_new_sets_of_images():
    """R@1 varies with the database too: errors over queries alone would be too small."""
    names = ("recall", "gain_over_random")
    found = []
    for seed in range(60):
        one = safe_retrieval(*junk(200), keep=(0.8,), controls=2, cluster="image", resamples=100, seed=seed)
        of = one.isel(keep=0).sel(dropped="both")
        queries_alone = (of["recall"] * (1 - of["recall"]) / of["queries"]) ** 0.5
        found.append([*(float(of[f"{name}{end}"]) for end in ("", "_se") for name in names), float(queries_alone)])
    recall, gain, recall_se, gain_se, alone = np.array(found).T
    chance = limit(4) / np.sqrt(2 * 60)  # relative error of a standard deviation of 60 numbers, so many times
    assert 0.85 - chance < recall_se.mean() / recall.std() < 1.4 + chance
    assert 0.7 - chance < gain_se.mean() / gain.std() < 1.3 + chance
    assert alone.mean() < 0.9 * recall_se.mean()  # planted: the database is taken as known


def test_queries_of_lost_classes_are_counted():
    x, labels, _ = junk(100)
    lost = safe_retrieval(x, labels, (labels == 0).astype(float), keep=((labels != 0).mean() - 0.01,), controls=1)
    without = lost["without_match"].isel(keep=0)
    assert float(without.sel(dropped="database")) == pytest.approx((labels == 0).mean())
    assert float(without.sel(dropped="both")) == 0


def test_refusals_say_what_to_do():
    x, labels, u = junk()
    with pytest.raises(InferenceError, match="needs predicted="):
        safe_retrieval(x, labels, u, quantile="predicted class")
    with pytest.raises(InferenceError, match="give one of"):
        safe_retrieval(x, labels, u, quantile="class")
    with pytest.raises(InferenceError, match="numbers between 0 and 1"):
        safe_retrieval(x, labels, u, keep=(1.0,))
    with pytest.raises(InferenceError, match="keep more"):
        safe_retrieval(x, labels, u, keep=(0.01,))
    with pytest.raises(InferenceError, match="1 or more"):
        safe_retrieval(x, labels, u, controls=0)
