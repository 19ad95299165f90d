"""Detection of programs with an exact posterior: linear-Gaussian structure, found by evaluating the program.

The log density of a Gaussian has an affine gradient. Gradients of the program's density at chosen points give the
noise, the loading and the prior of a `LinearGaussian`. Then the gradients of the program are compared with those of
this structure at random points, near and far. Classes, names and arguments of the program play no role.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Distribution

from calibrant.errors import InferenceError
from calibrant.linear_gaussian.density import verify
from calibrant.linear_gaussian.parameters import LinearGaussian, Shapes, join, split
from calibrant.program.contract import Program, Values, as_program
from calibrant.program.density import log_density
from calibrant.program.environment import cast, defaults, in_double, seeded
from calibrant.program.latents import few
from calibrant.program.supports import from_line, is_mixture, is_real
from calibrant.program.tracing import factors, is_local, sampled, trace

_POINTS = 64  # draws that give location and scale of each latent, and points at which gradients are compared
_DISTANCES = (1e-3, 0.1, 1.0, 10.0, 1e3)  # distances of latents from their prior mean, in prior sds
_RESIDUALS = (0.01, 1.0, 100.0)  # distances of pixels from their mean given the latents, in noise sds
_SCALE_STEP = 3.0  # sd of the steps from prior draws of the scale, in unconstrained space
_FURTHEST = 50.0  # largest distance of draws of the scale from zero, in unconstrained space
_TOLERANCE = 1e-8  # error of a gradient, relative to the sum of the absolute values of its terms
_ROUNDING = 1e-13  # error of a gradient, relative to the largest such sum of the datum
_NO_SHIFT = 1e-12  # size of a shift that is a rounding error, relative to the sum of the terms that cancel
_LARGEST_BLOCK = 4096  # entries of the Gaussian latents; with more, matrices of the closed form take gigabytes
_ELEMENTS = 2**20  # numbers in the points that are evaluated together


class _Unknown(Exception):
    """The program has another structure."""


def detect(program: Program, observed: Values, covariates: Values) -> LinearGaussian | None:
    """Find the structure that makes the posterior of a program exact; None if the program does not have it.

    The structure is x = offset + s·(shift + A z) + ε for the one observed site x: all latents except s are jointly
    Gaussian (z, any number of sites of any event shape), the noise ε is independent between pixels, and s, if there is
    one, is a positive scalar latent on which no other latent depends.

    >>> import torch, pyro, pyro.distributions as dist
    >>> def walk(size):
    ...     with pyro.plate("data", size):
    ...         start = pyro.sample("start", dist.Normal(1.0, 2.0))
    ...         end = pyro.sample("end", dist.Normal(start, 0.5))
    ...         pyro.sample("x", dist.Normal(3.0 * end, 0.1))
    >>> found = detect(walk, {"x": torch.zeros(2)}, {})
    >>> found.latents, found.loading.round(decimals=6).tolist(), found.mean.round(decimals=6).tolist()
    ({'start': (), 'end': ()}, [[0.0, 3.0]], [1.0, 1.0])

    A program that is only nearly linear does not have this structure:

    >>> def bent(size):
    ...     with pyro.plate("data", size):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("x", dist.Normal(z + 1e-6 * z**2, 0.1))
    >>> detect(bent, {"x": torch.zeros(2)}, {}) is None
    True

    Args:
        program: the program; it is evaluated in float64, and its weights and buffers are not changed.
        observed: site → tensor, leading dimension data; only the first few data are used.
        covariates: keyword → tensor; no structure is detected in programs with covariates.
    """
    if len(observed) != 1 or covariates:
        return None
    program, name = as_program(program), next(iter(observed))
    with _probing(program, observed) as place:
        try:
            return _detect(in_double(program), name, cast(few(observed, _POINTS), *place)[name])
        except _Unknown:
            return None


def probe(program: Program, observed: str, event_shape: torch.Size) -> Probe:
    """Sites of a program that is known to have the structure, and units for them, from draws.

    Args:
        program: the program, which is not changed.
        observed: name of the observed site.
        event_shape: event shape of the observed site.

    Raises:
        InferenceError: if the program no longer has the structure, or its weights are not finite.
    """
    program = as_program(program)
    with poutine.block(), _probing(program, {}):
        try:
            with _unknown():
                return _probe(trace(in_double(program), _POINTS), observed, event_shape)
        except _Unknown as error:
            raise _lost(program, observed) from error


def read(program: Program, sites: Probe) -> LinearGaussian:
    """Compute the structure of a program that is known to have it, from its current weights, without verification.

    This may be called inside another program, since sites that are sampled here are hidden from Pyro's handlers. It
    draws no random numbers, and has no control flow that depends on values, so that a graph of it can be recorded.

    Args:
        program: the program, which is not changed; it is evaluated in float64, at k + 3 points.
        sites: the result of `probe`, under these weights or others.

    Raises:
        InferenceError: if the program no longer runs with these sites.
    """
    program = as_program(program)
    with poutine.block(), _probing(program, {}):
        double = in_double(program)
        try:
            return _structure(sites, _recover(double, sites), _scale_prior(double, sites))
        except _Unknown as error:
            raise _lost(program, sites.observed) from error


def require_sound(program: Program, found: LinearGaussian) -> None:
    """Refuse what `read` returns for a program that has lost the structure.

    Raises:
        InferenceError: if the program no longer has the structure, or its weights are not finite.
    """
    parts = (found.loading, found.noise, found.offset, found.shift, found.mean, found.covariance)
    if not all(part is None or part.isfinite().all() for part in parts):
        raise _lost(as_program(program), found.observed)


def _lost(program: Any, observed: str) -> InferenceError:
    return InferenceError(
        f"{type(program).__name__} is no longer linear and Gaussian in {observed!r}, or its weights are not finite"
    )


@contextmanager
def _probing(program: Program, values: Values) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Set up the evaluation of a program in float64 with gradients, whatever modes the caller has set."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        seeded(0),
        pyro.validation_enabled(False),
        defaults(program, values, torch.float64) as place,
    ):
        yield place


def _detect(double: Program, name: str, x: Tensor) -> LinearGaussian:
    with _unknown():
        sites = _probe(trace(double, _POINTS), name, x.shape[1:])
        found = _recover(double, sites)
    if not _is_sound(found):
        raise _Unknown
    _compare(double, sites, found)
    structure = _structure(sites, found, sites.scale.prior if sites.scale is not None else None)

    def log_joint(values: dict[str, Tensor]) -> Tensor:
        return log_density(double, values, len(values[name]), observed=[name]).joint

    with _unknown(), torch.no_grad():
        verify(structure, log_joint, x, torch.Generator().manual_seed(0))
    return structure


@contextmanager
def _unknown() -> Iterator[None]:
    """Turn any exception into `_Unknown`: a program that fails at our points does not have the structure."""
    try:
        yield
    except Exception as error:
        raise _Unknown from error


# -- the sites ---------------------------------------------------------------------------------------------------------


class _Scale(NamedTuple):
    name: str
    prior: Distribution
    raw: Tensor  # (points,): draws from the prior in unconstrained space

    def at(self, steps: float | Tensor = 0.0) -> Tensor:
        """Scales (points,): the draws, moved by the given steps in unconstrained space."""
        return from_line(self.prior.support)(self.raw + steps)


@dataclass(frozen=True)
class Probe:
    """The sites of a program, and units for them, computed from draws: z = centre + width u, likewise for pixels."""

    observed: str
    event: torch.Size
    latents: Shapes
    centre: Tensor  # (k,)
    width: Tensor  # (k,)
    pixel_centre: Tensor  # (pixels,)
    pixel_width: Tensor  # (pixels,)
    scale: _Scale | None


def _probe(run: Any, observed: str, event: torch.Size) -> Probe:
    found = sampled(run)
    continuous = all(is_local(site) and not site["fn"].support.is_discrete for site in found.values())
    if factors(run) or observed not in found or not continuous or not _may_be_gaussian(found[observed]["fn"]):
        raise _Unknown
    values = {name: site["value"].detach() for name, site in found.items()}
    latents = {n: tuple(values[n].shape[1:]) for n, s in found.items() if n != observed and _may_be_gaussian(s["fn"])}
    others = [name for name in found if name != observed and name not in latents]
    if not 0 < sum(map(prod, latents.values())) <= _LARGEST_BLOCK or len(others) > 1:
        raise _Unknown
    scale = _scale(others[0], found[others[0]]["fn"], values[others[0]]) if others else None
    z, x = join(values, latents), values[observed].reshape(_POINTS, -1)
    return Probe(observed, event, latents, z.mean(0), z.std(0), x.mean(0), x.std(0), scale)


def _may_be_gaussian(fn: Any) -> bool:
    return is_real(fn) and not is_mixture(fn)


def _scale(name: str, prior: Any, draws: Tensor) -> _Scale:
    if draws.dim() > 1 or is_mixture(prior):  # a grid may miss a narrow component
        raise _Unknown
    return _Scale(name, prior, from_line(prior.support).inv(draws).clamp(-_FURTHEST, _FURTHEST))


def _gradients(double: Program, sites: Probe, x: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """∂ log p(x | z, s) / ∂x and ∂ log p(z, s) / ∂u at points x (n, pixels), u (n, k), s (n,)."""
    rows = max(1, _ELEMENTS // (x.shape[1] + u.shape[1]))
    parts = zip(x.split(rows), u.split(rows), s.split(rows), strict=True)
    with _unknown():
        likelihood, prior = zip(*(_gradients_of_few(double, sites, *part) for part in parts), strict=True)
    return torch.cat(likelihood), torch.cat(prior)


def _gradients_of_few(double: Program, sites: Probe, x: Tensor, u: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    x, u = x.detach().requires_grad_(), u.detach().requires_grad_()
    values = split(sites.centre + sites.width * u, sites.latents)
    values[sites.observed] = x.reshape(len(x), *sites.event)
    if sites.scale is not None:
        values[sites.scale.name] = s
    density = log_density(double, values, len(x), observed=[sites.observed])
    likelihood, prior = density.observed.sum(), density.latent.sum()
    return torch.autograd.grad(likelihood, x, retain_graph=True)[0], torch.autograd.grad(prior, u)[0]


# -- recovering the structure ------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    """A structure in the units u of `Probe`: x = offset + s·(shift + u columns) + ε, u ~ N(mean, precision⁻¹)."""

    variance: Tensor  # (pixels,): variance of the noise
    offset: Tensor  # (pixels,)
    shift: Tensor  # (pixels,)
    columns: Tensor  # (k, pixels)
    precision: Tensor  # (k, k)
    covariance: Tensor  # (k, k)
    mean: Tensor  # (k,)


def _recover(double: Program, sites: Probe) -> _Found:
    """Compute the structure from gradients at the centre, and at points one step away from it."""
    count = len(sites.centre)
    x = sites.pixel_centre.repeat(count + 3, 1)
    u, s = x.new_zeros(len(x), count), x.new_ones(len(x))
    u[1:-2] = torch.eye(count)
    if sites.scale is not None:
        low, high = sites.scale.at().aminmax()
        s = torch.where(torch.arange(len(x)) == len(x) - 2, low, high)
    x[-1] += sites.pixel_width
    pull, prior_pull = _gradients(double, sites, x, u, s)
    variance = sites.pixel_width / (pull[0] - pull[-1])
    mean = x + variance * pull  # mean of x given the latents, towards which the gradient of a Gaussian points
    columns = (mean[1:-2] - mean[0]) / s[0]
    offset, shift = mean[0], torch.zeros_like(mean[0])
    if sites.scale is not None:
        shift = (mean[0] - mean[-2]) / (s[0] - s[-2])
        offset = mean[-2] - s[-2] * shift
    precision = prior_pull[0] - prior_pull[1:-2]
    precision = (precision + precision.T) / 2
    root, failed = torch.linalg.cholesky_ex(precision)
    covariance = torch.where(failed == 0, torch.cholesky_inverse(root), torch.nan)
    return _Found(variance, offset, shift, columns, precision, covariance, covariance @ prior_pull[0])


def _is_sound(found: _Found) -> bool:
    return bool((found.variance > 0).all()) and all(bool(part.isfinite().all()) for part in found)


def _scale_prior(double: Program, sites: Probe) -> Distribution | None:
    """The prior of the scale under the current weights."""
    if sites.scale is None:
        return None
    with _unknown():
        values = split(sites.centre[None], sites.latents)
        values[sites.observed] = sites.pixel_centre.reshape(1, *sites.event)
        values[sites.scale.name] = sites.scale.at()[:1]
        prior: Any = trace(double, 1, values=values).nodes[sites.scale.name]["fn"]
    return prior


def _structure(sites: Probe, found: _Found, prior: Distribution | None) -> LinearGaussian:
    loading = (found.columns / sites.width[:, None]).T
    return LinearGaussian(
        observed=sites.observed,
        latents=sites.latents,
        loading=loading,
        noise=found.variance.sqrt(),
        offset=found.offset if sites.scale is not None else found.offset - loading @ sites.centre,
        shift=_shift(sites, found, loading) if sites.scale is not None else None,
        mean=sites.centre + sites.width * found.mean,
        covariance=sites.width[:, None] * found.covariance * sites.width,
        scale=sites.scale.name if sites.scale is not None else None,
        scale_prior=prior,
    )


def _shift(sites: Probe, found: _Found, loading: Tensor) -> Tensor:
    """The shift at z = 0, (pixels,), without entries that are rounding errors.

    A shift of 1e-16 times a scale of 1e18 would explain parts of a strong image.
    """
    shift = found.shift - loading @ sites.centre
    terms = found.shift.abs() + found.offset.abs() + loading.abs() @ sites.centre.abs() + sites.pixel_width
    return torch.where(shift.abs() > _NO_SHIFT * terms, shift, 0.0)


# -- comparing it with the program -------------------------------------------------------------------------------------


def _compare(double: Program, sites: Probe, found: _Found) -> None:
    """Raise if the gradients of the program at random points are not those of the structure."""
    (count, pixels), index = found.columns.shape, torch.arange(_POINTS)
    distance, residual = (torch.tensor(cycle)[index % len(cycle), None] for cycle in (_DISTANCES, _RESIDUALS))
    u = found.mean + distance * torch.randn(_POINTS, count)
    s = torch.ones(_POINTS)
    if sites.scale is not None:
        s = sites.scale.at(_SCALE_STEP * torch.randn(_POINTS))
    mean = found.offset + s[:, None] * (found.shift + u @ found.columns)
    error = residual * found.variance.sqrt() * torch.randn(_POINTS, pixels)
    pull, prior_pull = _gradients(double, sites, mean + error, u, s)
    terms = s[:, None] * (found.shift.abs() + u.abs() @ found.columns.abs()) + found.offset.abs()
    _require_close(mean + error + found.variance * pull, mean, terms + error.abs() + found.variance.sqrt())
    terms = (u.abs() + found.mean.abs()) @ found.precision.abs()
    _require_close(prior_pull, (found.mean - u) @ found.precision, terms)


def _require_close(theirs: Tensor, ours: Tensor, terms: Tensor) -> None:
    if not ((theirs - ours).abs() <= _TOLERANCE * terms + _ROUNDING * terms.amax(1, keepdim=True)).all():
        raise _Unknown
