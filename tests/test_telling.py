"""The story of a run: its sentences follow from the verdicts, whatever they are."""

from __future__ import annotations

import itertools
import re

import pytest
from test_contrast_verdicts import curves

from calibrant.evaluation.judgements.conclusion import Conclusion, conclude
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.on_contrast import contrast_verdicts
from calibrant.settings import MODELS
from calibrant.workflow.telling import sentence

REMEDY = ("Train a guide with a richer structure, and check it:", "calibrant run ea-vae --structure collapsed")
NEXT = {
    "pass": ("Use its posterior draws for data like these:", "post = cal.inference.posterior(model, guide, new_data)"),
    "fail": REMEDY,
    "cannot tell": ("Use more data and draws:", "calibrant check runs/demo/ea-vae --draws 2000"),
}
COURSE = {  # status and change of the exact sd from the lowest to the highest contrast → what the sentence says
    None: None,
    ("pass", -0.6): "the model does what it should (its exact posterior sd falls by 60% of the prior sd as contrast",
    ("fail", -0.0001): "the model is flat (its exact posterior sd does not depend on contrast)",
    ("fail", -0.01): "the model is flat (its exact posterior sd hardly depends on contrast)",
    ("fail", 0.3): "the model is wrong",
    ("fail", -0.3): "the model is wrong",
    ("cannot tell", -0.3): "cannot be told",
}


def verdicts(status, course, at_contrasts):
    """Verdicts of a check with this answer, on a model with this course, whose guide does this at other contrasts."""
    found = [
        Verdict("scale", "sd", status, -0.3, 0.01, 0.1, "posterior sd of `scale`: some words"),
        Verdict("z", "mean", "pass", 0.0, 0.01, 0.1, "posterior mean of `z`: right"),
    ]
    if course is not None:
        found.append(Verdict("model", "contrast", *course, 0.01, 0.05, "model: some words", primary=False))
        words = "guide: its posterior sd is too large by up to 69% at contrast 10"
        found.append(Verdict("guide", "posterior_sd", at_contrasts, 0.69, 0.01, 0.1, words, primary=False))
    return found


OFF = "its posterior sd is too large by up to 69% at contrast"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("status", NEXT)
def test_the_sentence_says_what_the_verdicts_say(status, name):
    """For every course of the model, with every guide over contrasts, in a run with and without the same model."""
    for course, at_contrasts, names in itertools.product(COURSE, NEXT, (MODELS, (name,))):
        conclusion = Conclusion(status, ["Words."], *NEXT[status])
        told = sentence(name, verdicts(status, course, at_contrasts), conclusion, names)
        assert told.startswith(f"`{name}`: ")
        assert told.endswith(".")
        assert not re.search(r"\. [A-Z]|\.\.|  |None|nan", told), "one sentence"
        is_further = name == "ea-vae+collapsed" and len(names) > 1
        assert ("for the same model" in told) == is_further
        of_guide(told, status, course is not None and at_contrasts == "fail")
        of_model(told, status, None if is_further else course)


def of_guide(told, status, is_off):
    assert ("passes the check" in told) == (status == "pass")
    assert ("fails 1 of 2 questions (posterior sd of `scale`: some words)" in told) == (status == "fail")
    assert ("could not be judged" in told) == (status == "cannot tell")
    assert ('the remedy to try is `structure="collapsed"`' in told) == (status == "fail")
    assert ("what to do next: use more data and draws" in told) == (status == "cannot tell")
    assert (f"not at every contrast ({OFF} 10)" in told) == (is_off and status == "pass")
    assert (f"some words), and {OFF} 10; the remedy" in told) == (is_off and status == "fail")
    assert ("agrees with the exact posterior" in told) == (status == "pass" and not is_off)


def of_model(told, status, course):
    assert {words for words in COURSE.values() if words is not None and words in told} == {COURSE[course]} - {None}
    if course is not None:
        agree = (status == "pass") == (course[0] == "pass")
        assert (", and its guide" in told) == agree
        assert (", but its guide" in told) != agree


def test_a_quick_run_is_told_to_be_one():
    line = ("Train and check it in full, since the guide of a quick run is hardly trained:", "calibrant run ea-vae")
    told = sentence("ea-vae", verdicts("fail", ("pass", -0.5), "fail"), Conclusion("fail", [], *line), MODELS)
    assert told.endswith("next: train and check it in full, since the guide of a quick run is hardly trained.")


def test_a_guide_without_a_reference_is_not_said_to_lack_draws():
    found = [Verdict("all latents", "k-hat", "pass", 0.0, 0.01, 0.1, "importance weights are reliable")]
    open_ = conclude(found)
    assert open_.status == "cannot tell"
    told = sentence("gsm", found, open_, MODELS)
    assert "could not be judged: no question fails, but without a reference posterior, errors" in told
    assert "more data or draws" not in told


def test_predictions_are_not_said_to_agree_with_a_posterior():
    found = [Verdict("y", "confidence", "pass", 0.0, 0.01, 0.15, "the predictions are as confident as they are right")]
    told = sentence("classifier", found, Conclusion("pass", ["Words."], *NEXT["pass"]), MODELS)
    assert told == "`classifier`: the guide passes the check: its predicted probabilities agree with the observations."


@pytest.mark.parametrize(
    ("curve", "se", "words"),
    [
        ([0.5, 0.4, 0.3, 0.4, 0.5], 1e-3, "the model is wrong"),
        ([0.5, 0.6, 0.7, 0.6, 0.51], 1e-3, "the model is wrong"),
        ([0.5] * 5, 1e-9, "the model is flat"),
        ([0.54, 0.47, 0.5, 0.5, 0.47], 0.0095, "the model is flat"),
    ],
)
def test_a_curve_that_comes_back_is_not_flat(curve, se, words):
    """The last one varies by 0.07, more than the margin, and no more than its errors."""
    found = contrast_verdicts(curves(curve, curve, se=2 * se))  # the mean of four images
    assert found[0].status == "fail"
    assert words in sentence("gsm", found, Conclusion("pass", ["Words."], *NEXT["pass"]), MODELS)
