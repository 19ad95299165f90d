"""Results in run folders: datasets and trees come back exactly, and files that are damaged are refused."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from stored_runs import cut, fitted, modules, rows, same, saved

import calibrant as cal
from calibrant import store
from calibrant.errors import RunError
from calibrant.evaluation.judgements.against_reference import verdicts
from calibrant.evaluation.statistics.comparison import compare


def assert_same(first: xr.Dataset, second: xr.Dataset):
    xr.testing.assert_identical(first, second)
    for name, variable in first.variables.items():
        kinds = [np.dtype(str) if d.kind == "U" else d for d in (variable.dtype, second[name].dtype)]  # of any width
        assert kinds[0] == kinds[1], name
        assert variable.attrs == second[name].attrs, name
    assert {k: (v, type(v)) for k, v in first.attrs.items()} == {k: (v, type(v)) for k, v in second.attrs.items()}


def odd_dataset() -> xr.Dataset:
    return xr.Dataset(
        {
            "flag": ("data", [True, False, True]),
            "flags": (("data", "k"), np.eye(3, 2, dtype=bool)),
            "reason": ("data", np.array(["", "R-hat is 1.2 – ünïcode", " "])),
            "float": ("data", np.array([np.nan, np.inf, -0.0], np.float32)),
            "double": ("data", np.array([1e-310, 1 / 3, -np.inf])),
            "byte": ("data", np.array([0, 255, 7], np.uint8)),
            "integer": ("data", np.array([-(2**31), 0, 2**31 - 1], np.int32)),
            "long": ("data", np.array([-(2**63), 0, 2**63 - 1])),
            "number": ((), 0.1),
            "word": ((), "text"),
            "none": ("empty", np.array([], dtype=bool)),
            "nothing": ("empty", np.array([], dtype=str)),
        },
        coords={
            "data": np.array(["a", "bb", "c/d"]),
            "label": ("data", np.array([2**62, 5, 1])),
            "empty": np.array([], dtype=np.int64),
        },
        attrs={"text": "ü\n", "empty": "", "json": '{"a": [1]}', "integer": 2**40, "number": 0.1, "nan": float("inf")},
    )


def test_datasets_and_trees_come_back_exactly(tmp_path):
    dataset = odd_dataset()
    store.save_dataset(dataset, tmp_path / "set.nc")
    assert_same(dataset, store.load_dataset(tmp_path / "set.nc"))
    tree = xr.DataTree.from_dict({"/posterior": dataset, "/empty": xr.Dataset(), "/": xr.Dataset(attrs={"a": 1})})
    store.save_tree(tree, tmp_path / "tree.nc")
    loaded = store.load_tree(tmp_path / "tree.nc")
    assert [node.path for node in tree.subtree] == [node.path for node in loaded.subtree]
    for node in tree.subtree:
        assert_same(node.to_dataset(), loaded[node.path].to_dataset())
    store.save_tree(loaded, tmp_path / "again.nc")
    assert_same(dataset, store.load_tree(tmp_path / "again.nc")["posterior"].to_dataset())


@pytest.fixture(scope="module")
def results():
    model, guide = modules("ea-vae")
    data = cal.data.Data(rows(8), coords={"data": [f"image {i}" for i in range(8)]})
    post = cal.inference.posterior(model, guide, data, draws=100)
    return model, guide, post, cal.inference.reference(model, data, chains=4, draws=30, seed=1)


def test_results_come_back_exactly(tmp_path, results):
    _, _, *trees = results
    for number, tree in enumerate(trees):
        store.save_tree(tree, tmp_path / f"{number}.nc")
    loaded = [store.load_tree(tmp_path / f"{number}.nc") for number in (0, 1)]
    for tree, again in zip(trees, loaded, strict=True):
        for node in tree.subtree:
            assert_same(node.to_dataset(), again[node.path].to_dataset())
    assert loaded[1]["convergence"]["is_reference"].dtype == bool
    comparison = compare(*trees)
    # Sums over arrays that lie otherwise in memory may be rounded otherwise.
    xr.testing.assert_allclose(comparison, compare(*loaded), rtol=1e-9, atol=1e-12)
    store.save_dataset(comparison, tmp_path / "comparison.nc")
    stored = store.load_dataset(tmp_path / "comparison.nc")
    assert_same(comparison, stored)
    before, after = ([(v.site, v.quantity, v.status, v.sentence) for v in verdicts(c)] for c in (comparison, stored))
    assert before == after


def test_load_result_reads_a_whole_run(tmp_path, results):
    model, guide, post, ref = results
    saved(tmp_path, model, guide)
    with pytest.raises(RunError, match="calibrant check"):
        store.load_result(tmp_path)
    store.save_tree(post, tmp_path / store.AMORTIZED)
    bare = store.load_result(tmp_path)
    assert (bare.reference, bare.comparison, bare.contrast, bare.gap) == (None, None, None, None)
    store.save_tree(ref, tmp_path / store.REFERENCE)
    store.save_dataset(compare(post, ref), tmp_path / store.COMPARISON)
    split = xr.Dataset({"gap": ("data", [0.5]), "reason": ("data", np.array([""]))}, {"data": [3]})
    store.save_dataset(split, tmp_path / store.GAP)
    result = store.load_result(tmp_path)
    assert result.gap.identical(split)
    assert result.name == "ea-vae"
    assert result.history == fitted().history
    assert same(model.state_dict(), result.model.state_dict())
    assert_same(post["posterior"].to_dataset(), result.amortized["posterior"].to_dataset())
    assert_same(compare(post, ref), result.comparison)
    cut(tmp_path / store.REFERENCE)
    with pytest.raises(RunError, match=r"reference\.nc is damaged"):
        store.load_result(tmp_path)
    (tmp_path / store.HISTORY).write_text("epoch,train\none,two\n")
    (tmp_path / store.REFERENCE).unlink()
    with pytest.raises(RunError, match=r"history\.csv"):
        store.load_result(tmp_path)


@pytest.mark.parametrize("value", [True, None, [1, 2], {"a": 1}, np.array([1])])
@pytest.mark.parametrize("where", ["group", "variable"])
def test_attributes_that_netcdf_would_change_are_refused(tmp_path, value, where):
    dataset = xr.Dataset({"a": ("data", [1.0])})
    (dataset if where == "group" else dataset["a"]).attrs["odd"] = value
    with pytest.raises(RunError, match="attribute 'odd'"):
        store.save_tree(xr.DataTree.from_dict({"/posterior": dataset}), tmp_path / "tree.nc")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"no NetCDF at all", b"\x89HDF\r\n\x1a\n and nothing more"])
def test_an_unreadable_netcdf_file_is_refused(tmp_path, content):
    path = tmp_path / "tree.nc"
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"tree\.nc is damaged"):
        store.load_tree(path)
    with pytest.raises(RunError, match="there is no file"):
        store.load_dataset(tmp_path / "absent.nc")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "set.nc"
    store.save_dataset(odd_dataset(), path)

    def broken(self, target, **options):
        Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(xr.Dataset, "to_netcdf", broken)
    with pytest.raises(KeyboardInterrupt):
        store.save_dataset(odd_dataset(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["set.nc"]
    assert_same(odd_dataset(), store.load_dataset(path))
