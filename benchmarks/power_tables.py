"""The tables of `benchmarks.power`: rates with their intervals, what each check is blind to, and what holds.

    python -m benchmarks.power_tables [--docs FILE]

shows those of benchmarks/results/power-cpu.json, or writes them into the page, between the lines that name them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scipy.stats import beta

from benchmarks.cells import FOOLED, HARMLESS, SMALL, STRONG
from benchmarks.trained import AS_TRAINED, TRAINED

RESULTS = Path(__file__).parent / "results/power-cpu.json"

LEVEL, TAIL = 0.05, 0.025
POWERFUL = 0.95  # what the check promises
BLIND, SEES = 0.25, 0.8

VERDICTS = (
    "sd",
    "mean",
    "coverage",
    "shape",
    "correlation",
    "direction",
    "single data",
    "evidence gap",
    "k-hat",
    "log joint",
    "log likelihood",
)
TESTS = ("latents", "log_likelihood", "log_joint", "hpd", "tarp", "c2st")


@dataclass(frozen=True)
class Row:
    """What the check said of one guide.

    Attributes:
        rates: check → the share of the repetitions in which it failed, or its p-value was at most 0.05; "whole" is the
            conclusion.
        passes: verdict → the share in which it passed.
    """

    program: str
    guide: str
    repetitions: int
    rates: dict[str, float]
    passes: dict[str, float]
    budget: dict[str, int] = field(repr=False)

    @property
    def is_exact(self) -> bool:
        """Whether the guide has no defect."""
        return self.guide in ("exact", AS_TRAINED)

    @property
    def is_small(self) -> bool:
        """Whether the budget is too small for anything to pass."""
        return self.budget["data"] == SMALL.data

    def interval(self, rate: float) -> tuple[float, float]:
        """Of the probability of what happened at this rate."""
        count = round(rate * self.repetitions)
        low = float(beta.ppf(TAIL, count, self.repetitions - count + 1)) if rate > 0 else 0.0
        high = float(beta.isf(TAIL, count + 1, self.repetitions - count)) if rate < 1 else 1.0
        return low, high


def percentage(row: Row, rate: float | None) -> str:
    """A rate with its interval, in percent."""
    if rate is None:
        return ""
    low, high = row.interval(rate)
    return f"{100 * rate:.3g} [{100 * low:.3g}, {100 * high:.3g}]"


def table(rows: list[Row], columns: Mapping[str, Callable[[Row], float | None]]) -> str:
    """Percent of the repetitions, in Markdown."""
    lines = [f"| program | guide | n | {' | '.join(columns)} |", f"|---|---|--:|{'--:|' * len(columns)}"]
    for row in rows:
        program = f"{row.program}, small budget" if row.is_small else row.program
        cells = [percentage(row, rate(row)) for rate in columns.values()]
        lines.append(f"| {program} | {row.guide} | {row.repetitions} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rate(check: str) -> Callable[[Row], float | None]:
    return lambda row: row.rates.get(check)


CONCLUSIONS: Mapping[str, Callable[[Row], float | None]] = {
    "fail": _rate("whole"),
    "cannot tell": lambda row: max(0.0, 1 - row.rates["whole"] - row.passes["whole"]),
    "pass": lambda row: row.passes["whole"],
}


def judged(rows: list[Row]) -> list[Row]:
    """Rows at the default budget."""
    return [row for row in rows if not row.is_small]


def blindness(rows: list[Row]) -> str:
    """What each check hardly ever sees, and what it nearly always sees: the interval of its power says so."""
    lines = [f"| check | blind to (power < {BLIND:.0%}) | sees (power > {SEES:.0%}) |", "|---|---|---|"]
    wrong = [row for row in judged(rows) if not row.is_exact and row.program not in TRAINED]
    for check in (*VERDICTS, *TESTS):
        powers = {f"{row.guide} ({row.program})": row.interval(row.rates[check]) for row in wrong if check in row.rates}
        blind = [label for label, (_, high) in powers.items() if high < BLIND]
        sees = [label for label, (low, _) in powers.items() if low > SEES]
        lines.append(f"| {check} | {', '.join(blind) or '–'} | {', '.join(sees) or '–'} |")
    return "\n".join(lines)


def requirements(rows: list[Row]) -> Iterator[tuple[str, str]]:
    """What must hold, as far as the rows say: "holds", "missed", or "n?" where it held in too few to be sure of it."""

    def shown(held: bool, surely: bool = True) -> str:
        return ("holds" if surely else "n?") if held else "missed"

    for row in judged(rows):
        name, failed, passed = f"{row.program}, {row.guide}", row.rates["whole"], row.passes["whole"]
        rate, (low, high) = percentage(row, failed), row.interval(failed)
        if row.is_exact or row.guide in HARMLESS:
            yield f"{name}: false alarms of the whole check ≤ 5%: {rate}", shown(failed <= LEVEL, high <= LEVEL)
        if row.is_exact:
            low, _ = row.interval(passed)
            yield f"{name}: passes ≥ 90%: {percentage(row, passed)}", shown(passed >= 0.9, low >= 0.9)
        if row.is_exact or row.guide in HARMLESS:
            continue
        if row.guide in (*STRONG, "missing mode") or row.program in FOOLED:
            yield f"{name}: power ≥ 95%: {rate}", shown(failed >= POWERFUL, low >= POWERFUL)
        yield f"{name}: fails ({rate}) or cannot tell, never passes ({passed:.1%})", shown(passed == 0)
    for row in rows:
        if row.is_small:
            passed = row.passes["whole"]
            text = f"{row.program}, {row.guide}, 20 data and 100 draws: never passes ({passed:.1%})"
            yield text, shown(passed == 0)


def all_tables(rows: list[Row]) -> dict[str, str]:
    """Name → table in Markdown."""
    by_verdict, by_test = ({check: _rate(check) for check in checks} for checks in (VERDICTS, TESTS))
    parts = {"conclusions": CONCLUSIONS, "verdicts that fail": by_verdict, "p-values at most 0.05": by_test}
    return {name: table(rows, columns) for name, columns in parts.items()} | {"blindness": blindness(rows)}


def show(rows: list[Row]) -> None:
    """All tables, and what holds."""
    for name, text in all_tables(rows).items():
        print(f"\n{name}, % of the repetitions\n\n{text}\n")
    for text, answer in requirements(rows):
        print(f"{answer:<6}", text)


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """A page whose tables, between `<!-- power: NAME -->` and `<!-- end -->`, are replaced."""
    for name, text in tables.items():
        pattern = rf"(<!-- power: {re.escape(name)} -->\n).*?(<!-- end -->)"
        page, count = re.subn(
            pattern, lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"the page has {count} places for the table {name!r}, wanted 1")
    return page


def main() -> None:
    """Show the tables, or write them into a page."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, default=RESULTS, help="rows that benchmarks.power has written")
    options.add_argument("--docs", type=Path, help="page whose tables are replaced")
    asked = options.parse_args()
    rows = [Row(**row) for row in json.loads(asked.json.read_text())]
    if asked.docs is None:
        show(rows)
    else:
        asked.docs.write_text(with_tables(asked.docs.read_text(), all_tables(rows)))


if __name__ == "__main__":
    main()
