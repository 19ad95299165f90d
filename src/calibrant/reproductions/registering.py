"""The registry of papers and experiments: each file of the folder `papers` registers its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from calibrant.errors import RunError
from calibrant.registries import Registry
from calibrant.reproductions.cards import SOURCES, Claim, Experiment, Needs, Ordering, Paper, Target, file_name
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Summary

CellFunction = TypeVar("CellFunction", bound=Callable[[Context, str, int], Mapping[str, Any]])

PAPERS: Registry[Paper] = Registry("paper", RunError, "`calibrant reproduce` lists them")
_EXPERIMENTS: dict[str, Registry[Experiment]] = {}


def register_paper(name: str, *, title: str, arxiv: str, sentence: str) -> Paper:
    """Make a paper known by name; experiments are registered for it with `register_experiment`.

    The arguments are the attributes of `Paper`. A paper that is registered again keeps its experiments.

    Raises:
        RunError: for a name that another paper has.
    """
    paper = Paper(name, title, arxiv, sentence)
    if name in PAPERS and PAPERS[name] != paper:
        raise RunError(f"the name {name!r} is given to two papers, arXiv {PAPERS[name].arxiv} and {arxiv}: rename one")
    PAPERS.add(name, paper, Paper)
    _EXPERIMENTS.setdefault(name, Registry("experiment", RunError, "`calibrant reproduce` lists them"))
    return paper


def register_experiment(
    paper: str,
    name: str,
    *,
    answers: str,
    shows: str,
    rows: Mapping[str, Mapping[str, Any]],
    numbers: Mapping[str, str],
    needs: tuple[Needs, ...],
    minutes: tuple[float, float],
    settings: Mapping[str, Any] | None = None,
    quick: Mapping[str, Any] | None = None,
    full_only: tuple[str, ...] = (),
    reduced: str = "",
    reduced_quick: str = "",
    seeds: tuple[int, int] = (1, 3),
    targets: tuple[Target, ...] = (),
    orderings: tuple[Ordering, ...] = (),
    claims: tuple[Claim, ...] = (),
    domain: str = "",
    uses: str = "",
    optional: tuple[str, ...] = (),
    summarise: Callable[[Found], Summary] | None = None,
) -> Callable[[CellFunction], CellFunction]:
    """Decorator that registers the function of an experiment's cells: `cell(context, row, seed)`.

    The function is pure: what it returns follows from its context (data, settings, the row's arguments, random streams)
    alone. It returns a dict: name → number, `Measured` (a number with its error within the cell), or array,
    which pictures use. It is defined at the top level of its file, so that cells can run in processes of their own. The
    other arguments are the attributes of `Experiment`.

    Raises:
        RunError: for an unknown paper, for a name that another function has, for targets, orderings, claims or settings
            that the experiment does not have, and for an experiment in `uses` that is not registered yet.
    """
    if paper not in PAPERS:
        raise RunError(f"experiment {name!r}: there is no paper {paper!r}; register_paper makes one")

    def register(cell: CellFunction) -> CellFunction:
        found = Experiment(
            paper, name, answers, shows, rows, numbers, needs, settings or {}, quick or {}, full_only, reduced,
            reduced_quick, minutes, seeds, targets, orderings, claims, domain, uses, optional, cell, summarise,
        )  # fmt: skip
        _check(found)
        _EXPERIMENTS[paper].add(name, found, cell)
        return cell

    return register


def _check(card: Experiment) -> None:
    _check_places(card)
    _check_claims(card)
    _check_names(card)
    if other := [name for name in card.quick if name not in card.settings]:
        raise RunError(f"experiment {card.name!r}: quick changes {', '.join(other)}, which is not in settings")
    if card.uses:
        _check_used(card)


def _check_used(card: Experiment) -> None:
    if card.uses == card.name or card.uses not in _EXPERIMENTS[card.paper]:
        raise RunError(
            f"experiment {card.name!r} uses {card.uses!r}, which is not registered yet: register it before, or import "
            "its file"
        )
    if any(more > there for more, there in zip(card.seeds, experiment(card.paper, card.uses).seeds, strict=True)):
        raise RunError(f"experiment {card.name!r} has more seeds than {card.uses!r}, which it uses: give both as many")


def _check_places(card: Experiment) -> None:
    places = [
        *((target.row, target.number) for target in card.targets),
        *((row, ordering.number) for ordering in card.orderings for row in ordering.rows),
    ]
    if lost := [place for place in places if place[0] not in card.rows or place[1] not in card.numbers]:
        raise RunError(
            f"experiment {card.name!r}: it has no row {lost[0][0]} with a number {lost[0][1]}, which a target "
            "or ordering names"
        )


def _check_claims(card: Experiment) -> None:
    for claim in card.claims:
        if lost := [row for row in claim.rows if row not in card.rows]:
            raise RunError(f"experiment {card.name!r}: it has no row {lost[0]}, which a claim names")
        if not any(f"{claim.number}, {source}" in card.numbers for source in SOURCES):
            raise RunError(
                f"experiment {card.name!r}: a claim names {claim.number}, but numbers has neither "
                f"{' nor '.join(f'{claim.number}, {source}' for source in SOURCES)}: add one of them"
            )
        if claim.expects not in ("above", "below", "within") or (claim.expects == "within" and claim.limit <= 0):
            raise RunError(
                f"experiment {card.name!r}: a claim expects {claim.expects!r} with limit {claim.limit:g}: write above, "
                "below, or within with a positive limit"
            )


def _check_names(card: Experiment) -> None:
    files: dict[str, list[str]] = {}
    for row in card.rows:
        files.setdefault(file_name(row), []).append(row)
    for rows in files.values():
        if len(rows) > 1:
            raise RunError(f"experiment {card.name!r}: the rows {' and '.join(rows)} would share a file: rename one")
    if file_name(card.name) != card.name:
        raise RunError(
            f"experiment {card.name!r}: write its name in small letters without spaces: {file_name(card.name)}"
        )


def list_papers() -> list[Paper]:
    """The registered papers, sorted by name."""
    return [PAPERS[name] for name in PAPERS]


def list_experiments(paper: str) -> list[Experiment]:
    """The experiments of a paper in the order in which they were registered.

    Raises:
        RunError: for an unknown paper, with the nearest names.
    """
    return list(_EXPERIMENTS[PAPERS[paper].name].cards())


def experiment(paper: str, name: str) -> Experiment:
    """The card of an experiment.

    Raises:
        RunError: for an unknown paper or experiment, with the nearest names.
    """
    return _EXPERIMENTS[PAPERS[paper].name][name]
