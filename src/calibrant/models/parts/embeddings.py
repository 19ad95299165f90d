"""Embeddings with uncertainty: networks from an input to p(z | x), a direction and a concentration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import normalize

from calibrant.distributions.directional import VonMisesFisher
from calibrant.errors import ProgramError
from calibrant.models.parts.networks import Network, Spec, checked_inputs, layers_of

POSTERIORS = ("vmf", "normal")
_ROWS = 1024  # inputs that are read at a time
Encoder = str | dict[str, Any] | nn.Module


class Embedding(nn.Module):
    """p(z | x): vMF(μ(x), κ(x)) on the unit sphere, or Normal(e(x), κ(x)^(−1/2)) in every entry.

    κ(x) = start · exp(network of x), whose last layer is zero at first, so that κ is `start` for every x until it is
    trained.

    Args:
        shape: event shape of x.
        latents: m, dimension of z, 2 or more.
        encoder: a network of `Network` (a name, `{"name": …, **arguments}`, or a module), on whose features both heads
            stand; or `{"direction": network, "concentration": network}`, each with a linear head of its own.
        posterior: "vmf", or "normal", which is not projected to the sphere: e(x) and z have any length.
        start: κ before training; of a Normal, one over its variance.
        widths: numbers of units of the hidden layers of the head of κ on shared features, with LeakyReLU (three of
            1,024 in URL: Kirchhof et al. 2023, arXiv 2307.03810).

    Raises:
        ProgramError: for an unknown posterior or network, and for numbers out of range.
    """

    per_datum = True

    def __init__(
        self,
        shape: tuple[int, ...],
        latents: int,
        encoder: Encoder = "mlp",
        posterior: str = "vmf",
        start: float = 16.0,
        widths: tuple[int, ...] = (256, 256),
    ) -> None:
        super().__init__()
        if posterior not in POSTERIORS:
            raise ProgramError(f"posterior={posterior!r} is unknown; known: {list(POSTERIORS)}")
        if latents < 2:
            raise ProgramError(f"latents={latents}: directions need 2 dimensions or more")
        if not start > 0:
            raise ProgramError(f"start={start!r}: the concentration has to start above 0")
        self.posterior = posterior
        own, apart = _networks(encoder)
        self.network = Network(own, shape)
        self.own_network = None if apart is None else Network(apart, shape)
        self.direction = nn.Linear(self.network.features, latents)
        sizes = [self.network.features, *widths] if self.own_network is None else [self.own_network.features]
        last = nn.Linear(sizes[-1], 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.concentration = nn.Sequential(*layers_of(sizes), last)
        self.register_buffer("log_start", torch.tensor(float(start)).log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Location (a unit vector for "vmf") `(…, m)` and concentration `(…)` of inputs `(…, *shape)`."""
        features = self.network(x)
        apart = features if self.own_network is None else self.own_network(x)
        location = self.direction(features)
        location = normalize(location, dim=-1) if self.posterior == "vmf" else location
        return location, (self.log_start + self.concentration(apart)[..., 0]).exp()

    def distribution(self, x: Tensor, draws: int | None = None) -> Any:
        """p(z | x) of inputs `(…, *shape)`: batch shape `(…)`, event shape `(m,)`.

        Args:
            x: inputs.
            draws: number of independent draws that are one event, of shape `(draws, m)`; None for event shape `(m,)`.
        """
        location, concentration = self(x)
        if draws is not None:
            location = location[..., None, :].expand(*location.shape[:-1], draws, -1)
            concentration = concentration[..., None].expand(*concentration.shape, draws)
        one = VonMisesFisher(location, concentration) if self.posterior == "vmf" else _normal(location, concentration)
        return one if draws is None else one.to_event(1)


def _normal(location: Tensor, concentration: Tensor) -> Any:
    return dist.Normal(location, concentration[..., None].rsqrt()).to_event(1)


def _networks(encoder: Encoder) -> tuple[Spec, Spec | None]:
    """The network of the direction, and that of the concentration if it has its own."""
    if not isinstance(encoder, Mapping) or "name" in encoder:
        return encoder, None
    if set(encoder) != {"direction", "concentration"}:
        raise ProgramError(
            f"encoder={encoder!r}: give {{'name': …, **arguments}} for one network, or {{'direction': network, "
            "'concentration': network} for two"
        )
    return encoder["direction"], encoder["concentration"]


class RepresentationModel(PyroModule):
    """A program whose inputs are represented by a vector and an uncertainty.

    Attributes:
        loss_kind: what the training loss −log p(y | x) is: "marginal" (log E p(y | z)), "elbo" (E log p(y | z)),
            "normalised" (a softmax of log E f, a quotient of expectations), "exact" (no latent), "none" (no density of
            any y).
    """

    loss_kind = "marginal"
    embedding: Any

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings `(n, m)` of inputs `(n, *shape)`: unit vectors μ(x), or e(x) of a Normal."""
        return by_rows(self, lambda rows: self.embedding(rows)[0], x)

    def uncertainty(self, x: Tensor) -> Tensor:
        """1/κ(x), `(n,)`, of inputs `(n, *shape)`; of a Normal, the variance of an entry."""
        return by_rows(self, lambda rows: 1 / self.embedding(rows)[1], x)


def by_rows(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of inputs in blocks of rows, without gradient and in `eval()`; the module's modes are restored.

    Raises:
        DataError: for inputs of another shape than that of the module's network, or values that are not finite.
    """
    shape = next((part.shape for part in module.modules() if isinstance(part, Network)), None)
    inputs = checked_inputs(x, shape, "this model")
    weight = next(module.parameters())
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            blocks = [
                function(rows.to(weight.device, weight.dtype if rows.is_floating_point() else rows.dtype))
                for rows in inputs.split(_ROWS)
            ]
    finally:
        for part, mode in modes.items():
            part.training = mode
    return torch.cat(blocks)
