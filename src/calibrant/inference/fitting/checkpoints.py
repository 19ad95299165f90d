"""Checkpoints of a training; a resumed training gives the same numbers as one without interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor

from calibrant.errors import RunError
from calibrant.folders.files import new_file
from calibrant.folders.tensors import check_fits, tensors_of

if TYPE_CHECKING:
    from calibrant.inference.fitting.state import TrainingState
CHECKPOINTS = "checkpoints"
CHECKPOINT_FILE = "training.safetensors"
_PARTS = ("weights", "best")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
FIT_FIELDS = ("elbo", "elbo_se", "epochs", "stopped")


def save_checkpoint(folder: str | Path, state: TrainingState) -> None:
    """Write everything that is needed to resume a training to one file.

    Args:
        folder: folder of the checkpoints; it is created if it does not exist.
        state: state of the training in `inference.fit`.
    """
    folder = Path(folder)
    tensors = {f"weights.{name}": value for name, value in tensors_of(state.modules).items()}
    tensors |= {f"best.{name}": value.detach().cpu().contiguous().clone() for name, value in state.best.items()}
    for number, moments in state.optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": moments[name].detach().cpu().contiguous() for name in _MOMENTS}
    numbers = {name: getattr(state.fit, name) for name in (*FIT_FIELDS, "history")}
    counts = {name: value for name, value in vars(state).items() if isinstance(value, int | float)}
    training = json.dumps({"fit": numbers, "counts": counts, "settings": state.settings})
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / CHECKPOINT_FILE) as new:
        new.write_bytes(safetensors.torch.save(tensors, {"training": training}))


def has_checkpoint(folder: str | Path) -> bool:
    """Whether there is a checkpoint in this folder, from which a training can be resumed."""
    return (Path(folder) / CHECKPOINT_FILE).is_file()


def load_checkpoint(folder: str | Path, state: TrainingState) -> None:
    """Restore the training state that `save_checkpoint` wrote, in place; all later numbers are then the same.

    Args:
        folder: folder of the checkpoints.
        state: fresh state of a training with the same modules, settings and data.

    Raises:
        RunError: if there is no checkpoint, or it is damaged, or belongs to other modules, settings or data.
    """
    path = Path(folder) / CHECKPOINT_FILE
    if not path.is_file():
        raise RunError(f"there is no checkpoint in {folder} to resume from: start without resume")
    tensors, training = _read_checkpoint(path)
    _check_same_training(path, training["settings"], state.settings)
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "adam": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    for part in _PARTS:
        check_fits(str(path), state.modules, parts[part])
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
            f"{path} belongs to another training ({'; '.join(differ)}): resume with the settings and data of that "
            "training, or start in another folder"
        )


def _moments(adam: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in adam.items():
        number, _, moment = name.partition(".")
        state.setdefault(int(number), {})[moment] = value
    return state
