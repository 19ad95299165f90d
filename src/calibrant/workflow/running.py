"""The work of the commands: fit a model, sample its posteriors, compare them, write a report.

A run folder holds one model; a run of several models has a subfolder for each and the report on top.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from calibrant import store
from calibrant.data.dataset import Data
from calibrant.evaluation.checking import examine
from calibrant.evaluation.reporting.page import report
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.statistics.comparison import compare
from calibrant.inference.fitting.loop import fit
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import ReferencePlan, reference_of
from calibrant.inference.trees import data_labels, model_sha256
from calibrant.processes import processes_for, side_by_side
from calibrant.progress import Progress, prefixed, silent
from calibrant.settings import Request
from calibrant.streams import stream
from calibrant.userfile import is_user_spec
from calibrant.workflow.preparing import (
    Job,
    folder_of,
    load_splits,
    member_folders,
    model_for,
    new_job,
    prepare,
    reopen,
)


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command: a result for each model, and the path of the report (None if there is none)."""

    folder: Path
    results: list[RunResult]
    report: Path | None = None
    notes: list[str] = field(default_factory=list)


def run(request: Request, progress: Progress = silent, command: str = "") -> Outcome:
    """Fit every model, sample the guide's and the reference posterior of held-out data, compare them, write a report.

    Args:
        request: models, data and settings; without models and data, the demonstration.
        progress: called with (stage, done, total, text).
        command: command line that the report shows.

    Raises:
        CalibrantError: for every mistake in the request, most of them before any training.
        KeyboardInterrupt: after Ctrl-C; the message says what was kept, and which command resumes the run.
    """
    request, jobs = prepare(request)
    with _interruptible(request, jobs, "run"):
        if _in_processes(jobs):
            side_by_side(_run_one, [(request, job.name, job.folder) for job in jobs], progress)
            results = [_stored_result(job.folder, request) for job in jobs]
        else:
            results = [_run(job, _shown(progress, job, len(jobs))) for job in jobs]
        return _report(folder_of(request), results, command, progress)


def _in_processes(jobs: list[Job]) -> bool:
    """Whether models run side by side; not if a user's function returns the data, since each would call it again."""
    own = any(is_user_spec(str(job.config["data"]["path"])) for job in jobs)
    return not own and processes_for(len(jobs)) > 1


def _run(job: Job, progress: Progress) -> RunResult:
    _train(job, progress)
    return _evaluate(job, progress)


def _run_one(request: Request, name: str, folder: Path, progress: Progress) -> None:
    """Run one of several models in its own process, which writes the results to the model's folder."""
    settings = request.made()
    _run(new_job(name, folder, load_splits(request, settings.seed), request, settings), prefixed(progress, f"{name}:"))


def _stored_result(folder: Path, request: Request) -> RunResult:
    return store.load_result(folder, model=model_for(folder, request.models))


def _shown(progress: Progress, job: Job, jobs: int) -> Progress:
    return prefixed(progress, f"{job.name}:") if jobs > 1 else progress


def fit_run(request: Request, progress: Progress = silent) -> Outcome:
    """Train one model and write its run folder, which `check_run` evaluates; arguments and errors as in `run`."""
    request, jobs = prepare(request)
    with _interruptible(request, jobs, "fit"):
        for job in jobs:
            _train(job, progress)
    return Outcome(folder_of(request), [], notes=[note for job in jobs for note in job.notes])


def check_run(request: Request, progress: Progress = silent, command: str = "") -> Outcome:
    """Sample and compare the posteriors of a trained run again, on its own test data or other data; write a report.

    Args:
        request: settings of the check; `out` is the run folder, and `models` hold `FILE.py:Class` for models in a
            user's own files.
        progress: called with (stage, done, total, text).
        command: command line that the report shows.

    Raises:
        CalibrantError: for every mistake in the request.
        KeyboardInterrupt: after Ctrl-C.
    """
    folder = folder_of(request)
    members = member_folders(folder)
    jobs = [reopen(member, model_for(member, request.models), request) for member in members]
    if _in_processes(jobs):
        side_by_side(_check_one, [(request, job.name, job.folder) for job in jobs], progress)
        results = [_stored_result(member, request) for member in members]
    else:
        results = [_evaluate(job, _shown(progress, job, len(jobs))) for job in jobs]
    return _report(folder, results, command, progress)


def _check_one(request: Request, name: str, folder: Path, progress: Progress) -> None:
    """Check one of several models in its own process, which writes the results to the model's folder."""
    job = reopen(folder, model_for(folder, request.models), request)
    _evaluate(job, prefixed(progress, f"{name}:"))


def report_run(request: Request, progress: Progress = silent, command: str = "") -> Outcome:
    """Write the report of a run folder again, from its stored results; arguments and errors as in `check_run`."""
    folder = folder_of(request)
    members = member_folders(folder)
    done = [member for member in members if (member / store.AMORTIZED).is_file()] or members
    results = [_stored_result(member, request) for member in done]
    for result in results:
        if result.comparison is None and result.reference is not None:
            result.comparison = compare(result.amortized, result.reference)
    return _report(folder, results, command, progress)


def _report(folder: Path, results: list[RunResult], command: str, progress: Progress) -> Outcome:
    progress("report", 0, 1)
    path = report(results, folder / store.REPORT, command)
    progress("report", 1, 1)
    return Outcome(folder, results, path, [note for result in results for note in result.config.get("notes", [])])


def _train(job: Job, progress: Progress) -> None:
    """Train, resume a training, or load the weights of one that has ended; the run folder holds them afterwards."""
    settings, checkpoints = job.settings, job.folder / store.CHECKPOINTS
    config = {**job.config, "notes": job.notes}
    begun = job.resume and (job.folder / store.CONFIG).is_file()
    ended = begun and (store.read_config(job.folder)["fit"] or {}).get("stopped") in ("finished", "early")
    if ended:
        store.load(job.folder, model=job.model, guide=job.guide)
        return
    if not begun:
        store.save_run(job.folder, job.model, job.guide, **config)
    trained = fit(
        job.model,
        job.guide,
        job.splits["train"],
        validation=job.splits["validation"],
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        lr=settings.lr,
        objective=settings.objective,
        patience=settings.epochs,  # the learning rate decays to zero; the best weights are kept anyway
        device=settings.device,
        run_dir=job.folder,
        resume=job.resume and store.has_checkpoint(checkpoints),
        seed=settings.seed,
        progress=progress,
    )
    job.model.cpu()
    job.guide.cpu()
    store.save_run(job.folder, job.model, job.guide, trained, **config)
    if trained.stopped == "interrupted":
        raise KeyboardInterrupt


@contextmanager
def _interruptible(request: Request, jobs: list[Job], verb: str) -> Iterator[None]:
    """Let Ctrl-C end in a message that says what was kept and how to resume."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = "; ".join(f"{job.name} {_kept(job.folder)}" for job in jobs)
        named = verb == "fit" or any(is_user_spec(name) for name in request.models)
        data = ["--data", str(request.data)] if is_user_spec(str(request.data)) else []
        words = ["calibrant", verb, *(request.models if named else ()), *data, "--out", str(request.out), "--resume"]
        command = shlex.join(words)
        raise KeyboardInterrupt(f"interrupted; {request.out} keeps: {kept}. Resume with: {command}") from error


def _kept(folder: Path) -> str:
    """What a run folder holds, in words."""
    if not (folder / store.CONFIG).is_file():
        return "nothing yet"
    trained = store.read_config(folder)["fit"]
    if trained is None:
        return "a checkpoint" if store.has_checkpoint(folder / store.CHECKPOINTS) else "nothing yet"
    results = [file for file in (store.AMORTIZED, store.REFERENCE, store.COMPARISON) if (folder / file).is_file()]
    return ", ".join([f"the best weights of {trained['epochs']} epochs", *results])


def _evaluate(job: Job, progress: Progress) -> RunResult:
    """Run the check on held-out test data; each part of the result is saved as soon as it is computed."""
    settings = job.settings
    for file in (*store.DATASETS.values(), store.CALIBRATION, store.REPORT):  # results of earlier draws
        (job.folder / file).unlink(missing_ok=True)
    held = _checked(job)
    problem = Problem.of(job.model, job.guide, held)
    references = _reference(job, problem, progress)

    def keep(name: str, found: Any) -> None:
        save: Any = store.save_tree if name in store.TREES else store.save_dataset
        save(found, job.folder / {**store.TREES, **store.DATASETS}[name])

    said: dict[str, Any] = {"train": job.splits["train"], "seed": settings.seed, "progress": progress, "keep": keep}
    result = examine(job.name, problem, references, settings, **said)
    config = store.read_config(job.folder)
    config["notes"] = list(dict.fromkeys([*job.notes, *result.config["notes"]]))
    config["checked"] = {
        "data": job.config["data"]["path"],
        "labels": held.labels().tolist(),
        "settings": asdict(settings),
    }
    store.write_config(job.folder, config)
    return replace(result, config=config, history=store.load_history(job.folder))


def _checked(job: Job) -> Data:
    """Held-out test data; with shared latents all training data, since the guide knows their posterior only."""
    if all(site["local"] for site in job.guide.spec["sites"]):
        return _held_out(job.splits["test"], job.settings.held_out, job.settings.seed)
    train = job.splits["train"]
    job.notes.append(f"some latents are shared: guide and reference are compared on the {len(train)} training data")
    return train


def _held_out(test: Data, count: int, seed: int) -> Data:
    """Some of the test data in random order, so that the first ones are a random selection too."""
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(stream(seed, "held-out data")))
    return test[order[:count]]


def _reference(job: Job, problem: Problem, progress: Progress) -> xr.DataTree:
    """Reference draws; those in the run folder are used if they have the same weights, data and settings."""
    settings, path, data = job.settings, job.folder / store.REFERENCE, problem.data
    lengths: dict[str, Any] = {"chains": settings.chains, "warmup": settings.warmup, "draws": settings.draws}
    seed = stream(settings.seed, "reference")
    asked = {**lengths, "seed": seed}
    if path.is_file():
        tree = store.load_tree(path)
        attributes = tree["posterior"].attrs
        same = attributes["model_sha256"] == model_sha256(job.model)
        same = same and json.loads(attributes["settings"]).items() <= asked.items()
        if same and data_labels(tree).tolist() == data.labels().tolist():
            return tree
    plan = ReferencePlan(**lengths, init=problem.guide)
    tree = reference_of(problem.program, data, plan, seed=seed, progress=progress)
    store.save_tree(tree, path)
    if len(data_labels(tree)) < len(data):  # after Ctrl-C the tree holds only the data that were finished
        raise KeyboardInterrupt
    return tree
