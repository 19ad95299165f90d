"""Exact posteriors of Gaussian models and of Gaussian models with one positive random scale (Gaussian scale mixtures).

`solve` takes the structure of a program, which has been compared with the density of the program, and returns the
posterior of every datum: in closed form if there is no scale, otherwise by quadrature over the logarithm of the scale,
given which everything is Gaussian.

In units of the noise and in the coordinates of a singular value decomposition, a datum given its scale s is a set of
independent problems u = s (shift + gain c) + N(0, 1) with c ~ N(0, 1), so that a node of the quadrature costs O(k).
The range of the quadrature is found for every datum: a scan over all scales that float64 can represent, followed by
zooms to the interval where the integrand is within 40 nats of its maximum. The trapezoidal rule for an analytic
integrand that vanishes at both ends converges faster than any power of the step; `grid_error` is the change of the
result if every second node is dropped.
"""

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from calibrant.errors import InferenceError
from calibrant.linear_gaussian.density import (
    MARGIN,
    covariance_root,
    flatten,
    float64,
    log_prior,
    names_of,
    support,
    univariate,
)
from calibrant.linear_gaussian.parameters import LinearGaussian, split
from calibrant.linear_gaussian.spectrum import Images, Spectrum, log_likelihood, project, spectrum_of

_SCAN_NODES = 2049  # nodes of the scan over all scales, half an e-fold apart
_ZOOM_NODES = 129  # nodes of one zoom
_ZOOM_ROUNDS = 60  # zooms at most
_ZOOM_GAIN = 0.8  # zoom again while the range shrinks to less than this share
_GRID_NODES = 1025  # nodes of the quadrature; odd, so that halving keeps both ends
_DROP = 40.0  # nats below the maximum at which the integrand is cut off
_SHARP = 2.0  # nats below the maximum that bound the densest part of the grid
_LOG_SMALLEST = -700.0  # log of the smallest scale: float64 holds no normal number below e^-708
_LOG_LARGEST = 345.0  # log of the largest scale times gain: its square is still finite
_CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}  # numbers in a temporary tensor: fits into caches, occupies a GPU


class _System(NamedTuple):
    """A structure in float64, in units of the noise, with coordinates c ~ N(0, I) of the block: z = mean + basis c."""

    noise: Tensor  # (pixels,)
    offset: Tensor  # (pixels,)
    spectrum: Spectrum  # with k singular values; zeros beyond the number of pixels
    basis: Tensor  # (k, k)
    mean: Tensor  # (k,)
    log_norm: Tensor  # (): log normalising constant of the noise
    prior: Distribution | None
    limits: tuple[float, float]  # lower and upper limit of log s
    bounded: tuple[bool, bool]  # whether each limit is a bound of the prior's support, not of float64


class _Grid(NamedTuple):
    """Nodes log s = centre + width sinh(start + step j) with the unnormalised log density of the grid variable."""

    centre: Tensor  # (data,)
    width: Tensor  # (data,)
    start: Tensor  # (data,)
    step: Tensor  # (data,)
    log_density: Tensor  # (data, nodes)

    def log_scale(self, position: Tensor) -> Tensor:
        """log s at positions (data, n), in units of nodes from the first node."""
        u = self.start[:, None] + self.step[:, None] * position
        return self.centre[:, None] + self.width[:, None] * torch.sinh(u)

    def nodes(self) -> Tensor:
        """log s at the nodes, (data, nodes)."""
        count = self.log_density.shape[1]
        return self.log_scale(torch.arange(count, dtype=torch.float64, device=self.step.device)[None])

    def log_jacobian(self, log_scale: Tensor) -> Tensor:
        """log of d log s / du = width cosh u, at log s."""
        width = self.width[:, None]
        return torch.hypot(width, log_scale - self.centre[:, None]).log()


class _Moments(NamedTuple):
    """Posterior moments, computed from all nodes (index 0 of dimension 1) and from every second node (index 1)."""

    log_evidence: Tensor  # (data, 2)
    scale_mean: Tensor  # (data, 2)
    scale_sd: Tensor  # (data, 2)
    latent_mean: Tensor  # (data, 2, k)
    latent_sd: Tensor  # (data, 2, k)


@dataclass(frozen=True, eq=False)
class ExactPosterior:
    """The exact posterior of every datum, as `solve` returns it.

    Attributes:
        structure: the structure of the program.
        log_evidence: (data,), nats.
        grid_error: (data,), the largest change, when every second node is dropped, of the log evidence (nats), the
            means (in posterior standard deviations) and the standard deviations (relative) of the scale and of each
            latent coordinate; at least the mass that is cut off at the smallest and largest scale that float64 can
            represent. It is zero for closed forms.
        mean: site → posterior means, (data, *event).
        sd: site → posterior standard deviations, (data, *event).
    """

    structure: LinearGaussian
    log_evidence: Tensor
    grid_error: Tensor
    mean: dict[str, Tensor]
    sd: dict[str, Tensor]
    _system: _System = field(repr=False)
    _images: Images = field(repr=False)
    _grid: _Grid = field(repr=False)

    def covariance(self, datum: int) -> Tensor:
        """Posterior covariance of the block of Gaussian latents for one datum, (k, k)."""
        row = torch.tensor([datum], device=self._images.along.device)
        images, grid = _rows(self._images, row), _rows(self._grid, row)
        weights, _ = _weights(grid)
        mean, variance = _conditional(self._system, images, grid.nodes().exp())
        weight = weights[0, 0]
        centred = (mean[0] - weight @ mean[0]) * weight.sqrt()[:, None]
        inner = centred.T @ centred + torch.diag(weight @ variance[0])
        return self._system.basis @ inner @ self._system.basis.T

    def sample(self, chains: int, draws: int, seed: int | torch.Generator) -> dict[str, Tensor]:
        """Independent draws from the joint posterior of scale and latents.

        Args:
            chains: number of chains; all draws are independent, in one chain or several.
            draws: number of draws per chain.
            seed: an integer, giving the same draws on every device, or a generator, used where it lives.

        Returns:
            site → draws, (chains, draws, data, *event), in float64.
        """
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
        (size, latents), count = self._images.along.shape, chains * draws
        z = self._images.along.new_empty(count, size, latents)
        s = self._images.along.new_empty(count, size)
        for rows in _chunks(self._images.along, count * latents):
            s[:, rows], z[:, rows] = self._draw(rows, count, generator)
        values = split(z.unflatten(0, (chains, draws)), self.structure.latents)
        if self.structure.scale is not None:
            values[self.structure.scale] = s.unflatten(0, (chains, draws))
        return values

    def _draw(self, rows: slice, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`count` draws of s, (count, data), and of z, (count, data, k), for some data."""
        images, grid = _rows(self._images, rows), _rows(self._grid, rows)
        size, latents = images.along.shape
        options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": generator.device}
        # One call per datum, so that the draws do not depend on how the data are split into chunks.
        noise = [(torch.rand(count, **options), torch.randn(count, latents, **options)) for _ in range(size)]
        uniform, normal = (torch.stack(parts).to(images.along.device) for parts in zip(*noise, strict=True))
        s = _inverse_cdf(grid, uniform)
        mean, variance = _conditional(self._system, images, s)
        c = normal.mul_(variance.sqrt_()).add_(mean)
        return s.T, (c @ self._system.basis.T + self._system.mean).transpose(0, 1)


def solve(structure: LinearGaussian, x: Tensor) -> ExactPosterior:
    """The exact posterior of every datum under a Gaussian model or a Gaussian scale mixture.

    Args:
        structure: structure of the model, from `linear_gaussian.detect`.
        x: (data, *event), any floating-point type; the computation runs on the device of `x`.

    Returns:
        Evidence, moments and a sampler, in float64; the memory for temporary tensors does not grow with the data.

    Raises:
        InferenceError: for `x` of another size or not finite, noise that is not positive, a matrix that is not a
            covariance, a prior whose support is not positive, an evidence that is not finite.
    """
    x = flatten(structure, x)
    system = _whiten(structure, x.device)
    nodes = _SCAN_NODES if system.prior is not None else 1
    parts = [_solve_part(system, x[rows]) for rows in _chunks(x, max(nodes * len(system.spectrum.gain), x.shape[1]))]
    images, grid, moments, error = (_join(column) for column in zip(*parts, strict=True))
    log_evidence = moments.log_evidence[:, 0]
    if not log_evidence.isfinite().all():
        datum = int((~log_evidence.isfinite()).nonzero()[0])
        raise InferenceError(
            f"The evidence of datum {datum} is {log_evidence[datum].item()}: the prior of the scale or the pixels are "
            "beyond what float64 can integrate; rescale the data, or give the scale another prior."
        )
    mean = split(moments.latent_mean[:, 0] + system.mean, structure.latents)
    sd = split(moments.latent_sd[:, 0], structure.latents)
    if structure.scale is not None:
        mean[structure.scale], sd[structure.scale] = moments.scale_mean[:, 0], moments.scale_sd[:, 0]
    return ExactPosterior(structure, log_evidence, error, mean, sd, system, images, grid)


def _whiten(structure: LinearGaussian, device: torch.device) -> _System:
    loading, noise, offset, shift, mean, covariance = float64(structure, device)
    pixels, latents = loading.shape
    factor = covariance_root(covariance, names_of(structure))
    u, d, vh = torch.linalg.svd(loading @ factor / noise[:, None], full_matrices=latents > pixels)
    missing = (0, max(latents - pixels, 0))
    u, d = torch.nn.functional.pad(u, missing), torch.nn.functional.pad(d, missing)
    whitened = (shift + loading @ mean) / noise
    prior, limits, bounded = None, (0.0, 0.0), (True, True)
    if structure.scale is not None:
        prior = univariate(structure, device)
        low, high = support(prior)
        largest = _LOG_LARGEST - math.log(max(1.0, float(d.max()), float(whitened.norm())))
        bounded = low > 0, high < math.inf
        limits = (
            math.log(low) + MARGIN if bounded[0] else _LOG_SMALLEST,
            math.log(high) - MARGIN if bounded[1] else largest,
        )
    log_norm = -noise.log().sum() - 0.5 * pixels * math.log(2 * math.pi)
    return _System(noise, offset, spectrum_of(u, d, whitened), factor @ vh.T, mean, log_norm, prior, limits, bounded)


def _solve_part(system: _System, x: Tensor) -> tuple[Images, _Grid, _Moments, Tensor]:
    images = project(system.spectrum, (x - system.offset) / system.noise)
    grid = _grid(system, images) if system.prior is not None else _single_node(system, images)
    moments = _moments(system, images, grid)
    error = torch.zeros_like(images.rest_energy)
    if system.prior is not None:
        error = torch.maximum(_halving_error(moments), _tail_mass(system, grid, moments))
    return images, grid, moments, error


def _log_integrand(system: _System, images: Images, log_scale: Tensor) -> Tensor:
    """log p(x, log s) at log_scale (data or 1, nodes); -inf where the prior cannot be evaluated."""
    density = system.log_norm + log_likelihood(system.spectrum, images, log_scale)
    if system.prior is not None:
        density = density + (log_prior(system.prior, log_scale.exp()) + log_scale)
    return density.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def _conditional(system: _System, images: Images, s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the coordinates c given s (data, n), both (data, n, k)."""
    signal = s[..., None] * system.spectrum.gain
    variance = signal.square().add_(1).reciprocal_()
    error = images.along[:, None] - s[..., None] * system.spectrum.shift
    return signal.mul_(error).mul_(variance), variance


def _hull(log_scale: Tensor, density: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """Ends (data,) of the interval where the density, or s^2 times it, may be within `drop` nats of its maximum.

    The second function keeps the tail that the variance of the scale needs. Between nodes, a function may exceed its
    values at the nodes by an eighth of its second difference; a quarter is allowed for.
    """
    bend = (density[:, 2:] - 2 * density[:, 1:-1] + density[:, :-2]).abs() / 4
    bend = bend.nan_to_num(nan=0.0, posinf=0.0)
    bend = torch.cat([bend[:, :1], bend, bend[:, -1:]], dim=1)
    moment = density + 2 * log_scale
    keep = density + bend >= density.amax(1, keepdim=True) - drop
    keep |= moment + bend >= moment.amax(1, keepdim=True) - drop
    return _ends(log_scale, keep)


def _ends(log_scale: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """log s one node before the first and one node after the last node that is kept."""
    last = keep.shape[1] - 1
    first = keep.int().argmax(1, keepdim=True) - 1
    final = last - keep.flip(1).int().argmax(1, keepdim=True) + 1
    log_scale = log_scale.expand(len(keep), -1)
    low, high = log_scale.gather(1, first.clamp_min(0)), log_scale.gather(1, final.clamp_max(last))
    return low[:, 0], high[:, 0]


def _between(low: Tensor, high: Tensor, nodes: int) -> Tensor:
    return low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, nodes, dtype=low.dtype, device=low.device)


def _zoom(system: _System, images: Images, low: Tensor, high: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """Narrow the range (low, high) of log s, (data,) each, to the interval that `_hull` finds."""
    low, high = low.clone(), high.clone()
    active = torch.arange(len(low), device=low.device)
    for _ in range(_ZOOM_ROUNDS):
        log_scale = _between(low[active], high[active], _ZOOM_NODES)
        density = _log_integrand(system, _rows(images, active), log_scale)
        new_low, new_high = _hull(log_scale, density, drop)
        shrunk = new_high - new_low < _ZOOM_GAIN * (high - low)[active]
        low[active], high[active] = new_low, new_high
        active = active[shrunk]
        if not len(active):
            break
    return low, high


def _grid(system: _System, images: Images) -> _Grid:
    """The grid of the quadrature, which is even in u with log s = centre + width sinh u.

    It is dense where the posterior is, and wide in the tails. For a prior that is proportional to s^a with small a, the
    left tail extends over 40 / a e-folds and the right tail over one, so that no even grid in log s suits both. The map
    is analytic, so that the trapezoidal rule keeps its order.
    """
    limits = torch.tensor(system.limits, dtype=torch.float64, device=images.along.device)
    scan = _between(limits[:1], limits[1:], _SCAN_NODES)
    low, high = _hull(scan, _log_integrand(system, images, scan), _DROP)
    low, high = _zoom(system, images, low, high, _DROP)
    inner_low, inner_high = _zoom(system, images, low, high, _SHARP)
    centre = (inner_low + inner_high) / 2
    width = ((inner_high - inner_low) / 2).clamp_min(torch.finfo(low.dtype).tiny)
    start, end = torch.asinh((low - centre) / width), torch.asinh((high - centre) / width)
    grid = _Grid(centre, width, start, (end - start) / (_GRID_NODES - 1), low.new_empty(len(low), _GRID_NODES))
    nodes = torch.minimum(torch.maximum(grid.nodes(), low[:, None]), high[:, None])
    return grid._replace(log_density=_log_integrand(system, images, nodes) + grid.log_jacobian(nodes))


def _single_node(system: _System, images: Images) -> _Grid:
    """The grid of a model without a scale: one node at log s = 0, with weight one."""
    zero = torch.zeros_like(images.rest_energy)
    return _Grid(zero, zero, zero, zero + 1, _log_integrand(system, images, zero[:, None]))


def _weights(grid: _Grid) -> tuple[Tensor, Tensor]:
    """Posterior weights of nodes (data, 2, nodes) and log evidence (data, 2), from all and from every second node."""
    nodes = grid.log_density.shape[1]
    rule = grid.log_density.new_ones(2, nodes)
    if nodes > 1:
        rule[1, 0::2], rule[1, 1::2] = 2.0, 0.0
        rule[:, [0, -1]] /= 2
    top = grid.log_density.amax(1)
    weights = (grid.log_density - top[:, None]).exp()[:, None] * rule
    total = weights.sum(-1, keepdim=True)
    return weights / total, top[:, None] + (total[..., 0] * grid.step[:, None]).log()


def _moments(system: _System, images: Images, grid: _Grid) -> _Moments:
    """Moments of the mixture over the nodes of the grid."""
    weights, log_evidence = _weights(grid)
    s = grid.nodes().exp()
    mean, variance = _conditional(system, images, s)
    within = (weights @ variance) @ system.basis.square().T
    values = torch.cat([mean @ system.basis.T, s[..., None]], dim=-1)
    means = weights @ values
    between = weights @ (values - means[:, :1]).square_() - (means - means[:, :1]).square_()
    between = between.clamp_min_(0)
    latent_sd = (within + between[..., :-1]).sqrt()
    return _Moments(log_evidence, means[..., -1], between[..., -1].sqrt(), means[..., :-1], latent_sd)


def _halving_error(moments: _Moments) -> Tensor:
    """(data,): the largest change of a result when every second node is dropped."""
    means = torch.cat([moments.latent_mean, moments.scale_mean[..., None]], dim=-1)
    sds = torch.cat([moments.latent_sd, moments.scale_sd[..., None]], dim=-1)
    changes = torch.cat([means[:, 1] - means[:, 0], sds[:, 1] - sds[:, 0]], dim=-1).abs()
    unit = sds[:, 0].repeat(1, 2)
    changes = torch.where(unit > 0, changes / unit, 0.0)  # a latent without variance does not change
    evidence = (moments.log_evidence[:, 1] - moments.log_evidence[:, 0]).abs()
    # The sd of a scale is never zero: if it is here, the posterior is narrower than float64 resolves.
    return torch.maximum(changes.amax(1), evidence).masked_fill(moments.scale_sd[:, 0] == 0, math.inf)


def _tail_mass(system: _System, grid: _Grid, moments: _Moments) -> Tensor:
    """(data,): share of the mass, or of the second moment of s, beyond the ends of the grid, from the slopes there."""
    log_scale = grid.nodes()
    mass = grid.log_density - grid.log_jacobian(log_scale) - moments.log_evidence[:, :1]
    second = moments.scale_mean[:, :1] ** 2 + moments.scale_sd[:, :1] ** 2
    tail = torch.zeros_like(log_scale[:, 0])
    for log_density in (mass, mass + 2 * log_scale - second.log()):
        for end, inner, bounded in ((0, 1, system.bounded[0]), (-1, -2, system.bounded[1])):
            if not bounded:
                fall = (log_density[:, inner] - log_density[:, end]) / (log_scale[:, inner] - log_scale[:, end]).abs()
                share = log_density[:, end].exp() / fall.clamp_min(1e-3)
                tail = torch.maximum(tail, share.nan_to_num(nan=0.0))  # NaN: the density is zero there
    return tail


def _inverse_cdf(grid: _Grid, uniform: Tensor) -> Tensor:
    """Draws of s (data, n) at uniform levels (data, n), with a density that is linear in u between nodes."""
    if grid.log_density.shape[1] == 1:
        return torch.ones_like(uniform)
    density = (grid.log_density - grid.log_density.amax(1, keepdim=True)).exp()
    cdf = ((density[:, 1:] + density[:, :-1]) / 2).cumsum(1)
    target = uniform * cdf[:, -1:]
    cell = torch.searchsorted(cdf, target, right=True).clamp_max(cdf.shape[1] - 1)
    below = torch.nn.functional.pad(cdf, (1, 0)).gather(1, cell)
    left, right = density.gather(1, cell), density.gather(1, cell + 1)
    # The root of left f + (right - left) f^2 / 2 = mass, in a form without cancellation.
    mass = (target - below).clamp_min(0)
    root = (left**2 + 2 * (right - left) * mass).clamp_min(0).sqrt()
    fraction = (2 * mass / (left + root)).nan_to_num(nan=0.0).clamp(0, 1)
    return grid.log_scale(cell + fraction).exp()


def _chunks(x: Tensor, elements: int) -> list[slice]:
    """Slices of the data for which temporary tensors of `elements` numbers per datum fit into the memory budget."""
    rows = max(1, _CHUNK_ELEMENTS[x.device.type] // elements)
    return [slice(start, start + rows) for start in range(0, len(x), rows)]


def _rows(parts: Any, rows: slice | Tensor) -> Any:
    return type(parts)(*(part[rows] for part in parts))


def _join(parts: Any) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return type(parts[0])(*(torch.cat(column) for column in zip(*parts, strict=True)))
