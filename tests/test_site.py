"""The documentation site: what its API reference lists, its formulas, its citation, and the check of a built site.

The site itself is built by `make docs`, without warnings; here are its parts, and planted faults that its check sees.
"""

import importlib
import re
import runpy
import sys
import tomllib
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import calibrant

ROOT = Path(__file__).parents[1]
SITE = runpy.run_path(str(ROOT / "docs/check_site.py"))


@pytest.fixture
def extension(monkeypatch):
    """A function that imports a module of docs/_ext."""
    monkeypatch.syspath_prepend(str(ROOT / "docs/_ext"))

    def load(name: str) -> ModuleType:
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


# -- the reference -----------------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference_once(extension):
    api = extension("api_pages")
    listed = Counter(
        name for page in api.pages() for name in re.findall(r"^\.\. (?:auto|py:)\w+:: (\S+)$", api.text(page), re.M)
    )
    facades = [getattr(calibrant, name) for name in calibrant.__all__ if name != "__version__"]
    modules = [part for part in facades if isinstance(part, ModuleType)]
    wanted = {f"calibrant.{name}" for name in calibrant.__all__} - {"calibrant.__version__"}
    for module in modules:
        wanted -= {module.__name__}
        wanted |= {f"{module.__name__}.{name}" for name in getattr(module, "__all__", ())}
    wanted |= {f"calibrant.errors.{name}" for name in ("CalibrantError", "ProgramError", "DataError", "RunError")}
    shown = {name: count for name, count in listed.items() if name not in {module.__name__ for module in modules}}
    assert wanted <= set(shown)
    assert set(shown.values()) - {1} == set(), [name for name, count in shown.items() if count > 1]


def test_a_page_of_the_reference_says_what_each_name_is(extension):
    api = extension("api_pages")
    pages = {page.stem: page for page in api.pages()}
    text = api.text(pages["inference"])
    assert "* - :py:obj:`fit <calibrant.inference.fit>`\n     - Train model and guide in place" in text
    assert text.index("autofunction:: calibrant.inference.fit") < text.index("autoclass:: calibrant.inference.Fit")
    assert "py:data:: calibrant.inference.METHODS\n   :value: ('auto'," in text
    assert "contrast_experiment" in pages["evaluation-images"].names
    assert "contrast_experiment" not in pages["evaluation"].names


def test_every_command_is_in_the_reference(extension):
    text = extension("command_page").text()
    assert re.findall(r"^## (\w+)$", text, re.M) == ["run", "fit", "check", "report", "bench", "list", "reproduce"]
    assert "`calibrant fit [MODEL] [OPTIONS]`" in text
    assert "- `--lr`: Peak learning rate (0.003)" in text


def test_annotations_lead_to_public_names(extension):
    public = extension("api_pages").public_names()
    assert public["calibrant.inference.fitting.state.Fit"] == "calibrant.inference.Fit"
    assert public["calibrant.inference.referencing.reference"] == "calibrant.inference.reference"
    assert all(name.startswith("calibrant.") for name in public)


def test_links_of_included_pages_are_those_of_their_new_place(extension, tmp_path):
    page = tmp_path / "PAGE.md"
    page.write_text("[a](docs/a.md#b) [c](CHANGELOG.md) [d](LICENSE) [e](https://e.org) [f](#f)")
    moved = extension("api_pages").moved(page)
    assert moved == "[a](../a.md#b) [c](changelog.md) [d](../../LICENSE) [e](https://e.org) [f](#f)"


def test_links_to_included_pages_lead_to_their_place_in_the_site(extension):
    source = ["[a](../CHANGELOG.md) [b](../../CONTRIBUTING.md#tests) [c](../examples/a.py)"]
    extension("api_pages").lead_to_included(None, "page", source)
    assert source == ["[a](/reference/changelog.md) [b](/reference/contributing.md#tests) [c](../examples/a.py)"]


def test_indented_formulas_of_docstrings_stand_as_they_are(extension):
    lines = ["With the mean m,", "", "    distance = |m|", "", "Args:", "    x: a number:", "        of anything."]
    extension("api_pages").show_indented(None, "function", "f", None, None, lines)
    assert lines[:5] == ["With the mean m,", "", "::", "", "    distance = |m|"]
    assert lines[5:] == ["", "Args:", "    x: a number:", "        of anything."]


# -- execution, formulas, texts ----------------------------------------------------------------------------------------


def test_pages_are_executed_anew_where_the_code_has_changed(extension, tmp_path):
    execution = extension("execution")
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    before = execution.digest(tmp_path)
    assert execution.digest(tmp_path) == before
    file.write_text("x = 2\n")
    assert execution.digest(tmp_path) != before


def test_the_demonstration_runs_only_for_pages_that_read_it(extension, tmp_path):
    execution = extension("execution")
    page = tmp_path / "page.md"
    page.write_text('cal.load("runs/demo/vae")')
    assert not execution.reads_the_demo(tmp_path)
    page.write_text('---\nfile_format: mystnb\n---\ncal.load("runs/demo/vae")')
    assert execution.reads_the_demo(tmp_path)


def test_the_first_sentence_of_a_page_is_its_summary(extension):
    source = "---\nfile_format: mystnb\n---\n# Title\n\nSays *what* a [page](a.md)\nis. And more.\n\nElse."
    assert extension("llms").first_sentence(source) == "Says what a page is."


def test_the_citation_is_that_of_the_citation_file():
    """Also on the page of the site, which includes it from README."""
    cited = dict(re.findall(r'^(title|version|license): "?(.*?)"?$', (ROOT / "CITATION.cff").read_text(), re.M))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (entry,) = re.findall(r"<!-- bibtex -->\n```bibtex\n@software\{calibrant,\n(.*?)\n\}\n```", readme, re.DOTALL)
    fields = dict(re.findall(r"^  (\w+) = \{+(.*?)\}+,?$", entry, re.M))
    assert fields == {**cited, "author": "The calibrant developers"}
    assert "- name: The calibrant developers" in (ROOT / "CITATION.cff").read_text()
    assert cited["version"] == calibrant.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == cited["license"]


# -- the check of a built site -----------------------------------------------------------------------------------------

GOOD = """<html><head><link rel="stylesheet" href="site.css"><link rel="canonical" href="https://us.org/a.html"></head>
<body><h1 id="top">A</h1><a href="b.html#there">b</a><a href="#top">up</a><a href="https://e.org">e</a>
<img src="data:image/png;base64,AA"><a href="search.html?q=x">s</a></body></html>"""
FAULTS = {
    "a page": ('<a href="c.html">', "c.html leads nowhere"),
    "a place on another page": ('<a href="b.html#gone">', "b.html#gone leads nowhere"),
    "a place on the same page": ('<a href="#gone">', "#gone leads nowhere"),
    "a picture": ('<img src="gone.png">', "gone.png leads nowhere"),
    "a remote script": ('<script src="https://cdn.org/x.js"></script>', "loaded from elsewhere"),
    "a remote picture": ('<img src="//cdn.org/x.png">', "loaded from elsewhere"),
    "a remote style": ('<link rel="stylesheet" href="http://cdn.org/x.css">', "loaded from elsewhere"),
    "a remote font": ("<style>@font-face {src: url('https://cdn.org/f.woff2')}</style>", "loaded from elsewhere"),
    "a remote import": ("<style>@import 'https://cdn.org/f.css'</style>", "loaded from elsewhere"),
    "a remote background": ('<p style="background: url(https://cdn.org/x.png)">', "loaded from elsewhere"),
}


@pytest.fixture
def site(tmp_path):
    (tmp_path / "a.html").write_text(GOOD)
    (tmp_path / "index.html").write_text("<p>Home</p>")
    (tmp_path / "b.html").write_text('<p id="there">B</p>')
    (tmp_path / "search.html").write_text("<p>S</p>")
    (tmp_path / "site.css").write_text("p { color: red; }")
    return tmp_path


def test_a_sound_site_has_no_faults(site):
    assert list(SITE["faults"](site)) == []


@pytest.mark.parametrize(("added", "said"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_seen(site, added, said):
    (site / "a.html").write_text(GOOD.replace("<body>", f"<body>{added}"))
    (fault,) = SITE["faults"](site)
    assert fault.startswith("a.html: ")
    assert said in fault


def test_a_site_that_was_not_built_is_seen(tmp_path):
    (fault,) = SITE["faults"](tmp_path)
    assert "build the site first" in fault


def test_a_remote_font_of_a_style_sheet_is_seen(site):
    (site / "site.css").write_text("@font-face { src: url(https://fonts.org/f.woff2); }")
    assert list(SITE["faults"](site)) == ["site.css: https://fonts.org/f.woff2 is loaded from elsewhere"]
