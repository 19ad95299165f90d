"""What an experiment found: numbers of rows over seeds, their differences, and the table beside the paper's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from calibrant.reproductions.cards import Experiment, Ordering, Target
from calibrant.reproductions.cells import EACH, Cell, Measured

_LEVEL = 0.95  # one-sided: an order holds, or not, beyond chance
_DECIMALS = 4  # most decimals of a number; a difference that they do not show is none


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, with its standard error.

    Attributes:
        value: the mean; NaN if no seed has the number.
        se: its standard error; NaN if it is not known.
        of: where the error comes from: "seeds", or "test data" if there is one seed, or "".
        seeds: number of seeds.
        freedom: degrees of freedom of the error.
    """

    value: float
    se: float
    of: str
    seeds: int
    freedom: float = math.inf

    def limit(self, tests: int = 1) -> float:
        """What the value must exceed to be positive beyond chance, where one of so many does so wrongly once in 20."""
        from scipy import stats

        level = 1.0 - (1.0 - _LEVEL) / tests
        return float(stats.t.ppf(level, self.freedom)) * self.se

    def __str__(self) -> str:
        return shown(self.value, self.se)


def shown(value: float, se: float = math.nan) -> str:
    """A number with its standard error, which has two digits, and at most four decimals; a dash for no number."""
    if not math.isfinite(value):
        return "–"
    if not (math.isfinite(se) and se > 0):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    digits = min(_DECIMALS, max(0, 1 - math.floor(math.log10(se))))
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def estimated(values: Sequence[float], errors: Sequence[float], freedom: float = math.inf) -> Estimate:
    """The mean of values, one per seed, with its error over seeds; with one seed, the error within it.

    `freedom` is the number of degrees of freedom of the error within a seed.

    Seeds may have the same test data, so that the error within a seed (root mean square) does not fall with their
    number: it is added to the error over seeds. Degrees of freedom are those of Welch and Satterthwaite.
    """
    rows = [(value, error) for value, error in zip(values, errors, strict=True) if not math.isnan(value)]
    if not rows:
        return Estimate(math.nan, math.nan, "", 0)
    found = np.array([value for value, _ in rows])
    if len(rows) == 1:
        return Estimate(float(found[0]), rows[0][1], "" if math.isnan(rows[0][1]) else "test data", 1, freedom)
    within = float((np.nan_to_num([error for _, error in rows]) ** 2).mean())
    over = float(found.var(ddof=1)) / len(found)
    parts = ((over, len(found) - 1), (within, freedom))
    terms = sum(part**2 / degrees for part, degrees in parts)
    degrees = (over + within) ** 2 / terms if terms > 0 else math.inf
    return Estimate(float(found.mean()), math.sqrt(over + within), "seeds", len(found), degrees)


@dataclass(frozen=True)
class Picture:
    """A picture of the report: its title, how to read it, and the image as text (`reporting.style.data_uri`)."""

    title: str
    caption: str
    uri: str


@dataclass(frozen=True)
class Summary:
    """What an experiment's `summarise` returns.

    Attributes:
        sentences: what was found, in sentences that a reader understands who has not seen the table.
        pictures: pictures of the report.
        derived: row → number → seed → value, for rows that follow from several others, such as the best one by the
            validation data; the numbers are those of the card.
    """

    sentences: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    derived: Mapping[str, Mapping[str, Mapping[int, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """The cells of an experiment, from which `summarise` makes sentences and pictures.

    Attributes:
        card: the experiment.
        cells: (row, seed) → cell, failed ones too.
        seeds: the seeds.
        quick: whether the run is a quick one.
        used: name of each data set that the card asks for → name of the set that was used.
    """

    card: Experiment
    cells: Mapping[tuple[str, int], Cell]
    seeds: tuple[int, ...]
    quick: bool
    used: Mapping[str, str]

    @property
    def rows(self) -> list[str]:
        """The rows of this run, in the order of the card."""
        return self.card.rows_of(self.quick)

    def values(self, row: str, number: str) -> list[float]:
        """A number for every seed; NaN where the cell failed or has no such number."""
        return [self._cell(row, seed).numbers.get(number, math.nan) for seed in self.seeds]

    def mean(self, row: str, number: str) -> Estimate:
        """The mean of a number over seeds."""
        errors = [self._cell(row, seed).errors.get(number, math.nan) for seed in self.seeds]
        each = [self.array(row, number + EACH, seed) for seed in self.seeds]
        freedom = min((len(values) - 1 for values in each if values is not None), default=math.inf)
        return estimated(self.values(row, number), errors, freedom)

    def difference(self, row: str, other: str, number: str, seed: int | None = None) -> Estimate:
        """Mean over seeds of the number of `row` minus that of `other` with the same seed, or that of one seed.

        The error within a seed is that of the mean difference over test data, if both cells have the values of single
        data (`Measured.of`), else that of two independent numbers, which is larger.
        """
        seeds = self.seeds if seed is None else (seed,)
        values = [self._cell(row, one).numbers.get(number, math.nan) for one in seeds]
        less = [self._cell(other, one).numbers.get(number, math.nan) for one in seeds]
        differences = [one - two for one, two in zip(values, less, strict=True)]
        within = [self._within(row, other, number, one) for one in seeds]
        return estimated(differences, [error for error, _ in within], min(freedom for _, freedom in within))

    def _within(self, row: str, other: str, number: str, seed: int) -> tuple[float, float]:
        """The standard error of a difference within a seed, and its degrees of freedom."""
        each = [self.array(one, number + EACH, seed) for one in (row, other)]
        if each[0] is not None and each[1] is not None and len(each[0]) == len(each[1]):
            return Measured.of(each[0] - each[1]).se, len(each[0]) - 1
        return math.hypot(*(self._cell(one, seed).errors.get(number, math.nan) for one in (row, other))), math.inf

    def array(self, row: str, name: str, seed: int | None = None) -> np.ndarray | None:
        """An array of a cell, by default of the first seed; None if the cell has none."""
        return self._cell(row, self.seeds[0] if seed is None else seed).arrays.get(name)

    def one(self, row: str, number: str, seed: int) -> float:
        """A number of one seed; NaN where the cell failed or has no such number."""
        return self._cell(row, seed).numbers.get(number, math.nan)

    def _cell(self, row: str, seed: int) -> Cell:
        return self.cells.get((row, seed), Cell(""))


# -- beside the paper --------------------------------------------------------------------------------------------------


def table(found: Found, summary: Summary) -> list[dict[str, Any]]:
    """The rows of `results.json`: one for each row and number of the experiment, and those that were derived."""
    rows = [_row(found, row, number) for row in found.rows for number in found.card.numbers if _has(found, row, number)]
    for row, numbers in summary.derived.items():
        for number, values in numbers.items():
            each = [values.get(seed, math.nan) for seed in found.seeds]
            mean = estimated(each, [math.nan] * len(each))
            rows.append(_beside(found, row, number, mean, dict(zip(found.seeds, each, strict=True))))
    return rows


def _has(found: Found, row: str, number: str) -> bool:
    """Whether a row has a number, was meant to have it, or failed."""
    cells = [found.cells[row, seed] for seed in found.seeds if (row, seed) in found.cells]
    meant = any(target.row == row and target.number == number for target in found.card.targets)
    first = number == next(iter(found.card.numbers))
    return meant or any(number in cell.numbers or (cell.failed and first) for cell in cells)


def _row(found: Found, row: str, number: str) -> dict[str, Any]:
    cells = {seed: found.cells[row, seed] for seed in found.seeds if (row, seed) in found.cells}
    values = dict(zip(found.seeds, found.values(row, number), strict=True))
    return _beside(found, row, number, found.mean(row, number), values) | {
        "monte_carlo_se": {str(seed): cell.errors.get(number) for seed, cell in cells.items()},
        "failed": {str(seed): cell.failed for seed, cell in cells.items() if cell.failed},
        "steps": {str(seed): cell.steps for seed, cell in cells.items()},
        "stopped": {str(seed): cell.stopped for seed, cell in cells.items() if cell.stopped},
        "seconds": {str(seed): round(cell.seconds, 1) for seed, cell in cells.items()},
        "devices": sorted({cell.device for cell in cells.values()}),
    }


def _beside(found: Found, row: str, number: str, mean: Estimate, values: Mapping[int, float]) -> dict[str, Any]:
    target = next((t for t in found.card.targets if (t.row, t.number) == (row, number)), None)
    because = "" if target is None else _because(found, target)
    return {
        "row": row,
        "number": number,
        "unit": found.card.numbers[number],
        "paper": None if target is None else target.value,
        "tolerance": None if target is None else target.tolerance,
        "ours": mean.value,
        "se": mean.se,
        "se_of": mean.of,
        "seeds": {str(seed): value for seed, value in values.items()},
        "answer": _answer(target, mean) if target is not None and not because else "",
        "not_reproduced_because": because,
        "monte_carlo_se": {},
        "failed": {},
        "steps": {},
        "stopped": {},
        "seconds": {},
        "devices": [],
    }


def _because(found: Found, target: Target) -> str:
    """Why a number of the paper is not expected of this run; empty if it is."""
    if target.because:
        return target.because
    if found.quick and found.card.reduced_quick:
        return "this is a quick run"
    others = {n.name: found.used[n.label] for n in found.card.needs if found.used.get(n.label, n.name) != n.name}
    if others:
        return f"these are other data, {' and '.join(f'{used} in place of {asked}' for asked, used in others.items())}"
    return ""


def _answer(target: Target, mean: Estimate) -> str:
    """Whether a paper's value is reached: "reached", "not reached" or "cannot tell"; empty if it is not judged."""
    if target.tolerance is None or math.isnan(mean.value):
        return ""
    off, error = abs(mean.value - target.value), 0.0 if math.isnan(mean.se) else 2.0 * mean.se
    if off + error <= target.tolerance:
        return "reached"
    return "not reached" if off - error > target.tolerance else "cannot tell"


def judged(found: Found, ordering: Ordering) -> dict[str, Any]:
    """Whether the order of rows holds beyond chance: "holds", "does not hold" or "cannot tell", with a sentence.

    All steps have to be there for the order to hold, and any one refutes it: each answer is wrong in one run of 20 at
    most. With one seed, chance is that of the test data alone, and the sentence says so.
    """
    present = [row for row in ordering.rows if row in found.rows]
    steps = [(low, high, found.difference(high, low, ordering.number)) for low, high in pairwise(present)]
    answers = [_sign(step, len(steps)) for _, _, step in steps]
    whole = present == list(ordering.rows)
    answer = "does not hold" if -1 in answers else "holds" if whole and answers and 0 not in answers else "cannot tell"
    unit = found.card.numbers[ordering.number]
    shown_steps = "; ".join(f"{ordering.number} of {high} minus {low}: {step} {unit}" for low, high, step in steps)
    if answer != "cannot tell" and any(step.seeds == 1 for _, _, step in steps):
        shown_steps += "; one training each, so that the errors are those of the test data alone"
    return {
        "says": ordering.says,
        "answer": answer,
        "differences": [{"of": high, "minus": low, "value": s.value, "se": s.se} for low, high, s in steps],
        "sentence": f"{_WORDS[answer]} {ordering.says} ({shown_steps}).",
    }


_WORDS = {"holds": "As stated,", "does not hold": "Not so here:", "cannot tell": "This run cannot tell whether"}


def _sign(step: Estimate, steps: int) -> int:
    """1 for a difference that is positive beyond chance, -1 for one that is negative, as one of several; else 0."""
    if math.isnan(step.value) or math.isnan(step.se) or round(step.value, _DECIMALS) == 0:
        return 0
    return int(step.value > step.limit()) - int(step.value < -step.limit(steps))
