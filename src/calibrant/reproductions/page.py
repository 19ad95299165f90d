"""The report of a reproduction: one HTML file without external resources, in the style of the check's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibrant.evaluation.reporting.templates import template
from calibrant.folders.files import new_file
from calibrant.inference.fitting.lengths import STILL_RISING
from calibrant.reproductions.found import Picture, shown

_BADGES = {
    "reached": "pass",
    "holds": "pass",
    "not reached": "fail",
    "does not hold": "fail",
    "cannot tell": "cannot-tell",
}


def write_page(path: Path, content: Mapping[str, Any], pictures: Mapping[str, Sequence[Picture]], command: str) -> None:
    """Write the report.

    Args:
        path: path of the file.
        content: the content of `results.json`.
        pictures: experiment → its pictures.
        command: command line that makes it again; empty if there was none.
    """
    experiments = content["experiments"]
    page = template("reproduction.html", "calibrant.reproductions").render(
        content=content,
        paper=content["paper"],
        experiments={name: part for name, part in experiments.items() if not part["left_out"]},
        left_out={name: part["left_out"] for name, part in experiments.items() if part["left_out"]},
        tables={name: wide(part) for name, part in experiments.items() if not part["left_out"]},
        pictures=pictures,
        badges=_BADGES,
        beside_paper=beside_paper,
        on_training=on_training,
        command=command,
        shown=shown,
    )
    with new_file(path) as new:
        new.write_text(page, encoding="utf-8")


def wide(part: Mapping[str, Any]) -> list[list[str]]:
    """The table of an experiment as people read it: a line for each row, and for each number ours and the paper's.

    Args:
        part: the experiment in `results.json`.

    Returns:
        The heading, then the lines; a column of the paper only where it has a value.
    """
    cells = {(row["row"], row["number"]): row for row in part["rows"]}
    numbers = [number for number in part["numbers"] if any(number == known for _, known in cells)]
    papers = {number for (_, number), row in cells.items() if row["paper"] is not None}
    heading = ["row"]
    for number in numbers:
        heading += [number, "paper"] if number in papers else [number]
    lines = [heading]
    for name in dict.fromkeys(row for row, _ in cells):
        line = [name]
        for number in numbers:
            row = cells.get((name, number))
            line.append(ours(row))
            if number in papers:
                line.append("" if row is None or row["paper"] is None else shown(row["paper"]))
        lines.append(line)
    return lines


_ANSWERS = {
    "reached": "Within the tolerance of the paper's",
    "not reached": "Not within the tolerance of the paper's",
    "cannot tell": "This run cannot tell whether it is within the tolerance of the paper's",
}


def beside_paper(part: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which numbers of the paper were reached: pairs of an answer and a sentence, one for all rows alike.

    The answer is "reached", "not reached" or "cannot tell", and empty for numbers that are not reproduced.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in part["rows"]:
        if row["paper"] is not None and (row["answer"] or row["not_reproduced_because"]):
            group = (row["answer"], row["not_reproduced_because"], row["number"])
            groups.setdefault(group, []).append(f"{row['row']} ({ours(row)} beside {shown(row['paper'])})")
    return [
        (answer, f"{_ANSWERS[answer]} {number}: {'; '.join(rows)}.")
        if answer
        else ("", f"The paper's {number} is not reproduced here, since {because}: {'; '.join(rows)}.")
        for (answer, because, number), rows in groups.items()
    ]


def on_training(part: Mapping[str, Any]) -> list[str]:
    """A sentence about the rows whose held-out ELBO was far from its final value when a training was over, if any."""
    early = {
        row["row"]: None
        for row in part["rows"]
        for seed, each in row["stopped"].items()
        if STILL_RISING in each.values() and seed not in row["failed"]
    }
    if not early:
        return []
    return [
        f"The held-out ELBO was still rising when the training ended: {', '.join(early)}. Longer trainings would "
        "change these numbers."
    ]


def ours(row: Mapping[str, Any] | None) -> str:
    """Our value with its standard error, or why there is none."""
    if row is None:
        return ""
    value, error = (math.nan if row[name] is None else row[name] for name in ("ours", "se"))
    if math.isnan(value) and row["failed"]:
        return f"failed: {next(iter(row['failed'].values()))}"
    return shown(value, error)
