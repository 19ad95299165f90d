"""Likelihoods: parts that any model takes. Called on the decoder's output `(size, *shape)`, each returns a distribution
with batch shape `(size,)` and event shape `shape`."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from calibrant.errors import ProgramError


class Gaussian(nn.Module):
    """Normal noise around the decoder's output.

    Args:
        scale: standard deviation of the noise, in data units; the start value where it is learned.
        learn: whether it is learned.
        shape: `()` for one scale shared by all entries, the event shape for one scale each (factor analysis).
    """

    log_scale: Tensor

    def __init__(self, scale: float = 0.4, learn: bool = True, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        if not scale > 0:
            raise ProgramError(f"the noise scale is {scale}: a standard deviation is positive")
        log_scale = torch.full(tuple(shape), float(scale)).log()
        if learn:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the noise, in data units."""
        return self.log_scale.exp()

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        return dist.Normal(output, self.scale).to_event(output.dim() - 1)


class Bernoulli(nn.Module):
    """Independent binary entries, with the decoder's output as their logits. Grey values are outside its support."""

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=output).to_event(output.dim() - 1)


LIKELIHOODS: dict[str, type[nn.Module]] = {"gaussian": Gaussian, "bernoulli": Bernoulli}


def make_likelihood(likelihood: str | dict[str, Any] | nn.Module) -> nn.Module:
    """A likelihood from its name, from `{"name": …, **arguments}`, or as it is.

    Raises:
        ProgramError: for an unknown name or argument.
    """
    if isinstance(likelihood, nn.Module):
        return likelihood
    arguments = {"name": likelihood} if isinstance(likelihood, str) else dict(likelihood)
    name = arguments.pop("name", None)
    if name not in LIKELIHOODS:
        raise ProgramError(f"unknown likelihood {name!r}; known: {sorted(LIKELIHOODS)}, or a module of your own")
    try:
        return LIKELIHOODS[name](**arguments)
    except TypeError as error:
        raise ProgramError(f"likelihood {name!r}: {error}") from error
