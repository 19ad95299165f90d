"""Pairs of images that match or do not: the generative model of MCInfoNCE."""

from __future__ import annotations

from torch import Tensor

from calibrant.distributions.matching import match_constant
from calibrant.models.parts.embeddings import Embedding, Encoder
from calibrant.models.parts.matching import positive
from calibrant.models.parts.small_images import TWO, UNCERTAIN
from calibrant.models.parts.two_images import PairModel
from calibrant.models.registry import register_model
from calibrant.registries import Case


@register_model(
    "pair",
    paper="Kirchhof, Kasneci & Oh 2023, arXiv 2302.02865 (MCInfoNCE), section 3",
    equations="z ~ vMF(μ(x), κ(x)), z′ ~ vMF(μ(x′), κ(x′)), y ~ Bernoulli(logits = k zᵀz′ + log C(k) − log C(0))",
    licence="Apache-2.0",
    cases=(
        Case({**UNCERTAIN, "concentration": 5.0}, {"y": ()}, TWO, name="vmf"),
        Case({**UNCERTAIN, "concentration": 5.0, "draws": 3}, {"y": ()}, TWO, name="several-draws"),
        Case({**UNCERTAIN, "posterior": "normal", "concentration": 2.0}, {"y": ()}, TWO, name="normal"),
    ),
)
class Pair(PairModel):
    """Whether two images match (y = 1), from embeddings that the images leave uncertain.

    p(y = 1 | z, z′) is the probability that z′ comes from vMF(z, k), where it comes from it or from the uniform
    distribution with equal odds. With `posterior="normal"`, z and z′ have any length, and y is a logistic regression on
    zᵀz′ with the same two constants: the length of z is then evidence too, and this reading is lost.

    Args:
        shape: event shape of `x` and `other`.
        latents: m, the dimension of the embedding.
        encoder: network of `Embedding`: a name, `{"name": …, **arguments}`, a module `(n, *shape) → (n, features)`, or
            `{"direction": network, "concentration": network}`.
        posterior: "vmf" or "normal".
        concentration: k, which is fixed.
        start: κ before training.
        widths: hidden layers of the head of κ.
        draws: number of embeddings per image, all of which are paired with all; 1 for the posterior of one embedding.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        latents: int = 10,
        encoder: Encoder = "mlp",
        posterior: str = "vmf",
        concentration: float = 20.0,
        start: float = 16.0,
        widths: tuple[int, ...] = (256, 256),
        draws: int = 1,
    ) -> None:
        super().__init__(Embedding(shape, latents, encoder, posterior, start, widths), draws)
        self.latents, self.k = latents, positive(concentration)

    def log_odds(self, product: Tensor) -> Tensor:
        """The log odds of a match, for products zᵀz′ of any shape."""
        return self.k * product + match_constant(self.latents, self.k)
