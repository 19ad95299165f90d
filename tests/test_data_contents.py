"""Registered data sets: natural patches, digits, and sets that are read from files."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from calibrant.data import Data, list_data, load, photographs
from calibrant.data.sets import natural_patches
from calibrant.errors import DataError

SPLITS = ("train", "validation", "test")


def digest(data: Data) -> str:
    return hashlib.sha256(data.tensors()[0]["x"].numpy().tobytes()).hexdigest()


@pytest.fixture(scope="module")
def patches() -> dict[str, Data]:
    return load("natural-patches")


def pixels(data: Data) -> np.ndarray:
    return data.tensors()[0]["x"].numpy()[:, 0]


def radial_power(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequency (cycles per pixel) and mean power of Hann-windowed patches on rings one frequency step wide."""
    size = values.shape[-1]
    window = np.hanning(size + 2)[1:-1]
    power = (np.abs(np.fft.fft2(values * np.outer(window, window))) ** 2).mean(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    ring = np.rint(frequency * size).astype(int)
    rings = range(1, size // 2 + 1)
    return tuple(np.array([values[ring == r].mean() for r in rings]) for values in (frequency, power))


def flatness(values: np.ndarray) -> tuple[float, float]:
    """Log-log slope of the power, but for the cut-off, between 0.1 and 0.26 cycles per pixel; its range below 0.26."""
    frequency, power = radial_power(values)
    band = (frequency > 0.1) & (frequency < 0.26)
    lifted = power * np.exp(2 * (frequency / photographs.CUTOFF) ** 4)
    slope = np.polyfit(np.log(frequency[band]), np.log(lifted[band]), 1)[0]
    low = frequency < 0.26
    return slope, power[low].max() / power[low].min()


def test_patches_have_unit_variance_and_differ_in_contrast(patches):
    assert {split: tuple(pixels(data).shape) for split, data in patches.items()} == {
        "train": (30_000, 16, 16),
        "validation": (3_000, 16, 16),
        "test": (3_000, 16, 16),
    }
    assert patches["train"].tensors()[0]["x"].shape[1:] == (1, 16, 16)
    train = pixels(patches["train"])
    assert train.dtype == np.float32
    assert abs(train.var(dtype=np.float64) - 1) < 1e-6
    assert abs(train.mean(dtype=np.float64)) < 0.01
    for split in ("validation", "test"):
        assert 0.8 < pixels(patches[split]).var() < 1.25
    contrast = np.sqrt((train**2).mean((1, 2)))
    low, median, high = np.percentile(contrast, [5, 50, 95])
    assert median / low > 5, "one gain serves all, so contrasts differ"
    assert high / median > 1.5
    assert (contrast < 0.1).mean() < 0.15, "blank patches don't dominate"
    assert (train**4).mean(dtype=np.float64) > 5, "whitened natural images have heavy tails"


def test_patches_are_whitened_and_unwhitened_ones_would_be_seen(patches, monkeypatch):
    slope, power_range = flatness(pixels(patches["train"]))
    assert abs(slope) < 1.25
    assert power_range < 5
    monkeypatch.setattr(photographs, "whiten", lambda image: image - image.mean())
    slope, power_range = flatness(pixels(load("natural-patches")["train"]))
    assert slope < -2
    assert power_range > 50


def test_patches_are_the_same_every_time_and_follow_the_seed(patches):
    again = load("natural-patches")
    assert {split: digest(data) for split, data in again.items()} == {s: digest(d) for s, d in patches.items()}
    assert digest(load("natural-patches", seed=1)["test"]) != digest(patches["test"])


def covered_pixels(data: Data, size: int) -> dict[str, np.ndarray]:
    """For every image, which pixels the patches of a split cover."""
    masks = {Path(name).stem: np.zeros((600, 800), bool) for name in natural_patches.PHOTOGRAPHS}
    for image, row, column in zip(*(data.coords[name] for name in ("image", "row", "column")), strict=True):
        masks[image][row : row + size, column : column + size] = True
    return masks


def test_splits_share_no_pixel(patches):
    from scipy.ndimage import binary_dilation

    covered = {split: covered_pixels(data, 16) for split, data in patches.items()}
    touched = 0
    for image in covered["train"]:
        train, validation, test = (covered[split][image] for split in SPLITS)
        assert validation.any()
        assert test.any()
        assert not (train & validation).any()
        assert not (train & test).any()
        assert not (validation & test).any()
        held_out = binary_dilation(validation | test, np.ones((3, 3)), iterations=photographs.GAP)
        assert not (train & held_out).any(), "the regions lie GAP apart"
        touched += (train & binary_dilation(held_out, np.ones((3, 3)))).sum()
    assert touched > 0, "one pixel more would be seen"


def test_regions_of_all_splits_lie_apart_at_every_size():
    for size in (8, 16, 32):
        plan = photographs.plan_patches([(512, 512), (300, 451)], size, seed=2)
        owner = {}
        for split, where in plan.items():
            assert len(np.unique(where, axis=0)) == len(where) == photographs.COUNTS[split]
            for image, shape in enumerate([(512, 512), (300, 451)]):
                corners = where[where[:, 0] == image, 1:]
                assert corners.size == 0 or corners.min() >= photographs.BORDER
                assert np.all(corners + size <= np.array(shape) - photographs.BORDER)
            block = (where[:, 1:] - photographs.BORDER) // (4 * size + photographs.GAP)
            inside = (where[:, 1:] - photographs.BORDER) % (4 * size + photographs.GAP)
            assert inside.max() <= 3 * size
            for key in map(tuple, np.unique(np.column_stack([where[:, 0], block]), axis=0)):
                assert owner.setdefault(key, split) == split


@pytest.mark.parametrize(
    ("size", "message"), [(0, "positive number"), (8.0, "positive number"), (200, "too large: .* 10")]
)
def test_bad_patch_sizes(size, message):
    with pytest.raises(DataError, match=message):
        load("natural-patches", size=size)


def test_patch_size_option():
    assert pixels(load("natural-patches", size=24)["test"]).shape == (3_000, 24, 24)


def test_whitening_is_the_radial_filter_on_the_mirrored_image():
    rng = np.random.default_rng(0)
    image = rng.normal(size=(24, 40)).cumsum(0).cumsum(1)
    mirrored = np.block([[image, image[:, ::-1]], [image[::-1], image[::-1, ::-1]]])
    frequency = np.hypot(np.fft.fftfreq(48)[:, None], np.fft.fftfreq(80))
    expected = np.fft.ifft2(np.fft.fft2(mirrored) * frequency * np.exp(-((frequency / 0.4) ** 4))).real[:24, :40]
    assert np.allclose(photographs.whiten(image), expected, atol=1e-9 * np.abs(expected).max())
    assert abs(photographs.whiten(image).mean()) < 1e-9


def test_little_of_the_filter_reaches_across_a_gap():
    pixel = np.zeros((129, 129))
    pixel[64, 64] = 1
    energy = photographs.whiten(pixel) ** 2
    offsets = np.arange(129) - 64
    far = np.hypot(offsets[:, None], offsets) > photographs.GAP
    assert energy[far].sum() < 1e-4 * energy.sum()


def test_digits():
    splits = load("digits")
    assert {k: len(v) for k, v in splits.items()} == {"train": 1437, "validation": 180, "test": 180}
    assert sorted(np.concatenate([data.labels() for data in splits.values()])) == list(range(1797))
    observed, _ = splits["train"].tensors()
    assert observed["x"].shape == (1437, 1, 8, 8)
    assert observed["x"].min() == 0
    assert observed["x"].max() == 1
    for data in splits.values():
        share = np.bincount(data.tensors()[0]["y"].long().numpy(), minlength=10) / len(data)
        assert np.all(np.abs(share - 0.1) < 0.012), "stratified"
    assert not np.array_equal(load("digits", seed=1)["test"].labels(), splits["test"].labels())


def write_van_hateren(folder: Path, images: int) -> None:
    """Images with a 1/f amplitude spectrum and the bytes of the real ones."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    frequency = np.hypot(np.fft.fftfreq(1024)[:, None], np.fft.rfftfreq(1536))
    frequency[0, 0] = np.inf
    for number in range(images):
        white = np.fft.rfft2(rng.normal(size=(1024, 1536)))
        log_intensity = np.fft.irfft2(white / frequency)
        image = 1000 * np.exp(log_intensity / log_intensity.std())
        image[0, :3] = 0
        (folder / f"imk{number:05d}.iml").write_bytes(np.clip(image, 0, 60_000).astype(">u2").tobytes())


def test_van_hateren_from_files_of_the_original_format(tmp_path):
    write_van_hateren(tmp_path / "van-hateren", images=1)
    splits = load("van-hateren", root=tmp_path, size=20)
    assert pixels(splits["train"]).shape == (30_000, 20, 20)
    assert abs(pixels(splits["train"]).var(dtype=np.float64) - 1) < 1e-6
    assert set(splits["test"].coords["image"]) == {"imk00000"}
    slope, _ = flatness(pixels(splits["train"]))
    assert abs(slope) < 0.15, "an exact 1/f image comes out flat"
    (tmp_path / "van-hateren/imk00001.iml").write_bytes(b"short")
    with pytest.raises(DataError, match=r"imk00001\.iml has 5 bytes, not the 3145728"):
        load("van-hateren", root=tmp_path)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_idx_sets_from_small_files(name, folder, tmp_path):
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 28, 28))
    for part, count in (("train", 30), ("t10k", 7)):
        write_idx(raw / f"{part}-images-idx3-ubyte", images[:count])
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    splits = load(name, root=tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 27, "validation": 3, "test": 7}
    assert splits["validation"].labels().tolist() == [27, 28, 29]
    observed, _ = splits["validation"].batch([0, 2], dtype=torch.float64)
    assert observed["x"].shape == (2, 1, 28, 28)
    assert np.allclose(observed["x"][:, 0].numpy(), images[[27, 29]] / 255, atol=1e-7)
    assert observed["y"].tolist() == [7, 9]
    (raw / "t10k-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(DataError, match="no complete copy in"):
        load(name, root=tmp_path)


def test_svhn_from_small_files(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    folder = tmp_path / "SVHN"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (32, 32, 3, 20)).astype(np.uint8)
    labels = (np.arange(20) % 10 + 1).astype(np.uint8)[:, None]  # the files call the digit zero 10
    checksums = {}
    for split, count in (("train", 20), ("test", 8)):
        file = folder / f"{split}_32x32.mat"
        savemat(file, {"X": images[..., :count], "y": labels[:count]})
        md5 = hashlib.md5(file.read_bytes()).hexdigest()
        checksums[split] = [SVHN.split_list[split][0], file.name, md5]
    monkeypatch.setattr(SVHN, "split_list", checksums)
    splits = load("svhn", root=tmp_path)
    assert {k: len(v) for k, v in splits.items()} == {"train": 18, "validation": 2, "test": 8}
    observed, _ = splits["validation"].tensors()
    assert np.allclose(observed["x"].numpy(), images.transpose(3, 2, 0, 1)[18:] / 255, atol=1e-7)
    assert observed["y"].tolist() == [9, 0]
    small = load("svhn", root=tmp_path, size=28)["validation"].tensors()[0]["x"]
    assert small.shape == (2, 3, 28, 28)
    assert torch.equal((255 * small).round() / 255, small)
    (folder / "test_32x32.mat").write_bytes(b"damaged")
    with pytest.raises(DataError, match="svhn: no complete copy"):
        load("svhn", root=tmp_path)


def test_failed_download_is_a_data_error(tmp_path, monkeypatch):
    def unreachable(self):
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", unreachable)
    with pytest.raises(DataError, match=r"mnist: the download to .* failed: network is unreachable"):
        load("mnist", root=tmp_path, download=True)


@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [
        ("mnist", [54_000, 6_000, 10_000], (1, 28, 28)),
        ("fashion-mnist", [54_000, 6_000, 10_000], (1, 28, 28)),
        ("cifar10", [45_000, 5_000, 10_000], (3, 32, 32)),
        ("van-hateren", [30_000, 3_000, 3_000], (1, 16, 16)),
    ],
)
def test_real_files(name, sizes, shape):
    (entry,) = list_data(name)
    if "CALIBRANT_DATA" not in os.environ or entry.state() != "ready":
        pytest.skip(f"{name} is not in CALIBRANT_DATA")
    splits = load(name)
    assert [len(splits[split]) for split in SPLITS] == sizes
    observed, _ = splits["test"].batch(slice(0, 500))
    assert observed["x"].shape == (500, *shape)
    if name == "van-hateren":
        assert abs(pixels(splits["train"]).var(dtype=np.float64) - 1) < 1e-6
        assert abs(flatness(pixels(splits["train"]))[0]) < 1.25
    else:
        assert observed["x"].min() == 0
        assert observed["x"].max() == 1
        assert set(observed["y"].tolist()) == set(range(10))
