"""Running the experiments of a paper: cells, side by side or in turn, each finished one kept in a file of its own."""

from __future__ import annotations

import json
import pickle
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from calibrant.errors import DataError, RunError
from calibrant.folders.files import digest
from calibrant.processes import processes_for, side_by_side
from calibrant.program.environment import seeded
from calibrant.progress import Progress, silent
from calibrant.reproductions.cards import Experiment
from calibrant.reproductions.cells import Cell, read_cell, sorted_out, write_cell
from calibrant.reproductions.context import Context
from calibrant.reproductions.folder import Plan, check_names, clear_trainings, completed, default_folder, open_folder
from calibrant.reproductions.found import Found
from calibrant.reproductions.registering import experiment
from calibrant.reproductions.results import Results, write_results
from calibrant.reproductions.source import code_of
from calibrant.reproductions.splits import Source
from calibrant.workflow.preparing import check_device

_FINISHED = "finished"  # the remark with which a cell ends


@dataclass(frozen=True, eq=False)
class _Job:
    """A cell that is to be computed, with the sha256 of all that it follows from."""

    card: Experiment
    row: str
    seed: int
    digest: str

    def __str__(self) -> str:
        return f"{self.card.name}, {self.row}, seed {self.seed}"


def run(
    paper: str,
    *,
    only: str | Sequence[str] = (),
    quick: bool = False,
    seeds: int | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    data_root: str | None = None,
    download: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> Results:
    """Run the experiments of a paper, and write their results and a report into a run folder.

    Every row of an experiment is computed for every seed in a cell of its own; rows with the same seed have the same
    data and random streams. On the CPU, as many cells run at a time as torch has threads, with one thread each; results
    do not depend on how many. A cell that fails is recorded with its reason, and the others go on.

    Args:
        paper: name of a registered paper.
        only: name of an experiment, or names of several; empty for all.
        quick: small settings, to see that everything works.
        seeds: number of seeds of every experiment; None for that on its card.
        device: device of trainings.
        out: the run folder; None for `runs/reproduce-PAPER` (with `-quick`).
        resume: continue the run in the folder: finished cells are kept, and those that failed are tried again.
        overwrite: replace the run in the folder; with `resume`, replace the cells whose settings, data or code changed.
        data_root: folder of the files of registered data sets, see `calibrant.data.data_root`.
        download: whether to download data sets that are missing.
        command: command line that the report shows.
        progress: called with (stage, done, total, text).

    Returns:
        The results, whose `table(experiment)` has a row for each row and number.

    Raises:
        RunError: for unknown names, a folder that cannot be used, and finished cells that were made with other
            settings, data or code.
        DataError: for data of an experiment in `only` that are not there.
        KeyboardInterrupt: after Ctrl-C; the message says which command resumes the run.
    """
    check_device(device)
    wanted = Path(out) if out is not None else default_folder(paper, quick)
    named = (only,) if isinstance(only, str) else tuple(only)
    plan = Plan(paper, named, quick, seeds, device, wanted, data_root, download)
    check_names(plan)
    source = Source(data_root, download, quick)
    for name in named:
        if reason := source.missing(experiment(paper, name)):
            raise DataError(f"experiment {name}: {reason}")
    plan = completed(plan, resume, overwrite)
    left_out = {card.name: reason for card in plan.experiments if (reason := source.missing(card))}
    jobs = [job for card in plan.experiments if card.name not in left_out for job in _jobs(plan, card, source)]
    open_folder(plan, resume)  # now that all data were read: what --overwrite replaces is gone
    waiting = _unfinished(plan, jobs, overwrite)
    with _interruptible(plan, jobs):
        _compute_all(plan, waiting, source, len(jobs), progress)
        return write_results(plan, _found(plan, jobs, source), left_out, _overall(jobs), command)


# -- which cells -------------------------------------------------------------------------------------------------------


def _jobs(plan: Plan, card: Experiment, source: Source) -> Iterator[_Job]:
    """The cells of an experiment; those with the same data follow one another."""
    code, settings = code_of(card.cell), card.settings_of(plan.quick)
    for seed in plan.seeds_of(card):
        data = source.data(card, seed)
        facts = {
            "experiment": [card.paper, card.name],
            "seed": seed,
            "settings": settings,
            "quick": plan.quick,
            "device": torch.device(plan.device).type,
            "options": source.options(card),
            "data": {name: {k: part.fingerprint() for k, part in splits.items()} for name, splits in data.items()},
            "code": digest(code.encode()),
        }
        for row in card.rows_of(plan.quick):
            told = json.dumps({**facts, "row": row, "arguments": card.rows[row]}, sort_keys=True)
            yield _Job(card, row, seed, digest(told.encode()))


def _overall(jobs: Sequence[_Job]) -> str:
    """The sha256 of a configuration: that of all its cells."""
    return digest("".join(sorted(job.digest for job in jobs)).encode())


def _unfinished(plan: Plan, jobs: Sequence[_Job], overwrite: bool) -> list[_Job]:
    """The cells that have no result yet.

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
    waiting = [job for job, cell in stored.items() if cell is None or cell.failed or job in changed]
    for job in waiting:
        clear_trainings(plan, job.card, job.row, job.seed, job.digest)
    return waiting


def _found(plan: Plan, jobs: Sequence[_Job], source: Source) -> list[Found]:
    """The finished cells, by experiment."""
    found = []
    for card in plan.experiments:
        own = [job for job in jobs if job.card.name == card.name]
        read = {(job.row, job.seed): read_cell(plan.cell_file(card, job.row, job.seed)) for job in own}
        cells = {place: cell for place, cell in read.items() if cell is not None}
        if own:
            found.append(Found(card, cells, plan.seeds_of(card), plan.quick, source.used(card)))
    return found


# -- computing them ----------------------------------------------------------------------------------------------------


def _compute_all(plan: Plan, jobs: Sequence[_Job], source: Source, total: int, progress: Progress) -> None:
    shown = _counted(progress, total - len(jobs), total)
    if plan.device == "cpu" and processes_for(len(jobs)) > 1 and _can_be_sent(jobs):
        with TemporaryDirectory() as taken:
            side_by_side(_compute_apart, [(plan, jobs, Path(taken))] * processes_for(len(jobs)), shown)
    else:
        for job in jobs:
            _compute(plan, job, source, shown)


def _can_be_sent(jobs: Sequence[_Job]) -> bool:
    """Whether the functions of all cells can be found by another process, which an interpreter's own cannot."""
    try:
        pickle.dumps([job.card for job in jobs])
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return all(job.card.cell.__module__ != "__main__" for job in jobs)


def _counted(progress: Progress, done: int, cells: int) -> Progress:
    """Show the cells that are finished, and what the others are doing."""
    finished = [done]

    def show(stage: str, done: int, total: int, text: str = "") -> None:
        finished[0] += text == _FINISHED
        progress("cells", finished[0], cells, f"{stage}: {text}")

    return show


def _compute_apart(plan: Plan, jobs: Sequence[_Job], taken: Path, progress: Progress) -> None:
    """Compute cells in a process beside others, each of which takes the next cell as soon as it has finished one.

    Args:
        plan: the run.
        jobs: the cells of all processes.
        taken: a folder in which the first process that takes a cell leaves a file with its number.
        progress: called with (stage, done, total, text).
    """
    source = Source(plan.data_root, plan.download, plan.quick)
    for number, job in enumerate(jobs):
        try:
            (taken / str(number)).touch(exist_ok=False)
        except FileExistsError:
            continue
        _compute(plan, job, source, progress)


def _compute(plan: Plan, job: _Job, source: Source, progress: Progress) -> None:
    """Compute a cell and keep what it found, or the reason why it found nothing."""
    card, begin = job.card, time.monotonic()

    def show(stage: str, done: int, total: int, text: str = "") -> None:
        progress(str(job), done, total, f"{stage} {done}/{total} {text}".rstrip())

    context = Context(
        card=card,
        row=job.row,
        seed=job.seed,
        data=source.data(card, job.seed),
        used=source.used(card),
        settings=card.settings_of(plan.quick),
        quick=plan.quick,
        device=plan.device,
        folder=plan.training_folder(card, job.row, job.seed, job.digest),
        progress=show,
    )
    parts: dict[str, Any] = {}
    trace = ""
    try:
        with _alone(context.stream("cell")):
            parts = sorted_out(card.cell(context, job.row, job.seed), card.numbers)
    except Exception as error:
        parts = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        trace = traceback.format_exc()
    steps = sum(steps for steps, _ in context.trained.values())
    stopped = {name: why for name, (_, why) in context.trained.items()}
    told: dict[str, Any] = {
        "steps": steps,
        "stopped": stopped,
        "seconds": time.monotonic() - begin,
        "device": _device(plan.device),
    }
    cell = Cell(job.digest, **told, **parts)
    write_cell(plan.cell_file(card, job.row, job.seed), cell, trace)
    progress(str(job), 1, 1, _FINISHED)


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """The same surroundings for every cell, whatever ran before it and beside it: one thread, float32, a seed."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    try:
        with seeded(seed):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def _device(name: str) -> str:
    """A device in words: the name of a graphics card, else the kind of device."""
    return torch.cuda.get_device_name(name) if torch.device(name).type == "cuda" else name


@contextmanager
def _interruptible(plan: Plan, jobs: Sequence[_Job]) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM end in a message that says what was kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = sum(plan.cell_file(job.card, job.row, job.seed).is_file() for job in jobs)
        raise KeyboardInterrupt(
            f"interrupted; {plan.out} keeps {done} of {len(jobs)} cells, and checkpoints of trainings. Resume with: "
            f"{plan.resuming()}"
        ) from error
