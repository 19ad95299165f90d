"""Mixtures of logistic distributions that are rounded to grey values."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Size, Tensor

from calibrant.errors import ProgramError
from calibrant.models.parts.likelihoods.discretised import logistic_log_mass, logistic_noise
from calibrant.models.parts.likelihoods.grey import LAST, GreyDistribution, grey_values
from calibrant.models.parts.likelihoods.protocol import NO_SHAPE, Likelihood, Shape, Shapes
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.models.parts.likelihoods.scales import bounded_scale
from calibrant.registries import Case

LOWEST = -7.0  # where log scales (data units) are clipped softly


class RoundedMixture(GreyDistribution):
    """A mixture of logistic distributions that is rounded to grey values.

    Args:
        log_weights: log weights of the components, `(*batch_shape, components)`; they sum to one.
        locations, scales: of the components, in data units, in the same shape.
    """

    def __init__(
        self, log_weights: Tensor, locations: Tensor, scales: Tensor, validate_args: bool | None = None
    ) -> None:
        self.log_weights, self.locations, self.scales = log_weights, LAST * locations, LAST * scales
        super().__init__(locations.shape[:-1], validate_args=validate_args)

    @property
    def like(self) -> Tensor:
        return self.locations

    def log_mass(self, level: Tensor) -> Tensor:
        parts = logistic_log_mass(level[..., None], self.locations, self.scales)
        return (self.log_weights + parts).logsumexp(-1)

    def cumulative(self, level: Tensor) -> Tensor:
        shares = ((level[..., None] + 0.5 - self.locations) / self.scales).sigmoid()
        return (self.log_weights.exp() * shares).sum(-1)

    def sample(self, sample_shape: Shapes = NO_SHAPE) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(Size(sample_shape))
            which = dist.Categorical(logits=self.log_weights).sample(sample_shape)[..., None]
            location, scale = (
                part.expand(*shape, part.shape[-1]).gather(-1, which).squeeze(-1)
                for part in (self.locations, self.scales)
            )
            return (location + scale * logistic_noise(shape, location)).round().clamp(0, LAST) / LAST


@register_likelihood(
    "logistic-mixture",
    density_of="the grey values k/255 (their probabilities)",
    equations="x ~ Σ wⱼ Logistic(locationⱼ, sⱼ) rounded to k/255; all from the decoder",
    paper="Salimans, Karpathy, Chen & Kingma 2017, arXiv 1701.05517, without channel autoregression",
    cases=(
        Case({}, {"x": (1,)}),
        Case({"components": 2, "equal_weights": True}, {"x": (1,)}),
        Case({"components": 3}, {"x": (1, 4, 4)}, name="image"),
    ),
)
class LogisticMixture(Likelihood):
    """A mixture of logistic distributions for each entry, rounded to grey values.

    The entries are independent: there is no autoregression over channels. The probabilities sum to one; the published
    code adds 1e-7 to each, whose sum is above one. Log scales are clipped softly at −7.

    Args:
        components: number of components per entry.
        equal_weights: whether all components have the same weight, as in the code of arXiv 2006.13202, so that the
            decoder returns no weights.

    Raises:
        ProgramError: for a number of components below 1.
    """

    support = grey_values

    def __init__(self, components: int = 5, equal_weights: bool = False) -> None:
        super().__init__()
        if components < 1:
            raise ProgramError(f"components={components}: a mixture needs one or more")
        self.components, self.equal_weights = components, equal_weights

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        names = ["locations", "log_scales", *([] if self.equal_weights else ["log_weights"])]
        return dict.fromkeys(names, (self.components, *shape))

    def marginals(self, output: tuple[Tensor, ...]) -> RoundedMixture:
        locations, log_scales, *weights = (part.movedim(1, -1) for part in output)
        equal = torch.full_like(locations, -math.log(self.components))
        log_weights = weights[0].log_softmax(-1) if weights else equal
        return RoundedMixture(log_weights, locations, bounded_scale(log_scales, LOWEST))
