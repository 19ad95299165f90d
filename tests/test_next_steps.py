"""After a check: every failure has a remedy, and the line to paste does what it says."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checks import build, checked, images
from typer.testing import CliRunner

import calibrant as cal
from calibrant import cli, workflow
from calibrant.evaluation import RunResult, Verdict, report
from calibrant.evaluation.judgements.against_reference import COMPARED
from calibrant.evaluation.judgements.on_averaging import AVERAGED
from calibrant.evaluation.judgements.on_misreading import MISREAD
from calibrant.evaluation.judgements.on_probabilities import PREDICTED, SCORE
from calibrant.evaluation.remedying.commands import checking_line, training_line
from calibrant.evaluation.remedying.failures import FAILURES, what_helps
from calibrant.evaluation.remedying.next_steps import concluded
from calibrant.evaluation.reporting import page as reporting
from calibrant.settings import Request

PAGE = Path(__file__).parents[1] / "docs/failed-check.md"
REQUEST: dict[str, Any] = {
    "models": ["ea-vae"],
    "data": "digits",
    "data_root": None,
    "data_options": {"size": 6},
    "site": {},
    "arguments": {"latents": 8, "prior": "laplace"},
    "asked": {"epochs": 3, "family": {"scale": "gamma"}},
    "quick": False,
}


def verdict(quantity: str, status: str = "fail", effect: float = 0.4) -> Verdict:
    primary = quantity not in (AVERAGED, MISREAD)
    return Verdict("z", quantity, status if primary else "describes", effect, 0.01, 0.1, "said", primary)


@pytest.fixture(scope="module")
def lone() -> RunResult:
    """A model with linear Gaussian structure and draws of its guide, and nothing else."""
    model, data = build("ea-vae"), images()
    guide = cal.guides.amortize(model, data).eval()
    amortized = cal.inference.posterior(model, guide, data, draws=50)
    return RunResult("ea-vae", model, {"guide": guide.spec}, amortized)


# -- every failure has a remedy ----------------------------------------------------------------------------------------


def test_every_question_has_a_remedy():
    others = ("evidence gap", "k-hat", "log joint", "log likelihood", "ranks", AVERAGED, MISREAD, *PREDICTED)
    assert set(FAILURES) == {*COMPARED, *others}


@pytest.mark.parametrize("quantity", FAILURES)
def test_a_failing_card_ends_in_a_remedy(quantity, lone, tmp_path, bare, monkeypatch):
    with_it = {
        AVERAGED: [verdict("sd")],
        MISREAD: [verdict("sd")],
        **{name: [verdict(SCORE, "pass")] for name in PREDICTED},
    }
    found = [verdict(quantity), *with_it.get(quantity, [])]
    monkeypatch.setattr(reporting, "verdicts", lambda *given: found)
    text = report([lone], tmp_path / "report.html").read_text(encoding="utf-8")
    answer, judged = (part.rstrip() for part in re.findall(r'<div class="card">(.*?)\n</div>', text, re.DOTALL))
    assert re.search(r"<strong>Next\.</strong> \S.*</p>\s*<pre>\S.*</pre>$", answer, re.DOTALL)
    assert judged.endswith("</ul>")
    helps = re.sub(r"<.*?>", "", judged.rpartition("What helps")[2])
    assert FAILURES[quantity].helps.replace("`", "").replace('"', "&#34;") in helps


def test_what_passes_needs_no_remedy():
    assert what_helps([verdict("sd", "pass"), verdict("k-hat", "cannot tell")]) == []
    several = what_helps([verdict("sd"), verdict("coverage"), verdict("mean")])
    assert [sentence.partition("(For: ")[2] for sentence in several] == [
        "posterior sds, intervals.)",
        "posterior means.)",
    ]


def test_the_page_says_what_the_code_says():
    page = PAGE.read_text(encoding="utf-8").partition("## Every kind of failure")[2]
    sections = dict(re.findall(r"### (.*?)\n\n(.*?)(?=\n### |\Z)", page, re.DOTALL))
    assert [heading.partition(":")[0] for heading in sections] == list(FAILURES)
    for section, failure in zip(sections.values(), FAILURES.values(), strict=True):
        means, example, helps = section.strip().split("\n\n")
        assert means == failure.means
        assert example.startswith("> ")
        assert helps == f"**What helps.** {failure.helps}"


@pytest.mark.slow
def test_the_remedy_of_the_page_works_when_it_is_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, third = re.findall(r"```{code-cell} ipython3\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(first + second, names)
    found = names["found"]
    assert found.conclusion.status == "fail"
    assert {"correlation"} <= {v.quantity for v in found.verdicts if v.status == "fail"}
    assert "exec(found.conclusion.next_line)" in third
    exec(found.conclusion.next_line, names)
    after = cal.evaluation.check(names["model"], names["guide"], names["data"])
    assert after.conclusion.status == "pass"


# -- the next line -----------------------------------------------------------------------------------------------------


def parsed(line: str, monkeypatch: pytest.MonkeyPatch) -> Request:
    """The request that a command line makes, without running it."""
    made: list[Request] = []

    def take(request: Request, *given: Any) -> None:
        made.append(request)
        raise KeyboardInterrupt

    for name in ("run", "check_run"):
        monkeypatch.setattr(workflow, name, take)
    program, *arguments = shlex.split(line)
    assert program == "calibrant"
    CliRunner().invoke(cli.app, arguments)
    assert made, f"{line} is refused"
    return made[0]


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"family": "flow", "lr": 0.01, "seed": 3},
        {"family": {"scale": "gamma", "z": "dense"}, "remedies": True},
        {"encoder": {"name": "mlp", "width": 64}, "objective": "dreg"},
        {"encoder": "mlp", "held_out": 12},
    ],
    ids=str,
)
def test_a_training_line_makes_the_same_request(asked, monkeypatch):
    request = {**REQUEST, "asked": asked, "site": {"x": "x"}}
    found = parsed(training_line(request), monkeypatch)
    assert found.models == ("ea-vae",)
    for name in ("data", "data_options", "site", "arguments"):
        assert getattr(found, name) == request[name]
    assert found.settings == asked


def test_a_checking_line_names_the_files_of_the_user_again(tmp_path, monkeypatch):
    own = {**REQUEST, "models": ["my file.py:Mine"], "data": "my file.py:load"}
    found = parsed(checking_line(tmp_path, own, draws=200), monkeypatch)
    assert (found.out, found.models, found.data) == (tmp_path, ("my file.py:Mine",), "my file.py:load")
    assert found.settings == {"draws": 200}
    registered = parsed(checking_line(tmp_path, REQUEST, remedies=True), monkeypatch)
    assert (registered.models, registered.data) == ((), None)


def next_of(result: RunResult, *quantities: str, status: str = "fail", **config: Any) -> str:
    changed = replace(result, config={**result.config, **config})
    line = concluded(changed, [verdict(quantity, status) for quantity in quantities]).next_line
    if not line.startswith("calibrant "):
        compile(line, "the next line", "exec")
    return line


def test_a_quick_run_is_run_in_full_first(lone):
    line = next_of(lone, "sd", request={**REQUEST, "quick": True})
    assert line == training_line(REQUEST)
    assert "--quick" not in line


def test_a_missing_dependency_needs_a_structure_however_long_the_training(lone):
    rising = {"fit": {"stopped": "still rising", "epochs": 3}}
    line = next_of(lone, "correlation", "mean", request=REQUEST, **rising)
    assert "--structure collapsed" in line
    assert "--family" not in line, "families of latents that a collapsed guide does not learn would be refused"
    assert "--epochs 6" in next_of(lone, "sd", request=REQUEST, **rising)
    assert "--structure collapsed" in next_of(lone, "sd", request=REQUEST)
    assert "remedies" in next_of(lone, "mean", request=REQUEST)


def test_a_guide_that_was_hardly_trained_is_trained_first(lone):
    asked = {**REQUEST, "asked": {**REQUEST.get("asked", {}), "epochs": 1}}
    once = {"fit": {"stopped": "finished", "epochs": 1}}
    line = next_of(lone, "mean", request=asked, **once)
    assert line.startswith("calibrant run ")
    assert "--epochs" not in line
    assert "remedies" in next_of(lone, "mean", request=asked, fit={"stopped": "finished", "epochs": 20})


def test_trying_remedies_says_what_it_takes_and_where_the_training_is_not_known_that_it_comes_first(lone):
    def sentence(**config: Any) -> str:
        return concluded(replace(lone, config={**lone.config, **config}), [verdict("mean", "fail")]).remedy

    assert "minutes" in sentence()
    assert "few epochs" in sentence()
    assert "few epochs" not in sentence(request=REQUEST, fit={"stopped": "finished", "epochs": 20})


def test_a_check_that_tries_remedies_takes_the_settings_of_the_last_one_and_prints_what_it_finds(lone):
    line = next_of(lone, "mean", settings={"draws": 500, "chains": 4, "warmup": 150, "simulations": 2000, "seed": 0})
    assert line == (
        "found = cal.evaluation.check(model, guide, data, draws=500, warmup=150, remedies=True); print(found)"
    )


def test_remedies_that_did_not_help_are_not_tried_again(lone, monkeypatch):
    monkeypatch.setattr("calibrant.evaluation.remedying.next_steps.helpful", lambda remedies: None)
    line = next_of(replace(lone, remedies=_compared()), "mean")
    assert line == "post = cal.inference.reference(model, data)"


def test_a_guide_with_the_richest_structure_is_not_told_to_take_it(lone):
    for structure in ("collapsed",):
        line = next_of(lone, "correlation", request=REQUEST, guide={"structure": structure})
        assert "--structure" not in line
        assert "remedies=True" in line


def test_in_python_the_lines_are_python(lone):
    line = next_of(lone, "correlation")
    assert line.startswith('guide = cal.guides.amortize(model, train, "collapsed"); cal.inference.fit(model')
    names: dict[str, Any] = {"cal": cal, "model": lone.model, "train": images(40)}
    short = line.replace("guide, train)", "guide, train, epochs=1)")
    exec(short, names)
    assert names["guide"].spec["structure"] == "collapsed"
    assert next_of(lone, AVERAGED, "sd") == "cal.inference.fit(model, guide, train)"


def test_where_a_collapsed_guide_is_exact_nothing_is_trained(lone):
    model, data = build("vae"), images()
    guide = cal.guides.amortize(model, data).eval()
    result = replace(lone, model=model, amortized=cal.inference.posterior(model, guide, data, draws=50))
    line = next_of(result, "correlation")
    assert line == 'guide = cal.guides.amortize(model, train, "collapsed")'


def test_the_remedy_that_helped_comes_first(lone, monkeypatch):
    from calibrant.evaluation.remedying import next_steps

    for best, words in {
        "refined": "guide = cal.guides.refine(model, guide, data)",
        "resampled": "cal.inference.importance(",
        "full": "--structure full",
        "full, flow": "--family scale=flow",
        "collapsed": "--structure collapsed",
    }.items():
        monkeypatch.setattr(next_steps, "helpful", lambda remedies, best=best: best)
        assert words in next_of(lone, "sd", request=REQUEST)


def test_an_open_question_is_decided_by_a_larger_check(small_check, tmp_path):
    result = checked(build("vae"), images()).result
    line = next_of(result, "sd", status="cannot tell")
    assert "draws=1000, simulations=2000" in line
    assert "128 data or more" in line
    inside = replace(result, folder=tmp_path)
    shell = next_of(inside, "sd", status="cannot tell", request=REQUEST)
    assert shell == f"calibrant check {tmp_path} --held-out 128 --draws 1000 --simulations 2000"
    assert "draws=4000" in next_of(result, "single data", status="cannot tell")
    left = result.comparison.assign_attrs(cannot_tell=1, share_left_out=0.5)
    longer = next_of(replace(result, comparison=left), "sd", status="cannot tell")
    assert "warmup=2000" in longer


def test_a_pass_says_how_to_use_the_guide(lone, tmp_path):
    changed = replace(lone, folder=tmp_path, config={**lone.config, "request": {**REQUEST, "models": ["m.py:Mine"]}})
    passing = [verdict(quantity, "pass", 0.0) for quantity in ("sd", "shape")]
    line = concluded(replace(changed, comparison=_compared()), passing).next_line
    assert line.startswith(
        f"import calibrant as cal; model, guide = cal.load({str(tmp_path)!r}, model='m.py:Mine'); post = "
    )
    compile(line, "the next line", "exec")


def _compared() -> Any:
    import xarray as xr

    coords = {"data": np.arange(4), "latent": ["z[0]", "z[1]"]}
    attrs = {"cannot_tell": 0, "n_left_out": 0, "c2st_fdr": 0.1}
    return xr.Dataset({"half_mean_error": ("latent", torch.zeros(2).numpy())}, coords, attrs)
