"""Active learning: labels that are never read too early, acquisitions that are known to win, and those that are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from calibrant.errors import InferenceError
from calibrant.evaluation import active_learning

RNG = np.random.default_rng(0)


class Sealed:
    """Labels that can be asked for at positions, a few at a time, and in no other way."""

    def __init__(self, labels: np.ndarray, most: int) -> None:
        self.labels, self.most, self.asked = labels, most, []

    def __getitem__(self, positions: Any) -> np.ndarray:
        positions = np.asarray(positions)
        assert positions.ndim == 1
        assert len(positions) <= self.most, "more labels are read than are acquired"
        self.asked.append(positions)
        return self.labels[positions]

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"labels are read by {name}")

    def __len__(self) -> int:
        raise AssertionError("labels are counted")

    def __iter__(self) -> Any:
        raise AssertionError("all labels are read")


def clusters(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two clusters that are long beside the distance of their means, labels, and nearness to the true boundary."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(2, size=count)
    side = np.where(labels == 1, 1.0, -1.0) * rng.exponential(1.0, count)
    along = rng.uniform(-1, 1, count)
    return np.stack([side, along], 1), labels, -np.abs(side)


def test_labels_are_read_when_they_are_acquired_and_not_before():
    pool, labels, u = clusters(120, 0)
    sealed = Sealed(labels, 8)
    ways = ("random", "uncertainty", "least uncertainty", "entropy", "k-centre")
    found = active_learning(pool, sealed, u, pool[:50], labels[:50], ways, start=8, batch=4, rounds=3, repeats=2)
    order = found["order"].transpose("repeat", "acquisition", "position").values.reshape(-1, 20)
    assert np.concatenate(sealed.asked).tolist() == order.ravel().tolist()
    assert all(len(np.unique(row)) == 20 for row in order)
    assert (order.reshape(2, 5, 20)[:, :, :8] == order.reshape(2, 5, 20)[:, :1, :8]).all()  # one start for all
    open_labels = active_learning(pool, labels, u, pool[:50], labels[:50], ways, start=8, batch=4, rounds=3, repeats=2)
    assert found.equals(open_labels)
    with pytest.raises(AssertionError, match="more labels are read"):  # planted: the test sees a leak
        sealed[np.arange(120)]


def test_acquisitions_choose_what_they_say():
    pool, labels, u = clusters(60, 1)
    ways = ("uncertainty", "least uncertainty", "k-centre")
    found = active_learning(pool, labels, u, pool, labels, ways, start=5, batch=5, rounds=1, repeats=1)
    order = found["order"].isel(repeat=0)
    start, free = order.values[0, :5], np.setdiff1d(np.arange(60), order.values[0, :5])
    ranked = free[np.argsort(-u[free])]
    assert set(order.sel(acquisition="uncertainty").values[5:]) == set(ranked[:5])
    assert set(order.sel(acquisition="least uncertainty").values[5:]) == set(ranked[-5:])
    scaled = (pool - pool.mean(0)) / pool.std(0)
    known = list(start)
    for _ in range(5):
        far = [np.linalg.norm(scaled[known] - scaled[i], axis=1).min() if i not in known else -1 for i in range(60)]
        known.append(int(np.argmax(far)))
    assert order.sel(acquisition="k-centre").values.tolist() == known
    tied = active_learning(pool, labels, 0 * u, pool, labels, ("uncertainty",), start=5, batch=5, rounds=1, repeats=1)
    assert set(tied["order"].values[1, 0, 5:]) != set(free[:5])  # ties are broken by chance, not by position


def test_uncertainty_that_marks_the_boundary_beats_chance_and_its_opposite_does_not():
    pool, labels, u = clusters(400, 2)
    test, test_labels, _ = clusters(1000, 3)
    near = np.abs(test[:, 0]) < 0.5
    ways = ("uncertainty", "least uncertainty")
    settings: dict[str, Any] = {"start": 6, "batch": 3, "rounds": 5, "repeats": 8, "regularisation": 1000.0}
    found = active_learning(pool, labels, u, test[near], test_labels[near], ways, **settings)
    gain = found["gain_low"].sel(acquisition="uncertainty").item()
    assert gain > 0
    assert found["gain_high"].sel(acquisition="least uncertainty").item() < 0
    assert found["gain"].sel(acquisition="random").item() == 0
    shuffled = active_learning(pool, labels, RNG.permutation(u), test[near], test_labels[near], ways, **settings)
    assert shuffled["gain_low"].sel(acquisition="uncertainty").item() < 0  # planted: uncertainties of other images
    curve = found["accuracy_of_repeat"].mean("repeat").sel(acquisition="random").values
    area = (curve.sum() - (curve[0] + curve[-1]) / 2) / (len(curve) - 1)
    assert found["area"].sel(acquisition="random").item() == pytest.approx(area)


def test_one_class_at_the_start_is_no_failure():
    pool, labels, u = clusters(60, 4)
    found = active_learning(pool, np.zeros(60), u, pool, labels, ("entropy",), start=2, batch=2, rounds=2, repeats=1)
    assert (found["accuracy"] == (labels == 0).mean()).all()


def test_refusals_say_what_to_do():
    pool, labels, u = clusters(30, 5)
    with pytest.raises(InferenceError, match=r"\['margin'\] are unknown"):
        active_learning(pool, labels, u, pool, labels, ("margin",))
    with pytest.raises(InferenceError, match="220 labels of a pool of 30 images"):
        active_learning(pool, labels, u, pool, labels)
    with pytest.raises(InferenceError, match="1 or more"):
        active_learning(pool, labels, u, pool, labels, start=0)
    assert active_learning(pool, labels, u, pool, labels, start=5, batch=5, rounds=2, repeats=1).sizes["labelled"] == 3
