"""Cross-entropy of grey values: a training loss."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints

from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.registries import Case


@register_likelihood(
    "cross-entropy",
    density_of="no density: a training loss for grey values from 0 to 1",
    equations="x·ln p + (1 − x)·ln(1 − p), p = sigmoid(logits)",
    paper="Loaiza-Ganem & Cunningham 2019, arXiv 1907.06845, on what it lacks",
    cases=(Case({}, {"x": (1,)}), Case({}, {"x": (1, 4, 4)}, name="image")),
)
class CrossEntropy(Likelihood):
    """The log probability of a Bernoulli with grey values from 0 to 1 in the place of 0 and 1: a training loss.

    It is the mean Bernoulli log probability over random binarisations of the image, in which an entry is 1 with the
    probability of its grey value. So the value of a training bounds the mean log probability of binarised images, and
    the Bernoulli model with the same weights has posterior and evidence for these (docs/presets.md).

    Its exponential does not integrate to one over the grey values, by a factor that depends on the logits. A model can
    be trained with it, but has no draws of data, no posterior and no evidence. With densities: "continuous-bernoulli",
    which adds the missing factor, or "bernoulli" on binary data.
    """

    support = constraints.unit_interval
    is_density = False

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"logits": shape}

    def marginals(self, output: Tensor) -> dist.TorchDistribution:
        return GreyBernoulli(logits=output)


class GreyBernoulli(dist.Bernoulli):
    """The probabilities of a Bernoulli, taken as weights of values from 0 to 1. Nothing is simulated with it."""

    support = constraints.unit_interval
    has_enumerate_support = False
    is_density = False
    instead = "in place of 'cross-entropy', use 'continuous-bernoulli', or 'bernoulli' on data that are binarised"
