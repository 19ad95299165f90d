"""Checkpoints of a training; a resumed training gives the same numbers as one without interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor

from calibrant.errors import CalibrantError, RunError
from calibrant.folders.files import new_file
from calibrant.folders.tensors import check_fits, digest_of_tensors, tensors_of

if TYPE_CHECKING:
    from calibrant.inference.fitting.state import TrainingState
CHECKPOINTS = "checkpoints"
CHECKPOINT_FILE = "training.safetensors"
_PARTS = ("weights", "best")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_REMEDY = "start again without resume, in another folder"
FIT_FIELDS = ("elbo", "elbo_se", "is_elbo", "kl_weights", "epochs", "stopped")


def save_checkpoint(folder: str | Path, state: TrainingState) -> None:
    """Write everything that is needed to resume a training to one file, which carries the sha256 of its content.

    File and sha256 are one, so that a process that is killed leaves the last checkpoint or the new one. The file is not
    synced to the disk, which would take as long as some training steps; after a power cut its sha256 tells whether it
    is whole.

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
    counts = {name: getattr(state, name) for name in _counts(state)}
    training = json.dumps({"fit": numbers, "counts": counts, "settings": state.settings})
    content = safetensors.torch.save(tensors, {"training": training, "sha256": digest_of_tensors(tensors, training)})
    folder.mkdir(parents=True, exist_ok=True)
    with new_file(folder / CHECKPOINT_FILE, synced=False) as new:
        new.write_bytes(content)


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
    try:
        _check_same_training(path, training["settings"], state.settings)
        _restore(state, path, tensors, training)
    except CalibrantError:
        raise
    except Exception as error:  # what another program wrote fails in any place
        raise RunError(f"{path} is no checkpoint of a training ({error!r}): {_REMEDY}") from error


def _restore(state: TrainingState, path: Path, tensors: dict[str, Tensor], training: dict[str, Any]) -> None:
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "best": {}, "adam": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    for part in _PARTS:
        check_fits(str(path), state.modules, parts[part])
    moments = _moments(parts["adam"], state.optimizer.param_groups[0]["params"])
    state.modules.load_state_dict(parts["weights"])
    here = state.modules.state_dict()
    state.best = {name: value.to(here[name].device) for name, value in parts["best"].items()}
    state.optimizer.load_state_dict({"state": moments, "param_groups": state.optimizer.state_dict()["param_groups"]})
    for owner, part, names in ((state, "counts", _counts(state)), (state.fit, "fit", (*FIT_FIELDS, "history"))):
        for name in names:
            if name in training[part]:
                setattr(owner, name, training[part][name])


def _read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not the mapped file
            stored = dict(file.metadata())
        training = json.loads(stored["training"])
    except Exception as error:  # a damaged file raises errors of any kind
        raise RunError(f"{path} is damaged ({error}): {_REMEDY}") from error
    if "sha256" not in stored:
        raise RunError(
            f"{path} holds no sha256, so it is damaged or of an earlier version, whose trainings are not resumed: "
            f"{_REMEDY}"
        )
    if stored["sha256"] != digest_of_tensors(tensors, stored["training"]):
        raise RunError(f"{path} is damaged: its content has another sha256 than when it was written; {_REMEDY}")
    return tensors, training


def _check_same_training(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    differ = [
        f"{name} was {there.get(name)}, is {here.get(name)}" for name in here if there.get(name) != here.get(name)
    ]
    if differ:
        raise RunError(
            f"{path} belongs to another training ({'; '.join(differ)}): resume with the settings and data of that "
            "training, or start in another folder"
        )


def _counts(state: TrainingState) -> list[str]:
    """Names of the numbers that a training state holds."""
    return [name for name, value in vars(state).items() if isinstance(value, int | float)]


def _moments(adam: dict[str, Tensor], weights: list[Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in adam.items():
        number, _, moment = name.partition(".")
        if moment != "step" and value.shape != weights[int(number)].shape:
            raise ValueError(f"adam.{name} has the shape {tuple(value.shape)}")
        state.setdefault(int(number), {})[moment] = value
    return state
