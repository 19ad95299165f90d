"""Cards of papers and of their experiments: what each shows, on which data, with which numbers it is compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SOURCES = ("exact", "guide")  # what follows the name of a number that claims are about


@dataclass(frozen=True)
class Needs:
    """A data set that an experiment needs.

    Attributes:
        name: name of a registered data set.
        options: options of the data set, such as `size=28`.
        keys: keys that the cells get.
        fallback: what takes its place where its files are absent; results name it, and are compared with no paper.
        most: split → largest number of data, evenly spaced in the split; the data of other splits are all taken.
        quick: the same for a quick run.
        quick_options: options that a quick run changes.
        blocks: number of equal blocks of the test data, in their order, within which data depend on each other, such as
            stretches of a video; errors are then those of means over blocks.
        key: name under which cells get the splits, if one data set is needed with several options; the set's name if it
            is empty.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ("x",)
    fallback: Needs | None = None
    most: Mapping[str, int] = field(default_factory=dict)
    quick: Mapping[str, int] = field(default_factory=dict)
    quick_options: Mapping[str, Any] = field(default_factory=dict)
    blocks: int | None = None
    key: str = ""

    @property
    def label(self) -> str:
        """The name under which cells get the splits."""
        return self.key or self.name

    def options_of(self, quick: bool) -> dict[str, Any]:
        """The options of a quick or of a full run."""
        return {**self.options, **(self.quick_options if quick else {})}


@dataclass(frozen=True)
class Target:
    """A number of the paper.

    Attributes:
        row: row of the experiment.
        number: which of the experiment's numbers it is.
        value: the paper's value.
        tolerance: largest difference at which the value counts as reached, in units of the number; None if the value is
            shown without being judged.
        because: why the value cannot be reached in principle; empty if it can.
    """

    row: str
    number: str
    value: float
    tolerance: float | None = None
    because: str = ""


@dataclass(frozen=True)
class Ordering:
    """A statement about the order of rows, which each run judges from differences between the same seeds.

    Attributes:
        number: the number that is compared.
        rows: rows from the lowest value to the highest.
        says: the statement in words, without a full stop.
    """

    number: str
    rows: tuple[str, ...]
    says: str


@dataclass(frozen=True)
class Claim:
    """A statement about one number, judged over seeds for the exact posterior and for the guide apart.

    The experiment has the numbers `f"{number}, exact"`, `f"{number}, guide"`, or both. A cell whose references were
    refused for some images tells their share as `f"{number}, refused"`, or as `refused` for all its numbers.

    Attributes:
        says: the statement in words, without a full stop.
        row: row of the experiment.
        number: the number without its ending.
        expects: "above" or "below" the limit, or "within" ± limit of zero.
        limit: the limit, in units of the number.
        minus: another row, whose number is subtracted seed by seed; empty for none.
        by: whose statement it is: the "paper"'s, or "ours", which the report says.
    """

    says: str
    row: str
    number: str
    expects: Literal["above", "below", "within"]
    limit: float = 0.0
    minus: str = ""
    by: Literal["paper", "ours"] = "paper"

    @property
    def rows(self) -> tuple[str, ...]:
        """The rows that it is about."""
        return (self.row, self.minus) if self.minus else (self.row,)


@dataclass(frozen=True)
class Paper:
    """A paper: its name for users, its title, its number at arXiv, and one sentence that says what it is about."""

    name: str
    title: str
    arxiv: str
    sentence: str


@dataclass(frozen=True, eq=False)
class Experiment:
    """An experiment of a paper: a table of rows, each of which is computed for every seed in a cell of its own.

    Attributes:
        paper: name of the paper.
        name: name that users give.
        answers: the figure or table of the paper that it answers.
        shows: what it shows, in one sentence.
        rows: row → arguments of its cells, JSON values.
        numbers: number → its unit in words, in the order of the table's columns.
        needs: the data sets, the first of which is `context.splits`; empty for none.
        settings: settings of the cells, JSON values.
        quick: the settings that a quick run changes.
        full_only: rows that a quick run leaves out.
        reduced: what is smaller than in the paper, in one or two sentences; `reduced_quick`, of a quick run.
        minutes: expected minutes on two cores, of a quick run and of a full one.
        seeds: number of seeds of a quick run and of a full one.
        targets: the paper's numbers.
        orderings: statements about the order of rows.
        claims: statements of the paper about single numbers.
        domain: the domain of data that it is about, as `--domain` names it; empty if the paper has one domain.
        uses: name of an experiment of the same paper whose trained models its cells take; empty for none.
        optional: optional packages that change what the cells compute: their versions are part of what a cell follows
            from.
        cell: function that computes a cell.
        summarise: function of the finished cells that returns sentences and pictures; None for neither.
    """

    paper: str
    name: str
    answers: str
    shows: str
    rows: Mapping[str, Mapping[str, Any]]
    numbers: Mapping[str, str]
    needs: tuple[Needs, ...]
    settings: Mapping[str, Any]
    quick: Mapping[str, Any]
    full_only: tuple[str, ...]
    reduced: str
    reduced_quick: str
    minutes: tuple[float, float]
    seeds: tuple[int, int]
    targets: tuple[Target, ...]
    orderings: tuple[Ordering, ...]
    claims: tuple[Claim, ...]
    domain: str
    uses: str
    optional: tuple[str, ...]
    cell: Callable[..., Mapping[str, Any]]
    summarise: Callable[..., Any] | None

    def rows_of(self, quick: bool) -> list[str]:
        """The rows of a quick or of a full run."""
        return [row for row in self.rows if not (quick and row in self.full_only)]

    def settings_of(self, quick: bool) -> dict[str, Any]:
        """The settings of a quick or of a full run."""
        return {**self.settings, **(self.quick if quick else {})}


def file_name(row: str) -> str:
    """The name of a row in the names of files."""
    return re.sub(r"[^\w.]+", "-", row).strip("-.").lower()
