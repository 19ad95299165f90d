"""Binary observations."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints

from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.registries import Case


@register_likelihood(
    "bernoulli",
    density_of="0 and 1 (their probabilities)",
    equations="x ~ Bernoulli(sigmoid(logits))",
    cases=(Case({}, {"x": (1,)}), Case({}, {"x": (1, 4, 4)}, name="image")),
)
class Bernoulli(Likelihood):
    """Independent binary entries, with the decoder's output as their logits. Grey values are outside its support."""

    support = constraints.boolean

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"logits": shape}

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=output).to_event(output.dim() - 1)
