"""MCInfoNCE: which candidate shows the same as the reference, from embeddings that the images leave uncertain."""

from __future__ import annotations

import pyro
from torch import Tensor

from calibrant.models.parts.embeddings import Embedding, Encoder, RepresentationModel
from calibrant.models.parts.matching import known_form, of_tuple, positive
from calibrant.models.parts.small_images import TUPLE, UNCERTAIN
from calibrant.models.registry import register_model
from calibrant.registries import Case


@register_model(
    "mcinfonce",
    paper="Kirchhof, Kasneci & Oh 2023, arXiv 2302.02865; forms of URL: arXiv 2307.03810",
    equations="z ~ vMF(μ(x), κ(x)), z_j ~ vMF(μ(x_j), κ(x_j)); "
    "published: y = 1 with odds exp(k zᵀz₀)/mean_j exp(k zᵀz_j); "
    "categorical: y ~ Categorical(logits = k zᵀz_j)",
    licence="Apache-2.0",
    cases=(
        Case({**UNCERTAIN, "concentration": 5.0}, {"y": ()}, TUPLE, name="published"),
        Case({**UNCERTAIN, "concentration": 5.0, "form": "categorical"}, {"y": (5,)}, TUPLE, name="categorical"),
    ),
)
class MCInfoNCE(RepresentationModel):
    """Which of K candidates matches the reference `x`.

    Args:
        shape: event shape of `x` and of each of the `candidates` `(size, K, *shape)`.
        latents: m, the dimension of the embedding.
        encoder: network of `Embedding`.
        posterior: "vmf" or "normal".
        form: "published": the first candidate is the positive, and y = 1 for every datum; the mean over the others
            stands for the expectation C(0)/C(k) over uniform directions. "categorical": the positive may be at any
            place, y is its one-hot vector `(K,)`, and data can be simulated. "url": the loss of URL, with the first
            candidate left out of the denominator, which is no density of any y; "url-with-ones" adds 1 to numerator
            and denominator, as its code does.
        concentration: k, which is fixed.
        start: κ before training.
        widths: hidden layers of the head of κ.
    """

    dims = {"z": ["feature"], "z_candidates": ["candidate", "feature"]}

    def __init__(
        self,
        shape: tuple[int, ...],
        latents: int = 10,
        encoder: Encoder = "mlp",
        posterior: str = "vmf",
        form: str = "published",
        concentration: float = 20.0,
        start: float = 16.0,
        widths: tuple[int, ...] = (256, 256),
    ) -> None:
        super().__init__()
        self.form, self.k = known_form(form), positive(concentration)
        self.loss_kind = "none" if form.startswith("url") else "marginal"
        self.embedding = Embedding(shape, latents, encoder, posterior, start, widths)

    def forward(self, size: int, x: Tensor, candidates: Tensor) -> Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", self.embedding.distribution(x))
            each = pyro.sample("z_candidates", self.embedding.distribution(candidates).to_event(1))
            similarities = self.k * (z[:, None] * each).sum(-1)
            return pyro.sample("y", of_tuple(self.form, similarities, average=True))
