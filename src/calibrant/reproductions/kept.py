"""Trained weights that a cell keeps for cells of other experiments: one file, which says by its sha256 whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from calibrant.folders.files import new_file
from calibrant.folders.tensors import check_fits, digest_of_tensors, set_weights, tensors_of
from calibrant.program.contract import Program, as_program

_PARTS = ("model", "guide")


def write_kept(path: Path, digest: str, model: Program, guide: Program) -> str:
    """Write the weights of a model and its guide; a process that is killed leaves no file, or a whole one.

    Args:
        path: name of the file.
        digest: sha256 of all that the cell follows from.
        model: the program.
        guide: its guide.

    Returns:
        The sha256 of the weights and of the cell's digest.
    """
    modules = zip(_PARTS, (model, guide), strict=True)
    tensors = {f"{part}.{name}": value for part, one in modules for name, value in tensors_of(as_program(one)).items()}
    found = digest_of_tensors(tensors, digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as new:
        new.write_bytes(safetensors.torch.save(tensors, {"cell": digest, "sha256": found}))
    return found


def read_kept(path: Path, digest: str, sha256: str) -> dict[str, Tensor] | None:
    """Read kept weights; None if there is no file, or not the one with this sha256, which a cell has recorded."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except Exception:  # no file, or a damaged one, which raises errors of any kind
        return None
    return tensors if digest_of_tensors(tensors, digest) == sha256 else None


def set_kept(model: Program, guide: Program, tensors: Mapping[str, Tensor], device: str) -> None:
    """Load kept weights into a model and its guide, and leave both as a training leaves them.

    Raises:
        RunError: for weights of other modules.
    """
    for part, one in zip(_PARTS, (model, guide), strict=True):
        own = {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        module = as_program(one)
        check_fits(f"the kept {part}", module, own)
        set_weights(module, own)
        module.to(device).eval()
