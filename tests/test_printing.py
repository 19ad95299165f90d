"""What the commands print at the end, in the width of a terminal, and what a shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import refused

import calibrant as cal
from calibrant import columns, printing
from calibrant.columns import wrapped
from calibrant.completion import COMPLETIONS, LISTS, registered
from calibrant.reproductions.telling import told
from calibrant.workflow.running import Outcome
from calibrant.workflow.summary import Summary

SENTENCE = "posterior sd of `z[63]`: too small by 12.7% ± 0.8%, the worst of 64 latents, which a-long-word-holds-up"
LINE = "calibrant run vae --data natural-patches --set latents=16 --structure collapsed --epochs 20 --out runs/longer"


@pytest.fixture
def of_width(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """Sets the columns of standard output; None for a file."""

    def set_width(width: int | None) -> None:
        monkeypatch.setattr(columns, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: width is not None)))
        monkeypatch.setenv("COLUMNS", str(width or 80))

    return set_width


@pytest.mark.parametrize("width", [40, 80, 200])
def test_text_is_broken_at_spaces_alone(of_width, width):
    of_width(width)
    lines = wrapped(SENTENCE, "  - ").splitlines()
    assert all(len(line) <= width for line in lines)
    assert all(line.startswith("    ") for line in lines[1:])
    assert " ".join(line.strip() for line in lines) == f"- {SENTENCE}"


def test_a_file_gets_whole_lines(of_width):
    of_width(None)
    assert wrapped(SENTENCE, "  - ") == f"  - {SENTENCE}"


def summary(name: str, **given: object) -> Summary:
    numbers = {"elbo": -312.0, "elbo_se": 0.04, "evidence": -305.5, "gap": 6.5, "gap_se": 0.04}
    told = {"conclusion": SENTENCE, "remedy": "Do this:", "next_line": LINE, "details": [SENTENCE] * 9}
    return Summary(name=name, **{**numbers, **told, **given})  # type: ignore[arg-type]


@pytest.fixture
def shown(monkeypatch, capsys) -> Callable[..., str]:
    """What is printed for summaries, and a story of several models."""

    def show(*summaries: Summary, story: list[str] | None = None) -> str:
        named = {one.name: one for one in summaries}
        monkeypatch.setattr("calibrant.workflow.summary.summarise", named.get)
        notes = ["a note", "a note"]
        printing.show(Outcome(Path("run"), list(named), Path("run/report.html"), notes, story or []))  # type: ignore[arg-type]
        return capsys.readouterr().out

    return show


def test_the_end_of_a_run_fits_a_terminal(of_width, shown):
    of_width(80)
    lines = shown(summary("vae")).splitlines()
    assert all(len(line) <= 80 for line in lines if line != f"  {LINE}")
    assert f"  {LINE}" in lines, "what is to be pasted is one line"
    assert lines[-1] == "report: run/report.html"
    assert sum(line.startswith("  - ") for line in lines) == 7
    assert "  - 3 more in the report" in lines
    assert lines.count("note: a note") == 1


@pytest.mark.parametrize(
    ("value", "error", "told"),
    [
        (-334.2149, 0.004, "-334.215 ± 0.004"),
        (-334.2149, 0.0006, "-334.215 ± 0.001"),
        (0.00081, 0.0002, "0.0008 ± 0.0002"),
        (0.00081, 2e-6, "0.0008 ± <0.0001"),
        (-333.04, 0.04, "-333.04 ± 0.04"),
        (-333.04, 0.0, "-333.04"),
        (-333.04, None, "-333.04"),
        (float("nan"), 0.1, "–"),
    ],
)
def test_no_standard_error_is_rounded_to_zero(value, error, told):
    assert printing.number(value, error) == told


def test_the_command_after_an_interrupt_can_be_pasted(monkeypatch):
    message = f"interrupted; run keeps: vae nothing yet; ppca the best weights of 2 epochs. Resume with: {LINE}"
    monkeypatch.setattr(columns.sys, "stderr", SimpleNamespace(isatty=lambda: False))
    assert printing.interruption(message) == message
    monkeypatch.setattr(columns.sys, "stderr", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setenv("COLUMNS", "80")
    *told, command = printing.interruption(message).splitlines()
    assert command == f"  {LINE}"
    assert [len(line) <= 80 for line in told] == [True, True]
    assert printing.interruption("interrupted") == "interrupted"


def test_several_models_are_told_by_their_story(of_width, shown):
    of_width(None)
    lines = shown(summary("vae"), summary("ea-vae", next_line=""), story=["`vae`: one.", "`ea-vae`: two."]).splitlines()
    at = lines.index("`vae`: one.")
    assert lines[at:] == [
        *("`vae`: one.", "`ea-vae`: two.", "note: a note"),
        *("next (vae): Do this:", f"  {LINE}", "next (ea-vae): Do this:", "report: run/report.html"),
    ]


def test_names_have_their_texts_beside_them_or_below(of_width, capsys):
    lists = {"Models": {"vae": SENTENCE, "ea-vae": "short"}}
    for width, first in ((80, "  vae     posterior sd"), (44, "  vae")):
        of_width(width)
        printing.show_names(lists)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "Models"
        assert lines[1].startswith(first)
        assert all(len(line) <= width for line in lines)
    of_width(None)
    printing.show_names(lists)
    assert capsys.readouterr().out == f"Models\n  vae     {SENTENCE}\n  ea-vae  short\n"


# -- completion --------------------------------------------------------------------------------------------------------

REGISTERED = {
    "model": lambda: cal.models.list_models(),
    "likelihood": lambda: [entry.name for entry in cal.models.list_likelihoods()],
    "data": lambda: [entry.name for entry in cal.data.list_data()],
    "paper": lambda: [paper.name for paper in cal.reproductions.list_papers() if "tiny" not in paper.name],
}


@pytest.mark.parametrize("kind", REGISTERED)
def test_completed_names_are_those_that_are_registered(kind):
    assert registered(kind) == sorted(REGISTERED[kind]())


def test_completed_lists_are_those_that_are_listed():
    message = refused("list", "nothing")
    assert ", ".join(LISTS) in message


@pytest.mark.parametrize(
    ("what", "typed", "found"),
    [
        ("structure", "f", ["faithful", "full"]),
        ("family", "z=lo", ["z=lognormal", "z=low-rank", "z=log-variance", "z=lognormal-log-variance"]),
        ("models", "ea", ["ea-vae"]),
        ("data", "./", []),
        ("arguments", "like", ["likelihood="]),
        ("arguments", "likelihood=bet", ["likelihood=beta"]),
        ("arguments", "latents=", []),
    ],
)
def test_what_is_completed(what, typed, found):
    assert COMPLETIONS[what](typed) == found


@pytest.mark.parametrize(
    ("words", "found"),
    [("run v", "vae"), ("run vae --structure c", "collapsed"), ("reproduce s", "sigma-vae"), ("list d", "data")],
)
def test_a_shell_is_answered_without_torch(words, found):
    asked = {"_CALIBRANT_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": f"calibrant {words}"}
    code = "import sys; from calibrant.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert re.findall(r'"([^"]+)"', done.stdout) == [found]
    assert done.stdout.endswith("False\n")


# -- tables of papers --------------------------------------------------------------------------------------------------

STORED = sorted((Path(__file__).parents[1] / "benchmarks/results").glob("reproduce-*.json"))


@pytest.mark.parametrize("width", [80, 132, None])
@pytest.mark.parametrize("file", STORED, ids=lambda file: file.stem)
def test_numbers_in_tables_of_papers_are_whole(of_width, file, width):
    results = cal.reproductions.load_results(file)
    of_width(width)
    text = told(results)
    assert all(len(line) <= (width or 200) for line in text.splitlines() if line[:1] in "┏┃┡│└")
    assert "…" not in re.sub(r"i = 1 … M", "", text)
    for name in results.experiments:
        if not results.content["experiments"][name]["left_out"]:
            numbers = [
                cell for line in results.lines(name)[1:] for cell in line if re.fullmatch(r"-?[\d.]+( ± .*)?", cell)
            ]
            assert [cell for cell in numbers if f" {cell} " not in text] == []
