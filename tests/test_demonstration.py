"""README and docs say of the demonstration what its verdicts say, and a run of it gives these verdicts."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from calibrant import workflow
from calibrant.settings import MODELS, Request, demonstration

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made() -> SimpleNamespace:
    """The functions of docs/make_demo.py."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs/make_demo.py")))


@pytest.fixture(scope="module")
def stored(made: SimpleNamespace) -> dict[str, Any]:
    return json.loads(made.STORED.read_text(encoding="utf-8"))


def answers(content: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    """Member → the answer of its check, and how its model depends on contrast."""
    return {
        name: (of["conclusion"]["status"], [v["status"] for v in of["verdicts"] if v["site"] == "model"])
        for name, of in content["members"].items()
    }


STORY = {"vae": ("pass", ["fail"]), "ea-vae": ("fail", ["pass"]), "ea-vae+collapsed": ("pass", ["pass"])}


def test_pages_have_the_sentences_that_follow_from_the_stored_verdicts(made, stored):
    for page in made.PAGES:
        assert made.text(page, stored) == page.read_text(encoding="utf-8"), "docs/make_demo.py writes them anew"


def test_the_stored_run_is_the_demonstration_and_tells_its_story(made, stored):
    request = demonstration(Request())
    assert stored["made"] == {"data": request.data, "arguments": request.arguments, "asked": {}, "quick": False}
    assert tuple(stored["members"]) == MODELS
    assert answers(stored) == STORY
    first, second, third = made.story(stored)
    assert "the model is flat" in first
    assert "passes the check" in first
    assert 'the remedy to try is `structure="collapsed"`' in second
    assert 'for the same model, a guide with `structure="collapsed"` passes the check' in third


def test_other_verdicts_would_be_seen(made, stored):
    planted = json.loads(json.dumps(stored))
    planted["members"]["vae"]["conclusion"]["status"] = "fail"
    assert any(made.text(page, planted) != page.read_text(encoding="utf-8") for page in made.PAGES)


def test_the_pictures_are_small():
    for name in ("demo.png", "contrast.png"):
        assert (ROOT / "docs" / name).stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demonstration_gives_these_verdicts(made, stored, tmp_path, seed):
    settings = {"seed": seed} if seed else {}
    workflow.run(Request(out=tmp_path / "demo", settings=settings))
    content = made.content(made.load(tmp_path / "demo"))
    assert answers(content) == answers(stored) == STORY
    story = made.story(content)
    for words, told in zip(("the model is flat", 'structure="collapsed"', "passes the check"), story, strict=True):
        assert words in told
    page = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert page.index("the model is flat") < page.index("<nav>")
