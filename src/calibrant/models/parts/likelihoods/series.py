"""Power series, for functions whose closed forms lose their digits in a limit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def polynomial(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """The polynomial with these coefficients, that of x⁰ first."""
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total
