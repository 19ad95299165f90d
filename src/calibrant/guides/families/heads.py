"""The head of a latent: it computes the parameters of its family from features and earlier latents."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from calibrant.guides.families.choosing import make_family


class Modulation(nn.Module):
    """Gain and offset of the features, from earlier latents and a short summary of the features themselves."""

    def __init__(self, features: int, parents: int, hidden: int = 64, summary: int = 16) -> None:
        super().__init__()
        self.summary = nn.Linear(features, summary)
        self.network = nn.Sequential(nn.Linear(parents + summary, hidden), nn.SiLU(), nn.Linear(hidden, 2 * features))
        self.damp = hidden**-0.5  # a step of Adam moves all gains at once: keep their sum from running away

    def forward(self, features: Tensor, parents: Tensor) -> Tensor:
        context = torch.cat([parents, self.summary(features).tanh()], -1)
        gain, offset = (self.damp * self.network(context)).chunk(2, -1)
        return features * (1 + gain) + offset

    def through(self, out: nn.Linear, features: Tensor, parents: Tensor) -> Tensor:
        """`out` of the modulated features, divided by their root number, for many parents of each datum.

        It is linear in the hidden layer, by a matrix that the features of the datum alone make: a draw then costs as
        much as that layer has units, not as there are features.

        Args:
            out: a linear map of features.
            features: `(size, features)`.
            parents: `(size · draws, parents)`, those of a datum in a row.
        """
        size, draws = len(features), len(parents) // len(features)
        summary = self.summary(features).tanh().repeat_interleave(draws, 0)
        first, activation, last = self.network.children()
        hidden = activation(first(torch.cat([parents, summary], -1))).reshape(size, draws, -1)
        weight = out.weight / features.shape[1] ** 0.5
        last_weight, last_bias = last.parameters()
        (gain, offset), (gain_bias, offset_bias) = last_weight.chunk(2), last_bias.chunk(2)
        slope = self.damp * ((weight * features[:, None]) @ gain + weight @ offset)
        start = features * (1 + self.damp * gain_bias) + self.damp * offset_bias
        raw = hidden @ slope.mT + (start @ weight.T + out.bias)[:, None]
        return raw.reshape(len(parents), -1)


class Regression(nn.Module):
    """Locations that are linear in earlier latents, by coefficients that the features change.

    B = diag(1 + a) W diag(1 + c) with a and c linear in the features; W is zero at the start.
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
    """Features and earlier latents → the distribution of one site.

    The earlier latents modulate the features (gain and offset), which contains the exact posterior mean and sd of a
    linear decoder under a given scale: products of functions of the scale with linear functions of the image.

    Args:
        features: number of features.
        parents: total number of entries of the earlier latents; 0 for none.
        event_shape: of the site.
        family: as `choose_family` names it.
        regression: locations are also linear in the earlier latents, so that heads one after the other make any joint
            Normal on the line.

    Attributes:
        width_on_line: number of entries that `to_line` gives.
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
        nn.init.normal_(self.out.weight, std=0.1)
        nn.init.zeros_(self.out.bias)
        self.modulation = Modulation(features, parents) if parents else None
        self.regression = Regression(features, parents, self.family.locations) if parents and regression else None
        center, width = self.family.start()
        self.register_buffer("center", center)
        self.register_buffer("width", width)

    @torch.no_grad()
    def set_prior(self, draws: Tensor) -> None:
        """Take the prior's location and scale from its draws `(n, *event_shape)`."""
        center, width = self.family.statistics(draws)
        self.center.copy_(center)
        self.width.copy_(width)

    def to_line(self, value: Tensor) -> Tensor:
        """A value of this site, standardised by its prior, `(size, width_on_line)`: what later heads see.

        Directions are unit vectors there, classes indicators of ±1.
        """
        return self.family.standardize(value, self.center, self.width)

    def forward(self, features: Tensor, parents: Tensor | None, size: int | None = None) -> dist.TorchDistribution:
        """The distribution of `size` rows; where there are fewer features, each datum's rows come one after another."""
        raw = self._raw(features, parents)
        if size is not None and len(raw) < size:
            raw = raw.repeat_interleave(size // len(raw), 0)
        if self.regression is not None and parents is not None:
            loc, others = raw[:, : self.family.locations], raw[:, self.family.locations :]
            raw = torch.cat([loc + self.regression(features, parents), others], -1)
        return self.family.build(raw, self.center, self.width)

    def _raw(self, features: Tensor, parents: Tensor | None) -> Tensor:
        if self.modulation is not None and parents is not None:
            if len(parents) > len(features):
                return self.modulation.through(self.out, features, parents)
            features = self.modulation(features, parents)
        # Divided by √features, so that a step of Adam moves the outputs equally whatever the width of the encoder.
        return self.out(features / features.shape[1] ** 0.5)
