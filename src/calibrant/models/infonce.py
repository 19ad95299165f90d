"""InfoNCE: which candidate shows the same as the reference, from embeddings without uncertainty."""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor, nn
from torch.nn.functional import normalize

from calibrant.models.parts.embeddings import RepresentationModel, by_rows
from calibrant.models.parts.matching import known_form, of_tuple, positive
from calibrant.models.parts.networks import Network
from calibrant.models.parts.small_images import NETWORK, TUPLE
from calibrant.models.registry import register_model
from calibrant.registries import Case


@register_model(
    "infonce",
    paper="van den Oord, Li & Vinyals 2018, arXiv 1807.03748",
    equations="μ = e(x)/‖e(x)‖; published: y = 1 with odds exp(k μᵀμ₀)/Σ_j exp(k μᵀμ_j); categorical: y ~ "
    "Categorical(logits = k μᵀμ_j)",
    licence="Apache-2.0",
    cases=(
        Case({**NETWORK, "concentration": 5.0}, {"y": ()}, TUPLE, name="published"),
        Case({**NETWORK, "concentration": 5.0, "form": "categorical"}, {"y": (5,)}, TUPLE, name="categorical"),
    ),
)
class InfoNCE(RepresentationModel):
    """Which of K candidates matches the reference `x`, without latents.

    Args:
        shape: event shape of `x` and of each of the `candidates` `(size, K, *shape)`.
        latents: m, the dimension of the embedding.
        encoder: network of `Network`: a name, `{"name": …, **arguments}`, or a module `(n, *shape) → (n, features)`.
        form: "published": the first candidate is the positive, and y = 1 for every datum, with the probability that a
            softmax over all candidates gives to it. "categorical": y is the one-hot vector `(K,)` of the positive.
            "url" and "url-with-ones": as in `mcinfonce`, no densities of any y.
        concentration: k, one over the temperature, which is fixed.
    """

    loss_kind = "exact"

    def __init__(
        self,
        shape: tuple[int, ...],
        latents: int = 10,
        encoder: str | dict[str, Any] | nn.Module = "mlp",
        form: str = "published",
        concentration: float = 20.0,
    ) -> None:
        super().__init__()
        self.form, self.k = known_form(form), positive(concentration)
        self.loss_kind = "none" if form.startswith("url") else "exact"
        network = Network(encoder, shape)
        self.embedding = nn.Sequential(network, nn.Linear(network.features, latents))

    def forward(self, size: int, x: Tensor, candidates: Tensor) -> Tensor:
        direction, each = (normalize(self.embedding(images), dim=-1) for images in (x, candidates))
        similarities = self.k * (direction[:, None] * each).sum(-1)
        with pyro.plate("data", size):
            return pyro.sample("y", of_tuple(self.form, similarities, average=False))

    def embed(self, x: Tensor) -> Tensor:
        """Unit vectors `(n, m)` of inputs `(n, *shape)`."""
        return by_rows(self, lambda rows: normalize(self.embedding(rows), dim=-1), x)

    def uncertainty(self, x: Tensor) -> Tensor:
        """1/‖e(x)‖, `(n,)`, of inputs `(n, *shape)`."""
        return by_rows(self, lambda rows: 1 / self.embedding(rows).norm(dim=-1), x)
