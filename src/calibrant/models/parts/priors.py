"""Priors of latents, by name. Each is a function without arguments that the program calls, so that its constants
follow the default device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro.distributions.transforms import SoftplusTransform

from calibrant.errors import ProgramError

Prior = Callable[[], dist.TorchDistribution]


def rayleigh(scale: float) -> dist.TorchDistribution:
    """The Rayleigh distribution: the norm of two Normals with standard deviation `scale`."""
    return dist.Weibull(scale * 2**0.5, 2.0)


def softplus_laplace(loc: float, scale: float) -> dist.TorchDistribution:
    """softplus(u) with u ~ Laplace(loc, scale)."""
    return dist.TransformedDistribution(dist.Laplace(loc, scale), [SoftplusTransform()])


SCALE_PRIORS: dict[str, tuple[Callable[..., dist.TorchDistribution], dict[str, float]]] = {
    "lognormal": (dist.LogNormal, {"loc": 0.0, "scale": 1.0}),
    "gamma": (dist.Gamma, {"concentration": 2.0, "rate": 2.0**0.5}),
    "rayleigh": (rayleigh, {"scale": 1.0}),
    "softplus-laplace": (softplus_laplace, {"loc": 0.0, "scale": 1.0}),
}
VECTOR_PRIORS: dict[str, Callable[[float, float], dist.TorchDistribution]] = {
    "normal": dist.Normal,
    "laplace": dist.Laplace,
}


def named_scale_prior(prior: str | dict[str, Any], allowed: tuple[str, ...]) -> Prior:
    """The prior of a positive scalar from its name, or from `{"name": …, **parameters}`.

    Raises:
        ProgramError: for an unknown name or parameter.
    """
    given = {"name": prior} if isinstance(prior, str) else dict(prior)
    name = given.pop("name", None)
    if name not in allowed:
        raise ProgramError(f"unknown scale prior {name!r}; this model takes {sorted(allowed)}")
    make, parameters = SCALE_PRIORS[name]
    if unknown := set(given) - set(parameters):
        raise ProgramError(f"scale prior {name!r} has no parameters {sorted(unknown)}; it has {parameters}")
    return lambda: make(**{**parameters, **given})


def vector_prior(prior: str | dict[str, Any], latents: int) -> Prior:
    """`latents` independent variables from the name of their prior, or from `{"name": …, "loc": …, "scale": …}`.

    The location is 0 and the scale 1 where they are not given. A Laplace variable with scale b has the standard
    deviation √2 b.

    Raises:
        ProgramError: for an unknown name or parameter, a scale that is not positive, or no latents.
    """
    given = {"name": prior} if isinstance(prior, str) else dict(prior)
    name = given.pop("name", None)
    if name not in VECTOR_PRIORS:
        raise ProgramError(f"unknown latent prior {name!r}; known: {sorted(VECTOR_PRIORS)}")
    if unknown := set(given) - {"loc", "scale"}:
        raise ProgramError(f"latent prior {name!r} has no parameters {sorted(unknown)}; it has loc and scale")
    loc, scale = (float(value) for value in {"loc": 0.0, "scale": 1.0, **given}.values())
    if not scale > 0:
        raise ProgramError(f"the latent prior {name!r} has scale={scale:g}: it must be positive")
    if latents < 1:
        raise ProgramError(f"latents={latents}: a model needs at least one latent")
    return lambda: VECTOR_PRIORS[name](loc, scale).expand([latents]).to_event(1)
