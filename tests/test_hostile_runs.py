"""Run folders that somebody forged, sha256 and all: every command ends well or in one line, and reads no other file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
import xarray as xr
from commands import call, refused

import calibrant as cal
from calibrant import store
from calibrant.errors import RunError
from calibrant.folders.files import digest_of_file
from calibrant.inference.fitting import checkpoints

Forge = Callable[[Path], Any]


@pytest.fixture
def run(made_runs: Path, elsewhere: Path) -> Path:
    """The folder of a run that was checked; the data lie beside it."""
    shutil.copytree(made_runs / "whole" / "ppca", elsewhere / "run")
    return Path("run")


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def with_value(*place: Any) -> Forge:
    """Put a value in a place of the configuration; the last argument is the value."""
    *keys, value = place

    def forge(folder: Path) -> None:
        config = part = stored(folder)
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value
        store.write_config(folder, config)

    return forge


def raw(text: str) -> Forge:
    return lambda folder: (folder / "config.json").write_text(text)


def content(file: str, write: Callable[[Path], Any]) -> Forge:
    """Write a file and record its sha256."""

    def forge(folder: Path) -> None:
        write(folder / file)
        with_value("sha256", file, digest_of_file(folder / file))(folder)

    return forge


CONFIGS = {
    "deep": (raw("[" * 100_000), "config.json cannot be read"),
    "deep object": (raw('{"format": "calibrant/2", "x": ' + "[" * 90_000 + "]" * 90_000 + "}"), "cannot be read"),
    "newer": (with_value("format", "calibrant/3"), "use a newer version"),
    "without its own sha256": (raw('{"format": "calibrant/2"}'), "lacks its own sha256"),
    "fit": (with_value("fit", [1]), "fit is [1], not an object or null"),
    "part of fit": (with_value("fit", {"epochs": 1}), "fit lacks elbo"),
    "model": (with_value("model", "x"), "model is 'x', not an object or null"),
    "notes": (with_value("notes", [1]), "notes is [1], not a list of strings"),
    "sha256": (with_value("sha256", {"a": 1}), "not an object of strings"),
    "site": (with_value("request", "site", {"x": 3}), "request.site is {'x': 3}, not an object of strings"),
    "asked": (with_value("request", "asked", [1]), "request.asked is [1], not an object"),
    "argument": (with_value("model", "arguments", "nope", 3), "the model of run cannot be rebuilt"),
    "shape": (with_value("model", "arguments", "shape", 5), "the model of run cannot be rebuilt"),
    "huge": (with_value("model", "arguments", "latents", 10**14), "the model of run cannot be rebuilt"),
    "runs": (with_value("runs", [".."]), "no folder inside it"),
    "no runs": (with_value("runs", []), "run holds no run"),
}


@pytest.mark.parametrize("forged", CONFIGS)
def test_a_forged_configuration_is_refused(run, forged):
    forge, message = CONFIGS[forged]
    forge(run)
    for words in (["report", "run"], ["check", "run"]):
        assert message in refused(*words)


GUIDES = {
    "sites": "abc",
    "inputs": 3,
    "encoder": {"x": 3},
}


@pytest.mark.parametrize("part", GUIDES)
def test_a_forged_guide_is_refused(run, part):
    with_value("guide", part, GUIDES[part])(run)
    assert "the guide of run cannot be rebuilt" in refused("check", "run")


SETTINGS = {"warp": (3, "the settings warp, which"), "draws": ("many", "the setting draws is 'many'")}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_unknown_or_no_numbers_are_refused(run, name):
    value, message = SETTINGS[name]
    with_value("request", "settings", name, value)(run)
    assert message in refused("run", "--out", "run", "--resume")
    with_value("settings", "seed", "a")(run)
    assert "the setting seed is 'a'" in refused("check", "run")


HISTORIES = {
    "columns": b"a,b\n1,2\n",
    "NUL": b"epoch,train,validation,lr\n\0,1,2,3\n",
    "long row": b"epoch,train,validation,lr\n1,2,3,4,5\n",
    "no text": b"\xff\xfe\x00",
    "long field": b"epoch,train,validation,lr\n" + b"1" * 200_000 + b",1,2,3\n",
}


@pytest.mark.parametrize("history", HISTORIES)
def test_a_forged_history_is_refused(run, history):
    content("history.csv", lambda path: path.write_bytes(HISTORIES[history]))(run)
    with pytest.raises(RunError, match=r"history\.csv cannot be read .*: delete it to continue without the history"):
        store.load_result(run)
    (run / "history.csv").unlink()  # the remedy
    assert store.load_result(run).history == []


def first_as(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({sorted(tensors)[0]: tensors[sorted(tensors)[0]].to(dtype)})


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "half": first_as(torch.float16),
    "integers": first_as(torch.int64),
    "none": lambda tensors: tensors.clear(),
    "more": lambda tensors: tensors.update(a=torch.zeros(1)),
}


@pytest.mark.parametrize("file", [store.MODEL, store.GUIDE])
@pytest.mark.parametrize("change", TENSORS)
def test_forged_weights_are_refused(run, file, change):
    def write(path: Path) -> None:
        tensors = safetensors.torch.load_file(path)
        TENSORS[change](tensors)
        safetensors.torch.save_file(tensors, path)

    content(file, write)(run)
    with pytest.raises(RunError, match=f"{file} does not fit"):
        cal.load(run)
    content(file, lambda path: path.write_text("no tensors"))(run)
    with pytest.raises(RunError, match=f"{file} cannot be read"):
        cal.load(run)


LINKS: dict[str, Callable[[Any, Path], Any]] = {
    "external link": lambda group, other: group.__setitem__("evil", h5py.ExternalLink(str(other), "/x")),
    "absent external link": lambda group, other: group.__setitem__("evil", h5py.ExternalLink("absent.nc", "/x")),
    "soft link": lambda group, other: group.__setitem__("evil", h5py.SoftLink("/")),
    "external values": lambda group, other: group.create_dataset("evil", (4,), "u1", external=[(str(other), 0, 4)]),
    "virtual values": lambda group, other: group.create_virtual_dataset("evil", layout(other)),
    "list as attribute": lambda group, other: group.attrs.__setitem__("odd", np.arange(5)),
}


def layout(other: Path) -> h5py.VirtualLayout:
    found = h5py.VirtualLayout((2,), "f8")
    found[:] = h5py.VirtualSource(str(other), "x", (2,))
    return found


@pytest.mark.parametrize("link", LINKS)
def test_netcdf_files_that_read_other_files_are_refused(run, tmp_path, link):
    with h5py.File(tmp_path / "secret.nc", "w") as file:
        file["x"] = np.array([1.0, 2.0])

    def write(path: Path) -> None:
        with h5py.File(path, "a") as file:
            LINKS[link](file["posterior"], tmp_path / "secret.nc")

    content(store.AMORTIZED, write)(run)
    with pytest.raises(RunError, match=r"amortized\.nc is damaged"):
        store.load_result(run)


def without(tree: xr.DataTree, group: str) -> xr.DataTree:
    return xr.DataTree.from_dict({n.path: n.to_dataset() for n in tree.subtree if n.path != f"/{group}"})


TREES: dict[str, Callable[[xr.DataTree], Any]] = {
    "no settings": lambda tree: tree["posterior"].attrs.pop("settings"),
    "settings that are a list": lambda tree: tree["posterior"].attrs.update(settings="[1]"),
    "settings that are no JSON": lambda tree: tree["posterior"].attrs.update(settings="{"),
    "latents that are no JSON": lambda tree: tree["posterior"].attrs.update(latents="{"),
    "unknown latents": lambda tree: tree["posterior"].attrs.update(latents='["q"]'),
    "no posterior": lambda tree: without(tree, "posterior"),
    "nothing": lambda tree: xr.DataTree(),
}


@pytest.mark.parametrize("file", [store.AMORTIZED, store.REFERENCE])
@pytest.mark.parametrize("change", TREES)
def test_forged_results_end_in_a_report_or_in_one_line(run, bare, file, change):
    tree = store.load_tree(run / file)
    changed = TREES[change](tree)
    store.save_tree(changed if isinstance(changed, xr.DataTree) else tree, run / file)
    code, _, err = call("report", "run", "--quiet")
    assert code in (0, 2)
    assert err.count("\n") <= 1
    assert code == 0 or "calibrant check run" in err


def test_a_forged_checkpoint_is_refused(tmp_path):
    def fit(resume: bool) -> None:
        model = cal.models.create("ppca", shape=[3], latents=2)
        data = {"x": torch.randn(40, 3, generator=torch.Generator().manual_seed(0))}
        cal.inference.fit(model, cal.guides.amortize(model, data), data, epochs=1, run_dir=tmp_path, resume=resume)

    fit(resume=False)
    path = tmp_path / "checkpoints" / "training.safetensors"
    tensors, training = checkpoints._read_checkpoint(path)
    forged = {
        "no settings": (tensors, {**training, "settings": None}),
        "no counts": (tensors, {"settings": training["settings"]}),
        "a list": (tensors, [training]),
        "other parts": ({**tensors, "evil.x": torch.zeros(1)}, training),
        "odd moments": ({n: v[..., None] if "exp_avg" in n else v for n, v in tensors.items()}, training),
    }
    for name, (values, numbers) in forged.items():
        text = json.dumps(numbers)
        sha256 = checkpoints.digest_of_tensors(values, text)
        path.write_bytes(
            safetensors.torch.save({n: v.contiguous() for n, v in values.items()}, {"training": text, "sha256": sha256})
        )
        with pytest.raises(RunError, match=r"no checkpoint of a training .*: start again without resume"):
            fit(resume=True)
        assert name
