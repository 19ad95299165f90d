"""The options of a data set and the encoder of a guide on the command line: runs record, resume and check them."""

from __future__ import annotations

import shlex

import pytest
from commands import call, fit_rows, good, interrupt_at, refused, same, weights

import calibrant as cal
from calibrant import store

pytestmark = pytest.mark.usefixtures("elsewhere")

WIDTH = '{"name": "sigma-vae", "width": 2}'
DIGITS = ["--data", "digits", "--data-option", "levels=256", "--data-option", "size=12"]
NETWORKS = ["--set", "latents=2", "--set", f"decoder={WIDTH}", "--encoder", WIDTH]


def fit_digits(*more: object) -> list[object]:
    return ["fit", "vae", *DIGITS, *NETWORKS, "--epochs", "2", "--batch-size", "400", "--out", "run", *more]


def test_a_run_with_the_published_networks_on_resized_digits(monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 5)
        code, _, err = call(*fit_digits())
    assert code == 130
    for words, message in {
        "--data-option size=16": "data_options was {'levels': 256, 'size': 12}, is {'size': 16}",
        "--encoder conv": "encoder was {'name': 'sigma-vae', 'width': 2}, is conv",
    }.items():
        assert message in refused("fit", "vae", "--out", "run", "--resume", *shlex.split(words))
    good(*shlex.split(err.partition("Resume with: ")[2])[1:])
    resumed = weights("run")
    good(*fit_digits("--overwrite"))
    assert same(resumed, weights("run"))
    config = store.read_config("run")
    assert config["data"]["options"] == {"levels": 256, "size": 12}
    assert config["model"]["arguments"]["shape"] == [1, 12, 12]
    model, guide = cal.load("run")
    assert guide.spec["encoder"] == {"x": {"kind": "sigma-vae", "width": 2}}
    assert model.decoder.network[2].weight.shape == (8, 4, 6, 6)


def test_a_check_of_the_same_set_by_name_keeps_its_options(monkeypatch):
    from calibrant.workflow import preparing

    good(*fit_digits("--epochs", "1"))
    seen = []
    original = preparing.load_data
    monkeypatch.setattr(preparing, "load_data", lambda *a, **o: seen.append(o) or original(*a, **o))
    monkeypatch.setattr("calibrant.workflow.running._evaluate", lambda *_: 1 / 0)
    for words in ([], ["--data", "digits"], ["--data-option", "levels=256", "--data-option", "size=12"]):
        with pytest.raises(ZeroDivisionError):
            call("check", "run", *words)
        assert seen.pop() == {"levels": 256, "size": 12}
    assert "digits: size=0 is given" in refused(
        "check", "run", "--data-option", "size=0", "--data-option", "levels=256"
    )


def test_an_encoder_for_each_input():
    fit_rows("run", "--encoder", 'x={"kind": "mlp", "hidden": 8}')
    assert cal.load("run")[1].spec["encoder"] == {"x": {"kind": "mlp", "hidden": 8}}
    fit_rows("named", "--encoder", "mlp")
    assert cal.load("named")[1].spec["encoder"] == "mlp"


def test_mistakes_in_these_options():
    rows = ["fit", "ppca", "--data", "rows.npz"]
    assert "rows.npz takes no options, but got size" in refused(*rows, "--data-option", "size=3")
    assert "--data-option size: write NAME=VALUE" in refused(*rows, "--data-option", "size")
    assert "--data-option seed: give --seed" in refused("fit", "vae", "--data", "digits", "--data-option", "seed=3")
    assert "digits has no option 'width'" in refused("fit", "vae", "--data", "digits", "--data-option", "width=3")
    assert "unknown encoder 'resnet'" in refused(*rows, "--encoder", "resnet")
    assert "--encoder x: write INPUT=NAME" in refused(*rows, "--encoder", "x", "--encoder", "y=mlp")
    assert "--encoder: {name: mlp} is no valid JSON" in refused(*rows, "--encoder", "{name: mlp}")
    assert "unknown encoder 3" in refused(*rows, "--encoder", "3")
