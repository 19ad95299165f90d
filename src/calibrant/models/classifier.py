"""A classifier, whose class probabilities are the uncertainty."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from calibrant.models.parts.classes import ClassModel, entropy
from calibrant.models.parts.embeddings import by_rows
from calibrant.models.parts.networks import Network
from calibrant.models.parts.small_images import NETWORK, ONE
from calibrant.models.registry import register_model
from calibrant.registries import Case


@register_model(
    "classifier",
    paper="the baseline (CE) of URL: Kirchhof, Mucsányi, Oh & Kasneci 2023, arXiv 2307.03810",
    equations="y ~ Categorical(logits = W e(x) + b)",
    licence="Apache-2.0",
    cases=(
        Case({**NETWORK, "classes": 4}, {"y": ()}, ONE, name="small"),
        Case({**NETWORK, "project": False, "classes": 4}, {"y": ()}, ONE, name="features"),
    ),
)
class Classifier(ClassModel):
    """The class of an image, without latents: softmax regression on an embedding.

    Args:
        shape: event shape of `x`.
        classes: number of classes.
        latents: dimension of the embedding e(x).
        encoder: network of `Network`.
        project: whether e(x) is linear in the features of the encoder; otherwise it is the features themselves,
            whatever their number.
    """

    loss_kind = "exact"

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int = 10,
        latents: int = 10,
        encoder: str | dict[str, Any] | nn.Module = "mlp",
        project: bool = True,
    ) -> None:
        super().__init__()
        network = Network(encoder, shape)
        width = latents if project else network.features
        self.embedding = nn.Sequential(network, nn.Linear(network.features, width)) if project else network
        self.output = nn.Linear(width, classes)

    def forward(self, size: int, x: Tensor) -> Tensor:
        with pyro.plate("data", size):
            return pyro.sample("y", dist.Categorical(logits=self.logits(x)))

    def logits(self, x: Tensor) -> Tensor:
        """Log probabilities of the classes up to a constant, `(n, classes)`."""
        return self.output(self.embedding(x))

    def embed(self, x: Tensor) -> Tensor:
        """e(x), `(n, m)`, of any length, of inputs `(n, *shape)`."""
        return by_rows(self, self.embedding, x)

    def uncertainty(self, x: Tensor) -> Tensor:
        """The entropy of the class in nats, `(n,)`, of inputs `(n, *shape)`."""
        return entropy(self.class_probabilities(x))
