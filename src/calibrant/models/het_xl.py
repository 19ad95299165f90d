"""HET-XL: a classifier whose embedding has Gaussian noise that depends on the image."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from calibrant.models.parts.classes import ClassModel, entropy
from calibrant.models.parts.embeddings import by_rows
from calibrant.models.parts.networks import Network
from calibrant.models.parts.small_images import NETWORK, ONE
from calibrant.models.registry import register_model
from calibrant.program.environment import seeded
from calibrant.registries import Case

_LEAST = 1e-4  # variance of the noise in every entry, so that the covariance can be inverted


@register_model(
    "het-xl",
    paper="Collier, Jenatton, Mustafa, Houlsby, Berent & Kokiopoulou 2023, arXiv 2301.12860",
    equations="z ~ N(e(x), V(x) V(x)ᵀ + diag d(x)), y ~ Categorical(logits = (W z + b)/τ)",
    licence="Apache-2.0",
    cases=(Case({**NETWORK, "classes": 4, "rank": 2}, {"y": ()}, ONE, name="small"),),
)
class HetXL(ClassModel):
    """The class of an image, from an embedding with noise of low rank and noise in every entry; τ is learned.

    The published code draws one number for the noise of all entries; here every entry has its own.

    Args:
        shape: event shape of `x`.
        classes: number of classes.
        latents: m, dimension of the embedding.
        encoder: network of `Network`.
        rank: number of columns of V.
        noise: standard deviation of the noise in every entry before training.
        project: whether e(x) is linear in the features of the encoder; otherwise it is the features themselves,
            whatever their number.
    """

    dims = {"z": ["feature"]}

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int = 10,
        latents: int = 10,
        encoder: str | dict[str, Any] | nn.Module = "mlp",
        rank: int = 1,
        noise: float = 0.1,
        project: bool = True,
    ) -> None:
        super().__init__()
        self.network = Network(encoder, shape)
        features = self.network.features
        self.width, self.rank = latents if project else features, rank
        self.location: nn.Module = nn.Linear(features, self.width) if project else nn.Identity()
        self.factor, self.diagonal = nn.Linear(features, self.width * rank), nn.Linear(features, self.width)
        for head in (self.factor, self.diagonal):
            nn.init.normal_(head.weight, std=noise / features**0.5)
            nn.init.zeros_(head.bias)
        nn.init.constant_(self.diagonal.bias, float(torch.tensor(noise**2).expm1().log()))
        self.output = nn.Linear(self.width, classes)
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, size: int, x: Tensor) -> Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", self.noisy(x))
            return pyro.sample("y", dist.Categorical(logits=self.logits_at(z)))

    def noisy(self, x: Tensor) -> dist.LowRankMultivariateNormal:
        """p(z | x) of inputs `(n, *shape)`."""
        features = self.network(x)
        factor = self.factor(features).reshape(-1, self.width, self.rank)
        return dist.LowRankMultivariateNormal(
            self.location(features), factor, softplus(self.diagonal(features)) + _LEAST
        )

    def logits_at(self, z: Tensor) -> Tensor:
        """Log probabilities of the classes up to a constant, `(…, classes)`, at embeddings `(…, m)`."""
        return self.output(z) * (-self.log_temperature).exp()

    def class_probabilities(self, x: Tensor, draws: int = 256, seed: int = 0) -> Tensor:
        """p(y | x), `(n, classes)`, the mean over draws of z, of inputs `(n, *shape)`.

        Args:
            x: inputs.
            draws: number of draws of z per input.
            seed: random seed for the draws.
        """
        with seeded(seed):
            return by_rows(self, lambda rows: self.logits_at(self.noisy(rows).sample((draws,))).softmax(-1).mean(0), x)

    def embed(self, x: Tensor) -> Tensor:
        """e(x), `(n, m)`, of any length, of inputs `(n, *shape)`."""
        return by_rows(self, lambda rows: self.location(self.network(rows)), x)

    def uncertainty(self, x: Tensor) -> Tensor:
        """The entropy of the class in nats, `(n,)`, of inputs `(n, *shape)`."""
        return entropy(self.class_probabilities(x))
