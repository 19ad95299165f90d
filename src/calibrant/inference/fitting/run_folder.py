"""The folder of a run: weights, training history and configuration, from which `load` rebuilds model and guide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro.nn import PyroModule

from calibrant.errors import RunError
from calibrant.folders.configuration import CONFIG, FORMAT, read_any_config, versions, write_config
from calibrant.folders.history import HISTORY, write_history
from calibrant.folders.tensors import write_weights
from calibrant.guides.amortized import AmortizedGuide
from calibrant.guides.collapsed import CollapsedGuide
from calibrant.guides.from_prior import PriorGuide
from calibrant.guides.refined import RefinedGuide
from calibrant.inference.fitting.checkpoints import FIT_FIELDS
from calibrant.models.registry import name_of
from calibrant.program.contract import Program, as_program

if TYPE_CHECKING:
    from calibrant.inference.fitting.state import Fit

MODEL, GUIDE = "model.safetensors", "guide.safetensors"
OWN = "own"  # structure of a guide that was not built from a specification; it stands where such a guide is refined


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
    """Write the weights, the training history and the configuration of a run into a folder.

    Args:
        run_dir: the folder; it is created if it does not exist.
        model: the program. A model from `models.create` can be rebuilt from the folder alone.
        guide: its guide. A guide from `guides.amortize` with a built-in encoder can be rebuilt from the folder alone,
            one from `guides.prior` from the model, and one from `guides.refine` from what it refines.
        fit: result of the training; if None, training has not ended and only `config.json` is written.
        data: description of the data, JSON values.
        settings: settings of the training, JSON values.
        details: further keys of `config.json`, JSON values.

    Raises:
        RunError: for values that JSON cannot hold, or a module whose state contains anything but tensors.
    """
    folder = Path(run_dir)
    program, guided = as_program(model), as_program(guide)
    recipe = getattr(program, "recipe", None)
    config = {
        "format": FORMAT,
        "name": name_of(program),
        "model": recipe and {"name": recipe.name, "arguments": recipe.arguments, "sha256": recipe.sha256},
        "is_function": hasattr(program, "function"),
        "guide": guide_spec(guided),
        "data": dict(data or {}),
        "settings": dict(settings or {}),
        **details,
        "fit": None,
        "sha256": {},
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config if fit is None else {**config, **_written(folder, program, guided, fit)})
    return folder


def finish_run(folder: Path, model: PyroModule, guide: PyroModule, fit: Fit) -> None:
    """Write the result of a training into its folder, whose configuration is kept."""
    write_config(folder, {**read_any_config(folder), **_written(folder, model, guide, fit)})


def _written(folder: Path, model: PyroModule, guide: PyroModule, fit: Fit) -> dict[str, Any]:
    """Write weights and history; returns the part of the configuration that belongs to them."""
    sha256 = {
        MODEL: write_weights(folder / MODEL, model),
        GUIDE: write_weights(folder / GUIDE, guide),
        HISTORY: write_history(folder / HISTORY, fit.history),
    }
    return {"sha256": sha256, "fit": {name: getattr(fit, name) for name in FIT_FIELDS}}


def guide_spec(guide: PyroModule) -> dict[str, Any] | None:
    """The specification, JSON values, from which a guide can be rebuilt; None for one that was written by hand.

    That of a refined guide is that of the guide that it refines, with the shapes of its maps.
    """
    if isinstance(guide, RefinedGuide):
        start = guide_spec(guide.refines) or {"structure": OWN, "sites": []}
        return {**start, "refined": [*start.get("refined", ()), guide.shapes]}
    return guide.spec if isinstance(guide, AmortizedGuide | CollapsedGuide | PriorGuide) else None


def require_free(folder: Path) -> None:
    """Refuse a folder for a new run if something would be overwritten there, or if it cannot be written.

    Raises:
        RunError: for a folder that holds a run, or files with the names that a run has, and for a file in its place.
    """
    if (folder / CONFIG).is_file() and _has_ended(folder):
        raise RunError(
            f"{folder} holds a run, which is not overwritten: calibrant.load({str(folder)!r}) loads its model and "
            "guide; name another folder for a new one"
        )
    if taken := [name for name in (MODEL, GUIDE, HISTORY) if (folder / name).exists()]:
        raise RunError(f"{folder} holds a file {taken[0]}, which is not overwritten: name another folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _has_ended(folder: Path) -> bool:
    """Whether a folder with a configuration holds anything but a training that has no result yet."""
    return read_any_config(folder).get("fit", {}) is not None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """One sentence for a folder that cannot be written.

    Raises:
        RunError: with the reason that the system gives.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}): name another folder") from error
