"""`llms.txt` and `llms-full.txt` of the site: for language models, its pages in one list, and in one text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from api_pages import FOLDER, pages

import calibrant

if TYPE_CHECKING:  # tests use what is here without Sphinx
    from sphinx.application import Sphinx

HEAD = """# calibrant

> {summary}

The same in one file, with the docstrings of all public names: [llms-full.txt](llms-full.txt)
"""


def listed(app: Sphinx) -> Iterator[str]:
    """Names of the documents in the order of the tables of contents."""
    waiting, seen = [app.config.root_doc], set[str]()
    while waiting:
        name = waiting.pop(0)
        if name not in seen:
            seen.add(name)
            yield name
            waiting[:0] = app.env.toctree_includes.get(name, [])


def without_directives(source: str) -> str:
    """A page without its directives for Sphinx: tables of contents, and texts that are included from README."""
    return re.sub(r"^```\{(?:toctree|include)\}.*?^```\n", "", source, flags=re.DOTALL | re.MULTILINE)


def first_sentence(source: str) -> str:
    """The first sentence of a page's first paragraph, without the marks of Markdown."""
    body = re.sub(r"\A---\n.*?\n---\n", "", source, flags=re.DOTALL)
    body = without_directives(body)
    paragraphs = (part.strip() for part in body.split("\n\n"))
    paragraphs = (part for part in paragraphs if part[:1].isalpha() or (part[:1] in "*`[“" and part[:3] != "```"))
    text = " ".join(next(paragraphs, "").split())
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", lambda found: found[1] or "", text)
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0].rstrip(":")


def summary(app: Sphinx) -> str:
    """`llms.txt`."""
    lines = [HEAD.format(summary=(calibrant.__doc__ or "").strip())]
    for name in list(listed(app))[1:]:
        source = Path(app.env.doc2path(name)).read_text(encoding="utf-8")
        said = "" if name.startswith(f"{FOLDER}/") else first_sentence(source)
        title = app.env.titles[name].astext()
        lines.append(f"- [{title}]({app.builder.get_target_uri(name)})" + (f": {said}" if said else ""))
    return "\n".join(lines) + "\n"


def whole(app: Sphinx) -> str:
    """`llms-full.txt`: README, the sources of all pages, then signature and docstring of every public name."""
    names = (name for name in list(listed(app))[1:] if not name.startswith(f"{FOLDER}/"))
    files = [Path(app.srcdir).parent / "README.md", *(Path(app.env.doc2path(name)) for name in names)]
    texts = [without_directives(file.read_text(encoding="utf-8")).strip() for file in files]
    for page in pages():
        for name in page.names:
            part = getattr(page.module, name)
            signature = str(inspect.signature(part)) if inspect.isroutine(part) else ""
            texts.append(f"## {page.module.__name__}.{name}{signature}\n\n{inspect.getdoc(part) or ''}".strip())
    return "\n\n\n".join(texts) + "\n"


def write(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.format == "html":
        (Path(app.outdir) / "llms.txt").write_text(summary(app), encoding="utf-8")
        (Path(app.outdir) / "llms-full.txt").write_text(whole(app), encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("build-finished", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
