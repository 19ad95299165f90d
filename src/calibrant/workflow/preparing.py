"""Preparation of runs, with all checks that are possible before training: folders, data, models, guides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import ceil
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import torch
from pyro.nn import PyroModule

from calibrant import store
from calibrant.binding import bind
from calibrant.data.dataset import Data
from calibrant.data.registry import load as load_data
from calibrant.errors import DataError, ProgramError, RunError, warn
from calibrant.evaluation.remedying.richer import has_weights
from calibrant.guides.amortizing import amortize
from calibrant.guides.from_prior import PriorGuide
from calibrant.inference.fitting.given import check_alike, check_device
from calibrant.inference.fitting.objectives import check_objective
from calibrant.inference.fitting.run_folder import writing
from calibrant.inference.problem import Problem
from calibrant.inference.references.gate import require_passable
from calibrant.inference.references.sampling import ReferencePlan, is_exact, require_reference
from calibrant.models.registry import constructor_arguments, create
from calibrant.program.environment import seeded
from calibrant.program.losses import refuse_training_losses
from calibrant.settings import (
    DATA,
    QUICK,
    TRAINING,
    Request,
    Settings,
    demonstration,
    is_demonstration,
    model_of,
    structure_of,
)
from calibrant.streams import stream
from calibrant.userfile import is_user_spec
from calibrant.workflow.matching import match_sites
from calibrant.workflow.members import check_members, member_folder

# A training whose length was not given has at least so many steps in all, steps per epoch and data per batch. Batches
# below a size have noisier gradients, and get more steps, which take less time each.
_SMALL_BATCH, _SMALL_STEPS = 128, 2000
_STEPS, _STEPS_AN_EPOCH, _LEAST_BATCH = 1000, 8, 16
_DATA_SHA256 = "data_sha256"  # key of `config.json`: split → fingerprint


@dataclass
class Job:
    """One model of a run, with its guide, its settings and the data in the form that its program takes.

    Attributes:
        base: the folder of the member whose trained model a further guide takes, unchanged; else None.
    """

    name: str
    folder: Path
    model: PyroModule
    guide: PyroModule
    splits: dict[str, Data]
    settings: Settings
    config: dict[str, Any]
    notes: list[str]
    resume: bool = False
    base: Path | None = None


def prepare(request: Request, is_checked: bool = True) -> tuple[Request, list[Job]]:
    """Complete a request and prepare its jobs; the run folder is created (or cleared) only after all other checks.

    `is_checked` says whether the command checks what it trains, so that training losses are refused.
    """
    if request.out is not None:
        _check_folder(request)
    elif request.resume or request.overwrite:
        raise RunError(f"--{'resume' if request.resume else 'overwrite'} needs the folder: --out FOLDER")
    is_default = not request.models and not request.resume
    if request.resume:
        request = _resumed(request)
    elif is_default:
        request = demonstration(request)
    request = replace(request, data=request.data or DATA)
    settings = request.made()
    check_device(settings.device, "--device cpu")
    request = replace(request, out=request.out or _free_folder(request))
    check_members(request.models)
    splits = load_splits(request, settings.seed)
    request, jobs = _jobs(with_enough_steps(request, len(splits["train"])), splits, is_default)
    folder, names = folder_of(request), [member_folder(name) for name in request.models]
    for job in jobs:
        _check_place(job, folder)
        _check_splits(job)
        if is_checked:
            _check_checkable(job)
    with writing(folder):
        _open_folder(request, names)
    return request, jobs


def _jobs(request: Request, splits: dict[str, Data], is_default: bool) -> tuple[Request, list[Job]]:
    """The jobs of a request; the demonstration leaves out the further guides that its program does not allow."""
    top, settings, jobs = folder_of(request), request.made(), dict[str, Job]()
    for name in request.models:
        folder = top / member_folder(name) if len(request.models) > 1 else top
        try:
            jobs[name] = new_job(name, folder, splits, request, settings)
        except ProgramError as error:
            if not is_default or structure_of(name) is None:
                raise
            warn(f"{name} is left out of the demonstration: {error}", UserWarning)
    return replace(request, models=tuple(jobs)), list(jobs.values())


def folder_of(request: Request) -> Path:
    assert request.out is not None
    return request.out


def _check_folder(request: Request) -> None:
    folder = folder_of(request)
    if request.resume:
        if request.overwrite:
            raise RunError("--resume continues a run and --overwrite deletes it: give only one of them")
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
                f"{folder} holds a run: --resume continues it, --overwrite replaces it, --out FOLDER names another"
            )


def _check_place(job: Job, top: Path) -> None:
    """Refuse a folder that is a link inside the run folder, and a training to resume whose data have changed."""
    if job.folder.is_symlink() and job.folder != top:
        raise RunError(f"{job.folder} is a link: calibrant stays inside {top}, so delete the link")
    if job.resume and (job.folder / store.CONFIG).is_file():
        stored = store.read_config(job.folder)
        if changed := _changed_data(stored, job.config[_DATA_SHA256]):
            raise RunError(
                f"the data in {stored['data'].get('path')} are not those that {job.folder} was trained on (others in "
                f"{', '.join(changed)}): put them back, or start a new run in another folder"
            )


def _check_splits(job: Job) -> None:
    """Refuse validation and test data of other keys or event shapes than the training data."""
    train = bind(job.model, job.splits["train"])
    for split in ("validation", "test"):
        check_alike(f"the {split} data", bind(job.model, job.splits[split]), train)


def _check_checkable(job: Job) -> None:
    """Refuse what the check after the training would refuse: a training loss, a reference, data outside a support."""
    train = bind(job.model, job.splits["train"])
    refuse_training_losses(job.model, *train.batch([0]))
    is_local = all(site["local"] for site in job.guide.spec["sites"])
    held = held_out(job.splits["test"], job.settings.held_out, job.settings.seed) if is_local else job.splits["train"]
    problem = Problem.of(job.model, job.guide, held)
    settings = job.settings
    plan = ReferencePlan(chains=settings.chains, warmup=settings.warmup, draws=settings.draws)
    require_reference(problem.program, problem.data, plan)


def held_out(test: Data, count: int, seed: int) -> Data:
    """Some of the test data in random order, so that the first ones are a random selection too."""
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(stream(seed, "held-out data")))
    return test[order[:count]]


def _changed_data(stored: Mapping[str, Any], sha256: Mapping[str, str]) -> list[str]:
    """The splits whose sha256 is not the stored one; versions that stored none are excused."""
    before = stored.get(_DATA_SHA256) or {}
    return [split for split, sha in sha256.items() if before.get(split, sha) != sha]


def _open_folder(request: Request, names: list[str]) -> None:
    folder = folder_of(request)
    if request.overwrite and folder.is_dir():
        store.clear_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if len(names) > 1 and not request.resume:
        config = {
            "format": store.FORMAT,
            "runs": names,
            "request": _stored(request),
            "versions": store.versions(),
        }
        store.write_config(folder, config)


def _free_folder(request: Request) -> Path:
    """`runs/MODEL-DATA-N` with the first free N."""
    data = request.data or DATA
    stem = data.rpartition(":")[2] if is_user_spec(data) else Path(data).stem
    models = [member_folder(name) for name in request.models if structure_of(name) is None]
    base = "-".join([*models, re.sub(r"[^\w-]+", "-", stem)])
    number = 1
    while Path("runs", f"{base}-{number}").exists():
        number += 1
    return Path("runs", f"{base}-{number}")


def _stored(request: Request) -> dict[str, Any]:
    """The part of a request that is needed to resume its run: all settings, and which of them were given."""
    kept = {
        name: getattr(request, name) for name in ("data", "data_root", "data_options", "site", "arguments", "quick")
    }
    return {"models": list(request.models), **kept, "settings": asdict(request.made()), "asked": request.settings}


def _resumed(request: Request) -> Request:
    """The stored request of a run folder; the options given now must agree with it where they affect the training."""
    stored = store.read_any_config(folder_of(request)).get("request")
    if stored is None:
        raise RunError(f"{folder_of(request)} was not written by a command, so it cannot be resumed")
    asked = {name: getattr(request, name) for name in ("data", "data_options", "site", "arguments")}
    stored = {"data_options": {}, **stored}  # an older version stored none
    asked["models"] = list(request.models)
    differ = [f"{n} was {stored[n]}, is {now}" for n, now in asked.items() if now and now != stored[n]]
    for settings in (stored["settings"], stored.get("asked", {})):
        _check_settings(folder_of(request), settings)
    before = {**asdict(Settings()), **stored["settings"]}  # an older version stored fewer settings
    settings = {name: value for name, value in request.asked().items() if name in TRAINING}
    differ += [f"{n} was {before[n]}, is {now}" for n, now in settings.items() if now != before[n]]
    if differ:
        raise RunError(
            f"{request.out} was made with other settings ({'; '.join(differ)}): leave them out, or start a new run"
        )
    for what, given, names in (("MODEL", request.models, stored["models"]), ("--data", request.data, [stored["data"]])):
        if not given and (own := [name for name in names if is_user_spec(name)]):
            raise RunError(f"{', '.join(own)}: a file of yours is imported only when you name it: give {what} again")
    return replace(
        request,
        models=tuple(stored["models"]),
        data=stored["data"],
        data_root=request.data_root or stored["data_root"],
        data_options=stored["data_options"],
        site=stored["site"],
        arguments=stored["arguments"],
        settings={**stored.get("asked", {}), **request.settings},
        chosen=stored["settings"],
        quick=_is_quick(stored),
    )


def _check_settings(folder: Path, stored: Mapping[str, Any]) -> None:
    """Refuse stored settings that this version does not have, or whose values have other kinds."""
    known = get_type_hints(Settings)
    if unknown := [name for name in stored if name not in known]:
        raise RunError(
            f"{folder} has the settings {', '.join(unknown)}, which this version of calibrant does not know: use the "
            "version that wrote it, or start a new run"
        )
    for name, value in stored.items():
        if not isinstance(value, _kinds(known[name])):
            raise RunError(f"{folder} is damaged: the setting {name} is {value!r}; copy the folder again")


def _kinds(hint: Any) -> tuple[type, ...]:
    """The kinds of JSON values that a type hint allows."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = [get_origin(option) or option for option in options]
    return (*kinds, int) if float in kinds else tuple(kinds)


def _is_quick(stored: Mapping[str, Any]) -> bool:
    """Whether a run was a quick one; for an older version, which did not store this, its settings tell."""
    little = {name: value for name, value in QUICK.items() if name not in TRAINING}
    return bool(stored.get("quick", little.items() <= stored["settings"].items()))


def with_enough_steps(request: Request, data: int) -> Request:
    """Choose smaller minibatches and more epochs if few data would give few steps; given settings are kept."""
    settings, asked = request.made(), {**request.chosen, **request.asked()}
    data = min(data, settings.train_data or data)
    batch_size, epochs = settings.batch_size, settings.epochs
    if "batch_size" not in asked:
        batch_size = min(batch_size, max(_LEAST_BATCH, data // _STEPS_AN_EPOCH))
    if "epochs" not in asked:
        steps = _STEPS if batch_size >= _SMALL_BATCH else _SMALL_STEPS
        epochs = max(epochs, ceil(steps / max(1, data // batch_size)))
    return replace(request, chosen={**request.chosen, "batch_size": batch_size, "epochs": epochs})


def load_splits(request: Request, seed: int) -> dict[str, Data]:
    return _load(request.data or DATA, request.data_root, request.download, seed, request.data_options)


_ARGUMENTS = {"name_or_path": "--data", "root": "--data-root", "download": "--download", "seed": "--seed"}


def _load(data: str, root: str | None, download: bool, seed: int, options: Mapping[str, Any]) -> dict[str, Data]:
    """The splits of a data set; what has an option of the command line of its own is no option of the set."""
    if own := [name for name in options if name in _ARGUMENTS]:
        raise RunError(f"--data-option {own[0]}: give {_ARGUMENTS[own[0]]} in its place")
    return load_data(data, root, download, seed, **options)


def new_job(name: str, folder: Path, splits: dict[str, Data], request: Request, settings: Settings) -> Job:
    settings = _settings_of(name, request, settings)
    with seeded(stream(settings.seed, "model")):
        model = _build_model(model_of(name), splits["train"], request)
    splits, wanted, notes = match_sites(model, splits, request.site)
    splits["train"] = train = _part(splits["train"], settings.train_data)
    bound = bind(model, train)
    guide = amortize(model, bound, settings.structure, settings.family, settings.encoder, seed=settings.seed)
    _check_further_guide(name, guide)
    if request.data is not None and not is_demonstration(request):
        notes += [f"encoder chosen: {choice}" for choice in guide.notes]
    check_objective(settings.objective, model, guide, *bound.batch(torch.arange(min(len(bound), 4))))
    if not is_exact(model, bound):
        require_passable(settings.chains, settings.draws)
    config = {
        "data": {
            "name": train.name or request.data,
            "path": request.data,
            **({"options": request.data_options} if request.data_options else {}),
            "splits": {split: len(part) for split, part in splits.items()},
            "sites": wanted,
        },
        _DATA_SHA256: _fingerprints(splits),
        "settings": asdict(settings),
        "request": {**_stored(request), "models": [name]},
    }
    if request.quick:
        notes.append(
            f"a quick run: the guide was trained for {settings.epochs} epochs only; its verdicts show that everything "
            "works, not how good the guide can become"
        )
    if structure_of(name) is not None:
        config["name"] = name.rpartition(":")[2]
    return Job(name, folder, model, guide, splits, settings, config, notes, request.resume, _base_of(name, folder))


def _settings_of(name: str, request: Request, settings: Settings) -> Settings:
    """The settings of one member of a run: those of a further guide have its structure.

    A collapsed one learns a scale alone, for a model that does not change, so that a third of the epochs suffices.
    """
    structure = structure_of(name)
    if structure is None:
        return settings
    is_short = structure == "collapsed" and "epochs" not in request.asked()
    return replace(settings, structure=structure, epochs=ceil(settings.epochs / 3) if is_short else settings.epochs)


def _check_further_guide(name: str, guide: PyroModule) -> None:
    """Refuse a further guide that is the exact posterior of its model, since there is nothing to train or to check."""
    if structure_of(name) is not None and not has_weights(guide):
        raise ProgramError(
            f"{name}: this guide has no weights, since it is the exact posterior of {model_of(name)}: leave it out"
        )


def _base_of(name: str, folder: Path) -> Path | None:
    """The folder of the member whose model a further guide takes; None for a model by itself."""
    return folder.parent / member_folder(model_of(name)) if structure_of(name) is not None else None


def _fingerprints(splits: Mapping[str, Data]) -> dict[str, str]:
    return {split: part.fingerprint() for split, part in splits.items()}


def _part(train: Data, count: int | None) -> Data:
    """The training data that are used, evenly spaced in the set."""
    if count is None or count >= len(train):
        return train
    return train[np.linspace(0, len(train) - 1, count).round().astype(int)]


def _build_model(name: str, train: Data, request: Request) -> PyroModule:
    known, arguments = constructor_arguments(name), dict(request.arguments)
    if unknown := sorted(set(arguments) - set(known) - {"preset"}):
        more = "; --set applies to all models of a run: run them one by one" if len(request.models) > 1 else ""
        raise RunError(f"--set: {name} has no argument {', '.join(unknown)}; it has {', '.join(known)}{more}")
    if "shape" in known and "shape" not in arguments:
        arguments["shape"] = _event_shape(train, request.site)
    return create(name, **arguments)


def _event_shape(data: Data, site: Mapping[str, str]) -> tuple[int, ...]:
    """The event shape of the observation: the key that --site names, else `x`, else the only key."""
    keys = list(site.values()) or [key for key in data.keys() if key == "x"] or list(data.keys())  # noqa: SIM118
    if len(keys) != 1:
        raise RunError(
            f"the model's argument `shape` cannot be inferred: it could be the event shape of {', '.join(keys)}. "
            "Give --site NAME=KEY, or --set 'shape=[…]'"
        )
    values = {**data.batch([0])[0], **data.batch([0])[1]}
    if keys[0] not in values:
        raise DataError(f"--site: the data have no {keys[0]!r}; there are: {', '.join(data.keys())}")
    return tuple(values[keys[0]].shape[1:])


def member_folders(folder: Path) -> list[Path]:
    """The folders with one model each: the run folder itself, or its subfolders."""
    config = store.read_any_config(folder)
    if config.get("runs") == []:
        raise RunError(f"{folder} holds no run: start one with calibrant run --out {folder} --overwrite")
    return store.members(folder, config) if "runs" in config else [folder]


def model_for(folder: Path, given: tuple[str, ...]) -> str | None:
    """The one of the given models that has the class of the model in this folder; None if there is none."""
    name = store.read_config(folder)["name"]
    wanted = model_of(name.rpartition(":")[2])
    same = [spec for spec in map(model_of, given) if is_user_spec(spec) and spec.rpartition(":")[2] == wanted]
    return same[0] if same else None


def reopen(folder: Path, spec: str | None, request: Request) -> Job:
    """Load a trained run, with the data for its check."""
    config = store.read_config(folder)
    stored = config.get("request") or {}
    data = request.data or stored.get("data")
    if data is None:
        raise RunError(f"{folder} does not say which data it was trained on: give --data")
    if request.data is None and is_user_spec(data):
        raise RunError(f"{data}: a file of yours is imported only when you name it: give --data again")
    made = _made_with(config)
    _check_settings(folder, made)
    model, guide = store.load(folder, model=spec)
    root = request.data_root or stored.get("data_root")
    same = data == stored.get("data") and not request.data_options
    options = stored.get("data_options", {}) if same else request.data_options
    splits = _load(data, root, request.download, config["settings"].get("seed", 0), options)
    splits, _, notes = match_sites(model, splits, request.site or stored.get("site", {}))
    asked = {name: value for name, value in request.asked().items() if name not in TRAINING or name == "seed"}
    settings = Settings(**(made | asked))
    splits["train"] = _part(splits["train"], settings.train_data)
    if request.data is None and not request.site and _changed_data(config, _fingerprints(splits)):
        notes.append(f"the data in {data} are not those that the run was trained on: they have another sha256")
    if not isinstance(guide, PriorGuide) and not is_exact(model, bind(model, splits["test"])):
        require_passable(settings.chains, settings.draws)
    base = _base_of(config["name"], folder)
    return Job(config["name"], folder, model, guide, splits, settings, {"data": {"path": data}}, notes, base=base)


def _made_with(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run; for a quick run without the small budget of its check, unless that was given."""
    stored, made = config.get("request") or {}, config["settings"]
    known = {f.name: made[f.name] for f in fields(Settings) if f.name in made}
    if not _is_quick({"settings": made, **stored}):
        return known
    little = set(QUICK) - set(TRAINING) - set(stored.get("asked", ()))
    return {name: value for name, value in known.items() if name not in little}
