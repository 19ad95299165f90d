"""Corruptions of images and the matching of sets: what they change, what they keep, and that levels are nested."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from agreement import limit
from scipy.ndimage import gaussian_filter
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.evaluation import corrupted, shuffled_across_images
from calibrant.evaluation.uncertainty.corruptions import KINDS, chosen_levels
from calibrant.evaluation.uncertainty.matching import amount_of, rescaled, strata
from calibrant.evaluation.uncertainty.trends import trend


def images(count: int = 20, shape: tuple[int, ...] = (2, 8, 10)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    strength = torch.rand(count, *[1] * len(shape), generator=generator, dtype=torch.float64) + 0.2
    return strength * torch.randn(count, *shape, generator=generator, dtype=torch.float64) + 3


@pytest.mark.parametrize("kind", KINDS)
def test_levels_get_stronger_keep_shapes_and_repeat(kind):
    x = images()
    levels = KINDS[kind].levels
    assert len(levels) == 5
    assert list(levels) == sorted(set(levels))
    shown = [corrupted(x, kind, level) for level in levels]
    change = [(one - x).square().mean().item() for one in shown]
    assert change == sorted(change)
    assert change[0] > 0
    assert all(one.shape == x.shape and one.dtype == x.dtype for one in shown)
    assert torch.equal(shown[2], corrupted(x, kind, levels[2]))
    assert torch.equal(x, images())
    if kind in ("noise", "occlusion", "permutation"):
        assert not torch.equal(shown[2], corrupted(x, kind, levels[2], seed=1))
    flat = corrupted(x[:, 0, :, :8].flatten(1), kind, levels[2])
    assert torch.allclose(flat, corrupted(x[:, :1, :, :8], kind, levels[2]).flatten(1))


def test_noise_is_one_field_that_grows_in_units_of_the_contrast():
    x = images(200)
    one, other = (corrupted(x, "noise", level) - x for level in (0.5, 2.0))
    assert torch.allclose(4 * one, other)
    contrast = (x - x.mean((1, 2, 3), keepdim=True)).square().mean((1, 2, 3)).sqrt().mean()
    assert abs(one.std() / contrast / 0.5 - 1) < limit(1) / math.sqrt(2 * one.numel())


@pytest.mark.parametrize("strength", [0.06, 0.25])
def test_blur_is_that_of_scipy(strength):
    x = images()
    wanted = gaussian_filter(x.numpy(), 8 * strength, axes=(2, 3), mode="reflect", radius=math.ceil(40 * strength))
    assert np.allclose(corrupted(x, "blur", strength).numpy(), wanted)


def test_occluders_grow_in_the_colour_of_the_background():
    x = images()
    background = x.median()
    hidden = [corrupted(x, "occlusion", level) == background for level in KINDS["occlusion"].levels]
    for inner, outer in pairwise(hidden):
        assert not (inner & ~outer & (x != background)).any()
    for level, part in zip(KINDS["occlusion"].levels, hidden, strict=True):
        assert part.double().mean() == pytest.approx(level, abs=0.06)
        assert torch.equal(part[:, 0], part[:, 1]) or (x == background).any()
    places = [part.nonzero()[0].tolist() for part in hidden[0]]
    assert len({tuple(place) for place in places}) > 5  # each image has a place of its own


def test_contrast_falls_about_the_mean():
    x = images()
    less = corrupted(x, "contrast", 0.7)
    assert torch.allclose(less.mean((1, 2, 3)), x.mean((1, 2, 3)))
    assert torch.allclose(amount_of(less, "contrast"), 0.3 * amount_of(x, "contrast"))


def test_permuted_pixels_move_together_in_all_channels_and_none_is_lost():
    x = images()
    before: set[tuple[int, int]] = set()
    for level in KINDS["permutation"].levels:
        shown = corrupted(x, "permutation", level)
        assert torch.equal(shown.flatten(2).sort(2).values, x.flatten(2).sort(2).values)
        moved = (shown != x).flatten(2)
        assert torch.equal(moved[:, 0], moved[:, 1])
        assert moved[:, 0].sum(1).tolist() == [round(level * 80)] * len(x)
        now = {(int(i), int(j)) for i, j in moved[:, 0].nonzero()}
        assert before <= now
        before = now


def test_pixels_that_are_shuffled_across_images_keep_their_distribution_and_lose_their_dependence():
    x = images(500, (3, 3))
    x[:, 0, 0] = x[:, 1, 1]
    shown = shuffled_across_images(x)
    assert torch.equal(shown.sort(0).values, x.sort(0).values)
    correlation = np.corrcoef(shown[:, 0, 0], shown[:, 1, 1])[0, 1]
    assert abs(correlation) < limit(1) / math.sqrt(500)
    assert torch.equal(shown, shuffled_across_images(x))
    assert not torch.equal(shown, shuffled_across_images(x, seed=1))


@pytest.mark.parametrize(("count", "levels"), [(5, [1, 2, 3, 4, 5]), (3, [1, 3, 5]), (2, [1, 5])])
def test_fewer_levels_are_spread_evenly(count, levels):
    assert chosen_levels(count) == levels


def test_refusals():
    with pytest.raises(InferenceError, match="levels=6: give how many of the five levels are used"):
        chosen_levels(6)
    with pytest.raises(InferenceError, match="unknown corruption 'fog'; there are noise, blur"):
        corrupted(images(), "fog", 1.0)
    with pytest.raises(InferenceError, match=r"event shape \(7,\), which is no image"):
        corrupted(torch.zeros(3, 7), "noise", 1.0)


# -- matching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matched", ["contrast", "power"])
def test_rescaled_images_have_the_wanted_distribution_in_their_own_order(matched):
    x, like = images(64), 5 * images(64, (1, 4, 4)).flip(0)
    found, blank = rescaled(x, like, matched)
    assert not blank.any()
    wanted = amount_of(like, matched).quantile((torch.arange(64, dtype=torch.float64) + 0.5) / 64)
    assert torch.allclose(amount_of(found, matched).sort().values, wanted)
    assert torch.equal(amount_of(found, matched).argsort(), amount_of(x, matched).argsort())
    if matched == "contrast":
        assert torch.allclose(found.mean((1, 2, 3)), x.mean((1, 2, 3)))
    else:
        assert torch.allclose(found / found.flatten(1)[:, :1, None, None], x / x.flatten(1)[:, :1, None, None])


def test_blank_images_are_told_and_left_as_they_are():
    x = images(5)
    x[2] = 1.5
    found, blank = rescaled(x, images(5), "contrast")
    assert blank.tolist() == [False, False, True, False, False]
    assert torch.equal(found[2], x[2])


def test_strata_hold_as_many_images_of_both_sets():
    rng = np.random.default_rng(0)
    labels = np.concatenate(strata(rng.normal(0, 1, 100), rng.normal(1, 1, 50), 5))
    assert np.bincount(labels).tolist() == [30] * 5


# -- trends ------------------------------------------------------------------------------------------------------------


def test_a_trend_has_the_mean_rank_correlation_and_both_directions():
    rows = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0], [np.nan, 4.0, 3.0, 1.0], [2.0, 1.0, 3.0, 4.0]])
    found = trend(rows)
    assert found.correlation == pytest.approx((1 + 0.8 + 0.8) / 3)
    assert found.p_rises < 0.05 < 0.95 < found.p_falls
    other = trend(-rows)
    assert (other.correlation, other.p_falls) == pytest.approx((-found.correlation, found.p_rises))
    assert math.isnan(trend(rows[:1]).correlation)


def test_the_level_of_pages_test_is_kept_and_ties_only_lower_it():
    rng = np.random.default_rng(0)
    for values in (10**6, 2):
        found = [trend(rng.integers(0, values, (32, 4)).astype(float)).p_rises < 0.05 for _ in range(400)]
        assert np.mean(found) < 0.05 + limit(2) * math.sqrt(0.05 * 0.95 / 400)
    assert trend(np.ones((32, 4)))[:2] == pytest.approx((0.0, 0.5))
