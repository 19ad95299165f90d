"""Normal noise, with scales that do not depend on the latents."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

from calibrant.errors import ProgramError
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.models.parts.likelihoods.scales import NoiseAround, shape_of_scales
from calibrant.registries import Case


@register_likelihood(
    "gaussian",
    density_of="real numbers",
    equations="x ~ Normal(location, σ²), σ learned or fixed: one for all entries, or one per channel, place or entry",
    cases=(
        Case({}, {"x": (1,)}),
        Case({"scale": 0.1, "learn": False}, {"x": (1, 4, 4)}),
        Case({"shape": (2, 3)}, {"x": (2, 3)}),
        Case({"per": "channel", "shape": (3, 4, 4)}, {"x": (3, 4, 4)}, name="channel"),
        Case({"per": "position", "shape": (3, 4, 4)}, {"x": (3, 4, 4)}, name="position"),
    ),
)
class Gaussian(NoiseAround):
    """Normal noise around the decoder's output.

    Args:
        scale: standard deviation of the noise, in data units; its initial value if it is learned. "data" starts at the
            standard deviation of the training data, which `fit` measures before its first step (it is 0.4 until then,
            and where the model is frozen, or the noise is not that of one observed site without a mask).
        learn: whether the scale is learned. A step of training moves its logarithm by the learning rate at most: from 1
            to 0.1 takes 2,300 steps at 1e-3. `Fit.history` has its course, and `fit` warns if it comes too late.
        shape: event shape of the observations, where entries have scales of their own; models give it themselves.
        per: "all" for one scale of all entries, or what has a scale of its own: "channel", "position" (shared by the
            channels) or "entry" (factor analysis). The default is "entry" if a shape is given, and otherwise "all".

    Raises:
        ProgramError: for a scale that is not positive, and for scales of their own without the shape that they need.
    """

    def __init__(
        self, scale: float | str = "data", learn: bool = True, shape: tuple[int, ...] = (), per: str | None = None
    ) -> None:
        if per not in (None, "all") and not shape:
            raise ProgramError(f'per={per!r} needs the event shape of the observations: give "shape" too')
        super().__init__(scale, learn, () if per == "all" else shape_of_scales(per or "entry", tuple(shape)))

    def optimal_scale(self, mean_squares: Tensor) -> Tensor:
        """The scale of highest density for the mean squared error of every entry, in the shape of the scale."""
        return self.scale_for(mean_squares)

    def marginals(self, output: Tensor) -> dist.TorchDistribution:
        return dist.Normal(output, self.scale)

    def noise_sd(self, output: Tensor) -> Tensor:
        return self.scale
