"""Notebook manners: objects say in a line what they are, tables are safe HTML, every picture is a method."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from small_checks import build, checked, images
from torch import nn

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation import Check, Conclusion, RunResult, Verdict
from calibrant.evaluation.reporting import page, pictures, run_plots
from calibrant.evaluation.reporting.style import data_uri

LONGEST = 400  # characters of a `repr`


@pytest.fixture(scope="module")
def check(small_check) -> Check:
    return checked(build("ea-vae"), images())


class Table(HTMLParser):
    """Tags and text of a small piece of HTML; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# -- what an object says of itself -------------------------------------------------------------------------------------

X = {"x": torch.randn(40, 1, 5, 5, generator=torch.Generator().manual_seed(0))}


class Encoder(nn.Module):
    features = 4

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return inputs["x"].reshape(len(inputs["x"]), -1)[:, :4]


def guide(name: str = "ea-vae", **options: Any) -> Any:
    return cal.guides.amortize(build(name), X, **options)


def refined() -> Any:
    return cal.guides.refine(build("vae"), guide("vae"), X, steps=1)


SHOWN = {
    "data": (lambda: cal.data.Data({"x": X["x"], "n": np.arange(40)}, name="mine"), ["mine", "40 data", "x (1, 5, 5)"]),
    "covariates": (lambda: cal.data.Data(X, {"k": np.arange(40)}), ["observed: x", "covariates: k () int64"]),
    "splits": (lambda: cal.data.load("digits"), ["train: Data(digits, 1,437 data", "test: Data("]),
    "faithful": (guide, ["faithful", "scale: lognormal", "z (3): normal given scale", "mlp of x", "weights: 1"]),
    "collapsed": (lambda: guide(structure="collapsed"), ["collapsed", "z (3): exact, by the model"]),
    "own encoder": (lambda: guide(encoder=Encoder()), ["Encoder of x"]),
    "from_encoder": (lambda: cal.guides.from_encoder(nn.Linear(4, 6)), ["z: normal", "Linear of x", "weights: 30"]),
    "prior": (lambda: cal.guides.prior(build("vae")), ["the prior of VAE"]),
    "refined": (refined, ["of 40 data", "z (3): moved and scaled", "refines: AmortizedGuide(", "fixed"]),
    "fit": (
        lambda: cal.inference.fit(build("vae"), guide("vae"), X, epochs=2),
        ["held-out ELBO: -", "± ", "nats per datum", "epochs: 2", "train: -", "→", "held out: 4 data"],
    ),
}


@pytest.mark.parametrize("name", SHOWN)
def test_an_object_says_what_it_is_in_a_line_and_in_a_table(name):
    build_one, words = SHOWN[name]
    found = build_one()
    text, page = repr(found), Table(found._repr_html_())
    assert len(text) <= LONGEST
    assert all(word in text for word in words)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    missing = [word for word in re.findall(r"[a-z]{3,}", " ".join(words)) if word not in page.text.lower()]
    assert not [word for word in missing if word not in ("data", "the")]


def test_a_check_and_its_parts_say_what_they_found(check):
    assert repr(check) == f"Check(ea-vae: {check.conclusion.status}; {len(check.verdicts)} verdicts)"
    page = Table(check._repr_html_())
    plain = [sentence.replace("`", "") for sentence in check.conclusion.sentences]
    assert all(sentence in page.text for sentence in plain)
    for verdict in check.verdicts:
        assert verdict.sentence.replace("`", "") in page.text
    deciding = [verdict for verdict in check.verdicts if verdict.primary]
    assert page.tags.count("tr") == len(deciding)
    assert "script" not in page.tags
    assert repr(check.conclusion).startswith(f"Conclusion({check.conclusion.status}: ")
    assert check.conclusion.sentences[0].replace("`", "") in Table(check.conclusion._repr_html_()).text
    assert check.verdicts[0].sentence in repr(check.verdicts[0])
    assert "reference" in repr(check.result)
    assert len(repr(check.result)) < LONGEST


def test_names_are_escaped():
    evil = "<script>alert(1)</script>&\"'"
    result = RunResult(evil, build("vae"), {}, cal.inference.posterior(build("vae"), guide("vae"), X, draws=2))
    verdict = Verdict(evil, "sd", "fail", 0.1, 0.1, 0.1, f"posterior sd of `{evil}`: too small")
    conclusion = Conclusion("fail", [f"Do not trust `{evil}`."])
    shown = (
        Check(result, [verdict], conclusion),
        result,
        verdict,
        conclusion,
        cal.data.Data({evil: X["x"]}, name=evil),
        cal.inference.Fit(kl_weights={evil: [[0, 1.0]]}),
    )
    for one in shown:
        page = Table(one._repr_html_())
        assert "script" not in page.tags
        assert evil in page.text


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_every_picture_of_the_report_is_a_method():
    source = resources.files("calibrant.evaluation.reporting").joinpath("report.html").read_text(encoding="utf-8")
    named = set(re.findall(r"picture\((?:shown\.)?(\w+)", source))
    assert named == set(pictures.NAMES)
    methods = {name.removeprefix("plot_") for name in dir(Check) if name.startswith("plot_")}
    assert methods == set(pictures.NAMES)


@pytest.fixture(scope="module")
def counts(small_check) -> Check:
    """A check of a program whose data are counts and that is not simulated: few pictures."""

    def model(size: int) -> None:
        with pyro.plate("data", size):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("n", dist.Poisson(rate))
            pyro.factor("more", -0.1 * rate)

    data = {"n": torch.arange(6.0)}
    return checked(model, cal.data.Data(data), warmup=100, draws=500, chains=4)


@pytest.mark.parametrize("name", pictures.NAMES)
def test_a_method_draws_what_the_report_draws_or_says_what_is_missing(check, counts, name):
    shown = 0
    for one in (check, counts):
        theirs = pictures.picture(one.result, name)
        if theirs is None:
            with pytest.raises(InferenceError, match=rf"nothing for plot_{name}: .*(give as `\w+`|fit\(\.\.\.\))"):
                getattr(one, f"plot_{name}")()
        else:
            ours = getattr(one, f"plot_{name}")()
            assert isinstance(ours, Figure)
            assert data_uri(ours) == data_uri(theirs)
            shown += 1
    assert shown or name in ("training", "reliability")


def test_the_methods_that_raise_name_arguments_of_check():
    arguments = set(re.findall(r"^ +(\w+): ", cal.evaluation.check.__doc__ or "", re.MULTILINE))
    named = {
        name for needs in (*pictures._NEEDS.values(), pictures._REFERENCE) for name in re.findall(r"`(\w+)`", needs)
    }
    assert named <= arguments


def test_a_fit_draws_its_training_as_the_report_does(check):
    fit = cal.inference.fit(build("vae"), guide("vae"), X, epochs=3)
    assert isinstance(fit.plot(), Figure)
    named = run_plots.training_curves([replace(check.result, name="", history=fit.history)])
    assert named is not None
    assert data_uri(named) == data_uri(fit.plot())
    with pytest.raises(InferenceError, match="1 epoch has no curve"):
        cal.inference.fit(build("vae"), guide("vae"), X, epochs=1).plot()


def test_the_report_and_the_methods_call_the_same_functions(check, quick, monkeypatch, tmp_path):
    seen: list[str] = []
    monkeypatch.setitem(pictures.OF_ONE, "gaps", lambda result: seen.append("gaps"))  # type: ignore[arg-type]
    page.report([check.result], tmp_path / "report.html")
    with pytest.raises(InferenceError, match="plot_gaps"):
        check.plot_gaps()
    assert seen == ["gaps", "gaps"]
    assert run_plots.ARVIZ == ("dist", "forest", "trace", "ecdf_pit")
