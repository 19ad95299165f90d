"""The density of a Normal whose scale is shared by many entries, as the noise of most decoders is.

`torch.distributions.Normal` first expands its scale to the shape of its location, and then takes the square and the
logarithm of each copy: for a batch of images with one noise scale, four fifths of the time of the density. Here both
are taken once. The numbers are the same, bit for bit; gradients are the same up to rounding.
"""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.distributions.utils import _sum_rightmost

_LOG_ROOT = math.log(math.sqrt(2 * math.pi))
_NORMALS = (dist.Normal, torch.distributions.Normal)  # no subclasses, which may have another density


def log_prob(fn: Any, value: Tensor) -> Tensor:
    """`fn.log_prob(value)`, faster if `fn` is a Normal (`to_event` included) whose entries share a scale.

    Raises:
        ValueError: as `fn.log_prob` does, for a value outside the support.
    """
    is_event = isinstance(fn, torch.distributions.Independent)
    inner = fn.base_dist if is_event else fn
    scale = _shared(inner.scale) if type(inner) in _NORMALS else None
    if scale is None:
        found: Tensor = fn.log_prob(value)
        return found
    if inner._validate_args:
        inner._validate_sample(value)
    entries = -((value - inner.loc) ** 2) / (2 * scale**2) - scale.log() - _LOG_ROOT
    return _sum_rightmost(entries, fn.reinterpreted_batch_ndims) if is_event else entries


def _shared(scale: Tensor) -> Tensor | None:
    """One entry of the scale along every dimension along which it was expanded; None if it was along none."""
    if is_functorch_wrapped_tensor(scale):  # inside vmap, which hides how it lies in memory
        return None
    expanded = [stride == 0 and size > 1 for stride, size in zip(scale.stride(), scale.shape, strict=True)]
    return scale[tuple(slice(1) if one else slice(None) for one in expanded)] if any(expanded) else None
