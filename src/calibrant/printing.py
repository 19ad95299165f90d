"""What the commands print on standard output, in the width of the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from calibrant.columns import columns, wrapped

if TYPE_CHECKING:
    from calibrant.inference.speed.measuring import Bench
    from calibrant.workflow.running import Outcome
    from calibrant.workflow.summary import Summary

_TOLD = 6  # sentences about a model; the report has all


def number(value: float | None, error: float | None = None) -> str:
    """A number with its standard error, if it has one; a dash if it is not known.

    There are at least two decimals, and up to four where the standard error needs more to be shown.
    """
    if value is None or value != value:
        return "–"
    if not error or error != error:
        return f"{value:.2f}"
    digits = next((digits for digits in (2, 3) if round(error, digits) > 0), 4)
    shown = f"{error:.{digits}f}" if round(error, digits) > 0 else "<0.0001"
    return f"{value:.{digits}f} ± {shown}"


def interruption(message: str) -> str:
    """The message of an interrupt; in a terminal, the command in it that goes on stands in a line of its own."""
    told, colon, command = message.rpartition(": calibrant ")
    if columns(sys.stderr) is None or not colon:
        return message
    return f"{wrapped(f'{told}:', file=sys.stderr)}\n  calibrant {command}"


def show(outcome: Outcome) -> None:
    """Print the summary of a run: numbers, what was found, notes, the next thing to do, where the report is."""
    from calibrant.workflow.summary import summarise

    summaries = [summarise(result) for result in outcome.results]
    _show_numbers(summaries)
    for sentence in outcome.story:
        typer.echo(wrapped(sentence, "", "  "))
    for row in summaries if not outcome.story else ():
        typer.echo(wrapped(f"{row.name}: {row.conclusion}", "", "  "))
        for detail in row.details[:_TOLD]:
            typer.echo(wrapped(detail, "  - "))
        if len(row.details) > _TOLD:
            typer.echo(f"  - {len(row.details) - _TOLD} more in the report")
    for note in dict.fromkeys(outcome.notes):
        typer.echo(wrapped(f"note: {note}", "", "  "))
    for row in summaries:
        if row.remedy:
            name = f" ({row.name})" if len(summaries) > 1 else ""
            typer.echo(wrapped(f"next{name}: {row.remedy}", "", "  "))
        if row.next_line:
            typer.echo(f"  {row.next_line}")  # in one piece, since it is to be pasted
    typer.echo(f"report: {outcome.report}")


def _show_numbers(summaries: Sequence[Summary]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("model", "ELBO", "log evidence", "gap"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=heading != "model")
    for row in summaries:
        table.add_row(row.name, number(row.elbo, row.elbo_se), number(row.evidence), number(row.gap, row.gap_se))
    Console(file=sys.stdout, highlight=False, markup=False).print(table)
    typer.echo(wrapped("(nats per datum, of the checked data; the gap is log evidence − ELBO)"))


def show_speeds(found: Bench) -> None:
    """Print the machine, the figures of a model, and how they were measured."""
    from rich.console import Console
    from rich.table import Table

    typer.echo(wrapped(f"{found.name} on {found.about}", "", "  "))
    table = Table("part", "what")
    table.add_column("speed", justify="right", no_wrap=True)
    for before, row in zip([None, *found.rows], found.rows, strict=False):
        table.add_row("" if before and row.part == before.part else row.part, row.what, row.text)
    Console(file=sys.stdout, highlight=False, markup=False).print(table)
    for row in found.rows:
        if row.how:
            typer.echo(wrapped(f"{row.part}, {row.what}: {row.how}", "", "  "))


def show_names(lists: Mapping[str, Mapping[str, str]]) -> None:
    """Print names and what they stand for, under headings; names of a list begin their texts at the same column.

    Where that leaves too little room for the texts, these begin below the names.
    """
    width = columns()
    for heading, entries in lists.items():
        typer.echo(wrapped(heading, "", "  "))
        column = max(map(len, entries), default=0) + 4
        below = width is not None and width - column < 40
        for name, text in entries.items():
            if below:
                typer.echo(f"  {name}")
            typer.echo(wrapped(text, " " * 6 if below else f"  {name}".ljust(column)))
