"""ELK: classes whose directions overlap with those of an image, the expected likelihood kernel."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor

from calibrant.distributions.directional import log_normalizer
from calibrant.models.parts.classes import ClassModel, ClassVectors
from calibrant.models.parts.embeddings import Embedding, Encoder
from calibrant.models.parts.small_images import ONE, UNCERTAIN
from calibrant.models.registry import register_model
from calibrant.registries import Case


@register_model(
    "elk",
    paper="Kirchhof, Roth, Akata & Kasneci 2022, arXiv 2207.03784; as in URL, arXiv 2307.03810",
    equations="y ~ Categorical(logits = log ∫ vMF(z; μ(x), κ(x)) vMF(z; μ_c, κ_c) dz)",
    licence="Apache-2.0",
    cases=(Case({**UNCERTAIN, "classes": 4}, {"y": ()}, ONE, name="small"),),
)
class ELK(ClassModel):
    """The class of an image, from the overlap of p(z | x) with the von Mises–Fisher distribution of each class.

    The integral is exact, log C(κ) + log C(κ_c) − log C(‖κ μ + κ_c μ_c‖), and normalised over classes, so that the
    program has no latent; its probabilities are a quotient of expectations, E f_y / Σ_c E f_c.

    Args:
        shape: event shape of `x`.
        classes: number of classes.
        latents: m, the dimension of the embedding.
        encoder: network of `Embedding`.
        start: κ, and all κ_c, before training.
        widths: hidden layers of the head of κ.
    """

    loss_kind = "normalised"

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int = 10,
        latents: int = 10,
        encoder: Encoder = "mlp",
        start: float = 16.0,
        widths: tuple[int, ...] = (256, 256),
    ) -> None:
        super().__init__()
        self.embedding = Embedding(shape, latents, encoder, "vmf", start, widths)
        self.of_classes = ClassVectors(classes, latents, start)

    def forward(self, size: int, x: Tensor) -> Tensor:
        with pyro.plate("data", size):
            return pyro.sample("y", dist.Categorical(logits=self.logits(x)))

    def logits(self, x: Tensor) -> Tensor:
        """log C(κ_c) − log C(‖κ μ + κ_c μ_c‖), `(n, classes)`; log C(κ) is the same for all classes."""
        direction, concentration = self.embedding(x)
        directions, concentrations = self.of_classes()
        dimension = directions.shape[-1]
        both = (concentration[:, None, None] * direction[:, None] + concentrations * directions).norm(dim=-1)
        return log_normalizer(dimension, concentrations[:, 0]) - log_normalizer(dimension, both)
