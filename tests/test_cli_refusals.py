"""Mistakes and limits of the machine end in one line, and options reach the settings."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path

import pytest
import torch
from commands import call, refused

from calibrant import store, workflow
from calibrant.settings import QUICK
from calibrant.workflow import running

pytestmark = pytest.mark.usefixtures("elsewhere")


MISTAKES = {
    "unknown model": ("fit vea", "did you mean"),
    "unknown data": ("fit vae --data natural-patch", "did you mean natural-patches"),
    "no such file": ("fit vae --data nothing.npz", "there is no file nothing.npz"),
    "unreadable file": ("fit vae --data user.npz", "cannot be read"),
    "no such user file": ("fit absent.py:Mine", "there is no file absent.py"),
    "no such class": ("fit user.py:Other", "user.py has no 'Other'; it defines"),
    "no model": ("fit user.py:Broken --data rows.npz", "is no class of modules"),
    "file with an error": ("fit faulty.py:Mine", "faulty.py does not import: ZeroDivisionError"),
    "no such argument": ("fit vae --data rows.npz --set latent=3", "no argument latent; it has shape, latents, prior"),
    "bad argument": ("fit vae --data rows.npz --set prior=cauchy", "unknown latent prior 'cauchy'"),
    "bad type": ("fit vae --data rows.npz --set latents=many", 'vae: latents="many" is given, wanted a whole number'),
    "no value": ("fit vae --set latents", "--set latents: write NAME=VALUE"),
    "no key": ("fit vae --site x=", "--site x=: write NAME=KEY"),
    "device": ("fit vae --data rows.npz --device gpu", "device 'gpu' can't be used here"),
    "absent device": ("fit vae --data rows.npz --device cuda:99", "--device cpu"),
    "structure": ("fit vae --data rows.npz --structure tree", "unknown structure 'tree'"),
    "family": ("fit vae --data rows.npz --family gamma", "site 'z'"),
    "structure that the program does not allow": (
        "fit vae --data rows.npz --set prior=laplace --structure collapsed",
        'is not what structure="collapsed" is for',
    ),
    "families without sites": (
        "fit vae --data rows.npz --family normal --family dense",
        "--family normal: write SITE=",
    ),
    "unknown family": (
        "fit vae --data rows.npz --family z=cauchy",
        "unknown family 'cauchy'; known: ('auto', 'normal'",
    ),
    "objective": ("fit vae --data rows.npz --objective elbo", "unknown objective 'elbo'; known: ['dreg'"),
    "objective that the model does not allow": (
        "fit vae --data rows.npz --family z=studentt --objective kl",
        "no closed form of its KL divergence, use objective='stl'",
    ),
    "family of no site": ("fit vae --data rows.npz --family w=normal", "no latents"),
    "learning rate": ("fit vae --data rows.npz --lr 0", "the learning rate must be positive"),
    "same folder": ("run vae vae --data rows.npz", "share a folder"),
    "few draws": ("run vae --data rows.npz --set prior=laplace --draws 100", "convergence gate"),
    "resume what": ("fit vae --resume", "--out FOLDER"),
    "resume nothing": ("fit vae --resume --out absent", "there is no run in absent"),
    "resume a foreign folder": ("fit vae --resume --out foreign", "no run folder of calibrant"),
    "both": ("fit vae --resume --overwrite --out absent", "one of them"),
    "overwrite what": ("fit vae --overwrite", "--out FOLDER"),
    "out is a file": ("fit vae --out rows.npz", "rows.npz is a file"),
    "out is foreign": ("fit vae --out foreign", "it is left alone"),
    "overwrite a foreign folder": ("fit vae --out foreign --overwrite", "it is left alone"),
    "check nothing": ("check absent", "there is no run in absent"),
    "check a foreign folder": ("check foreign", "no run folder of calibrant"),
    "report on nothing": ("report foreign", "no run folder of calibrant"),
    "out cannot be made": ("fit vae --data rows.npz --out rows.npz/run", "rows.npz"),
}


@pytest.fixture
def traps():
    Path("user.npz").write_text("no archive")
    Path("faulty.py").write_text("1 / 0")
    Path("foreign").mkdir()
    Path("foreign/thesis.txt").write_text("years of work")
    Path("foreign/config.json").write_text('{"format": "of another program"}')


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_in_one_line_and_change_nothing(mistake, traps):
    before = {
        path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and "__pycache__" not in str(path)
    }
    words, message = MISTAKES[mistake]
    assert message in refused(*shlex.split(words))
    after = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and "__pycache__" not in str(path)}
    assert before == after


@pytest.mark.parametrize("words", ["fit vae --epochs many", "fit vae --epochs 0", "run --no-such", "walk", "fit"])
def test_usage_errors_have_exit_code_2(words):
    code, _, err = call(*words.split())
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x.nc"), "no space left to write x.nc"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "runs: Permission denied"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the device is out of memory"),
    ],
)
def test_the_machines_limits_are_told_in_one_line(monkeypatch, error, message):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(store, "save_run", fail)
    assert message in refused("fit", "ppca", "--data", "rows.npz")


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch):
    monkeypatch.setattr(running, "_train", lambda *args: [][0])
    with pytest.raises(IndexError):
        call("fit", "ppca", "--data", "rows.npz")


def test_options_reach_the_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(workflow, "fit_run", lambda request, progress: seen.append(request) or 1 / 0)
    words = """fit vae --set latents=3 --set prior=laplace --set 'likelihood={"name": "gaussian"}' --site x=k
        --family z=laplace --family s=gamma --structure full --objective dreg --quick --epochs 7
        --data-option 'size=[14, 10]' --data-option values=dequantised --encoder '{"name": "sigma-vae", "width": 4}'"""
    with pytest.raises(ZeroDivisionError):
        call(*shlex.split(words))
    assert seen[0].arguments == {"latents": 3, "prior": "laplace", "likelihood": {"name": "gaussian"}}
    assert seen[0].site == {"x": "k"}
    assert seen[0].data_options == {"size": [14, 10], "values": "dequantised"}
    assert seen[0].asked() == {
        **QUICK,
        "epochs": 7,
        "family": {"z": "laplace", "s": "gamma"},
        "structure": "full",
        "objective": "dreg",
        "encoder": {"name": "sigma-vae", "width": 4},
    }
