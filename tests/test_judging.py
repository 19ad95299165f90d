"""From statistics to verdicts and from verdicts to a conclusion; what the error rates promise, on known effects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from scipy.special import ndtr
from scipy.stats import binom

from calibrant.evaluation import conclude
from calibrant.evaluation.judgements.decisions import (
    FALSE_ALARM,
    FALSE_PASS,
    Question,
    Verdict,
    decide,
    holm,
    limit,
    normal_statistic,
)

MARGIN = 0.1


def ask(effects: np.ndarray, se: float, rng: np.random.Generator) -> list[Question]:
    """A question for each row of true effects, a statistic for each entry, observed with Normal errors."""
    seen = effects + se * rng.normal(size=effects.shape)
    width = limit(effects.size)
    statistics = [[normal_statistic(f"{e}", "", e, se, MARGIN, width) for e in row] for row in seen]
    return [Question(f"site {i}", "mean", row) for i, row in enumerate(statistics)]


def shares(effects: np.ndarray, se: float, count: int = 2000, judge=decide) -> dict[str, float]:
    """How often any question fails, any passes, all pass."""
    rng = np.random.default_rng(0)
    statuses = [[status for status, _ in judge(ask(effects, se, rng))] for _ in range(count)]
    return {
        "fail": np.mean(["fail" in row for row in statuses]),
        "pass": np.mean(["pass" in row for row in statuses]),
        "all": np.mean([set(row) == {"pass"} for row in statuses]),
    }


def most(rate: float, count: int = 2000) -> float:
    return float(binom.isf(1e-5, count, rate) / count)


def test_holm_is_that_of_its_paper():
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05) == [True, False, False, True]
    assert holm([0.01, 0.02, 0.03], 0.05) == [True, True, True]
    assert holm([0.02, 0.02, 0.02], 0.05) == [False, False, False]
    assert holm([], 0.05) == []


def test_false_alarms_stay_below_the_rate_even_at_the_margin():
    """Six questions of three statistics, every effect exactly at its margin; without Holm the rate is missed."""
    effects = np.full((6, 3), MARGIN)
    for se in (0.02, 0.5):  # also where the interval is wider than both margins together
        assert shares(effects, se)["fail"] <= most(FALSE_ALARM)

    def unadjusted(questions):
        return [("fail" if question.p_value <= FALSE_ALARM else "pass", None) for question in questions]

    assert shares(effects, 0.02, judge=unadjusted)["fail"] > most(FALSE_ALARM)


def test_what_is_at_the_margin_hardly_ever_passes():
    """One of eighteen effects at the margin: its question passes in one check of a thousand at most."""
    effects = np.zeros((6, 3))
    effects[2, 1] = MARGIN
    assert shares(effects, 0.01)["all"] <= most(FALSE_PASS)
    assert shares(np.zeros((6, 3)), 0.01)["all"] > 0.99


@pytest.mark.parametrize("count", [1, 18])
def test_intervals_together_miss_an_effect_on_either_side_at_the_rate_of_a_false_pass(count):
    beyond = ndtr(-limit(count))
    assert 2 * count * beyond == pytest.approx(FALSE_PASS)


@pytest.mark.parametrize(("effect", "status"), [(0.0, "pass"), (0.1, "cannot tell"), (0.3, "fail"), (-0.3, "fail")])
def test_three_answers(effect, status):
    statistic = normal_statistic("z", "", effect, 0.01, MARGIN, limit(1))
    assert [s for s, _ in decide([Question("z", "mean", [statistic])])] == [status]


def test_without_data_nothing_is_known():
    nothing = normal_statistic("z", "", np.nan, np.nan, MARGIN, limit(1))
    assert [s for s, _ in decide([Question("z", "mean", [nothing])])] == ["cannot tell"]


def test_the_first_statistic_that_is_clear_by_itself_is_named():
    clear, clearer = (
        normal_statistic(name, "", e, 0.01, MARGIN, limit(2)) for name, e in (("all", 0.2), ("z[3]", 0.5))
    )
    assert decide([Question("z", "mean", [clear, clearer])])[0][1].label == "all"
    unclear = normal_statistic("all", "", 0.11, 0.01, MARGIN, limit(2))
    assert decide([Question("z", "mean", [unclear, clearer])])[0][1].label == "z[3]"


# -- the conclusion ----------------------------------------------------------------------------------------------------


def verdict(site: str, quantity: str, status, effect: float = 0.0, **more) -> Verdict:
    direction = "too narrow" if effect < 0 else "too wide"
    return Verdict(site, quantity, status, effect, 0.01, 0.1, **{"sentence": "said", "direction": direction, **more})


PASSING = [verdict("scale", "sd", "pass"), verdict("scale", "mean", "pass"), verdict("all latents", "k-hat", "pass")]


def comparison(flagged: int, count: int = 40) -> xr.Dataset:
    variables = {
        "c2st_p": ("data", np.where(np.arange(count) < flagged, 0.001, 0.5)),
        "c2st_flagged": ("data", np.arange(count) < flagged),
    }
    return xr.Dataset(variables, {"data": np.arange(count)}, {"c2st_fdr": 0.1, "cannot_tell": 0})


def test_all_passes():
    found = conclude(PASSING, comparison(0))
    assert found.status == "pass"
    assert "You can believe the guide's uncertainty about the 40 data" in str(found)
    assert "without a reference" in str(conclude(PASSING))


def test_nothing_passes_that_not_all_was_asked_of():
    assert conclude(PASSING).status == "cannot tell"
    discrete = comparison(0).assign_attrs(discrete="face")
    assert conclude(PASSING, discrete).status == "cannot tell"
    assert "face, whose values are whole numbers" in str(conclude(PASSING, discrete))
    assert "Not checked: data that the model makes itself" in str(conclude(PASSING, comparison(0)))


def test_single_wrong_data_are_told_where_the_average_is_right():
    assert "For 2 of the 40 data a classifier can still tell it" in str(conclude(PASSING, comparison(2)))
    assert "classifier" not in str(conclude(PASSING, comparison(0)))


def test_what_describes_does_not_decide():
    described = verdict("all latents", "evidence gap", "fail", primary=False)
    assert conclude([*PASSING, described], comparison(0)).status == "pass"


def test_a_failure_is_told_in_plain_words():
    found = conclude([*PASSING, verdict("z", "sd", "fail", -0.31), verdict("z", "coverage", "fail")], comparison(12))
    assert found.status == "fail"
    assert "About `z`: it is too sure of itself by 31%." in str(found)
    assert "intervals" not in str(found), "what follows from the sd is not told again"
    assert "visibly wrong for 12 of the 40 data" in str(found)
    off = verdict("z", "sd", "fail", 0.2, direction="off")
    assert "how sure it is of single data is wrong by 20%." in str(conclude([off]))
    one = replace(
        verdict("z", "sd", "fail", -0.4),
        sentence="`z[3]`: too narrow by 40% (the worst of 8 latents)",
        entry="z[3]",
        direction="too narrow",
    )
    assert "too sure of itself by 40% in one or more of its entries" in str(conclude([one], comparison(0)))
    assert "visibly" not in str(conclude([one], comparison(0)))


@pytest.mark.parametrize("quantity", ["sd", "mean", "coverage", "correlation", "k-hat", "log joint"])
def test_every_failure_has_words(quantity):
    assert conclude([verdict("z", quantity, "fail", 0.5)]).status == "fail"


def test_what_is_not_known_is_named():
    found = conclude([*PASSING, verdict("z", "mean", "cannot tell")], comparison(0))
    assert found.status == "cannot tell"
    assert "can't settle mean of `z`" in str(found)
    assert "3 of 4 questions are answered well" in str(found)
    assert "more data (73 at least)" in str(found)
    enough = conclude([*PASSING, verdict("z", "mean", "cannot tell")], comparison(0, 80))
    assert "Check more data, with more draws" in str(enough)
    few = comparison(0).assign_attrs(cannot_tell=1, share_left_out=0.25)
    found = conclude([*PASSING, verdict("z", "mean", "cannot tell")], few)
    assert "25% of the data have no reference posterior" in str(found)
    assert conclude([]).status == "cannot tell"
