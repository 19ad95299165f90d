"""The commands: they say what they know, leave what they promise, and find which key is which site."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from commands import RESULTS, SMALL, TRAINED, call, fit_rows, good, refused, same, weights

import calibrant as cal
from calibrant import store, workflow
from calibrant.errors import RunError
from calibrant.guides.encoders.choosing import KINDS as known_encoders
from calibrant.guides.structure import STRUCTURES as known_structures
from calibrant.inference.fitting.objectives import OBJECTIVES as known_objectives
from calibrant.settings import ENCODERS, FAMILIES, OBJECTIVES, QUICK, STRUCTURES, Request, Settings
from calibrant.workflow import preparing, running

pytestmark = pytest.mark.usefixtures("elsewhere")


# -- help --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["check", "--help"]])
def test_help_imports_nothing_heavy(words):
    code = f"""
import sys
from calibrant.cli import app
try:
    app({words!r})
finally:
    heavy = {{"torch", "pyro", "numpy", "xarray", "matplotlib", "sklearn", "calibrant.workflow"}} & set(sys.modules)
    assert not heavy, heavy
"""
    env = {**os.environ, "PYTHONPATH": str(Path(cal.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


def test_help_names_every_default():
    text = re.sub(r"[\s│]+", " ", good("run", "--help")[0])
    assert f"at least 1,000 steps ({Settings().epochs}; quick: {QUICK['epochs']})" in text
    assert "(natural-patches)" in text
    assert set(QUICK) <= set(Settings.__dataclass_fields__)


def test_help_names_every_structure_family_objective_and_encoder():
    text = re.sub(r"[\s│]+", " ", good("run", "--help")[0])
    for names, known in (
        (STRUCTURES, known_structures),
        (FAMILIES, cal.guides.FAMILIES),
        (OBJECTIVES, known_objectives),
        (ENCODERS, set(known_encoders) - {"classes"}),  # the classes of an input have to be counted
    ):
        assert sorted(names) == sorted(known)
        assert ", ".join(names) in text


def test_list_names_models_and_data():
    out, _ = good("list")
    for name in (*cal.models.list_models(), *(entry.name for entry in cal.data.list_data())):
        assert re.search(rf"^  {name} ", out, re.M)


# -- what the commands leave -------------------------------------------------------------------------------------------


def test_run_of_one_model_fills_its_folder_and_reports(short_check):
    out, err = good("run", "ea-vae", "--data", "image.npz", "--set", "latents=2", *SMALL)
    folder = Path("runs/ea-vae-image-1")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {*TRAINED, "checkpoints", "report.html", *store.DATASETS.values(), *store.TREES.values()}
        - {store.REMEDIES, store.PROBABILITIES}
    )
    assert "calibrant run ea-vae --data image.npz" in (folder / "report.html").read_text()
    result = store.load_result(folder)
    assert result.config["settings"]["epochs"] == 2
    assert result.config["model"]["arguments"] == {"latents": 2, "shape": [1, 2, 3]}
    assert result.config["data"]["splits"] == {"train": 160, "validation": 20, "test": 20}
    labels = result.config["checked"]["labels"]
    assert result.amortized["posterior"]["data"].values.tolist() == labels
    assert set(labels) <= set(cal.data.load("image.npz")["test"].labels().tolist())
    assert len(result.history) == 2
    gap = workflow.summarise(result).gap
    elbo = result.amortized["sample_stats"]["log_p"] - result.amortized["sample_stats"]["log_q"]
    evidence = cal.inference.log_evidence(result.model, {"x": result.reference["observed_data"]["x"].values})
    assert gap == pytest.approx(float(evidence.mean()) - float(elbo.mean()), rel=1e-6)
    np.testing.assert_allclose(result.gap["log_evidence"], evidence, atol=1e-6)
    assert result.gap["data"].values.tolist() == labels
    assert float(re.search(r"ea-vae .* (\d+\.\d+) ±", out).group(1)) == pytest.approx(gap, abs=0.0051)
    assert f"report: {folder}/report.html" in out
    assert "`scale`" in out
    for stage in ("fit: 2/2", "posterior: 4/4", "reference: 4/4", "compare: 4/4", "contrast: 5/5", "report ..."):
        assert stage in err


@pytest.mark.slow
def test_the_real_report_of_a_quick_run():
    good("run", "--quick", "--epochs", "1", "--out", "run")
    page = Path("run/report.html").read_text()
    assert "<html" in page
    assert "calibrant run --quick --epochs 1 --out run" in page
    good("report", "run")
    good("check", "run", "--draws", "100", "--held-out", "4")


def test_runs_of_several_models_share_a_report(short_check, made_runs):
    folder = shutil.copytree(made_runs / "whole", "whole")
    said = (made_runs / "whole.err").read_text().splitlines()  # --quiet
    assert all(line.startswith("warning: the noise scale of 'likelihood' is") for line in said), "two epochs are few"
    assert sorted(path.name for path in Path("whole").iterdir()) == ["config.json", "ppca", "report.html", "vae"]
    assert (Path("whole") / "report.html").read_text().endswith("['ppca', 'vae']")
    out = (made_runs / "whole.out").read_text()
    for name in ("ppca", "vae"):
        assert set(RESULTS) <= {path.name for path in (Path("whole") / name).iterdir()}
        assert cal.load(Path("whole") / name)[0].recipe.name == name
        assert re.search(rf"│ {name} ", out)
    (Path("whole") / "report.html").unlink()
    good("report", folder, "--quiet")
    assert Path("whole/report.html").read_text() == f"calibrant report {folder} --quiet: ['ppca', 'vae']"


def test_the_folder_is_named_after_models_and_data(monkeypatch):
    monkeypatch.setattr(running, "_train", lambda *_: 1 / 0)
    for number in (1, 2):
        with pytest.raises(ZeroDivisionError):
            call("run", "ppca", "vae", "--data", "rows.npz", "--set", "latents=2")
        assert Path(f"runs/ppca-vae-rows-{number}/config.json").is_file()


def test_the_demonstration_needs_no_argument(monkeypatch):
    Path("runs/vae-ea-vae-natural-patches-1").mkdir(parents=True)

    def stop(*args):
        raise RunError(f"stopped with {args[0]}")

    monkeypatch.setattr(
        preparing, "load_splits", lambda request, seed: stop((request.models, request.data, request.out))
    )
    names = ("vae", "ea-vae", "ea-vae+collapsed")
    assert f"({names}, 'natural-patches', PosixPath('runs/vae-ea-vae-natural-patches-2'))" in refused("run")


def test_fit_then_check_gives_what_run_gives(short_check, made_runs):
    """Trained alone, and as one of two models."""
    shutil.copytree(made_runs / "fitted", "fitted")
    assert not (Path("fitted") / store.AMORTIZED).exists()
    assert "calibrant check fitted" in refused("report", "fitted")
    out, _ = good("check", "fitted", "--draws", "100", "--held-out", "4", "--seed", "0", "--simulations", "100")
    assert "no contrast experiment" in out  # for data that are no images
    assert same(weights("fitted"), weights(made_runs / "whole" / "ppca"))
    for file in (store.AMORTIZED, store.REFERENCE):
        ours, theirs = (store.load_tree(folder / file) for folder in (Path("fitted"), made_runs / "whole" / "ppca"))
        assert ours["posterior"].dataset.identical(theirs["posterior"].dataset)
    code, out, _ = call("report", "fitted")
    assert code == 0
    assert Path("fitted/report.html").is_file()


@pytest.mark.parametrize(
    "model", [pytest.param("gsm", marks=pytest.mark.slow), "ppca"]
)  # with a scale to learn, or not
def test_collapsed_guides_are_stored_loaded_checked_and_reported(short_check, monkeypatch, model):
    words = f"run {model} --data rows.npz --set latents=2 --structure collapsed --objective dreg --out run"
    good(*words.split(), *SMALL)
    assert store.read_config("run")["guide"]["structure"] == "collapsed"
    assert cal.load("run")[1].model.recipe.name == model
    assert {"epoch", "train", "validation", "lr", "bound", "noise"} == set(store.load_history("run")[0])
    first = store.load_result("run")
    good("check", "run", "--draws", "100", "--held-out", "4", "--simulations", "100")
    again, before = (result.amortized["sample_stats"].dataset for result in (store.load_result("run"), first))
    xr.testing.assert_allclose(again, before, rtol=1e-9, atol=1e-9)  # the conditional is read anew, up to rounding
    good("report", "run")
    monkeypatch.setattr(running, "examine", lambda *_, **__: 1 / 0)  # as far as the check, which is made above
    with pytest.raises(ZeroDivisionError):
        call(*words.split(), *SMALL, "--resume")


def test_check_takes_other_data_and_forgets_old_results(short_check, made_runs):
    folder = shutil.copytree(made_runs / "whole" / "ppca", "run")
    before = store.load_tree("run/reference.nc")["posterior"]["data"].values
    (Path(folder) / store.CONTRAST).write_text("of other draws")
    np.savez("more.npz", x=np.random.default_rng(5).normal(size=(60, 6)).astype("f4"))
    good("check", "run", "--data", "more.npz", "--draws", "100", "--held-out", "5", "--simulations", "100")
    result = store.load_result("run")
    assert result.config["checked"]["data"] == "more.npz"
    assert result.contrast is None
    assert not np.array_equal(before, result.reference["posterior"]["data"].values)
    assert "6 per datum, wanted" not in refused("check", "run", "--data", "image.npz")


def test_the_result_follows_the_seed_alone():
    for number, (folder, seed) in enumerate((("a", 1), ("b", 1), ("c", 2))):
        torch.manual_seed(number)
        fit_rows(folder, "--seed", seed, "--epochs", "1")
    assert same(weights("a"), weights("b"))
    assert not same(weights("a"), weights("c"))


# -- which key is which site -------------------------------------------------------------------------------------------


def mapping(folder):
    return store.read_config(folder)["data"]["sites"]


def test_x_goes_to_the_one_observed_site_and_labels_are_left_out():
    out, _ = good("fit", "user.py:Mine", "--data", "user.py:rows", "--epochs", "1", "--out", "run")
    assert "note: the model's observed site is picture: it gets the data's x" in out
    assert mapping("run") == {"picture": "x"}  # the latent y is not the data's y


def test_a_covariate_gets_its_key():
    good("fit", "user.py:Labelled", "--data", "user.py:rows", "--epochs", "1", "--out", "run")
    assert mapping("run") == {"x": "x", "y": "y"}


def test_labels_do_not_become_a_latent_of_that_name():
    good("fit", "gsm", "--data", "digits", "--set", "latents=2", "--epochs", "1", "--out", "run", "--quick")
    assert mapping("run") == {"x": "x"}


def test_keys_are_mapped_by_hand():
    message = refused("fit", "vae", "--data", "two.npz")
    assert "shape" in message
    assert "--site NAME=KEY" in message
    message = refused("fit", "vae", "--data", "two.npz", "--set", "shape=[6]")
    assert "it samples z, x; the data have picture, other" in message
    good(
        "fit", "vae", "--data", "two.npz", "--site", "x=picture", "--set", "latents=2", "--epochs", "1", "--out", "run"
    )
    assert mapping("run") == {"x": "picture"}
    assert "the model has no w" in refused("fit", "vae", "--data", "two.npz", "--site", "w=picture")
    assert "have no 'nothing'" in refused("fit", "vae", "--data", "two.npz", "--site", "x=nothing")
    assert "covariates y" in refused("fit", "user.py:Labelled", "--data", "rows.npz")


def test_the_version_is_told():
    assert call("--version") == (0, f"calibrant {cal.__version__}\n", "")


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_held_out_data_are_random_and_nested():
    data = cal.data.Data({"x": np.zeros((100, 2), "f4")})
    many, few = preparing.held_out(data, 50, 3).labels(), preparing.held_out(data, 20, 3).labels()
    assert many[:20].tolist() == few.tolist()
    assert len(preparing.held_out(data, 1000, 0)) == 100
    assert len(set(many.tolist()) & set(range(50))) < 40


def test_all_held_out_data_get_a_reference_by_nuts(short_check, monkeypatch):
    seen = {}

    def watched(model, data, plan, **options):
        seen.update(data=len(data), warmup=plan.warmup)
        raise RunError("far enough")

    monkeypatch.setattr(running, "reference_of", watched)
    words = "run vae --data rows.npz --set prior=laplace --set latents=2 --quick --epochs 1 --quiet"
    refused(*words.split(), "--held-out", "7")
    assert seen["data"] == 7
    assert seen["warmup"] == Settings().warmup


def test_a_request_knows_what_was_asked_for():
    assert Request().asked() == {}
    assert Request(quick=True, settings={"epochs": 9}).asked() == {**QUICK, "epochs": 9}


def test_later_checks_of_a_quick_run_have_the_full_budget():
    quick = asdict(Settings(**{**QUICK, "epochs": 9, "structure": "full"}))
    kept = preparing._made_with({"settings": quick})
    assert (kept["epochs"], kept["train_data"], kept["structure"]) == (9, 8000, "full")
    assert not {"draws", "simulations", "held_out", "remedy_steps"} & set(kept)
    asked = asdict(Settings(draws=500))
    assert preparing._made_with({"settings": asked}) == asked
