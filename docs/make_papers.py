"""Writes the tables of docs/papers/PAPER.md from benchmarks/results/reproduce-PAPER-*.json: `make papers`.

Each of these files is a copy of a run's results.json. A table stands between two comments of the page,
`<!-- table: EXPERIMENT NAME -->` and `<!-- end -->`, where NAME is what stands for the * in the file's name; the table
of the paper's claims, between `<!-- claims: NAME -->` and `<!-- end -->`.
"""

import re
from pathlib import Path
from typing import Any

from make_parts import table

import calibrant as cal

PAGES = Path(__file__).with_name("papers")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- (table: (?P<experiment>\S+)|claims:) (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def part(page: Path, experiment: str | None, name: str, results: Path) -> str:
    """The table of an experiment, or of the paper's claims, as a stored file has it."""
    file = results / f"reproduce-{page.stem}-{name}.json"
    if not file.is_file():
        return f"There are no results yet: copy results.json of `calibrant reproduce {page.stem}` to {file.name}.\n"
    found = cal.reproductions.load_results(file)
    return claims(found) if experiment is None else measured(found, experiment)


def claims(found: cal.reproductions.Results) -> str:
    """The table of the paper's claims."""
    heading, *lines = found.claim_lines
    return f"{table(heading, lines)}\n\n{_made(found, found.experiments)}\n"


def measured(found: cal.reproductions.Results, experiment: str) -> str:
    """The table of an experiment, with its sentences and what is needed to judge it."""
    if left_out := found.content["experiments"][experiment]["left_out"]:
        return f"Left out of this run: {left_out}.\n"
    content: dict[str, Any] = found.content["experiments"][experiment]
    heading, *lines = found.lines(experiment)
    units = "; ".join(f"{number}: {unit}" for number, unit in content["numbers"].items())
    data = ", ".join(content["data"].values()) or "none"
    notes = f"{units}. Data: {data}. Seeds: {len(content['seeds'])}; “±” is one standard error. {content['reduced']}"
    said = "\n".join(f"- {sentence}" for sentence in found.sentences(experiment))
    return "\n\n".join([table(heading, lines), f"{notes.strip()} {_made(found, [experiment])}", said]).rstrip() + "\n"


def _made(found: cal.reproductions.Results, experiments: list[str]) -> str:
    """When and where a run was made."""
    devices = sorted({device for name in experiments for row in found.table(name) for device in row["devices"]})
    kind = "Quick run" if found.content["quick"] else "Full run"
    return f"{kind} of {found.content['made'][:10]} on {', '.join(devices)}."


def text(page: Path, results: Path = RESULTS) -> str:
    """A page with its tables written anew."""
    return PLACE.sub(
        lambda found: f"{found[1]}\n{part(page, found['experiment'], found['name'], results)}\n{found[5]}",
        page.read_text(encoding="utf-8"),
    )


if __name__ == "__main__":
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(text(page), encoding="utf-8")
