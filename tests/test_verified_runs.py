"""Stored results are used only if they are what was written, for the same data, and stay until new ones exist."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from commands import SMALL, call, good, interrupt_at, refused

import calibrant as cal
from calibrant import store
from calibrant.errors import RunError
from calibrant.workflow import running

pytestmark = pytest.mark.usefixtures("elsewhere", "short_check")
CHECK = ["--draws", "100", "--held-out", "4", "--simulations", "100"]


@pytest.fixture
def run(made_runs: Path, elsewhere: Path) -> Path:
    """The folder of a run that was checked; the data lie beside it."""
    shutil.copytree(made_runs / "whole" / "ppca", elsewhere / "run")
    return Path("run")


def results(folder: Path) -> dict[str, bytes]:
    files = (*store.TREES.values(), *store.DATASETS.values(), "config.json")
    return {file: (folder / file).read_bytes() for file in files if (folder / file).is_file()}


def widen(path: Path) -> None:
    """Draws threefold as wide around their mean, written by another program."""
    tree = xr.load_datatree(path, engine="h5netcdf")
    posterior = tree["posterior"].to_dataset()
    tree["posterior"] = xr.DataTree(posterior.map(lambda v: v + 2 * (v - v.mean(("chain", "draw"))), keep_attrs=True))
    tree.to_netcdf(path, engine="h5netcdf")


def sd(folder: Path) -> float:
    return float(store.load_tree(folder / store.REFERENCE)["posterior"]["z"].std())


def test_a_widened_reference_is_never_used(run):
    before = sd(run)
    widen(run / store.REFERENCE)
    told = refused("report", "run")
    assert "reference.nc is damaged" in told
    assert "compute it again with calibrant check run" in told
    with pytest.raises(RunError, match=r"reference\.nc is damaged"):
        store.load_result(run)
    good("check", "run", *CHECK)  # the remedy
    assert sd(run) == pytest.approx(before, rel=0.2)
    good("report", "run")


def test_a_result_of_another_run_is_refused(run, made_runs):
    shutil.copy(made_runs / "whole" / "vae" / "comparison.nc", run / "comparison.nc")
    assert "comparison.nc is damaged" in refused("report", "run")
    (run / "comparison.nc").unlink()
    store.load_result(run)
    shutil.copy(made_runs / "whole" / "vae" / "gap.nc", run / "remedies.nc")
    assert "remedies.nc was not written for this run" in refused("report", "run")
    good("check", "run", *CHECK)
    assert not (run / "remedies.nc").exists()


def test_other_data_of_equal_length_have_a_reference_of_their_own(run, monkeypatch):
    x = np.load("rows.npz")["x"]
    np.savez("other.npz", x=x[:, ::-1] + 3)
    stored = store.load_tree(run / store.REFERENCE)
    good("check", "run", "--data", "other.npz", *CHECK)
    new = store.load_tree(run / store.REFERENCE)
    assert not np.allclose(stored["observed_data"]["x"].values, new["observed_data"]["x"].values)
    assert not np.allclose(stored["posterior"]["z"].values, new["posterior"]["z"].values)
    monkeypatch.setattr(running, "reference_of", None)  # the same data again take the stored one
    good("check", "run", "--data", "other.npz", *CHECK)


@pytest.mark.parametrize("where", ["reference_of", "examine"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RunError("no")])
def test_earlier_results_stay_until_the_new_ones_are_complete(run, monkeypatch, where, error):
    before, seen = results(run), {}
    np.savez("other.npz", x=np.load("rows.npz")["x"] + 3)

    def stop(*args, **options):
        seen.update(results(run))
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(running, where, stop)
        assert call("check", "run", "--data", "other.npz", *CHECK)[0] in (2, 130)
    assert seen == results(run) == before
    good("report", "run")
    if where == "examine":  # the reference of the check that was interrupted is used again
        monkeypatch.setattr(running, "reference_of", None)
    good("check", "run", "--data", "other.npz", *CHECK)
    assert not (run / ".checking").exists()
    assert results(run).keys() == before.keys()
    assert results(run)["reference.nc"] != before["reference.nc"]


@pytest.mark.parametrize("file", ["reference.nc", "gap.nc"])
def test_a_check_that_is_killed_between_record_and_file_is_made_again(run, monkeypatch, file):
    original = os.replace

    def killed(source, target):
        if Path(target) == run / file:
            raise KeyboardInterrupt
        original(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        assert call("check", "run", "--seed", "5", *CHECK)[0] == 130
    good("check", "run", "--seed", "5", *CHECK)
    store.load_result(run)


def test_a_first_check_that_is_killed_between_record_and_file_is_resumed(monkeypatch):
    original = os.replace

    def killed(source, target):
        if Path(target).name == "amortized.nc":
            raise KeyboardInterrupt
        original(source, target)

    words = ["run", "ppca", "--data", "rows.npz", "--set", "latents=2", *SMALL, "--out", "run"]
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        assert call(*words)[0] == 130
    interrupt_at(monkeypatch, 0)  # it must not train again
    monkeypatch.setattr(running, "reference_of", None)  # nor sample the reference again
    good("run", "--out", "run", "--resume")
    store.load_result("run")


@pytest.mark.parametrize("step", [0, 5, 1000])
def test_a_training_is_not_resumed_on_changed_data(monkeypatch, step):
    """Equal numbers of data, some of which have other values; at step 1000 the training has ended."""
    words = "fit ppca --data rows.npz --set latents=2 --epochs 3 --batch-size 40 --out run"
    with monkeypatch.context() as patched:
        interrupt_at(patched, step)
        call(*words.split())
    x = np.load("rows.npz")["x"]
    changed = x.copy()
    changed[7, 2] += 1e-3
    np.savez("rows.npz", x=changed)
    for command in ("fit ppca", "run"):
        told = refused(*command.split(), "--out", "run", "--resume")
        assert "the data in rows.npz are not those that run was trained on (others in " in told
    np.savez("rows.npz", x=x)  # the remedy
    good("fit", "ppca", "--out", "run", "--resume")


def test_a_check_on_data_that_have_changed_says_so(run):
    x = np.load("rows.npz")["x"]
    assert "another sha256" not in good("check", "run", *CHECK)[0]
    np.savez("rows.npz", x=x + 1)
    assert "the data in rows.npz are not those that the run was trained on" in good("check", "run", *CHECK)[0]
    assert "another sha256" not in good("check", "run", "--data", "rows.npz", *CHECK)[0]


def test_checkpoints_belong_to_their_data(tmp_path):
    def fit(shift, resume):
        torch_rows = {"x": np.load("rows.npz")["x"] + np.float32(shift)}
        model = cal.models.create("ppca", shape=[6], latents=2)
        guide = cal.guides.amortize(model, torch_rows)
        cal.inference.fit(model, guide, torch_rows, epochs=1, run_dir=tmp_path / "run", resume=resume)

    fit(0, resume=False)
    with pytest.raises(RunError, match=r"belongs to another training \(sha256 of the training data was \w{16}, is"):
        fit(1, resume=True)
    fit(0, resume=True)


def test_results_of_an_earlier_version_are_told_until_they_are_computed_again(run):
    golden = Path(__file__).parent / "golden" / "run-0.1.0"
    shutil.copytree(golden, "old")
    np.savez("rows3.npz", x=np.random.default_rng(0).normal(size=(64, 3)).astype("f4"))
    told = "recorded no sha256 of results"
    assert told in good("report", "old")[1]
    _, err = good("check", "old", "--data", "rows3.npz", *CHECK)
    assert told not in err
    assert told not in good("report", "old")[1]
    content = json.loads(Path("old/config.json").read_text())
    assert {"reference.nc", "history.csv", "model.safetensors", "config.json"} <= set(content["sha256"])


def test_overwriting_follows_no_link_out_of_the_folder(made_runs):
    shutil.copytree(made_runs / "whole" / "ppca", "mine")
    before = results(Path("mine"))
    words = ["run", "ppca", "vae", "--data", "rows.npz", "--set", "latents=2", *SMALL, "--out", "two", "--overwrite"]
    shutil.copytree(made_runs / "whole", "two")
    shutil.rmtree("two/vae")
    Path("two/vae").symlink_to(Path("mine").resolve())
    for command in (words, ["check", "two"], ["report", "two"], ["run", "--out", "two", "--resume"]):
        assert "vae is a link: calibrant stays inside two" in refused(*command)
    assert results(Path("mine")) == before
