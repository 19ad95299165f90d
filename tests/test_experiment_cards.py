"""Cards of experiments, what their cells return, and the statistics of their tables."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_paper
import torch
from scipy import stats

import calibrant as cal
from calibrant.errors import CalibrantError, RunError
from calibrant.reproductions import Measured, Needs, Ordering, Target
from calibrant.reproductions.cells import Cell, read_cell, sorted_out, write_cell
from calibrant.reproductions.found import Found, estimated, judged, shown
from calibrant.reproductions.page import on_training
from calibrant.reproductions.registering import experiment

# -- statistics --------------------------------------------------------------------------------------------------------


def found_of(values: dict[str, list[float]], errors: float = math.nan) -> Found:
    """An experiment with these means over seeds."""
    cells = {
        (row, seed): Cell("", {"mean": value}, {"mean": errors})
        for row, each in values.items()
        for seed, value in enumerate(each)
    }
    return Found(experiment("tiny", "means"), cells, tuple(range(len(values["much"]))), False, {"digits": "digits"})


ORDER = Ordering("mean", ("little", "much"), "much is more")


@pytest.mark.parametrize(("effect", "answer"), [(0.0, 0.05), (3.0, 0.9)], ids=["no effect", "an effect"])
def test_an_order_is_stated_wrongly_in_one_of_twenty_runs_and_seen_where_it_is(effect, answer):
    """Four seeds with noise that rows share, and noise of their own of sd 1 (so a difference of sd √2)."""
    rng, runs = np.random.default_rng(0), 2000
    shared, own = rng.normal(0, 50, (runs, 4)), rng.normal(0, 1, (2, runs, 4))
    held = [
        judged(found_of({"little": list(s + a), "much": list(s + b + effect)}), ORDER)["answer"]
        for s, a, b in zip(shared, *own, strict=True)
    ]
    share = np.mean([one == "holds" for one in held])
    power = 1 - stats.nct.cdf(stats.t.ppf(0.95, 3), 3, effect / 2**0.5 * 2)
    assert abs(share - power) < 4.5 * np.sqrt(power * (1 - power) / runs)
    assert (share > 0.85) == (answer > 0.5)


def test_a_long_order_is_refuted_wrongly_in_one_of_twenty_runs_at_most():
    """Four rows that are equal, of which any of three steps may go down by chance."""
    rng, runs, rows = np.random.default_rng(0), 1000, ("a", "b", "c", "much")
    order = Ordering("mean", rows, "it rises")
    card = replace(experiment("tiny", "means"), rows={row: {} for row in rows})
    answers = []
    for values in rng.normal(0, 1, (runs, 4, 4)):
        found = found_of({row: list(each) for row, each in zip(rows, values, strict=True)})
        answers.append(judged(replace(found, card=card), order)["answer"])
    share = np.mean([one == "does not hold" for one in answers])
    assert share < 0.05 + 3.0 * math.sqrt(0.05 * 0.95 / runs)  # .14 if every step is tested as if it were alone
    assert np.mean([one == "holds" for one in answers]) < 0.05


def test_an_order_of_single_trainings_says_what_its_error_is():
    alone = judged(found_of({"little": [0.0], "much": [9.0]}, 1.0), ORDER)
    assert "one training each, so that the errors are those of the test data alone)." in alone["sentence"]
    assert "training" not in judged(found_of({"little": [0.0, 0.1], "much": [9.0, 9.2]}, 1.0), ORDER)["sentence"]


def test_an_order_needs_an_error_and_is_refuted_by_its_opposite():
    assert judged(found_of({"little": [0.0], "much": [9.0]}), ORDER)["answer"] == "cannot tell"
    assert judged(found_of({"little": [0.0], "much": [9.0]}, 1.0), ORDER)["answer"] == "holds"
    refuted = judged(found_of({"little": [9.0, 9.1, 9.2], "much": [0.0, 0.2, 0.1]}), ORDER)
    assert refuted["answer"] == "does not hold"
    assert refuted["sentence"].startswith("Not so here: much is more (mean of much minus little: -9.0")
    assert judged(found_of({"little": [math.nan, 1.0], "much": [2.0, 3.0]}), ORDER)["answer"] == "cannot tell"


def test_a_difference_that_is_not_shown_is_none():
    """Two trainings whose latents say nothing have rates of 1e-7 nats, which are different beyond chance."""
    found = judged(found_of({"little": [2e-7], "much": [1e-7]}, 1e-9), ORDER)
    assert found["answer"] == "cannot tell"
    assert "-0.0000 ± 0.0000" in found["sentence"]


def test_rows_with_one_seed_are_compared_datum_by_datum():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 100, 400)  # how hard each datum is, for both rows
    each = {"little": hard + rng.normal(0, 1, 400), "much": hard + 0.5 + rng.normal(0, 1, 400)}
    parts = {row: sorted_out({"mean": Measured.of(values)}, {"mean": ""}) for row, values in each.items()}
    card = experiment("tiny", "means")
    found = Found(card, {(row, 0): Cell("", **part) for row, part in parts.items()}, (0,), False, {})
    difference = found.difference("much", "little", "mean")
    assert math.isclose(difference.se, stats.sem(each["much"] - each["little"]), rel_tol=1e-9)
    assert judged(found, ORDER)["answer"] == "holds"
    apart = Found(card, {p: replace(cell, arrays={}) for p, cell in found.cells.items()}, (0,), False, {})
    assert apart.difference("much", "little", "mean").se > 5
    assert judged(apart, ORDER)["answer"] == "cannot tell"


def test_errors_over_seeds_and_within_them_add_up():
    assert np.isclose(estimated([1.0, 1.0], [0.3, 0.4]).se, 0.25 * 2**0.5)
    assert np.isclose(estimated([0.0, 2.0], [0.3, math.nan]).se, (1.0 + 0.3**2 / 2) ** 0.5)
    alone = estimated([math.nan, 5.0], [math.nan, 0.2])
    assert (alone.value, alone.se, alone.of, alone.seeds) == (5.0, 0.2, "test data", 1)
    assert estimated([math.nan], [0.1]).seeds == 0


def test_the_error_of_a_mean_over_seeds_covers_test_data_that_they_share():
    rng, runs, size = np.random.default_rng(0), 1000, 100
    hard = rng.normal(0, 30, (runs, 1, size))  # the same images for all three seeds
    each = [[Measured.of(seed) for seed in seeds] for seeds in hard + rng.normal(0, 3, (runs, 3, size))]
    found = [estimated([one.value for one in seeds], [one.se for one in seeds]) for seeds in each]
    spread, claimed = np.std([one.value for one in found]), np.mean([one.se for one in found])
    assert abs(claimed / spread - 1) < 4 / math.sqrt(2 * runs)  # it was .58 of the spread, as if the images differed


def test_measured_is_a_mean_with_its_standard_error():
    values = torch.randn(200, dtype=torch.float64)
    found = Measured.of(values)
    assert math.isclose(found.value, float(values.mean()), rel_tol=1e-12)
    assert math.isclose(found.se, stats.sem(values.numpy()), rel_tol=1e-12)
    assert (-found).value == -found.value


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [(-1830.4, 12.3, "-1830 ± 12"), (5.778, 0.1674, "5.78 ± 0.17"), (0.3470123, 9.6e-5, "0.3470 ± 0.0001"),
     (3.0, math.nan, "3"), (math.nan, 1.0, "–"), (-1622.0, math.nan, "-1622")],
)  # fmt: skip
def test_numbers_have_as_many_digits_as_their_error(value, se, text):
    assert shown(value, se) == text


def test_trainings_that_ended_too_soon_are_named():
    stopped = [{"0": {"training": "finished"}}, {"0": {"training": "finished"}, "1": {"training": "still rising"}}, {}]
    part = {"rows": [{"row": f"row {number}", "stopped": each, "failed": {}} for number, each in enumerate(stopped)]}
    assert on_training(part)[0].startswith("The held-out ELBO was still rising when the training ended: row 1. Longer")
    assert on_training({"rows": part["rows"][:1]}) == []
    part["rows"][1]["failed"] = {"1": "RuntimeError: no result"}
    assert on_training(part) == []


# -- cards and cells ---------------------------------------------------------------------------------------------------

CARD: dict[str, Any] = {
    "answers": "Table 1", "shows": "Nothing.", "rows": {"a": {}}, "numbers": {"n": "nats"}, "needs": (Needs("digits"),),
    "minutes": (1, 1),
}  # fmt: skip
WRONG = {
    "another target": ({"targets": (Target("b", "n", 1.0),)}, "it has no row b with a number n"),
    "another ordering": ({"orderings": (Ordering("m", ("a",), ""),)}, "it has no row a with a number m"),
    "quick alone": ({"quick": {"epochs": 1}}, "quick changes epochs, which is not in settings"),
    "twins": ({"rows": {"a b": {}, "a-b": {}}}, "the rows a b and a-b would share a file"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_wrong_cards_are_refused(changes, message):
    with pytest.raises(RunError, match=re.escape(message)):
        cal.reproductions.register_experiment("tiny", "wrong", **{**CARD, **changes})(tiny_paper.absent)


def test_names_are_given_once():
    with pytest.raises(RunError, match="there is no paper 'none'"):
        cal.reproductions.register_experiment("none", "wrong", **CARD)
    with pytest.raises(RunError, match="given to two papers"):
        cal.reproductions.register_paper("tiny", title="Another", arxiv="1", sentence="")
    with pytest.raises(RunError, match="'means' is given to two"):
        cal.reproductions.register_experiment("tiny", "means", **CARD)(tiny_paper.absent)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (3.0, "return a dict"),
        ({"x": "text"}, "give a number, Measured or an array"),
        ({"y": 1.0}, "which the experiment's"),
    ],
)
def test_what_a_cell_returns_is_looked_at(returned, message):
    with pytest.raises(CalibrantError, match=message):
        sorted_out(returned, {"x": "nats"})


def test_a_cell_is_read_as_it_was_written(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([True])}
    cell = Cell("d", {"n": 0.1 + 0.2, "nan": math.nan}, {"n": 1e-300}, 7, 1.5, "cpu", arrays=arrays)
    write_cell(tmp_path / "cell.safetensors", cell)
    read = read_cell(tmp_path / "cell.safetensors")
    assert read is not None
    assert (read.numbers["n"], read.errors, read.steps, read.digest) == (cell.numbers["n"], cell.errors, 7, "d")
    assert math.isnan(read.numbers["nan"])
    assert all(np.array_equal(read.arrays[name], array) for name, array in arrays.items())
    assert read_cell(tmp_path / "none.safetensors") is None
