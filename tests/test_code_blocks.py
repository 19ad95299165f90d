"""Every block of code in README and docs runs: as a cell of a page that is executed, or in the test that is named here.

Pages and blocks are found by existing, so that a new one fails until something runs it. Commands are not run here, but
their options and targets exist.
"""

import re
import shlex
from pathlib import Path

import pytest
import typer

from calibrant.cli import app

ROOT = Path(__file__).parents[1]
PAGES = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
    if not {"_build", "reference"} & set(page.parts)
}
# Page → the test that runs its Python blocks, and how many these are.
RUN_BY = {
    "README.md": ("test_readme.py", 5),
    "docs/analysis.md": ("test_analysis_page.py", 1),
    "docs/checks.md": ("test_code_of_pages.py", 1),
    "docs/coming-from-elsewhere.md": ("test_code_of_pages.py", 1),
    "docs/design.md": ("test_code_of_pages.py", 1),
    "docs/features.md": ("test_features_page.py", 3),
    "docs/presets.md": ("test_presets.py", 2),
    "docs/prior-guides.md": ("test_prior_guide_runs.py", 1),
    "docs/representation-applications.md": ("test_representation_applications_page.py", 1),
    "docs/representation-methods.md": ("test_code_of_pages.py", 1),
    "docs/representation-metrics.md": ("test_representation_page.py", 1),
    "docs/representations.md": ("test_representations_page.py", 2),
    "docs/speed.md": ("test_code_of_pages.py", 1),
    "docs/uncertainty.md": ("test_uncertainty_page.py", 4),
}
COMMAND = typer.main.get_command(app)
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of some languages, also those that are indented in a list."""
    return re.findall(rf"^ *```(?:{'|'.join(languages)})\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def unrun(name: str, text: str) -> str:
    """Why the Python blocks of a page are not all run; nothing if they are."""
    count = len(blocks(text, "python", "py", "pycon", "python3"))
    if name.startswith("docs/how-to/") or not count:  # test_how_to.py follows every page of that folder
        return ""
    file, known = RUN_BY.get(name, ("", 0))
    if not file:
        return f"{name}: let a test run its Python blocks and name it here, or make it a page that is executed"
    if Path(name).name not in (ROOT / "tests" / file).read_text(encoding="utf-8"):
        return f"tests/{file} does not read {name}"
    return "" if known == count else f"{name} has {count} Python blocks and {file} runs {known}: see that it runs all"


# What MyST-NB and jupytext want.
HEAD = "---\nfile_format: mystnb\nkernelspec:\n  display_name: Python 3\n  name: python3\n---\n"


def cells_without_execution(text: str) -> bool:
    """Whether a page has cells, but not the head that says how they are executed."""
    return "```{code-cell}" in text and not text.startswith(HEAD)


@pytest.mark.parametrize("name", PAGES)
def test_python_blocks_are_run(name):
    assert unrun(name, PAGES[name]) == ""
    assert not cells_without_execution(PAGES[name])


def test_tests_of_blocks_are_of_pages_that_exist():
    assert set(RUN_BY) <= set(PAGES)


BLOCK = "```python\nx = 1\n```\n"


def test_a_block_that_nothing_runs_is_seen():
    assert "let a test run" in unrun("docs/new.md", BLOCK)
    assert "has 2 Python blocks" in unrun("docs/analysis.md", BLOCK + BLOCK)
    assert unrun("docs/analysis.md", BLOCK) == ""
    cell = "```{code-cell} ipython3\n1\n```\n"
    assert cells_without_execution(cell)
    assert cells_without_execution("---\nfile_format: mystnb\nkernelspec:\n  name: python3\n---\n" + cell)
    assert not cells_without_execution(HEAD + cell)


@pytest.mark.parametrize("name", [name for name, text in PAGES.items() if "```{code-cell}" in text])
def test_a_page_becomes_a_notebook(name):
    """As with `jupytext --to ipynb`: every cell is there, and the notebook is valid."""
    jupytext = pytest.importorskip("jupytext")
    notebook = jupytext.reads(jupytext.writes(jupytext.read(ROOT / name), fmt="ipynb"), fmt="ipynb")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) == len(re.findall(r"^ *```\{code-cell\}", PAGES[name], re.MULTILINE))


# -- commands ----------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """Commands of shell blocks, and those that stand in a sentence between backticks."""
    lines = [line for block in blocks(text, "sh", "bash", "shell", "console") for line in block.splitlines()]
    inline = re.findall(r"(?<!`)`((?:calibrant|make) [^`]+)`", re.sub(r"^ *```.*?^ *```", "", text, flags=re.S | re.M))
    return [" ".join(line.removeprefix("$ ").split()) for line in lines + inline if line.strip()]


def mistake(command: str) -> str:
    """What is wrong with a command: an option, a command or a target that does not exist; nothing if all is right."""
    words = shlex.split(command.replace("…", "x"), comments=True)
    words = words[next((i for i, word in enumerate(words) if "=" not in word), 0) :]  # variables before it
    if words[:1] == ["make"]:
        targets = [word for word in words[1:] if word.islower() and "=" not in word and not word.startswith((".", "-"))]
        return "" if set(targets) <= TARGETS else f"{command}: make has no such target"
    if not words or Path(words[0]).name.removesuffix(".exe") != "calibrant":
        return ""
    if (name := next(iter(words[1:]), "--help")).startswith("-"):
        return "" if name in ("--help", "--version", "--install-completion", "--show-completion") else command
    if name not in COMMAND.commands:
        return f"{command}: calibrant has no such command"
    try:
        COMMAND.commands[name].make_context(name, words[2:])
    except Exception as error:
        # Help ends a command, and a sentence may leave the model out; what remains are wrong options and values.
        return "" if type(error).__name__ in ("Exit", "MissingParameter") else f"{command}: {error}"
    return ""


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist_with_their_options(name):
    assert [found for command in commands(PAGES[name]) if (found := mistake(command))] == []


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("calibrant run ea-vae --latents 16  # an option of models", "--latents"),
        ("calibrant chekc runs/demo", "chekc"),
        ("make demonstration", "no such target"),
        ("calibrant --versoin", "--versoin"),
        ("OMP_NUM_THREADS=1 calibrant run --structur full", "--structur"),
    ],
)
def test_a_wrong_command_is_seen(command, said):
    assert said in mistake(command)


def test_commands_of_blocks_and_sentences_are_found():
    assert commands("```sh\n$ calibrant  list # all\n```\nor `make demo`, `pip` and `calibrant.store`") == [
        "calibrant list # all",
        "make demo",
    ]
