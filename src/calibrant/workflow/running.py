"""The work of the commands: fit a model, sample its posteriors, compare them, write a report.

A run folder holds one model; a run of several models has a subfolder for each and the report on top.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import xarray as xr
from pyro.nn import PyroModule

from calibrant import store
from calibrant.data.dataset import Data
from calibrant.errors import CalibrantError, RunError
from calibrant.evaluation.checking import Keep, examine, judges_predictions, predict
from calibrant.evaluation.reporting.page import Pictures, pictures_of, report
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.statistics.comparison import compare
from calibrant.folders.tensors import digest_of_tensors
from calibrant.guides.from_prior import PriorGuide
from calibrant.inference.fitting.lengths import ENDED, STILL_RISING
from calibrant.inference.fitting.loop import fit
from calibrant.inference.fitting.state import Fit
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import ReferencePlan, reference_of
from calibrant.inference.trees import data_labels, model_sha256
from calibrant.processes import processes_for, side_by_side
from calibrant.program.modules import unchanging
from calibrant.progress import Progress, prefixed, silent
from calibrant.settings import Request
from calibrant.streams import stream
from calibrant.userfile import is_user_spec
from calibrant.workflow.preparing import (
    Job,
    folder_of,
    held_out,
    load_splits,
    member_folders,
    model_for,
    new_job,
    prepare,
    reopen,
)
from calibrant.workflow.telling import told

_Sent = tuple[dict[str, Any], Pictures]  # the fields of a result without its model, and its pictures

_PATIENCE = 0.5  # seconds between two looks for the weights of another member
_NO_ELBO = (
    "the likelihood is a training loss and no density, so that the held-out value is no ELBO, and the guide cannot be "
    "checked"
)

_PREPARING, _STARTING = "preparing data and models", "starting"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command: a result for each model, and the path of the report (None if there is none).

    `story` has the sentences with which a report of several models opens.
    """

    folder: Path
    results: list[RunResult]
    report: Path | None = None
    notes: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)


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
    progress(_PREPARING, 0, 1)
    request, jobs = prepare(request)
    progress(_PREPARING, 1, 1)
    with _interruptible(folder_of(request), _named(jobs), f"Resume with: {_resuming(request, 'run')}"):
        if _in_processes(jobs):
            _announce(jobs, progress)
            results, pictures = _together(_run_one, request, jobs, progress)
        else:
            results, pictures = [_run(job, _shown(progress, job, len(jobs))) for job in jobs], []
        return _report(folder_of(request), results, command, progress, pictures)


def _in_processes(jobs: list[Job]) -> bool:
    """Whether models run side by side; not if a user's function returns the data, since each would call it again."""
    own = any(is_user_spec(str(job.config["data"]["path"])) for job in jobs)
    return not own and processes_for(len(jobs)) > 1


def _announce(jobs: list[Job], progress: Progress) -> None:
    """Report that the processes of jobs start, which they themselves report only when they have imported torch."""
    for job in jobs:
        progress(f"{job.name}: {_STARTING}", 0, 1)


def _run(job: Job, progress: Progress) -> RunResult:
    _train(job, progress)
    return _evaluate(job, progress)


def _together(
    task: Callable[..., _Sent], request: Request, jobs: Sequence[Job], progress: Progress
) -> tuple[list[RunResult], list[Pictures]]:
    """Results and pictures of several models, each from a task in a process of its own.

    The results are written to the run folder, but not read from it: a process sends all but the model, which may be of
    a user's file, and which is loaded here.
    """
    sent = side_by_side(task, [(request, job.name, job.folder) for job in jobs], progress)
    models = [store.load(job.folder, model=model_for(job.folder, request.models))[0] for job in jobs]
    results = [RunResult(model=model, **found) for model, (found, _) in zip(models, sent, strict=True)]
    return results, [pictures for _, pictures in sent]


def _run_one(request: Request, name: str, folder: Path, progress: Progress) -> _Sent:
    """Run one of several models in its own process, which writes the results to the model's folder."""
    settings, shown = request.made(), prefixed(progress, f"{name}:")
    job = new_job(name, folder, load_splits(request, settings.seed), request, settings)
    shown(_STARTING, 1, 1)
    return _sent(_run(job, shown), shown)


def _sent(result: RunResult, progress: Progress) -> _Sent:
    """What the process of a model sends; it draws the pictures while the processes of other models work."""
    return {f.name: getattr(result, f.name) for f in fields(result) if f.name != "model"}, pictures_of(result, progress)


def _stored_result(folder: Path, request: Request) -> RunResult:
    return store.load_result(folder, model=model_for(folder, request.models))


def _shown(progress: Progress, job: Job, jobs: int) -> Progress:
    return prefixed(progress, f"{job.name}:") if jobs > 1 else progress


def fit_run(request: Request, progress: Progress = silent) -> Outcome:
    """Train one model and write its run folder, which `check_run` evaluates; arguments and errors as in `run`."""
    progress(_PREPARING, 0, 1)
    request, jobs = prepare(request, is_checked=False)
    progress(_PREPARING, 1, 1)
    with _interruptible(folder_of(request), _named(jobs), f"Resume with: {_resuming(request, 'fit')}"):
        for job in jobs:
            _train(job, progress)
    notes = [note for job in jobs for note in (*job.notes, *_on_training(store.read_config(job.folder)))]
    return Outcome(folder_of(request), [], notes=notes)


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
    progress(_PREPARING, 0, 1)
    jobs = [reopen(member, model_for(member, request.models), request) for member in members]
    progress(_PREPARING, 1, 1)
    with _interruptible(folder, _named(jobs), _repeating(command, "check", folder)):
        if _in_processes(jobs):
            _announce(jobs, progress)
            results, pictures = _together(_check_one, request, jobs, progress)
        else:
            results, pictures = [_evaluate(job, _shown(progress, job, len(jobs))) for job in jobs], []
        return _report(folder, results, command, progress, pictures)


def _check_one(request: Request, name: str, folder: Path, progress: Progress) -> _Sent:
    """Check one of several models in its own process, which writes the results to the model's folder."""
    job, shown = reopen(folder, model_for(folder, request.models), request), prefixed(progress, f"{name}:")
    shown(_STARTING, 1, 1)
    return _sent(_evaluate(job, shown), shown)


def report_run(request: Request, progress: Progress = silent, command: str = "") -> Outcome:
    """Write the report of a run folder again, from its stored results; arguments and errors as in `check_run`."""
    folder = folder_of(request)
    members = member_folders(folder)
    done = [member for member in members if (member / store.AMORTIZED).is_file()] or members
    keeps = _interruptible(folder, {member.name: member for member in done}, _repeating(command, "report", folder))
    with keeps, _belonging_together(folder):
        results = [_stored_result(member, request) for member in done]
        for result in results:
            if result.comparison is None and result.reference is not None:
                result.comparison = compare(result.amortized, result.reference)
        return _report(folder, results, command, progress)


@contextmanager
def _belonging_together(folder: Path) -> Iterator[None]:
    """One line for results that can be read, each by itself, but not reported together."""
    try:
        yield
    except RunError:
        raise
    except (CalibrantError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RunError(
            f"the results in {folder} do not belong together ({type(error).__name__}: {error}): compute them again "
            f"with calibrant check {folder}"
        ) from error


def _report(
    folder: Path, results: list[RunResult], command: str, progress: Progress, pictures: Sequence[Pictures] = ()
) -> Outcome:
    pictures = pictures or [pictures_of(result, progress) for result in results]
    progress("report", 0, 1)
    story = told(results)
    path = report(results, folder / store.REPORT, command, story, pictures)
    progress("report", 1, 1)
    notes = [note for result in results for note in result.config.get("notes", [])]
    return Outcome(folder, results, path, notes, story)


def _train(job: Job, progress: Progress) -> None:
    """Train, resume a training, or load the weights of one that has ended; the run folder holds them afterwards."""
    config = {**job.config, "notes": job.notes}
    begun = job.resume and (job.folder / store.CONFIG).is_file()
    if begun and _has_ended(job.folder):
        store.load(job.folder, model=job.model, guide=job.guide)
        return
    if not begun:
        store.save_run(job.folder, job.model, job.guide, **config)
    if job.base is not None:
        _take_weights(job.model, job.base, progress)
    progress("fit", 0, job.settings.epochs)
    with unchanging(job.model) if job.base is not None else nullcontext():
        trained = _fitted(job, progress)
    job.model.cpu()
    job.guide.cpu()
    store.save_run(job.folder, job.model, job.guide, trained, **config)
    if trained.stopped == "interrupted":
        raise KeyboardInterrupt


def _has_ended(folder: Path) -> bool:
    """Whether a run folder holds the weights of a training that has ended."""
    return (store.read_config(folder)["fit"] or {}).get("stopped") in ENDED


def _take_weights(model: PyroModule, base: Path, progress: Progress) -> None:
    """Load the weights of an earlier member of the run into a model, as soon as its training has ended."""
    while not ((base / store.CONFIG).is_file() and _has_ended(base)):
        progress("fit", 0, 1, f"waits for the weights of {base.name}")
        time.sleep(_PATIENCE)
    store.load(base, model=model)


def _fitted(job: Job, progress: Progress) -> Fit:
    settings = job.settings
    return fit(
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
        resume=job.resume and store.has_checkpoint(job.folder / store.CHECKPOINTS),
        seed=settings.seed,
        progress=progress,
    )


@contextmanager
def _interruptible(folder: Path, members: Mapping[str, Path], go_on: str) -> Iterator[None]:
    """Let Ctrl-C or SIGTERM end in a message that says what was kept and how to go on.

    Args:
        folder: the run folder.
        members: name → folder of each model.
        go_on: the last sentence of the message.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        kept = "; ".join(f"{name} {_kept(member)}" for name, member in members.items())
        raise KeyboardInterrupt(f"interrupted; {folder} keeps: {kept}. {go_on}") from error


def _named(jobs: list[Job]) -> dict[str, Path]:
    return {job.name: job.folder for job in jobs}


def _resuming(request: Request, verb: str) -> str:
    """The command that resumes a run or a training."""
    named = verb == "fit" or any(is_user_spec(name) for name in request.models)
    data = ["--data", str(request.data)] if is_user_spec(str(request.data)) else []
    return shlex.join(
        ["calibrant", verb, *(request.models if named else ()), *data, "--out", str(request.out), "--resume"]
    )


def _repeating(command: str, verb: str, folder: Path) -> str:
    """The sentence that tells how a check or report is done again; references that are kept are not sampled again."""
    return f"Go on with: {command or shlex.join(['calibrant', verb, str(folder)])}"


def _kept(folder: Path) -> str:
    """What a run folder holds, in words."""
    if not (folder / store.CONFIG).is_file():
        return "nothing yet"
    trained = store.read_config(folder)["fit"]
    if trained is None:
        return "a checkpoint" if store.has_checkpoint(folder / store.CHECKPOINTS) else "nothing yet"
    first = (store.AMORTIZED, store.REFERENCE, store.COMPARISON)
    files = (*first, *store.TREES.values(), *store.DATASETS.values(), store.REPORT)
    results = [file for file in dict.fromkeys(files) if (folder / file).is_file()]
    return ", ".join([f"the best weights of {trained['epochs']} epochs", *results])


def _evaluate(job: Job, progress: Progress) -> RunResult:
    """Run the check on held-out test data; each part of the result is saved as soon as it is computed.

    Results of an earlier check stay until the new ones are complete.
    """
    settings = job.settings
    held = _checked(job)
    problem = Problem.of(job.model, job.guide, held)
    at, kept = store.results_folder(job.folder), set[str]()

    def keep(name: str, found: Any) -> None:
        save: Any = store.save_tree if name in store.TREES else store.save_dataset
        save(found, at / {**store.TREES, **store.DATASETS}[name])
        kept.add(name)

    said: dict[str, Any] = {"seed": settings.seed, "progress": progress, "keep": keep}
    if judges_predictions(problem):
        result = predict(job.name, problem, settings, **said)
    else:
        reference = _reference(job, problem, at, keep, progress)
        result = examine(job.name, problem, reference, settings, train=job.splits["train"], **said)
    config = store.read_config(job.folder)
    config["notes"] = list(dict.fromkeys([*job.notes, *_on_training(config), *result.config["notes"]]))
    config["peak_memory"] = result.config["peak_memory"]
    config["checked"] = {
        "data": job.config["data"]["path"],
        "labels": held.labels().tolist(),
        "settings": asdict(settings),
    }
    store.publish_results(job.folder, at, kept, config)
    return replace(result, config=config, folder=job.folder, history=store.load_history(job.folder))


def _on_training(config: Mapping[str, Any]) -> list[str]:
    """Notes if a training has no ELBO, and if it ended too soon."""
    trained = config["fit"] or {}
    notes = [] if trained.get("is_elbo", True) else [_NO_ELBO]
    if trained.get("stopped") != STILL_RISING:
        return notes
    epochs = trained["epochs"]
    return [
        *notes,
        f"the held-out {'value' if notes else 'ELBO'} was still rising when the {epochs} epochs of the training were "
        f"over, so that the guide is not as good as it can become: train anew with --epochs {2 * epochs} (in the same "
        "folder with --overwrite)",
    ]


def _checked(job: Job) -> Data:
    """Held-out test data; with shared latents all training data, since the guide knows their posterior only.

    Predictions are judged on all test data, since labels cost no chains.
    """
    if isinstance(job.guide, PriorGuide):
        return job.splits["test"]
    if all(site["local"] for site in job.guide.spec["sites"]):
        return held_out(job.splits["test"], job.settings.held_out, job.settings.seed)
    train = job.splits["train"]
    job.notes.append(f"some latents are shared: guide and reference are compared on the {len(train)} training data")
    return train


def _reference(job: Job, problem: Problem, at: Path, keep: Keep, progress: Progress) -> xr.DataTree:
    """Reference draws; stored ones are used if they have the same weights, data and settings.

    Args:
        job: the job; its folder, or that of the member whose model it takes, may hold a reference.
        problem: model, guide and data.
        at: the folder of the results of this check, which may hold the reference of a check that was interrupted.
        keep: called with "reference" and draws that are new in `at`.
        progress: called with (stage, done, total, text).
    """
    settings, data = job.settings, problem.data
    lengths: dict[str, Any] = {"chains": settings.chains, "warmup": settings.warmup, "draws": settings.draws}
    seed = stream(settings.seed, "reference")
    identity = {"model_sha256": model_sha256(job.model), "data_sha256": _values_sha256(data)}
    for folder in dict.fromkeys((at, job.folder, job.base or job.folder)):
        tree = _stored_reference(folder / store.REFERENCE, identity, {**lengths, "seed": seed})
        if tree is not None and data_labels(tree).tolist() == data.labels().tolist():
            if folder != job.folder:
                keep("reference", tree)
            return tree
    plan = ReferencePlan(**lengths, init=problem.guide)
    tree = reference_of(problem.program, data, plan, seed=seed, progress=progress)
    tree["posterior"].attrs |= identity
    keep("reference", tree)
    if len(data_labels(tree)) < len(data):  # after Ctrl-C the tree holds only the data that were finished
        raise KeyboardInterrupt
    return tree


def _stored_reference(path: Path, identity: Mapping[str, str], asked: Mapping[str, Any]) -> xr.DataTree | None:
    """The reference in a file if it is as it was written, and has this identity and these settings; else None."""
    if not path.is_file() or not store.is_as_recorded(path):
        return None
    try:
        tree = store.load_tree(path)
        found = tree["posterior"].attrs
        same = identity.items() <= found.items() and json.loads(found["settings"]).items() <= asked.items()
    except (RunError, KeyError, ValueError, TypeError, AttributeError):  # no reference of ours
        return None
    return tree if same else None


def _values_sha256(data: Data) -> str:
    """A sha256 of the values that the program sees."""
    observed, covariates = data.tensors()
    return digest_of_tensors({**observed, **covariates}, json.dumps([sorted(observed), sorted(covariates)]))
