"""Run folders: weights as safetensors, configuration as JSON, results as NetCDF, training history as CSV.

Nothing is pickled, and `load` never imports a file just because a folder names it. Every file is written under a
temporary name and then renamed, so that an interrupted write leaves the old file or none. `config.json` records the
sha256 of every file that is read again, and a file that was damaged, changed or swapped is refused.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.nn import PyroModule
from torch import nn

from calibrant.calls import own_calls
from calibrant.errors import RunError, warn
from calibrant.folders.configuration import (
    CONFIG,
    FORMAT,
    UNRECORDED,
    members,
    read_any_config,
    read_config,
    versions,
    write_config,
)
from calibrant.folders.files import digest, digest_of_file, left_over
from calibrant.folders.history import HISTORY, load_history
from calibrant.folders.netcdf import load_dataset, load_tree, save_dataset, save_tree
from calibrant.folders.records import check_recorded, is_as_recorded
from calibrant.folders.tensors import check_fits, read_weights, set_weights
from calibrant.guides.amortizing import from_spec
from calibrant.guides.from_prior import PriorGuide
from calibrant.guides.refined import RefinedGuide, of_shapes
from calibrant.inference.fitting.checkpoints import (
    CHECKPOINT_FILE,
    CHECKPOINTS,
    has_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from calibrant.inference.fitting.run_folder import GUIDE, MODEL, OWN, require_free, save_run, writing
from calibrant.inference.fitting.state import Fit
from calibrant.models.registry import create
from calibrant.program.contract import Program, as_program
from calibrant.program.environment import seeded
from calibrant.userfile import is_user_spec, load_object

if TYPE_CHECKING:
    from calibrant.evaluation.results import RunResult
__all__ = [
    "AMORTIZED",
    "CALIBRATION",
    "CHECKPOINTS",
    "COMPARISON",
    "CONFIG",
    "CONTRAST",
    "DATASETS",
    "FORMAT",
    "GAP",
    "GUIDE",
    "HISTORY",
    "MODEL",
    "PREDICTIVE",
    "PROBABILITIES",
    "REFERENCE",
    "REMEDIES",
    "REPORT",
    "TREES",
    "WEIGHTS",
    "clear_run",
    "has_checkpoint",
    "is_as_recorded",
    "load",
    "load_checkpoint",
    "load_dataset",
    "load_history",
    "load_result",
    "load_tree",
    "members",
    "publish_results",
    "read_any_config",
    "read_config",
    "results_folder",
    "save",
    "save_checkpoint",
    "save_dataset",
    "save_run",
    "save_tree",
    "versions",
    "write_config",
]

REPORT = "report.html"
AMORTIZED, REFERENCE, COMPARISON, CONTRAST = "amortized.nc", "reference.nc", "comparison.nc", "contrast.nc"
GAP, WEIGHTS, CALIBRATION, PREDICTIVE = "gap.nc", "weights.nc", "calibration.nc", "predictive.nc"
REMEDIES, PROBABILITIES = "remedies.nc", "probabilities.nc"
# The results of a check, by their names in `RunResult`.
TREES = {"amortized": AMORTIZED, "reference": REFERENCE, "calibration": CALIBRATION}
DATASETS = {
    "comparison": COMPARISON,
    "contrast": CONTRAST,
    "gap": GAP,
    "weights": WEIGHTS,
    "predictive": PREDICTIVE,
    "remedies": REMEDIES,
    "probabilities": PROBABILITIES,
}
_RESULTS = (*TREES.values(), *DATASETS.values())
_FILES = (HISTORY, REPORT, MODEL, GUIDE, *_RESULTS, CONFIG)
_CHECKING = ".checking"  # folder of the results of a check that is going on, while those of an earlier one stay


def save(
    folder: str | Path, model: Program, guide: Program, fit: Fit | None = None, *, overwrite: bool = False
) -> Path:
    """Save a model and its guide in a folder, from which `load` loads them, with the same draws for the same seed.

    Weights are stored as they are, in float32 or float64, and recipes as JSON; nothing is pickled. A model from
    `models.create` and a guide from `guides.amortize`, `guides.prior` or `guides.refine` are rebuilt from the folder
    alone; whatever is made of modules or functions of your own is built again by you, and passed to `load`, which says
    so. A training with `fit(..., run_dir=FOLDER)` leaves such a folder too.

    Args:
        folder: the folder; it is created if it does not exist.
        model: the program.
        guide: its guide.
        fit: the result of their training, whose history is stored with them.
        overwrite: replace the run in the folder, with all its results. Files that are not of calibrant are kept.

    Raises:
        RunError: for a folder that holds a run, cannot be written, or is not a run folder but has files with the names
            of one; for a module whose state contains anything but tensors.
    """
    if not isinstance(folder, str | os.PathLike):
        raise RunError(f"the folder is a {type(folder).__name__}: give save(FOLDER, model, guide)")
    path = Path(folder)
    if overwrite and path.is_dir():
        clear_run(path)
    require_free(path)
    result = Fit(elbo=math.nan) if fit is None else fit
    with writing(path):
        return save_run(path, model, guide, result, settings={})


def load(
    run_dir: str | Path,
    model: Program | type[nn.Module] | str | None = None,
    encoder: nn.Module | None = None,
    guide: Program | None = None,
) -> tuple[PyroModule, PyroModule]:
    """Load the model and guide of a run folder with their trained weights, in `eval()` and on the CPU.

    A registered model is rebuilt from the folder alone. Your own code is never imported just because a folder names it:
    pass `model` in that case.

    Args:
        run_dir: the folder.
        model: for a model in your own file, "FILE.py:Class" or the class, which is built with the stored arguments;
            or a model instance, into which the weights are loaded (needed for models that were built from modules).
        encoder: the encoder, if the guide was created with your own one.
        guide: the guide, if it was not created by `guides.amortize` or `guides.prior`; for a refined guide, the one
            that it refines.

    Raises:
        RunError: for a folder that is not a run folder, is damaged, or belongs to another model, and where `model`,
            `encoder` or `guide` is needed.
    """
    folder = Path(run_dir)
    config = read_config(folder)
    if config["fit"] is None:
        remedy = f"calibrant run --out {folder} --resume" if "request" in config else "fit(..., run_dir=…, resume=True)"
        raise RunError(f"the training in {folder} has no result yet: continue it with {remedy}")
    with seeded(0), torch.device("cpu"):
        program = as_program(_rebuild_model(folder, config, model))
        guided = as_program(_rebuild_guide(folder, config, program, encoder, guide))
    found = [read_weights(folder, name, config["sha256"]) for name in (MODEL, GUIDE)]
    for file, module, tensors in zip((MODEL, GUIDE), (program, guided), found, strict=True):
        check_fits(f"{folder / file}", module, tensors)
    for module, tensors in zip((program, guided), found, strict=True):
        set_weights(module, tensors)
    return program.eval(), guided.eval()


def load_result(run_dir: str | Path, model: Program | type[nn.Module] | str | None = None) -> RunResult:
    """Load everything in a run folder that a report shows.

    Args:
        run_dir: the folder.
        model: the model, its class or its "FILE.py:Class", where `load` needs it.

    Raises:
        RunError: for the reasons of `load`, for a folder without `amortized.nc`, and for a result that is damaged, was
            changed, or was not written for this run.
    """
    from calibrant.evaluation.results import RunResult

    folder = Path(run_dir)
    config = read_config(folder)
    if not (folder / AMORTIZED).is_file():
        raise RunError(f"{folder} holds no posterior ({AMORTIZED}): compute it with calibrant check {folder}")
    with seeded(0), torch.device("cpu"):
        program = as_program(_rebuild_model(folder, config, model))
    _warn_unrecorded(folder, config)
    tensors = read_weights(folder, MODEL, config["sha256"])
    check_fits(f"{folder / MODEL}", program, tensors)
    set_weights(program, tensors)
    for file in (*_RESULTS, HISTORY):
        if (folder / file).is_file():
            check_recorded(folder / file, config, f"compute it again with calibrant check {folder}")
    results: dict[str, Any] = {
        name: read(folder / file)
        for read, files in ((load_tree, TREES), (load_dataset, DATASETS))
        for name, file in files.items()
        if (folder / file).is_file()
    }
    return RunResult(
        name=config["name"],
        model=program.eval(),
        config=config,
        folder=folder,
        history=load_history(folder),
        **results,
    )


def results_folder(run_dir: str | Path) -> Path:
    """The folder into which a check writes its results: the run folder, or one inside it if the run has results.

    Earlier results stay until `publish_results` puts the new ones in their place. The folder may hold the reference of
    a check that was interrupted.
    """
    folder = Path(run_dir)
    if not (folder / AMORTIZED).is_file():
        return folder
    inside = folder / _CHECKING
    _refuse_link(inside)
    inside.mkdir(exist_ok=True)
    try:
        read_any_config(inside)
    except RunError:
        write_config(inside, {"format": FORMAT})
    return inside


def publish_results(run_dir: str | Path, at: Path, names: Collection[str], config: Mapping[str, Any]) -> None:
    """Put the results of a check in the place of earlier ones, and write the configuration of the run.

    Args:
        run_dir: the folder of the run.
        at: the folder that `results_folder` gave to the check.
        names: names in `RunResult` of the results that the check wrote there; an earlier reference stays if the check
            wrote none.
        config: the configuration, whose records of results are replaced.
    """
    folder = Path(run_dir)
    written = {{**TREES, **DATASETS}[name] for name in names}
    dropped = set(_RESULTS) - written - {REFERENCE}
    records = {file: sha for file, sha in read_any_config(at)["sha256"].items() if file in written}
    kept = {file: sha for file, sha in config["sha256"].items() if file not in dropped}
    if config["format"] == UNRECORDED and (folder / HISTORY).is_file():
        kept[HISTORY] = digest_of_file(folder / HISTORY)
    write_config(folder, {**config, "format": FORMAT, "sha256": {**kept, **records}})
    for file in written if at != folder else ():
        os.replace(at / file, folder / file)
    for file in dropped:
        (folder / file).unlink(missing_ok=True)
    if at != folder:
        _clear_files(at, _FILES)
        _remove_if_empty(at)


def clear_run(run_dir: str | Path) -> None:
    """Delete the files that calibrant wrote into a run folder, and nothing else; an empty folder is kept.

    Raises:
        RunError: for a folder that is not a run folder, or that has a link in the place of a folder inside it; nothing
            is deleted then.
    """
    folder = Path(run_dir)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    config = read_any_config(folder)
    inside = members(folder, config) if "runs" in config else []
    runs = [member for member in inside if (member / CONFIG).is_file()]
    for run in (folder, *runs):
        for part in (CHECKPOINTS, _CHECKING):
            _refuse_link(run / part)
    for run in runs:
        _clear_one(run)
        _remove_if_empty(run)
    _clear_one(folder)


def _clear_one(folder: Path) -> None:
    for part, files in ((CHECKPOINTS, (CHECKPOINT_FILE,)), (_CHECKING, _FILES)):
        _clear_files(folder / part, files)
        _remove_if_empty(folder / part)
    _clear_files(folder, _FILES)


def _clear_files(folder: Path, files: tuple[str, ...]) -> None:
    for file in files:
        for path in (folder / file, *left_over(folder / file)):
            path.unlink(missing_ok=True)


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise RunError(f"{folder} is a link: calibrant stays inside {folder.parent}, so delete the link")


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def _warn_unrecorded(folder: Path, config: Mapping[str, Any]) -> None:
    if config["format"] == UNRECORDED:
        warn(
            f"{folder} is a run of an earlier version, which recorded no sha256 of results: they cannot be verified; "
            f"calibrant check {folder} computes them again",
        )


def _rebuild_model(folder: Path, config: dict[str, Any], given: Any) -> Program:
    recipe = config["model"]
    if given is not None and not isinstance(given, str | type):
        _warn_other_file(folder, recipe, given)
        return given
    if recipe is None:
        return _without_recipe(folder, config, given)
    if given is None and is_user_spec(recipe["name"]):
        raise RunError(
            f"the model of {folder} is {recipe['name']}, which is never imported just because a folder names it: pass "
            'load(run, model="FILE.py:Class"), on the command line --model FILE.py:Class'
        )
    if isinstance(given, str) and not is_user_spec(given) and given != recipe["name"]:
        raise RunError(f"the model of {folder} is {recipe['name']}, not {given}")
    model = _built(folder, given or recipe["name"], recipe["arguments"])
    _warn_other_file(folder, recipe, model)
    return model


def _built(folder: Path, given: str | type, arguments: Mapping[str, Any]) -> Program:
    try:
        shape = {"shape": tuple(arguments["shape"])} if "shape" in arguments else {}  # JSON has lists
        wanted: dict[str, Any] = {**arguments, **shape}
        return given(**wanted) if isinstance(given, type) else create(given, **wanted)
    except Exception as error:  # of any kind, if the arguments are wrong
        raise RunError(f"the model of {folder} cannot be rebuilt: {error}") from error


def _without_recipe(folder: Path, config: Mapping[str, Any], given: str | type | None) -> Program:
    """A model whose class takes no arguments; any other one must be given, since its arguments were not stored."""
    name, load = config["name"], f"load({str(folder)!r}, model="
    if config.get("is_function"):
        raise RunError(f"the model of {folder} is the function {name}, which is not stored: pass it, {load}{name})")
    cls = load_object(given)[0] if isinstance(given, str) and is_user_spec(given) else given
    if isinstance(cls, type) and not inspect.signature(cls).parameters:
        return _built(folder, cls, {})
    raise RunError(
        f"the model of {folder}, a {name}, was built from modules, or by its class and not by models.create, so that "
        f"no arguments are stored: build the same model again and pass it, {load}...)"
    )


def _warn_other_file(folder: Path, recipe: dict[str, Any] | None, model: Program) -> None:
    """Warn if a user's file is no longer the one with which the run was made."""
    file, sha256 = _file_of(model)
    if recipe is not None and recipe["sha256"] and sha256 not in ("", recipe["sha256"]):
        warn(f"{file} is not the file with which {folder} was made (another sha256)")


def _file_of(model: Program) -> tuple[str, str]:
    """The file of a user's model and its sha256; both are empty for a model without a file of the user's."""
    if (made := getattr(model, "recipe", None)) is not None:
        return made.name.rpartition(":")[0], made.sha256
    try:
        file = inspect.getsourcefile(type(model))
    except (TypeError, OSError):  # defined in a notebook or an interpreter, so there is no file to compare
        return "", ""
    own = type(model).__module__.startswith("calibrant.")
    return ("", "") if own or file is None else (file, digest(Path(file).read_bytes()))


def _rebuild_guide(
    folder: Path, config: dict[str, Any], program: PyroModule, encoder: nn.Module | None, given: Program | None
) -> Program:
    spec = config["guide"]
    if isinstance(given, RefinedGuide):
        return given
    if given is None and (spec is None or spec["structure"] == OWN):
        which = "refines one that was" if spec else "was"
        raise RunError(
            f"the guide of {folder} {which} written by hand: build the same guide again and pass load(run, guide=...)"
        )
    try:
        if given is not None:
            guide = as_program(given)
        else:
            guide = PriorGuide(program) if spec["structure"] == "prior" else from_spec(spec, encoder, program)
        for shapes in (spec or {}).get("refined", ()):
            guide = of_shapes(guide, shapes).requires_grad_(False)
        return guide
    except Exception as error:  # of any kind, if the specification is wrong
        raise RunError(f"the guide of {folder} cannot be rebuilt: {error}") from error


globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
