"""What is saved is loaded with the same draws, whatever model and guide were made of; nothing is overwritten."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from commands import good
from pyro.nn import PyroModule
from torch import nn

import calibrant as cal
from calibrant.errors import RunError

X = {"x": torch.randn(24, 6, generator=torch.Generator().manual_seed(3))}
IN_FILE = """
import pyro, pyro.distributions as dist, torch
from pyro.nn import PyroModule

class Plain(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(6, 2))

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T, 1.0).to_event(1))

class Scaled(Plain):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
"""


def draws(model: Any, guide: Any, data: Any = X) -> dict[str, np.ndarray]:
    posterior = cal.inference.posterior(model, guide, data, draws=20, seed=5)["posterior"]
    return {str(name): values.values for name, values in posterior.data_vars.items()}


def same(pair: tuple[Any, Any], other: tuple[Any, Any], data: Any = X) -> bool:
    ours, theirs = (draws(*one, data) for one in (pair, other))
    return list(ours) == list(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)


def shaken(guide: Any) -> Any:
    """The guide with other weights than those that its seed gives, as after a training."""
    with torch.no_grad():
        for weight in guide.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return guide.eval()


def amortized(model: Any, **options: Any) -> Any:
    return shaken(cal.guides.amortize(model, X, **options))


def function(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True).expand(size, 6), 1.0).to_event(1))


def vae() -> PyroModule:
    torch.manual_seed(0)
    return cal.models.create("vae", shape=(6,), latents=2).eval()


def decoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 6)).eval()


def of_decoder(seed: int = 0) -> PyroModule:
    return cal.models.from_decoder(decoder(seed), prior=2, likelihood="gaussian")


def of_encoder(seed: int = 0) -> PyroModule:
    torch.manual_seed(seed)
    return cal.guides.from_encoder(nn.Linear(6, 4).eval(), "loc, log_scale")


def refined(model: Any, guide: Any) -> Any:
    return cal.guides.refine(model, guide, X, steps=3)


@dataclass
class Pair:
    """How model and guide are built, and what has to be given to load them; `refusal` is what is said without it."""

    build: Callable[[], tuple[Any, Any]]
    given: Callable[[], dict[str, Any]] = field(default=dict)
    refusal: str = ""


def pair_of(model: Callable[[], Any], guide: Callable[[Any], Any] = amortized) -> Callable[[], tuple[Any, Any]]:
    def build() -> tuple[Any, Any]:
        one = model()
        return one, guide(one)

    return build


PAIRS = {
    "registered": Pair(pair_of(vae)),
    "collapsed": Pair(
        pair_of(
            lambda: cal.models.create("ea-vae", shape=(6,), latents=2), lambda m: amortized(m, structure="collapsed")
        )
    ),
    "prior": Pair(pair_of(vae, cal.guides.prior)),
    "refined": Pair(pair_of(vae, lambda m: refined(m, amortized(m)))),
    "refined twice": Pair(pair_of(vae, lambda m: refined(m, refined(m, amortized(m))))),
    "function": Pair(lambda: (function, amortized(function)), lambda: {"model": function}, r"model=function\)"),
    "from_decoder": Pair(
        lambda: (of_decoder(), of_encoder()),
        lambda: {"model": of_decoder(7), "guide": of_encoder(7)},
        r"DecoderModel.*pass it, load\(.*model=",
    ),
    "refined from_encoder": Pair(
        lambda: (of_decoder(), refined(of_decoder(), of_encoder())),
        lambda: {"model": of_decoder(7), "guide": of_encoder(7)},
        r"pass it, load\(.*model=",
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_what_was_saved_is_loaded_with_the_same_draws(name, tmp_path):
    case = PAIRS[name]
    pair = case.build()
    assert cal.save(tmp_path / "run", *pair) == tmp_path / "run"
    if case.refusal:
        with pytest.raises(RunError, match=case.refusal):
            cal.load(tmp_path / "run")
    again = cal.load(tmp_path / "run", **case.given())
    assert same(pair, again)
    assert not any(module.training for module in again)


def test_a_guide_of_ones_own_that_was_refined_is_asked_for(tmp_path):
    pair = vae(), refined(vae(), of_encoder())
    cal.save(tmp_path, *pair)
    with pytest.raises(RunError, match=r"refines one that was written by hand: .* pass load\(run, guide="):
        cal.load(tmp_path)
    assert same(pair, cal.load(tmp_path, guide=of_encoder(4)))
    assert same(pair, cal.load(tmp_path, guide=refined(vae(), of_encoder(4))))


@pytest.fixture
def own(tmp_path: Path) -> Any:
    """The classes of a user's file, imported as a user imports them."""
    (tmp_path / "own.py").write_text(IN_FILE)
    return runpy.run_path(str(tmp_path / "own.py")) | {"file": str(tmp_path / "own.py")}


def test_classes_of_a_file(own, tmp_path):
    spec = f"{own['file']}:Plain"
    pair = pair_of(lambda: cal.models.create(spec))()
    cal.save(tmp_path / "created", *pair)
    with pytest.raises(RunError, match=r'model="FILE.py:Class"'):
        cal.load(tmp_path / "created")
    assert same(pair, cal.load(tmp_path / "created", model=spec))
    pair = pair_of(own["Plain"])()
    cal.save(tmp_path / "called", *pair)
    with pytest.raises(RunError, match="a Plain, was built from modules, or by its class"):
        cal.load(tmp_path / "called")
    for given in (spec, own["Plain"], own["Plain"]()):
        assert same(pair, cal.load(tmp_path / "called", model=given))


def test_arguments_that_were_not_stored_are_not_guessed(own, tmp_path):
    pair = pair_of(lambda: own["Scaled"](scale=2.0))()
    cal.save(tmp_path / "run", *pair)
    for given in (f"{own['file']}:Scaled", own["Scaled"], None):
        with pytest.raises(RunError, match="no arguments are stored: build the same model again and pass it, load"):
            cal.load(tmp_path / "run", model=given)
    assert same(pair, cal.load(tmp_path / "run", model=own["Scaled"](scale=2.0)))


NOTEBOOK = (
    IN_FILE
    + """
import sys
import numpy as np
import calibrant as cal

x = {"x": torch.randn(24, 6, generator=torch.Generator().manual_seed(3))}
if sys.argv[1] == "save":
    model = Scaled(2.0)
    guide = cal.guides.amortize(model, x)
    cal.inference.fit(model, guide, x, epochs=2, run_dir="run")
else:
    try:
        cal.load("run")
    except cal.errors.RunError as error:
        print(error)
    model, guide = cal.load("run", model=Scaled(2.0))
print(float(cal.inference.posterior(model, guide, x, draws=5, seed=1)["posterior"]["z"].values.sum()).hex())
"""
)


@pytest.mark.slow
def test_a_model_of_a_notebook_is_given_again_in_the_next_session(tmp_path):
    (tmp_path / "cells.py").write_text(NOTEBOOK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path)}
    said = [
        subprocess.run(
            [sys.executable, "cells.py", what],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for what in ("save", "load")
    ]
    assert said[0][-1] == said[1][-1]
    assert "a Scaled, was built from modules, or by its class" in said[1][0]
    assert "load('run', model=...)" in said[1][0]


# -- folders -----------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_run_is_overwritten_only_if_that_is_asked_for(tmp_path):
    first, second = pair_of(vae)(), pair_of(vae, cal.guides.prior)()
    cal.save(tmp_path, *first)
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(RunError, match="holds a run, which is not overwritten"):
        cal.save(tmp_path, *second)
    assert contents(tmp_path) == before
    cal.save(tmp_path, *second, overwrite=True)
    assert same(second, cal.load(tmp_path))
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model.safetensors", "guide.safetensors", "history.csv"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_overwritten(name, overwrite, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match="no run folder of calibrant" if overwrite else f"holds a file {name}"):
        cal.save(tmp_path, *pair_of(vae)(), overwrite=overwrite)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"cannot be written .*: name another folder"):
        cal.save(tmp_path / "file" / "run", *pair_of(vae)())
    with pytest.raises(RunError, match="cannot be written"):
        cal.save(tmp_path / "file", *pair_of(vae)())


def test_the_history_of_a_training_is_saved_with_it(tmp_path):
    model, guide = pair_of(vae)()
    fit = cal.inference.fit(model, guide, X, epochs=3)
    cal.save(tmp_path / "with", model, guide, fit)
    assert cal.store.load_history(tmp_path / "with") == fit.history
    assert cal.store.read_config(tmp_path / "with")["fit"]["elbo"] == pytest.approx(fit.elbo)
    cal.save(tmp_path / "without", model, guide)
    assert cal.store.load_history(tmp_path / "without") == []
    assert np.isnan(cal.store.read_config(tmp_path / "without")["fit"]["elbo"])


# -- fit(run_dir=) -----------------------------------------------------------------------------------------------------


def trained(folder: Path, epochs: int = 3, **options: Any) -> tuple[Any, Any]:
    model, guide = pair_of(vae)()
    cal.inference.fit(model, guide, X, epochs=epochs, run_dir=folder, **options)
    return model, guide


def test_a_training_leaves_a_folder_that_is_loaded(tmp_path):
    pair = trained(tmp_path / "new" / "run")
    assert same(pair, cal.load(tmp_path / "new" / "run"))
    config = cal.store.read_config(tmp_path / "new" / "run")
    assert config["settings"]["epochs"] == 3
    assert config["data"] == {"name": "", "observed": ["x"], "covariates": []}
    assert len(cal.store.load_history(tmp_path / "new" / "run")) == 3


def test_an_interrupted_training_is_loaded_and_resumed(tmp_path):
    def stop(stage: str, done: int, total: int, text: str = "") -> None:
        if done == 2:
            raise KeyboardInterrupt

    pair = trained(tmp_path / "run", 6, progress=stop)
    assert same(pair, cal.load(tmp_path / "run"))
    whole = trained(tmp_path / "whole", 6)
    assert same(trained(tmp_path / "run", 6, resume=True), whole)
    assert same(whole, cal.load(tmp_path / "run"))


def test_a_training_without_a_result_says_how_it_goes_on(tmp_path):
    class Halt(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Halt

    with pytest.raises(Halt):
        trained(tmp_path, progress=stop)
    with pytest.raises(RunError, match=r"no result yet: continue it with fit\(\.\.\., run_dir=…, resume=True\)"):
        cal.load(tmp_path)
    assert same(trained(tmp_path, resume=True), cal.load(tmp_path))


@pytest.mark.slow
def test_a_folder_of_a_training_can_be_checked_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X["x"].numpy())
    trained(tmp_path / "run")
    shown, _ = good("check", "run", "--data", "x.npy", "--quick")
    assert "vae" in shown
    assert (tmp_path / "run" / "report.html").is_file()


def test_both_are_those_of_the_store():
    assert cal.load is cal.store.load
    assert cal.save is cal.store.save
