"""Crop test, human entropy, other sets and mixtures: loops, known values, planted defects."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agreement import limit
from scipy.special import ndtr
from scipy.stats import spearmanr
from torch.nn.functional import interpolate

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import (
    Embedded,
    crop_shares,
    crop_test,
    cropped,
    human_entropy,
    mixed_retrieval,
    ood_auroc,
    retrieval,
)

FEW = {"resamples": 100}

# -- crops -------------------------------------------------------------------------------------------------------------


def test_a_crop_is_the_middle_square_resized():
    images = torch.rand(4, 3, 10, 14, generator=torch.Generator().manual_seed(0))
    shares = [0.1, 0.44, 0.5, 1.0]
    found = cropped(images, shares)
    assert found.shape == images.shape
    for image, result, side in zip(images, found, (1, 4, 5, 10), strict=True):
        top, left = round((10 - side) / 2), round((14 - side) / 2)
        middle = image[None, :, top : top + side, left : left + side]
        assert torch.equal(result, interpolate(middle, size=(10, 14), mode="bilinear")[0])
    square = torch.rand(1, 1, 8, 8)
    assert torch.equal(cropped(square, [1.0]), square)
    ramp = torch.arange(9.0).expand(1, 1, 9, 9)
    assert float(cropped(ramp, [1 / 3]).mean()) == pytest.approx(4.0)  # the middle stays in the middle
    assert float(cropped(ramp, [1 / 3]).min()) == 3.0


def test_shares_are_uniform_and_always_the_same():
    shares = crop_shares(10_000, seed=3)
    assert np.array_equal(shares, crop_shares(10_000, seed=3))
    assert not np.array_equal(shares, crop_shares(10_000, seed=4))
    assert shares.min() >= 0.1
    assert shares.max() <= 0.75
    assert abs(shares.mean() - 0.425) < limit(1) * 0.65 / np.sqrt(12 * 10_000)
    with pytest.raises(InferenceError, match="give shares of the side"):
        crop_shares(3, low=0.0)


def test_the_crop_test_has_its_values_and_sees_a_swapped_sign():
    rng = np.random.default_rng(0)
    shares, whole = crop_shares(400), rng.normal(size=400)
    crops = whole + 0.5 - shares + 0.5 * rng.normal(size=400)
    found = crop_test(whole, crops, shares, **FEW)
    assert float(found["crop_less_certain"]) == np.mean([b > a for a, b in zip(whole, crops, strict=True)])
    assert float(found["crop_spearman"]) == pytest.approx(spearmanr(-crops, shares).statistic)
    clear = crop_test(np.zeros(400), 1 - shares, shares, **FEW)
    assert float(clear["crop_less_certain"]) == 1.0
    assert float(clear["crop_spearman"]) == pytest.approx(1.0)
    swapped = crop_test(np.zeros(400), shares - 1, shares, **FEW)
    assert float(swapped["crop_less_certain"]) == 0.0
    assert float(swapped["crop_spearman"]) == pytest.approx(-1.0)
    shuffled = crop_test(whole, crops, rng.permutation(shares), resamples=300)
    assert abs(float(shuffled["crop_spearman"])) < limit(1) * float(shuffled["crop_spearman_se"])
    same = crop_test(whole, whole, **FEW)
    assert float(same["crop_less_certain"]) == 0.0
    assert float(same["crop_ties"]) == 1.0
    assert "crop_spearman" not in same


def test_crops_refuse_what_they_cannot_crop():
    with pytest.raises(DataError, match="give floats"):
        cropped(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0.5, 0.5])
    with pytest.raises(DataError, match="give one above 0 and at most 1 for each of the 2 images"):
        cropped(torch.zeros(2, 3, 4, 4), [0.5, 1.5])
    with pytest.raises(DataError, match="crops has the shape"):
        crop_test(np.zeros(3), np.zeros(4))


# -- people ------------------------------------------------------------------------------------------------------------


def confounded(within: float, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Uncertainties and entropies of 10 classes that differ, with a correlation within them."""
    rng = np.random.default_rng(seed)
    classes = np.arange(1000) % 10
    one, other = rng.multivariate_normal([0, 0], [[1, within], [within, 1]], 1000).T
    return one + 3 * classes, np.exp(other + 3 * classes - 30), classes


def test_hard_classes_make_a_correlation_overall_and_none_within():
    u, entropy, classes = confounded(0.0)
    found = human_entropy(u, entropy, classes, **FEW)
    assert float(found["human_spearman"]) > 0.9
    assert abs(float(found["human_spearman_within"])) < limit(1) * float(found["human_spearman_within_se"])
    assert float(found["human_spearman"]) == pytest.approx(spearmanr(u, entropy).statistic)
    real = human_entropy(*confounded(0.6), **FEW)
    truth = 6 / np.pi * np.arcsin(0.3)
    assert abs(float(real["human_spearman_within"]) - truth) < limit(1) * float(real["human_spearman_within_se"])
    by_class = real["human_spearman_of_class"].values
    u, entropy, classes = confounded(0.6)
    assert by_class[3] == pytest.approx(spearmanr(u[classes == 3], entropy[classes == 3]).statistic)
    assert float(real["human_spearman_within"]) == pytest.approx(by_class.mean(), abs=1e-9)  # no ties, equal sizes
    swapped = human_entropy(-confounded(0.6)[0], *confounded(0.6)[1:], **FEW)
    assert float(swapped["human_spearman_within_high"]) < 0


def test_ambiguous_images_are_found_by_pairs():
    rng = np.random.default_rng(0)
    counts = rng.multinomial(10, [0.7, 0.1, 0.1, 0.1], 150)
    counts[:60] = [10, 0, 0, 0]
    u, classes = rng.normal(size=150).round(1) + 0.5 * (counts.max(1) < 10), rng.integers(0, 4, 150)
    found = human_entropy(u, torch.from_numpy(counts), classes, **FEW)
    p = counts / 10
    entropy = [-sum(a * np.log(a) for a in row if a) for row in p]
    assert found["human_entropy"].values == pytest.approx(entropy)
    high, low = np.flatnonzero(counts.max(1) < 10), np.flatnonzero(counts.max(1) == 10)
    wins = {(i, j): (u[i] > u[j]) + (u[i] == u[j]) / 2 for i in high for j in low}
    assert float(found["human_auroc"]) == pytest.approx(np.mean(list(wins.values())))
    within = [win for (i, j), win in wins.items() if classes[i] == classes[j]]
    assert float(found["human_auroc_within"]) == pytest.approx(np.mean(within))
    assert float(found["human_ambiguous"]) == len(high) / 150


def test_images_without_human_labels_are_left_out():
    u, entropy, classes = confounded(0.3)
    gaps = entropy.copy()
    gaps[classes == 4] = np.nan
    gaps[:7] = np.nan
    found = human_entropy(u, gaps, classes, **FEW)
    kept = np.isfinite(gaps)
    assert found["image"].values.tolist() == np.flatnonzero(kept).tolist()
    assert found["label"].values.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert float(found["human_spearman"]) == pytest.approx(spearmanr(u[kept], gaps[kept]).statistic)
    with pytest.raises(DataError, match="no image has human labels"):
        human_entropy(u, np.full(1000, np.nan))
    with pytest.raises(DataError, match="give shares"):
        human_entropy(u, -np.ones((1000, 3)))
    assert "human_spearman_within" not in human_entropy(u, entropy, **FEW)


# -- other sets --------------------------------------------------------------------------------------------------------


def test_the_auroc_of_another_set_is_known_and_its_sign_is_seen():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(size=600), rng.normal(1.0, 1.0, 400)
    found, swapped = (ood_auroc(sign * inside, sign * outside, resamples=300) for sign in (1, -1))
    truth = float(ndtr(1 / np.sqrt(2)))
    assert abs(float(found["ood_auroc"]) - truth) < limit(1) * float(found["ood_auroc_se"])
    wins = [(b > a) + (a == b) / 2 for a in inside[:40] for b in outside[:30]]
    assert float(ood_auroc(inside[:40], outside[:30], **FEW)["ood_auroc"]) == pytest.approx(np.mean(wins))
    assert float(swapped["ood_auroc"]) == pytest.approx(1 - float(found["ood_auroc"]))
    half = ood_auroc(inside, outside, balanced=True, most=300, **FEW)
    assert (half.attrs["images_inside"], half.attrs["images_outside"]) == (300, 300)
    assert half.identical(ood_auroc(inside, outside, balanced=True, most=300, **FEW))
    labels = [np.arange(600) % 20, np.arange(400) % 9]
    assert float(ood_auroc(inside, outside, *labels, cluster="class", **FEW)["ood_auroc"]) == float(found["ood_auroc"])
    with pytest.raises(InferenceError, match="most=0"):
        ood_auroc(inside, outside, most=0)


def two_sets(seed: int = 0) -> tuple[Embedded, Embedded]:
    """A known set with clear classes, and another one, in the same place, where all classes are one cloud."""
    rng = np.random.default_rng(seed)
    labels = np.arange(160) % 8
    known = rng.normal(size=(8, 6))[labels] + 0.1 * rng.normal(size=(160, 6))
    other = rng.normal(size=(160, 6))
    return Embedded(known, labels, rng.normal(size=160)), Embedded(other, labels, rng.normal(1.5, 1.0, 160))


def test_a_mixture_is_retrieval_with_labels_that_are_shifted_apart():
    inside, outside = two_sets()
    found = mixed_retrieval(inside, outside, **FEW)
    names = [f"{side} {label}" for side in ("in", "out") for label in inside.labels]
    joined = [
        np.concatenate([getattr(one, name) for one in (inside, outside)]) for name in ("embeddings", "uncertainty")
    ]
    plain = retrieval(joined[0], names, joined[1], ks=(1,), **FEW)
    assert float(found["mixed_r_auroc"]) == float(plain["r_auroc"])
    assert float(found["mixed_r_at_1"]) == float(plain["r_at_1"])
    assert float(found["r_at_1_inside"]) == plain["correct"].values[:160].mean()
    assert float(found["r_at_1_inside"]) > 0.9 > 0.3 > float(found["r_at_1_outside"])
    assert float(found["mixed_r_auroc_low"]) > 0.6  # the uncertainty only tells the sets apart


def test_labels_that_are_not_shifted_apart_would_be_leaked():
    """The planted defect: the same images in both sets, with the same labels; each finds its twin in the other set."""
    inside, _ = two_sets()
    found = mixed_retrieval(inside, inside, **FEW)
    assert float(found["mixed_r_at_1"]) == 0.0
    twice = [np.concatenate([getattr(inside, name)] * 2) for name in ("embeddings", "labels")]
    assert float(retrieval(*twice, **FEW)["r_at_1"]) == 1.0


def test_a_mixture_takes_equally_many_of_both():
    inside, outside = two_sets()
    few = Embedded(*(getattr(outside, name)[:50] for name in ("embeddings", "labels", "uncertainty")))
    assert mixed_retrieval(inside, few, **FEW).attrs["images_inside"] == 50
    assert mixed_retrieval(inside, few, balanced=False, **FEW).attrs["images_inside"] == 160
    assert mixed_retrieval(inside, few, most=20, **FEW).attrs["images_outside"] == 20
    narrow = Embedded(np.ones((4, 2)), np.arange(4), np.arange(4.0))
    with pytest.raises(DataError, match="different numbers of features"):
        mixed_retrieval(inside, narrow)


def mixture_part(rng, spread):
    labels = np.repeat(np.arange(20), 10)
    scale = rng.uniform(0.5, 1.5, 200) * spread
    embeddings = rng.normal(size=(20, 8))[labels] + scale[:, None] * rng.normal(size=(200, 8))
    return Embedded(embeddings, labels, scale + 0.3 * rng.normal(size=200))


def test_a_mixture_resamples_its_two_sets_apart():
    """How many images are of which set is no chance: from one pot, standard errors would be 2.3 times the spread."""
    rng = np.random.default_rng(0)
    found = [mixed_retrieval(mixture_part(rng, 0.3), mixture_part(rng, 1.3), resamples=100) for _ in range(40)]
    spread = np.std([float(one["mixed_r_at_1"]) for one in found])
    error = np.mean([float(one["mixed_r_at_1_se"]) for one in found])
    assert 0.6 * spread < error < 1.6 * spread
