"""Networks from an input to features, which the heads of representation models read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from calibrant.errors import DataError, ProgramError
from calibrant.guides.encoders.images import ConvEncoder

Spec = str | Mapping[str, Any] | nn.Module


class MLP(nn.Sequential):
    """Linear layers with LeakyReLU behind each, of an input that is flattened.

    Args:
        shape: event shape of the input.
        hidden: number of units of a layer.
        layers: number of layers.
    """

    def __init__(self, shape: tuple[int, ...], hidden: int = 256, layers: int = 2) -> None:
        super().__init__(nn.Flatten(), *layers_of([prod(shape), *[hidden] * layers]))


class Deep(nn.Sequential):
    """The hidden layers of both networks in MCInfoNCE's controlled experiment (Kirchhof et al. 2023, arXiv 2302.02865,
    from its code): seven layers of 10d, five times 50d, and 10d units, each with LeakyReLU behind it.

    Args:
        shape: event shape of the input.
        width: d, the number of outputs of the head that reads the features: the number of latents for the direction,
            1 for the concentration.
    """

    def __init__(self, shape: tuple[int, ...], width: int = 1) -> None:
        super().__init__(nn.Flatten(), *layers_of([prod(shape), 10 * width, *[50 * width] * 5, 10 * width]))


class Conv(nn.Module):
    """The residual convolutions that `amortize` uses for images of any size.

    Args:
        shape: (channels, height, width).
        channels: number of maps of the first layer, a multiple of 8.
        hidden: half of the number of features.
    """

    def __init__(self, shape: tuple[int, ...], channels: int = 32, hidden: int = 256) -> None:
        super().__init__()
        self.network = ConvEncoder({"x": shape}, channels, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.network({"x": x})


def layers_of(widths: Sequence[int]) -> list[nn.Module]:
    """Linear layers with LeakyReLU behind each, from the first of these widths to the last one."""
    return [layer for before, after in pairwise(widths) for layer in (nn.Linear(before, after), nn.LeakyReLU())]


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda shape: nn.Flatten(),
    "mlp": MLP,
    "deep": Deep,
    "conv": Conv,
}


class Network(nn.Module):
    """A network from inputs `(…, *shape)` to features `(…, features)`, with any dimensions in front.

    Integer images, from 0 to 255, are divided by 255. A module whose weights are all frozen (`requires_grad=False`)
    stays in `eval()` while the rest is trained, so that its batch norms keep their statistics.

    Args:
        spec: "linear" (the flattened input itself), "mlp" (`hidden`, `layers`), "conv" (`channels`, `hidden`), "deep"
            (`width`), or `{"name": one of these, **arguments}`; or a module `(n, *shape) → (n, features)`.
        shape: event shape of the input.

    Raises:
        ProgramError: for an unknown name or argument, or a module that does not take such inputs.
    """

    per_datum = True

    def __init__(self, spec: Spec, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.module = spec if isinstance(spec, nn.Module) else _by_name(spec, self.shape)
        self.features = _width(self.module, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        leading = x.shape[: x.dim() - len(self.shape)]
        if not x.is_floating_point():
            x = x.to(torch.get_default_dtype()) / 255
        return self.module(x.reshape(-1, *self.shape)).reshape(*leading, self.features)

    def train(self, mode: bool = True) -> Network:
        """Set the training mode; a module without weights to train stays in `eval()`."""
        return super().train(mode and any(weight.requires_grad for weight in self.parameters()))


def checked_inputs(x: object, shape: tuple[int, ...] | None, taker: str) -> Tensor:
    """Inputs `(n, *shape)` as a tensor, of a tensor, an array or nested lists.

    Args:
        x: what a user gives.
        shape: event shape that is wanted; None for any.
        taker: what takes them, for the message.

    Raises:
        DataError: for anything else, another shape, or values that are not finite.
    """
    wanted = "(n, …)" if shape is None else f"(n, {', '.join(map(str, shape))})"
    try:
        rows = torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"x is a {type(x).__name__}: {taker} takes a tensor or an array {wanted}, such as data.values('x')"
        ) from error
    if rows.is_complex():
        raise DataError(f"x has dtype {rows.dtype}: {taker} takes real numbers")
    if not rows.ndim or not len(rows) or (shape is not None and rows.shape[1:] != shape):
        raise DataError(f"x has shape {tuple(rows.shape)}: {taker} takes {wanted}")
    if not rows.isfinite().all():
        raise DataError("x has values that are not finite: remove these inputs")
    return rows


def _by_name(spec: str | Mapping[str, Any], shape: tuple[int, ...]) -> nn.Module:
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    if name not in NETWORKS:
        raise ProgramError(f"unknown encoder {name!r}; known: {sorted(NETWORKS)}, or a module of your own")
    known = [key for key in inspect.signature(NETWORKS[name]).parameters if key != "shape"]
    if unknown := [key for key in arguments if key not in known]:
        raise ProgramError(f"encoder {name!r} has no argument {unknown[0]!r}; its arguments are: {known}")
    if wrong := [key for key, value in arguments.items() if type(value) is not int or value < 1]:
        raise ProgramError(f"encoder {name!r}: {wrong[0]}={arguments[wrong[0]]!r}; give a whole number above 0")
    return NETWORKS[name](shape, **arguments)


def _width(module: nn.Module, shape: tuple[int, ...]) -> int:
    """The number of features that a module returns."""
    modes = {part: part.training for part in module.modules()}
    weight = next(module.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            found = module.eval()(torch.zeros(2, *shape, dtype=weight.dtype, device=weight.device))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ProgramError(
            f"encoder: {type(module).__name__} takes no inputs (n, {str(list(shape))[1:-1]}): {error}"
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != 2:
        shape_found = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ProgramError(
            f"encoder: {type(module).__name__} returns {shape_found} for 2 inputs: it has to return (2, features); add "
            "an nn.Flatten() behind it"
        )
    return found.shape[1]
