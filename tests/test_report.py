"""Check and report: what they say is what was found, and the page stands on its own for any result."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import xarray as xr
from pyro.nn import PyroModule
from small_checks import CHECKED, SIMULATIONS, build, checked, images, tree

import calibrant as cal
from calibrant.errors import RunError
from calibrant.evaluation import RunResult, compare, report
from calibrant.evaluation.judgements import decisions as judging
from calibrant.evaluation.judgements.conclusion import conclude
from calibrant.evaluation.judgements.wording import number
from calibrant.evaluation.reporting import image_plots, run_plots
from calibrant.evaluation.reporting.tables import setting_rows

GAPS = run_plots.gaps  # before any test replaces it


@pytest.fixture(scope="module")
def full(small_check) -> list[RunResult]:
    """Two models with everything that a run has."""
    history = [{"epoch": i, "train": -100.0 / i, "validation": -90.0 / i, "lr": 1e-3} for i in range(1, 6)]
    config = {
        "data": {"name": "patches", "splits": {"test": 6}},
        "model": {"arguments": {"shape": [1, 5, 5]}},
        "settings": {"epochs": 5},
        "fit": {"elbo": -18.0, "elbo_se": 0.5, "epochs": 5, "stopped": "finished"},
        "versions": {"torch": "9.9.9"},
        "notes": ["a <b>note</b>"],
    }
    return [
        replace(checked(build(name), images()).result, history=history, config=config) for name in ("vae", "ea-vae")
    ]


@pytest.fixture(scope="module")
def page(full, tmp_path_factory) -> str:
    path = report(full, tmp_path_factory.mktemp("report") / "new" / "report.html", "calibrant run vae --set 'a<b'")
    return path.read_text(encoding="utf-8")


def rendered(result: RunResult, tmp_path: Any) -> str:
    return report([result], tmp_path / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags, attributes and text; fails on tags that are not closed in order."""

    void = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_other_file(page):
    tags = Page(page).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    sources = [value for _, attributes in tags for name, value in attributes.items() if name in ("src", "srcset")]
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    targets = {attributes["href"] for tag, attributes in tags if tag == "a"}
    assert targets <= {f"#{attributes['id']}" for _, attributes in tags if "id" in attributes}
    assert "url(" not in page
    assert "@import" not in page


def test_the_page_reads_on_a_phone_and_on_paper(page):
    tags = Page(page).tags
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags
    assert "@media print" in page
    assert "overflow-x: auto" in page
    assert all(attributes.get("alt") for tag, attributes in tags if tag == "img")


def test_every_picture_is_there_and_explained(page):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    # contrast and training once; for both models samples, dictionary, agreement, gaps, worst data, four of ArviZ's,
    # those of the check, and three of the predictive check
    assert len(found) == 2 + 2 * (9 + len(CHECKED) + 3)
    assert page.count("How to read it") >= len(found)
    for encoded in found:
        picture = base64.b64decode(encoded)
        assert picture.startswith(b"\x89PNG")
        width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))
        assert 500 <= width <= 1000
        assert 60 <= height <= 1200


def test_the_conclusion_comes_first_then_the_verdicts(full, page):
    text = re.sub(r"\s+", " ", Page(page).text)
    start = 0
    for result in full:
        found = cal.evaluation.verdicts(result.comparison, result.weights, result.calibration)
        for sentence in conclude(found, result.comparison).sentences:
            start = text.index(sentence.replace("`", ""), start)
        for verdict in (*found, *cal.evaluation.contrast_verdicts(result.contrast)):
            assert start < text.index(verdict.sentence.replace("`", ""), start) < text.index("How to read it")
    assert page.count('<li class="describes">') == sum(
        not verdict.primary
        for result in full
        for verdict in (
            *cal.evaluation.verdicts(result.comparison, result.weights, result.calibration),
            *cal.evaluation.contrast_verdicts(result.contrast),
        )
    )


def test_a_story_of_several_models_comes_before_everything_else(full, tmp_path, bare):
    story = ["The guide of `vae` passes.", "That of `ea-vae` fails.", "A collapsed guide passes <b>too</b>."]
    text = report(full, tmp_path / "report.html", "", story).read_text(encoding="utf-8")
    body = text[text.index("<h1>") :]
    places = [body.index(part) for part in ("guide of <code>vae</code> passes", "fails.", "&lt;b&gt;", "<nav>")]
    assert places == sorted(places)


def test_the_page_states_the_error_rates_of_the_verdicts(page):
    text = re.sub(r"\s+", " ", Page(page).text)
    assert f"at most {judging.FALSE_ALARM:.0%} of checks say so" in text
    assert f"at most 1 check in {1 / judging.FALSE_PASS:,.0f} says so" in text


def test_what_users_wrote_is_escaped(full, tmp_path):
    name = 'my<script>alert(1)</script> $x_1$ & "é".py:Model'
    lone = RunResult(name, full[0].model, full[0].config, full[0].amortized, contrast=full[0].contrast)
    text = rendered(lone, tmp_path)
    assert "<script>" not in text
    assert "<b>note</b>" not in text
    assert name in Page(text).text


def test_the_command_versions_and_settings_are_kept(page):
    text = Page(page).text
    assert "calibrant run vae --set 'a<b'" in text
    assert "torch 9.9.9" in text
    assert "settings: epochs" in text
    assert cal.__version__ in text


def test_nothing_of_matplotlib_is_changed(full):
    before = dict(matplotlib.rcParams), plt.get_backend(), plt.get_fignums()
    run_plots.agreement(full[1])
    run_plots.arviz_pictures(full[1], latents=1)
    assert (dict(matplotlib.rcParams), plt.get_backend(), plt.get_fignums()) == before


@pytest.mark.parametrize("results", [[], None])
def test_no_result_is_an_error(results, tmp_path):
    with pytest.raises(RunError, match="no result"):
        report(results, tmp_path / "report.html")


def test_a_place_that_cannot_be_written_is_an_error(full, tmp_path, bare):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be written"):
        report(full[:1], tmp_path / "file" / "report.html")


def test_the_quantities_of_a_calibration_are_those_found(full, page):
    text = re.sub(r"\s+", " ", Page(page).text)
    row = cal.evaluation.uniformity(full[1].calibration).sel(quantity="log_joint")
    bias, spread = (number(float(row[name]), float(row[f"{name}_se"])) for name in ("bias", "spread"))
    assert f"log_joint{bias}{spread}{float(row['ecdf_difference']):.3f}" in text
    assert f"{SIMULATIONS} data were simulated from the model" in text


def test_remedies_are_told_and_listed(full, tmp_path, bare):
    columns = {
        "gap": [1.0, 0.25, np.nan],
        "gain": [np.nan, 0.75, np.nan],
        "recovered": [np.nan, 0.75, np.nan],
        "sd_error": [0.3, 0.1, np.nan],
        "mean_error": [0.2, 0.1, np.nan],
        "elbo": [-20.0, -19.25, np.nan],
    }
    columns |= {f"{name}_se": [0.01, 0.01, np.nan] for name in columns}
    columns |= {"khat_good": [0.5, 1.0, np.nan], "fails": [3, 1, np.nan], "unclear": [0, 2, np.nan]}
    columns |= {"seconds": [0.0, 7.0, np.nan], "coverage": [0.8, 0.9, np.nan], "reason": ["", "", "no <flow> here"]}
    tried = xr.Dataset(
        {name: ("remedy", np.array(value)) for name, value in columns.items()},
        {"remedy": ["guide", "refined", "full"]},
        {"data": 6, "left_out": 0, "evidence": "exact", "trained_on": "given", "checks": 4, "comparison": ""},
    )
    text = re.sub(r"\s+", " ", Page(rendered(replace(full[0], remedies=tried), tmp_path)).text)
    assert "recovers 75% ± 1% of the gap" in text
    assert re.search(r"guide ?1.00 ± 0.01 ?– ?0.30 ± 0.01 ?0.20 ± 0.01 ?50% ?3 / 0 ?0 ", text)
    assert text.count("no <flow> here") == 2  # in words and in the table


# -- results that lack something ---------------------------------------------------------------------------------------


def test_results_without_reference_or_history(full, tmp_path):
    lone = RunResult("vae", full[0].model, {}, full[0].amortized)
    text = Page(rendered(lone, tmp_path)).text
    assert "nothing: there is no reference posterior" in text
    assert "cannot tell" in text
    assert "were simulated from the model" not in text


@pytest.mark.parametrize(("name", "shape"), [("ppca", (7,)), ("ppca", (3, 4, 5)), ("vae", (4, 6))], ids=str)
def test_data_of_any_shape(name, shape, tmp_path, quick, small_check):
    data = images(shape=shape)
    result = checked(build(name, shape=list(shape)), data)
    text = rendered(result.result, tmp_path)
    Page(text)
    assert ('alt="Columns of the decoder"' in text) == (len(shape) > 1)
    assert (result.result.contrast is not None) == (len(shape) > 1)


@pytest.mark.parametrize("failed", [2, 6])
def test_a_reference_that_fails_for_some_data_or_for_all(full, failed, tmp_path, quick):
    result = full[0]
    reference = result.reference.copy(deep=True)
    gate = reference["convergence"].to_dataset()
    reason = np.array(["R-hat <1.2> of `z[1]`"] * failed + [""] * (6 - failed))
    reference["convergence"] = xr.DataTree(gate.assign(is_reference=("data", reason == ""), reason=("data", reason)))
    partial = replace(result, reference=reference, comparison=compare(result.amortized, reference), contrast=None)
    text = re.sub(r"\s+", " ", Page(rendered(partial, tmp_path)).text)
    assert f"{6 - failed} of 6 data have a reference posterior" in text
    assert "R-hat <1.2> of z[1]" in text
    assert "datum 101" in text
    assert "cannot tell" in text
    assert "The root mean square of x is" in text


def test_gaps_are_those_found_and_say_what_is_not_known(full, tmp_path, bare):
    text = re.sub(r"\s+", " ", Page(rendered(full[0], tmp_path)).text)
    split = full[0].gap
    for name, words in (("gap", "together"), ("approximation", "approximation"), ("amortization", "amortization")):
        assert f"{words}{float(split[name].mean()):.2f} ± " in text
        assert f"{float(split[name].median()):.2f} (" in text
    assert "Known for 6 of 6 data (log p(x): exact)." in text
    some = split.where(split["data"] > 102)
    some["method"], some["reason"] = split["method"], ("data", np.array(["too <far>"] * 3 + [""] * 3))
    text = re.sub(r"\s+", " ", Page(rendered(replace(full[0], gap=some), tmp_path)).text)
    assert "Known for 3 of 6 data" in text
    assert "for the first of them: too <far>." in text
    none = replace(full[0], gap=some.where(False).assign(method=some["method"], reason=some["reason"]))
    assert GAPS(full[0]) is not None
    assert GAPS(none) is None
    assert "Known for 0 of 6 data" in re.sub(r"\s+", " ", Page(rendered(none, tmp_path)).text)


class Hierarchical(PyroModule):
    """A shared mean over scalar latents."""

    def forward(self, size: int) -> None:
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))


def test_shared_latents_and_labels_that_are_text(tmp_path):
    amortized, reference = tree(0, "amortized"), tree(1, "nuts")
    result = RunResult("Hierarchical", Hierarchical(), {}, amortized, reference, compare(amortized, reference))
    text = Page(rendered(result, tmp_path)).text
    assert all(f"{name}: " in text for name in ("centre", "z"))
    assert "3 of 3 data have a reference posterior" in re.sub(r"\s+", " ", text)


# -- what the pictures pick --------------------------------------------------------------------------------------------


def test_the_worst_and_the_typical_datum_are_those(full):
    comparison = full[0].comparison.copy(deep=True)
    comparison["mean_error"][:] = 0.0
    comparison["sd_ratio"][:] = 1.0
    comparison["mean_error"][4, 1] = -3.0
    comparison["sd_ratio"][2, 0] = 0.1
    comparison["sd_ratio"][5, 2] = 1.5
    score = run_plots.scores(comparison)
    assert score.max("latent").values == pytest.approx([0, 0, np.log(10), 0, 3, np.log(1.5)])
    assert run_plots.typical_datum(comparison) in comparison["data"].values[[0, 1, 3]]


def test_draws_of_single_latents():
    values = np.arange(2 * 3 * 2 * 2 * 2, dtype=float).reshape(2, 3, 2, 2, 2)
    posterior = xr.Dataset({"z": (("chain", "draw", "data", "a", "b"), values)}, {"chain": [0, 1], "draw": [0, 1, 2]})
    found = run_plots.scalar_draws(
        xr.DataTree.from_dict({"/posterior": posterior.assign_coords(data=["u", "v"])}), "v", ["z[1,0]"]
    )
    np.testing.assert_array_equal(found["z[1,0]"].values, values[:, :, 1, 1, 0])


@pytest.mark.parametrize(
    ("shape", "image"),
    [
        ((2, 1, 8, 8), (2, 8, 8)),
        ((2, 8, 8), (2, 8, 8)),
        ((2, 3, 8, 8), (2, 8, 8, 3)),
        ((2, 64), None),
        ((2, 4, 8, 8), None),
    ],
)
def test_what_is_an_image(shape, image):
    found = image_plots.as_images(np.zeros(shape))
    assert (None if found is None else found.shape) == image


def test_settings_name_the_data_of_a_check_that_had_others():
    config = {"data": {"path": "train.npz"}, "checked": {"data": "other.npz"}}
    assert ("check: data", "other.npz") in setting_rows(config)
    assert setting_rows(config | {"checked": {"data": "train.npz"}}) == [("data: path", "train.npz")]
