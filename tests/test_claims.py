"""Claims of a paper: how often they are answered wrongly, what stands in the way of an answer, and their words."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_trainings
from scipy import stats

import calibrant as cal
from calibrant.errors import RunError
from calibrant.reproductions import Claim, Measured, Needs
from calibrant.reproductions.cells import Cell, sorted_out
from calibrant.reproductions.claims import answer, claims_of
from calibrant.reproductions.found import Estimate, Found, estimated
from calibrant.reproductions.page import claim_lines, expected
from calibrant.reproductions.registering import experiment

FEW, MANY = "few, asked", "many, asked"


def asked(claim: Claim, cells: dict[tuple[str, int], Any]) -> dict[str, Any]:
    """The claim about these numbers of cells."""
    card = replace(experiment(tiny_trainings.PAPER, "widths"), claims=(claim,))
    seeds = tuple(sorted({seed for _, seed in cells}))
    read = {place: one if isinstance(one, Cell) else sorted_out(one, card.numbers) for place, one in cells.items()}
    kept = {place: one if isinstance(one, Cell) else Cell("", **one) for place, one in read.items()}
    return claims_of(Found(card, kept, seeds, True, {"digits": "digits"}))[0]


def of_seeds(values: Any) -> dict[tuple[str, int], Any]:
    return {(FEW, seed): {"width, guide": float(value)} for seed, value in enumerate(values)}


# -- how often an answer is wrong --------------------------------------------------------------------------------------


def shares(claim: Claim, truth: float, seeds: int = 3, runs: int = 800) -> dict[str, float]:
    """How often each answer is given, if the numbers of seeds have sd 1 about the truth."""
    draws = np.random.default_rng(0).normal(truth, 1.0, (runs, seeds))
    found = [answer(claim, estimated(list(each), [math.nan] * seeds)) for each in draws]
    return {one: float(np.mean([each == one for each in found])) for one in ("holds", "does not hold", "cannot tell")}


def close(share: float, truth: float, runs: int = 800) -> bool:
    return abs(share - truth) < 4.5 * math.sqrt(truth * (1 - truth) / runs)


@pytest.mark.parametrize("expects", ["above", "below"])
def test_a_claim_at_its_limit_is_answered_wrongly_in_one_of_twenty_runs(expects):
    found = shares(Claim("", FEW, "width", expects, 2.0), 2.0)
    assert close(found["holds"], 0.05)
    assert close(found["does not hold"], 0.05)


@pytest.mark.parametrize(("expects", "sign"), [("above", 1), ("below", -1)])
def test_an_effect_is_seen_with_the_power_of_a_t_test(expects, sign):
    claim, effect = Claim("", FEW, "width", expects, 2.0), 6.0
    power = 1 - stats.nct.cdf(stats.t.ppf(0.95, 2), 2, effect * math.sqrt(3))
    assert close(shares(claim, 2.0 + sign * effect)["holds"], power)
    assert close(shares(claim, 2.0 - sign * effect)["does not hold"], power)


@pytest.mark.parametrize("sign", [1, -1])
def test_equivalence_is_stated_wrongly_in_one_of_twenty_runs_and_found_where_it_is(sign):
    claim = Claim("", FEW, "width", "within", 5.0)
    assert close(shares(claim, 5.0 * sign)["holds"], 0.05)
    assert shares(claim, 5.0 * sign)["does not hold"] < 0.05
    assert shares(claim, 0.0)["holds"] > 0.85
    assert shares(claim, 15.0 * sign)["does not hold"] > 0.85
    assert shares(Claim("", FEW, "width", "within", 1e-3), 0.0)["does not hold"] < 0.06  # a margin of nothing
    assert shares(Claim("", FEW, "width", "within", 1.0), 0.0, seeds=2)["holds"] < 0.25  # no news is no equivalence


def test_more_seeds_than_chance_decide():
    """Planted: a standard error without its Student's t limit would answer in one run of four."""
    claim = Claim("", FEW, "width", "above", 0.0)
    as_if_known = Estimate(1.0, 0.5, "seeds", 2)
    assert answer(claim, as_if_known) == "holds"
    assert answer(claim, replace(as_if_known, freedom=1)) == "cannot tell"


# -- from the numbers of cells -----------------------------------------------------------------------------------------


def test_a_claim_is_answered_for_each_source_apart():
    cells = {
        (FEW, seed): {"width, exact": 0.9 + 0.001 * seed, "width, guide": 0.1 + 0.001 * seed, "refused": 0.0}
        for seed in range(3)
    }
    found = asked(Claim("it is wide", FEW, "width", "above", 0.5), cells)
    assert (found["exact"]["answer"], found["guide"]["answer"]) == ("holds", "does not hold")
    assert math.isclose(found["exact"]["value"], 0.901)
    assert found["guide"]["seeds"] == {"0": 0.1, "1": pytest.approx(0.101), "2": pytest.approx(0.102)}
    assert (found["exact"]["because"], found["experiment"], found["domain"]) == ("", "widths", "digits")


def test_a_difference_is_that_of_the_same_seeds():
    hard = np.random.default_rng(0).normal(0, 100, 3)  # what the rows of a seed share
    cells = {(row, seed): {"width, guide": hard[seed] + more + 0.01 * seed} for row, more in ((FEW, 0.0), (MANY, 1.0))
             for seed in range(3)}  # fmt: skip
    cells[MANY, 2]["width, guide"] += 0.02
    found = asked(Claim("", MANY, "width", "above", minus=FEW), cells)["guide"]
    assert found["answer"] == "holds"
    assert np.isclose(found["value"], 1 + 0.02 / 3)
    assert asked(Claim("", MANY, "width", "above"), cells)["guide"]["answer"] == "cannot tell"


@pytest.mark.parametrize(
    ("parts", "because"),
    [
        ({"width, exact": 0.9, "refused": 0.14}, "the reference was refused for 14% of the images"),
        ({"refused": 0.5}, "the reference was refused for 50% of the images"),
        ({}, "no reference was computed"),
    ],
    ids=["with a number", "without", "none"],
)
def test_refused_references_leave_the_exact_posterior_without_an_answer(parts, because):
    cells = {(FEW, seed): {"width, guide": 0.1 + 0.01 * seed, **parts} for seed in range(3)}
    found = asked(Claim("", FEW, "width", "below", 5.0), cells)
    assert (found["exact"]["answer"], found["exact"]["because"]) == ("cannot tell", because)
    assert found["guide"]["answer"] == "holds"


def test_few_refused_references_do_not_stand_in_the_way():
    cells = {(FEW, s): {"width, exact": 0.9 + s / 100, "width, guide": 0.1, "refused": 0.1} for s in range(3)}
    assert asked(Claim("", FEW, "width", "below", 5.0), cells)["exact"]["answer"] == "holds"


def test_a_number_has_a_share_of_its_own_and_so_has_each_row():
    card = experiment(tiny_trainings.PAPER, "widths")
    numbers = {**card.numbers, "width, refused": "share"}
    cells = {
        (row, seed): Cell("", {"width, exact": 0.9 + seed / 100, "width, refused": share, "refused": 0.0})
        for row, share in ((FEW, 0.0), (MANY, 0.2))
        for seed in range(3)
    }
    claims = (Claim("", FEW, "width", "above"), Claim("", FEW, "width", "within", 1.0, MANY))
    one, both = claims_of(Found(replace(card, numbers=numbers, claims=claims), cells, (0, 1, 2), True, {}))
    assert one["exact"]["answer"] == "holds"
    assert both["exact"]["because"] == "the reference was refused for 20% of the images"


def test_failed_cells_are_named_and_one_training_says_what_its_error_is():
    failed = {(FEW, 0): Cell("", failed="ValueError: planted")}
    assert asked(Claim("", FEW, "width", "above"), failed)["guide"]["because"] == "few, asked, seed 0 failed"
    alone = asked(Claim("", FEW, "width", "above"), {(FEW, 0): {"width, guide": Measured(3.0, 0.1)}})["guide"]
    assert alone["answer"] == "holds"
    assert alone["because"] == "one seed: the error is that of its test data"
    without = asked(Claim("", FEW, "width", "above"), {(FEW, 0): {"width, guide": 3.0}})["guide"]
    assert (without["answer"], without["because"]) == ("cannot tell", "one seed has no error")


def test_rows_that_a_run_leaves_out_have_no_claims():
    card = replace(experiment(tiny_trainings.PAPER, "widths"), full_only=(MANY,))
    found = claims_of(Found(card, {}, (0,), True, {}))
    assert [claim["says"] for claim in found] == ["a guide is narrower than the prior"]
    assert len(claims_of(Found(card, {}, (0,), False, {}))) == 3


# -- in words ----------------------------------------------------------------------------------------------------------


def test_claims_are_lines_of_a_table():
    cells = {(FEW, seed): {"width, guide": 1.0 + 0.01 * seed, "refused": 0.3} for seed in range(3)}
    claim = asked(Claim("it is wide", FEW, "width", "above", 0.5), cells)
    assert claim_lines([claim])[1:] == [
        [
            "digits",
            "it is wide (width of few, asked: above 0.5 prior sd)",
            "cannot tell: the reference was refused for 30% of the images",
            "holds: 1.0100 ± 0.0058",
        ]
    ]
    assert claim_lines([]) == []
    assert expected({**claim, "expects": "within", "limit": 0.1, "minus": MANY}) == (
        "width of few, asked minus many, asked: within ±0.1 prior sd"
    )


CARD: dict[str, Any] = {
    "answers": "Table 1", "shows": "Nothing.", "rows": {"a": {}}, "numbers": {"n, guide": "nats"},
    "needs": (Needs("digits"),), "minutes": (1, 1),
}  # fmt: skip
WRONG = {
    "another row": (Claim("", "b", "n", "above"), "it has no row b, which a claim names"),
    "another row to subtract": (Claim("", "a", "n", "above", minus="b"), "it has no row b, which a claim names"),
    "another number": (Claim("", "a", "m", "above"), "numbers has neither m, exact nor m, guide: add one of them"),
    "no side": (Claim("", "a", "n", "equal"), "a claim expects 'equal' with limit 0: write above, below, or within"),  # type: ignore[arg-type]
    "no margin": (Claim("", "a", "n", "within"), "a claim expects 'within' with limit 0"),
}


@pytest.mark.parametrize(("claim", "message"), WRONG.values(), ids=WRONG)
def test_wrong_claims_are_refused(claim, message):
    with pytest.raises(RunError, match=message):
        cal.reproductions.register_experiment(tiny_trainings.PAPER, "wrong", claims=(claim,), **CARD)(
            tiny_trainings.elsewhere
        )
