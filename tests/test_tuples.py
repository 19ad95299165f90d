"""Pairs and tuples of labelled images: shares, classes, no image with itself, no copies, soft labels, refusals."""

import re

import numpy as np
import pytest
import torch
from agreement import limit

import calibrant as cal
from calibrant.errors import DataError

SIZES = [2, 3, 5, 30]


def labelled(sizes=SIZES, seed=0):
    """Images whose only entry is their position, with classes 10, 11, … in random order."""
    y = np.random.default_rng(seed).permutation(np.repeat(10 + np.arange(len(sizes)), sizes))
    x = np.arange(len(y), dtype=np.float32)[:, None]
    return cal.data.Data({"x": x}, {"y": y}, name="images")


def positions(tuples):
    """Positions of the images of all tuples, by covariate, and y."""
    observed, covariates = tuples.tensors()
    return {name: value[..., 0].long().numpy() for name, value in covariates.items()}, observed["y"].numpy()


def agrees(share, expected, count, tests):
    assert abs(share - expected) < limit(tests) * (expected * (1 - expected) / count) ** 0.5 + 1e-12


@pytest.mark.parametrize("balance", ["images", "classes"])
def test_pairs_match_where_y_says_so(balance):
    data, count = labelled(), 20_000
    classes = data.values("y").numpy()
    rows, y = positions(cal.representations.pairs(data, count, seed=1, matching=0.3, balance=balance))
    assert not (rows["x"] == rows["other"]).any()
    assert (y.astype(bool) == (classes[rows["x"]] == classes[rows["other"]])).all()
    assert y.sum() == 0.3 * count
    for one, size in zip(np.unique(classes), SIZES, strict=True):
        share = size / len(data) if balance == "images" else 1 / len(SIZES)
        for kind in (0, 1):
            first = classes[rows["x"][y == kind]]
            agrees((first == one).mean(), share, len(first), 16)
    second = rows["other"][y == 0]
    if balance == "images":  # the reference image has another class: rest of the images, each with equal odds
        expected = sum((SIZES[c] / 40) * 2 / (40 - SIZES[c]) for c in (1, 2, 3))
        agrees((classes[second] == 10).mean(), expected, len(second), 1)
    else:
        agrees((classes[second] == 10).mean(), 1 / 4, len(second), 1)


def test_partners_are_uniform_over_the_other_images_of_the_class():
    data = labelled([4, 4])
    rows, _ = positions(cal.representations.pairs(data, 24_000, seed=3, matching=1.0))
    table = np.zeros((8, 8))
    np.add.at(table, (rows["x"], rows["other"]), 1)
    assert np.count_nonzero(table) == 24
    for share in table[table > 0] / 24_000:
        agrees(share, 1 / 24, 24_000, 24)


def test_random_pairs_match_as_often_as_chance_has_it():
    data, count = labelled(), 20_000
    rows, y = positions(cal.representations.pairs(data, count, matching=None))
    assert not (rows["x"] == rows["other"]).any()
    agrees(y.mean(), sum(n * (n - 1) for n in SIZES) / (40 * 39), count, 1)


@pytest.mark.parametrize("balance", ["images", "classes"])
def test_one_candidate_matches(balance):
    data = labelled()
    classes = data.values("y").numpy()
    tuples = cal.representations.candidates(data, 2000, candidates=6, seed=2, balance=balance)
    rows, y = positions(tuples)
    same = classes[rows["candidates"]] == classes[rows["x"]][:, None]
    assert same[:, 0].all()
    assert not same[:, 1:].any()
    assert (y == 1).all()
    assert not (rows["candidates"][:, 0] == rows["x"]).any()
    assert (data.labels()[rows["x"]] == tuples.coords["first"]).all()


def test_the_place_of_the_match_is_one_hot():
    data, count = labelled(), 4000
    classes = data.values("y").numpy()
    rows, y = positions(cal.representations.candidates(data, count, candidates=5, place="random"))
    assert ((classes[rows["candidates"]] == classes[rows["x"]][:, None]) == y.astype(bool)).all()
    for share in y.mean(0):
        agrees(share, 1 / 5, count, 5)


def test_a_seed_gives_the_same_tuples():
    data = labelled()
    make = cal.representations.pairs
    assert make(data, 50, seed=4).fingerprint() == make(data, 50, seed=4).fingerprint()
    assert make(data, 50, seed=4).fingerprint() != make(data, 50, seed=5).fingerprint()
    other = cal.data.Data({"x": data.values("x").numpy() + 1}, {"y": data.values("y").numpy()}, name="images")
    assert make(data, 50, seed=4).fingerprint() != make(other, 50, seed=4).fingerprint()


def test_images_are_not_copied_and_each_is_read_once(tmp_path):
    """100,000 pairs of 64×64 images of a file on disk: only the rows of a batch are read."""
    images = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (600, 64, 64))
    images[:] = (np.arange(600) % 251)[:, None, None]
    y = np.arange(600) % 6
    read = []

    def counted(batch):
        read.append(len(batch["x"]))
        return batch

    data = cal.data.Data({"x": images}, {"y": y}, transform=counted)
    pairs = cal.representations.pairs(data, 100_000, seed=1)
    read.clear()
    _, batch = pairs.batch(np.arange(500))
    assert batch["x"].shape == batch["other"].shape == (500, 64, 64)
    assert batch["x"].dtype == torch.uint8
    used = np.unique([pairs.coords[name][:500] for name in ("first", "second")])
    assert sum(read) == len(used) < 600
    assert (batch["x"][:, 0, 0].numpy() == pairs.coords["first"][:500] % 251).all()
    stored = sum(pairs._source[name].nbytes for name in ("x", "other"))
    assert stored == 2 * 8 * 100_000


def test_features_are_looked_up_too():
    data = labelled()
    features = cal.data.Data({"x": torch.randn(40, 7)}, {"y": data.values("y")})
    tuples = cal.representations.candidates(features, 9, candidates=4)
    observed, covariates = tuples.tensors()
    assert covariates["candidates"].shape == (9, 4, 7)
    model = cal.models.create("mcinfonce", shape=[7], latents=3, encoder="linear")
    cal.program.check_program(model, observed, covariates)


# -- soft labels -------------------------------------------------------------------------------------------------------

SOFT = np.array([[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.1, 0.2, 0.7], [0.0, 0.3, 0.7]])


def soft_data():
    return cal.data.Data({"x": np.arange(4, dtype=np.float32)[:, None]}, {"y": np.array([0, 0, 2, 2])})


def test_soft_labels_match_with_the_probability_that_two_labels_agree():
    count = 60_000
    rows, y = positions(cal.representations.pairs(soft_data(), count, matching=None, label_probabilities=SOFT))
    agree = SOFT @ SOFT.T
    for i in range(4):
        for j in set(range(4)) - {i}:
            found = y[(rows["x"] == i) & (rows["other"] == j)]
            agrees(found.mean(), agree[i, j], len(found), 12)


def test_partners_with_soft_labels_follow_the_label_that_was_drawn():
    count = 60_000
    rows, y = positions(cal.representations.pairs(soft_data(), count, matching=0.5, label_probabilities=SOFT))
    assert not (rows["x"] == rows["other"]).any()
    for i in range(4):
        others = [j for j in range(4) if j != i]
        match = sum(SOFT[i, c] * SOFT[others, c] / SOFT[others, c].sum() for c in range(3) if SOFT[i, c])
        rest = sum(SOFT[i, c] * (1 - SOFT[others, c]) / (1 - SOFT[others, c]).sum() for c in range(3))
        for kind, expected in ((1, match), (0, rest)):
            found = rows["other"][(rows["x"] == i) & (y == kind)]
            for j, share in zip(others, expected, strict=True):
                agrees((found == j).mean(), share, len(found), 24)


def test_certain_soft_labels_are_hard_labels():
    data = labelled()
    classes = data.values("y").numpy() - 10
    tables = {"label_probabilities": np.eye(4)[classes]}
    for balance in ("images", "classes"):
        rows, y = positions(cal.representations.pairs(data, 4000, balance=balance, **tables))
        assert (y.astype(bool) == (classes[rows["x"]] == classes[rows["other"]])).all()
        rows, y = positions(cal.representations.candidates(data, 500, 4, balance=balance, **tables))
        same = classes[rows["candidates"]] == classes[rows["x"]][:, None]
        assert (same == (np.arange(4) == 0)).all()


# -- what users do wrong -----------------------------------------------------------------------------------------------


def test_classes_of_one_image_are_refused_and_the_remedy_works():
    data = labelled([1, 3, 4])
    with pytest.raises(DataError, match=r"classes \[10\] of 'y' have one image each") as refusal:
        cal.representations.pairs(data, 10)
    remedy = re.search(r"representations\.matchable\(data, label='y'\)", str(refusal.value))
    left = eval("cal." + remedy[0], {"cal": cal, "data": data})
    assert sorted(set(left.values("y").tolist())) == [11, 12]
    assert len(cal.representations.pairs(left, 10)) == 10
    assert len(cal.representations.pairs(data, 10, matching=0.0)) == 10  # nothing has to match
    assert len(cal.representations.pairs(data, 10, matching=None)) == 10
    with pytest.raises(DataError, match="no class in 'y' has two images"):
        cal.representations.matchable(labelled([1, 1]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda data: cal.representations.pairs(data, 0), "count=0"),
        (lambda data: cal.representations.pairs(data, 5, matching=1.5), "matching=1.5"),
        (lambda data: cal.representations.pairs(data, 5, balance="evenly"), "balance='evenly'"),
        (lambda data: cal.representations.pairs(data, 5, label="class"), "no 'class'; there are: x, y"),
        (lambda data: cal.representations.pairs(data, 5, label="x"), r"'x' has shape \(40, 1\)"),
        (lambda data: cal.representations.pairs(data.subset([0]), 5, matching=None), "two images or more"),
        (lambda data: cal.representations.candidates(data, 5, candidates=1), "candidates=1"),
        (lambda data: cal.representations.candidates(data, 5, place="last"), "place='last'"),
        (lambda data: cal.representations.pairs(labelled([4]), 5), "all images have the class 10"),
        (lambda data: cal.representations.pairs(data, 5, label_probabilities=np.eye(4)), r"wanted \(40, classes\)"),
        (lambda data: cal.representations.pairs(data, 5, label_probabilities=np.ones((40, 3))), "sum to 1"),
        (lambda data: cal.representations.pairs(data, 5, label_probabilities=np.eye(40)), "no other image has"),
        (lambda data: cal.representations.pairs(data, 5, label_probabilities=np.ones((40, 1))), "the same class"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(DataError, match=words):
        call(labelled())
