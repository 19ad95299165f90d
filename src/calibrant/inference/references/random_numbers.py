"""Random numbers that are functions of a key and a counter, so that they do not depend on other draws.

The generator is SplitMix64's output function (Steele, Lea & Flood 2014, OOPSLA) applied to key and counter in turn.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def mix(bits: Tensor) -> Tensor:
    """Scramble 64-bit integers, one to one."""
    bits = (bits ^ _shift(bits, 30)) * _FACTORS[0]
    bits = (bits ^ _shift(bits, 27)) * _FACTORS[1]
    return bits ^ _shift(bits, 31)


def _shift(bits: Tensor, places: int) -> Tensor:
    """A logical shift to the right."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def fold(key: Tensor, data: Tensor | int) -> Tensor:
    """A new key for every pair of key and data."""
    return mix(mix(key) + (torch.as_tensor(data, device=key.device) + 1) * _GOLDEN)


def label_key(label: Hashable) -> int:
    """A 63-bit integer for a label; integers are returned unchanged."""
    if isinstance(label, int):
        return label
    return int.from_bytes(hashlib.sha256(str(label).encode()).digest()[:8], "big") >> 1


def stream(key: Tensor, counter: Tensor) -> Tensor:
    """The 64 bits at position `counter` of the SplitMix64 stream that starts at the key."""
    return mix(key + counter * _GOLDEN)


def to_uniform(bits: Tensor) -> Tensor:
    """Numbers in the open interval (0, 1) from the upper 53 bits, float64."""
    return ((_shift(bits, 11).double() + 0.5) * 2.0**-53).clamp_max(1 - 2.0**-53)  # the largest number would round to 1


def uniform(key: Tensor, counter: Tensor | int) -> Tensor:
    """Uniform numbers in the open interval (0, 1), float64, with the shape of the keys."""
    return to_uniform(fold(key, counter))


def standard_normal(bits: Tensor) -> Tensor:
    """Standard normal numbers from 64 random bits each, float64."""
    return math.sqrt(2.0) * torch.erfinv(2.0 * to_uniform(bits) - 1.0)


def normal(key: Tensor, count: int) -> Tensor:
    """Standard normal numbers `(*key.shape, count)`, float64."""
    return standard_normal(fold(key[..., None], torch.arange(count, device=key.device)))
