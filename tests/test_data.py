"""Data: batches, subsets, transforms, Datasets, and what is refused."""

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from calibrant.data import Data, as_data
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
    monkeypatch.setattr("calibrant.data.arrays.CHECKED_AT_ONCE", 8)  # so that the search goes through several blocks
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
        ({"x": [[1.0], [1.0, 2.0]]}, {}, r"x is a list whose rows differ in length"),
        ({"x": ["a", "b"]}, {}, r"x is a list of text: give numbers"),
        ({"x": [1.0, None]}, {}, r"x holds values that are no numbers, such as None"),
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
    with pytest.raises(DataError, match="item 0 of the Items has a str at its first place"):
        Data(Items(spoil={0: ("image", 2)}))
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


def test_values_of_one_key_are_read_without_the_others_and_keep_their_dtype(tmp_path):
    images = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (3000, 2))
    images[:] = np.nan  # reading them would be refused
    data = Data({"x": images}, {"y": np.arange(3000)})[::2]
    assert data.values("y").dtype == torch.int64
    assert data.values("y").tolist() == list(range(0, 3000, 2))
    assert data.values("y", [3, 3, 0]).tolist() == [6, 6, 0]
    with pytest.raises(DataError, match="no 'z'; there are: x, y"):
        data.values("z")


def test_values_are_transformed_in_blocks():
    sizes = []

    def halved(batch):
        sizes.append(len(batch["x"]))
        return {**batch, "x": batch["x"] / 2}

    data = Data({"x": np.arange(2500.0)}, transform=halved)
    assert data.values("x").tolist() == (np.arange(2500) / 2).tolist()
    assert len(sizes) == 3


def test_a_transform_may_tell_a_fingerprint():
    class Shift:
        def __init__(self, by):
            self.by = by

        def __call__(self, batch):
            return {"x": batch["x"] + self.by}

        def fingerprint(self):
            return str(self.by)

    prints = [Data({"x": np.zeros(3)}, transform=Shift(by)).fingerprint() for by in (1, 1, 2)]
    assert prints[0] == prints[1] != prints[2]
