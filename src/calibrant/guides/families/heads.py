"""Heads, which compute the parameters of the family of a latent from features and earlier latents."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from calibrant.guides.families.choosing import make_family

_REACH = 2.0  # most that a network changes outputs of a head whose location and scale are nearly known
_WHOLE = 1.8  # output at which a scale is the known one


class Modulation(nn.Module):
    """Multiplies features by a gain and adds an offset; both are functions of earlier latents and of a short summary of
    the features."""

    def __init__(self, features: int, parents: int, hidden: int = 64, summary: int = 16) -> None:
        super().__init__()
        self.summary = nn.Linear(features, summary)
        self.network = nn.Sequential(nn.Linear(parents + summary, hidden), nn.SiLU(), nn.Linear(hidden, 2 * features))
        self.damp = hidden**-0.5  # a step of Adam moves all gains at once, which would change their sum too fast

    def forward(self, features: Tensor, parents: Tensor) -> Tensor:
        context = torch.cat([parents, self.summary(features).tanh()], -1)
        gain, offset = (self.damp * self.network(context)).chunk(2, -1)
        return features * (1 + gain) + offset

    def through(self, out: nn.Linear, divisor: float, features: Tensor, parents: Tensor) -> Tensor:
        """`out` applied to the modulated features divided by `divisor`, for many draws of the parents.

        The result is linear in the hidden layer, with a matrix that depends only on the features of the datum. So the
        cost of a draw is proportional to the size of this layer, not to the number of features.

        Args:
            out: a linear map of features.
            divisor: the number by which the features are divided.
            features: `(size, features)`.
            parents: `(size · draws, parents)`; the rows of a datum are consecutive.
        """
        size, draws = len(features), len(parents) // len(features)
        summary = self.summary(features).tanh().repeat_interleave(draws, 0)
        first, activation, last = self.network.children()
        hidden = activation(first(torch.cat([parents, summary], -1))).reshape(size, draws, -1)
        weight = out.weight / divisor
        last_weight, last_bias = last.parameters()
        (gain, offset), (gain_bias, offset_bias) = last_weight.chunk(2), last_bias.chunk(2)
        slope = self.damp * ((weight * features[:, None]) @ gain + weight @ offset)
        start = features * (1 + self.damp * gain_bias) + self.damp * offset_bias
        raw = hidden @ slope.mT + (start @ weight.T + out.bias)[:, None]
        return raw.reshape(len(parents), -1)


class Regression(nn.Module):
    """Locations that are linear in earlier latents, with coefficients that depend on the features.

    The coefficients are B = diag(1 + a) W diag(1 + c), with a and c linear in the features; W is zero at first.
    """

    def __init__(self, features: int, parents: int, locations: int) -> None:
        super().__init__()
        self.slopes = nn.Linear(parents, locations, bias=False)
        self.gains = nn.Linear(features, parents + locations)
        self.sizes, self.damp = (parents, locations), parents**-0.5
        for weight in (self.slopes.weight, self.gains.weight, self.gains.bias):
            nn.init.zeros_(weight)

    def forward(self, features: Tensor, parents: Tensor) -> Tensor:
        gains = self.gains(features / features.shape[1] ** 0.5).repeat_interleave(len(parents) // len(features), 0)
        before, after = gains.split(self.sizes, -1)
        return (1 + after) * self.slopes(self.damp * (1 + before) * parents)


class Head(nn.Module):
    """Computes the distribution of one site from features and earlier latents.

    The earlier latents modulate the features (gain and offset). This can represent the exact posterior mean and sd
    under a linear decoder with a given scale, which are products of functions of the scale and linear functions of the
    image.

    Args:
        features: number of features.
        parents: total number of entries of the earlier latents; 0 if there are none.
        event_shape: event shape of the site.
        family: text that `choose_family` returns.
        regression: whether locations are also linear in the earlier latents, so that a sequence of heads can represent
            any joint Normal in unconstrained space.

    Attributes:
        width_on_line: number of entries that `to_line` returns.
    """

    center: Tensor
    width: Tensor

    def __init__(
        self, features: int, parents: int, event_shape: tuple[int, ...], family: str, regression: bool = False
    ) -> None:
        super().__init__()
        self.family = make_family(family, torch.Size(event_shape))
        self.width_on_line = self.family.width_on_line
        self.out = nn.Linear(features, self.family.raw)
        # The division makes the effect of an Adam step on the outputs independent of the number of features.
        self.divisor = 1.0 if self.family.is_plain else features**0.5
        if not self.family.is_plain:
            nn.init.normal_(self.out.weight, std=0.1)
            nn.init.zeros_(self.out.bias)
        self.modulation = Modulation(features, parents) if parents else None
        self.regression = Regression(features, parents, self.family.locations) if parents and regression else None
        center, width = self.family.start()
        self.register_buffer("center", center)
        self.register_buffer("width", width)

    @torch.no_grad()
    def set_prior(self, draws: Tensor) -> None:
        """Set location and scale of the prior from draws of it, `(n, *event_shape)`."""
        center, width = self.family.statistics(draws)
        self.center.copy_(center)
        self.width.copy_(width)

    def to_line(self, value: Tensor) -> Tensor:
        """A value of the site in unconstrained space, standardised by its prior, `(size, width_on_line)`.

        Later heads see it in this form. Directions become unit vectors, and classes become indicators of ±1.
        """
        return self.family.standardize(value, self.center, self.width)

    def forward(self, features: Tensor, parents: Tensor | None, size: int | None = None) -> dist.TorchDistribution:
        """The distribution for `size` rows; with fewer rows of features, the rows of a datum are consecutive."""
        raw = self._raw(features, parents)
        if size is not None and len(raw) < size:
            raw = raw.repeat_interleave(size // len(raw), 0)
        if self.regression is not None and parents is not None:
            loc, others = raw[:, : self.family.locations], raw[:, self.family.locations :]
            raw = torch.cat([loc + self.regression(features, parents), others], -1)
        return self.family.build(raw, self.center, self.width)

    def around(self, features: Tensor, center: Tensor, width: Tensor, size: int) -> dist.TorchDistribution:
        """The distribution for `size` rows near a location and a scale on the line that are nearly right.

        The network moves the location by two scales at most, and changes the scale by a factor of six at most, so that
        it does little harm for data that are unlike those of its training.

        Args:
            features: `(rows, features)`; with fewer rows than `size`, the rows of a datum are consecutive.
            center: location on the line, `(rows, *line_shape)`.
            width: scale on the line, `(rows, *line_shape)`.
            size: number of rows of the distribution.
        """
        raw = _REACH * torch.tanh(self._raw(features, None) / _REACH)
        loc, scale, others = raw.tensor_split([self.family.locations, 2 * self.family.locations], dim=1)
        found = torch.cat([loc, scale + _WHOLE, others], -1), center, width
        return self.family.build(*(part.repeat_interleave(size // len(features), 0) for part in found))

    def _raw(self, features: Tensor, parents: Tensor | None) -> Tensor:
        if self.modulation is not None and parents is not None:
            if len(parents) > len(features):
                return self.modulation.through(self.out, self.divisor, features, parents)
            features = self.modulation(features, parents)
        return self.out(features / self.divisor)
