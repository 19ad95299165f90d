"""Few-shot classification: brute force, known values, and planted defects."""

from __future__ import annotations

import numpy as np
import pytest
from agreement import limit

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import few_shot

RNG = np.random.default_rng(0)


def blobs(classes: int = 4, each: int = 30, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings around class means, labels, and the sd of each image's noise, which is its uncertainty."""
    labels = np.repeat(np.arange(classes), each)
    spread = noise * RNG.uniform(0.3, 2.0, len(labels))
    means = np.eye(8)[:classes] * 2
    return means[labels] + spread[:, None] * RNG.normal(size=(len(labels), 8)), labels, spread


def brute(x: np.ndarray, labels: np.ndarray, place: np.ndarray, k: int, most: int, method: str) -> np.ndarray:
    """Whether each query is right, by a loop, for the places that a result tells."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    right = []
    for query in np.flatnonzero(place >= most):
        scores = {}
        for label in np.unique(labels):
            members = unit[(labels == label) & (place < k)]
            mean = members.mean(0) / np.linalg.norm(members.mean(0))
            scores[label] = (unit[query] @ mean) if method == "class mean" else (members @ unit[query]).max()
        right.append(max(scores, key=scores.__getitem__) == labels[query])
    return np.array(right)


@pytest.mark.parametrize("method", ["class mean", "nearest"])
def test_accuracy_and_r_auroc_are_those_of_a_loop(method):
    x, labels, u = blobs()
    found = few_shot(x, labels, u, (1, 3), method=method, repeats=3)
    for repeat in range(3):
        place = found["place"].values[repeat]
        assert sorted(place[labels == 0]) == list(range(30))
        queries = place >= 3
        for k in (1, 3):
            right = brute(x, labels, place, k, 3, method)
            one = found.sel(shots=k).isel(repeat=repeat)
            assert float(one["accuracy_of_repeat"]) == pytest.approx(right.mean())
            pairs = u[queries][~right, None] > u[queries][right]
            assert float(one["r_auroc_of_repeat"]) == pytest.approx(pairs.mean())
    assert found["accuracy"].values == pytest.approx(found["accuracy_of_repeat"].mean("repeat").values)
    assert found.attrs["queries"] == 4 * 27


def test_known_values_and_planted_defects():
    x, labels, u = blobs(noise=0.01)
    assert few_shot(x, labels, u, (1, 2), repeats=2)["accuracy"].values == pytest.approx([1.0, 1.0])
    assert np.isnan(few_shot(x, labels, u, (1, 2), repeats=2)["r_auroc"]).all()
    noise = RNG.normal(size=(400, 8))
    of_noise = few_shot(noise, np.repeat(np.arange(4), 100), RNG.random(400), (1, 5), repeats=10)
    for name, value in (("accuracy", 0.25), ("r_auroc", 0.5)):
        assert (abs(of_noise[name] - value) / of_noise[f"{name}_se"] < limit(4)).all()
    x, labels, u = blobs(each=60)
    right = few_shot(x, labels, u, (2,), repeats=10)
    assert (right["r_auroc_low"] > 0.5).all()
    swapped = few_shot(x, labels, -u, (2,), repeats=10)
    assert swapped["r_auroc"].values == pytest.approx(1 - right["r_auroc"].values)
    place = right["place"].values[0]
    leaked = brute(x, labels, place, 2, 0, "nearest")  # planted: the database is among its own queries
    assert leaked.mean() > brute(x, labels, place, 2, 2, "nearest").mean() + 0.01


def test_more_shots_are_better_and_draws_follow_the_seed():
    x, labels, u = blobs(each=40)
    names = np.array(["cat", "dog", "eel", "fox"])[labels]
    one, again, other = (few_shot(x, names, u, repeats=10, seed=seed) for seed in (0, 0, 1))
    assert one.equals(again)
    assert not one.equals(other)
    assert (np.diff(one["accuracy"]) > 0).all()


def test_refusals_say_what_to_do():
    x, labels, u = blobs(each=5)
    with pytest.raises(InferenceError, match="a class has only 5 images"):
        few_shot(x, labels, u, (1, 5))
    with pytest.raises(InferenceError, match="give one of"):
        few_shot(x, labels, u, (1,), method="median")
    with pytest.raises(DataError, match="give one for each of the 20 images"):
        few_shot(x, labels[:-1], u, (1,))
    with pytest.raises(DataError, match="not finite"):
        few_shot(np.where(x > 3, np.nan, x), labels, u, (1,))
    assert few_shot(x, labels, u, (1, 4), repeats=2)["accuracy"].notnull().all()  # the remedy of the first
