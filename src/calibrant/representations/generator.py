"""Problems whose representation posterior is known: p(z|x) = vMF(μ(x), κ(x)) with given networks μ and κ.

The generator is that of the controlled experiment of MCInfoNCE (Kirchhof et al. 2023, arXiv 2302.02865): x is uniform
on a cube, μ and κ are small random networks, and two latents match with probability σ(k z₁·z₂ + log C(k) − log C(0)).
The network of μ is smoothed, so that distances of directions follow those of x, and drawn again until it spreads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibrant.data.dataset import Data
from calibrant.distributions.directional import VonMisesFisher
from calibrant.distributions.matching import match_constant, match_probability
from calibrant.errors import DataError
from calibrant.streams import stream

_SCALED = 1000  # values of x on which concentrations are scaled, and the spread of the directions is judged
_WIDEST = 0.5  # cosine that the two most distant directions must reach
_ATTEMPTS = 100


class Generator(nn.Module):
    """A known representation posterior p(z|x) = vMF(μ(x), κ(x)) for x uniform on a cube.

    Args:
        latents: m, the dimension of the latents, 2 or more.
        features: number of entries of x.
        concentrations: least and largest κ over 1,000 values of x, exactly; others can lie a little outside.
        slope: k, by which a match depends on the cosine of two latents.
        smoothing: number of steps by which the network of μ is smoothed; the paper takes 5,000.
        seed: random seed for the networks.

    Raises:
        DataError: if no network spreads enough, which smoothing prevents, or for concentrations that are not in order.
    """

    gain: Tensor
    shift: Tensor

    def __init__(
        self,
        latents: int = 10,
        features: int = 10,
        concentrations: tuple[float, float] = (16.0, 32.0),
        slope: float = 20.0,
        smoothing: int = 5000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < concentrations[0] < concentrations[1]:
            raise DataError(f"concentrations={concentrations}: give two positive numbers, the smaller one first")
        self.latents, self.features, self.slope = latents, features, slope
        self.mu, self.kappa, found = _networks(latents, features, smoothing, seed)
        with torch.no_grad():
            raw = nn.functional.softplus(self.kappa(found))
            low, high = (torch.tensor(end).log() for end in concentrations)
            gain = (high - low) / (raw.max() - raw.min())
            self.register_buffer("gain", gain)
            self.register_buffer("shift", high - gain * raw.max())
        self.requires_grad_(False).eval()

    def direction(self, x: Tensor) -> Tensor:
        """μ(x): unit vectors `(n, latents)`."""
        return nn.functional.normalize(self.mu(x), dim=-1)

    def concentration(self, x: Tensor) -> Tensor:
        """κ(x), `(n,)`."""
        return (self.gain * nn.functional.softplus(self.kappa(x))[..., 0] + self.shift).exp()

    def posterior(self, x: Tensor) -> VonMisesFisher:
        """p(z|x) of `x` `(n, features)`."""
        return VonMisesFisher(self.direction(x), self.concentration(x))

    def inputs(self, count: int, seed: int) -> Tensor:
        """Draws of x, `(count, features)`, uniform on the unit cube."""
        return torch.rand(count, self.features, generator=torch.Generator().manual_seed(stream(seed, "inputs")))

    def pairs(self, count: int, seed: int, near: float = 0.0) -> Data:
        """Pairs of inputs that are chosen without looking at latents, and whether their latents match.

        A likelihood of y given both inputs stays right however inputs are paired, as long as y takes no part in it.

        Args:
            count: number of pairs.
            seed: random seed for inputs, latents and matches.
            near: share of the pairs whose second input is the first one, moved in every entry by a Normal number of sd
                s, which is uniform between 0 and 1/2 and the same for all entries, and reflected at the faces of the
                cube; the others are independent. Both inputs of all pairs are uniform.

        Returns:
            Data with covariates `x` and `other` and the observed site `y`.
        """
        x, other = self.inputs(count, stream(seed, "x")), self.inputs(count, stream(seed, "other"))
        generator = torch.Generator().manual_seed(stream(seed, "near"))
        moves = torch.randn(x.shape, generator=generator) * torch.rand(count, 1, generator=generator) / 2
        chosen = torch.rand(count, 1, generator=generator) < near
        other = torch.where(chosen, 1 - ((x + moves) % 2 - 1).abs(), other)
        y = torch.bernoulli(self.match(x, other), generator=torch.Generator().manual_seed(stream(seed, "y")))
        return Data({"y": y.float()}, {"x": x, "other": other}, name="pairs of a known representation")

    @torch.no_grad()
    def tuples(self, count: int, seed: int, negatives: int = 32) -> Data:
        """Tuples by rejection, as the published experiment has them: a reference, a partner that matches, and others.

        The latent of a reference is drawn once, and partners are drawn until they match it, or do not. Selecting by
        matches changes the share of matches, so that the known constant of the pair model no longer holds.

        Args:
            count: number of tuples.
            seed: random seed for all draws.
            negatives: number of partners that do not match.

        Returns:
            Data with covariates `x` `(count, features)` and `candidates` `(count, 1 + negatives, features)`, of which
            the first one matches, and the observed site `y`, which is 1.
        """
        x = self.inputs(count, stream(seed, "x"))
        with torch.random.fork_rng():
            torch.manual_seed(stream(seed, "latents"))
            z = self.posterior(x).sample()
            positive = self._partners(z[:, None], 1.0)
            others = self._partners(z[:, None].expand(-1, negatives, -1), 0.0)
        covariates = {"x": x, "candidates": torch.cat([positive, others], 1)}
        return Data({"y": torch.ones(count)}, covariates, name="tuples of a known representation")

    def _partners(self, z: Tensor, wanted: float) -> Tensor:
        """Inputs `(n, k, features)` whose latents match `z` `(n, k, m)`, or do not: the first one of each that does."""
        flat, found = z.reshape(-1, self.latents), torch.zeros(z[..., 0].numel(), self.features)
        left = torch.arange(len(flat))
        offset = match_constant(self.latents, self.slope)
        while len(left):
            x = torch.rand(len(left), self.features)
            cosine = (self.posterior(x).sample() * flat[left]).sum(-1)
            done = torch.bernoulli((self.slope * cosine + offset).sigmoid()) == wanted
            found[left[done]] = x[done]
            left = left[~done]
        return found.reshape(*z.shape[:-1], self.features)

    @torch.no_grad()
    def match(self, x: Tensor, other: Tensor) -> Tensor:
        """The probability that latents of two inputs `(n, features)` match, `(n,)`, exact to 1e-6 up to κ of 256."""
        cosine = (self.direction(x) * self.direction(other)).sum(-1)
        first, second = (self.concentration(inputs).double() for inputs in (x, other))
        return match_probability(cosine.double(), first, second, self.latents, self.slope)


def _networks(latents: int, features: int, smoothing: int, seed: int) -> tuple[nn.Module, nn.Module, Tensor]:
    """The networks of direction and log concentration, and the inputs on which they are scaled."""
    with torch.random.fork_rng():
        for attempt in range(_ATTEMPTS):
            torch.manual_seed(stream(seed, "generator", attempt))
            width = features
            mu = nn.Sequential(
                nn.Linear(features, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(),
                nn.Linear(width, latents),
            )  # fmt: skip
            kappa = nn.Sequential(nn.Linear(features, width), nn.LeakyReLU(), nn.Linear(width, 1))
            _smooth(mu, features, smoothing)
            x = torch.rand(_SCALED, features)
            with torch.no_grad():
                directions = nn.functional.normalize(mu(x), dim=-1)
            if float((directions @ directions.T).min()) <= _WIDEST:
                return mu, kappa, x
    raise DataError(f"no network of {_ATTEMPTS} has directions apart: give smoothing= a number of steps, such as 1000")


def _smooth(network: nn.Module, features: int, steps: int) -> None:
    """Bring 1 − cos/2 of the directions of two inputs near to the distance of the inputs, most of all for near ones.

    As in the published code: means over all pairs of a batch of 64, a pair with itself included.
    """
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    row, column = torch.tril_indices(64, 64)
    for _ in range(steps):
        x = torch.rand(64, features)
        z = nn.functional.normalize(network(x), dim=-1)
        wanted, there = torch.cdist(x, x)[row, column], 1 - (z @ z.T)[row, column] / 2
        loss = ((wanted - there).square() * (2**0.5 - there.detach()) ** 4).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
