"""Writes the tables of docs/speed.md and docs/densities.md from benchmarks/results/NAME.json: `make speed`.

A table stands between the comments `<!-- table: NAME -->` and `<!-- end -->`. A file holds rows, or an object with
`rows` and possibly `machine`, as `python -m benchmarks.… --json FILE` writes it.
"""

import json
import re
from pathlib import Path
from typing import Any

from make_parts import table

PAGES = [Path(__file__).with_name(name) for name in ("speed.md", "densities.md")]
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
PLACE = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def part(name: str, results: Path) -> str:
    """The table of a stored file, with the machine below it."""
    file = results / f"{name}.json"
    if not file.is_file():
        command = f"python -m benchmarks.{name.removesuffix('-cpu')} --json benchmarks/results/{file.name}"
        return f"There are no results yet: `{command}` stores them.\n"
    content: Any = json.loads(file.read_text(encoding="utf-8"))
    rows = content["rows"] if isinstance(content, dict) else content
    heading = list(dict.fromkeys(key for row in rows for key in row))
    made = table([key.replace("_", " ") for key in heading], [[cell(row.get(key)) for key in heading] for row in rows])
    machine = content.get("machine", "") if isinstance(content, dict) else ""
    said = machine if isinstance(machine, str) else ", ".join(f"{name}: {value}" for name, value in machine.items())
    return f"{made}\n\n{said}".rstrip() + "\n"


def cell(value: Any) -> str:
    """A value with three digits, or a dash if there is none."""
    if value is None or value == "" or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def text(page: Path, results: Path = RESULTS) -> str:
    """A page with its tables written anew."""
    return PLACE.sub(
        lambda found: f"{found[1]}\n{part(found['name'], results)}\n{found[3]}", page.read_text(encoding="utf-8")
    )


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(text(page), encoding="utf-8")
