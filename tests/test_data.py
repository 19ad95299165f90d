"""Data semantics, splits, user files and registered data sets."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from calibrant.data import Data, as_data, list_data, load, natural, register_data, registry
from calibrant.data.splits import interleaved, random_splits
from calibrant.errors import DataError

SPLITS = ("train", "validation", "test")


class Items(Dataset):
    """A map-style data set of dicts: 8-bit images, a float covariate, a label."""

    def __init__(self, size: int = 12, spoil: dict | None = None) -> None:
        self.size, self.spoil, self.read = size, spoil or {}, []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> dict:
        self.read.append(row)
        item = {"x": np.full((2, 2), row, np.uint8), "dose": row / 2, "label": torch.tensor(row % 3)}
        return self.spoil.get(row, item)


def digest(data: Data) -> str:
    return hashlib.sha256(data.tensors()[0]["x"].numpy().tobytes()).hexdigest()


# Data ---------------------------------------------------------------------------------------------------------------


def test_batch_casts_observations_and_leaves_integer_covariates():
    data = Data(
        {"x": np.arange(6, dtype=np.uint8).reshape(3, 2), "k": torch.tensor([True, False, True])},
        {"dose": np.array([0.5, 1.5, 2.5], np.float16), "site": torch.tensor([2, 0, 1])},
    )
    observed, covariates = data.batch([2, 0, 2], dtype=torch.float64)
    assert observed["x"].tolist() == [[4, 5], [0, 1], [4, 5]]
    assert observed["k"].tolist() == [1, 1, 1]
    assert {value.dtype for value in observed.values()} == {torch.float64}
    assert covariates["dose"].tolist() == [2.5, 0.5, 2.5]
    assert covariates["dose"].dtype == torch.float64
    assert covariates["site"].tolist() == [1, 2, 1]
    assert covariates["site"].dtype == torch.int64
    assert data.batch([0])[0]["x"].dtype == torch.get_default_dtype()


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<f8", np.uint16, np.uint32, np.int8, np.float16, np.longdouble, bool])
def test_every_real_dtype_survives(dtype):
    values = np.array([[0, 1], [1, 0], [1, 1]]).astype(dtype)
    assert Data({"x": values}).tensors()[0]["x"].tolist() == [[0, 1], [1, 0], [1, 1]]


@pytest.mark.parametrize(
    "index",
    [
        slice(1, None, 2),
        [1, 3],
        [-4, -2],
        np.array([1, 3], np.int32),
        torch.tensor([1, 3]),
        np.array([False, True, False, True, False]),
        torch.tensor([False, True, False, True, False]),
    ],
)
def test_every_kind_of_index_means_the_same(index):
    data = Data({"x": np.arange(5)})
    assert data.batch(index)[0]["x"].tolist() == [1, 3]
    assert data[index].tensors()[0]["x"].tolist() == [1, 3]
    assert data.subset(index).labels().tolist() == [1, 3]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "none of the 5 data"),
        ([5], "index 5 is out of range: there are 5"),
        ([-6], "index -6 is out of range"),
        ([0.5], "dtype float64"),
        (2, r"shape \(\)"),
        ([[0], [1]], r"shape \(2, 1\)"),
        ([True, False], "boolean index has length 2"),
    ],
)
def test_bad_indices(index, message):
    data = Data({"x": np.arange(5)})
    for call in (data.batch, data.subset, data.__getitem__):
        with pytest.raises(DataError, match=message):
            call(index)


def test_subset_keeps_labels_of_the_original_data():
    data = Data({"x": np.arange(6.0)}, coords={"place": list("abcdef")})
    part = data[2:][[3, 1]]
    assert part.labels().tolist() == [5, 3]
    assert part.coords["place"].tolist() == ["f", "d"]
    assert part.tensors()[0]["x"].tolist() == [5, 3]
    assert part.batch([1])[0]["x"].tolist() == [3]
    named = Data({"x": np.arange(3.0)}, coords={"data": ["p", "q", "r"]})
    assert named[1:].labels().tolist() == ["q", "r"]
    with pytest.raises(DataError, match="names a datum twice"):
        data.subset([1, 1])


def test_bad_coords():
    with pytest.raises(DataError, match=r"coords\['place'\] has shape \(2,\): .* shape \(3,\)"):
        Data({"x": np.arange(3)}, coords={"place": ["a", "b"]})
    with pytest.raises(DataError, match="repeats a label"):
        Data({"x": np.arange(3)}, coords={"data": [1, 2, 1]})


def test_transform_sees_the_whole_batch_in_stored_dtypes_on_the_device():
    seen = []

    def transform(batch):
        seen.append({key: (value.dtype, value.device.type, tuple(value.shape)) for key, value in batch.items()})
        return {"x": batch["x"] * batch["gain"][:, None], "gain": -batch["gain"]}

    data = Data({"x": np.ones((4, 3), np.uint8)}, {"gain": torch.arange(4.0)}, transform=transform)
    observed, covariates = data[1:].batch([0, 2], device="meta")  # a device that every machine has
    assert observed["x"].device.type == covariates["gain"].device.type == "meta"
    assert seen[-1] == {"x": (torch.uint8, "meta", (2, 3)), "gain": (torch.float32, "meta", (2,))}
    observed, covariates = data[1:].batch([0, 2])
    assert observed["x"].tolist() == [[1, 1, 1], [3, 3, 3]]
    assert covariates["gain"].tolist() == [-1, -3]
    assert data.tensors()[0]["x"].shape == (4, 3), "tensors() is transformed, too"


@pytest.mark.gpu
def test_batches_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    seen = []
    stored = torch.arange(6, dtype=torch.uint8, device="cuda")
    data = Data(
        {"x": stored, "y": np.arange(6)}, transform=lambda b: seen.extend(v.device.type for v in b.values()) or b
    )
    observed, _ = data.batch(torch.tensor([3, 1], device="cuda"), device="cuda")
    assert seen == ["cuda", "cuda"]
    assert observed["x"].device.type == observed["y"].device.type == "cuda"
    assert observed["x"].tolist() == observed["y"].tolist() == [3, 1]
    assert data.batch([2], device="cpu")[0]["x"].device.type == "cpu"
    with pytest.raises(DataError, match="x holds NaN or infinity, first at data index 1"):
        Data({"x": torch.tensor([0.0, torch.nan], device="cuda")})


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda batch: batch["x"], "transform returned a Tensor: return a dict with the keys x"),
        (lambda batch: {**batch, "noise": batch["x"]}, "transform returned the keys x, noise"),
        (lambda batch: {"x": batch["x"][:1]}, r"transform returned x with shape \(1, 2\).* leading dimension 3"),
    ],
)
def test_bad_transforms(transform, message):
    with pytest.raises(DataError, match=message):
        Data({"x": np.zeros((3, 2))}, transform=transform).tensors()


def test_memmap_is_read_row_by_row(tmp_path, monkeypatch):
    values = np.arange(4_000, dtype=np.float32).reshape(1_000, 4)
    values[700, 1] = np.nan
    np.save(tmp_path / "x.npy", values)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    read = []
    original = np.memmap.__getitem__
    monkeypatch.setattr(np.memmap, "__getitem__", lambda self, i: read.append(len(i)) or original(self, i))
    data = Data({"x": mapped})
    assert read == [], "building Data reads nothing"
    observed, _ = data[100:].batch([0, 5, 6])
    assert read == [3]
    assert torch.equal(observed["x"], torch.from_numpy(values[[100, 105, 106]]))
    with pytest.raises(DataError, match="x holds NaN or infinity, first at data index 700"):
        data[100:].batch(slice(590, 610))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_values_that_are_not_finite(value, as_tensor, monkeypatch):
    monkeypatch.setattr("calibrant.data.dataset.CHECKED_AT_ONCE", 8)  # so that the search goes through several blocks
    array = np.zeros((9, 2, 2))
    array[5, 1, 0] = array[7] = value
    with pytest.raises(DataError, match=r"mask holds NaN or infinity, first at data index 5: leave .* mask"):
        Data({"x": np.zeros(9)}, {"mask": torch.from_numpy(array) if as_tensor else array})


@pytest.mark.parametrize(
    ("observed", "covariates", "message"),
    [
        (np.zeros(3), {}, "observed is a ndarray: give a dict"),
        ([{"x": 1}], {}, "observed is a list: give a dict"),
        ({"x": np.zeros(3)}, [1], "covariates is a list: give a dict"),
        ({}, {}, "observed is empty"),
        ({"x": np.zeros((0, 2))}, {}, "the data are empty: x with 0 rows"),
        ({"x": np.zeros(3), "y": np.zeros(4)}, {"c": np.zeros(3)}, "x has 3, y has 4, c has 3"),
        ({"x": np.zeros(3)}, {"x": np.zeros(3)}, "'x': given both as"),
        ({"x": np.array([None, {}])}, {}, "x has dtype object"),
        ({"x": np.array(["a", "b"])}, {}, "x has dtype <U1"),
        ({"x": np.zeros(2, complex)}, {}, "x has dtype complex128"),
        ({"x": torch.zeros(2, dtype=torch.complex64)}, {}, "x has dtype torch.complex64"),
        ({"x": torch.zeros(2, 2).to_sparse()}, {}, "x is a sparse tensor"),
        ({"x": [1.0, 2.0]}, {}, r"x is a list: give a tensor or a numpy array"),
        ({"x": torch.tensor(1.0)}, {}, r"x has shape \(\)"),
        ({3: np.zeros(2)}, {}, "called 3: names are strings"),
    ],
)
def test_refused_values(observed, covariates, message):
    with pytest.raises(DataError, match=message):
        Data(observed, covariates)


def test_dataset_of_dicts():
    items = Items()
    data = Data(items, name="items")
    assert len(data) == 12
    assert data.keys() == ("x", "dose", "label")
    split = data.split_keys(["x"], ["dose", "label"])
    assert (split.observed_names, split.covariate_names) == (("x",), ("dose", "label"))
    items.read.clear()
    observed, covariates = split[4:].batch([0, 3])
    assert items.read == [4, 7], "only the rows asked for are read"
    assert observed["x"].shape == (2, 2, 2)
    assert observed["x"][:, 0, 0].tolist() == [4, 7]
    assert observed["x"].dtype == covariates["dose"].dtype == torch.float32
    assert covariates["dose"].tolist() == [2, 3.5]
    assert covariates["label"].tolist() == [1, 1]
    assert covariates["label"].dtype == torch.int64


def test_split_keys_refuses_other_keys():
    data = Data(Items())
    with pytest.raises(DataError, match=r"no place for 'label' \(observed sites: x; covariates: dose\)"):
        data.split_keys(["x"], ["dose"])
    with pytest.raises(DataError, match=r"'dose'.*observed sites: x; covariates: none"):
        data.split_keys(["x"])
    with pytest.raises(DataError, match="no observation, only x, dose, label"):
        data.split_keys(["z"], ["x", "dose", "label"])
    with pytest.raises(DataError, match="'x': the program both samples it"):
        data.split_keys(["x", "dose"], ["x", "label"])
    arrays = Data({"x": np.zeros(2)}, {"c": np.ones(2)}).split_keys(["x", "c"])
    assert arrays.observed_names == ("x", "c"), "the program decides, also against what the caller said"


def test_select_renames_after_the_transform():
    data = Data({"x": np.arange(3), "y": np.arange(3)}, transform=lambda b: {"x": b["x"] + 10 * b["y"], "y": b["y"]})
    pixels = data.select({"pixels": "x"})
    assert pixels.keys() == ("pixels",)
    assert pixels[1:].tensors()[0]["pixels"].tolist() == [11, 22]
    assert data.keys() == ("x", "y"), "the original is untouched"
    assert data.select(["y"]).observed_names == ("y",)
    with pytest.raises(DataError, match="no 'z'; there are: x, y"):
        data.select({"pixels": "z"})
    with pytest.raises(DataError, match="none of 'c' is an observation"):
        Data({"x": np.zeros(2)}, {"c": np.zeros(2)}).select(["c"])


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"x": np.zeros((2, 2), np.uint8), "dose": 1.0}, "item 3 .* has the keys x, dose: .* with x, dose, label"),
        (np.zeros(2), "item 3 of the Dataset has no dict, but a ndarray"),
        ({"x": np.zeros((3, 2), np.uint8), "dose": 1.0, "label": torch.tensor(0)}, r"x has shape \(3, 2\).* item 3"),
        ({"x": np.zeros((2, 2)), "dose": 1.0, "label": torch.tensor(0)}, "x has shape .*float64 in item 3"),
        ({"x": np.zeros((2, 2), np.uint8), "dose": np.nan, "label": torch.tensor(0)}, "dose holds NaN .* index 3"),
    ],
)
def test_spoiled_items(spoiled, message):
    with pytest.raises(DataError, match=message):
        Data(Items(spoil={3: spoiled}))[1:].batch(slice(None))


def test_refused_datasets():
    class Stream(IterableDataset):
        def __iter__(self):
            yield {"x": 1.0}

    with pytest.raises(DataError, match="Stream has no length: give a map-style Dataset"):
        Data(Stream())
    with pytest.raises(DataError, match="Items is empty"):
        Data(Items(0))
    with pytest.raises(DataError, match="item 0 of the Dataset is a tuple"):
        Data(Items(spoil={0: (1, 2)}))
    with pytest.raises(DataError, match="beside a Dataset"):
        Data(Items(), {"c": np.zeros(12)})
    with pytest.raises(DataError, match="x has dtype <U1"):
        Data(Items(spoil={0: {"x": "a"}})).batch([0])


def test_as_data():
    data = Data({"x": np.zeros(2)})
    assert as_data(data) is data
    made = as_data({"x": np.zeros(2)}, {"c": np.ones(2)})
    assert made.keys() == ("x", "c")
    with pytest.raises(DataError, match="beside a Data"):
        as_data(data, {"c": np.ones(2)})


# Splits, files, registry --------------------------------------------------------------------------------------------


def test_splits_are_disjoint_complete_stratified_and_seeded():
    assert {split: len(where) for split, where in interleaved(100).items()} == {
        "train": 80,
        "validation": 10,
        "test": 10,
    }
    labels = np.repeat([0, 1], [900, 100])
    data = Data({"x": np.arange(1_000)})
    splits = random_splits(data, seed=1, labels=labels)
    positions = [splits[split].labels() for split in SPLITS]
    assert sorted(np.concatenate(positions)) == list(range(1_000))
    assert [int(labels[where].sum()) for where in positions] == [80, 10, 10]
    assert np.array_equal(random_splits(data, 1, labels)["test"].labels(), positions[2])
    assert not np.array_equal(random_splits(data, 2, labels)["test"].labels(), positions[2])
    with pytest.raises(DataError, match="9 data are too few"):
        random_splits(data[:9], 0)


def test_npy_and_npz(tmp_path):
    x = np.arange(40, dtype=np.float32).reshape(20, 2)
    np.save(tmp_path / "a.npy", x)
    np.savez(tmp_path / "b.npz", images=x, age=np.arange(20))
    splits = load(tmp_path / "a.npy", seed=3)
    assert {split: len(data) for split, data in splits.items()} == {"train": 16, "validation": 2, "test": 2}
    for data in splits.values():
        assert torch.equal(data.tensors()[0]["x"], torch.from_numpy(x[data.labels()]))
    assert np.array_equal(load(tmp_path / "a.npy", seed=3)["test"].labels(), splits["test"].labels())
    assert load(str(tmp_path / "b.npz"))["train"].keys() == ("images", "age")


def test_bad_array_files(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}] * 20), allow_pickle=True)
    (tmp_path / "junk.npz").write_bytes(b"junk")
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects.npy", "junk.npz", "empty.npy"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            load(tmp_path / name)
    with pytest.raises(DataError, match=r"there is no file .*none\.npy"):
        load(tmp_path / "none.npy")
    np.save(tmp_path / "fine.npy", np.zeros(20))
    with pytest.raises(DataError, match="takes no options, but got size"):
        load(tmp_path / "fine.npy", size=3)


USER_FILE = """
import numpy as np
from calibrant.data import Data

def whole(size=20):
    return Data({"x": np.arange(float(size))})

def parts():
    return {"train": {"x": np.zeros(3)}, "validation": Data({"x": np.zeros(2)}), "test": {"x": np.zeros(1)}}

def arrays():
    return {"x": np.zeros(20)}

def number():
    return 3

def needs(path):
    return path

def breaks():
    raise KeyError("the user's own error")

constant = 3
"""


def test_user_function(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(USER_FILE)
    assert {k: len(v) for k, v in load(f"{file}:whole").items()} == {"train": 16, "validation": 2, "test": 2}
    assert sum(len(data) for data in load(f"{file}:whole", size=30).values()) == 30
    assert {k: len(v) for k, v in load(f"{file}:parts").items()} == {"train": 3, "validation": 2, "test": 1}
    assert sum(len(data) for data in load(f"{file}:arrays").values()) == 20
    with pytest.raises(KeyError, match="own error"):
        load(f"{file}:breaks")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py:absent", "absent"),
        ("mine.py:constant", "constant is a int: name a function"),
        ("mine.py:number", "returned a int: return a dict of arrays, a Data"),
        ("mine.py:needs", "cannot be called with no arguments: missing a required argument: 'path'"),
        ("mine.py", "say which function of .*mine.py"),
        ("none.py:whole", "there is no file .*none.py"),
        ("broken.py:whole", "broken.py does not import"),
    ],
)
def test_bad_user_functions(tmp_path, spec, message):
    (tmp_path / "mine.py").write_text(USER_FILE)
    (tmp_path / "broken.py").write_text("import no_such_module_anywhere")
    with pytest.raises(DataError, match=message):
        load(f"{tmp_path}/{spec}")


def test_unknown_names_and_options():
    with pytest.raises(DataError, match="no data set 'natrual-patches'; did you mean natural-patches"):
        load("natrual-patches")
    with pytest.raises(DataError, match=r"no data set 'qqq'; there are cifar10, digits.*FILE\.npz"):
        load("qqq")
    with pytest.raises(DataError, match="natural-patches has no option 'width': its options are size"):
        load("natural-patches", width=3)
    with pytest.raises(DataError, match="digits has no option 'size': it has none"):
        load("digits", size=3)


def test_register_data(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_REGISTRY", {})
    about = {"description": "noise", "source": "numpy", "licence": "none"}

    @register_data("noise", **about, folder="noise", downloads=True)
    def noise(root, download, seed=0, size=4):
        assert root == tmp_path
        assert download
        return {split: Data({"x": np.full(size, seed)}) for split in SPLITS}

    splits = load("noise", root=tmp_path, download=True, seed=7, size=5)
    assert splits["test"].tensors()[0]["x"].tolist() == [7] * 5
    (entry,) = list_data("no*")
    assert (entry.name, entry.description, entry.state(tmp_path)) == ("noise", "noise", "to download")
    (tmp_path / "noise").mkdir()
    assert entry.state(tmp_path) == "ready"
    assert list_data("x*") == []
    with pytest.raises(DataError, match="'noise' is registered already"):
        register_data("noise", **about)(lambda root, download: {})

    register_data("bad", **about)(lambda root, download: {"train": Data({"x": np.zeros(2)})})
    with pytest.raises(DataError, match="bad returned a dict with the keys train"):
        load("bad")


def test_every_registered_set_is_described():
    entries = {entry.name: entry for entry in list_data()}
    assert {"natural-patches", "van-hateren", "digits", "mnist", "fashion-mnist", "cifar10", "svhn"} <= set(entries)
    for entry in entries.values():
        assert entry.description
        assert "\n" not in entry.description
        assert entry.source
        assert entry.licence


@pytest.mark.parametrize("name", [entry.name for entry in list_data() if entry.folder])
def test_missing_sets_say_where_they_belong(name, tmp_path):
    (entry,) = list_data(name)
    assert entry.state(tmp_path) == ("to download" if entry.downloads else "absent")
    remedy = "--download" if entry.downloads else "no automatic download"
    with pytest.raises(DataError, match=rf"{tmp_path / entry.folder}.*{remedy}"):
        load(name, root=tmp_path)


def test_root_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("CALIBRANT_DATA", str(tmp_path))
    assert registry.data_root() == tmp_path
    assert registry.data_root("~/x") == Path.home() / "x"
    monkeypatch.delenv("CALIBRANT_DATA")
    assert registry.data_root() == Path.home() / ".cache/calibrant"


def test_import_is_light():
    heavy = "torchvision", "skimage", "sklearn", "matplotlib"
    code = f"import sys, calibrant.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Registered sets ----------------------------------------------------------------------------------------------------


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
    lifted = power * np.exp(2 * (frequency / natural.CUTOFF) ** 4)
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
    monkeypatch.setattr(natural, "whiten", lambda image: image - image.mean())
    slope, power_range = flatness(pixels(load("natural-patches")["train"]))
    assert slope < -2
    assert power_range > 50


def test_patches_are_the_same_every_time_and_follow_the_seed(patches):
    again = load("natural-patches")
    assert {split: digest(data) for split, data in again.items()} == {s: digest(d) for s, d in patches.items()}
    assert digest(load("natural-patches", seed=1)["test"]) != digest(patches["test"])


def covered_pixels(data: Data, size: int) -> dict[str, np.ndarray]:
    """For every image, which pixels the patches of a split cover."""
    masks = {Path(name).stem: np.zeros((600, 800), bool) for name in natural.PHOTOGRAPHS}
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
        held_out = binary_dilation(validation | test, np.ones((3, 3)), iterations=natural.GAP)
        assert not (train & held_out).any(), "the regions lie GAP apart"
        touched += (train & binary_dilation(held_out, np.ones((3, 3)))).sum()
    assert touched > 0, "one pixel more would be seen"


def test_regions_of_all_splits_lie_apart_at_every_size():
    for size in (8, 16, 32):
        plan = natural.plan_patches([(512, 512), (300, 451)], size, seed=2)
        owner = {}
        for split, where in plan.items():
            assert len(np.unique(where, axis=0)) == len(where) == natural.COUNTS[split]
            for image, shape in enumerate([(512, 512), (300, 451)]):
                corners = where[where[:, 0] == image, 1:]
                assert corners.size == 0 or corners.min() >= natural.BORDER
                assert np.all(corners + size <= np.array(shape) - natural.BORDER)
            block = (where[:, 1:] - natural.BORDER) // (4 * size + natural.GAP)
            inside = (where[:, 1:] - natural.BORDER) % (4 * size + natural.GAP)
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
    assert np.allclose(natural.whiten(image), expected, atol=1e-9 * np.abs(expected).max())
    assert abs(natural.whiten(image).mean()) < 1e-9


def test_little_of_the_filter_reaches_across_a_gap():
    pixel = np.zeros((129, 129))
    pixel[64, 64] = 1
    energy = natural.whiten(pixel) ** 2
    offsets = np.arange(129) - 64
    far = np.hypot(offsets[:, None], offsets) > natural.GAP
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
