"""Noise on the real line that is rounded to grey values.

Every grey value k/255 has the mass of the noise between (k − ½)/255 and (k + ½)/255; the first one has all mass below,
and the last one all mass above, so that the probabilities sum to one. All is computed in grid steps: a bin has the
width one, and `location` and `scale` are 255 times those of the data.
"""

from __future__ import annotations

import math

import torch
from torch import Size, Tensor
from torch.nn.functional import logsigmoid
from torch.special import log_ndtr, ndtr

from calibrant.models.parts.likelihoods.grey import LAST, GreyDistribution, grey_values
from calibrant.models.parts.likelihoods.protocol import NO_SHAPE, Shapes
from calibrant.models.parts.likelihoods.registry import register_likelihood
from calibrant.models.parts.likelihoods.scales import NoiseAround
from calibrant.models.parts.likelihoods.series import polynomial
from calibrant.registries import Case

# Gauss–Legendre quadrature of five nodes on (−1, 1): weights that sum to one, and the nodes, which are symmetric.
_MIDDLE, _WEIGHTS = 64 / 225, tuple((322 + sign * 13 * 70**0.5) / 1800 for sign in (1, -1))
_NODES = tuple((5 - sign * 2 * (10 / 7) ** 0.5) ** 0.5 / 3 for sign in (1, -1))
# The quadrature is exact to the rounding of float64 for half widths h, and |centre| h, below these bounds.
_HALF_WIDTH, _TILT = 0.125, 0.25
_LEAST = 0.19  # below the difference of log Φ at the ends of all other bins
# log Φ(x) for x below `_TAIL`, by an asymptotic series: there, torch's derivative of log_ndtr is lost to rounding.
_TAIL, _SERIES = -20.0, (1.0, -1.0, 3.0, -15.0, 105.0, -945.0, 10395.0, -135135.0, 2027025.0)


def logistic_log_mass(level: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Log mass (nats) of a grey level under logistic noise that is rounded; all in grid steps.

    With lower and upper ends a and c in scales, σ(c) − σ(a) = σ(c) σ(−a) (1 − exp(a − c)): nothing cancels.
    """
    centre, half = (level - location) / scale, 0.5 / scale
    below, above = logsigmoid(centre + half), logsigmoid(half - centre)
    inside = below + above + (-torch.expm1(-2 * half)).log()
    return _with_open_ends(level, below, inside, above)


def gaussian_log_mass(level: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    """Log mass (nats) of a grey level under Normal noise that is rounded; all in grid steps."""
    centre, half = (level - location) / scale, 0.5 / scale
    narrow = (half <= _HALF_WIDTH) & (centre.abs() * half <= _TILT)
    below, above = _log_share_below(centre + half), _log_share_below(half - centre)
    inside = torch.where(narrow, _narrow_log_mass(centre, half, narrow), _wide_log_mass(centre, half))
    return _with_open_ends(level, below, inside, above)


def _with_open_ends(level: Tensor, below: Tensor, inside: Tensor, above: Tensor) -> Tensor:
    return torch.where(level <= 0, below, torch.where(level >= LAST, above, inside))


def _narrow_log_mass(centre: Tensor, half: Tensor, narrow: Tensor) -> Tensor:
    """log ∫ φ(centre + v) dv over −half < v < half, whose integrand is nearly φ(centre)."""
    zero = torch.zeros_like(centre)
    middle, half = torch.where(narrow, centre, zero), torch.where(narrow, half, zero + _HALF_WIDTH)
    ratio = torch.full_like(middle, _MIDDLE)  # of the mean of φ over the bin to φ(centre)
    for weight, node in zip(_WEIGHTS, _NODES, strict=True):
        v = node * half
        ratio = ratio + 2 * weight * (-0.5 * v**2).exp() * (middle * v).cosh()
    return -0.5 * middle**2 - 0.5 * math.log(2 * math.pi) + (2 * half).log() + ratio.log()


def _wide_log_mass(centre: Tensor, half: Tensor) -> Tensor:
    """The log of a difference of Φ, reflected so that it is one of lower tails.

    The difference of log Φ is above `_LEAST`, unless rounding loses it beside a log Φ of many millions.
    """
    middle = -centre.abs()
    upper, lower = _log_share_below(middle + half), _log_share_below(middle - half)
    return upper + (-torch.expm1(-(upper - lower).clamp_min(_LEAST))).log()


def _log_share_below(x: Tensor) -> Tensor:
    """log Φ(x)."""
    far = x.clamp_max(_TAIL)
    tail = -0.5 * far**2 - (-far).log() - 0.5 * math.log(2 * math.pi) + polynomial(far**-2, _SERIES).log()
    return torch.where(x < _TAIL, tail, log_ndtr(x.clamp_min(_TAIL)))


class Rounded(GreyDistribution):
    """Base of distributions of noise that is rounded to grey values.

    Args:
        location: location of the noise, in data units.
        scale: its scale, in data units.
    """

    def __init__(self, location: Tensor, scale: Tensor, validate_args: bool | None = None) -> None:
        self.location, self.scale = LAST * location, LAST * scale
        super().__init__(torch.broadcast_shapes(location.shape, scale.shape), validate_args=validate_args)

    @property
    def like(self) -> Tensor:
        return self.location

    def cumulative(self, level: Tensor) -> Tensor:
        return self.share_below((level + 0.5 - self.location) / self.scale)

    def share_below(self, standard: Tensor) -> Tensor:
        """The distribution function of the noise with location 0 and scale 1."""
        raise NotImplementedError

    def standard_noise(self, shape: Size) -> Tensor:
        """Draws of the noise with location 0 and scale 1."""
        raise NotImplementedError

    def sample(self, sample_shape: Shapes = NO_SHAPE) -> Tensor:
        with torch.no_grad():
            noise = self.standard_noise(self._extended_shape(Size(sample_shape)))
            return (self.location + self.scale * noise).round().clamp(0, LAST) / LAST


class RoundedGaussian(Rounded):
    """Normal noise that is rounded to grey values."""

    def log_mass(self, level: Tensor) -> Tensor:
        return gaussian_log_mass(level, self.location, self.scale)

    def share_below(self, standard: Tensor) -> Tensor:
        return ndtr(standard)

    def standard_noise(self, shape: Size) -> Tensor:
        return torch.randn(shape, dtype=self.like.dtype, device=self.like.device)


class RoundedLogistic(Rounded):
    """Logistic noise that is rounded to grey values."""

    def log_mass(self, level: Tensor) -> Tensor:
        return logistic_log_mass(level, self.location, self.scale)

    def share_below(self, standard: Tensor) -> Tensor:
        return standard.sigmoid()

    def standard_noise(self, shape: Size) -> Tensor:
        return logistic_noise(shape, self.like)


def logistic_noise(shape: Size, like: Tensor) -> Tensor:
    """Draws of the logistic distribution with location 0 and scale 1, with the dtype and device of a tensor."""
    share = torch.rand(shape, dtype=like.dtype, device=like.device)
    return share.logit(eps=torch.finfo(like.dtype).tiny)


class _Discretised(NoiseAround):
    """Rounded noise around the decoder's output, with a scale that all entries share."""

    support = grey_values
    rounded: type[Rounded]

    def __init__(self, scale: float | str = "data", learn: bool = True) -> None:
        super().__init__(scale, learn)

    def marginals(self, output: Tensor) -> Rounded:
        return self.rounded(output, self.scale)


PAPER = "a decoder of arXiv 2006.13202 (Rybkin, Daniilidis & Levine 2021), Table 4"
GREY = "the grey values k/255 (their probabilities)"
CASES = (Case({}, {"x": (1,)}), Case({"scale": 0.02, "learn": False}, {"x": (1, 4, 4)}))


@register_likelihood(
    "discretised-gaussian",
    density_of=GREY,
    equations="x ~ Normal(location, σ²) rounded to k/255, σ learned or fixed",
    paper=PAPER,
    cases=CASES,
)
class DiscretisedGaussian(_Discretised):
    """Normal noise that is rounded to the nearest grey value; values beyond 0 and 1 are rounded to these.

    Args:
        scale: standard deviation of the noise before it is rounded, in data units; its initial value if it is learned.
            "data" starts at the standard deviation of the training data, which `fit` measures before its first step.
        learn: whether the scale is learned.
    """

    rounded = RoundedGaussian


@register_likelihood(
    "discretised-logistic",
    density_of=GREY,
    equations="x ~ Logistic(location, s) rounded to k/255, s learned or fixed",
    paper=f"Kingma et al. 2016, arXiv 1606.04934; {PAPER}",
    cases=CASES,
)
class DiscretisedLogistic(_Discretised):
    """Logistic noise that is rounded to the nearest grey value; values beyond 0 and 1 are rounded to these.

    Args:
        scale: scale s of the noise before it is rounded, in data units; its initial value if it is learned. The
            standard deviation is π s / √3. "data" starts at that of the training data, as for `discretised-gaussian`.
        learn: whether the scale is learned.
    """

    rounded = RoundedLogistic
    unit_sd = math.pi / 3**0.5
