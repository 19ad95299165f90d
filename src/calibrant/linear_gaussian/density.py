"""The log density of a linear-Gaussian structure, and its comparison with the density of a program."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Transform

from calibrant.errors import InferenceError
from calibrant.linear_gaussian.parameters import LinearGaussian, join, split
from calibrant.program.supports import base_support

MARGIN = 1e-13  # keeps points inside a bounded support, where rounding would put them outside
_VERIFY_POINTS = 64
_VERIFY_TOLERANCE = 1e-6


def log_joint(structure: LinearGaussian, values: dict[str, Tensor]) -> Tensor:
    """Log joint density of the structure at given values of its sites.

    Args:
        structure: structure of the model.
        values: site → tensor, (size, *event).

    Returns:
        (size,), nats, float64.

    Raises:
        InferenceError: for a singular covariance, under which the latents have no density.
    """
    x, z = flatten(structure, values[structure.observed]), join(values, structure.latents).double()
    loading, noise, offset, shift, prior_mean, covariance = float64(structure, x.device)
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed:
        raise InferenceError(f"The covariance of {names_of(structure)} is singular: it has no density to compare with.")
    density = MultivariateNormal(prior_mean, scale_tril=factor, validate_args=False).log_prob(z)
    signal = shift + z @ loading.T
    if structure.scale is not None:
        s = values[structure.scale].double()
        prior = univariate(structure, x.device)
        density, signal = density + log_prior(prior, s), s[:, None] * signal
    error = (x - offset - signal) / noise
    return density - 0.5 * (error**2 + math.log(2 * math.pi)).sum(-1) - noise.log().sum()


def verify(
    structure: LinearGaussian,
    log_joint: Callable[[dict[str, Tensor]], Tensor],
    x: Tensor,
    generator: torch.Generator,
) -> None:
    """Verify a structure: compare its density with the density of the program at random points.

    The points are draws of scale and latents from the prior, unchanged and enlarged, with images simulated from them
    and with the given images. Simulated images have log densities near zero, where a relative error is easiest to see.

    Args:
        structure: the structure to be verified.
        log_joint: log joint density of the program, a function from site → tensor with leading dimension size
            (including the observed site) to (size,); evaluated in float64.
        x: (data, *event), some data.
        generator: random generator for the points.

    Raises:
        InferenceError: if the two densities differ by more than 1e-6, relative to the larger of 1 nat and the density;
            or if the covariance is singular, so that the latents have no density to compare.
    """
    values = _random_points(structure, x, generator)
    _compare(structure, values, log_joint(values))


def _compare(structure: LinearGaussian, values: dict[str, Tensor], theirs: Tensor) -> None:
    """Raise if the log joint densities of the program, `theirs` (size,), are not those of the structure."""
    own = log_joint(structure, values)
    if theirs.shape != own.shape:
        raise InferenceError(f"The program's log density has shape {tuple(theirs.shape)}; wanted {tuple(own.shape)}.")
    difference = (theirs - own).abs()
    relative = (difference / own.abs().clamp_min(1.0)).nan_to_num(nan=math.inf)
    worst = int(relative.argmax())
    if relative[worst] > _VERIFY_TOLERANCE:
        raise InferenceError(
            f"The linear-Gaussian structure of {structure.observed!r} is not the program's: their log joint densities "
            f"differ by up to {difference[worst].item():.6g} nats ({own[worst].item():.10g} against "
            f"{theirs[worst].item():.10g} in the program)."
        )


def _random_points(structure: LinearGaussian, x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Values of all sites at which `verify` compares, (points, ...)."""
    images = flatten(structure, x)
    loading, noise, offset, shift, mean, covariance = float64(structure, images.device)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": generator.device}
    count, (pixels, latents) = _VERIFY_POINTS, loading.shape
    # Cycles of different lengths, so that all pairs of enlargements occur.
    enlarge = [
        torch.tensor(cycle, dtype=torch.float64, device=images.device) for cycle in ([1.0, 3.0], [1.0, 0.1, 10.0])
    ]
    index = torch.arange(count, device=images.device)
    z = torch.randn(count, latents, **options).to(images.device) * enlarge[0][index % 2, None]
    z = mean + z @ covariance_root(covariance, names_of(structure)).T
    signal = shift + z @ loading.T
    values = split(z, structure.latents)
    if structure.scale is not None:
        s = _prior_draws(structure, count, generator).to(images.device) * enlarge[1][index % 3]
        low, high = support(univariate(structure, images.device))
        values[structure.scale] = s = s.clamp(low * (1 + MARGIN), high * (1 - MARGIN))
        signal = s[:, None] * signal
    simulated = offset + signal + noise * torch.randn(count, pixels, **options).to(images.device)
    given = images[index % len(images)]
    values[structure.observed] = torch.where((index % 4 == 3)[:, None], given, simulated).reshape(count, *x.shape[1:])
    return values


def _prior_draws(structure: LinearGaussian, count: int, generator: torch.Generator) -> Tensor:
    """(count,) draws of the scale from the global generator, which distributions use; its state is restored."""
    prior = univariate(structure, torch.device("cpu"))
    seed = torch.randint(2**31, (), generator=generator, device=generator.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        try:
            return prior.sample((count,)).reshape(count, -1)[:, 0]
        except NotImplementedError:  # an improper prior has a density but no draws
            return torch.randn(count, dtype=torch.float64, device="cpu").exp()


def flatten(structure: LinearGaussian, x: Tensor) -> Tensor:
    """Flatten observations to (data, pixels) in float64, and check their shape and values."""
    pixels = structure.loading.shape[0]
    if x.dim() < 1 or len(x) == 0 or x.shape[1:].numel() != pixels:
        raise InferenceError(
            f"{structure.observed!r} has shape {tuple(x.shape)}; give (data, ...) with {pixels} elements per datum, "
            "as many as the loading has rows, and at least one datum."
        )
    x = x.detach().reshape(len(x), pixels).double()
    if not x.isfinite().all():
        datum = int((~x.isfinite()).any(1).nonzero()[0])
        raise InferenceError(f"{structure.observed!r} is not finite at datum {datum}; remove such data.")
    return x


def names_of(structure: LinearGaussian) -> str:
    return ", ".join(map(repr, structure.latents))


_PARTS = ("loading", "noise", "offset", "shift", "mean", "covariance")


def float64(structure: LinearGaussian, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loading, noise, offset, shift, mean and covariance in float64, with defaults in place of None, checked."""
    parts = unchecked(structure, device)
    for name, part in zip(_PARTS, parts, strict=True):
        if not part.isfinite().all():
            raise InferenceError(f"{name} of the linear-Gaussian structure is not finite.")
    noise = parts[1]
    if not (noise > 0).all():
        raise InferenceError(f"noise of {structure.observed!r} is {noise.min().item()} somewhere; it must be positive.")
    return parts


def unchecked(structure: LinearGaussian, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same without any check, and so without control flow that depends on values."""

    def cast(name: str, default: Tensor) -> Tensor:
        value = getattr(structure, name)
        value = default if value is None else value.detach()
        return value.to(device=device, dtype=torch.float64)

    pixels, latents = structure.loading.shape
    noise = cast("noise", structure.noise).flatten().expand(pixels)
    loading, zeros = cast("loading", structure.loading), torch.zeros(pixels)
    offset, shift = cast("offset", zeros).flatten(), cast("shift", zeros).flatten()
    return loading, noise, offset, shift, cast("mean", torch.zeros(latents)), cast("covariance", torch.eye(latents))


def covariance_root(covariance: Tensor, names: str) -> Tensor:
    """F (k, k) with F F^T = covariance, which may be singular."""
    # Eigenvalues of the correlation matrix, since the coordinates may have very different sds.
    sd = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(sd > 0, 1 / sd, 0.0)
    values, vectors = torch.linalg.eigh(covariance * inverse * inverse[:, None])
    factor = sd[:, None] * vectors * values.clamp_min(0).sqrt()
    if not torch.allclose(factor @ factor.T, covariance, rtol=1e-6, atol=1e-9 * float(sd.max()) ** 2):
        raise InferenceError(f"The covariance of {names} is not symmetric and positive semi-definite.")
    return factor


def univariate(structure: LinearGaussian, device: torch.device) -> Distribution:
    """The prior of the scale in float64, checked to be univariate and the same for every datum."""
    prior = prior_of_scale(structure, device)
    if prior.event_shape:
        raise InferenceError(
            f"{structure.scale!r} has events of shape {tuple(prior.event_shape)}; the scale is a scalar."
        )
    low, high = support(prior)
    if not 0 <= low < high:
        raise InferenceError(f"The prior of {structure.scale!r} has support {prior.support}; a scale is positive.")
    if math.prod(prior.batch_shape) > 1:
        values = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, device=device).clamp(low, high)
        density = prior.log_prob(values.reshape(-1, *[1] * len(prior.batch_shape))).reshape(3, -1)
        if not torch.equal(density, density[:, :1].expand_as(density)):
            raise InferenceError(f"The prior of {structure.scale!r} differs between data; it has to be one for all.")
    return prior


def prior_of_scale(structure: LinearGaussian, device: torch.device) -> Distribution:
    """The prior of the scale in float64, without any check."""
    return _cast(structure.scale_prior, device, {})


def log_prior(prior: Distribution, s: Tensor) -> Tensor:
    """Log density of the prior at s; entries of its batch shape are identical, so that s is split between them."""
    entries = math.prod(prior.batch_shape)
    padded = torch.nn.functional.pad(s.reshape(-1), (0, -s.numel() % entries), value=1.0)
    return prior.log_prob(padded.reshape(-1, *prior.batch_shape)).reshape(-1)[: s.numel()].reshape(s.shape)


def support(prior: Distribution) -> tuple[float, float]:
    """Lower and upper bound of the prior's support, infinite where it has no such bound."""
    low, high = bounds(prior)
    return float(low), float(high)


def bounds(prior: Distribution) -> tuple[Tensor, Tensor]:
    """The same as tensors, `()` each."""
    base = base_support(prior.support)
    low, high = getattr(base, "lower_bound", -math.inf), getattr(base, "upper_bound", math.inf)
    return torch.as_tensor(low).min(), torch.as_tensor(high).max()


def _cast(value: Any, device: torch.device, copies: dict[int, Any]) -> Any:
    """A float64 copy of a distribution and all its parts, without validation of arguments.

    `copies` maps ids of copied objects to their copies, since a transform and its inverse refer to each other.
    """
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=torch.float64 if value.is_floating_point() else value.dtype)
    if isinstance(value, list):
        return [_cast(item, device, copies) for item in value]
    if not isinstance(value, Distribution | Transform):
        return value
    if id(value) not in copies:
        copies[id(value)] = clone = copy.copy(value)
        clone.__dict__.update({name: _cast(item, device, copies) for name, item in vars(value).items()})
        if isinstance(clone, Distribution):
            clone._validate_args = False
    return copies[id(value)]
