"""Options of the commands are the fields of the settings, and a run folder knows which of them were asked for."""

import inspect
from dataclasses import asdict, fields

import pytest
import typer

from calibrant import cli
from calibrant.evaluation import check
from calibrant.settings import QUICK, Effort, Request, Settings
from calibrant.workflow import preparing

COMMANDS = typer.main.get_command(cli.app).commands
GROUPS = {
    "run": {"data", "model", "training", "check", "folder"},
    "fit": {"data", "model", "training", "folder"},
}


def described():
    return {f.name: f.metadata for kind in (Request, Settings, Effort) for f in fields(kind) if f.metadata}


@pytest.mark.parametrize("command", GROUPS)
def test_every_field_of_its_groups_is_an_option_of_a_command(command):
    wanted = {name for name, about in described().items() if about["group"] in GROUPS[command]}
    given = {parameter.name for parameter in COMMANDS[command].params}
    assert wanted <= given
    assert given - wanted <= {"models", "model", "quiet"}


@pytest.mark.parametrize("command", ["run", "fit", "check", "report"])
def test_every_option_says_what_it_is_and_what_it_is_by_default(command):
    for parameter in COMMANDS[command].params:
        assert parameter.help, parameter.name
        if hasattr(Settings(), parameter.name) and parameter.name != "remedies":
            assert f"({getattr(Settings(), parameter.name)}" in parameter.help
            assert (f"; quick: {QUICK.get(parameter.name)})" in parameter.help) == (parameter.name in QUICK)


def test_every_field_is_described():
    names = {f.name for kind in (Request, Settings) for f in fields(kind)}
    assert set(described()) == names


def test_a_value_of_zero_is_asked_for():
    assert cli._request({"seed": 0, "draws": None, "remedies": False, "quick": False}).settings == {"seed": 0}


@pytest.mark.parametrize("name", ["draws", "chains", "warmup", "simulations", "remedies"])
def test_check_and_effort_have_the_same_defaults(name):
    assert inspect.signature(check).parameters[name].default == getattr(Effort(), name)


LITTLE = {"held_out": 16, "simulations": 200}


def stored(request, **left_out):
    made = asdict(request.made())
    kept = {"settings": made, "asked": request.settings, "quick": request.quick}
    return {"settings": made, "request": {name: value for name, value in kept.items() if name not in left_out}}


def test_a_later_check_of_a_quick_run_has_the_full_budget_but_where_another_was_asked_for():
    made = preparing._made_with(stored(Request(quick=True, settings={"draws": 500, "chains": 5})))
    assert made["draws"] == 500
    assert made["chains"] == 5
    assert not set(LITTLE) & set(made)


def test_a_run_that_asked_for_little_is_no_quick_run():
    little = {name: value for name, value in QUICK.items() if name not in ("epochs", "train_data")}
    made = preparing._made_with(stored(Request(settings=little)))
    assert LITTLE.items() <= made.items()


def test_a_folder_of_an_older_version_is_quick_if_its_settings_are():
    old = dict.fromkeys(("asked", "quick"))
    assert not set(LITTLE) & set(preparing._made_with(stored(Request(quick=True), **old)))
    assert preparing._made_with(stored(Request(settings={"held_out": 16}), **old))["held_out"] == 16
    folder = stored(Request(quick=True))
    del folder["request"]
    assert not set(LITTLE) & set(preparing._made_with(folder))


def test_what_suits_the_data_gives_way_to_what_was_asked_for():
    request = Request(settings={"epochs": 7}, chosen={"epochs": 60, "batch_size": 16}, quick=True)
    assert (request.made().epochs, request.made().batch_size, request.made().draws) == (7, 16, QUICK["draws"])
    assert "batch_size" not in request.asked()
