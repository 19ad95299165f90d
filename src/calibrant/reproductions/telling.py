"""What the command line tells: the list of papers and experiments, and the tables and sentences of a run."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from calibrant.columns import columns, wrapped
from calibrant.reproductions.cards import Experiment
from calibrant.reproductions.folder import CELLS
from calibrant.reproductions.registering import list_experiments, list_papers
from calibrant.reproductions.results import Results
from calibrant.reproductions.splits import Source

_TEXTS = ("row", "domain", "statement", "the exact posterior says", "the guide says")  # columns with words
_FOLDED = 20  # columns for the words in a cell, which go on in the next line
_WIDTH = 200  # columns of a table in a file, so that a row is not broken


def listing(data_root: str | None = None) -> str:
    """The papers and their experiments: what each shows, its data and whether they are there, and how long it takes."""
    source = Source(data_root, download=False, quick=True)
    lines = []
    for paper in list_papers():
        lines.append(wrapped(f"{paper.name}: {paper.title} (arXiv {paper.arxiv})", "", "  "))
        lines.append(wrapped(paper.sentence, "  "))
        for card in list_experiments(paper.name):
            quick, full = (_duration(minutes) for minutes in card.minutes)
            domain = f"{card.domain}, " if card.domain else ""
            lines.append(wrapped(f"{card.name} ({domain}{card.answers}): {card.shows}", "  ", "    "))
            data = ", ".join(dict.fromkeys(_data(card, source))) or "none"
            lines.append(wrapped(f"data: {data}; quick: {quick}, full: {full}", "    ", "      "))
    first = list_papers()[0].name
    return "\n".join([*lines, f"Run one with: calibrant reproduce {first} --quick"])


def _data(card: Experiment, source: Source) -> Iterator[str]:
    for needs in card.needs:
        found = source.chosen(needs)
        if found is needs:
            yield f"{needs.name} (ready)"
        elif found is not None:
            yield f"{needs.name} (absent: {found.name} in its place)"
        else:
            yield f"{needs.name} (absent)"


def _duration(minutes: float) -> str:
    if minutes < 1:
        return f"{max(1, round(60 * minutes))} s"
    return f"{round(minutes)} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def told(results: Results) -> str:
    """The tables of a run, what was found in sentences, and where the report is."""
    parts = [_table("Claims of the paper", results.claim_lines)] if results.claims else []
    for name, part in results.content["experiments"].items():
        if part["left_out"]:
            parts.append(f"{name} was left out: {part['left_out']}.")
            continue
        parts += [
            _table(f"{name} ({part['answers']})", results.lines(name)),
            *(wrapped(one, "", "  ") for one in results.sentences(name)),
        ]
        parts += [
            f"note: {used} in place of {asked}, which is not there"
            for asked, used in part["data"].items()
            if used != asked
        ]
        if part["reduced"]:
            parts.append(f"note: {part['reduced']}")
    parts += [f"failed: {line}" for line in results.failed]
    if results.failed:
        parts.append(
            f"where they failed is told by the text files in {results.folder / CELLS}; --resume tries them again"
        )
    return "\n".join([*parts, f"report: {results.report}"])


def _table(title: str, lines: Sequence[Sequence[str]]) -> str:
    """A table whose numbers are whole: columns that do not fit side by side go on in a table below, beside its rows."""
    from rich.console import Console
    from rich.table import Table

    width = columns() or _WIDTH
    widths = [_least_width([line[column] for line in lines]) for column in range(len(lines[0]))]
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    with console.capture() as captured:
        for number, part in enumerate(_parts(lines[0], widths, width)):
            table = Table(title=title if number == 0 else None, title_justify="left")
            for column in part:
                heading, is_text = lines[0][column], lines[0][column] in _TEXTS
                table.add_column(
                    heading, justify="left" if is_text else "right", width=None if is_text else widths[column]
                )
            for line in lines[1:]:
                table.add_row(*(line[column] for column in part))
            console.print(table)
    return captured.get().rstrip("\n")


def _least_width(cells: Sequence[str]) -> int:
    """The columns that whole cells need below a heading that is broken at spaces."""
    heading, *others = cells
    return max(map(len, [*heading.split(), *others]), default=0)


def _parts(headings: Sequence[str], widths: Sequence[int], width: int) -> list[list[int]]:
    """The columns of each table: those with words, which can be broken, and as many others as fit beside them."""
    texts = [column for column, heading in enumerate(headings) if heading in _TEXTS]
    taken = 1 + sum(min(widths[column], _FOLDED) + 3 for column in texts)
    parts, room = [list[int](texts)], width - taken
    for column in (column for column in range(len(headings)) if column not in texts):
        if widths[column] + 3 > room and parts[-1] != texts:
            parts.append(list(texts))
            room = width - taken
        parts[-1].append(column)
        room -= widths[column] + 3
    return parts
