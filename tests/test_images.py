"""What image sets do with size= and values=: resized grey values stay grey values, and random numbers belong to a pixel
of a datum."""

import numpy as np
import pytest
import torch
from agreement import limit
from PIL import Image
from scipy.special import ndtri
from scipy.stats import kstest

from calibrant.data import Data, load
from calibrant.data.grey_values import VALUES, uniform
from calibrant.data.images import Images, Lazy, resize_image
from calibrant.errors import DataError

GREYS = np.random.default_rng(0).integers(0, 256, (40, 3, 12, 8), np.uint8)


def values_of(data: Data, index=slice(None), dtype=torch.float64) -> np.ndarray:
    return data.batch(index, dtype=dtype)[0]["x"].numpy()


def made(values="unit", size=None, seed=0, images=GREYS, first=0) -> Data:
    return Images("test", size, values, seed).data(images, first=first)


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [6, [6, 4], (24, 16), np.int64(5), [12, 8], None])
def test_resized_values_are_on_the_grid(size):
    found = values_of(made(size=size), dtype=torch.float32)
    sides = (12, 8) if size is None else (size, size) if np.ndim(size) == 0 else tuple(size)
    assert found.shape == (40, 3, *sides)
    steps = found.astype(np.float64) * 255
    assert np.abs(steps - np.rint(steps)).max() < 1e-4  # no float32 in [0, 1] is farther from its neighbour
    assert np.array_equal(np.float32(np.rint(steps) / 255), found)


def test_the_same_size_changes_nothing_and_others_are_those_of_the_usual_loader():
    assert np.array_equal(values_of(made()), values_of(made(size=[12, 8])))
    bands = [Image.fromarray(band).resize((5, 7), Image.Resampling.BILINEAR) for band in GREYS[0]]
    for channels in (1, 2, 3):
        assert np.array_equal(resize_image(GREYS[0, :channels], (7, 5)), np.stack(bands[:channels]))


def test_halving_is_antialiased():
    """Every new pixel is a weighted mean over old ones; to take every second pixel would give noise."""
    board = np.indices((16, 16)).sum(0) % 2 * np.uint8(200)
    assert np.abs(resize_image(board[None].astype(np.uint8), (8, 8))[0, 1:-1, 1:-1].astype(int) - 100).max() <= 1
    assert np.abs(board[::2, ::2].astype(int) - 100).min() == 100


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_values_depend_on_seed_datum_and_pixel_alone(values):
    data = made(values)
    every = values_of(data)
    assert np.array_equal(values_of(data), every)
    assert np.array_equal(values_of(made(values)), every)
    assert np.array_equal(values_of(data, [7, 3, 7]), every[[7, 3, 7]])
    assert np.array_equal(values_of(data[5:20].select(["x"]), [2]), every[[7]])
    random = values in ("dequantised", "binarised")
    assert np.array_equal(values_of(made(values, seed=1)), every) != random
    assert np.array_equal(values_of(made(values, first=40)), every) != random


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dequantised_values_lie_between_their_grey_value_and_the_next(dtype):
    every = np.arange(256, dtype=np.uint8).repeat(4096).reshape(256, 1, 64, 64)
    for images in (every, GREYS):
        found = values_of(made("dequantised", images=images), dtype=dtype)
        assert (found >= np.float32(images / 256)).all()
        assert (found < np.float32((images + 1.0) / 256)).all()
        assert found.max() < 1


def test_the_extreme_random_numbers_stay_inside(monkeypatch):
    for noise in (0, 2**16 - 1):
        monkeypatch.setattr(
            "calibrant.data.grey_values.uniform", lambda key, rows, shape, n=noise: torch.tensor(n).int()
        )
        greys = np.array([0, 1, 127, 255], np.uint8).reshape(1, 1, 2, 2)
        found = values_of(made("dequantised", images=greys), dtype=torch.float32)
        assert np.array_equal(np.floor(found * 256), greys)
        ones = values_of(made("binarised", images=greys))
        assert np.array_equal(ones.ravel(), [0, noise == 0, noise == 0, 1])


def test_the_random_numbers_are_uniform_and_independent():
    u = uniform(3, torch.arange(2000), (2, 5, 7)).double().numpy().reshape(2000, 70)
    u = (u + 0.5) / 2**16
    assert kstest(u.ravel(), "uniform").pvalue > 1e-5
    assert kstest(u.ravel() ** 1.02, "uniform").pvalue < 1e-5  # planted: other numbers than uniform ones
    scores = ndtri(u)
    near = [np.mean(a * b) * a.size**0.5 for a, b in ((scores[1:], scores[:-1]), (scores[:, 1:], scores[:, :-1]))]
    assert np.abs(near).max() < limit(2)
    assert len(np.unique(u[:, :4], axis=0)) == 2000


def binarised_score(found: np.ndarray, greys: np.ndarray) -> float:
    """The largest standard score, over grey values, of the share of ones."""
    share = np.array([found[greys == k].mean() for k in range(256)])
    count, p = np.bincount(greys.ravel(), minlength=256), np.arange(256) / 255
    assert (share[[0, 255]] == [0, 1]).all()
    return float(np.abs((share - p) / np.sqrt(p * (1 - p) / count).clip(1e-9))[1:255].max())


def test_binarised_frequencies_are_the_grey_values():
    greys = np.arange(256, dtype=np.uint8).repeat(4000).reshape(1000, 1, 32, 32)
    found = values_of(made("binarised", images=greys))
    assert set(np.unique(found)) == {0, 1}
    assert binarised_score(found, greys) < limit(254)
    planted = values_of(made("thresholded", images=greys))
    assert binarised_score(planted, greys) > limit(254)
    assert np.array_equal(planted, greys >= 128)


def test_training_and_test_images_share_no_random_numbers():
    images = Images("test", values="dequantised")
    same = images.data(GREYS[:10]), images.data(GREYS[:10], first=10)
    assert (values_of(same[0]) != values_of(same[1])).mean() > 0.999


# -- reading one by one ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", VALUES)
def test_images_that_are_read_one_by_one_have_the_values_of_images_in_memory(values):
    read = []

    def image(row):
        read.append(row)
        return GREYS[row]

    lazy = Images("test", None, values).lazily(Lazy(image, np.arange(30, 40)))
    assert read == [30]  # to learn the keys
    assert lazy.keys() == ("x",)
    assert np.array_equal(values_of(lazy, [4, 1]), values_of(made(values), [34, 31]))
    assert read == [30, 34, 31]


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -3, 2.5, "28", True, [28], [28, 0], [1, 2, 3]])
def test_other_sizes_are_refused(size):
    with pytest.raises(DataError, match=r"digits: size=.* is given, wanted a number of pixels such as 28"):
        load("digits", levels=256, size=size)


def test_other_values_are_refused():
    with pytest.raises(DataError, match="digits: values='grey' is given, wanted one of unit, dequantised, binarised"):
        load("digits", levels=256, values="grey")


def test_digits_have_8_bits_where_they_are_asked_for():
    published, rounded = (values_of(load("digits", levels=levels)["test"]) for levels in (17, 256))
    assert np.abs(published - rounded).max() < 0.51 / 255
    assert np.abs(rounded * 255 - np.rint(rounded * 255)).max() < 1e-4 < np.abs(published * 255 % 1).max()
    with pytest.raises(DataError, match="give levels=256"):
        load("digits", size=16)
    with pytest.raises(DataError, match="levels=16 does not go with"):
        load("digits", levels=16)
    assert values_of(load("digits", levels=256, size=16)["test"]).shape == (180, 1, 16, 16)


def test_a_set_that_is_loaded_again_is_not_resized_again(monkeypatch):
    stored = np.random.default_rng(0).integers(0, 256, (6, 1, 9, 9), np.uint8)
    first = Images("set", size=5).resized(stored)
    monkeypatch.setattr("calibrant.data.images.resize_image", lambda *_: pytest.fail("resized again"))
    np.testing.assert_array_equal(Images("set", size=5, seed=1).resized(stored.copy()), first)
    monkeypatch.undo()
    changed = stored.copy()
    changed[0] = 255 - changed[0]
    assert (Images("set", size=5).resized(changed)[0] != first[0]).any()
    assert Images("set", size=4).resized(stored).shape == (6, 1, 4, 4)
