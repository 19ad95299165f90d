"""Splits, files and functions of users, and the registry of data sets."""

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from calibrant.data import Data, list_data, load, register_data, registry
from calibrant.data.splits import interleaved, random_splits
from calibrant.errors import DataError
from calibrant.registries import Registry

SPLITS = ("train", "validation", "test")


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
    with pytest.raises(DataError, match="there are 9: return the splits"):
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
    with pytest.raises(
        DataError, match=r"breaks raises KeyError: .the user's own error. \(in line \d+ of .*mine.py\)"
    ) as told:
        load(f"{file}:breaks")
    assert isinstance(told.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py:absent", "absent"),
        ("mine.py:constant", "constant is a int: name a function"),
        ("mine.py:number", "returned a int: return a dict of arrays, a table, a Dataset, a Data"),
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
    with pytest.raises(DataError, match="unknown data set 'natrual-patches'; did you mean natural-patches"):
        load("natrual-patches")
    with pytest.raises(
        DataError,
        match=r"unknown data set 'qqq'; there are caltech-101, celeba, chest-mnist, cifar10, digits.*FILE\.npz",
    ):
        load("qqq")
    with pytest.raises(DataError, match="natural-patches has no option 'width': its options are size"):
        load("natural-patches", width=3)
    with pytest.raises(DataError, match="digits has no option 'width': its options are levels, size, values"):
        load("digits", width=3)


def test_register_data(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "DATA_SETS", Registry("data set", DataError, ""))
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
    register_data("plain", **about)(lambda root, download: {})
    with pytest.raises(DataError, match="plain has no option 'size': it has none"):
        load("plain", size=3)
    with pytest.raises(DataError, match="'noise' is given to two"):
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


@pytest.mark.parametrize("size", range(1, 21))
def test_few_data_are_split_or_refused_with_a_remedy(tmp_path, size):
    x = np.arange(2.0 * size).reshape(size, 2)
    np.save(tmp_path / "few.npy", x)
    (tmp_path / "few.py").write_text(
        "import numpy as np\n\n\ndef splits():\n"
        "    x = {'x': np.load(__file__.replace('.py', '.npy'))}\n"
        "    return {'train': x, 'validation': x, 'test': x}\n"
    )
    if size < 10:
        there = "there is 1" if size == 1 else f"there are {size}"
        with pytest.raises(DataError, match=rf"few\.npy: .*{there}: return the splits train, validation and test"):
            load(tmp_path / "few.npy")
        splits = load(f"{tmp_path / 'few.py'}:splits")  # the remedy
        assert [len(splits[name]) for name in SPLITS] == [size] * 3
        return
    splits = load(tmp_path / "few.npy")
    assert sum(len(part) for part in splits.values()) == size
    assert all(len(part) for part in splits.values())
    assert sorted(np.concatenate([part.labels() for part in splits.values()])) == list(range(size))


def with_a_shape(shape: tuple[int, ...]) -> bytes:
    """A .npy file of 25 numbers whose header says another shape."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return file.getvalue() + b"\0" * 100


HOSTILE = {
    "huge.npy": with_a_shape((10**12, 10**6)),
    "negative.npy": with_a_shape((-5, 5)),
    "short.npy": with_a_shape((5, 6)),
    "long.npy": with_a_shape((5, 4)),
    "pickle.npy": pickle.dumps({"x": 1}),
    "pickle.npz": pickle.dumps({"x": 1}),
    "deep.npy": b"\x93NUMPY\x01\x00\xff\xff" + (b"(" * 9000 + b")" * 9000).ljust(65535),
    "csv.npy": b"1,2,3\n4,5,6\n",
    "empty.npz": b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_array_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(HOSTILE[name])
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        load(tmp_path / name)


MEMBERS = {
    "text": ("x.txt", b"hello", "cannot be read"),
    "too long": ("x.npy", with_a_shape((5, 4)), "cannot be read"),
    "too large": ("x.npy", with_a_shape((10**10, 100)), "does not fit into memory.*save a .npy file|cannot be read"),
    "object": (
        "x.npy",
        b"\x93NUMPY\x01\x00F\x00{'descr': '|O', 'fortran_order': False, 'shape': (), }",
        "cannot be read",
    ),
}


@pytest.mark.parametrize("member", MEMBERS)
def test_hostile_members_of_archives_are_refused(tmp_path, member):
    name, content, message = MEMBERS[member]
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a" * 5000 + ".npy", "a\0.npz", "folder.npy", "loop.npy"])
def test_names_of_no_file_are_refused(tmp_path, name):
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "loop.npy").symlink_to("loop.npy")
    with pytest.raises(DataError, match="there is no file"):
        load(tmp_path / name)


MASKED = {
    "observed": lambda x: Data({"x": x}),
    "covariate": lambda x: Data({"x": np.zeros(len(x))}, {"y": x}),
    "nothing masked": lambda x: Data({"x": np.ma.masked_array(x.data)}),
    "integers": lambda x: Data({"x": np.ma.masked_array(np.arange(8), np.arange(8) == 3)}),
    "items": lambda x: Data(Rows(x)).tensors(),
}


class Rows(torch.utils.data.Dataset):
    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index]}


@pytest.mark.parametrize("form", MASKED)
def test_masked_arrays_are_refused_by_name(form):
    x = np.ma.masked_array(np.full((8, 3), -999.0), np.eye(8, 3, dtype=bool))
    name = "y" if form == "covariate" else "x"
    with pytest.raises(DataError, match=rf"{name} is a masked array: .*{name}\.filled\(VALUE\)"):
        MASKED[form](x)
    remedied = Data({"x": x.filled(0.0)}, {"seen": ~np.ma.getmaskarray(x)})
    assert remedied.tensors()[1]["seen"].sum() == 21
