"""The speed of a model by name, of a user's file, or of a run, on this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from calibrant import store
from calibrant.errors import RunError
from calibrant.folders.files import new_file
from calibrant.inference.fitting.given import check_device
from calibrant.inference.problem import Problem
from calibrant.inference.speed.measuring import Bench, BenchPlan, bench_of
from calibrant.progress import Progress, silent
from calibrant.settings import DATA, Request, model_of, structure_of
from calibrant.userfile import is_user_spec
from calibrant.workflow.members import check_members
from calibrant.workflow.preparing import Job, load_splits, model_for, new_job, reopen, with_enough_steps

_MODEL, _ARGUMENTS = "ea-vae", {"latents": 16, "prior": "laplace"}  # what is measured where nothing is named
_SECONDS, _QUICK = 5.0, 1.0  # seconds for each part
_DATA, _FEW = 16, 4  # data whose posteriors are drawn


def bench_run(request: Request, progress: Progress = silent) -> Bench:
    """Measure how fast a model trains, draws and gets a reference on this machine.

    Args:
        request: the first of `models` is a run folder, or a model as in `run`; without models, an EA-VAE with Laplace
            latents. `out` is a file for the figures as JSON. Weights of a run are those that are measured; those of
            other models are the ones that the measured training reached.
        progress: called with (stage, done, total, text).

    Raises:
        CalibrantError: for every mistake in the request.
    """
    if request.out is not None and not request.out.parent.is_dir():
        raise RunError(f"--json {request.out}: there is no folder {request.out.parent}")
    progress("preparing", 0, 1)
    target, *others = request.models or (_MODEL,)
    is_run = _names_a_run(target)
    job = _of_run(Path(target), replace(request, models=tuple(others))) if is_run else _of_model(target, request)
    progress("preparing", 1, 1)
    problem = Problem.of_kind(job.model, job.guide, job.splits["train"])
    found = bench_of(job.name, problem, _plan(job, request), progress, job.settings.device, keep=not is_run)
    if request.out is not None:
        with new_file(request.out) as new:
            new.write_text(json.dumps(found.content(), indent=1, ensure_ascii=False), encoding="utf-8")
    return found


def _names_a_run(target: str) -> bool:
    """Whether a name is that of a folder, or could be no model's."""
    return Path(target).is_dir() or (not is_user_spec(target) and ("/" in target or "\\" in target))


def _of_run(folder: Path, request: Request) -> Job:
    store.read_config(folder)
    asked = {name: value for name, value in request.asked().items() if name != "device"}
    job = reopen(folder, model_for(folder, request.models), replace(request, settings=asked, quick=False, out=None))
    device = request.made().device
    check_device(device, "--device cpu")
    return replace(job, settings=replace(job.settings, device=device))


def _of_model(name: str, request: Request) -> Job:
    """The job of a model by name, whose folder is never written."""
    check_members((name,) if structure_of(name) is None else (model_of(name), name))
    arguments = request.arguments if request.models else {**_ARGUMENTS, **request.arguments}
    request = replace(request, models=(name,), data=request.data or DATA, arguments=arguments)
    settings = request.made()
    check_device(settings.device, "--device cpu")
    splits = load_splits(request, settings.seed)
    request = with_enough_steps(request, len(splits["train"]))
    return new_job(name, Path(), splits, request, request.made())


def _plan(job: Job, request: Request) -> BenchPlan:
    settings = job.settings
    return BenchPlan(
        batch_size=settings.batch_size,
        objective=settings.objective,
        data=_FEW if request.quick else _DATA,
        chains=settings.chains,
        warmup=settings.warmup,
        draws=settings.draws,
        starts=0 if request.quick else 32,
        seconds=_QUICK if request.quick else _SECONDS,
        seed=settings.seed,
    )
