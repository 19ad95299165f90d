"""The weights of modules as safetensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from calibrant.errors import RunError
from calibrant.folders.configuration import CONFIG
from calibrant.folders.files import digest, new_file


def class_name(module: nn.Module) -> str:
    return type(getattr(module, "function", module)).__name__


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module as copies on the CPU, since safetensors does not take tensors that share memory."""
    state = module.state_dict()
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise RunError(f"{class_name(module)} has state that is not a tensor ({other}): remove its get_extra_state")
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def digest_of_tensors(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """The sha256 of names, dtypes, shapes and values of tensors, and of a text; the order of the names is ignored."""
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of the values of a tensor, in the order of its entries."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_weights(path: Path, module: nn.Module) -> str:
    """Write the weights of a module; returns the sha256 of the file."""
    content = safetensors.torch.save(tensors_of(module))
    with new_file(path) as new:
        new.write_bytes(content)
    return digest(content)


def read_weights(folder: Path, file: str, sha256: dict[str, str]) -> dict[str, Tensor]:
    path = folder / file
    if not path.is_file():
        raise RunError(f"{folder} is damaged: {file} is missing; copy the folder again, or train again")
    content = path.read_bytes()
    if digest(content) != sha256.get(file):
        raise RunError(
            f"{path} is damaged: its sha256 is not the one in {CONFIG}; copy the folder again, or train again"
        )
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # a file that is no safetensors raises errors of any kind
        raise RunError(f"{path} cannot be read ({error}): copy the folder again, or train again") from error


def check_fits(what: str, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Check that tensors have the names, shapes and kinds (floating, integer, truth value) of a module's state.

    Raises:
        RunError: for tensors of another module; the message names their file, `what`.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if wrong:
        name = wrong[0]
        raise RunError(
            f"{what} does not fit {class_name(module)}: {name} has {_shape(found.get(name))} there and "
            f"{_shape(wanted.get(name))} here ({len(wrong)} differ); give the model and guide that it was made with"
        )
    for name, value in module.state_dict().items():
        if _kind(value) != _kind(tensors[name]):
            raise RunError(
                f"{what} does not fit {class_name(module)}: {name} has the dtype {tensors[name].dtype} there and "
                f"{value.dtype} here; give the model and guide that it was made with"
            )


def _kind(tensor: Tensor) -> str:
    """The kind of a tensor's dtype; floating dtypes that no training uses are kinds of their own."""
    return "float" if tensor.dtype in (torch.float32, torch.float64) else str(tensor.dtype)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no entry" if shape is None else f"shape {shape}"


def set_weights(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load tensors into a module, in the dtype in which they were saved; `check_fits` has checked names and shapes."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)
    module.load_state_dict(tensors)
