"""Hedged instance embeddings: pairs whose match is a learned logistic function of the embeddings' product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibrant.distributions.matching import match_constant
from calibrant.models.parts.embeddings import Embedding, Encoder
from calibrant.models.parts.small_images import TWO, UNCERTAIN
from calibrant.models.parts.two_images import PairModel
from calibrant.models.registry import register_model
from calibrant.registries import Case


@register_model(
    "hib",
    paper="Oh, Murphy, Pan, Roth, Schroff & Gallagher 2019, arXiv 1810.00319, as in URL, arXiv 2307.03810",
    equations="z ~ vMF(μ(x), κ(x)), z′ ~ vMF(μ(x′), κ(x′)), y ~ Bernoulli(logits = a zᵀz′ + b), a and b learned",
    licence="Apache-2.0",
    cases=(
        Case({**UNCERTAIN, "slope": 5.0}, {"y": ()}, TWO, name="vmf"),
        Case({**UNCERTAIN, "slope": 2.0, "offset": -1.0, "posterior": "normal"}, {"y": ()}, TWO, name="normal"),
    ),
)
class HIB(PairModel):
    """Whether two images match (y = 1), from embeddings that the images leave uncertain; as `pair`, with a learned
    logistic function of zᵀz′.

    The loss averages probabilities over draws, as the paper's and URL's do: `objective="iwae"` with the guide of
    `guides.prior`. With `objective="stl"`, it averages log probabilities, as the code of MCInfoNCE does for HIB.

    Args:
        shape: event shape of `x` and `other`.
        latents: m, the dimension of the embedding.
        encoder: network of `Embedding`.
        posterior: "vmf" or "normal".
        slope: a before training.
        offset: b before training; None for log C(a) − log C(0), with which this is `pair` at k = a.
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
        slope: float = 20.0,
        offset: float | None = None,
        start: float = 16.0,
        widths: tuple[int, ...] = (256, 256),
        draws: int = 1,
    ) -> None:
        super().__init__(Embedding(shape, latents, encoder, posterior, start, widths), draws)
        a = torch.tensor(float(slope))
        self.slope = nn.Parameter(a)
        b = match_constant(latents, abs(float(slope))) if offset is None else float(offset)
        self.offset = nn.Parameter(torch.tensor(b))

    def log_odds(self, product: Tensor) -> Tensor:
        """The log odds of a match, for products zᵀz′ of any shape."""
        return self.slope * product + self.offset
