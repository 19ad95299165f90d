"""Cells that use models which other cells have trained: the same results however a run was stopped, and domains."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_trainings
import torch
from commands import call, good, refused
from safetensors.torch import load_file

import calibrant as cal
from calibrant.errors import RunError
from calibrant.reproductions import Needs
from calibrant.reproductions.folder import Plan, completed, open_folder
from calibrant.reproductions.kept import read_kept, set_kept, write_kept
from calibrant.reproductions.registering import experiment

HERE = Path(__file__).parent
WORDS = ["reproduce", tiny_trainings.PAPER, "--only", "widths", "--quick", "--quiet"]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TINY_PAPER", raising=False)
    monkeypatch.setenv("CALIBRANT_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run without a break."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    cal.reproductions.run(tiny_trainings.PAPER, only="widths", quick=True, out=folder)
    return folder


def found(folder: Path | str) -> dict[str, Any]:
    """What a run found, without how long it took."""
    parts = cal.reproductions.load_results(folder).content["experiments"]
    return json.loads(re.sub(r'"seconds": \{[^}]*\}', "", json.dumps(parts)).replace(", ,", ","))


def apart(*words: str, tiny: str = "", threads: str = "1", code: int = 0) -> str:
    """Run a command in a process of its own; what it prints on standard error."""
    path = os.pathsep.join([str(Path(cal.__file__).parents[1]), str(HERE)])
    env = {**os.environ, "PYTHONPATH": path, "TINY_PAPER": tiny, "OMP_NUM_THREADS": threads}
    start = "import tiny_trainings; from calibrant.cli import app; app()"
    done = subprocess.run([sys.executable, "-c", start, *words], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == code, done.stderr
    return done.stderr


def cells(folder: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in Path(folder, "cells").rglob("*.safetensors")}


def test_an_experiment_brings_the_trainings_that_it_uses(whole):
    results = cal.reproductions.load_results(whole)
    assert results.experiments == ["models", "widths"]
    trained = {row["row"]: row for row in results.table("models")}
    asked = {row["row"]: row for row in results.table("widths") if row["number"] == "ELBO"}
    for row in trained:  # the same weights, whose ELBO is estimated from other draws
        for seed, elbo in trained[row]["seeds"].items():
            assert abs(asked[f"{row}, asked"]["seeds"][seed] - elbo) < 1.0
    assert {path.name for path in (whole / "weights/models").iterdir()} == {
        "few.0.safetensors", "many.0.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["many 0", "many, asked 0"], ids=["a training", "one that uses it"])
def test_a_run_that_is_interrupted_is_resumed_to_the_same_results(place, whole, monkeypatch):
    row, seed = place.rsplit(" ", 1)
    with monkeypatch.context() as patched:
        patched.setattr(tiny_trainings, "planted", lambda context: _stop(context, row, int(seed)))
        with pytest.raises(KeyboardInterrupt, match="--only widths --quick --out run --resume"):
            cal.reproductions.run(tiny_trainings.PAPER, only="widths", quick=True, out="run")
    done = cells("run")
    good(*WORDS, "--out", "run", "--resume")
    assert done.items() <= cells("run").items()  # finished cells are not run again
    assert found("run") == found(whole)


def _stop(context: Any, row: str, seed: int) -> None:
    if (context.row, context.seed) == (row, seed):
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("place", ["many 0", "few, asked 0"], ids=["a training", "one that uses it"])
@pytest.mark.skipif(os.name != "posix", reason="cells run one by one where processes cannot be interrupted")
def test_cells_side_by_side_are_killed_and_resumed_to_the_same_results(place, whole):
    told = apart(*WORDS, "--out", "run", tiny=f"kill {place}", threads="2", code=2)
    assert "ended from outside (exit status -9)" in told
    apart(*WORDS, "--out", "run", "--resume", threads="2")
    assert found("run") == found(whole)


def test_a_training_that_failed_is_told_by_those_that_use_it_and_tried_again(whole, monkeypatch):
    monkeypatch.setenv("TINY_PAPER", "fail many 0")
    code, out, _ = call(*WORDS, "--out", "run")
    assert code == 1
    assert "failed: models, many, seed 0: ValueError: planted" in out
    told = "the training models, many, seed 0 failed (ValueError: planted): --resume tries it again"
    assert f"failed: widths, many, asked, seed 0: RunError: {told}" in out
    monkeypatch.delenv("TINY_PAPER")
    good(*WORDS, "--out", "run", "--resume")
    assert found("run") == found(whole)


@pytest.mark.parametrize("damage", ["missing", "cut", "swapped"])
def test_weights_that_are_damaged_are_told_and_trained_again(damage, whole, monkeypatch):
    shutil.copytree(whole, "run")
    weights, other = (Path(f"run/weights/models/{name}.0.safetensors") for name in ("few", "many"))
    if damage == "missing":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    else:
        weights.write_bytes(other.read_bytes())
    before = cells("run")
    good(*WORDS, "--out", "run", "--resume")
    changed = [path.name for path, time in cells("run").items() if time != before[path]]
    assert changed == ["few.0.safetensors"]
    again, first = (load_file(path) for path in (weights, whole / "weights/models/few.0.safetensors"))
    assert all(torch.equal(again[name], first[name]) for name in {**again, **first})
    assert found("run") == found(whole)


def test_weights_that_are_damaged_during_a_run_are_told(whole, monkeypatch):
    shutil.copytree(whole, "run")
    Path("run/cells/widths/few-asked.0.safetensors").unlink()
    monkeypatch.setattr("calibrant.reproductions.shelf.read_kept", lambda *_: None)
    code, out, _ = call(*WORDS, "--out", "run", "--resume")
    assert code == 1
    assert "the weights of the training models, few, seed 0 are missing or damaged: --resume trains again" in out


def test_another_training_is_another_configuration_of_what_uses_it(whole, monkeypatch):
    shutil.copytree(whole, "run")
    card = experiment(tiny_trainings.PAPER, "models")
    changed = replace(card, settings={**card.settings, "epochs": 1})
    monkeypatch.setitem(cal.reproductions.registering._EXPERIMENTS[tiny_trainings.PAPER]._cards, "models", changed)
    told = refused(*WORDS, "--out", "run", "--resume")
    assert "4 of the finished cells in run were made with other settings" in told
    command = re.search(r"calibrant (reproduce .*--overwrite) computes", told)
    assert command is not None
    good(*shlex.split(command[1]))
    assert [row["steps"]["0"] for row in cal.reproductions.load_results("run").table("models")] == [4, 4]


def test_a_run_that_is_replaced_leaves_no_weights_behind(whole):
    shutil.copytree(whole, "run")
    cal.reproductions.run(tiny_trainings.PAPER, domain="letters", quick=True, out="run", overwrite=True)
    assert sorted(path.name for path in Path("run").iterdir()) == [
        "cells",
        "config.json",
        "report.html",
        "results.json",
    ]
    other = Path("other")
    shutil.copytree(whole, other)
    shutil.rmtree(other / "weights")
    (other / "weights").symlink_to(whole / "weights")
    with pytest.raises(RunError, match="weights is a link"):
        cal.reproductions.run(tiny_trainings.PAPER, quick=True, out="other", overwrite=True)
    assert len(list((whole / "weights").rglob("*.safetensors"))) == 2


def test_a_page_of_a_paper_shows_its_claims(whole, tmp_path, monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root / "docs"))
    made = runpy.run_path(str(root / "docs/make_papers.py"))
    page = tmp_path / "tiny-trainings.md"
    page.write_text("# Tiny\n<!-- claims: quick -->\n<!-- end -->\n<!-- table: widths quick -->\nstale\n<!-- end -->\n")
    assert made["text"](page, tmp_path).count("There are no results yet") == 2
    shutil.copy(whole / "results.json", tmp_path / "reproduce-tiny-trainings-quick.json")
    text = made["text"](page, tmp_path)
    assert "| domain | statement | the exact posterior says | the guide says |" in text
    assert "| cannot tell: the reference was refused for 14% of the images | does not hold: 0." in text
    assert "| few, asked | -" in text
    assert "stale" not in text
    page.write_text(text)
    assert made["text"](page, tmp_path) == text


def test_the_report_starts_with_the_claims_and_leads_from_each_to_its_experiment(whole):
    page = (whole / "report.html").read_text()
    assert page.index('id="claims"') < page.index('<section id="models"')
    assert page.count('<a href="#widths">widths</a>') == 4  # three claims, and the list of experiments
    for text in (
        "what the exact posterior says",
        "refused for 14% of the images",
        "within ±50 prior sd",
        ">holds</span>",
    ):
        assert text in page
    told = good(
        "reproduce", tiny_trainings.PAPER, "--only", "widths", "--quick", "--out", whole, "--resume", "--quiet"
    )[0]
    assert told.index("Claims of the paper") < told.index("models (Section 2)")


@pytest.mark.filterwarnings("ignore:the noise scale")
def test_a_guide_that_computes_from_its_model_is_kept_with_it(tmp_path):
    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        model = cal.models.create("gsm", shape=(1, 4, 4), latents=3)
        return model, cal.guides.amortize(model, images, structure="collapsed", seed=0)

    images = {"x": torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(1))}
    trained, again = made(), made()
    cal.inference.fit(*trained, images, epochs=1, batch_size=32, seed=0)
    path, digest = tmp_path / "weights.safetensors", "0" * 64
    weights = read_kept(path, digest, write_kept(path, digest, *trained))
    assert weights is not None
    set_kept(*again, weights, "cpu")
    draws = [cal.inference.posterior(*pair, images, draws=5, seed=2).posterior for pair in (trained, again)]
    assert draws[0].equals(draws[1])
    assert read_kept(path, "1" * 64, digest) is None


# -- what a cell asks for ----------------------------------------------------------------------------------------------


def _widths(monkeypatch: pytest.MonkeyPatch, whole: Path, cell: Any, **changes: Any) -> str:
    """What is told of a run whose cells of `widths` are other ones."""
    shutil.copytree(whole, "run")
    shutil.rmtree("run/cells/widths")
    card = replace(experiment(tiny_trainings.PAPER, "widths"), cell=cell, **changes)
    monkeypatch.setitem(cal.reproductions.registering._EXPERIMENTS[tiny_trainings.PAPER]._cards, "widths", card)
    code, out, _ = call("reproduce", tiny_trainings.PAPER, "--quick", "--quiet", "--out", "run", "--resume")
    assert code == 1
    return out


def test_unknown_rows_and_names_are_refused(whole, monkeypatch):
    def cell(context: Any, row: str, seed: int) -> dict[str, Any]:
        names = {"few, asked": ("fwe", ""), "many, asked": ("many", "second")}
        context.trained_by(names[row][0], tiny_trainings.build, names[row][1])
        return {}

    out = _widths(monkeypatch, whole, cell)
    assert "models has no row 'fwe' in this run; did you mean few?" in out
    assert "models, many, seed 0 has not kept a model with the name 'second': call context.keep in the cells of" in out


def test_other_models_are_refused(whole, monkeypatch):
    def cell(context: Any, row: str, seed: int) -> dict[str, Any]:
        context.trained_by("few", lambda earlier: tiny_trainings.build(replace(earlier, row="many")))
        return {}

    assert "the kept model does not fit VAE: decoder" in _widths(monkeypatch, whole, cell)


def test_models_are_taken_from_an_experiment_that_is_named(whole, monkeypatch):
    def cell(context: Any, row: str, seed: int) -> dict[str, Any]:
        context.trained_by("few", tiny_trainings.build)
        return {}

    out = _widths(monkeypatch, whole, cell, uses="")
    assert "experiment 'widths' names no experiment that trains: give uses= on its card" in out


def test_an_experiment_without_data_has_none(whole, monkeypatch):
    def cell(context: Any, row: str, seed: int) -> dict[str, Any]:
        return {"ELBO": len(context.splits)}

    out = _widths(monkeypatch, whole, cell, uses="", needs=())
    assert "experiment 'widths' has no data: name a data set in needs= on its card" in out
    assert "    data: none; quick: 1 s" in good("reproduce")[0]


CARD: dict[str, Any] = {
    "answers": "Table 1", "shows": "Nothing.", "rows": {"a": {}}, "numbers": {"n": "nats"}, "needs": (Needs("digits"),),
    "minutes": (1, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"uses": "modles"}, "uses 'modles', which is not registered yet"),
     ({"uses": "wrong"}, "uses 'wrong', which is not registered yet"),
     ({"uses": "models", "seeds": (1, 5)}, "has more seeds than 'models'")],
    ids=["unknown", "itself", "more seeds"],
)  # fmt: skip
def test_an_experiment_uses_one_that_is_there(changes, message):
    with pytest.raises(RunError, match=message):
        cal.reproductions.register_experiment(tiny_trainings.PAPER, "wrong", **{**CARD, **changes})(
            tiny_trainings.elsewhere
        )


# -- domains -----------------------------------------------------------------------------------------------------------


def test_domains_are_listed_and_run_by_name():
    out, _ = good("reproduce")
    assert "  elsewhere (letters, Figure 2): Another domain." in out
    assert "ea-vae: Uncertainty in latent representations" in out
    words = ["reproduce", tiny_trainings.PAPER, "--domain", "letters", "--quick", "--quiet", "--out", "run"]
    good(*words)
    assert cal.reproductions.load_results("run").experiments == ["elsewhere"]
    good(*words[:2], "--quick", "--quiet", "--out", "run", "--resume")  # the domain of the run that is resumed
    assert cal.reproductions.load_results("run").experiments == ["elsewhere"]


def test_unknown_domains_are_refused():
    start = ["reproduce", tiny_trainings.PAPER]
    assert "unknown domain 'leters' of tiny-trainings; did you mean letters?" in refused(*start, "--domain", "leters")
    assert "there are digits, letters." in refused(*start, "--domain", "xyz")
    assert "sigma-vae has no domains: leave --domain out" in refused("reproduce", "sigma-vae", "--domain", "natural")
    both = refused(*start, "--only", "widths", "--domain", "letters")
    assert "'widths' belongs to the domain digits: leave --domain out, or name an experiment of letters" in both
    assert "name the paper" in refused("reproduce", "--domain", "letters")
    assert not Path("runs").exists()


def test_a_resumed_run_has_what_was_asked_for_before_and_now():
    plan = Plan(tiny_trainings.PAPER, (), ("letters",), True, None, "cpu", Path("run"))

    def names(**now: Any) -> list[str]:
        open_folder(plan, False)
        resumed = completed(replace(plan, **{"domains": (), **now}), True, False)
        assert shlex.split(resumed.resuming())[-1] == "--resume"
        return [card.name for card in resumed.experiments]

    assert names() == ["elsewhere"]
    assert names(domains=("letters",)) == ["elsewhere"]
    assert names(domains=("digits",)) == ["models", "widths", "elsewhere"]
    assert names(only=("models",)) == ["models", "elsewhere"]
    plan = replace(plan, domains=())
    assert names(only=("models",)) == ["models", "widths", "elsewhere"]


def test_a_domain_without_data_says_what_to_download(monkeypatch):
    card = replace(experiment(tiny_trainings.PAPER, "models"), needs=(Needs("van-hateren"),))
    cards = cal.reproductions.registering._EXPERIMENTS[tiny_trainings.PAPER]._cards
    monkeypatch.setitem(cards, "models", card)
    results = cal.reproductions.run(tiny_trainings.PAPER, quick=True, out="run")
    assert results.experiments == ["elsewhere"]
    for name in ("models", "widths"):
        assert "van-hateren is not there" in results.content["experiments"][name]["left_out"]
    told = refused("reproduce", tiny_trainings.PAPER, "--domain", "digits", "--quick", "--out", "other")
    assert "no experiment can run: the data set van-hateren is not there: put its files below the data root" in told
    assert not Path("other").exists()
