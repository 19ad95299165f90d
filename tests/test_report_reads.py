"""How a report reads: counts of one, numbers with errors, no raw values, no empty section, 390 pixels."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from small_checks import build, checked, images

from calibrant.evaluation import RunResult
from calibrant.evaluation.judgements.wording import counted, number, percent
from calibrant.evaluation.reporting.formulas import model_formula
from calibrant.program import as_program

CONFIG = {
    "data": {"name": "patches", "splits": {"test": 6}},
    "model": {"arguments": {"shape": [1, 5, 5], "scale": None}},
    "settings": {"epochs": 1, "family": {"z": "normal"}},
    "fit": {"elbo": -18.0, "elbo_se": 1e-9, "epochs": 1, "stopped": "finished"},
}


@pytest.fixture(scope="module")
def results(small_check) -> dict[str, RunResult]:
    """A check of several images and of one, and a run from the command line."""
    several = checked(build("ea-vae"), images(), remedies=False).result
    run = {**several.config, **CONFIG}
    return {"python": several, "run": replace(several, config=run), "one": checked(build("vae"), images(1)).result}


@pytest.fixture(scope="module", params=["python", "run", "one"])
def page(request, results, tmp_path_factory) -> str:
    from calibrant.evaluation import report

    path = report([results[request.param]], tmp_path_factory.mktemp("report") / "report.html")
    return path.read_text(encoding="utf-8")


def words(page: str) -> str:
    """The text of a page, without its style and its pictures."""
    body = re.sub(r"<pre>.*?</pre>", "", page[page.index("<body>") :], flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", body)))


def test_no_error_is_nothing_and_no_value_is_raw(page):
    text = words(page)
    assert not re.search(r"± 0\.?0*(?![\d.])", text), re.findall(r".{30}± 0\.?0*(?![\d.]).{10}", text)
    assert "-0.00" not in text
    assert not re.search(r"[{}]|\bNone\b|\bnull\b|\bnan\b|True|False", text)


def test_counts_of_one_read_right(page):
    text = words(page)
    assert not re.findall(r".{40}\b1 (?:data|epochs|chains|latents|pairs|questions|draws|images)\b", text)
    assert "all of the 1" not in text


def test_no_section_is_empty(page):
    body = re.sub(r"\s+", " ", page[page.index("<body>") :])
    assert not re.search(r"</h[234]>\s*</(section|div)", body)
    assert all(first < second for first, second in re.findall(r"</h([1234])>\s*<h([1234])", body))
    assert not re.search(r"<(p|pre|li|dd|td|ul|details|summary)[^>]*>\s*</\1>", body.replace("<td></td>", ""))
    again = body[body.index('id="again"') :]
    assert re.search(r"<pre>\S", again)


def test_the_first_screen_says_what_against_what_and_what_next(page):
    card = page[page.index('<section id="answer">') : page.index("<nav>")]
    assert re.findall(r"<dt>(.*?)</dt>", card) == ["Checked", "Model", "Guide", "Compared with"]
    assert "z ~ Normal(3)" in card
    assert "known by quadrature" in card or "known in closed form" in card
    assert "<strong>Next.</strong>" in card
    assert "A guide is the network that returns a posterior for a datum" in page[: page.index('<section id="answer">')]


@pytest.mark.parametrize("term", ["k-hat", "The log joint is", "The ELBO is"])
def test_a_word_is_explained_once_where_it_first_stands(term, page):
    text = words(page[: page.index('id="training"')] if 'id="training"' in page else page)
    explanation = {"k-hat": "k-hat measures how unequal"}.get(term, term)
    assert words(page).count(explanation) == 1
    word = term.removeprefix("The ").removesuffix(" is")
    assert text.index(explanation) - text.index(word) < 500, "the explanation follows the sentence with the word"


def test_numbers_side_by_side_are_of_the_same_data(results, tmp_path):
    from calibrant.evaluation.reporting.tables import number_rows, training_rows

    numbers = dict(number_rows(results["run"]))
    assert [name for name in numbers if "ELBO" in name] == ["ELBO of the same data"]
    assert not any("validation" in name for name in numbers)
    ((_, trained),) = training_rows([results["run"]])
    assert trained == "1 epoch; ELBO of the validation data −18.0000 ± less than 0.0001 nats per datum"


def test_numbers_and_counts_in_words():
    assert number(1.234, 0.0321) == "1.23 ± 0.03"
    assert number(-1.234, 1e-9) == "−1.2340 ± less than 0.0001"
    assert number(-1e-9, 1e-9) == "0.0000 ± less than 0.0001"
    assert number(1.0, 0.0) == "1.00"
    assert number(1.0, float("nan")) == "1.00"
    assert percent(0.1234, 0.0321) == "12% ± 3%"
    assert percent(-0.1234, 1e-7) == "−12.34% ± less than 0.01%"
    assert (counted(1), counted(1200), counted(1, "epoch", "epochs")) == ("1 datum", "1,200 data", "1 epoch")


# -- 390 pixels --------------------------------------------------------------------------------------------------------


def test_what_is_wide_scrolls_in_a_box_of_its_own(page):
    assert page.count("<table") == page.count('<div class="scroll"><table')
    style = page[page.index("<style>") : page.index("</style>")]
    image = re.search(r"figure img \{(.*?)\}", style)
    assert image is not None
    assert "min-width" not in image[1]
    assert "width: 100%" in image[1]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_nothing_is_wider_than_390_pixels(page, tmp_path):
    script = "document.title = this.contentDocument.documentElement.scrollWidth"
    frame = (
        f'<iframe srcdoc="{html.escape(page)}" style="width:390px;height:900px;border:0" onload="{script}"></iframe>'
    )
    (tmp_path / "frame.html").write_text(f"<!DOCTYPE html><title></title>{frame}", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    address = (tmp_path / "frame.html").as_uri()
    found = subprocess.run(["chromium", *options, address], capture_output=True, text=True, timeout=60, check=True)
    title = re.search(r"<title>(\d+)</title>", found.stdout)
    assert title is not None
    assert int(title[1]) <= 390


# -- sentences that readers stumbled over ------------------------------------------------------------------------------

STUMBLED = (
    "visibly",
    "as far as its own weights",
    "own weights show it",
    "data that the model makes",
    "from datum to datum 0",
    "settle k-hat",
    "all of the 1",
    ": of the draws",
    "has no say",
    "left out of account",
    "without a word",
    "what is of all",
    "what others mean says",
    "is not plain from",
    "shall fall to zero",
    "with the keys of these",
    "in the log joint what an error",
    "in one or more of its entries",
)


@pytest.mark.parametrize("words", STUMBLED)
def test_no_sentence_that_readers_stumbled_over_comes_back(words):
    root = Path(__file__).parents[1]
    files = [
        root / "README.md",
        *(root / "src").rglob("*.py"),
        *(root / "src").rglob("*.html"),
        *(root / "docs").glob("*.md"),
    ]
    assert [str(file.relative_to(root)) for file in files if words in file.read_text(encoding="utf-8").lower()] == []


def encoder_as_prior(size, image, mask):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(image.mean(1), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).mask(mask))


def test_the_formula_of_a_model_gives_covariates_to_the_sites_that_depend_on_them():
    covariates = {"image": torch.tensor([[0.0, 1.0], [2.0, 3.0]]), "mask": torch.tensor([True, False])}
    found = model_formula(as_program(encoder_as_prior), {"x": torch.tensor([0.5, 2.0])}, covariates)
    assert found == "z | image ~ Normal, x | z, mask ~ Normal"
