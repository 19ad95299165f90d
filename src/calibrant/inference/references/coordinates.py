"""Maps between supports and unconstrained space, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from numpy.polynomial import chebyshev
from scipy import special
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.program.contract import Values
from calibrant.program.latents import Site
from calibrant.program.supports import from_line, is_circular, is_direction, is_masked, undressed
from calibrant.program.tracing import is_local

_FOUND_AGAIN = 1e-3  # error of an unconstrained value up to which the value determines it
_LENGTH_FREEDOM = 8  # entries, at least, of the Normal vector whose length ambient vectors have


def raw_shape(name: str, site: Mapping[str, Any]) -> torch.Size:
    """The shape of the unconstrained value of a site.

    Raises:
        InferenceError: for a support that cannot be mapped to ℝⁿ.
    """
    fn, shape = site["fn"], site["value"].shape
    if is_circular(fn):
        return torch.Size([*shape, 2])
    if is_direction(fn):
        return shape
    try:
        return torch.Size(from_line(fn.support).inverse_shape(shape))
    except NotImplementedError as error:
        raise InferenceError(
            f"latent {name!r} has support {fn.support}, which torch cannot map to unconstrained space: use a "
            "distribution on another support and transform it in the program"
        ) from error


def to_support(fn: Any, raw: Tensor) -> tuple[Tensor, Tensor]:
    """The value of a site for an unconstrained value, and the log density of the map, entry by entry."""
    if is_circular(fn):
        return torch.atan2(raw[..., 1], raw[..., 0]), _ambient(raw)
    if is_direction(fn):
        return raw / raw.norm(dim=-1, keepdim=True), _ambient(raw)
    transform = from_line(fn.support)
    value = transform(raw)
    return value, transform.log_abs_det_jacobian(raw, value)


def _ambient(raw: Tensor) -> Tensor:
    """The log density of ambient vectors, entry by entry; it is isotropic, so that it does not affect directions.

    The length has the distribution of the length of a Normal vector with at least `_LENGTH_FREEDOM` entries. Two Normal
    entries would often be near the origin, where directions change so fast that trajectories diverge.
    """
    entries = raw.shape[-1]
    log_length = raw.square().sum(-1, keepdim=True).log() / 2
    return (max(_LENGTH_FREEDOM, entries) - entries) / entries * log_length - 0.5 * raw.square()


def to_raw(fn: Any, value: Tensor) -> Tensor:
    """An unconstrained value for a value of a site; directions get a typical length."""
    if is_circular(fn):
        value = torch.stack([value.cos(), value.sin()], -1)
    elif not is_direction(fn):
        return from_line(fn.support).inv(value)
    return max(_LENGTH_FREEDOM, value.shape[-1]) ** 0.5 * value


def at_an_edge(fn: Any, raw: Tensor, value: Tensor) -> Tensor:
    """Whether a value is so close to the edge of its support that its unconstrained value can't be found again from it.

    Numbers between 0.9999999999999998 and 1 do not exist in float64, so that a density of a value near 1 is not right.
    """
    if is_direction(fn):
        return torch.zeros_like(raw, dtype=torch.bool)
    return (to_raw(fn, value) - raw).abs() > _FOUND_AGAIN


def is_fixed_laplace(latent: Site, site: Mapping[str, Any], covariates: Values) -> bool:
    """Whether a local latent has a Laplace prior that depends neither on the datum nor on other latents."""
    fixed = is_local(site) and not latent.parents and not covariates
    return fixed and not is_masked(site["fn"]) and isinstance(undressed(site["fn"]), dist.Laplace)


def from_normal(u: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The Laplace quantile at the level of the Normal quantile u, and the log of its derivative, entry by entry."""
    log_ratio = _log_tail_ratio(u.abs())
    log_slope = 0.5 * log(2 / pi) - log_ratio + scale.log()
    return loc + scale * u.sign() * (0.5 * u.square() - log_ratio), log_slope


def _log_tail_ratio(u: Tensor) -> Tensor:
    """log of twice the Normal tail beyond u ≥ 0, divided by exp(−u²/2), which is log erfcx(u / √2), to 1e-14.

    It is computed as log(t) plus a polynomial in t = 2 / (2 + u / √2), since compiled code does not vectorise erfcx and
    log_ndtr.
    """
    t = 2 / (2 + u.detach() / 2**0.5)
    value, argument = torch.full_like(t, _TAIL[-1]), 2 * t - 1
    for coefficient in _TAIL[-2::-1]:
        value = value * argument + coefficient
    value = value + t.log()
    slope = u.detach() - (2 / pi) ** 0.5 * (-value).exp()
    return value + slope * (u - u.detach())


def _tail_polynomial(degree: int = 22) -> list[float]:
    nodes = np.cos((np.arange(400) + 0.5) * pi / 400)
    t = (nodes + 1) / 2
    fitted = chebyshev.chebfit(nodes, np.log(special.erfcx(2 / t - 2) / t), degree)
    return [float(coefficient) for coefficient in chebyshev.cheb2poly(fitted)]


_TAIL = _tail_polynomial()


def to_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The Normal quantile at the level of the Laplace quantile z."""
    standard = (z - loc) / scale
    return -standard.sign() * torch.special.ndtri(0.5 * (-standard.abs().clamp_max(700.0)).exp())


def beside(per_lane: Tensor, values: Tensor) -> Tensor:
    """Reshape `(lane,)` to `(lane, 1, …)`, so that it broadcasts with values `(lane, *event)`."""
    return per_lane.reshape(*per_lane.shape, *[1] * (values.dim() - per_lane.dim()))
