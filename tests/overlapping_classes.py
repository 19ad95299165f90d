"""Features of images whose class is known up to a known entropy: Gaussian classes with one spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import calibrant as cal


@dataclass
class Overlapping:
    """Gaussian classes around centres in ℝᵈ.

    Attributes:
        data: features `x` `(n, d)` and labels `y`, which are not counted from 0.
        x: features.
        y: classes, from 0.
        probabilities: p(y | x), `(n, classes)`, exactly.
    """

    data: cal.data.Data
    x: Tensor
    y: Tensor
    probabilities: Tensor

    @property
    def entropy(self) -> Tensor:
        """H(y | x) in nats, `(n,)`."""
        return torch.special.entr(self.probabilities).sum(-1)

    def expected_loss(self, predicted: Tensor) -> Tensor:
        """Cross-entropy in nats that predictions `(n, classes)` have on average over y, `(n,)`."""
        return -(self.probabilities * predicted.log()).sum(-1)


def overlapping(n: int, seed: int = 0, classes: int = 4, dimension: int = 6, distance: float = 0.8) -> Overlapping:
    """Draw features of classes that overlap: centres are drawn with this spread, features lie around them with sd 1."""
    centres = distance * torch.randn(classes, dimension, generator=torch.Generator().manual_seed(7))
    draws = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (n,), generator=draws)
    x = centres[y] + torch.randn(n, dimension, generator=draws)
    logits = -torch.cdist(x.double(), centres.double()).pow(2) / 2
    data = cal.data.Data({"y": 10 * y + 3}, {"x": x * math.pi + 100})
    return Overlapping(data, x * math.pi + 100, y, logits.softmax(-1).float())
