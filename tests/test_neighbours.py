"""Nearest neighbours: brute force, ties, self-matches, duplicates, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations import neighbours
from calibrant.evaluation.representations.neighbours import nearest_neighbours

RNG = np.random.default_rng(0)


def brute(queries: np.ndarray, database: np.ndarray, k: int, own: np.ndarray | None = None) -> np.ndarray:
    """Positions by a loop over queries, ties by position."""
    found = []
    for place, query in enumerate(queries.astype(np.float64)):
        cosines = [
            -round(float(query @ row / max(np.linalg.norm(query) * np.linalg.norm(row), 1e-300)), 12)
            for row in database.astype(np.float64)
        ]
        order = [i for i in np.argsort(cosines, kind="stable") if own is None or i != own[place]]
        found.append(order[:k])
    return np.array(found)


@pytest.fixture(params=[1 << 28, 1 << 12], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("k", [1, 5, 59])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_neighbours_are_those_of_a_loop(k, dtype):
    x = RNG.normal(size=(60, 7)).astype(dtype)
    found = nearest_neighbours(x, k=k)
    assert (found.index == brute(x, x, k, np.arange(60))).all()
    assert (np.diff(found.similarity, axis=1) <= 0).all()
    assert not found.tied.any()
    other = RNG.normal(size=(70, 7)).astype(dtype)
    assert (nearest_neighbours(torch.from_numpy(x), other, k).index == brute(x, other, k)).all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("copies", [2, 30])
def test_duplicates_are_tied_and_the_first_comes_first(copies):
    x = np.repeat(RNG.normal(size=(4, 6)), copies, axis=0)[RNG.permutation(4 * copies)]
    found = nearest_neighbours(x, k=copies + 3)
    assert (found.index == brute(x, x, copies + 3, np.arange(len(x)))).all()
    assert found.tied.all() == (copies > 2)
    assert np.allclose(found.similarity[:, : copies - 1], 1.0, atol=1e-12)


@pytest.mark.usefixtures("blocks")
def test_zero_embeddings_are_equally_far_from_all():
    found = nearest_neighbours(np.zeros((40, 3)), k=2)
    assert (found.index[0] == [1, 2]).all()
    assert (found.index[1:] == np.where(np.arange(1, 40)[:, None] == 1, [0, 2], [0, 1])).all()
    assert (found.similarity == 0).all()


def test_a_query_is_not_its_own_neighbour_and_the_second_hit_may_be():
    """Of two equal images, the second hit of the later one is that image itself."""
    x = np.concatenate([RNG.normal(size=(20, 5)), np.ones((2, 5))])
    own = np.arange(22)
    assert (nearest_neighbours(x).index[:, 0] != own).all()
    second = nearest_neighbours(x, self_match="second-hit").index[:, 0]
    assert (second[:20] == nearest_neighbours(x).index[:20, 0]).all()
    assert second[21] == 21
    assert nearest_neighbours(x).index[21, 0] == 20
    assert (nearest_neighbours(x, x).index[:21, 0] == own[:21]).all()


def test_queries_that_are_a_part_of_the_database_are_left_out_by_their_position_in_it():
    """The trap: a position in the list of queries is no position in the database."""
    x, part = RNG.normal(size=(30, 5)), np.array([25, 3, 7])
    found = nearest_neighbours(x[part], x, own=part)
    assert (found.index == nearest_neighbours(x).index[part]).all()
    assert (nearest_neighbours(x[part], x).index[:, 0] == part).all()
    mixed = nearest_neighbours(x[part], x, own=[25, -1, 7]).index[:, 0]
    assert mixed[1] == 3
    assert (mixed[[0, 2]] == found.index[[0, 2], 0]).all()


def test_large_positions_of_close_images_are_exact():
    """Cosines that differ by less than float32 can hold."""
    x = 1 + 1e-6 * RNG.normal(size=(300, 64))
    assert (nearest_neighbours(x, k=3).index == brute(x, x, 3, np.arange(300))).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"queries": np.ones(3)}, DataError, r"queries: float64 of shape \(3,\); give embeddings"),
        ({"queries": np.ones((3, 2)), "database": np.ones((3, 4))}, DataError, "2 features and the database 4"),
        ({"queries": np.ones((3, 2)), "k": 3}, InferenceError, "k goes from 1 to 2"),
        ({"queries": np.ones((3, 2)), "own": [0, 1, 3]}, InferenceError, "own: give a position from −1 to 2"),
        ({"queries": np.ones((3, 2)), "self_match": "kept"}, InferenceError, "give 'excluded' or 'second-hit'"),
        ({"queries": np.array([[1.0, np.nan], [1, 1]])}, DataError, "1 of 2 embeddings hold NaN"),
    ],
)
def test_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        nearest_neighbours(**arguments)
