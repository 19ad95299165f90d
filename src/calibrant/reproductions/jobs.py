"""The cells of a run: from what each follows, which of them are finished, and which cells each uses."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from calibrant.errors import RunError
from calibrant.folders.configuration import versions_of
from calibrant.folders.files import digest
from calibrant.reproductions.cards import Experiment
from calibrant.reproductions.cells import Cell, read_cell
from calibrant.reproductions.folder import Plan, clear_trainings
from calibrant.reproductions.kept import read_kept
from calibrant.reproductions.source import code_of
from calibrant.reproductions.splits import Source


@dataclass(frozen=True, eq=False)
class Job:
    """A cell that is to be computed, with the sha256 of all that it follows from.

    Attributes:
        card: the experiment.
        row: the row.
        seed: the seed.
        digest: the sha256.
        uses: the cells with the same seed of the experiment whose trained models it takes.
    """

    card: Experiment
    row: str
    seed: int
    digest: str
    uses: tuple[Job, ...] = ()

    def __str__(self) -> str:
        return f"{self.card.name}, {self.row}, seed {self.seed}"


def jobs_of(plan: Plan, source: Source, left_out: Collection[str]) -> list[Job]:
    """The cells of a run: seed by seed, since those of one seed share their data; used ones before users."""
    jobs: list[Job] = []
    cards = [card for card in plan.experiments if card.name not in left_out]
    for seed in range(max((len(plan.seeds_of(card)) for card in cards), default=0)):
        for card in (card for card in cards if seed in plan.seeds_of(card)):
            used = tuple(job for job in jobs if job.card.name == card.uses and job.seed == seed)
            jobs += _jobs(plan, card, source, seed, used)
    return jobs


def _jobs(plan: Plan, card: Experiment, source: Source, seed: int, used: tuple[Job, ...]) -> list[Job]:
    facts = {
        "experiment": [card.paper, card.name],
        "seed": seed,
        "settings": card.settings_of(plan.quick),
        "quick": plan.quick,
        "device": torch.device(plan.device).type,
        "options": source.options(card),
        "data": {
            name: {split: part.fingerprint() for split, part in splits.items()}
            for name, splits in source.data(card, seed).items()
        },
        "code": digest(code_of(card.cell).encode()),
    }
    if there := versions_of(card.optional):
        facts["packages"] = there
    if used:
        facts["uses"] = {job.row: job.digest for job in used}
    jobs = []
    for row in card.rows_of(plan.quick):
        told = json.dumps({**facts, "row": row, "arguments": card.rows[row]}, sort_keys=True)
        jobs.append(Job(card, row, seed, digest(told.encode()), used))
    return jobs


def digest_of_all(jobs: Sequence[Job]) -> str:
    """The sha256 of a configuration: that of all its cells."""
    return digest("".join(sorted(job.digest for job in jobs)).encode())


def unfinished(plan: Plan, jobs: Sequence[Job], overwrite: bool) -> list[Job]:
    """The cells that have no result yet, or whose kept weights are missing or damaged.

    Raises:
        RunError: for finished cells of another configuration that are not to be replaced.
    """
    stored = {job: read_cell(plan.cell_file(job.card, job.row, job.seed)) for job in jobs}
    changed = [job for job, cell in stored.items() if cell is not None and cell.digest != job.digest]
    if changed and not overwrite:
        raise RunError(
            f"{len(changed)} of the finished cells in {plan.out} were made with other settings, data or code, the "
            f"first is {changed[0]}: {plan.resuming()} --overwrite computes these again, --out FOLDER starts a new run"
        )
    for job in changed:
        plan.cell_file(job.card, job.row, job.seed).unlink()
    waiting = [job for job, cell in stored.items() if job in changed or not _is_whole(plan, job, cell)]
    for job in waiting:
        clear_trainings(plan, job.card, job.row, job.seed, job.digest)
    return waiting


def _is_whole(plan: Plan, job: Job, cell: Cell | None) -> bool:
    """Whether a cell has its result, and the weights that it keeps are as they were written."""
    if cell is None or cell.failed:
        return False
    files = {plan.weights_file(job.card, job.row, job.seed, name): sha256 for name, sha256 in cell.kept.items()}
    return all(read_kept(path, job.digest, sha256) is not None for path, sha256 in files.items())
