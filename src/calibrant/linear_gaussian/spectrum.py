"""Linear-Gaussian structures in the coordinates of a singular value decomposition, and where their scales lie.

In units of the noise and along the singular vectors of the loading, a datum given its scale s is a set of independent
problems u = s (shift + gain c) + N(0, 1) with c ~ N(0, 1), so that its density costs O(k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_NO_REST = 1e-12  # size of a rest that is a rounding error, relative to the shift
_BELOW, _ABOVE = 15.0, 30.0  # e-folds of scale × largest gain that are scanned: from no signal to 1e13 times the noise
_SCAN = 257  # nodes of the scan
_ROUNDS = 3  # grids of each datum, each centred on the mass of the one before
_HALF = 4  # nodes on each side of the centre of a grid, one standard deviation apart


class Spectrum(NamedTuple):
    """A structure in units of the noise, with r singular values of the loading times a root of the prior covariance."""

    directions: Tensor  # (pixels, r): left singular vectors
    gain: Tensor  # (r,): singular values
    shift: Tensor  # (r,): components along the directions of the shift, including the mean of the block
    shift_rest: Tensor  # (pixels,): the part of the shift orthogonal to the directions


class Images(NamedTuple):
    """The statistics of each datum that determine its posterior; `rest` is the part that no latent can explain."""

    along: Tensor  # (data, r): components of the whitened image along the directions
    rest_energy: Tensor  # (data,): squared norm of the rest at the scale that explains it best
    rest_scale: Tensor  # (data,): that scale


def spectrum_of(directions: Tensor, gain: Tensor, shift: Tensor) -> Spectrum:
    """A spectrum from a singular value decomposition and a shift `(pixels,)` in units of the noise.

    The rest of a shift that lies within the directions is a rounding error, and set to zero: times a large scale, it
    would explain parts of a strong image.
    """
    along = shift @ directions
    rest = shift - directions @ along
    return Spectrum(directions, gain, along, torch.where(rest.abs() > _NO_REST * shift.abs().max(), rest, 0.0))


def project(spectrum: Spectrum, image: Tensor) -> Images:
    """The statistics of images `(data, pixels)` without their offset, in units of the noise."""
    along = image @ spectrum.directions
    # Computed from the vectors, since a difference of squared norms would lose the noise of a strong image.
    rest = image - along @ spectrum.directions.T
    energy = spectrum.shift_rest @ spectrum.shift_rest
    scale = torch.where(energy > 0, rest @ spectrum.shift_rest / energy, 0.0)
    rest = rest - scale[:, None] * spectrum.shift_rest
    return Images(along, (rest**2).sum(-1), scale)


def log_likelihood(spectrum: Spectrum, images: Images, log_scale: Tensor) -> Tensor:
    """log p(x | s), but for a constant of the model, at log scales `(data or 1, nodes)`; returns `(data, nodes)`."""
    s = log_scale.exp()
    variance = (s[..., None] * spectrum.gain).square_().add_(1)
    error = (images.along[:, None] - s[..., None] * spectrum.shift).square_().div_(variance).sum(-1)
    rest = images.rest_energy[:, None] + spectrum.shift_rest.square().sum() * (s - images.rest_scale[:, None]) ** 2
    return -0.5 * (variance.log_().sum(-1) + error + rest)


def weighted_scales(
    spectrum: Spectrum,
    images: Images,
    log_prior: Callable[[Tensor], Tensor],
    bounds: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """A few nodes of log s for every datum, with weights that are nearly those of its posterior p(log s | x).

    They give its mean and standard deviation, not its evidence. A scan with the same nodes for all data finds the mass,
    at the cost of a matrix product, and grids of nine nodes resolve it. There is no control flow that depends on
    values, so that a graph of it can be recorded.

    Args:
        spectrum: the structure.
        images: statistics of the data.
        log_prior: function of scales that returns their log prior density.
        bounds: lower and upper bound of the prior's support, `()` each.

    Returns:
        log s and its weights, `(data, nodes)` each; the weights of a datum add up to one.
    """
    middle = -spectrum.gain.max().clamp_min(torch.finfo(spectrum.gain.dtype).tiny).log()
    low, high = (bound.to(spectrum.gain).clamp_min(0).log() for bound in bounds)
    first, last = torch.maximum(middle - _BELOW, low), torch.minimum(middle + _ABOVE, high)
    scan = first + (last - first) * torch.linspace(0, 1, _SCAN, dtype=first.dtype, device=first.device)[None]
    density = _scanned(spectrum, images, scan) + log_prior(scan.exp()) + scan
    centre, width = _moments(scan, density, (last - first) / (2 * _SCAN))
    steps = torch.arange(-_HALF, _HALF + 1, dtype=first.dtype, device=first.device)
    for _ in range(_ROUNDS):
        nodes = (centre[:, None] + width[:, None] * steps).clamp(low, high)
        density = log_likelihood(spectrum, images, nodes) + log_prior(nodes.exp()) + nodes
        centre, width = _moments(nodes, density, width / _HALF)
    return nodes, _weights(density)


def _scanned(spectrum: Spectrum, images: Images, scan: Tensor) -> Tensor:
    """`log_likelihood` at log scales `(1, nodes)` by matrix products, with rounding errors for strong images."""
    s = scan.exp().T
    variance = (s * spectrum.gain).square() + 1
    mean = s * spectrum.shift
    error = images.along.square() @ (1 / variance).T - 2 * images.along @ (mean / variance).T
    error = error + (mean.square() / variance + variance.log()).sum(-1)
    rest = spectrum.shift_rest.square().sum() * (scan.exp() - images.rest_scale[:, None]) ** 2
    return -0.5 * (error + rest)


def _weights(density: Tensor) -> Tensor:
    return density.nan_to_num(nan=-torch.inf, posinf=-torch.inf).softmax(1)


def _moments(nodes: Tensor, density: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of nodes, and their standard deviation or the given least one, `(data,)` each."""
    weights = _weights(density)
    mean = (weights * nodes).sum(1)
    variance = (weights * (nodes - mean[:, None]).square()).sum(1)
    return mean, torch.maximum(variance.sqrt(), least)
