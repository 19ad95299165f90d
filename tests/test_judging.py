"""From statistics to verdicts and from verdicts to a conclusion; what the error rates promise, on known effects."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from scipy.special import ndtr
from scipy.stats import binom

from calibrant.evaluation import conclude
from calibrant.evaluation.judgements.against_reference import COMPARED
from calibrant.evaluation.judgements.decisions import (
    FALSE_ALARM,
    FALSE_PASS,
    WIDTH,
    Question,
    Verdict,
    decide,
    holm,
    normal_statistic,
)

MARGIN = 0.1


def ask(effects: np.ndarray, se: float, rng: np.random.Generator) -> list[Question]:
    """A question for each row of true effects, a statistic for each entry, observed with Normal errors."""
    seen = effects + se * rng.normal(size=effects.shape)
    statistics = [[normal_statistic(f"{e}", "", e, se, MARGIN) for e in row] for row in seen]
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


@pytest.mark.parametrize("count", [1, 18, 4000])
def test_the_rate_of_a_false_pass_does_not_grow_with_the_number_of_questions(count):
    """All intervals have to lie inside, so that the one of the wrong effect decides, however many others there are."""
    assert 2 * ndtr(-WIDTH) == pytest.approx(FALSE_PASS)
    effects = np.zeros((1, count))
    effects[0, 0] = MARGIN
    assert shares(effects, 0.01, 200)["all"] <= most(FALSE_PASS, 200)


@pytest.mark.parametrize(("effect", "status"), [(0.0, "pass"), (0.1, "cannot tell"), (0.3, "fail"), (-0.3, "fail")])
def test_three_answers(effect, status):
    statistic = normal_statistic("z", "", effect, 0.01, MARGIN)
    assert [s for s, _ in decide([Question("z", "mean", [statistic])])] == [status]


def test_without_data_nothing_is_known():
    nothing = normal_statistic("z", "", np.nan, np.nan, MARGIN)
    assert [s for s, _ in decide([Question("z", "mean", [nothing])])] == ["cannot tell"]


def test_the_first_statistic_that_is_clear_by_itself_is_named():
    clear, clearer = (normal_statistic(name, "", e, 0.01, MARGIN) for name, e in (("all", 0.2), ("z[3]", 0.5)))
    assert decide([Question("z", "mean", [clear, clearer])])[0][1].label == "all"
    unclear = normal_statistic("all", "", 0.11, 0.01, MARGIN)
    assert decide([Question("z", "mean", [unclear, clearer])])[0][1].label == "z[3]"


# -- the conclusion ----------------------------------------------------------------------------------------------------


def verdict(site: str, quantity: str, status, effect: float = 0.0, **more) -> Verdict:
    direction = "too narrow" if effect < 0 else "too wide"
    return Verdict(site, quantity, status, effect, 0.01, 0.1, **{"sentence": "said", "direction": direction, **more})


PASSING = [
    verdict("scale", "sd", "pass"),
    verdict("scale", "shape", "pass"),
    verdict("all latents", "k-hat", "pass"),
]


def comparison(flagged: int, count: int = 40) -> xr.Dataset:
    variables = {
        "c2st_p": ("data", np.where(np.arange(count) < flagged, 0.001, 0.5)),
        "c2st_flagged": ("data", np.arange(count) < flagged),
    }
    return xr.Dataset(variables, {"data": np.arange(count)}, {"c2st_fdr": 0.1, "cannot_tell": 0, "n_left_out": 0})


def test_all_passes():
    found = conclude(PASSING, comparison(0))
    assert found.status == "pass"
    assert "You can trust the guide's uncertainty on the 40 data" in str(found)
    assert "without a reference" in str(conclude(PASSING))


def test_nothing_passes_that_not_all_was_asked_of():
    assert conclude(PASSING).status == "cannot tell"
    discrete = comparison(0).assign_attrs(discrete="face")
    assert conclude(PASSING, discrete).status == "cannot tell"
    assert "face, whose values are whole numbers" in str(conclude(PASSING, discrete))
    assert "Not checked: simulated data" in str(conclude(PASSING, comparison(0)))
    without_shape = [one for one in PASSING if one.quantity != "shape"]
    assert conclude(without_shape, comparison(0)).status == "cannot tell"
    assert "shape of its distributions" in str(conclude(without_shape, comparison(0)))


def test_a_pass_tells_the_expected_number_of_missed_modes_and_the_data_without_a_reference():
    missed = comparison(0).assign_attrs(expected_wrong=0.4, n_left_out=3)
    assert "missed a mode of some data (of 0.4, in expectation)" in str(conclude(PASSING, missed))
    assert "Nothing was compared for 3 more" in str(conclude(PASSING, missed))
    assert "mode" not in str(conclude(PASSING, comparison(0)))


def test_single_wrong_data_are_told_where_the_average_is_right():
    assert "For 2 of 40 data a classifier can still tell the guide from the reference" in str(
        conclude(PASSING, comparison(2))
    )
    assert "classifier" not in str(conclude(PASSING, comparison(0)))


def test_what_describes_does_not_decide():
    described = verdict("all latents", "evidence gap", "fail", primary=False)
    assert conclude([*PASSING, described], comparison(0)).status == "pass"


def test_a_failure_is_told_in_plain_words():
    found = conclude([*PASSING, verdict("z", "sd", "fail", -0.31), verdict("z", "coverage", "fail")], comparison(12))
    assert found.status == "fail"
    assert "`z`: its posterior sd is too small by 31%." in str(found)
    assert "intervals" not in str(found), "what follows from the sd is not told again"
    assert "For 12 of 40 data the guide is clearly wrong (expect at most 2 of these to be false alarms)" in str(found)
    off = verdict("z", "sd", "fail", 0.2, direction="off")
    assert "its posterior sd is off by 20%." in str(conclude([off]))
    one = replace(
        verdict("z", "sd", "fail", -0.4),
        sentence="`z[3]`: too narrow by 40% (the worst of 8 latents)",
        entry="z[3]",
        direction="too narrow",
    )
    assert "too small by 40% for `z[3]`" in str(conclude([one], comparison(0)))
    assert "clearly" not in str(conclude([one], comparison(0)))


@pytest.mark.parametrize("quantity", [*COMPARED, "evidence gap", "k-hat", "log joint", "log likelihood", "ranks"])
def test_every_failure_has_words(quantity):
    assert conclude([verdict("z", quantity, "fail", 0.5)]).status == "fail"


def test_what_is_not_known_is_named():
    found = conclude([*PASSING, verdict("z", "mean", "cannot tell")], comparison(0))
    assert found.status == "cannot tell"
    assert "mean of `z` cannot be decided" in str(found)
    assert "3 of 4 questions pass" in str(found)
    assert "at least 128 data, 1,000 guide draws and 2,000 simulations" in str(found)
    unweighed = conclude([*PASSING, verdict("all latents", "k-hat", "cannot tell")], comparison(0))
    assert "at least 73 data" in str(unweighed)
    few = comparison(0).assign_attrs(cannot_tell=1, share_left_out=0.25)
    found = conclude([*PASSING, verdict("z", "mean", "cannot tell")], few)
    assert "25% of the data have no reference posterior" in str(found)
    assert conclude([]).status == "cannot tell"


def test_the_advice_for_shared_latents_names_their_own_budget():
    shared = comparison(0).assign_coords(shared_site=("shared_latent", ["w"]))
    found = str(conclude([*PASSING, verdict("w", "shape", "cannot tell")], shared))
    assert "20,000 draws of the guide" in found
    assert "ESS of 8,000" in found
    assert "128 data" not in found


def test_the_advice_for_single_data_names_more_draws():
    single = verdict("all latents", "single data", "cannot tell")
    found = str(conclude([*PASSING, single], comparison(0)))
    assert "4,000 guide draws for each" in found
    assert "128 data" not in found
    both = str(conclude([*PASSING, single, verdict("z", "mean", "cannot tell")], comparison(0)))
    assert "128 data" in both
