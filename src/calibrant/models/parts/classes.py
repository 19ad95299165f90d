"""Classes of images: directions with concentrations for each class, and probabilities of classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from calibrant.models.parts.embeddings import RepresentationModel, by_rows


class ClassVectors(nn.Module):
    """A direction with a concentration for each class, all trained.

    Args:
        classes: number of classes.
        latents: m, dimension of the directions.
        start: concentrations before training.
        least: lowest concentration, which is never reached.
        per_entry: whether every entry of a class has its own concentration.
    """

    def __init__(self, classes: int, latents: int, start: float, least: float = 0.0, per_entry: bool = False) -> None:
        super().__init__()
        self.least = least
        self.directions = nn.Parameter(torch.randn(classes, latents))
        shape = (classes, latents) if per_entry else (classes, 1)
        self.log_concentration = nn.Parameter(torch.full(shape, max(start - least, 1e-6)).log())

    def forward(self) -> tuple[Tensor, Tensor]:
        """Unit vectors `(classes, m)`, and concentrations `(classes, m)` or `(classes, 1)`."""
        return normalize(self.directions, dim=-1), self.least + self.log_concentration.exp()


class ClassModel(RepresentationModel):
    """A program that gives classes probabilities."""

    def logits(self, x: Tensor) -> Tensor:
        """Log probabilities of the classes up to a constant, `(n, classes)`, of inputs `(n, *shape)`."""
        raise NotImplementedError

    def class_probabilities(self, x: Tensor) -> Tensor:
        """p(y | x), `(n, classes)`, of inputs `(n, *shape)`."""
        return by_rows(self, lambda rows: self.logits(rows).softmax(-1), x)


def entropy(probabilities: Tensor) -> Tensor:
    """The entropy of classes, in nats, `(…)` from probabilities `(…, classes)`."""
    return torch.special.entr(probabilities).sum(-1)
