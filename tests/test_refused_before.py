"""What would be refused after a training is refused before it: no step is taken, and no run is begun."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import call
from pyro.nn import PyroModule

import calibrant as cal
from calibrant.data import Data
from calibrant.errors import CalibrantError, DataError
from calibrant.inference.fitting import loop
from calibrant.workflow import running

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))


class Curved(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2, 6))

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(torch.tanh(z @ self.weight), 1.0).to_event(1))


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what has been trained; a step of a training is an error."""
    begun: list[str] = []
    monkeypatch.setattr(loop, "_train", lambda *given: begun.append("fit"))
    monkeypatch.setattr(running, "_train", lambda *given: begun.append("run"))
    return begun


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no epochs": ({"epochs": -1}, "epochs=-1: give a whole number, 0 or more"),
    "part of an epoch": ({"epochs": 2.5}, "epochs=2.5: give a whole number"),
    "empty batches": ({"batch_size": 0}, "batch_size=0: give a whole number, 1 or more"),
    "batches in parts": ({"batch_size": 10.5}, "batch_size=10.5"),
    "learning backwards": ({"lr": -0.1}, "lr=-0.1: give a number above 0"),
    "no learning": ({"lr": 0}, "lr=0: give a number above 0"),
    "a rate that is no number": ({"lr": float("nan")}, "lr=nan"),
    "a rate in words": ({"lr": "fast"}, "lr='fast'"),
    "clipped to nothing": ({"clip": 0.0}, "clip=0.0: give a number above 0"),
    "impatient": ({"patience": -1}, "patience=-1: give a whole number, 0 or more"),
    "particles in parts": ({"objective": "iwae", "particles": 2.5}, "particles=2.5: give a whole number"),
    "a seed in words": ({"seed": "a"}, "seed='a': give a whole number"),
    "unknown compile": ({"compile": "x"}, 'give "auto", True or False'),
    "unknown device": ({"device": "gpu"}, "device 'gpu' can't be used here .*: use device='cpu'"),
    "held-out words": ({"validation": "a"}, "a str"),
    "held-out shape": (
        {"validation": Data({"x": X[:9, :4]})},
        r"validation: 'x' has the event shape \(4,\), .* \(6,\)",
    ),
    "held-out key": ({"validation": Data({"y": X[:9]})}, "validation: 'x' is only in one"),
    "held-out more": ({"validation": Data({"x": X[:9], "y": X[:9]})}, "validation: 'y' is only in one"),
    "held-out covariate": ({"validation": Data({"x": X[:9]}, {"k": X[:9]})}, "validation: 'k' is only in one"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_training_is_refused_before_its_first_step(name, untrained):
    options, message = WRONG[name]
    model = Curved()
    guide = cal.guides.amortize(model, {"x": X})
    with pytest.raises(CalibrantError, match=message):
        cal.inference.fit(model, guide, {"x": X}, **options)
    assert untrained == []


def test_held_out_data_in_any_form_are_taken(untrained):
    model = Curved()
    guide = cal.guides.amortize(model, {"x": X})
    for validation in ({"x": X[:9]}, {"x": X[:9].numpy()}, Data({"x": X[:9]})):
        assert cal.inference.fit(model, guide, {"x": X}, validation=validation).held_out == []
    assert untrained == ["fit"] * 3


@pytest.mark.parametrize("name", ["a file", "below a file", "a run", "a checkpoint", "someone's weights"])
def test_a_folder_is_refused_before_the_first_step(name, untrained, tmp_path):
    model = Curved()
    guide = cal.guides.amortize(model, {"x": X})
    (tmp_path / "file").write_text("mine")
    cal.save(tmp_path / "run", model, guide)
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "model.safetensors").write_text("mine")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    (tmp_path / "begun" / "checkpoints" / "training.safetensors").write_text("mine")
    places = {
        "a file": ("file", "cannot be written"),
        "below a file": ("file/run", "cannot be written"),
        "a run": ("run", "holds a run, which is not overwritten"),
        "a checkpoint": ("begun", "there is a checkpoint"),
        "someone's weights": ("others", "holds a file model.safetensors"),
    }
    place, message = places[name]
    with pytest.raises(CalibrantError, match=message):
        cal.inference.fit(model, guide, {"x": X}, run_dir=tmp_path / place)
    assert untrained == []


# -- commands ----------------------------------------------------------------------------------------------------------

FILE = """
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import calibrant as cal

X = np.random.default_rng(0).normal(size=(60, 6)).astype("float32")


class Curved(PyroModule):
    def __init__(self, binary=False):
        super().__init__()
        self.weight, self.binary = torch.nn.Parameter(torch.ones(2, 6)), binary

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            mean = torch.tanh(z @ self.weight)
            noise = dist.Bernoulli(logits=mean) if self.binary else dist.Normal(mean, 1.0)
            pyro.sample("x", noise.to_event(1))


class Discrete(PyroModule):
    def __init__(self):
        super().__init__()
        self.means = torch.nn.Parameter(torch.randn(3, 6))

    def forward(self, size):
        pyro.factor("penalty", -self.means.square().sum())
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(self.means[k], 1.0).to_event(1))


def splits(*parts):
    return dict(zip(("train", "validation", "test"), map(cal.data.Data, parts)))


def good():
    return {"x": X}


def other_test():
    return splits({"x": X}, {"x": X[:9]}, {"x": X[:9, :4]})


def other_validation():
    return splits({"x": X}, {"x": X[:9, :4]}, {"x": X[:9]})


def grey_test():
    return splits({"x": (X > 0) * 1.0}, {"x": (X[:9] > 0) * 1.0}, {"x": X[:9]})
"""
COMMANDS = {
    "test data of another shape": ("Curved", "other_test", [], r"the test data: 'x' has the event shape \(4,\)"),
    "validation data of another shape": ("Curved", "other_validation", [], "the validation data: 'x' has"),
    "test data outside the support": ("Curved", "grey_test", ["--set", "binary=true"], "outside the support"),
    "no reference": ("Discrete", "good", [], "a site or factor outside the data plate has a density of its own"),
    "too many draws": ("Curved", "good", ["--draws", "100000000"], "GiB, more than .*: reduce draws"),
    "a folder below a file": ("Curved", "good", ["--out", "own.py/run"], "cannot be written .*: name another folder"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_is_refused_before_its_training(name, untrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(FILE)
    model, data, options, message = COMMANDS[name]
    out = [] if "--out" in options else ["--out", "run"]
    code, _, said = call("run", f"own.py:{model}", "--data", f"own.py:{data}", *options, *out)
    assert code == 2
    assert untrained == []
    assert re.search(message, " ".join(said.split()))
    assert not Path("run").exists()


# -- labels ------------------------------------------------------------------------------------------------------------


def test_labels_that_results_cannot_keep_are_refused_where_they_are_given():
    for labels in (np.array(["a", 1, 2], dtype=object), np.array([None, 1, 2], dtype=object)):
        with pytest.raises(DataError, match=r"give whole numbers, or strings: list\(map\(str, labels\)\)"):
            Data({"x": X[:3]}, coords={"data": labels})
        followed = Data({"x": X[:3]}, coords={"data": list(map(str, labels))})
        assert followed.labels().dtype.kind == "U"


def test_dates_become_strings():
    dates = np.array(["2026-01-01", "2026-01-02", "2026-01-03"], dtype="datetime64[ns]")
    assert Data({"x": X[:3]}, coords={"data": dates}).labels().tolist() == ["2026-01-01", "2026-01-02", "2026-01-03"]
    assert Data({"x": X[:3]}, coords={"data": np.array([2, 1, 0], dtype=object)}).labels().dtype == np.int64
