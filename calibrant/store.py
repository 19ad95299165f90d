"""Run folders: weights as safetensors, what rebuilds a run as JSON, results as NetCDF, the history as CSV.

Nothing is pickled, and `load` imports no file because a folder names it. Every file is written under another name first
and then moved, so an interrupted write leaves the old file or none.
"""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import math
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import xarray as xr
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant import __version__
from calibrant.errors import CalibrantError, RunError
from calibrant.guides import AmortizedGuide, CollapsedGuide, from_spec
from calibrant.models.registry import create
from calibrant.program import Program, as_program, seeded
from calibrant.userfile import is_user_spec

if TYPE_CHECKING:
    from calibrant.evaluation.results import RunResult
    from calibrant.inference.fit import Fit, TrainingState

FORMAT = "calibrant/1"
CONFIG, HISTORY, CHECKPOINTS, REPORT = "config.json", "history.csv", "checkpoints", "report.html"
MODEL, GUIDE = "model.safetensors", "guide.safetensors"
AMORTIZED, REFERENCE, COMPARISON, CONTRAST = "amortized.nc", "reference.nc", "comparison.nc", "contrast.nc"
GAP, WEIGHTS, CALIBRATION, PREDICTIVE = "gap.nc", "weights.nc", "calibration.nc", "predictive.nc"
REMEDIES = "remedies.nc"

# The results of a check, by their names in `RunResult`.
TREES = {"amortized": AMORTIZED, "reference": REFERENCE, "calibration": CALIBRATION}
DATASETS = {
    "comparison": COMPARISON,
    "contrast": CONTRAST,
    "gap": GAP,
    "weights": WEIGHTS,
    "predictive": PREDICTIVE,
    "remedies": REMEDIES,
}

_FILES = (CONFIG, HISTORY, REPORT, MODEL, GUIDE, *TREES.values(), *DATASETS.values())
_LIBRARIES = ("torch", "pyro-ppl", "numpy", "xarray", "arviz-base", "arviz-stats", "safetensors", "h5netcdf")
_CHECKPOINT = "training.safetensors"
_PARTS = ("weights", "best")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_FIT = ("elbo", "elbo_se", "epochs", "stopped")

# -- a run's modules ---------------------------------------------------------------------------------------------------


def save_run(
    run_dir: str | Path,
    model: Program,
    guide: Program,
    fit: Fit | None = None,
    *,
    data: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    **details: Any,
) -> Path:
    """Write the weights, the history and what rebuilds both modules into a folder, which is made if need be.

    Args:
        run_dir: the folder.
        model: the program; built by `models.create`, it can be rebuilt without the caller.
        guide: its guide; made by `guides.amortize` (with an encoder of ours), it can be rebuilt too.
        fit: what training did; None before its end: then only `config.json` is written.
        data: what is known of the data, JSON values.
        settings: how it was trained, JSON values.
        details: more keys of `config.json`, JSON values.

    Raises:
        RunError: for values that JSON can't hold, or a module whose state is more than tensors.
    """
    folder = Path(run_dir)
    program, guided = as_program(model), as_program(guide)
    recipe = getattr(program, "recipe", None)
    config = {
        "format": FORMAT,
        "name": recipe.name if recipe is not None else _class_name(program),
        "model": recipe and {"name": recipe.name, "arguments": recipe.arguments, "sha256": recipe.sha256},
        "guide": guided.spec if isinstance(guided, AmortizedGuide | CollapsedGuide) else None,
        "data": dict(data or {}),
        "settings": dict(settings or {}),
        **details,
        "fit": None,
        "sha256": {},
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if fit is not None:
        config["sha256"] = {
            MODEL: _write_weights(folder / MODEL, program),
            GUIDE: _write_weights(folder / GUIDE, guided),
        }
        config["fit"] = {name: getattr(fit, name) for name in _FIT}
        _write_history(folder / HISTORY, fit.history)
    write_config(folder, config)
    return folder


def load(
    run_dir: str | Path,
    model: Program | type[nn.Module] | str | None = None,
    encoder: nn.Module | None = None,
    guide: Program | None = None,
) -> tuple[PyroModule, PyroModule]:
    """The model and guide of a run folder, with their trained weights, in `eval()` and on the CPU.

    A registered model is rebuilt from the folder alone. Code of yours is never imported because a folder names it:
    pass the model.

    Args:
        run_dir: the folder.
        model: for a model in a file of yours "FILE.py:Class" or the class, which is built with the stored arguments;
            or a built model, into which the weights are loaded (also for models that were built from modules).
        encoder: the built encoder, where the guide was made with one of yours.
        guide: the built guide, where it was not made by `guides.amortize`.

    Raises:
        RunError: for a folder that is no run folder, damaged, or of another model, and where `model`, `encoder` or
            `guide` is needed.
    """
    folder = Path(run_dir)
    config = read_config(folder)
    if config["fit"] is None:
        raise RunError(
            f"the training in {folder} has no result yet: go on with it, calibrant run --out {folder} --resume"
        )
    with seeded(0), torch.device("cpu"):
        program = as_program(_rebuild_model(folder, config, model))
        guided = as_program(_rebuild_guide(folder, config, program, encoder, guide))
    found = [_read_weights(folder, name, config["sha256"]) for name in (MODEL, GUIDE)]
    for file, module, tensors in zip((MODEL, GUIDE), (program, guided), found, strict=True):
        _check_fits(f"{folder / file}", module, tensors)
    for module, tensors in zip((program, guided), found, strict=True):
        _set_weights(module, tensors)
    return program.eval(), guided.eval()


def load_result(run_dir: str | Path, model: Program | type[nn.Module] | str | None = None) -> RunResult:
    """All that a run folder holds, as a report shows it.

    Args:
        run_dir: the folder.
        model: as in `load`.

    Raises:
        RunError: as `load` does, and for a folder without `amortized.nc`.
    """
    from calibrant.evaluation.results import RunResult

    folder = Path(run_dir)
    config = read_config(folder)
    if not (folder / AMORTIZED).is_file():
        raise RunError(f"{folder} holds no posterior ({AMORTIZED}): make it with calibrant check {folder}")
    with seeded(0), torch.device("cpu"):
        program = as_program(_rebuild_model(folder, config, model))
    tensors = _read_weights(folder, MODEL, config["sha256"])
    _check_fits(f"{folder / MODEL}", program, tensors)
    _set_weights(program, tensors)
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
        history=load_history(folder),
        **results,
    )


def clear_run(run_dir: str | Path) -> None:
    """Delete the files that calibrant wrote into a run folder, and nothing else; an empty folder is left as it is.

    Raises:
        RunError: for a folder that is no run folder: nothing in it is deleted.
    """
    folder = Path(run_dir)
    if folder.is_dir() and not any(folder.iterdir()):
        return
    config = read_any_config(folder)
    for name in config.get("runs", ()):
        if (folder / name / CONFIG).is_file() and Path(name).name == name:
            clear_run(folder / name)
            _remove_if_empty(folder / name)
    for file in _FILES:
        (folder / file).unlink(missing_ok=True)
    (folder / CHECKPOINTS / _CHECKPOINT).unlink(missing_ok=True)
    _remove_if_empty(folder / CHECKPOINTS)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


def versions() -> dict[str, str]:
    """The versions that results depend on."""
    found = {name: version(name) for name in _LIBRARIES}
    return {"calibrant": __version__, "python": platform.python_version(), **found}


def _class_name(module: nn.Module) -> str:
    return type(getattr(module, "function", module)).__name__


def _rebuild_model(folder: Path, config: dict[str, Any], given: Any) -> Program:
    recipe = config["model"]
    if given is not None and not isinstance(given, str | type):
        _warn_other_file(folder, recipe, type(given))
        return given
    if recipe is None:
        raise RunError(
            f"the model of {folder} was built from modules, which no file can rebuild: build it again as it was and "
            "pass it, load(run, model=...)"
        )
    if given is None and is_user_spec(recipe["name"]):
        raise RunError(
            f"the model of {folder} is {recipe['name']}, which is not imported because a folder names it: pass "
            'load(run, model="FILE.py:Class"), on the command line --model FILE.py:Class'
        )
    if isinstance(given, str) and not is_user_spec(given) and given != recipe["name"]:
        raise RunError(f"the model of {folder} is {recipe['name']}, not {given}")
    arguments = {name: tuple(v) if name == "shape" else v for name, v in recipe["arguments"].items()}  # JSON has lists
    try:
        model = given(**arguments) if isinstance(given, type) else create(given or recipe["name"], **arguments)
    except (CalibrantError, TypeError) as error:
        raise RunError(f"the model of {folder} cannot be rebuilt: {error}") from error
    _warn_other_file(folder, recipe, type(model))
    return model


def _warn_other_file(folder: Path, recipe: dict[str, Any] | None, cls: type) -> None:
    """Say when a user's file is no longer the one that the run was made with."""
    if recipe is None or not recipe["sha256"]:
        return
    try:
        file = inspect.getsourcefile(cls)
    except TypeError:  # defined in a notebook or an interpreter: there is no file to compare
        return
    if file is not None and _sha256(Path(file).read_bytes()) != recipe["sha256"]:
        warnings.warn(f"{file} is not the file that {folder} was made with (another sha256)", stacklevel=4)


def _rebuild_guide(
    folder: Path, config: dict[str, Any], program: PyroModule, encoder: nn.Module | None, given: Program | None
) -> Program:
    if given is not None:
        return given
    if config["guide"] is None:
        raise RunError(f"the guide of {folder} was written by hand: build it as it was and pass load(run, guide=...)")
    try:
        return from_spec(config["guide"], encoder, program)
    except (CalibrantError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"the guide of {folder} cannot be rebuilt: {error}") from error


# -- weights -----------------------------------------------------------------------------------------------------------


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, each tensor with memory of its own: safetensors takes no shared one."""
    state = module.state_dict()
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise RunError(f"{_class_name(module)} keeps state that is no tensor ({other}): leave out get_extra_state")
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _write_weights(path: Path, module: nn.Module) -> str:
    content = safetensors.torch.save(_tensors(module))
    with _new_file(path) as new:
        new.write_bytes(content)
    return _sha256(content)


def _read_weights(folder: Path, file: str, sha256: dict[str, str]) -> dict[str, Tensor]:
    path = folder / file
    if not path.is_file():
        raise RunError(f"{folder} is damaged: {file} is missing; copy the folder again, or train again")
    content = path.read_bytes()
    if _sha256(content) != sha256.get(file):
        raise RunError(
            f"{path} is damaged: its sha256 is not the one in {CONFIG}; copy the folder again, or train again"
        )
    return safetensors.torch.load(content)


def _check_fits(what: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise RunError(
            f"{what} does not fit {_class_name(module)}: {name} has {_shape(found.get(name))} there and "
            f"{_shape(wanted.get(name))} here ({len(wrong)} differ); give the model and guide that it was made with"
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no entry" if shape is None else f"shape {shape}"


def _set_weights(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load tensors that fit, keeping the dtype that they were saved in."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)
    module.load_state_dict(tensors)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -- text files --------------------------------------------------------------------------------------------------------


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write `config.json`; numbers that JSON lacks become null.

    Raises:
        RunError: for values that JSON can't hold.
    """
    try:
        text = json.dumps(_finite(config), indent=2, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise RunError(f"{CONFIG} holds JSON values alone: {error}") from error
    with _new_file(folder / CONFIG) as new:
        new.write_text(text + "\n", encoding="utf-8")


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """What `config.json` of a run folder holds.

    Raises:
        RunError: for a folder that is missing, foreign, damaged, of another format, or that holds several runs.
    """
    folder = Path(run_dir)
    config = read_any_config(folder)
    if "runs" in config:
        each = ", ".join(str(folder / name) for name in config["runs"])
        raise RunError(f"{folder} holds several runs, name one of them: {each}")
    if missing := sorted({"name", "model", "guide", "data", "settings", "fit", "sha256"} - set(config)):
        raise RunError(f"{folder} is damaged: {CONFIG} lacks {missing}; copy the folder again")
    if config["fit"] is not None:
        config["fit"] = {name: math.nan if value is None else value for name, value in config["fit"].items()}
    return config


def read_any_config(folder: Path) -> dict[str, Any]:
    """What `config.json` holds, of one run or of several (key `runs`)."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise RunError(f"there is no run in {folder}: give the folder of one; `calibrant run --out {folder}` makes it")
    if not path.is_file():
        raise RunError(f"{folder} is no run folder of calibrant: it has no {CONFIG}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{folder} is damaged: {CONFIG} cannot be read ({error}); copy the folder again") from error
    written = config.get("format") if isinstance(config, dict) else None
    if not isinstance(written, str) or not written.startswith("calibrant/"):
        raise RunError(f"{folder} is no run folder of calibrant: {path} was written by another program")
    if written != FORMAT:
        raise RunError(
            f"{folder} has the format {written}, this version of calibrant reads {FORMAT}: use another version"
        )
    return config


def _finite(value: Any) -> Any:
    """The same JSON value with null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_history(path: Path, history: list[dict[str, float]]) -> None:
    with _new_file(path) as new, new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, history[0] if history else ["epoch", "train", "validation", "lr"])
        writer.writeheader()
        writer.writerows(history)


def load_history(run_dir: str | Path) -> list[dict[str, float]]:
    """The rows of `history.csv`; none where it is missing.

    Raises:
        RunError: for a file that can't be read.
    """
    path = Path(run_dir) / HISTORY
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {key: int(v) if key == "epoch" else float(v) for key, v in row.items()} for row in csv.DictReader(file)
            ]
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}): delete it to go without the history") from error


# -- results -----------------------------------------------------------------------------------------------------------


def save_tree(tree: xr.DataTree, path: str | Path) -> None:
    """Write a result tree as NetCDF.

    Raises:
        RunError: for attributes that are no string or number, or values that NetCDF can't hold.
    """
    for node in tree.subtree:
        _check_attributes(node.to_dataset())
    _write_netcdf(Path(path), tree.to_netcdf)


def load_tree(path: str | Path) -> xr.DataTree:
    """A result tree as it was saved: values, dtypes, coordinates and attributes.

    Raises:
        RunError: for a file that is missing or can't be read.
    """
    tree = _read_netcdf(Path(path), xr.load_datatree)
    return xr.DataTree.from_dict({node.path: _plain(node.to_dataset(inherit=False)) for node in tree.subtree})


def save_dataset(dataset: xr.Dataset, path: str | Path) -> None:
    """Write a data set as NetCDF; as `save_tree`."""
    _check_attributes(dataset)
    _write_netcdf(Path(path), dataset.to_netcdf)


def load_dataset(path: str | Path) -> xr.Dataset:
    """A data set as it was saved; as `load_tree`."""
    return _plain(_read_netcdf(Path(path), xr.load_dataset))


def _check_attributes(dataset: xr.Dataset) -> None:
    for owner in _with_attributes(dataset):
        for name, value in owner.attrs.items():
            if isinstance(value, bool) or not isinstance(value, str | int | float | np.integer | np.floating):
                raise RunError(
                    f"attribute {name!r} is a {type(value).__name__}: NetCDF takes strings and numbers, so give an "
                    "integer for a truth value and a JSON string for anything else"
                )


def _with_attributes(dataset: xr.Dataset) -> list[Any]:
    return [dataset, *dataset.variables.values()]


def _write_netcdf(path: Path, write: Callable[..., Any]) -> None:
    with _new_file(path) as new:
        try:
            write(new, engine="h5netcdf")
        except (TypeError, ValueError) as error:
            raise RunError(f"{path.name} can't be written as NetCDF: {error}") from error


def _read_netcdf(path: Path, read: Callable[..., Any]) -> Any:
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    try:
        return read(path, engine="h5netcdf")
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error}): make it again with calibrant check {path.parent}") from error


def _plain(dataset: xr.Dataset) -> xr.Dataset:
    """Attributes as Python's own numbers, and nothing left of how the values lie in the file."""
    dataset = dataset.drop_encoding()
    for owner in _with_attributes(dataset):
        owner.attrs = {
            name: value.item() if isinstance(value, np.generic) else value for name, value in owner.attrs.items()
        }
    return dataset


@contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end and vanishes on an error."""
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def save_checkpoint(folder: str | Path, state: TrainingState) -> None:
    """Write all that a training needs to go on from here, in one file.

    Args:
        folder: where checkpoints lie; it is made if need be.
        state: of `inference.fit`.
    """
    folder = Path(folder)
    tensors = {f"weights.{name}": value for name, value in _tensors(state.modules).items()}
    tensors |= {f"best.{name}": value.detach().cpu().contiguous().clone() for name, value in state.best.items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": moments[name].detach().cpu().contiguous() for name in _MOMENTS}
    numbers = {name: getattr(state.fit, name) for name in (*_FIT, "history")}
    counts = {name: value for name, value in vars(state).items() if isinstance(value, int | float)}
    training = json.dumps({"fit": numbers, "counts": counts, "settings": state.settings})
    folder.mkdir(parents=True, exist_ok=True)
    with _new_file(folder / _CHECKPOINT) as new:
        new.write_bytes(safetensors.torch.save(tensors, {"training": training}))


def has_checkpoint(folder: str | Path) -> bool:
    """Whether a training can go on from this folder."""
    return (Path(folder) / _CHECKPOINT).is_file()


def load_checkpoint(folder: str | Path, state: TrainingState) -> None:
    """Bring a fresh training state to where `save_checkpoint` left it: from there on every number is the same.

    Raises:
        RunError: where there is no checkpoint, a damaged one, or one of other modules, settings or data.
    """
    path = Path(folder) / _CHECKPOINT
    if not path.is_file():
        raise RunError(f"there is no checkpoint in {folder} to go on from: start without resume")
    tensors, training = _read_checkpoint(path)
    _check_same_training(path, training["settings"], state.settings)
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "adam": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    for part in _PARTS:
        _check_fits(str(path), state.modules, parts[part])
    state.modules.load_state_dict(parts["weights"])
    here = state.modules.state_dict()
    state.best = {name: value.to(here[name].device) for name, value in parts["best"].items()}
    state.optimizer.load_state_dict(
        {"state": _moments(parts["adam"]), "param_groups": state.optimizer.state_dict()["param_groups"]}
    )
    for owner, part in ((state, "counts"), (state.fit, "fit")):
        for name, value in training[part].items():
            setattr(owner, name, value)


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["training"])  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} is damaged ({error}): start again without resume, in another folder") from error


def _check_same_training(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [
        f"{name} was {there.get(name)}, is {here.get(name)}" for name in here if there.get(name) != here.get(name)
    ]
    if differ:
        raise RunError(
            f"{path} is of another training ({'; '.join(differ)}): go on with the settings and data that it was made "
            "with, or start in another folder"
        )


def _moments(adam: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in adam.items():
        number, _, moment = name.partition(".")
        state.setdefault(int(number), {})[moment] = value
    return state
