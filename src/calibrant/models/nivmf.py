"""nivMF: classes with non-isotropic von Mises–Fisher densities, averaged over draws of an image's embedding."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor

from calibrant.distributions.directional import log_normalizer
from calibrant.errors import ProgramError
from calibrant.models.parts.classes import ClassModel, ClassVectors
from calibrant.models.parts.embeddings import Embedding, Encoder, by_rows
from calibrant.models.parts.small_images import ONE, UNCERTAIN
from calibrant.models.registry import register_model
from calibrant.program.environment import seeded
from calibrant.registries import Case

LEAST = 0.1  # of a class's concentrations, as in the published code


@register_model(
    "nivmf",
    paper="Kirchhof, Roth, Akata & Kasneci 2022, arXiv 2207.03784; as in URL, arXiv 2307.03810",
    equations="z_i ~ vMF(μ(x), κ(x)), i = 1 … M; "
    "y ~ Categorical(logits = log mean_i f_c(z_i)), log f_c(z) = log C(‖K_c μ_c‖) + "
    "zᵀ K_c μ_c + Σ log K_c − 2 log ‖K_c μ_c‖",
    licence="Apache-2.0",
    cases=(Case({**UNCERTAIN, "classes": 4, "draws": 3}, {"y": ()}, ONE, name="small"),),
)
class NivMF(ClassModel):
    """The class of an image, from the densities of M draws of its embedding under each class.

    The M draws are one site `z` `(size, M, m)`: p(y | z) is normalised after the average over draws. The published loss
    is E log p(y | M draws): `objective="stl"` with the guide of `guides.prior`; as M grows, it tends to a quotient of
    expectations. Every class has a concentration per dimension, at least 0.1, and all parameters are trained (in URL's
    code they are not). The factor −2 log ‖K_c μ_c‖ is that of URL; the code of nivMF itself has −1.

    Args:
        shape: event shape of `x`.
        classes: number of classes.
        latents: m, the dimension of the embedding.
        encoder: network of `Embedding`.
        draws: M.
        start: κ, and all entries of K_c, before training.
        widths: hidden layers of the head of κ.
    """

    dims = {"z": ["sample", "feature"]}
    loss_kind = "normalised"

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int = 10,
        latents: int = 10,
        encoder: Encoder = "mlp",
        draws: int = 16,
        start: float = 16.0,
        widths: tuple[int, ...] = (256, 256),
    ) -> None:
        super().__init__()
        if start <= LEAST:
            raise ProgramError(f"start={start!r}: concentrations of classes start above {LEAST}")
        self.draws = draws
        self.embedding = Embedding(shape, latents, encoder, "vmf", start, widths)
        self.of_classes = ClassVectors(classes, latents, start, LEAST, per_entry=True)

    def forward(self, size: int, x: Tensor) -> Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", self.embedding.distribution(x, self.draws))
            return pyro.sample("y", dist.Categorical(logits=self.log_densities(z).logsumexp(1)))

    def log_densities(self, z: Tensor) -> Tensor:
        """log f_c(z), `(…, classes)`, of directions `(…, m)`."""
        directions, concentrations = self.of_classes()
        vectors = concentrations * directions
        length = vectors.norm(dim=-1)
        constant = log_normalizer(vectors.shape[-1], length) + concentrations.log().sum(-1) - 2 * length.log()
        return z @ vectors.mT + constant

    def class_probabilities(self, x: Tensor, draws: int = 256, seed: int = 0) -> Tensor:
        """p(y | many draws of z), `(n, classes)`, of inputs `(n, *shape)`.

        Args:
            x: inputs.
            draws: number of draws of z per input.
            seed: random seed for the draws.
        """
        with seeded(seed):
            return by_rows(self, lambda rows: self._logits_of(rows, draws).softmax(-1), x)

    def _logits_of(self, x: Tensor, draws: int) -> Tensor:
        return self.log_densities(self.embedding.distribution(x, draws).sample()).logsumexp(1)
