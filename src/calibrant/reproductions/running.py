"""Running the experiments of a paper: cells, side by side or in turn, each finished one kept in a file of its own."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from calibrant.errors import DataError
from calibrant.inference.fitting.given import check_device
from calibrant.processes import processes_for, side_by_side
from calibrant.program.environment import seeded
from calibrant.progress import Progress, reporting
from calibrant.reproductions.cards import Experiment
from calibrant.reproductions.cells import Cell, read_cell, sorted_out, write_cell
from calibrant.reproductions.folder import Plan, check_names, completed, default_folder, open_folder, with_used
from calibrant.reproductions.found import Found
from calibrant.reproductions.jobs import Job, digest_of_all, jobs_of, unfinished
from calibrant.reproductions.registering import experiment
from calibrant.reproductions.results import Results, write_results
from calibrant.reproductions.shelf import context_of
from calibrant.reproductions.splits import Source

_FINISHED = "finished"  # the remark with which a cell ends
_PAUSE = 0.2  # seconds between two looks for cells whose trainings are finished


def run(
    paper: str,
    *,
    only: str | Sequence[str] = (),
    domain: str | Sequence[str] = (),
    quick: bool = False,
    seeds: int | None = None,
    device: str = "cpu",
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    data_root: str | None = None,
    download: bool = False,
    command: str = "",
    progress: Progress | bool = True,
) -> Results:
    """Run the experiments of a paper, and write their results and a report into a run folder.

    Every row of an experiment is computed for every seed in a cell of its own; rows with the same seed have the same
    data and random streams. On the CPU, as many cells run at a time as torch has threads, with one thread each; results
    do not depend on how many. A cell that fails is recorded with its reason, and the others go on.

    Args:
        paper: name of a registered paper.
        only: name of an experiment, or names of several; empty for all. Experiments that these use run as well.
        domain: name of a domain of the paper, or names of several; empty for all.
        quick: small settings, to see that everything works.
        seeds: number of seeds of every experiment; None for that on its card.
        device: device of trainings.
        out: the run folder; None for `runs/reproduce-PAPER` (with `-quick`).
        resume: continue the run in the folder: finished cells are kept, and those that failed are tried again.
        overwrite: replace the run in the folder; with `resume`, replace the cells whose settings, data or code changed.
        data_root: folder of the files of registered data sets, see `calibrant.data.data_root`.
        download: whether to download data sets that are missing.
        command: command line that the report shows.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        The results, whose `table(experiment)` has a row for each row and number.

    Raises:
        RunError: for unknown names, a folder that cannot be used, and finished cells that were made with other
            settings, data or code.
        DataError: for data of an experiment in `only`, or of all experiments, that are not there.
        KeyboardInterrupt: after Ctrl-C; the message says which command resumes the run.
    """
    progress = reporting(progress)
    check_device(device, "--device cpu")
    wanted = Path(out) if out is not None else default_folder(paper, quick)
    named, domains = ((given,) if isinstance(given, str) else tuple(given) for given in (only, domain))
    plan = Plan(paper, named, domains, quick, seeds, device, wanted, data_root, download)
    check_names(plan)
    source = Source(data_root, download, quick)
    for name in named:
        if reason := _missing(experiment(paper, name), source):
            raise DataError(f"experiment {name}: {reason}")
    plan = completed(plan, resume, overwrite)
    left_out = {card.name: reason for card in plan.experiments if (reason := _missing(card, source))}
    jobs = jobs_of(plan, source, left_out)
    if left_out and not jobs:
        raise DataError(f"no experiment can run: {next(iter(left_out.values()))}")
    open_folder(plan, resume)  # now that all data were read: what --overwrite replaces is gone
    waiting = unfinished(plan, jobs, overwrite)
    with _interruptible(plan, jobs):
        _compute_all(plan, waiting, source, len(jobs), progress)
        return write_results(plan, _found(plan, jobs, source), left_out, digest_of_all(jobs), command)


def _missing(card: Experiment, source: Source) -> str:
    """A sentence about data that are not there, of an experiment or of those that it uses; empty if it can run."""
    return next((reason for one in with_used(card.paper, [card]) if (reason := source.missing(one))), "")


def _found(plan: Plan, jobs: Sequence[Job], source: Source) -> list[Found]:
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


def _compute_all(plan: Plan, jobs: Sequence[Job], source: Source, total: int, progress: Progress) -> None:
    shown = _counted(progress, total - len(jobs), total)
    if plan.device == "cpu" and processes_for(len(jobs)) > 1 and _can_be_sent(jobs):
        with TemporaryDirectory() as taken:
            side_by_side(_compute_apart, [(plan, jobs, Path(taken))] * processes_for(len(jobs)), shown)
    else:
        for job in jobs:
            _compute(plan, job, source, shown)


def _can_be_sent(jobs: Sequence[Job]) -> bool:
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


def _compute_apart(plan: Plan, jobs: Sequence[Job], taken: Path, progress: Progress) -> None:
    """Compute cells in a process beside others, each of which takes the next cell as soon as it has finished one.

    Args:
        plan: the run.
        jobs: the cells of all processes.
        taken: a folder in which the first process that takes a cell leaves a file with its number, and another one when
            it has finished. A process whose other cells all wait for trainings in other processes waits for these.
        progress: called with (stage, done, total, text).
    """
    source = Source(plan.data_root, plan.download, plan.quick)
    waiting = dict(enumerate(jobs))
    places = {job: number for number, job in waiting.items()}
    while waiting:
        ready = (number for number, job in waiting.items() if all(_is_done(taken, places.get(one)) for one in job.uses))
        if (number := next(ready, None)) is None:
            time.sleep(_PAUSE)
            continue
        job = waiting.pop(number)
        if _take(taken, number):
            _compute(plan, job, source, progress)
            (taken / f"{number} done").touch()


def _take(taken: Path, number: int) -> bool:
    """Take a cell, if no other process has taken it."""
    try:
        (taken / str(number)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _is_done(taken: Path, number: int | None) -> bool:
    """Whether a cell is finished; those without a number were finished when the run began."""
    return number is None or (taken / f"{number} done").exists()


def _compute(plan: Plan, job: Job, source: Source, progress: Progress) -> None:
    """Compute a cell and keep what it found, or the reason why it found nothing."""
    card, begin = job.card, time.monotonic()

    def show(stage: str, done: int, total: int, text: str = "") -> None:
        progress(str(job), done, total, f"{stage} {done}/{total} {text}".rstrip())

    context = context_of(plan, job, source, show)
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
        "kept": context.kept,
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
        with threadpool_limits(1), seeded(seed):  # numpy's libraries too, which would use all cores in every process
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)


def _device(name: str) -> str:
    """A device in words: the name of a graphics card, else the kind of device."""
    return torch.cuda.get_device_name(name) if torch.device(name).type == "cuda" else name


@contextmanager
def _interruptible(plan: Plan, jobs: Sequence[Job]) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM end in a message that says what was kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        done = sum(plan.cell_file(job.card, job.row, job.seed).is_file() for job in jobs)
        raise KeyboardInterrupt(
            f"interrupted; {plan.out} keeps {done} of {len(jobs)} cells, and checkpoints of trainings. Resume with: "
            f"{plan.resuming()}"
        ) from error
