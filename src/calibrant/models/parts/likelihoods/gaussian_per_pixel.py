"""Normal noise whose scales depend on the latents."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from calibrant.models.parts.likelihoods.protocol import Likelihood, Shape
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.models.parts.likelihoods.scales import bounded_scale, shape_of_scales
from calibrant.registries import Case

Outputs = tuple[Tensor, Tensor]


@register_likelihood(
    "gaussian-per-pixel",
    density_of="real numbers",
    equations="x ~ Normal(location, exp(log_scale)²), both from the decoder, log_scale softly clipped at −6",
    paper="Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202",
    cases=(
        Case({}, {"x": (1,)}),
        Case({"lowest": None}, {"x": (2, 3)}),
        Case({"per": "position"}, {"x": (3, 4, 4)}),
        Case({"per": "all"}, {"x": (3, 4, 4)}),
    ),
)
class GaussianPerPixel(Likelihood):
    """Normal noise, with location and standard deviation from the decoder.

    The likelihood has no maximum without a lower limit of the scale, since a decoder that repeats an entry exactly may
    narrow the noise of that entry for ever.

    Args:
        per: what has a scale of its own: "entry", "position" (shared by the channels), "channel", or "all" for one
            scale of an observation.
        lowest: limit at which log_scale is softly clipped (natural logarithm, data units); None for no such limit.
    """

    def __init__(self, per: str = "entry", lowest: float | None = -6.0) -> None:
        super().__init__()
        self.per, self.lowest = per, lowest

    def outputs(self, shape: Shape) -> dict[str, Shape]:
        return {"location": shape, "log_scale": shape_of_scales(self.per, shape)}

    def marginals(self, output: Outputs) -> dist.TorchDistribution:
        location, log_scale = output
        return dist.Normal(location, bounded_scale(log_scale, self.lowest))

    def noise_sd(self, output: Outputs) -> Tensor:
        _, log_scale = output
        return bounded_scale(log_scale, self.lowest)
