"""What the tests of the commands share: a user's file, small settings, and calls of the command line."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import calibrant as cal
from calibrant import cli

SMALL = ["--quick", "--epochs", "2", "--draws", "100", "--batch-size", "40", "--held-out", "4", "--simulations", "100"]
TRAINED = ("config.json", "guide.safetensors", "history.csv", "model.safetensors")
RESULTS = ("amortized.nc", "comparison.nc", *TRAINED)
STEPS = 4  # an epoch of the training with `SMALL`
USER = '''
"""A user's model and data."""
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import calibrant as cal


class Mine(PyroModule):
    """Its observed site is not called x."""

    def __init__(self, shape, latents=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(latents, *shape))

    def forward(self, size):
        with pyro.plate("data", size):
            y = pyro.sample("y", dist.Normal(0.0, 1.0).expand([len(self.weight)]).to_event(1))
            pyro.sample("picture", dist.Normal(y @ self.weight, 0.5).to_event(1))


class Labelled(Mine):
    """Takes the labels as a covariate."""

    def __init__(self, shape, latents=2):
        super().__init__(shape, latents)
        self.offset = torch.nn.Parameter(torch.randn(10, *shape))

    def forward(self, size, y):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(self.weight)]).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight + self.offset[y.long()], 0.5).to_event(1))


class Broken:
    pass


def rows():
    rng = np.random.default_rng(0)
    return cal.data.Data({"x": rng.normal(size=(200, 6)).astype("f4"), "y": rng.integers(0, 10, 200)}, name="mine")
'''


def write_files(folder: Path) -> None:
    """Small data of several forms, and a user's file with models and data."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 3)) @ rng.normal(size=(3, 6)) + 0.5 * rng.normal(size=(200, 6))).astype("f4")
    np.savez(folder / "rows.npz", x=x)
    np.savez(folder / "two.npz", picture=x, other=x)
    np.savez(folder / "image.npz", x=x.reshape(200, 1, 2, 3))
    (folder / "user.py").write_text(USER)


def call(*words: object) -> tuple[int, str, str]:
    """Run a command; its exit code, standard output and standard error."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words], terminal_width=200)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def good(*words: object) -> tuple[str, str]:
    """Standard output and standard error of a command that succeeds."""
    code, out, err = call(*words)
    assert code == 0, err
    return out, err


def refused(*words: object) -> str:
    """A refusal is one line on standard error, after those that say what is done, and exit code 2."""
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    *before, line = err.splitlines()
    assert line.startswith("calibrant: ")
    assert not any(other.startswith("calibrant: ") for other in before)
    return line


def fit_rows(out: object, *more: object) -> tuple[str, str]:
    return good("fit", "ppca", "--data", "rows.npz", "--set", "latents=2", "--epochs", "2", "--out", out, *more)


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    model, guide = cal.load(folder)
    return {**model.state_dict(), **{f"g.{name}": value for name, value in guide.state_dict().items()}}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException | type = KeyboardInterrupt) -> None:
    """Raise in the given step of training, counted from 0."""
    training = import_module("calibrant.inference.fitting.loop")
    original, count = training._step, iter(range(10_000))

    def stepped(*args: Any) -> Any:
        if next(count) == step:
            raise error
        return original(*args)

    monkeypatch.setattr(training, "_step", stepped)
