"""Programs whose posterior can be sampled exactly, and guides with planted defects, in batches of plain tensors.

Draws are `(draws, data, latents)`, observations `(data, pixels)`, log densities `(draws, data)`: those of a program up
to a constant for every datum, those of all its guides up to one constant. Nothing here knows of checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.special import ndtr, ndtri

LOW = 0.3  # the share of the data that is called low in contrast
NARROW = 0.7  # how much too narrow a guide is there
_PILOT = 100_000


class Guide(Protocol):
    """What stands in for a posterior."""

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draws for every datum, and their log density."""

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        """The log density of any latents."""


class Problem(Protocol):
    """A program with an exact sampler of its posterior.

    Attributes:
        sites: site → how many entries it has, None for a number.
        guides: defect → guide; "exact" is the posterior.
    """

    sites: Mapping[str, int | None]
    guides: Mapping[str, Guide]

    def simulate(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Latents `(data, latents)` of the prior, and what they make."""

    def log_prior(self, theta: Tensor) -> Tensor:
        """Of latents `(draws, data, latents)`."""

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """Of the same."""


def _normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32).double()


def _square(values: Tensor) -> Tensor:
    """Squared length; a product with ones is several times faster than a sum over few entries."""
    return values.square() @ torch.ones(values.shape[-1], dtype=torch.float64)


def _whitened(values: Tensor, root: Tensor) -> Tensor:
    """Values `(…, n)` in units of a Cholesky factor."""
    return values @ torch.linalg.inv(root).T


def low_threshold(x: Tensor) -> float:
    """The norm below which data are low in contrast, from many `(data, pixels)`."""
    return float(x.norm(dim=1).quantile(LOW))


def contrast_factor(x: Tensor, threshold: float) -> Tensor:
    """The sd of a guide whose 90% intervals are right on average and too narrow at low contrast, `(data, 1)`."""
    inside = 2 * ndtr(torch.tensor([NARROW * 1.6448536])) - 1
    elsewhere = (0.9 - LOW * inside) / (1 - LOW)
    wide = float(ndtri((1 + elsewhere) / 2)) / 1.6448536
    return torch.where(x.norm(dim=1, keepdim=True) < threshold, NARROW, wide)


# -- linear and Gaussian -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Affine:
    """Independent noise, through a matrix: N(gain x + shift, factor² root rootᵀ), or uniform noise of the same sd."""

    gain: Tensor  # (latents, pixels)
    root: Tensor
    shift: Tensor
    factor: Callable[[Tensor], Tensor] | None = None
    uniform: bool = False

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Guide`."""
        shape = (draws, len(x), len(self.root))
        noise = _normal(shape, generator)
        if self.uniform:
            noise = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * math.sqrt(3)
        spread = noise @ self.root.T
        if self.factor is not None:
            spread *= self.factor(x)
        return self._centre(x) + spread, self._of_noise(noise) - self._log_det(x)

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Guide`."""
        noise = _whitened(theta - self._centre(x), self.root)
        scaled = noise / self.factor(x) if self.factor is not None else noise
        return self._of_noise(scaled) - self._log_det(x)

    def _log_det(self, x: Tensor) -> Tensor:
        found = self.root.diagonal().log().sum().expand(len(x))
        return found if self.factor is None else found + len(self.root) * self.factor(x)[:, 0].log()

    def _centre(self, x: Tensor) -> Tensor:
        return x @ self.gain.T + self.shift

    def _of_noise(self, noise: Tensor) -> Tensor:
        if self.uniform:
            density = noise.shape[-1] * 0.5 * math.log(2 * math.pi / 12)  # relative to a Normal's at its mean
            return torch.where((noise.abs() <= math.sqrt(3)).all(-1), density, -math.inf)
        return -0.5 * _square(noise)


class LinearGaussian:
    """z ~ N(0, C), x ~ N(W z, R).

    Args:
        prior_root: Cholesky factor of C.
        weights: W, `(pixels, latents)`.
        noise_root: Cholesky factor of R.
    """

    def __init__(self, prior_root: Tensor, weights: Tensor, noise_root: Tensor) -> None:
        self.prior_root, self.weights, self.noise_root = prior_root, weights, noise_root
        latents = len(prior_root)
        self.sites = {"z": latents}
        in_noise = torch.linalg.solve_triangular(noise_root, weights, upper=False)
        precision = torch.cholesky_inverse(prior_root) + in_noise.T @ in_noise
        covariance = torch.linalg.inv(precision)
        gain = covariance @ weights.T @ torch.cholesky_inverse(noise_root)
        sd = covariance.diagonal().sqrt()
        threshold = low_threshold(self.simulate(_PILOT, Generator().manual_seed(0))[1])
        exact = Affine(gain, torch.linalg.cholesky(covariance), torch.zeros_like(sd))
        one = torch.ones(latents, 1, dtype=torch.float64)
        one[0] = 0.7
        self.guides = {
            "exact": exact,
            **{f"sd × {f}": replace(exact, root=f * exact.root) for f in (0.9, 0.8, 1.1, 1.25)},
            **{f"mean + {m} sd": replace(exact, shift=m * sd) for m in (0.1, 0.3)},
            "correlation ignored": replace(exact, root=sd.diag()),
            "prior as posterior": Affine(0 * gain, prior_root, exact.shift),
            "low contrast": replace(exact, factor=lambda x: contrast_factor(x, threshold)),
            "tails lost": replace(exact, uniform=True),
            "one latent × 0.7": replace(exact, root=one * exact.root),
        }

    def simulate(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        z = _normal((size, len(self.prior_root)), generator) @ self.prior_root.T
        return z, z @ self.weights.T + _normal((size, len(self.weights)), generator) @ self.noise_root.T

    def log_prior(self, theta: Tensor) -> Tensor:
        """See `Problem`."""
        return -0.5 * _square(_whitened(theta, self.prior_root))

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Problem`."""
        expected = theta @ _whitened(self.weights.T, self.noise_root)
        return -0.5 * _square(_whitened(x, self.noise_root) - expected)


RHO = 0.8


def pair() -> LinearGaussian:
    """Two latents whose prior, noise and posterior have correlation 0.8; the posterior is N(x / 2, C / 2)."""
    root = torch.tensor([[1.0, 0.0], [RHO, math.sqrt(1 - RHO**2)]], dtype=torch.float64)
    return LinearGaussian(root, torch.eye(2, dtype=torch.float64), root)


def ppca() -> LinearGaussian:
    """16 latents, 24 pixels, noise of half the signal's sd."""
    weights = _normal((24, 16), Generator().manual_seed(1)) / 4
    return LinearGaussian(torch.eye(16, dtype=torch.float64), weights, 0.5 * torch.eye(24, dtype=torch.float64))


# -- two modes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfNormals:
    """The posterior of z ~ N(0, 1), x ~ N(|z|, noise): a truncated Normal on either side of zero, or on one."""

    noise: float
    both: bool

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Guide`."""
        mean, sd = self._moments(x)
        shape = (draws, len(x))
        tail = torch.rand(shape, generator=generator, dtype=torch.float64).clamp_min(1e-300) * ndtr(mean / sd)
        size = (mean - sd * ndtri(tail)).clamp_min(1e-12)
        sign = 1.0
        if self.both:
            sign = 2.0 * torch.randint(2, shape, generator=generator, dtype=torch.float64) - 1.0
        theta = (sign * size)[..., None]
        return theta, self.log_q(theta, x)

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Guide`."""
        mean, sd = self._moments(x)
        density = -0.5 * ((theta[..., 0].abs() - mean) / sd).square()
        return density if self.both else torch.where(theta[..., 0] > 0, density + math.log(2), -math.inf)

    def _moments(self, x: Tensor) -> tuple[Tensor, float]:
        return x[:, 0] / (1 + self.noise**2), self.noise / math.sqrt(1 + self.noise**2)


class TwoModes:
    """z ~ N(0, 1), x ~ N(|z|, noise)."""

    def __init__(self, noise: float = 0.5) -> None:
        self.noise, self.sites = noise, {"z": None}
        self.guides = {"exact": HalfNormals(noise, True), "missing mode": HalfNormals(noise, False)}

    def simulate(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        z = _normal((size, 1), generator)
        return z, z.abs() + self.noise * _normal((size, 1), generator)

    def log_prior(self, theta: Tensor) -> Tensor:
        """See `Problem`."""
        return -0.5 * theta[..., 0].square()

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Problem`."""
        return -0.5 * ((x[:, 0] - theta[..., 0].abs()) / self.noise).square()


# -- a scale -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScaleGuide:
    """The posterior of a Gaussian scale mixture with an affine change of the log scale; given it, `y` is exact.

    log s is drawn by inverting the integral of its posterior density over a grid.
    """

    program: ScaleMixture
    factor: Callable[[Tensor], Tensor] | float = 1.0
    shift: float = 0.0
    prior: bool = False

    def draw(self, x: Tensor, draws: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Guide`."""
        shape = (draws, len(x), len(self.program.gains))
        if self.prior:
            log_scale = self.program.prior_sd * _normal(shape[:2], generator)
            y = _normal(shape, generator)
        else:
            log_scale = self._changed(self._exact(x, draws, generator), x)
            mean, precision = self.program.coefficients(log_scale, x)
            y = mean + _normal(shape, generator) / precision.sqrt()
        theta = torch.cat([log_scale.exp()[..., None], y], -1)
        return theta, self.log_q(theta, x)

    def log_q(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Guide`."""
        if self.prior:
            return self.program.log_prior(theta) - math.log(self.program.prior_sd) - 0.5 * math.log(2 * math.pi)
        log_scale = theta[..., 0].log()
        mean, precision = self.program.coefficients(log_scale, x)
        given = 0.5 * (precision.log() - precision * (theta[..., 1:] - mean).square()).sum(-1)
        factor = self._affine(x)[2]
        stretch = factor.log() if isinstance(factor, Tensor) else math.log(factor)
        before = self.program.log_scale_posterior(self._back(log_scale, x), x)
        return before - self.program.log_total(x) - stretch - log_scale + given

    def _exact(self, x: Tensor, draws: int, generator: Generator) -> Tensor:
        cumulated, _, _ = self.program.on_grid(x)
        u = torch.rand(len(x), draws, generator=generator, dtype=torch.float64)
        place = torch.searchsorted(cumulated, u).clamp(1, len(self.program.grid) - 1)
        low, high = cumulated.gather(1, place - 1), cumulated.gather(1, place)
        step = self.program.grid[1] - self.program.grid[0]
        return (self.program.grid[place - 1] + step * (u - low) / (high - low).clamp_min(1e-300)).T

    def _changed(self, log_scale: Tensor, x: Tensor) -> Tensor:
        centre, sd, factor = self._affine(x)
        return centre + factor * (log_scale - centre) + self.shift * sd

    def _back(self, log_scale: Tensor, x: Tensor) -> Tensor:
        centre, sd, factor = self._affine(x)
        return centre + (log_scale - centre - self.shift * sd) / factor

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        _, centre, sd = self.program.on_grid(x)
        return centre, sd, self.factor(x)[:, 0] if callable(self.factor) else self.factor


class ScaleMixture:
    """s ~ LogNormal(0, prior_sd), y ~ N(0, I), x ~ N(s A y, noise²), in the basis of A's singular vectors."""

    def __init__(self, noise: float = 0.5, prior_sd: float = 0.7) -> None:
        self.noise, self.prior_sd = noise, prior_sd
        self.gains = torch.tensor([2.0, 1.5, 1.0, 0.7], dtype=torch.float64)
        self.grid = torch.linspace(-6 * prior_sd, 6 * prior_sd, 400, dtype=torch.float64)
        self.sites = {"scale": None, "y": len(self.gains)}
        threshold = low_threshold(self.simulate(_PILOT, Generator().manual_seed(0))[1])
        exact = ScaleGuide(self)
        self.guides = {
            "exact": exact,
            **{f"sd × {f}": replace(exact, factor=f) for f in (0.8, 1.25)},
            "mean + 0.3 sd": replace(exact, shift=0.3),
            "prior as posterior": replace(exact, prior=True),
            "low contrast": replace(exact, factor=lambda x: contrast_factor(x, threshold)),
        }

    def simulate(self, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """See `Problem`."""
        scale = (self.prior_sd * _normal((size, 1), generator)).exp()
        y = _normal((size, len(self.gains)), generator)
        x = scale * self.gains * y + self.noise * _normal((size, len(self.gains)), generator)
        return torch.cat([scale, y], 1), x

    def log_prior(self, theta: Tensor) -> Tensor:
        """See `Problem`."""
        log_scale = theta[..., 0].log()
        return -0.5 * ((log_scale / self.prior_sd).square() + _square(theta[..., 1:])) - log_scale

    def log_likelihood(self, theta: Tensor, x: Tensor) -> Tensor:
        """See `Problem`."""
        signal = theta[..., :1] * self.gains * theta[..., 1:]
        return -0.5 * _square((x - signal) / self.noise)

    def coefficients(self, log_scale: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and precision of `y` given the scale, `(draws, data, latents)`."""
        signal = log_scale.exp()[..., None] * self.gains
        precision = 1 + (signal / self.noise).square()
        return signal * x / self.noise**2 / precision, precision

    def log_scale_posterior(self, log_scale: Tensor, x: Tensor) -> Tensor:
        """Log density of log s given x, `(draws, data)`."""
        variance = (log_scale.exp()[..., None] * self.gains).square() + self.noise**2
        evidence = -0.5 * (x.square() / variance + variance.log()).sum(-1)
        return evidence - 0.5 * (log_scale / self.prior_sd).square()

    def log_total(self, x: Tensor) -> Tensor:
        """Log of the integral of `log_scale_posterior` over log s, `(data,)`."""
        step = self.grid[1] - self.grid[0]
        return self.log_scale_posterior(self.grid[:, None].expand(-1, len(x)), x).logsumexp(0) + step.log()

    def on_grid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Distribution function of log s given x on the grid, `(data, grid)`, and its mean and sd."""
        density = self.log_scale_posterior(self.grid[:, None].expand(-1, len(x)), x).T.softmax(1)
        middle = (density[:, 1:] + density[:, :-1]) / 2
        cumulated = torch.cat([torch.zeros(len(x), 1, dtype=torch.float64), middle.cumsum(1)], 1)
        mean = density @ self.grid
        sd = (density @ self.grid.square() - mean.square()).clamp_min(1e-12).sqrt()
        return cumulated / cumulated[:, -1:], mean, sd


PLANTED: dict[str, Callable[[], Problem]] = {
    "pair": pair,
    "two modes": TwoModes,
    "gsm": ScaleMixture,
    "ppca": ppca,
}
