"""Writes the tables of docs/papers/PAPER.md from benchmarks/results/reproduce-PAPER-*.json: `make papers`.

Each of these files is a copy of a run's results.json. A table stands between two comments of the page,
`<!-- table: EXPERIMENT NAME -->` and `<!-- end -->`, where NAME is what stands for the * in the file's name.
"""

import re
from pathlib import Path
from typing import Any

from make_parts import table

import calibrant as cal

PAGES = Path(__file__).with_name("papers")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def part(page: Path, experiment: str, name: str, results: Path) -> str:
    """The table of an experiment, with its sentences and what is needed to judge it."""
    file = results / f"reproduce-{page.stem}-{name}.json"
    if not file.is_file():
        return f"There are no results yet: copy results.json of `calibrant reproduce {page.stem}` to {file.name}.\n"
    found = cal.reproductions.load_results(file)
    content: dict[str, Any] = found.content["experiments"][experiment]
    heading, *lines = found.lines(experiment)
    units = "; ".join(f"{number}: {unit}" for number, unit in content["numbers"].items())
    data = ", ".join(content["data"].values())
    devices = sorted({device for row in content["rows"] for device in row["devices"]})
    notes = f"{units}. Data: {data}. Seeds: {len(content['seeds'])}; “±” is one standard error. {content['reduced']}"
    kind = "Quick run" if found.content["quick"] else "Full run"
    made = f"{kind} of {found.content['made'][:10]} on {', '.join(devices)}."
    said = "\n".join(f"- {sentence}" for sentence in found.sentences(experiment))
    return "\n\n".join([table(heading, lines), f"{notes.strip()} {made}", said]).rstrip() + "\n"


def text(page: Path, results: Path = RESULTS) -> str:
    """A page with its tables written anew."""
    return PLACE.sub(
        lambda found: f"{found[1]}\n{part(page, found[2], found[3], results)}\n{found[4]}",
        page.read_text(encoding="utf-8"),
    )


if __name__ == "__main__":
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(text(page), encoding="utf-8")
