"""Gradient conflict: whether two losses pull the weights that they share in opposite directions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from calibrant.errors import InferenceError
from calibrant.evaluation.representations.crossed import Variables, crossed_difference, crossed_share
from calibrant.streams import stream

Loss = Callable[[Any], Tensor]


def gradient_conflict(
    module: nn.Module,
    losses: Mapping[str, Loss],
    batches: Iterable[Any],
    shared: nn.Module | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Cosines between the gradients of two losses in the weights of a module, batch by batch.

    A negative cosine means that a small step along one loss's gradient raises the other loss. Behind a stopped gradient
    (`features.detach()`) the second loss does not reach the first one's weights; the cosine is then 0. The module, its
    buffers and its gradients are as before afterwards.

    Args:
        module: the module whose weights are looked at; its mode is kept.
        losses: name → function of a batch that gives a loss, a tensor of shape `()`; two of them, which both run the
            module. Their mean over the batch is usual.
        batches: what the losses take, one batch after the other.
        shared: part of the module whose weights count, such as the backbone; None for all weights of the module.
        seed: random seed for what the losses draw, the same for both losses of a batch.

    Returns:
        Over `batch`: `cosine` of the two gradients in the weights that count, 0 where one of them is zero. Over
        (loss, batch): `norm` of each gradient in these weights. Numbers: `cosine_mean`, and `share_negative`, the share
        of batches with a cosine below 0, with `…_se` and the ends of a 95% interval over batches, `…_low` and
        `…_high`; `share_reached`, the share of weights that count which both losses reach in some batch (0 behind a
        stopped gradient).

    Raises:
        InferenceError: for other than two losses, losses that are no finite numbers or depend on no weight, no weights
            that are trained, or no batch.
    """
    if len(losses) != 2:
        raise InferenceError(f"losses: {len(losses)} of them; give two, as name → function of a batch")
    own = {id(weight) for weight in module.parameters()}
    weights = [weight for weight in (module if shared is None else shared).parameters() if weight.requires_grad]
    if not weights or not all(id(weight) in own for weight in weights):
        raise InferenceError("shared: give a part of the module that has weights that are trained")
    found = []
    with _unchanged(module):
        for number, batch in enumerate(batches):
            pair = []
            for name, loss in losses.items():
                torch.manual_seed(stream(seed, "gradient_conflict", number))
                pair.append(_gradient(name, loss(batch), weights))
            found.append(_Batch.of(*pair))
    if not found:
        raise InferenceError("batches: none are given; give one batch or more")
    return _summary(list(losses), found, [weight.numel() for weight in weights])


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Buffers and torch's random state are as before afterwards; losses may update running means."""
    buffers = {name: copy.deepcopy(buffer) for name, buffer in module.named_buffers()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    buffer.copy_(buffers[name])


def _gradient(name: str, loss: Tensor, weights: list[nn.Parameter]) -> list[Tensor]:
    """Gradients of a loss in the weights, zero for those that it does not reach."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.isfinite().all():
        raise InferenceError(f"loss {name!r} is no finite number for some batch: return one number for each batch")
    if not loss.requires_grad:
        raise InferenceError(f"loss {name!r} depends on no weight that is trained; run the module inside it")
    found = torch.autograd.grad(loss.reshape(()), weights, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


class _Batch(NamedTuple):
    """What two gradients of a batch are: their cosine and norms, and which weights both reach."""

    cosine: float
    norms: tuple[float, float]
    reached: list[bool]

    @classmethod
    def of(cls, first: list[Tensor], second: list[Tensor]) -> _Batch:
        one, other = (torch.cat([part.double().flatten() for part in side]) for side in (first, second))
        norms = float(one.norm()), float(other.norm())
        cosine = float(one @ other) / (norms[0] * norms[1]) if min(norms) > 0 else 0.0
        reached = [bool(a.any()) and bool(b.any()) for a, b in zip(first, second, strict=True)]
        return cls(min(max(cosine, -1.0), 1.0), norms, reached)


def _summary(names: list[str], batches: list[_Batch], sizes: list[int]) -> xr.Dataset:
    cosines = np.array([batch.cosine for batch in batches])
    variables: Variables = crossed_difference(cosines[None]).variables("cosine_mean")
    variables |= crossed_share((cosines[None] < 0).astype(np.float64)).variables("share_negative")
    reached = np.array([batch.reached for batch in batches]).any(0)
    variables["share_reached"] = ((), float(reached @ np.array(sizes)) / sum(sizes))
    variables["cosine"] = (("batch",), cosines)
    variables["norm"] = (("loss", "batch"), np.array([batch.norms for batch in batches]).T)
    return xr.Dataset(variables, coords={"loss": names})
