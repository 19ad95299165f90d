"""Monte Carlo dropout: class probabilities that are averaged over masks of the embedding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from calibrant.errors import ProgramError
from calibrant.models.parts.classes import entropy
from calibrant.representations.learners.class_heads import ClassLearner, mutual_information
from calibrant.representations.learners.registry import register_method
from calibrant.representations.learners.trunks import Inputs

SCORES = ("jsd", "entropy")


@register_method(
    "mc-dropout",
    paper="Gal & Ghahramani 2016, arXiv 1506.02142; as in Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="a classifier with dropout of the embedding, also when it predicts",
    unit="Jensen–Shannon divergence of the passes, or entropy of their mean, in nats",
)
class MCDropout(ClassLearner):
    """A classifier with dropout of the embedding, whose probabilities are averaged over a few masks.

    The masks are drawn once, with the initial weights, and are the same for all images. So a prediction does not depend
    on the batch, and two images are compared under the same masks.

    Args:
        inputs: what the network is built for.
        rate: probability that an entry of the embedding is dropped.
        passes: number of masks that are averaged over.
        score: "jsd" for H(mean) − mean H, "entropy" for the entropy of the mean.
    """

    masks: Tensor

    def __init__(self, inputs: Inputs, rate: float = 0.1, passes: int = 10, score: str = "jsd") -> None:
        super().__init__(inputs)
        if not 0 <= rate < 1:
            raise ProgramError(f"rate={rate}: give a probability from 0, below 1")
        if score not in SCORES:
            raise ProgramError(f"score={score!r}: give one of {', '.join(map(repr, SCORES))}")
        self.rate, self.score = rate, score
        kept = torch.full((passes, self.trunk.features), 1 - rate)
        self.register_buffer("masks", torch.bernoulli(kept) / (1 - rate))

    def logits(self, x: Tensor) -> Tensor:
        return self.head(functional.dropout(self.trunk(x), self.rate, self.training))

    def of_passes(self, x: Tensor) -> Tensor:
        """Class probabilities of every pass, `(n, passes, classes)`."""
        return self.head(self.trunk(x)[:, None] * self.masks).softmax(-1)

    def class_probabilities(self, x: Tensor) -> Tensor:
        return self.of_passes(x).mean(1)

    def uncertainty(self, x: Tensor) -> Tensor:
        """Jensen–Shannon divergence of the passes, or entropy of their mean, in nats: `(n,)`."""
        return mutual_information(self.of_passes(x)) if self.score == "jsd" else entropy(self.class_probabilities(x))
