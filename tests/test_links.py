"""Links between README and the pages of docs lead somewhere, as they stand in the repository.

`docs/check_site.py` follows the links of the site; here are those that a reader follows where the code is hosted.
"""

import re
from pathlib import Path

import pytest
from site_pages import exists

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")])
    if not {"_build", "reference"} & set(page.parts)
]
LINK = re.compile(r"\[[^]]*\]\((?!\w+:)([^)\s]+)\)")


def without_code(text: str) -> str:
    """A page without its blocks of code, and without the brackets of code in its sentences."""
    sentences = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`([^`\n]*)`", lambda found: re.sub(r"[\[\]()]", "", found[1]), sentences)


def places(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts and the site name them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M), re.M)
    words = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings)
    return {heading.strip().lower().replace(" ", "-") for heading in words}


def dead_links(page: Path, text: str) -> list[str]:
    """The links of a text, standing at the place of a page, that lead nowhere."""
    dead = []
    for link in LINK.findall(without_code(text)):
        file, _, place = link.partition("#")
        target = (page.parent / file) if file else page
        if not exists(target) or (place and target.suffix == ".md" and place not in places(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_dead_links_are_seen():
    page = ROOT / "docs/checks.md"
    good = (
        "[a](guides.md) [b](#what-is-asked) [c](glossary.md#k-hat) [`d`](../examples/sparse_coding.py) `[e](gone.md)` "
        "[f](reference/commands.md)"
    )
    assert dead_links(page, good) == []
    bad = "[a](gone.md) [b](#gone) [c](glossary.md#gone) [`d`](../examples/gone.py) [e](reference/gone.md)"
    assert dead_links(page, bad) == ["gone.md", "#gone", "glossary.md#gone", "../examples/gone.py", "reference/gone.md"]
