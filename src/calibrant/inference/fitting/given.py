"""What the user gives to a training is refused before anything is computed: numbers, device, held-out data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from calibrant.data.dataset import Data
from calibrant.errors import DataError, InferenceError

_WHOLE = {"epochs": 0, "batch_size": 1, "particles": 1, "patience": 0}  # least values
_POSITIVE = ("lr", "clip")
_OPTIONAL = ("epochs", "patience")


def check_numbers(given: Mapping[str, Any]) -> None:
    """Refuse settings of a training that are no numbers of their kind.

    Args:
        given: name of an argument of `fit` → its value.

    Raises:
        InferenceError: naming the argument, its value and the value wanted.
    """
    for name, least in _WHOLE.items():
        value = given[name]
        if not (value is None and name in _OPTIONAL) and (not _is_whole(value) or value < least):
            raise InferenceError(f"{name}={value!r}: give a whole number, {least} or more")
    for name in _POSITIVE:
        value = given[name]
        if not hasattr(value, "__float__") or not 0 < float(value) < math.inf:
            raise InferenceError(f"{name}={value!r}: give a number above 0")
    if not _is_whole(given["seed"]):
        raise InferenceError(f"seed={given['seed']!r}: give a whole number")
    if given["compile"] not in (True, False, "auto"):
        raise InferenceError(f'compile={given["compile"]!r}: give "auto", True or False')


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | torch.Tensor)


def check_device(device: str | torch.device, remedy: str = "device='cpu'") -> None:
    """Refuse a device that cannot be used here.

    Args:
        device: the device.
        remedy: how the user asks for the CPU.

    Raises:
        InferenceError: with the reason that torch gives.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InferenceError(f"device {str(device)!r} can't be used here ({reason}): use {remedy}") from error


def check_alike(what: str, data: Data, train: Data) -> None:
    """Refuse data that have other keys or event shapes than the training data.

    Args:
        what: what the data are, in words.
        data: the data, sorted into observations and covariates of the program.
        train: the training data, likewise.

    Raises:
        DataError: naming the first key that differs.
    """
    theirs, ours = (_shapes(one) for one in (train, data))
    for name in {**theirs, **ours}:
        if theirs.get(name) == ours.get(name):
            continue
        differs = f"has the event shape {ours.get(name)}, in the training data {theirs.get(name)}"
        words = differs if name in ours and name in theirs else "is only in one of them and the training data"
        raise DataError(f"{what}: {name!r} {words}: give the same keys and event shapes")


def _shapes(data: Data) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for part in data.batch([0]) for name, value in part.items()}
