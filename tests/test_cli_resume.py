"""Folders that hold a run: what replaces it, what goes on with it, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import SMALL, STEPS, TRAINED, USER, call, fit_rows, good, interrupt_at, refused, same, weights

import calibrant as cal
from calibrant import store
from calibrant.settings import Settings
from calibrant.workflow import preparing, running

pytestmark = pytest.mark.usefixtures("elsewhere")


# -- folders that exist ------------------------------------------------------------------------------------------------


def test_a_run_is_replaced_only_when_asked_and_other_files_stay(monkeypatch, made_runs):
    shutil.copytree(made_runs / "fitted", "run")
    first = weights("run")
    Path("run/notes.txt").write_text("mine")
    assert "--resume continues it, --overwrite replaces it" in refused(
        "fit", "ppca", "--data", "rows.npz", "--out", "run"
    )
    for mistake in (["--set", "no=1"], ["--structure", "tree"], ["--device", "gpu"]):
        refused("fit", "ppca", "--data", "rows.npz", "--out", "run", "--overwrite", *mistake)
        assert same(first, weights("run"))
    fit_rows("run", "--seed", "2", "--overwrite")
    assert not same(first, weights("run"))
    assert Path("run/notes.txt").read_text() == "mine"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 0)
        words = "run ppca vae --data rows.npz --out run --overwrite"
        assert call(*words.split())[0] == 130
    assert sorted(path.name for path in Path("run").iterdir()) == ["config.json", "notes.txt", "ppca"]
    fit_rows("run", "--overwrite")
    assert sorted(path.name for path in Path("run").iterdir()) == sorted([*TRAINED, "checkpoints", "notes.txt"])


def test_an_empty_folder_is_as_good_as_none():
    Path("a").mkdir()
    Path("b").mkdir()
    fit_rows("a")
    fit_rows("b", "--overwrite")
    assert same(weights("a"), weights("b"))


def test_code_is_not_imported_because_a_folder_names_it(short_check):
    good("fit", "user.py:Mine", "--data", "user.py:rows", "--epochs", "1", "--out", "run")
    Path("user.py").write_text("raise SystemExit('imported')" + USER)
    assert "--model FILE.py:Class" in refused("check", "run", "--data", "rows.npz", "--held-out", "2")
    assert "give --data" in refused("check", "run", "--held-out", "2")
    assert "give MODEL" in refused("run", "--out", "run", "--resume")
    Path("user.py").write_text(USER + "\n# changed\n")
    words = ["--model", "user.py:Mine", "--data", "user.py:rows", "--draws", "100", "--held-out", "4"]
    words += ["--simulations", "100"]
    code, _, err = call("check", "run", *words)
    assert code == 0
    assert "another sha256" in err
    assert store.load_tree(Path("run/reference.nc"))["posterior"].attrs["method"] == "exact"


# -- Ctrl-C and resuming -----------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_weights_and_resume_gives_the_uninterrupted_result(short_check, monkeypatch, made_runs):
    words = ["run", "ppca", "vae", "--data", "rows.npz", "--set", "latents=2", *SMALL]
    with monkeypatch.context() as patched:
        interrupt_at(patched, STEPS * 2 + STEPS + 1)  # in the second epoch of the second model
        code, out, err = call(*words, "--out", "part")
    assert (code, out) == (130, "")
    told = err.splitlines()[-1]
    assert "ppca the best weights of 2 epochs, amortized.nc, reference.nc, comparison.nc" in told
    assert "vae the best weights of 1 epochs" in told
    assert cal.load("part/vae")
    assert store.read_config("part/vae")["fit"]["stopped"] == "interrupted"
    good("report", "part", "--quiet")
    assert Path("part/report.html").read_text().endswith("['ppca']")
    command = shlex.split(told.partition("Resume with: ")[2])
    assert command == ["calibrant", "run", "--out", "part", "--resume"]
    good(*command[1:])
    for name in ("ppca", "vae"):
        whole, part = made_runs / "whole" / name, Path("part") / name
        assert same(weights(whole), weights(part))
        ours, theirs = (store.load_tree(run / "amortized.nc")["posterior"].dataset for run in (whole, part))
        assert ours.identical(theirs)
        assert store.load_history(whole) == store.load_history(part)
    assert Path("part/report.html").read_text().endswith("['ppca', 'vae']")


def test_resume_refuses_other_settings_and_takes_the_rest_from_the_folder(monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 5)
        words = "fit ppca --data rows.npz --set latents=2 --epochs 3 --batch-size 40 --out run"
        code, _, err = call(*words.split())
    assert code == 130
    assert "Resume with: calibrant fit ppca --out run --resume" in err
    for words, message in {
        "fit vae": "models was ['ppca'], is ['vae']",
        "fit ppca --epochs 4": "epochs was 3, is 4",
        "fit ppca --quick": "epochs was 3, is 4",
        "fit ppca --lr 0.1": f"lr was {Settings().lr}, is 0.1",
        "fit ppca --data image.npz": "data was rows.npz, is image.npz",
        "fit ppca --set latents=3": "arguments was {'latents': 2}, is {'latents': 3}",
    }.items():
        assert message in refused(*words.split(), "--out", "run", "--resume")
    rows = np.load("rows.npz")["x"]
    np.savez("rows.npz", x=rows[:180])
    assert "the data in rows.npz are not those that run" in refused("fit", "ppca", "--out", "run", "--resume")
    np.savez("rows.npz", x=rows)
    good("fit", "ppca", "--out", "run", "--resume", "--epochs", "3")
    assert store.read_config("run")["fit"]["epochs"] == 3


def test_ctrl_c_while_sampling_keeps_the_training(short_check, monkeypatch):
    words = ["run", "ppca", "--data", "rows.npz", "--set", "latents=2", *SMALL, "--out", "run"]
    with monkeypatch.context() as patched:

        def stop(*args, **options):
            raise KeyboardInterrupt

        patched.setattr(running, "reference_of", stop)
        code, _, err = call(*words)
        assert code == 130
        assert "ppca the best weights of 2 epochs. Resume with: calibrant run --out run --resume" in err
        code, _, err = call("check", "run")
        assert code == 130
    before = weights("run")
    interrupt_at(monkeypatch, 0)  # it must not train again
    good("run", "--out", "run", "--resume")
    assert same(before, weights("run"))
    assert Path("run/report.html").is_file()
    monkeypatch.setattr(running, "reference_of", None)  # nor sample the references again
    monkeypatch.setattr(running, "examine", lambda *_, **__: 1 / 0)  # what comes next
    with pytest.raises(ZeroDivisionError):
        call("run", "--out", "run", "--resume")


def test_ctrl_c_before_anything_was_saved(monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "load_splits", stop)
    code, _, err = call("fit", "ppca")
    assert (code, err.splitlines()[-1]) == (130, "interrupted")


def test_references_that_were_cut_short_are_kept(short_check, monkeypatch):
    original = running.reference_of
    few = lambda model, data, plan, **options: original(model, data[:3], plan, **options)  # noqa: E731
    monkeypatch.setattr(running, "reference_of", few)
    code, _, err = call("run", "ppca", "--data", "rows.npz", *SMALL, "--out", "run")
    assert code == 130
    assert "reference.nc" in err
    assert store.load_tree("run/reference.nc")["posterior"].sizes["data"] == 3


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_real_interrupt_of_a_real_process():
    env = {**os.environ, "PYTHONPATH": str(Path(cal.__file__).parents[1])}
    words = "fit ppca --data rows.npz --set latents=2 --epochs 100000 --batch-size 160 --out run"
    # Where the tests run in the background of a shell, interrupts are ignored, which processes inherit.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listen}; from calibrant.cli import app; app({words.split()!r})"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )
    deadline = time.monotonic() + 120
    # Some epochs in: the first steps import much, where Python may swallow an interrupt.
    seen: set[int] = set()
    while len(seen) < 4 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        checkpoint = Path("run/checkpoints/training.safetensors")
        seen |= {checkpoint.stat().st_mtime_ns} if checkpoint.is_file() else set()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Resume with: calibrant fit ppca --out run --resume" in err
    config = json.loads(Path("run/config.json").read_text())
    assert config["fit"]["stopped"] == "interrupted"
    assert len(store.load_history("run")) == config["fit"]["epochs"]
    cal.load("run")
