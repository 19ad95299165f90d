"""The commands: they leave what they promise, refuse in one line, and lose nothing on Ctrl-C."""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrant.inference.objectives import OBJECTIVES as known_objectives
from typer.testing import CliRunner

import calibrant as cal
from calibrant import cli, store, workflow
from calibrant.errors import RunError
from calibrant.guides.structure import STRUCTURES as known_structures
from calibrant.settings import FAMILIES, OBJECTIVES, QUICK, STRUCTURES, Request, Settings

training = sys.modules["calibrant.inference.fit"]

SMALL = ["--quick", "--epochs", "2", "--draws", "100", "--batch-size", "40", "--held-out", "4"]
TRAINED = ("config.json", "guide.safetensors", "history.csv", "model.safetensors")
RESULTS = ("amortized.nc", "comparison.nc", *TRAINED)
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


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with small data and a user's file in it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(200, 3)) @ rng.normal(size=(3, 6)) + 0.5 * rng.normal(size=(200, 6))).astype("f4")
    np.savez("rows.npz", x=x)
    np.savez("two.npz", picture=x, other=x)
    np.savez("image.npz", x=x.reshape(200, 1, 2, 3))
    Path("user.py").write_text(USER)


@pytest.fixture
def short_report(monkeypatch):
    """Drawing is not what most tests here are about."""

    def write(results, path, command=""):
        Path(path).write_text(f"{command}: {[result.name for result in results]}")
        return Path(path)

    monkeypatch.setattr(cal.evaluation, "report", write)


def call(*words):
    """Run a command; its exit code, standard output and standard error."""
    done = CliRunner().invoke(cli.app, [str(word) for word in words], terminal_width=200)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout, done.stderr


def good(*words):
    code, out, err = call(*words)
    assert code == 0, err
    return out, err


def refused(*words):
    """A refusal is one line on standard error and exit code 2."""
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("calibrant: ")
    assert err.count("\n") == 1
    return err


def interrupt_at(monkeypatch, step):
    original, count = training._step, iter(range(10_000))

    def stepped(*args):
        if next(count) == step:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(training, "_step", stepped)


def fit_rows(out, *more):
    return good("fit", "ppca", "--data", "rows.npz", "--set", "latents=2", "--epochs", "2", "--out", out, *more)


def weights(folder):
    return {**(pair := cal.load(folder))[0].state_dict(), **{f"g.{n}": v for n, v in pair[1].state_dict().items()}}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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
    assert f"Passes over the training data ({Settings().epochs}; quick: {QUICK['epochs']})" in text
    assert "(natural-patches)" in text
    assert set(QUICK) <= set(Settings.__dataclass_fields__)


def test_help_names_every_structure_family_and_objective():
    text = re.sub(r"[\s│]+", " ", good("run", "--help")[0])
    for names, known in (
        (STRUCTURES, known_structures),
        (FAMILIES, cal.guides.FAMILIES),
        (OBJECTIVES, known_objectives),
    ):
        assert sorted(names) == sorted(known)
        assert ", ".join(names) in text


def test_list_names_models_and_data():
    out, _ = good("list")
    for name in (*cal.models.list_models(), *(entry.name for entry in cal.data.list_data())):
        assert re.search(rf"^  {name} ", out, re.M)


# -- what the commands leave -------------------------------------------------------------------------------------------


def test_run_of_one_model_fills_its_folder_and_reports(short_report):
    out, err = good("run", "ea-vae", "--data", "image.npz", "--set", "latents=2", *SMALL)
    folder = Path("runs/ea-vae-image-1")
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        {*TRAINED, "checkpoints", "report.html", *store.DATASETS.values(), *store.TREES.values()} - {store.REMEDIES}
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
    assert re.search(rf"ea-vae .* {gap:.3f} ±", out)
    assert f"report: {folder}/report.html" in out
    assert "`scale`" in out
    for stage in ("fit: 2/2", "posterior: 4/4", "reference: 4/4", "compare: 2/2", "contrast: 5/5", "report: 1/1"):
        assert stage in err


@pytest.mark.slow
def test_the_real_report_of_a_quick_run():
    good("run", "--quick", "--epochs", "1", "--out", "run")
    page = Path("run/report.html").read_text()
    assert "<html" in page
    assert "calibrant run --quick --epochs 1 --out run" in page
    good("report", "run")
    good("check", "run", "--draws", "100", "--held-out", "4")


def test_runs_of_several_models_share_a_report(short_report):
    out, err = good("run", "ppca", "vae", "--data", "rows.npz", "--set", "latents=2", "--quiet", *SMALL)
    assert err == ""
    folder = Path("runs/ppca-vae-rows-1")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "ppca", "report.html", "vae"]
    assert (folder / "report.html").read_text().endswith("['ppca', 'vae']")
    for name in ("ppca", "vae"):
        assert set(RESULTS) <= {path.name for path in (folder / name).iterdir()}
        assert cal.load(folder / name)[0].recipe.name == name
        assert re.search(rf"│ {name} ", out)
    (folder / "report.html").unlink()
    good("report", folder, "--quiet")
    assert (folder / "report.html").read_text() == f"calibrant report {folder} --quiet: ['ppca', 'vae']"


def test_the_demonstration_needs_no_argument(monkeypatch):
    Path("runs/vae-ea-vae-natural-patches-1").mkdir(parents=True)

    def stop(*args):
        raise RunError(f"stopped with {args[0]}")

    monkeypatch.setattr(workflow, "_load_data", lambda request, seed: stop((request.models, request.data, request.out)))
    assert "(('vae', 'ea-vae'), 'natural-patches', PosixPath('runs/vae-ea-vae-natural-patches-2'))" in refused("run")


def test_fit_then_check_gives_what_run_gives(short_report):
    fit_rows("fitted")
    assert not (Path("fitted") / store.AMORTIZED).exists()
    assert "calibrant check fitted" in refused("report", "fitted")
    out, _ = good("check", "fitted", "--draws", "120", "--held-out", "10", "--seed", "0")
    assert "no contrast experiment" in out  # for data that are no images
    words = "run ppca --data rows.npz --set latents=2 --epochs 2 --draws 120 --held-out 10 --out whole"
    good(*words.split())
    assert same(weights("fitted"), weights("whole"))
    for file in (store.AMORTIZED, store.REFERENCE):
        ours, theirs = (store.load_tree(Path(folder) / file) for folder in ("fitted", "whole"))
        assert ours["posterior"].dataset.identical(theirs["posterior"].dataset)
    code, out, _ = call("report", "fitted")
    assert code == 0
    assert Path("fitted/report.html").is_file()


@pytest.mark.parametrize(
    "model", [pytest.param("gsm", marks=pytest.mark.slow), "ppca"]
)  # with a scale to learn, or not
def test_collapsed_guides_are_stored_loaded_checked_and_reported(short_report, model):
    words = f"run {model} --data rows.npz --set latents=2 --structure collapsed --objective dreg --out run"
    good(*words.split(), *SMALL)
    assert store.read_config("run")["guide"]["structure"] == "collapsed"
    assert cal.load("run")[1].model.recipe.name == model
    assert {"epoch", "train", "validation", "lr", "bound"} == set(store.load_history("run")[0])
    first = store.load_result("run")
    good("check", "run", "--draws", "100", "--held-out", "4")
    assert store.load_result("run").amortized["sample_stats"].equals(first.amortized["sample_stats"])
    good("report", "run")
    good(*words.split(), *SMALL, "--resume")


def test_check_takes_other_data_and_forgets_old_results(short_report):
    fit_rows("run")
    good("check", "run", "--draws", "100", "--held-out", "5")
    before = store.load_tree("run/reference.nc")["posterior"]["data"].values
    np.savez("more.npz", x=np.random.default_rng(5).normal(size=(60, 6)).astype("f4"))
    good("check", "run", "--data", "more.npz", "--draws", "100", "--held-out", "5")
    result = store.load_result("run")
    assert result.config["checked"]["data"] == "more.npz"
    assert not np.array_equal(before, result.reference["posterior"]["data"].values)
    assert "6 a datum, wanted" not in refused("check", "run", "--data", "image.npz")


def test_the_result_follows_the_seed_alone(short_report):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(len(folder) + seed)
        fit_rows(folder, "--seed", seed)
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


# -- refusals ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown model": ("fit vea", "did you mean"),
    "unknown data": ("fit vae --data natural-patch", "did you mean natural-patches"),
    "no such file": ("fit vae --data nothing.npz", "there is no file nothing.npz"),
    "unreadable file": ("fit vae --data user.npz", "cannot be read"),
    "no such user file": ("fit absent.py:Mine", "there is no file absent.py"),
    "no such class": ("fit user.py:Other", "user.py has no 'Other'; it defines"),
    "no model": ("fit user.py:Broken --data rows.npz", "no PyroModule class"),
    "file with an error": ("fit faulty.py:Mine", "faulty.py does not import: ZeroDivisionError"),
    "no such argument": ("fit vae --data rows.npz --set latent=3", "no argument latent; it has shape, latents, prior"),
    "bad argument": ("fit vae --data rows.npz --set prior=cauchy", "unknown latent prior 'cauchy'"),
    "bad type": ("fit vae --data rows.npz --set latents=many", "vae could not be built"),
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
    "learning rate": ("fit vae --data rows.npz --lr 0", "a learning rate is positive"),
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
    monkeypatch.setattr(workflow, "_train", lambda *args: [][0])
    with pytest.raises(IndexError):
        call("fit", "ppca", "--data", "rows.npz")


def test_options_reach_the_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(workflow, "fit_run", lambda request, progress: seen.append(request) or 1 / 0)
    words = """fit vae --set latents=3 --set prior=laplace --set 'likelihood={"name": "gaussian"}' --site x=k
        --family z=laplace --family s=gamma --structure full --objective dreg --quick --epochs 7"""
    with pytest.raises(ZeroDivisionError):
        call(*shlex.split(words))
    assert seen[0].arguments == {"latents": 3, "prior": "laplace", "likelihood": {"name": "gaussian"}}
    assert seen[0].site == {"x": "k"}
    assert seen[0].asked() == {
        **QUICK,
        "epochs": 7,
        "family": {"z": "laplace", "s": "gamma"},
        "structure": "full",
        "objective": "dreg",
    }


# -- folders that exist ------------------------------------------------------------------------------------------------


def test_a_run_is_replaced_only_when_asked_and_other_files_stay(monkeypatch):
    fit_rows("run", "--seed", "1")
    first = weights("run")
    Path("run/notes.txt").write_text("mine")
    assert "--resume goes on with it, --overwrite replaces it" in refused(
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


def test_code_is_not_imported_because_a_folder_names_it(short_report):
    good("fit", "user.py:Mine", "--data", "user.py:rows", "--epochs", "1", "--out", "run")
    Path("user.py").write_text("raise SystemExit('imported')" + USER)
    assert "--model FILE.py:Class" in refused("check", "run", "--data", "rows.npz", "--held-out", "2")
    assert "give --data" in refused("check", "run", "--held-out", "2")
    assert "give MODEL" in refused("run", "--out", "run", "--resume")
    Path("user.py").write_text(USER + "\n# changed\n")
    words = ["--model", "user.py:Mine", "--data", "user.py:rows", "--draws", "100", "--held-out", "4"]
    code, _, err = call("check", "run", *words)
    assert code == 0
    assert "another sha256" in err
    assert store.load_tree(Path("run/reference.nc"))["posterior"].attrs["method"] == "exact"


# -- Ctrl-C and resuming -----------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_weights_and_resume_gives_the_uninterrupted_result(short_report, monkeypatch):
    words = ["run", "ppca", "vae", "--data", "rows.npz", "--set", "latents=2", *SMALL]
    good(*words, "--out", "whole")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 4 * 2 + 5)  # 4 steps are an epoch: in the second epoch of the second model
        code, out, err = call(*words, "--out", "part")
    assert (code, out) == (130, "")
    told = err.splitlines()[-1]
    assert "ppca the best weights of 2 epochs, amortized.nc, reference.nc, comparison.nc" in told
    assert "vae the best weights of 1 epochs" in told
    assert cal.load("part/vae")
    assert store.read_config("part/vae")["fit"]["stopped"] == "interrupted"
    good("report", "part", "--quiet")
    assert Path("part/report.html").read_text().endswith("['ppca']")
    command = shlex.split(told.partition("Go on with: ")[2])
    assert command == ["calibrant", "run", "--out", "part", "--resume"]
    good(*command[1:])
    for name in ("ppca", "vae"):
        assert same(weights(f"whole/{name}"), weights(f"part/{name}"))
        ours, theirs = (store.load_tree(f"{run}/{name}/amortized.nc")["posterior"].dataset for run in ("whole", "part"))
        assert ours.identical(theirs)
        assert store.load_history(f"whole/{name}") == store.load_history(f"part/{name}")
    assert Path("part/report.html").read_text().endswith("['ppca', 'vae']")


def test_resume_refuses_other_settings_and_takes_the_rest_from_the_folder(monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 5)
        words = "fit ppca --data rows.npz --set latents=2 --epochs 3 --batch-size 40 --out run"
        code, _, err = call(*words.split())
    assert code == 130
    assert "Go on with: calibrant fit ppca --out run --resume" in err
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
    assert "training data was 160, is 144" in refused("fit", "ppca", "--out", "run", "--resume")
    np.savez("rows.npz", x=rows)
    good("fit", "ppca", "--out", "run", "--resume", "--epochs", "3")
    assert store.read_config("run")["fit"]["epochs"] == 3


def test_ctrl_c_while_sampling_keeps_the_training(short_report, monkeypatch):
    words = ["run", "ppca", "--data", "rows.npz", *SMALL, "--out", "run"]
    with monkeypatch.context() as patched:

        def stop(*args, **options):
            raise KeyboardInterrupt

        patched.setattr(workflow, "reference", stop)
        code, _, err = call(*words)
        assert code == 130
        assert "ppca the best weights of 2 epochs. Go on with: calibrant run --out run --resume" in err
        code, _, err = call("check", "run")
        assert code == 130
    before = weights("run")
    interrupt_at(monkeypatch, 0)  # it must not train again
    good("run", "--out", "run", "--resume")
    assert same(before, weights("run"))
    assert Path("run/report.html").is_file()
    monkeypatch.setattr(workflow, "reference", None)  # nor sample the references again
    good("run", "--out", "run", "--resume")


def test_ctrl_c_before_anything_was_saved(monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "_load_data", stop)
    assert call("fit", "ppca")[::2] == (130, "interrupted\n")


def test_references_that_were_cut_short_are_kept(short_report, monkeypatch):
    original = workflow.reference
    monkeypatch.setattr(workflow, "reference", lambda model, data, **options: original(model, data[:3], **options))
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
    while len(seen) < 6 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
        checkpoint = Path("run/checkpoints/training.safetensors")
        seen |= {checkpoint.stat().st_mtime_ns} if checkpoint.is_file() else set()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "Go on with: calibrant fit ppca --out run --resume" in err
    config = json.loads(Path("run/config.json").read_text())
    assert config["fit"]["stopped"] == "interrupted"
    assert len(store.load_history("run")) == config["fit"]["epochs"]
    cal.load("run")


# -- the pieces --------------------------------------------------------------------------------------------------------


def test_held_out_data_are_random_and_nested():
    data = cal.data.Data({"x": np.zeros((100, 2), "f4")})
    many, few = workflow._held_out(data, 50, 3).labels(), workflow._held_out(data, 20, 3).labels()
    assert many[:20].tolist() == few.tolist()
    assert len(workflow._held_out(data, 1000, 0)) == 100
    assert len(set(many.tolist()) & set(range(50))) < 40


def test_all_held_out_data_get_a_reference_by_nuts(short_report, monkeypatch):
    seen = {}

    def watched(model, data, **options):
        seen.update(data=len(data), **options)
        raise RunError("far enough")

    monkeypatch.setattr(workflow, "reference", watched)
    words = "run vae --data rows.npz --set prior=laplace --set latents=2 --quick --epochs 1 --quiet"
    refused(*words.split(), "--held-out", "7")
    assert seen["data"] == 7
    assert seen["warmup"] == Settings().warmup


def test_a_request_knows_what_was_asked_for():
    assert Request().asked() == {}
    assert Request(quick=True, settings={"epochs": 9}).asked() == {**QUICK, "epochs": 9}


def test_later_checks_of_a_quick_run_have_the_full_budget():
    quick = asdict(Settings(**{**QUICK, "epochs": 9, "structure": "full"}))
    kept = workflow._made_with(quick)
    assert (kept["epochs"], kept["train_data"], kept["structure"]) == (9, 8000, "full")
    assert not {"draws", "simulations", "held_out", "remedy_steps"} & set(kept)
    asked = asdict(Settings(draws=500))
    assert workflow._made_with(asked) == asked
