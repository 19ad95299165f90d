"""Files whose bytes have changed: what is read is what was written, or the file is refused in one line."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from stored_runs import modules, rows, saved

import calibrant as cal
from calibrant import store
from calibrant.errors import CalibrantError
from calibrant.evaluation.statistics.comparison import compare
from calibrant.inference.fitting import checkpoints

CHECKPOINT = Path(checkpoints.CHECKPOINTS) / checkpoints.CHECKPOINT_FILE


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of every kind: weights, history, checkpoint, trees, a dataset, and data archives."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    model, guide = modules("ea-vae")
    cal.inference.fit(model, guide, rows(40), validation=cal.data.Data(rows(20, 2)), epochs=1, run_dir=folder)
    saved(folder, model, guide)
    data = cal.data.Data(rows(8))
    posterior = cal.inference.posterior(model, guide, data, draws=100)
    reference = cal.inference.reference(model, data, chains=4, draws=100, seed=1)
    store.save_tree(posterior, folder / store.AMORTIZED)
    store.save_tree(reference, folder / store.REFERENCE)
    store.save_dataset(compare(posterior, reference), folder / store.COMPARISON)
    arrays = {"x": rows(50)["x"].numpy(), "age": np.arange(50)}
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "compressed.npz", **arrays)
    return folder


def tensors(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value.tolist() for name, value in module.state_dict().items()}


def checkpoint(folder: Path) -> Any:
    found, training = checkpoints._read_checkpoint(folder / CHECKPOINT)
    return {name: value.tolist() for name, value in found.items()}, training


def archive(path: Path) -> Any:
    splits = cal.data.load(path)
    return {s: {k: v.tolist() for k, v in part.tensors()[0].items()} for s, part in splits.items()}


def dataset(found: xr.Dataset) -> Any:
    return found.to_dict()


# File → how it is read.
KINDS: dict[str, Callable[[Path], Any]] = {
    "config.json": lambda folder: store.read_config(folder),
    "history.csv": lambda folder: store.load_history(folder),
    "model.safetensors": lambda folder: tensors(cal.load(folder)[0]),
    "guide.safetensors": lambda folder: tensors(cal.load(folder)[1]),
    str(CHECKPOINT): checkpoint,
    "amortized.nc": lambda folder: dataset(store.load_tree(folder / store.AMORTIZED)["posterior"].to_dataset()),
    "reference.nc": lambda folder: dataset(store.load_tree(folder / store.REFERENCE)["posterior"].to_dataset()),
    "comparison.nc": lambda folder: dataset(store.load_dataset(folder / store.COMPARISON)),
    "plain.npz": lambda folder: archive(folder / "plain.npz"),
    "compressed.npz": lambda folder: archive(folder / "compressed.npz"),
}


def outcomes(folder: Path, file: str, count: int) -> dict[str, int]:
    """How often one flipped byte was refused, made no difference, or changed what was read; other errors are raised."""
    read, path, found = KINDS[file], folder / file, {"refused": 0, "same": 0, "changed": 0, "named no file": 0}
    right, content, numbers = repr(read(folder)), path.read_bytes(), random.Random(file)
    for flip in range(count):
        damaged = bytearray(content)
        # Headers decide much, so half of the flips are in them.
        damaged[numbers.randrange(min(len(damaged), 300) if flip % 2 else len(damaged))] ^= numbers.randrange(1, 256)
        path.write_bytes(damaged)
        try:
            found["same" if repr(read(folder)) == right else "changed"] += 1
        except CalibrantError as error:
            found["refused" if str(folder) in str(error) else "named no file"] += 1
    path.write_bytes(content)
    return found


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("count", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_a_flipped_byte_changes_nothing_silently(tmp_path, whole, file, count):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    found = outcomes(folder, file, count)
    assert found["changed"] == found["named no file"] == 0
    assert found["refused"] > count / 2 or file.endswith("npz")  # archives hold dates that nobody reads
    assert sum(found.values()) == count


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("length", [0, 1, 50, -1])
def test_a_file_that_was_cut_is_refused(tmp_path, whole, file, length):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / file).write_bytes((folder / file).read_bytes()[:length])
    if file == "config.json" and length == -1:
        assert KINDS[file](folder)  # the line's end alone is missing
        return
    with pytest.raises(CalibrantError):
        KINDS[file](folder)
