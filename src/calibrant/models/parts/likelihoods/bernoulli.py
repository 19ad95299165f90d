"""Binary observations."""

from __future__ import annotations

import pyro.distributions as dist
import torch
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

    def marginals(self, output: Tensor) -> dist.TorchDistribution:
        return BernoulliEntries(logits=output)


class BernoulliEntries(dist.Bernoulli):
    """A Bernoulli distribution with its distribution function and quantiles."""

    def cdf(self, value: Tensor) -> Tensor:
        steps = torch.where(value < 1, 1 - self.probs, torch.ones_like(self.probs))
        return torch.where(value < 0, torch.zeros_like(steps), steps)

    def icdf(self, value: Tensor) -> Tensor:
        return (value > 1 - self.probs).to(self.probs.dtype)
