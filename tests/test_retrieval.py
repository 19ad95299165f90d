"""R@1, Recall@k, R-AUROC and MAP@R: brute force, known values, quirks of published code, planted defects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agreement import limit
from scipy.stats import binom

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import Embedded, nearest_neighbours, retrieval, retrieval_difference
from calibrant.evaluation.representations.shared_database import worth_as_neighbour, worth_for_auroc
from calibrant.evaluation.statistics.counted import counted_auroc

FEW = {"resamples": 100}


def clusters(images: int = 120, classes: int = 12, spread: float = 0.7, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Noisy embeddings of classes, with uncertainties that follow the noise of each image."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    noise = rng.uniform(0.05, spread, images)
    x = rng.normal(size=(classes, 16))[labels] + 2 * noise[:, None] * rng.normal(size=(images, 16))
    return x, labels, noise


def loops(x: np.ndarray, labels: np.ndarray, u: np.ndarray, ks: tuple[int, ...]) -> dict[str, float | list[float]]:
    """The definitions, image by image and pair by pair."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    right, recall, precision = [], [], []
    for i in range(len(x)):
        others = sorted((j for j in range(len(x)) if j != i), key=lambda j: -float(unit[i] @ unit[j]))
        hits = [bool(labels[j] == labels[i]) for j in others]
        right.append(hits[0])
        recall.append([any(hits[:k]) for k in ks])
        count = sum(hits)
        precision.append(sum(sum(hits[: r + 1]) / (r + 1) for r in range(count) if hits[r]) / count if count else 0.0)
    wins = [
        1.0 if u[i] < u[j] else 0.5 if u[i] == u[j] else 0.0
        for i in range(len(x))
        if right[i]
        for j in range(len(x))
        if not right[j]
    ]
    return {
        "r_at_1": np.mean(right),
        "recall": np.mean(recall, 0).tolist(),
        "r_auroc": np.mean(wins),
        "map_at_r": np.mean(precision),
    }


@pytest.mark.parametrize("decimals", [1, 9])
def test_values_are_those_of_loops(decimals):
    x, labels, u = clusters()
    u = u.round(decimals)  # to one decimal: many ties
    found = retrieval(x, labels, u, ks=(1, 3, 7), map_at_r=True, **FEW)
    for name, value in loops(x, labels, u, (1, 3, 7)).items():
        assert found[name].values == pytest.approx(value, abs=1e-12), name
    assert 0.5 < float(found["r_auroc"]) < 1.0
    for name in ("r_at_1", "recall", "r_auroc", "map_at_r"):
        assert (found[f"{name}_low"] < found[name]).all()
        assert (found[name] < found[f"{name}_high"]).all()
    tensors = retrieval(torch.from_numpy(x), torch.from_numpy(labels), torch.from_numpy(u), ks=(1, 3, 7), **FEW)
    assert float(tensors["r_auroc"]) == float(found["r_auroc"])
    assert found.attrs["classes"] == 12
    assert not bool(found["tied"].any())


def test_known_value():
    """Two classes of pairs that find each other, and one pair whose members are nearest to others."""
    angle = np.array([0.0, 1.0, 90.0, 91.0, 1.5, 91.5]) * np.pi / 180
    x = np.stack([np.cos(angle), np.sin(angle)], 1) * np.arange(1, 7)[:, None]  # lengths do not matter
    labels = np.array(["a", "a", "b", "b", "c", "c"])
    found = retrieval(x, labels, np.array([0.1, 5.0, 0.2, 0.3, 1.0, 0.4]), ks=(1, 2), **FEW)
    assert found["neighbour"].values.tolist() == [1, 4, 3, 5, 1, 3]
    assert found["correct"].values.tolist() == [True, False, True, False, False, False]
    assert float(found["r_at_1"]) == pytest.approx(1 / 3)
    assert found["recall"].values == pytest.approx([1 / 3, 2 / 3])
    assert float(found["r_auroc"]) == 1.0


def test_swapped_sign_and_shuffled_labels_are_seen():
    x, labels, u = clusters(240)
    found, swapped = (retrieval(x, labels, sign * u, **FEW) for sign in (1, -1))
    assert float(found["r_auroc_low"]) > 0.5
    assert float(swapped["r_auroc"]) == pytest.approx(1 - float(found["r_auroc"]))
    assert float(swapped["r_auroc_high"]) < 0.5
    shuffled = retrieval(x, np.random.default_rng(0).permutation(labels), u, **FEW)
    chance = 19 / 239
    assert abs(float(shuffled["r_at_1"]) - chance) < limit(2) * np.sqrt(chance / 240)
    assert abs(float(shuffled["r_auroc"]) - 0.5) < limit(2) * float(shuffled["r_auroc_se"])
    assert float(found["r_at_1"]) > chance + limit(2) * np.sqrt(chance / 240)


def test_a_self_match_that_is_counted_is_seen_among_duplicates():
    """Two copies of each of 30 images in classes of their own: no query has a right neighbour unless it is itself."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(30, 8)), 2, axis=0)
    labels = np.arange(60)
    assert float(retrieval(x, labels, **FEW)["r_at_1"]) == 0.0
    quirk = retrieval(x, labels, self_match="second-hit", **FEW)
    assert float(quirk["r_at_1"]) == 0.5  # the later image of each pair finds itself
    assert bool(retrieval(np.repeat(x, 2, axis=0), np.repeat(labels, 2), **FEW)["tied"].all())
    counted = retrieval(x, labels, database=x, database_labels=labels, **FEW)
    assert float(counted["r_at_1"]) == 0.5
    left_out = retrieval(x, labels, database=x, database_labels=labels, own=np.arange(60), **FEW)
    assert float(left_out["r_at_1"]) == 0.0


def test_without_duplicates_the_second_hit_is_the_nearest_other_image():
    x, labels, u = clusters()
    exact, quirk = (retrieval(x, labels, u, self_match=way, **FEW) for way in ("excluded", "second-hit"))
    assert exact.drop_attrs().identical(quirk.drop_attrs())


def test_classes_with_one_image_are_wrong_or_left_out():
    x, labels, u = clusters(60)
    labels[:10] = 100 + np.arange(10)
    found = retrieval(x, labels, u, **FEW)
    assert not found["correct"].values[:10].any()
    assert found.attrs["singletons"] == 10
    without = retrieval(x, labels, u, singletons="left-out", **FEW)
    assert without["image"].values.tolist() == list(range(10, 60))
    assert float(without["r_at_1"]) == pytest.approx(float(found["r_at_1"]) * 60 / 50)
    with pytest.raises(DataError, match="no query has another image of its class"):
        retrieval(x, np.arange(60), singletons="left-out", **FEW)


def test_nan_is_refused_or_set_to_zero_and_a_failed_representation_is_refused():
    x, labels, u = clusters()
    x[3, 2] = np.nan
    with pytest.raises(DataError, match="1 of 120 embeddings hold NaN"):
        retrieval(x, labels, u, **FEW)
    zero = x.copy()
    zero[3, 2] = 0.0
    assert retrieval(x, labels, u, nan="zero", **FEW).identical(retrieval(zero, labels, u, **FEW))
    x[:110] = np.nan
    with pytest.raises(DataError, match="92% of the embeddings' entries are zero with NaN set to 0"):
        retrieval(x, labels, u, nan="zero", **FEW)


def test_all_right_has_no_r_auroc():
    x = np.repeat(np.eye(4), 3, axis=0)
    found = retrieval(x, np.repeat(np.arange(4), 3), np.arange(12.0), **FEW)
    assert float(found["r_at_1"]) == 1.0
    assert all(np.isnan(float(found[name])) for name in ("r_auroc", "r_auroc_se", "r_auroc_low", "r_auroc_high"))


def test_intervals_over_classes_are_wider_where_errors_belong_to_classes():
    rng = np.random.default_rng(1)
    labels = np.arange(400) % 20
    spread = np.where(np.arange(20) < 10, 0.05, 3.0)[labels]
    x = rng.normal(size=(20, 12))[labels] + spread[:, None] * rng.normal(size=(400, 12))
    image, group = (retrieval(x, labels, spread, cluster=c, resamples=300) for c in ("image", "class"))
    assert float(group["r_at_1"]) == float(image["r_at_1"])
    assert float(group["r_at_1_se"]) > 2 * float(image["r_at_1_se"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": np.zeros(3)}, DataError, "give one for each of the 120 images"),
        ({"uncertainty": np.zeros(3)}, DataError, "give one number for each of the 120 images"),
        ({"uncertainty": np.full(120, np.nan)}, DataError, "uncertainty is NaN for 120 of 120"),
        ({"ks": ()}, InferenceError, "give a list of whole numbers of 1 or more"),
        ({"cluster": "classes"}, InferenceError, "give 'image' or 'class'"),
        ({"nan": "drop"}, InferenceError, "give 'refuse', or 'zero'"),
        ({"singletons": "right"}, InferenceError, "give 'wrong' or 'left-out'"),
        ({"database": np.ones((3, 16))}, DataError, "give database and database_labels together"),
        ({"resamples": 10}, InferenceError, "need at least 100"),
    ],
)
def test_refusals(change, error, message):
    x, labels, u = clusters()
    with pytest.raises(error, match=message):
        retrieval(**{"embeddings": x, "labels": labels, "uncertainty": u, **FEW, **change})


# -- intervals where the queries are the database ----------------------------------------------------------------------


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("k", [1, 3])
def test_an_image_is_worth_what_queries_lose_without_it(by_class, k):
    rng = np.random.default_rng(0)
    x, labels, _ = clusters(40, 5)
    index = nearest_neighbours(x, k=39).index
    right, worth = labels[index] == labels[:, None], rng.normal(size=(40, 2))
    units = labels if by_class else np.arange(40)
    lost = np.zeros(40)
    for query in range(40):
        now = bool(right[query, :k].any())
        seen: set[int] = set()
        for image in index[query, :k]:
            if units[image] in {units[query], *seen}:
                continue
            seen.add(units[image])
            left = [bool(labels[j] == labels[query]) for j in index[query] if units[j] != units[image]]
            then = 1.0 if any(left[: k - 1]) else np.mean(left[k - 1 : k + 7])
            lost[image] += worth[query, int(now)] - worth[query, 0] - then * (worth[query, 1] - worth[query, 0])
    assert worth_as_neighbour(index, right, units, k, worth) == pytest.approx(lost)


def test_contributions_to_an_auroc_are_its_derivatives():
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=400).round(1), rng.random(400) < 0.4
    worth = worth_for_auroc(scores, positive)
    auroc, ones = counted_auroc(scores, positive), np.ones((1, 400))
    for image in range(0, 400, 40):
        more = ones + 0.01 * (np.arange(400) == image)
        slope = (auroc(more) - auroc(ones))[0] / 0.01 * 400
        assert slope == pytest.approx(worth[image, int(positive[image])], abs=0.02)
    assert worth[np.arange(400), positive.astype(int)].mean() == pytest.approx(0.0, abs=1e-12)


def simulated(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images of 20 classes that are drawn at random."""
    labels = np.repeat(np.arange(20), 10)
    spread = rng.uniform(0.2, 1.6, 200)
    x = rng.normal(size=(20, 8))[labels] + spread[:, None] * rng.normal(size=(200, 8))
    return x, labels, spread + 0.3 * rng.normal(size=200)


@pytest.mark.slow
def test_intervals_cover_what_new_classes_have():
    """At least 92% of them; those over queries with a fixed database, the planted defect, do not."""
    rng, names = np.random.default_rng(0), ("r_at_1", "r_auroc")
    many = [retrieval(*simulated(rng), ks=(1,), **FEW) for _ in range(1000)]
    truth = {name: float(np.mean([float(one[name]) for one in many])) for name in names}
    hits, fixed = dict.fromkeys(names, 0), 0
    for _ in range(300):
        x, labels, u = simulated(rng)
        found = retrieval(x, labels, u, ks=(1,), resamples=300)
        for name in names:
            hits[name] += bool(found[f"{name}_low"] <= truth[name] <= found[f"{name}_high"])
        others = {"database": x, "database_labels": labels, "own": np.arange(200), "cluster": "image"}
        narrow = retrieval(x, labels, u, ks=(1,), resamples=300, **others)
        fixed += bool(narrow["r_at_1_low"] <= truth["r_at_1"] <= narrow["r_at_1_high"])
    assert min(hits.values()) >= binom.ppf(1e-3, 300, 0.92), hits
    assert fixed < binom.ppf(1e-3, 300, 0.92)


# -- two representations -----------------------------------------------------------------------------------------------


def test_differences_are_paired():
    x, labels, u = clusters(240)
    rng = np.random.default_rng(0)
    noisy = x + 0.8 * rng.normal(size=x.shape)
    plain, worse = Embedded(x, labels, u), Embedded(noisy, labels, rng.permutation(u))
    one, other = (retrieval(e.embeddings, labels, e.uncertainty, resamples=300) for e in (plain, worse))
    found = retrieval_difference(plain, worse, resamples=300)
    for name in ("r_at_1", "r_auroc"):
        assert float(found[name]) == pytest.approx(float(one[name]) - float(other[name]))
        assert float(found[f"{name}_low"]) > 0
    swapped = retrieval_difference(worse, plain, resamples=300)
    assert float(swapped["r_auroc_high"]) < 0
    almost = Embedded(x + 0.01 * rng.normal(size=x.shape), labels, u)
    close = retrieval_difference(plain, almost, resamples=300)
    assert float(close["r_at_1_se"]) < 0.5 * float(one["r_at_1_se"])
    assert float(close["r_at_1_low"]) <= 0 <= float(close["r_at_1_high"])
    with pytest.raises(DataError, match="give the same images in the same order"):
        retrieval_difference(plain, Embedded(x, labels[::-1], u))
