"""Families of finitely many values: binary, classes, one-hot."""

from __future__ import annotations

from abc import abstractmethod

import pyro.distributions as dist
import torch
from torch import Tensor

from calibrant.guides.families.densities import Family, limited

_NO_SHAPE = torch.Size()


class Finite(Family):
    """A family with finitely many values, whose logits are relative to those of the prior; it has no scale.

    Args:
        event_shape: event shape of the site.
        logits_shape: shape of the logits of one datum.
    """

    def __init__(self, event_shape: tuple[int, ...], logits_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape)
        self.logits_shape = torch.Size(logits_shape)
        self.raw = self.locations = self.width_on_line = self.logits_shape.numel()

    @abstractmethod
    def indicators(self, value: Tensor) -> Tensor:
        """Indicators, 0 or 1, of the values, `(n, *logits_shape)`."""

    def start(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.logits_shape), torch.ones(())

    def frequencies(self, draws: Tensor) -> Tensor:
        """Frequency of each value among the draws, smoothed so that none is 0 or 1."""
        return (self.indicators(draws).sum(0) + 0.5) / (len(draws) + 1)

    def standardize(self, value: Tensor, center: Tensor, width: Tensor) -> Tensor:
        return 2 * self.indicators(value).to(center).reshape(len(value), -1) - 1

    def logits(self, raw: Tensor, center: Tensor) -> Tensor:
        """Logits `(size, *logits_shape)` from the outputs of the head."""
        return center + limited(raw.reshape(-1, *self.logits_shape))


class Binary(Finite):
    """Bernoulli distributions."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, event_shape)

    def indicators(self, value: Tensor) -> Tensor:
        return value

    def statistics(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        return torch.logit(self.frequencies(draws)), torch.ones(())

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.logits(raw, center)).to_event(len(self.event_shape))


class Classes(Finite):
    """Categorical distributions.

    Args:
        event_shape: event shape of the site.
        count: number of classes.
    """

    def __init__(self, event_shape: tuple[int, ...], count: int) -> None:
        super().__init__(event_shape, (*event_shape, count))
        self.count = count

    def indicators(self, value: Tensor) -> Tensor:
        return (value[..., None] == torch.arange(self.count, device=value.device)).long()  # one_hot cannot be recorded

    def statistics(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        return self.frequencies(draws).log(), torch.ones(())

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        return dist.Categorical(logits=self.logits(raw, center)).to_event(len(self.event_shape))


class _Units(dist.OneHotCategorical):
    """One-hot draws by comparison, since torch's `one_hot`, which reads values in Python, cannot be recorded."""

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = _NO_SHAPE) -> Tensor:
        drawn = self._categorical.sample(torch.Size(sample_shape))
        return (drawn[..., None] == torch.arange(self.event_shape[0], device=drawn.device)).to(self.logits)


class OneHot(Finite):
    """One-hot categorical distributions."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape, event_shape)

    def indicators(self, value: Tensor) -> Tensor:
        return value

    def statistics(self, draws: Tensor) -> tuple[Tensor, Tensor]:
        return self.frequencies(draws).log(), torch.ones(())

    def build(self, raw: Tensor, center: Tensor, width: Tensor) -> dist.TorchDistribution:
        return _Units(logits=self.logits(raw, center)).to_event(len(self.event_shape) - 1)
