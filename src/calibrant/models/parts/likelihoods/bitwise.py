"""Independent bits of grey values."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from calibrant.models.parts.likelihoods.grey import LAST, GreyDistribution, grey_values
from calibrant.models.parts.likelihoods.protocol import NO_SHAPE, Likelihood, Shape, Shapes
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.registries import Case

BITS = 8


class GreyBits(GreyDistribution):
    """Grey values whose eight bits are independent.

    Args:
        logits: log odds of the bits, the most significant one first, `(*batch_shape, 8)`.
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], validate_args=validate_args)

    @property
    def like(self) -> Tensor:
        return self.logits

    def log_mass(self, level: Tensor) -> Tensor:
        is_set = (level.long()[..., None] // self._weights.long()) % 2 == 1
        return torch.where(is_set, logsigmoid(self.logits), logsigmoid(-self.logits)).sum(-1)

    def sample(self, sample_shape: Shapes = NO_SHAPE) -> Tensor:
        with torch.no_grad():
            shares = self.logits.sigmoid().expand(*sample_shape, *self.logits.shape)
            return torch.bernoulli(shares) @ self._weights / LAST

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid() @ self._weights / LAST

    @property
    def variance(self) -> Tensor:
        return (self.logits.sigmoid() * (-self.logits).sigmoid()) @ self._weights**2 / LAST**2

    @property
    def _weights(self) -> Tensor:
        """What a bit adds to the level: 128, 64, …, 1."""
        return 2.0 ** torch.arange(BITS - 1, -1, -1, dtype=self.logits.dtype, device=self.logits.device)


@register_likelihood(
    "bitwise",
    density_of="the grey values k/255 (their probabilities)",
    equations="the 8 bits of 255 x ~ Bernoulli(sigmoid(logits)), independent",
    paper="Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202",
    cases=(Case({}, {"x": (1,)}), Case({}, {"x": (1, 4, 4)}, name="image")),
)
class Bitwise(Likelihood):
    """Independent entries, each with eight independent bits, for a decoder of 8 instead of 256 logits per entry."""

    support = grey_values

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"logits": (BITS, *shape)}

    def marginals(self, output: Tensor) -> GreyBits:
        return GreyBits(output.movedim(1, -1))
