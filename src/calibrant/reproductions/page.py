"""The report of a reproduction: one HTML file without external resources, in the style of the check's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calibrant.evaluation.reporting.templates import template
from calibrant.folders.files import new_file
from calibrant.inference.fitting.lengths import STILL_RISING
from calibrant.reproductions.cards import SOURCES
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
        claims=claims_by_domain(content.get("claims", [])),
        expected=expected,
        said=said,
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


# -- claims ------------------------------------------------------------------------------------------------------------


def claims_by_domain(claims: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The claims of each domain, in the order of the experiments."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for claim in claims:
        found.setdefault(claim["domain"], []).append(claim)
    return found


def claim_lines(claims: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table of claims as people read it: the heading, then a line for each claim; empty if there are none."""
    if not claims:
        return []
    domains = (
        [[claim["domain"]] for claim in claims] if any(claim["domain"] for claim in claims) else [[]] * len(claims)
    )
    heading = [*(["domain"] if domains[0] else []), "statement", "the exact posterior says", "the guide says"]
    lines = [
        [*domain, f"{claim['says']} ({expected(claim)})", *(_answered(claim, source) for source in SOURCES)]
        for domain, claim in zip(domains, claims, strict=True)
    ]
    return [heading, *lines]


def expected(claim: Mapping[str, Any]) -> str:
    """What a claim says of its number: which one it is, and on which side of the limit it is expected."""
    number = f"{claim['number']} of {claim['row']}" + (f" minus {claim['minus']}" if claim["minus"] else "")
    side = f"within ±{claim['limit']:g}" if claim["expects"] == "within" else f"{claim['expects']} {claim['limit']:g}"
    return f"{number}: {side} {claim['unit'].split(',')[0]}"


def said(part: Mapping[str, Any]) -> str:
    """The value of one source with its error, and why there is no answer."""
    value, se = (math.nan if part[name] is None else part[name] for name in ("value", "se"))
    number = "" if math.isnan(value) else shown(value, se)
    return "; ".join(text for text in (number, part["because"]) if text)


def _answered(claim: Mapping[str, Any], source: str) -> str:
    part = claim[source]
    return f"{part['answer']}: {said(part)}" if part["answer"] else "–"


# -- beside the paper --------------------------------------------------------------------------------------------------

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
