"""Runs with MODEL+STRUCTURE: one more guide for the model of an earlier member, whose weights do not change."""

from __future__ import annotations

import shutil
import warnings
from importlib import import_module
from pathlib import Path

import pytest
from commands import SMALL, STEPS, call, good, interrupt_at, refused

import calibrant as cal
from calibrant import store
from calibrant.errors import RunError
from calibrant.evaluation.remedying.commands import checking_line, training_line
from calibrant.folders.tensors import digest_of_tensors
from calibrant.settings import DATA, MODELS, Request, announced, demonstration, is_demonstration, model_of, structure_of
from calibrant.workflow import preparing, running

pytestmark = pytest.mark.usefixtures("elsewhere")
TWO = ["run", "gsm", "gsm+collapsed", "--data", "rows.npz", "--set", "latents=2", "--quiet", *SMALL]


@pytest.mark.parametrize(
    ("name", "model", "structure"),
    [
        ("ea-vae", "ea-vae", None),
        ("ea-vae+collapsed", "ea-vae", "collapsed"),
        ("gsm+mean-field", "gsm", "mean-field"),
        ("a+b.py:Mine", "a+b.py:Mine", None),
        ("a+b.py:Mine+full", "a+b.py:Mine", "full"),
        ("gsm+fuller", "gsm+fuller", None),
    ],
)
def test_a_name_says_which_model_and_which_structure(name, model, structure):
    assert (model_of(name), structure_of(name)) == (model, structure)


@pytest.fixture
def trained(monkeypatch):
    """A function that trains two members in a folder, without a check."""
    monkeypatch.setattr(running, "_evaluate", lambda job, progress: job.name)
    monkeypatch.setattr(running, "_report", lambda folder, results, *_: results)
    settings = {"epochs": 2, "batch_size": 40}

    def run(out, resume=False):
        new = {} if resume else {"models": ("gsm", "gsm+collapsed"), "data": "rows.npz", "arguments": {"latents": 2}}
        return running.run(Request(**new, settings={} if resume else settings, out=Path(out), resume=resume))

    return run


def test_a_further_guide_has_the_weights_of_its_model(trained):
    assert trained("run") == ["gsm", "gsm+collapsed"]
    folders = [Path("run/gsm"), Path("run/gsm-collapsed")]
    first, second = (cal.load(folder)[0] for folder in folders)
    assert digest_of_tensors(first.state_dict()) == digest_of_tensors(second.state_dict())
    configs = [store.read_config(folder) for folder in folders]
    assert [config["name"] for config in configs] == ["gsm", "gsm+collapsed"]
    assert [config["settings"]["structure"] for config in configs] == ["faithful", "collapsed"]


@pytest.mark.slow
def test_a_further_guide_has_the_reference_of_its_model(short_check, monkeypatch):
    good(*TWO, "--out", "run")
    base, further = Path("run/gsm"), Path("run/gsm-collapsed")
    assert (base / store.REFERENCE).read_bytes() == (further / store.REFERENCE).read_bytes()
    assert [store.load_result(folder).name for folder in (base, further)] == ["gsm", "gsm+collapsed"]
    little = ("--draws", "100", "--held-out", "4", "--simulations", "100", "--quiet")
    (further / store.REFERENCE).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(running, "reference_of", lambda *_, **__: 1 / 0)
        good("check", "run", *little)
    good("report", "run", "--quiet")
    shutil.move(further, "alone")
    good("check", "alone", *little)


def test_an_interrupted_run_resumes_with_the_same_result(trained, monkeypatch):
    trained("whole")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2 * STEPS + 1)  # in the second training
        with pytest.raises(KeyboardInterrupt, match="Resume with: calibrant run --out run --resume"):
            trained("run")
    assert store.read_config("run/gsm-collapsed")["fit"]["stopped"] == "interrupted"
    trained("run", resume=True)
    for member in ("gsm", "gsm-collapsed"):
        for file in (store.MODEL, store.GUIDE):
            assert (Path("run") / member / file).read_bytes() == (Path("whole") / member / file).read_bytes()


def test_a_further_guide_waits_for_the_weights(monkeypatch):
    said, looked = [], iter([False, False, True])
    monkeypatch.setattr(running, "_has_ended", lambda folder: next(looked))
    monkeypatch.setattr(running, "_PATIENCE", 0.0)
    monkeypatch.setattr(store, "load", lambda *_, **__: said.append("loaded"))
    Path("base").mkdir()
    Path("base", store.CONFIG).write_text("{}")
    running._take_weights(None, Path("base"), lambda *words: said.append(words[-1]))
    assert said == ["waits for the weights of base"] * 2 + ["loaded"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["gsm+collapsed"], "name gsm before it (gsm gsm+collapsed), or train a model of its own, gsm --structure"),
        (["gsm+collapsed", "gsm"], "name gsm before it"),
        (["gsm", "gsm+fuller"], "there is no structure 'fuller': MODEL+STRUCTURE takes faithful, mean-field"),
        (["gsm", "gsm+full", "gsm+full"], "would share a folder"),
        (["ppca", "ppca+collapsed"], "it is the exact posterior of ppca: leave it out"),
    ],
)
def test_mistakes_in_names(names, words):
    assert words in refused("run", *names, "--data", "rows.npz", "--set", "latents=2")


def test_lines_to_paste_name_the_model_too():
    request = {"models": ["gsm+collapsed"], "data": "digits"}
    assert training_line(request) == "calibrant run gsm gsm+collapsed --data digits"
    assert training_line(request, structure="full") == "calibrant run gsm --data digits --structure full"
    own = {"models": ["m.py:Mine+full"], "data": "digits"}
    assert checking_line(Path("run"), own) == "calibrant check run --model m.py:Mine"


# -- the demonstration -------------------------------------------------------------------------------------------------


def test_the_demonstration_leaves_out_a_guide_that_its_model_does_not_allow(monkeypatch):
    def started(jobs):
        raise RunError(", ".join(job.name for job in jobs))

    monkeypatch.setattr(running, "_in_processes", started)
    for arguments, names in (({}, "vae, ea-vae, ea-vae.collapsed"), ({"likelihood": "student-t"}, "vae, ea-vae")):
        request = Request(quick=True, arguments=arguments, out=Path("run"), overwrite=True)
        with warnings.catch_warnings(record=True) as warned, pytest.raises(RunError, match=f"^{names}$"):
            running.run(request)
        said = [str(warning.message) for warning in warned]
        assert any(words.startswith("ea-vae+collapsed is left out of the demonstration: EAVAE") for words in said) == (
            bool(arguments)
        )


def test_the_demonstration_with_another_guide_has_no_further_one():
    assert demonstration(Request()).models == MODELS
    assert demonstration(Request(settings={"seed": 3})).models == MODELS
    assert demonstration(Request(settings={"structure": "full"})).models == ("vae", "ea-vae")


def test_what_is_given_comes_before_what_the_demonstration_chooses():
    request = demonstration(Request(arguments={"prior": "laplace"}, settings={"memory": 3.0}))
    assert request.arguments == {"latents": 16, "prior": "laplace"}
    assert request.made().memory == 3.0
    assert demonstration(Request(arguments={"latents": 4})).arguments == {"latents": 4}
    assert demonstration(Request()).made().memory == 0.5
    assert is_demonstration(demonstration(Request()))
    assert is_demonstration(Request(models=("vae", "ea-vae"), data=DATA)), "whose program takes no collapsed guide"
    assert not is_demonstration(Request(models=("ea-vae",), data=DATA))
    assert not is_demonstration(Request(models=MODELS, data="digits"))


def test_a_collapsed_guide_gets_a_third_of_the_epochs_unless_a_number_is_given():
    settings = Request().made()
    assert preparing._settings_of("gsm+collapsed", Request(), settings).epochs == -(-settings.epochs // 3)
    assert preparing._settings_of("gsm+full", Request(), settings).epochs == settings.epochs
    assert preparing._settings_of("gsm", Request(), settings) is settings
    asked = Request(settings={"epochs": 9})
    assert preparing._settings_of("gsm+collapsed", asked, asked.made()).epochs == 9


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (
            Request(),
            "Training vae, ea-vae and a collapsed guide for ea-vae on natural-patches, then checking every guide",
        ),
        (Request(quick=True), "against the exact posterior: about 1 minute ..."),
        (
            Request(models=("gsm",), data="digits"),
            "Training gsm on digits, then checking its guide against the reference",
        ),
        (Request(settings={"epochs": 100}), "against the reference posterior ..."),
        (Request(out=Path("x"), resume=True), "Continuing the run in x ..."),
    ],
)
def test_the_first_line_says_what_happens(request_, words, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert words in announced(request_)


def test_the_first_line_is_told_before_anything_slow_is_imported(monkeypatch, capsys):
    monkeypatch.setattr(import_module("calibrant.workflow"), "run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call("run", "--quick")
