"""The structure of the package is the one that docs/design.md draws, and its parts say what they are."""

import ast
import importlib
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_pages import exists

import calibrant

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/calibrant"
FACADES = [name for name in calibrant.__all__ if (PACKAGE / name / "__init__.py").is_file()]
MODULES = sorted(module.name for module in pkgutil.walk_packages([str(PACKAGE)], "calibrant."))
CODE = sorted(file for folder in ("src", "tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py"))
TOP = {"calibrant.cli"}  # may use what users use

Imports = dict[str, set[str]]


# -- the picture -------------------------------------------------------------------------------------------------------


def drawn_floors(text: str) -> dict[str, int]:
    """Room → its floor, the lowest 0, from the picture in the design page."""
    picture = re.search(r"## The house\n.*?```\n(.*?)```", text, re.DOTALL)
    assert picture is not None
    lines = [re.split(r" {2,}", line.strip())[0].split(" · ") for line in picture[1].splitlines()]
    return {room: floor for floor, rooms in enumerate(reversed(lines)) for room in rooms}


def imports_of(package: Path) -> tuple[Imports, set[str]]:
    """Module → the modules that it imports from, anywhere in its code; and which modules are packages."""
    files = {".".join(file.relative_to(package.parent).with_suffix("").parts): file for file in package.rglob("*.py")}
    packages = {name.removesuffix(".__init__") for name in files if name.endswith(".__init__")}
    named = {name.removesuffix(".__init__"): file for name, file in files.items()}
    found = {name: set(_imported(ast.parse(file.read_text()), set(named))) - {name} for name, file in named.items()}
    return found, packages


def _imported(tree: ast.Module, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield from {full if full in known else node.module} & known
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & known


def room_of(module: str, floors: dict[str, int]) -> str:
    """The room that a module lies in: the longest one that the picture has."""
    parts = module.split(".")[1:]
    rooms = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return next((room for room in rooms if room in floors), "")


def faults(found: Imports, packages: set[str], floors: dict[str, int]) -> list[str]:
    """Modules outside the picture, arrows that do not go down, uses of facades inside, and circles."""
    inner = {name: targets for name, targets in found.items() if name not in packages}
    wrong = [f"{name} is in no room" for name in inner if not room_of(name, floors)]
    for name, targets in inner.items():
        for target in targets:
            here, there = (room_of(module, floors) for module in (name, target))
            if target in packages:
                wrong += [] if name in TOP else [f"{name} imports from the package {target}"]
            elif here != there and floors.get(there, -1) >= floors.get(here, -1):
                wrong.append(f"{name} imports {target}, which is no lower")
    return wrong + [f"{name} imports itself by way of others" for name in inner if name in _reached(name, inner)]


def _reached(start: str, found: Imports) -> set[str]:
    seen: set[str] = set()
    waiting = list(found[start])
    while waiting:
        name = waiting.pop()
        if name in found and name not in seen:
            seen.add(name)
            waiting.extend(found[name])
    return seen


def test_imports_are_those_of_the_picture():
    floors = drawn_floors((ROOT / "docs/design.md").read_text())
    found, packages = imports_of(PACKAGE)
    assert faults(found, packages, floors) == []
    empty = [room for room in floors if not any(room_of(name, floors) == room for name in found)]
    assert not empty, f"the picture has rooms that the package lacks: {empty}"


DEFECTS = {
    "up": ("low/file.py", "from calibrant.high.file import x", "which is no lower"),
    "up, lazily": ("low/file.py", "def f():\n    from calibrant.high.file import x", "which is no lower"),
    "up, for types": ("low/file.py", "if TYPE_CHECKING:\n    import calibrant.high.file", "which is no lower"),
    "a facade": ("low/file.py", "from calibrant.low import x", "imports from the package"),
    "a circle": ("low/other.py", "from calibrant.low.file import x", "by way of others"),
    "no room": ("third/file.py", "", "is in no room"),
}


@pytest.mark.parametrize(("file", "code", "message"), DEFECTS.values(), ids=DEFECTS)
def test_a_planted_arrow_is_seen(tmp_path, file, code, message):
    package = tmp_path / "calibrant"
    sound = {"high/file.py": "from calibrant.low.file import y", "low/file.py": "from calibrant.low import other"}
    for name, text in {**sound, "low/other.py": "", "low/__init__.py": "", "high/__init__.py": ""}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    floors = {"high": 1, "low": 0}
    assert faults(*imports_of(package), floors) == []
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_text(code + "\n" + sound.get(file, ""))
    assert any(message in fault for fault in faults(*imports_of(package), floors))


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("facade", FACADES)
def test_no_module_has_the_name_of_a_public_function(facade):
    package = importlib.import_module(f"calibrant.{facade}")
    functions = {name for name in package.__all__ if callable(getattr(package, name)) and name.islower()}
    taken = [module for module in MODULES if module.rpartition(".")[2] in functions]
    assert not taken, f"{taken} would hide, or be hidden by, functions of calibrant.{facade}"


@pytest.mark.parametrize("name", ["", *FACADES, "store"])
def test_dir_shows_public_names_and_nothing_else(name):
    module = importlib.import_module(f"calibrant.{name}".rstrip("."))
    shown = dir(module)
    assert set(module.__all__) <= set(shown)
    assert not [name for name in shown if name.startswith("_") and name != "__version__"]
    classes = {name for name in shown if name not in module.__all__}
    assert all(getattr(module, name).__module__.startswith("calibrant.models.") for name in classes)
    assert all(hasattr(module, name) for name in shown)


def test_private_names_stay_in_their_files():
    shared = [
        f"{file.relative_to(ROOT)}: {node.module}.{alias.name}"
        for file in CODE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("calibrant")
        for alias in node.names
        if alias.name.startswith("_")
        and not alias.name.startswith("__")
        and f"{node.module}.{alias.name}" not in MODULES
    ]
    assert shared == []


UNSEEN = {"arviz", "arviz-base", "h5netcdf", "h5py"}  # what users plot with; what xarray reads and writes NetCDF with
IMPORTED_AS = {"pillow": "PIL", "pyro-ppl": "pyro", "scikit-image": "skimage", "scikit-learn": "sklearn"}


def test_every_dependency_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {re.split(r"[^\w-]", text)[0] for text in project["dependencies"]} - UNSEEN
    tops = {
        name.partition(".")[0]
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in _named(node)
    }
    assert [name for name in wanted if IMPORTED_AS.get(name, name.replace("-", "_")) not in tops] == []


def _named(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or ""]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


PATH = re.compile(
    r"`([a-z_]+(?:/[a-z_0-9.-]+)*/[a-z_0-9]+\.(?:py|md))`|\]\(([a-z_/0-9.-]+\.(?:py|md))\)|\b(benchmarks/[a-z_]+\.py)"
)


def test_files_that_are_named_exist():
    """In the docs, and in docstrings and comments of the package; how-to pages name files that they add."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *PACKAGE.rglob("*.py")]
    missing = [
        f"{page.relative_to(ROOT)}: {path}"
        for page in pages
        for path in (next(filter(None, found)) for found in PATH.findall(page.read_text()))
        if not any(exists(base / path) for base in (ROOT, PACKAGE, page.parent))
    ]
    assert missing == []


def test_the_page_of_parts_is_made_from_their_cards():
    page = runpy.run_path(str(ROOT / "docs/make_parts.py"))
    assert page["PAGE"].read_text() == page["text"](), "make parts writes docs/parts.md anew"


@pytest.mark.parametrize("page", sorted((ROOT / "docs/papers").glob("*.md")), ids=lambda page: page.stem)
def test_tables_of_papers_are_made_from_stored_results(page, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    made = runpy.run_path(str(ROOT / "docs/make_papers.py"))
    assert page.read_text() == made["text"](page), "make papers writes the tables of docs/papers anew"


def test_tables_of_speed_are_made_from_stored_results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    made = runpy.run_path(str(ROOT / "docs/make_speed.py"))
    for page in made["PAGES"]:
        assert page.read_text() == made["text"](page), "make speed writes the tables anew"
        assert "There are no results yet" in made["text"](page, tmp_path)
    (tmp_path / "training-cpu.json").write_text('[{"side": "ours", "seconds": 0.01234, "steps": 1200}]')
    assert "| ours | 0.0123 | 1,200 |" in made["text"](made["PAGES"][0], tmp_path)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_files_fit_in_500_lines():
    long = {str(file.relative_to(ROOT)): count for file in CODE if (count := len(file.read_text().splitlines())) > 500}
    assert long == {}


def test_functions_fit_on_a_screen():
    long = {
        f"{file.relative_to(ROOT)}: {node.name}": count
        for file in CODE
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and (count := _code_lines(node)) > 50
    }
    assert long == {}


def _code_lines(function: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    assert function.end_lineno is not None
    first = function.body[0]
    text = ast.get_docstring(function) and first.end_lineno is not None and first.end_lineno - first.lineno + 1
    return function.end_lineno - function.lineno + 1 - (text or 0)


# -- where it is imported from -----------------------------------------------------------------------------------------


def python(*arguments: str, folder: Path) -> str:
    """What Python prints in a folder, with the package on its path as this process has it."""
    path = os.pathsep.join(entry for entry in sys.path if entry and Path(entry).is_absolute())
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_is_imported_beside_its_clone(tmp_path):
    (tmp_path / "calibrant").symlink_to(ROOT)
    version = python("-c", "import calibrant; print(calibrant.__version__)", folder=tmp_path)
    assert version == calibrant.__version__


def test_the_package_is_a_command_for_python(tmp_path):
    assert python("-m", "calibrant", "--version", folder=tmp_path) == f"calibrant {calibrant.__version__}"
