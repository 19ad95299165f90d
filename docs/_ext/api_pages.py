"""Pages of the API reference, written into docs/reference before Sphinx reads the sources: a page a facade.

What is public follows from each facade's `__all__`, so that a new name needs no entry here. `evaluation` is divided by
the rooms that its names come from.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import command_page

if TYPE_CHECKING:  # tests use what is here without Sphinx
    from docutils import nodes
    from sphinx.addnodes import pending_xref
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

FOLDER = "reference"
# Parts of `calibrant.evaluation` with a page of their own: page → (title, where their names come from, what it is).
ROOMS = {
    "evaluation-images": (
        "images",
        "calibrant.evaluation.uncertainty.",
        "Experiments on images: how posteriors change with contrast, corruption, kind and label of an image.",
    ),
    "evaluation-representations": (
        "representations",
        "calibrant.evaluation.representations.",
        "Metrics of representations with uncertainties, and what these are good for.",
    ),
    "evaluation-pictures": (
        "pictures",
        "calibrant.evaluation.reporting.",
        "The report, and the pictures of results.",
    ),
}
INCLUDED = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}


@dataclass(frozen=True)
class Page:
    """A page of the reference.

    Attributes:
        stem: name of the file without its ending.
        title: heading.
        module: the module whose public names these are.
        names: the names, in order.
        whole: whether the page shows the docstring of the module.
    """

    stem: str
    title: str
    module: ModuleType
    names: tuple[str, ...]
    whole: bool = True


def pages() -> Iterator[Page]:
    """All pages; every public name is on exactly one of them."""
    package = importlib.import_module("calibrant")
    parts = {name: getattr(package, name) for name in package.__all__ if not name.startswith("_")}
    own = tuple(name for name, part in parts.items() if not isinstance(part, ModuleType))
    yield Page("calibrant", "calibrant", package, own)
    for name, module in parts.items():
        if name not in own:
            yield from _pages_of(name, module)


def _pages_of(name: str, module: ModuleType) -> Iterator[Page]:
    public = tuple(getattr(module, "__all__", None) or _defined(module))
    origins = _origins(module)
    rooms = {
        stem: tuple(entry for entry in public if origins.get(entry, "").startswith(prefix))
        for stem, (_, prefix, _) in ROOMS.items()
        if name == "evaluation"
    }
    taken = {entry for entries in rooms.values() for entry in entries}
    yield Page(name, module.__name__, module, tuple(entry for entry in public if entry not in taken))
    for stem, entries in rooms.items():
        yield Page(stem, f"{module.__name__}: {ROOMS[stem][0]}", module, entries, whole=False)


def _defined(module: ModuleType) -> list[str]:
    """Public classes of a module that lists nothing: those of `calibrant.errors`."""
    return [name for name, part in vars(module).items() if inspect.isclass(part) and part.__module__ == module.__name__]


def _origins(module: ModuleType) -> dict[str, str]:
    """Public name → the module that the facade imports it from."""
    tree = ast.parse(inspect.getsource(module))
    return {
        alias.asname or alias.name: node.module or ""
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


# -- text --------------------------------------------------------------------------------------------------------------


def text(page: Page) -> str:
    """A page as reStructuredText: what the module is, a table of its names, then each of them."""
    parts = {name: getattr(page.module, name) for name in sorted(page.names, key=lambda name: _kind(name, page.module))}
    head = [page.title, "=" * len(page.title), ""]
    if page.whole:
        head += [f".. automodule:: {page.module.__name__}", ""]
    else:
        head += [ROOMS[page.stem][2], ""]
    head += [f".. currentmodule:: {page.module.__name__}", ""]
    return "\n".join([*head, *_table(parts, page.module), *(_entry(*item, page.module) for item in parts.items())])


def _table(parts: Mapping[str, Any], module: ModuleType) -> list[str]:
    lines = [".. list-table::", "   :class: names", "   :widths: 30 70", ""]
    for name, part in parts.items():
        lines += [f"   * - :py:obj:`{name} <{module.__name__}.{name}>`", f"     - {_in_a_line(name, part, module)}"]
    return [*lines, ""]


def _in_a_line(name: str, part: Any, module: ModuleType) -> str:
    """The first sentence about a name."""
    said = _about(name, part, module)
    return " ".join(said.split("\n\n")[0].split()) or f"``{part!r}``"


def _about(name: str, part: Any, module: ModuleType) -> str:
    """What is said about a name: its docstring; of a constant whose class is not ours, the comment above it."""
    own = not _is_constant(part) or isinstance(part, ModuleType) or type(part).__module__.startswith("calibrant.")
    return (inspect.getdoc(part) or "") if own else comment(name, module)


def _entry(name: str, part: Any, module: ModuleType) -> str:
    full = f"{module.__name__}.{name}"
    if _is_constant(part):
        return f".. py:data:: {full}\n   :value: {part!r}\n\n   {_about(name, part, module)}\n"
    if inspect.isclass(part):
        return f".. autoclass:: {full}\n   :members:\n"
    return f".. autofunction:: {full}\n"


def _is_constant(part: Any) -> bool:
    return not inspect.isclass(part) and not inspect.isroutine(part) and not hasattr(part, "__wrapped__")


def _kind(name: str, module: ModuleType) -> tuple[int, str]:
    """Functions come first, then classes, then constants; each in alphabetical order."""
    part = getattr(module, name)
    return 2 if _is_constant(part) else int(inspect.isclass(part)), name.lower()


def comment(name: str, module: ModuleType) -> str:
    """The comment above the assignment of a constant, in the file that defines it."""
    source = importlib.import_module(_origins(module).get(name, module.__name__))
    lines = inspect.getsource(source).splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith((f"{name} =", f"{name}:"))), 0)
    said: list[str] = []
    while at > 0 and lines[at - 1].startswith("#"):
        at -= 1
        said.insert(0, lines[at].lstrip("#: "))
    return " ".join(said)


def overview(found: Iterable[Page]) -> str:
    """The first page of the reference: what each page is about, and its place in the table of contents."""
    lines = ["API reference", "=============", "", "Every public name is on one of these pages.", ""]
    lines += [".. list-table::", "   :class: names", "   :widths: 30 70", ""]
    for page in found:
        about = _in_a_line("", page.module, page.module) if page.whole else ROOMS[page.stem][2]
        lines += [f"   * - :doc:`{page.title} <{page.stem}>`", f"     - {about}"]
    stems = [f"   {page.stem}" for page in found]
    return "\n".join([*lines, "", ".. toctree::", "   :hidden:", "", *stems, ""])


# -- Sphinx ------------------------------------------------------------------------------------------------------------


def generated(root: Path) -> dict[str, str]:
    """All files of docs/reference, which is written when the site is built: file name → text."""
    found = list(pages())
    return {
        **{f"{page.stem}.rst": text(page) for page in found},
        "index.rst": overview(found),
        "commands.md": command_page.text(),
        **{f"{stem}.md": moved(root / file) for stem, file in INCLUDED.items()},
    }


def write(app: Sphinx) -> None:
    """Write the pages; a file whose text is the same stays untouched, so that Sphinx does not read it again."""
    folder = Path(app.srcdir) / FOLDER
    texts = generated(Path(app.srcdir).parent)
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.name not in texts:
            old.unlink()
    for name, content in texts.items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != content:
            file.write_text(content, encoding="utf-8")


def moved(page: Path) -> str:
    """A page of the repository's root, with its links as they are from the folder of the reference."""
    stems = {file: f"{stem}.md" for stem, file in INCLUDED.items()}

    def link(found: re.Match[str]) -> str:
        target = found[1]
        return f"]({stems.get(target) or ('../' + target[5:] if target.startswith('docs/') else '../../' + target)})"

    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", link, page.read_text(encoding="utf-8"))


def lead_to_included(app: Sphinx, name: str, source: list[str]) -> None:
    """Let links to a page of the repository's root, as code hosts want them, lead to its place in the site."""
    for stem, file in INCLUDED.items():
        source[0] = re.sub(rf"\]\((?:\.\./)+{re.escape(file)}(#[^)]*)?\)", rf"](/{FOLDER}/{stem}.md\1)", source[0])


def show_indented(app: Sphinx, what: str, name: str, part: Any, options: Any, lines: list[str]) -> None:
    """Show what is indented after a colon or comma as it stands: formulas and code of docstrings."""
    for at in range(len(lines) - 2, 0, -1):
        before, blank, after = lines[at - 1 : at + 2]
        indent = len(before) - len(before.lstrip())
        if before.endswith((":", ",")) and not blank.strip() and after.startswith(" " * (indent + 4)):
            lines[at : at + 1] = ["", " " * indent + "::", ""]


def code(name: str, rawtext: str, text: str, line: int, inliner: Any, *more: Any) -> tuple[list[Any], list[Any]]:
    """What stands between single backticks in a docstring: a link where it is a public name, else code as it stands."""
    from docutils import nodes
    from sphinx.domains.python import PyXRefRole

    if re.fullmatch(r"\w+(\.\w+)*", text):
        return PyXRefRole()("py:obj", rawtext, text, line, inliner)
    return [nodes.literal(rawtext, text)], []


def public_names() -> dict[str, str]:
    """Where a class or function is defined → the name under which it is public."""
    return {
        f"{_module_of(part)}.{part.__qualname__}": f"{page.module.__name__}.{name}"
        for page in pages()
        for name in page.names
        for part in [getattr(page.module, name)]
        if inspect.isclass(part) or inspect.isroutine(part)
    }


def _module_of(part: Any) -> str:
    return inspect.unwrap(part).__module__


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node) -> nodes.Node | None:
    """A link from an annotation, which names the file that defines a class, to the entry of its public name."""
    public = public_names().get(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or public is None:
        return None
    domain = env.get_domain("py")
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", public, node, content)


def setup(app: Sphinx) -> dict[str, bool]:
    from sphinx.domains.python import PyObject

    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # Sphinx says "Variables"
    app.add_role("code-or-name", code)
    app.connect("builder-inited", write)
    app.connect("source-read", lead_to_included)
    app.connect("autodoc-process-docstring", show_indented, priority=100)  # before the sections are read
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
