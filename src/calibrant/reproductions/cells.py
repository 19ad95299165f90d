"""Finished cells: the numbers and arrays of one row and seed, in one file that carries its own sha256."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from calibrant.errors import CalibrantError
from calibrant.folders.files import new_file
from calibrant.folders.tensors import digest_of_tensors

EACH = ", each datum"  # what follows the name of a number in the name of the array of its values


@dataclass(frozen=True)
class Measured:
    """A number with its standard error within a cell, such as that of a mean over test data.

    Attributes:
        value: the number.
        se: its standard error.
        values: the values of single data, or means of blocks of dependent data, whose mean it is; rows with one seed
            are then compared datum by datum.
    """

    value: float
    se: float
    values: np.ndarray | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, values: Any, blocks: int | None = None) -> Measured:
        """The mean of independent values, such as one per test datum, with its standard error.

        With `blocks`, values that follow each other depend on each other within so many equal blocks.
        """
        values = np.asarray(values, dtype=np.float64).ravel()
        if blocks is not None and len(values) > blocks:
            values = np.array([part.mean() for part in np.array_split(values, blocks)])
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return cls(float(values.mean()), float(error), values)

    def __neg__(self) -> Measured:
        return Measured(-self.value, self.se, None if self.values is None else -self.values)

    def __add__(self, constant: float) -> Measured:
        return Measured(self.value + constant, self.se, None if self.values is None else self.values + constant)


@dataclass(frozen=True)
class Cell:
    """What one cell found.

    Attributes:
        digest: sha256 of everything from which the cell follows.
        numbers: name → value.
        errors: name → standard error within the cell, such as that of a mean over test data, where it is known.
        steps: number of training steps.
        stopped: training → why it ended, as in `Fit.stopped`.
        seconds: duration of the process that finished the cell.
        device: where it was computed, in words.
        failed: why the cell has no result; empty if it has one.
        kept: name → sha256 of the trained weights that it keeps for cells of other experiments.
        arrays: name → array, for pictures.
    """

    digest: str
    numbers: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    stopped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    device: str = "cpu"
    failed: str = ""
    kept: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


def sorted_out(found: Any, known: Mapping[str, str]) -> dict[str, Any]:
    """The fields `numbers`, `errors` and `arrays` of a cell, from what its function returned.

    Args:
        found: name → number, `Measured`, or array with a dimension.
        known: the names of the numbers.

    Raises:
        CalibrantError: for something else, or for a number that the experiment's card does not name.
    """
    if not isinstance(found, Mapping):
        raise CalibrantError(
            f"the cell's function returned {type(found).__name__}: return a dict of numbers and arrays"
        )
    kept: dict[str, Any] = {"numbers": {}, "errors": {}, "arrays": {}}
    for name, value in found.items():
        if isinstance(value, Measured):
            kept["numbers"][name], kept["errors"][name] = value.value, value.se
            if value.values is not None:
                kept["arrays"][name + EACH] = value.values
            continue
        array = value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise CalibrantError(f"the cell returned {name} = {value!r}: give a number, Measured or an array")
        if array.ndim:
            kept["arrays"][name] = array
        else:
            kept["numbers"][name] = float(array)
    if unknown := [name for name in kept["numbers"] if name not in known]:
        raise CalibrantError(
            f"the cell returned {', '.join(unknown)}, which the experiment's numbers do not name: add "
            f"{'it' if len(unknown) == 1 else 'them'} to numbers=, or return an array"
        )
    return kept


def write_cell(path: Path, cell: Cell, trace: str = "") -> None:
    """Write a cell to one file; a process that is killed leaves no file, or a whole one.

    Args:
        path: name of the file.
        cell: the cell.
        trace: where it failed, which a text file beside it keeps.
    """
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in cell.arrays.items()}
    text = json.dumps({name: value for name, value in asdict(cell).items() if name != "arrays"})
    content = safetensors.torch.save(tensors, {"cell": text, "sha256": digest_of_tensors(tensors, text)})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".txt")
    beside.unlink(missing_ok=True)
    if trace:
        beside.write_text(trace, encoding="utf-8")
    with new_file(path) as new:
        new.write_bytes(content)


def read_cell(path: Path) -> Cell | None:
    """Read a cell; None if there is no file, or one that is not as it was written, so that it is computed again."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not the mapped file
            stored = dict(file.metadata() or {})
        if stored["sha256"] != digest_of_tensors(tensors, stored["cell"]):
            return None
        return Cell(**json.loads(stored["cell"]), arrays={name: tensor.numpy() for name, tensor in tensors.items()})
    except Exception:  # no file, or a damaged one, which raises errors of any kind
        return None
