"""What the commands do: fit a model, sample its posteriors, compare them, report; each step is one library call.

A run folder holds one model; a run of several models has a subfolder for each and the report on top.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from pyro.nn import PyroModule

from calibrant import store
from calibrant.binding import bind
from calibrant.data import Data
from calibrant.data import load as load_data
from calibrant.errors import DataError, ProgramError, RunError
from calibrant.evaluation.check import examine, judged
from calibrant.evaluation.compare import compare
from calibrant.evaluation.conclusion import conclude
from calibrant.evaluation.remedies import remedy_sentences
from calibrant.evaluation.results import RunResult
from calibrant.guides import amortize
from calibrant.inference import fit, reference
from calibrant.inference.gate import data_labels, require_passable
from calibrant.inference.objectives import check_objective
from calibrant.inference.reference import exact_structure
from calibrant.inference.trees import model_sha256
from calibrant.models import constructor_arguments, create
from calibrant.processes import processes_for, side_by_side
from calibrant.program import Program, as_program, covariate_names, defaults, is_local, sampled, seeded, sites, trace
from calibrant.progress import Progress, prefixed, silent
from calibrant.refusals import running
from calibrant.settings import DATA, MODELS, QUICK, TRAINING, Request, Settings
from calibrant.userfile import is_user_spec

_SMALL_BATCH, _SMALL_STEPS = 128, 2000  # noisier gradients take more steps, and cost less
_STEPS, _STEPS_AN_EPOCH, _LEAST_BATCH = 1000, 8, 16  # of a training whose length was not asked for


@dataclass(frozen=True)
class Outcome:
    """What a command made: a result for each model, and the report ("" where none was asked for)."""

    folder: Path
    results: list[RunResult]
    report: Path | None = None
    notes: list[str] = field(default_factory=list)


# -- the commands ------------------------------------------------------------------------------------------------------


def run(request: Request, progress: Progress = silent, command: str = "") -> Outcome:
    """Fit every model, sample the guide's and the reference posterior of held-out data, compare them, report.

    Args:
        request: what to do; without models and data, the demonstration.
        progress: called with (stage, done, total, text).
        command: what the report says was run.

    Raises:
        CalibrantError: for every mistake in the request, most of them before any training.
        KeyboardInterrupt: after Ctrl-C, with what was kept and the command that goes on.
    """
    request, jobs = _prepare(request)
    with _interruptible(request, jobs, "run"):
        if _in_processes(jobs):
            side_by_side(_run_one, [(request, job.name, job.folder) for job in jobs], progress)
            results = [_stored_result(job.folder, request) for job in jobs]
        else:
            results = [_run(job, _shown(progress, job, len(jobs))) for job in jobs]
        return _report(_folder(request), results, command, progress)


def _in_processes(jobs: list[_Job]) -> bool:
    """Whether models run side by side; not with a function of yours as data, which each would call anew."""
    own = any(is_user_spec(str(job.config["data"]["path"])) for job in jobs)
    return not own and processes_for(len(jobs)) > 1


def _run(job: _Job, progress: Progress) -> RunResult:
    _train(job, progress)
    return _evaluate(job, progress)


def _run_one(request: Request, name: str, folder: Path, progress: Progress) -> None:
    """One of several models, in a process of its own: its results are in its folder."""
    settings = Settings(**request.asked())
    _run(_job(name, folder, _load_data(request, settings.seed), request, settings), prefixed(progress, f"{name}:"))


def _stored_result(folder: Path, request: Request) -> RunResult:
    return store.load_result(folder, model=_spec_for(folder, request.models))


def _shown(progress: Progress, job: _Job, jobs: int) -> Progress:
    return prefixed(progress, f"{job.name}:") if jobs > 1 else progress


def fit_run(request: Request, progress: Progress = silent) -> Outcome:
    """Train one model and write its run folder; `check_run` evaluates it. As `run`."""
    request, jobs = _prepare(request)
    with _interruptible(request, jobs, "fit"):
        for job in jobs:
            _train(job, progress)
    return Outcome(_folder(request), [], notes=[note for job in jobs for note in job.notes])


def check_run(request: Request, progress: Progress = silent, command: str = "") -> Outcome:
    """Sample and compare the posteriors of a trained run anew, on its own test data or others; report.

    Args:
        request: `out` is the run folder; `models` hold `FILE.py:Class` for models in files of yours.
        progress: called with (stage, done, total, text).
        command: what the report says was run.

    Raises:
        CalibrantError: for every mistake in the request.
        KeyboardInterrupt: after Ctrl-C.
    """
    folder = _folder(request)
    members = _members(folder)
    jobs = [_reopen(member, _spec_for(member, request.models), request) for member in members]
    if _in_processes(jobs):
        side_by_side(_check_one, [(request, job.name, job.folder) for job in jobs], progress)
        results = [_stored_result(member, request) for member in members]
    else:
        results = [_evaluate(job, _shown(progress, job, len(jobs))) for job in jobs]
    return _report(folder, results, command, progress)


def _check_one(request: Request, name: str, folder: Path, progress: Progress) -> None:
    """As `_run_one`."""
    job = _reopen(folder, _spec_for(folder, request.models), request)
    _evaluate(job, prefixed(progress, f"{name}:"))


def report_run(request: Request, progress: Progress = silent, command: str = "") -> Outcome:
    """Write the report of a run folder anew, from the results that it holds. As `check_run`."""
    folder = _folder(request)
    members = _members(folder)
    done = [member for member in members if (member / store.AMORTIZED).is_file()] or members
    results = [_stored_result(member, request) for member in done]
    for result in results:
        if result.comparison is None and result.reference is not None:
            result.comparison = compare(result.amortized, result.reference)
    return _report(folder, results, command, progress)


def _report(folder: Path, results: list[RunResult], command: str, progress: Progress) -> Outcome:
    from calibrant.evaluation import report

    progress("report", 0, 1)
    path = report(results, folder / store.REPORT, command)
    progress("report", 1, 1)
    return Outcome(folder, results, path, [note for result in results for note in result.config.get("notes", [])])


# -- before training: everything that can be refused -------------------------------------------------------------------


@dataclass
class _Job:
    """One model of a run, with the data as its program takes them."""

    name: str
    folder: Path
    model: PyroModule
    guide: PyroModule
    splits: dict[str, Data]
    settings: Settings
    config: dict[str, Any]
    notes: list[str]
    resume: bool = False


def _prepare(request: Request) -> tuple[Request, list[_Job]]:
    """The request with nothing left open, and its jobs; the folder is made (or cleared) when all else is sound."""
    if request.out is not None:
        _check_folder(request)
    elif request.resume or request.overwrite:
        raise RunError(f"--{'resume' if request.resume else 'overwrite'} needs the folder: --out FOLDER")
    request = (
        _resumed(request)
        if request.resume
        else replace(request, models=request.models or MODELS, data=request.data or DATA)
    )
    settings = Settings(**request.asked())
    _check_device(settings.device)
    request = replace(request, out=request.out or _free_folder(request))
    names = [_slug(name) for name in request.models]
    if len(set(names)) < len(names):
        raise RunError(f"the models {', '.join(request.models)} would share a folder: run them one by one")
    splits = _load_data(request, settings.seed)
    request = _with_enough_steps(request, len(splits["train"]))
    settings = Settings(**request.asked())
    folder = _folder(request)
    folders = [folder / name for name in names] if len(names) > 1 else [folder]
    jobs = [_job(name, at, splits, request, settings) for name, at in zip(request.models, folders, strict=True)]
    _open_folder(request, names)
    return request, jobs


def _folder(request: Request) -> Path:
    assert request.out is not None
    return request.out


def _check_folder(request: Request) -> None:
    folder = _folder(request)
    if request.resume:
        if request.overwrite:
            raise RunError("--resume goes on with a run and --overwrite throws it away: give one of them")
        store.read_any_config(folder)
    elif folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is a file: name another folder, --out FOLDER")
    elif folder.is_dir() and any(folder.iterdir()):
        try:
            store.read_any_config(folder)
        except RunError as error:
            raise RunError(f"{error}, so it is left alone: name another folder, --out FOLDER") from error
        if not request.overwrite:
            raise RunError(
                f"{folder} holds a run: --resume goes on with it, --overwrite replaces it, --out FOLDER takes another"
            )


def _open_folder(request: Request, names: list[str]) -> None:
    folder = _folder(request)
    if request.overwrite and folder.is_dir():
        store.clear_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if len(names) > 1 and not request.resume:
        config = {"format": store.FORMAT, "runs": names, "request": _stored(request), "versions": store.versions()}
        store.write_config(folder, config)


def _free_folder(request: Request) -> Path:
    """`runs/MODEL-DATA-N` with the first free N."""
    data = request.data or DATA
    stem = data.rpartition(":")[2] if is_user_spec(data) else Path(data).stem
    base = "-".join([*(_slug(name) for name in request.models), re.sub(r"[^\w-]+", "-", stem)])
    number = 1
    while Path("runs", f"{base}-{number}").exists():
        number += 1
    return Path("runs", f"{base}-{number}")


def _slug(model: str) -> str:
    return re.sub(r"[^\w-]+", "-", model.rpartition(":")[2] if is_user_spec(model) else model)


def _stored(request: Request) -> dict[str, Any]:
    """What of a request is needed to go on with it."""
    settings = asdict(Settings(**request.asked()))
    kept = {name: getattr(request, name) for name in ("data", "data_root", "site", "arguments")}
    return {"models": list(request.models), **kept, "settings": settings}


def _resumed(request: Request) -> Request:
    """The request that the folder was made with; what is asked for now has to agree with it where that matters."""
    stored = store.read_any_config(_folder(request)).get("request")
    if stored is None:
        raise RunError(f"{_folder(request)} was not made by a command, so none can go on with it")
    asked = {"models": list(request.models), "data": request.data, "site": request.site, "arguments": request.arguments}
    differ = [f"{n} was {stored[n]}, is {now}" for n, now in asked.items() if now and now != stored[n]]
    before = {**asdict(Settings()), **stored["settings"]}  # of a version that had fewer
    settings = {name: value for name, value in request.asked().items() if name in TRAINING}
    differ += [f"{n} was {before[n]}, is {now}" for n, now in settings.items() if now != before[n]]
    if differ:
        raise RunError(
            f"{request.out} was made with other settings ({'; '.join(differ)}): leave them out, or start anew"
        )
    for what, given, names in (("MODEL", request.models, stored["models"]), ("--data", request.data, [stored["data"]])):
        if not given and (own := [name for name in names if is_user_spec(name)]):
            raise RunError(
                f"{', '.join(own)}: a file of yours is imported only when you name it: give {what}, as before"
            )
    return replace(
        request,
        models=tuple(stored["models"]),
        data=stored["data"],
        data_root=request.data_root or stored["data_root"],
        site=stored["site"],
        arguments=stored["arguments"],
        settings={**stored["settings"], **request.settings},
        quick=False,
    )


def _with_enough_steps(request: Request, data: int) -> Request:
    """Smaller minibatches and more epochs where so few data would make few steps; what was asked for stays."""
    settings, asked = Settings(**request.asked()), request.asked()
    data = min(data, settings.train_data or data)
    batch_size, epochs = settings.batch_size, settings.epochs
    if "batch_size" not in asked:
        batch_size = min(batch_size, max(_LEAST_BATCH, data // _STEPS_AN_EPOCH))
    if "epochs" not in asked:
        steps = _STEPS if batch_size >= _SMALL_BATCH else _SMALL_STEPS
        epochs = max(epochs, ceil(steps / max(1, data // batch_size)))
    return replace(request, settings={**request.settings, "batch_size": batch_size, "epochs": epochs})


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(f"device {name!r} can't be used here ({reason}): --device cpu always can") from error


def _load_data(request: Request, seed: int) -> dict[str, Data]:
    return load_data(request.data or DATA, request.data_root, request.download, seed)


def _job(name: str, folder: Path, splits: dict[str, Data], request: Request, settings: Settings) -> _Job:
    with seeded(settings.seed):
        model = _build_model(name, splits["train"], request)
    splits, wanted, notes = _for_program(model, splits, request.site)
    splits["train"] = train = _part(splits["train"], settings.train_data)
    guide = amortize(model, train, settings.structure, settings.family, seed=settings.seed)
    check_objective(settings.objective, model, guide, *bind(model, train).batch(torch.arange(min(len(train), 4))))
    if exact_structure(model, train) is None:
        require_passable(settings.chains, settings.draws)
    config = {
        "data": {
            "name": train.name or request.data,
            "path": request.data,
            "splits": {split: len(part) for split, part in splits.items()},
            "sites": wanted,
        },
        "settings": asdict(settings),
        "request": {**_stored(request), "models": [name]},
    }
    if request.quick:
        notes.append(
            f"a quick run: the guide has trained for {settings.epochs} epochs; its verdicts show that all works, not "
            "what the guide can do"
        )
    return _Job(name, folder, model, guide, splits, settings, config, notes, request.resume)


def _part(train: Data, count: int | None) -> Data:
    """The training data that are used, from all over the set."""
    if count is None or count >= len(train):
        return train
    return train[np.linspace(0, len(train) - 1, count).round().astype(int)]


def _build_model(name: str, train: Data, request: Request) -> PyroModule:
    known, arguments = constructor_arguments(name), dict(request.arguments)
    if unknown := sorted(set(arguments) - set(known)):
        more = "; --set holds for all models of a run: run them one by one" if len(request.models) > 1 else ""
        raise RunError(f"--set: {name} has no argument {', '.join(unknown)}; it has {', '.join(known)}{more}")
    if "shape" in known and "shape" not in arguments:
        arguments["shape"] = _event_shape(train, request.site)
    return create(name, **arguments)


def _event_shape(data: Data, site: Mapping[str, str]) -> tuple[int, ...]:
    """The event shape of the one key that is the observation: as named, else `x`, else the only one."""
    keys = list(site.values()) or [key for key in data.keys() if key == "x"] or list(data.keys())  # noqa: SIM118
    if len(keys) != 1:
        raise RunError(
            f"the model's argument `shape` is the event shape of which key, of {', '.join(keys)}? "
            "Say --site NAME=KEY, or --set 'shape=[…]'"
        )
    values = {**data.batch([0])[0], **data.batch([0])[1]}
    if keys[0] not in values:
        raise DataError(f"--site: the data have no {keys[0]!r}; there are: {', '.join(data.keys())}")
    return tuple(values[keys[0]].shape[1:])


# -- which key of the data is which site of the program ----------------------------------------------------------------


def _for_program(
    model: Program, splits: dict[str, Data], given: Mapping[str, str]
) -> tuple[dict[str, Data], dict[str, str], list[str]]:
    """The splits with the keys that the program takes, the mapping from its names to theirs, and what to tell."""
    train = splits["train"]
    shapes = _site_shapes(model, train, given)
    keys, covariates = train.keys(), covariate_names(model)
    notes: list[str] = []
    if given:
        wanted = {name: name for name in covariates if name in keys} | dict(given)
        if unknown := [name for name in given if name not in shapes and name not in covariates]:
            raise DataError(f"--site: the model has no {', '.join(unknown)}; {_names(shapes, covariates, keys)}")
    else:
        wanted = {key: key for key in keys if key in shapes or key in covariates}
        if _labels_by_another_name(train, wanted, shapes):
            del wanted["y"]
        if not set(wanted) & set(shapes) and (name := _only_observed(model, train, shapes, wanted)):
            wanted[name] = "x"
            notes.append(f"the model's observed site is {name}: it gets the data's x")
        left = [key for key in keys if key not in wanted.values() and key != "y"]
        if left or not set(wanted) & set(shapes):
            raise DataError(
                f"the model has no place for {', '.join(left or keys)}; {_names(shapes, covariates, keys)}: say what "
                "belongs together, --site NAME=KEY; the other keys are left out then"
            )
    return {split: part.select(wanted) for split, part in splits.items()}, wanted, notes


def _names(shapes: Mapping[str, Any], covariates: tuple[str, ...], keys: tuple[str, ...]) -> str:
    taken = f" and takes the covariates {', '.join(covariates)}" if covariates else ""
    return f"it samples {', '.join(shapes)}{taken}; the data have {', '.join(keys)}"


def _site_shapes(model: Program, data: Data, given: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Event shapes of the local sites that the program samples."""
    wanted = {name: given.get(name, name) for name in covariate_names(model)}
    rows = {k: v for part in data.batch([0, 0]) for k, v in part.items()}
    covariates = {name: rows[key] for name, key in wanted.items() if key in rows}
    program = as_program(model)
    try:
        with torch.no_grad(), seeded(0), defaults(program, covariates), running(program, "it does not run for 2 data"):
            found = sampled(trace(program, 2, covariates))
    except ProgramError as error:
        if set(wanted) <= set(covariates):
            raise
        raise DataError(
            f"the model takes the covariates {', '.join(wanted)}, the data have {', '.join(data.keys())}: "
            "--site NAME=KEY"
        ) from error
    local = {name: tuple(site["value"].shape[1:]) for name, site in found.items() if is_local(site)}
    if not local:
        raise ProgramError(
            f"the model samples {', '.join(found) or 'nothing'} outside the data plate: put local latents and "
            'observations in pyro.plate("data", size)'
        )
    return local


def _labels_by_another_name(data: Data, wanted: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether `y`, the labels of an image set, only happens to be the name of another site."""
    if "y" not in wanted or "y" not in shapes:
        return False
    rows = {k: v for part in data.batch([0]) for k, v in part.items()}
    return tuple(rows["y"].shape[1:]) != shapes["y"]


def _only_observed(
    model: Program, data: Data, shapes: Mapping[str, tuple[int, ...]], covariates: Mapping[str, str]
) -> str | None:
    """The one site that has the shape of `x` and that no other site is beside at the program's end."""
    rows = {k: v for part in data.batch([0]) for k, v in part.items()}
    found = [name for name, shape in shapes.items() if "x" in rows and shape == tuple(rows["x"].shape[1:])]
    if len(found) != 1:
        return None
    latent = sites(model, {found[0]: rows["x"]}, {name: rows[key] for name, key in covariates.items()})
    return found[0] if all(site.children for site in latent.values()) else None


# -- training ----------------------------------------------------------------------------------------------------------


def _train(job: _Job, progress: Progress) -> None:
    """Train, or go on, or take the weights of a training that has ended; the folder holds them afterwards."""
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
        patience=settings.epochs,  # the learning rate shall fall to zero; the best weights are kept anyway
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
def _interruptible(request: Request, jobs: list[_Job], verb: str) -> Iterator[None]:
    """Ctrl-C says what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = "; ".join(f"{job.name} {_kept(job.folder)}" for job in jobs)
        named = verb == "fit" or any(is_user_spec(name) for name in request.models)
        data = ["--data", str(request.data)] if is_user_spec(str(request.data)) else []
        words = ["calibrant", verb, *(request.models if named else ()), *data, "--out", str(request.out), "--resume"]
        command = shlex.join(words)
        raise KeyboardInterrupt(f"interrupted; {request.out} keeps: {kept}. Go on with: {command}") from error


def _kept(folder: Path) -> str:
    """What a run folder holds, in words."""
    if not (folder / store.CONFIG).is_file():
        return "nothing yet"
    trained = store.read_config(folder)["fit"]
    if trained is None:
        return "a checkpoint" if store.has_checkpoint(folder / store.CHECKPOINTS) else "nothing yet"
    results = [file for file in (store.AMORTIZED, store.REFERENCE, store.COMPARISON) if (folder / file).is_file()]
    return ", ".join([f"the best weights of {trained['epochs']} epochs", *results])


# -- evaluation --------------------------------------------------------------------------------------------------------


def _members(folder: Path) -> list[Path]:
    """The run folders of a run: itself, or its subfolders."""
    config = store.read_any_config(folder)
    return [folder / name for name in config["runs"]] if "runs" in config else [folder]


def _spec_for(folder: Path, given: tuple[str, ...]) -> str | None:
    """Which of the models that the caller names is the one of this folder: the one with its class."""
    name = store.read_config(folder)["name"]
    same = [spec for spec in given if is_user_spec(spec) and spec.rpartition(":")[2] == name.rpartition(":")[2]]
    return same[0] if same else None


def _reopen(folder: Path, spec: str | None, request: Request) -> _Job:
    """A trained run, with data for its check."""
    config = store.read_config(folder)
    stored = config.get("request") or {}
    data = request.data or stored.get("data")
    if data is None:
        raise RunError(f"{folder} does not say which data it is of: --data")
    if request.data is None and is_user_spec(data):
        raise RunError(f"{data}: a file of yours is imported only when you name it: give --data, as before")
    model, guide = store.load(folder, model=spec)
    root = request.data_root or stored.get("data_root")
    splits = load_data(data, root, request.download, config["settings"].get("seed", 0))
    splits, _, notes = _for_program(model, splits, request.site or stored.get("site", {}))
    asked = {name: value for name, value in request.asked().items() if name not in TRAINING or name == "seed"}
    settings = Settings(**(_made_with(config["settings"]) | asked))
    splits["train"] = _part(splits["train"], settings.train_data)
    if exact_structure(model, splits["test"]) is None:
        require_passable(settings.chains, settings.draws)
    return _Job(config["name"], folder, model, guide, splits, settings, {"data": {"path": data}}, notes)


def _made_with(stored: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run; of a quick one, not how little its check did."""
    known = {f.name: stored[f.name] for f in fields(Settings) if f.name in stored}
    little = {name: value for name, value in QUICK.items() if name not in TRAINING}
    was_quick = all(known.get(name) == value for name, value in little.items())
    return {name: value for name, value in known.items() if not (was_quick and name in little)}


def _evaluate(job: _Job, progress: Progress) -> RunResult:
    """Everything that a check looks at, on held-out test data; each part is saved as it is found."""
    settings = job.settings
    for file in (*store.DATASETS.values(), store.CALIBRATION, store.REPORT):  # of other draws
        (job.folder / file).unlink(missing_ok=True)
    held = _checked(job)
    references = _reference(job, held, progress)

    def keep(name: str, found: Any) -> None:
        save: Any = store.save_tree if name in store.TREES else store.save_dataset
        save(found, job.folder / {**store.TREES, **store.DATASETS}[name])

    said: dict[str, Any] = {"train": job.splits["train"], "seed": settings.seed, "progress": progress, "keep": keep}
    result = examine(job.name, job.model, job.guide, held, references, settings, **said)
    config = store.read_config(job.folder)
    config["notes"] = list(dict.fromkeys([*job.notes, *result.config["notes"]]))
    config["checked"] = {
        "data": job.config["data"]["path"],
        "labels": held.labels().tolist(),
        "settings": asdict(settings),
    }
    store.write_config(job.folder, config)
    return replace(result, config=config, history=store.load_history(job.folder))


def _checked(job: _Job) -> Data:
    """Held-out test data; with shared latents all training data, since the guide has learned their posterior alone."""
    if all(site["local"] for site in job.guide.spec["sites"]):
        return _held_out(job.splits["test"], job.settings.held_out, job.settings.seed)
    train = job.splits["train"]
    job.notes.append(f"some latents are shared: guide and reference are those of the {len(train)} training data")
    return train


def _held_out(test: Data, count: int, seed: int) -> Data:
    """Some of the test data at random, so that any first part of them is a random part too."""
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
    return test[order[:count]]


def _reference(job: _Job, data: Data, progress: Progress) -> xr.DataTree:
    """Reference draws; those in the folder where they are of the same weights, data and settings."""
    settings, path = job.settings, job.folder / store.REFERENCE
    asked: dict[str, Any] = {
        "chains": settings.chains,
        "warmup": settings.warmup,
        "draws": settings.draws,
        "seed": settings.seed + 1,
    }
    if path.is_file():
        tree = store.load_tree(path)
        attributes = tree["posterior"].attrs
        same = attributes["model_sha256"] == model_sha256(job.model)
        same = same and json.loads(attributes["settings"]).items() <= asked.items()
        if same and data_labels(tree).tolist() == data.labels().tolist():
            return tree
    tree = reference(job.model, data, progress=progress, **asked)
    store.save_tree(tree, path)
    if len(data_labels(tree)) < len(data):  # Ctrl-C: the data that were finished
        raise KeyboardInterrupt
    return tree


# -- the summary -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """A model's numbers in nats per datum, NaN where they are not known; its conclusion; and a sentence for each
    verdict that is no pass, and for each remedy that was tried.

    `elbo` is that of the validation data; `evidence` and `gap` (log evidence − ELBO) are of the checked data.
    """

    name: str
    elbo: float
    elbo_se: float
    evidence: float
    gap: float
    gap_se: float
    conclusion: str
    details: list[str]


def summarise(result: RunResult) -> Summary:
    """What the command line shows of a result."""
    from calibrant.evaluation.report import evidence_gap

    trained = result.config["fit"]
    evidence, bound, error = evidence_gap(result) or (np.nan,) * 3
    found = judged(result)
    tried = remedy_sentences(result.remedies) if result.remedies is not None else []
    details = [verdict.sentence for verdict in found if verdict.primary and verdict.status != "pass"]
    return Summary(
        name=result.name,
        elbo=trained["elbo"],
        elbo_se=trained["elbo_se"],
        evidence=evidence,
        gap=evidence - bound,
        gap_se=error,
        conclusion=str(conclude(found, result.comparison)),
        details=[*details, *tried],
    )
