"""Families of variational distributions, which turn the outputs of a head into the distribution of a site.

The outputs are relative to location and scale of the prior in unconstrained space ("the line"), so that a new guide
lies within the prior for every support: it has the location of the prior and a quarter of its scale. (With the whole
scale, the decoder at first sees mostly noise and learns to ignore the latents, and a learned noise scale grows until it
explains the data alone.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import SoftplusTransform
from torch import Tensor, nn
from torch.distributions.transforms import ReshapeTransform, Transform
from torch.nn.functional import normalize, softplus

from calibrant.distributions.directional import Shape
from calibrant.guides.families.support_text import Support

_START = -1.26  # softplus(_START) = 0.25
_FARTHEST = 30.0  # largest distance from the prior's location, in prior scales, so that exp() does not overflow
_NARROWEST = 1e-3  # smallest scale of Gamma, Beta and Dirichlet on the line that float32 densities resolve
_OVERFLOW = 88.0  # exp() of more overflows in float32
_RANK = 8  # columns of the factor in a low-rank covariance, at most


class Family(nn.Module, ABC):
    """A family of distributions for a site of one event shape.

    Attributes:
        raw: number of outputs that the family takes from the head, per datum.
        locations: how many of these outputs are locations on the line; they come first.
        is_plain: whether the head is a linear layer of the features, with torch's initial weights.
        width_on_line: number of entries of a value of the site on the line, as later heads see it.
    """

    raw: int
    locations: int
    width_on_line: int
    is_plain = False

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.event_shape = torch.Size(event_shape)

    @abstractmethod
    def start(self) -> tuple[Tensor, Tensor]:
        """Initial location and scale of the prior, which are used until `statistics` are known."""

    @abstractmethod
    def statistics(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of the prior, computed from draws of it, `(n, *event_shape)`."""

    @abstractmethod
    def standardize(self, value: Tensor, center: Tensor, width: Tensor) -> Tensor:
        """A value, mapped to the line and standardised by the prior, `(size, width_on_line)`."""

    @abstractmethod
    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        """The distribution, with batch shape `(size,)`, from the outputs of the head.

        Args:
            raw: outputs of the head, `(size, raw)`.
            center: location of the prior.
            width: scale of the prior.
        """


def limited(raw: Tensor) -> Tensor:
    """A distance from the prior's location, in prior scales, that does not overflow."""
    return _FARTHEST * torch.tanh(raw / _FARTHEST)


def softplus_scale(raw: Tensor) -> Tensor:
    """A positive scale, a quarter of the prior's where the network gives zero."""
    return softplus(raw + _START) + 1e-6


# -- location and scale on the line ------------------------------------------------------------------------------------


class OnLine(Family):
    """A family with a location and a scale for every entry of a value on the line.

    Args:
        event_shape: event shape of the site.
        line_shape: shape of a value on the line.
        reach: largest absolute location on the line; None where the support is the line itself.
    """

    def __init__(self, event_shape: tuple[int, ...], line_shape: tuple[int, ...], reach: float | None) -> None:
        super().__init__(event_shape)
        self.line_shape, self.reach = torch.Size(line_shape), reach
        self.locations = self.width_on_line = self.line_shape.numel()
        self.raw = 2 * self.locations

    @abstractmethod
    def to_line(self, value: Tensor) -> Tensor:
        """Map values `(n, *event_shape)` to the line, `(n, *line_shape)`."""

    def start(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.line_shape), torch.ones(self.line_shape)

    def statistics(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        line = self.to_line(draws)
        if self.reach is not None:
            line = line.nan_to_num(0.0, self.reach, -self.reach)  # draws on the bounds are infinite on the line
        low, middle, high = line.quantile(torch.tensor([0.16, 0.5, 0.84]).to(draws), dim=0)
        return middle, torch.where(high > low, (high - low) / 2, 1.0)

    def standardize(self, value: Tensor, center: Tensor, width: Tensor) -> Tensor:
        return ((self.to_line(value) - center) / width).reshape(len(value), -1)

    def located(self, raw: Tensor, center: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale on the line, `(size, *line_shape)` each, from the first outputs of the head."""
        loc, raw_scale = raw[:, : 2 * self.locations].reshape(len(raw), 2, *self.line_shape).unbind(1)
        scale = width * softplus_scale(raw_scale)
        if self.reach is None:
            return center + width * loc, scale
        loc = (center + width * limited(loc)).clamp(-self.reach, self.reach)
        room = (_OVERFLOW - loc.abs()) / 8  # exp() does not overflow in float32 within eight sds
        return loc, torch.minimum(scale, room)


def _gamma(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    """A Gamma with mean exp(loc) and coefficient of variation `scale`, so that its shape is learned."""
    shape = scale.clamp_min(_NARROWEST).pow(-2)
    return dist.Gamma(shape, shape * (-loc).exp())


def _gamma_of_shape_two(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    """A Gamma with mean exp(loc) and shape 2, that is with coefficient of variation 0.71; `scale` is ignored.

    This is the posterior of the scale in the authors' guide of the EA-VAE for van Hateren's images (Catoni et al. 2024,
    arXiv 2404.15390; in their code, the shape is that of the prior), without their truncation of draws. It exists for
    comparison: a learned shape costs nothing more, see docs/guides.md.
    """
    return dist.Gamma(torch.full_like(loc, 2.0), 2 * (-loc).exp())


def degrees_of_freedom(raw: Tensor) -> Tensor:
    """Degrees of freedom of a Student-t from the output of a network: between 1 and 100, and 10 at 0."""
    return 10 * (2.3 * torch.tanh(raw / 2.3)).exp()


def _student(loc: Tensor, scale: Tensor, raw: Tensor) -> dist.TorchDistribution:
    return dist.StudentT(degrees_of_freedom(raw), loc, scale)


class _Beta(dist.Beta):
    """A Beta distribution whose draws stay inside (0, 1), where the prior has a density."""

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        numbers = torch.finfo(self.concentration1.dtype)
        return super().rsample(sample_shape).clamp(numbers.tiny, 1 - numbers.eps)


def _beta(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    """A Beta with mean σ(loc); the variance of its logit is about 1/a + 1/b = scale²."""
    precision = scale.clamp_min(_NARROWEST).pow(-2)
    return _Beta((1 + loc.exp()) * precision, (1 + (-loc).exp()) * precision)


def _same(value: Tensor) -> Tensor:
    return value


def _log(value: Tensor) -> Tensor:
    return value.clamp_min(torch.finfo(value.dtype).tiny).log()


def _softplus_laplace(loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
    """softplus(u) with u ~ Laplace(loc, scale)."""
    return dist.TransformedDistribution(dist.Laplace(loc, scale), [SoftplusTransform()])


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + _log(-torch.expm1(-value))


@dataclass(frozen=True)
class Entry:
    """The distribution of one entry, `build(loc, scale, *others)`, and the map from its support to the line.

    `others` is the number of further outputs of the head that it takes.
    """

    build: Callable[..., dist.TorchDistribution]
    support: str
    to_line: Callable[[Tensor], Tensor]
    others: int = 0


ENTRIES: dict[str, Entry] = {
    "normal": Entry(dist.Normal, "real", _same),
    "laplace": Entry(dist.Laplace, "real", _same),
    "studentt": Entry(_student, "real", _same, others=1),
    "lognormal": Entry(dist.LogNormal, "positive", _log),
    "gamma": Entry(_gamma, "positive", _log),
    "gamma-fixed": Entry(_gamma_of_shape_two, "positive", _log),
    "softplus-laplace": Entry(_softplus_laplace, "positive", _inverse_softplus),
    "beta": Entry(_beta, "interval[0.0, 1.0]", torch.logit),
}


class Entrywise(OnLine):
    """A family of independent entries.

    Args:
        event_shape: event shape of the site.
        entry: the distribution of one entry.
    """

    def __init__(self, event_shape: tuple[int, ...], entry: Entry) -> None:
        super().__init__(event_shape, event_shape, None if entry.support == "real" else Support(entry.support).reach)
        self.entry = entry
        self.raw += entry.others * self.locations

    def to_line(self, value: Tensor) -> Tensor:
        return self.entry.to_line(value)

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        loc, scale = self.located(raw, center, width)
        others = raw[:, 2 * self.locations :].reshape(len(raw), self.entry.others, *self.line_shape).unbind(1)
        return self.entry.build(loc, scale, *others).to_event(len(self.event_shape))


class Transformed(OnLine):
    """A Normal with independent entries on the unconstrained line, mapped to the support by `biject_to`.

    Args:
        event_shape: event shape of the site.
        support: the support as text, from `support_text.describe`.
    """

    def __init__(self, event_shape: tuple[int, ...], support: str) -> None:
        described = Support(support)
        line_shape = torch.Size(event_shape)
        for transform in reversed(described.transforms()):
            line_shape = transform.inverse_shape(line_shape)
        super().__init__(event_shape, line_shape, None if described.is_real else described.reach)
        self.support = described

    def to_line(self, value: Tensor) -> Tensor:
        for transform in reversed(self.support.transforms()):
            value = transform.inv(value)
        return value

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        loc, scale = self.located(raw, center, width)
        return self.mapped(dist.Normal(loc, scale).to_event(len(self.line_shape)))

    def mapped(self, base: dist.TorchDistribution, *first: Transform) -> dist.TorchDistribution:
        """A distribution on the line, passed through the transforms `first` and the map to the support."""
        transforms = [*first, *self.support.transforms()]
        return dist.TransformedDistribution(base, transforms) if transforms else base


class Flat(Transformed):
    """A family that treats all entries on the line as one vector, with the distribution `joint(loc, scale, others)`.

    `others`, `(size, …)`, are the further outputs of the head.
    """

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        loc, scale = (part.reshape(len(raw), -1) for part in self.located(raw, center, width))
        base, *first = self.joint(loc, scale, raw[:, 2 * self.locations :])
        flat = torch.Size((self.locations,))
        shape = [ReshapeTransform(flat, self.line_shape)] if self.line_shape != flat else []
        return self.mapped(base, *first, *shape)

    @abstractmethod
    def joint(self, loc: Tensor, scale: Tensor, others: Tensor) -> tuple:
        """A distribution of vectors `(size, entries)`, and the transforms that are applied to its draws."""


class Dense(Flat):
    """A Normal on the line with any covariance.

    scale_tril = diag(scale) R, where the rows of R are those of I + N divided by their lengths, and N is strictly lower
    triangular.
    """

    def __init__(self, event_shape: tuple[int, ...], support: str) -> None:
        super().__init__(event_shape, support)
        self.raw += self.locations * (self.locations - 1) // 2

    def joint(self, loc: Tensor, scale: Tensor, others: Tensor) -> tuple:
        n = self.locations
        rows, columns = torch.tril_indices(n, n, -1, device=loc.device)
        factor = torch.eye(n, dtype=loc.dtype, device=loc.device).expand(len(loc), n, n).clone()
        factor[:, rows, columns] = limited(others) / n**0.5  # since a step of Adam moves all entries of a row
        return (dist.MultivariateNormal(loc, scale_tril=scale[:, :, None] * normalize(factor, dim=-1)),)


class LowRank(Flat):
    """A Normal on the line with covariance D (I + FFᵀ) D and marginal sds `scale`; F has at most 8 columns."""

    def __init__(self, event_shape: tuple[int, ...], support: str) -> None:
        super().__init__(event_shape, support)
        self.rank = min(_RANK, self.locations)
        self.raw += self.rank * self.locations

    def joint(self, loc: Tensor, scale: Tensor, others: Tensor) -> tuple:
        factor = limited(others.reshape(len(loc), self.locations, self.rank)) / self.rank**0.5
        scale = scale / (1 + factor.square().sum(-1)).sqrt()
        return (dist.LowRankMultivariateNormal(loc, scale[:, :, None] * factor, scale.square()),)


# -- simplex, circle and sphere ----------------------------------------------------------------------------------------


class _Positive(dist.Dirichlet):
    """A Dirichlet distribution whose draws stay inside the simplex, where the prior has a density."""

    def rsample(self, sample_shape: Shape = ()) -> Tensor:
        return super().rsample(sample_shape).clamp_min(torch.finfo(self.concentration.dtype).tiny)


class Dirichlet(Family):
    """Dirichlet distributions, parametrised by mean and total concentration.

    Log means are relative to those of the prior, and the total concentration is 1/scale². Values on the line are the
    probabilities themselves, since their logarithms are unbounded under a sparse prior.
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape)
        self.locations = self.width_on_line = self.event_shape.numel()
        self.raw = self.locations + self.event_shape[:-1].numel()

    def start(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.event_shape), torch.full(self.event_shape[:-1], self.event_shape[-1] ** -0.5)

    def statistics(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance = draws.mean(0), draws.var(0).sum(-1)
        total = ((mean * (1 - mean)).sum(-1) / variance - 1).clamp(0.01, 1e6)
        return _log(mean), total.rsqrt()

    def standardize(self, value: Tensor, center: Tensor, width: Tensor) -> Tensor:
        mean = center.softmax(-1)
        sd = (mean * (1 - mean) / (1 + width[..., None].pow(-2))).sqrt()
        return ((value - mean) / sd.clamp_min(1e-6)).reshape(len(value), -1)

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        mean = (center + limited(raw[:, : self.locations].reshape(-1, *self.event_shape))).softmax(-1)
        scale = width * softplus_scale(raw[:, self.locations :].reshape(-1, *self.event_shape[:-1]))
        total = scale.clamp_min(_NARROWEST).pow(-2)
        concentration = (total[..., None] * mean).clamp(1e-3, 1e6)
        return _Positive(concentration).to_event(len(self.event_shape) - 1)
