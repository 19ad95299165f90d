"""Linear-Gaussian structures with every part in use, and their posteriors by dense linear algebra."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import SoftplusTransform

from calibrant.inference.references.exact import ExactPosterior
from calibrant.linear_gaussian.parameters import LinearGaussian

PRIORS = {
    "lognormal": dist.LogNormal(0.0, 1.0),
    "gamma-2": dist.Gamma(2.0, 2.0),
    "gamma-half": dist.Gamma(0.5, 1.0),
    "rayleigh": dist.Weibull(math.sqrt(2.0), 2.0),
    "softplus-laplace": dist.TransformedDistribution(dist.Laplace(0.0, 1.0), [SoftplusTransform()]),
    "half-normal": dist.HalfNormal(1.0),
    "half-cauchy": dist.HalfCauchy(1.0),
    "expanded": dist.LogNormal(0.0, 1.0).expand([7]),
}
each_prior = pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gsm(pixels: int, latents: int, prior: Distribution | None = None, seed: int = 0, **others) -> LinearGaussian:
    """A scale mixture with every part of the structure in use, unless told otherwise."""
    root = normal(latents, latents, seed=seed + 1)
    parts = {
        "loading": normal(pixels, latents, seed=seed) / math.sqrt(latents),
        "noise": 0.3 + 0.4 * torch.rand(pixels, generator=generator(seed + 2), dtype=torch.float64),
        "offset": 0.5 * normal(pixels, seed=seed + 3),
        "shift": 0.5 * normal(pixels, seed=seed + 4),
        "mean": 0.5 * normal(latents, seed=seed + 5),
        "covariance": root @ root.T / latents,
        "scale": None if prior is None else "s",
        "scale_prior": prior,
    }
    return LinearGaussian(observed="x", latents={"z": (latents,)}, **(parts | others))


def prior_mean(structure: LinearGaussian) -> Tensor:
    return torch.zeros(structure.loading.shape[1]).double() if structure.mean is None else structure.mean


def program_density(structure: LinearGaussian, values: dict[str, Tensor]) -> Tensor:
    """The log joint density as a program would write it, from torch's own distributions."""
    z, s = values["z"], values.get("s", torch.ones(len(values["z"]), dtype=torch.float64))
    covariance = torch.eye(z.shape[1]).double() if structure.covariance is None else structure.covariance
    density = torch.distributions.MultivariateNormal(prior_mean(structure), covariance).log_prob(z)
    if structure.scale_prior is not None:
        density = density + structure.scale_prior.log_prob(s)
    zero = torch.zeros((), dtype=torch.float64)
    shift, offset = (zero if part is None else part for part in (structure.shift, structure.offset))
    mean = offset + s[:, None] * (shift + z @ structure.loading.T)
    return density + torch.distributions.Normal(mean, structure.noise).log_prob(values["x"].flatten(1)).sum(-1)


def dense_conditional(structure: LinearGaussian, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x | s), E[z | s, x] and Cov[z | s, x] for nodes s (n,) and one datum, from pixel-space covariances."""
    loading, noise = structure.loading, structure.noise.expand(len(structure.loading))
    covariance = torch.eye(loading.shape[1]).double() if structure.covariance is None else structure.covariance
    zero = torch.zeros_like(x)
    shift, offset = (zero if part is None else part for part in (structure.shift, structure.offset))
    cross = s[:, None, None] * (covariance @ loading.T)
    total = s[:, None, None] ** 2 * (loading @ covariance @ loading.T) + torch.diag(noise**2)
    error = x - offset - s[:, None] * (shift + loading @ prior_mean(structure))
    density = torch.distributions.MultivariateNormal(torch.zeros_like(x), total).log_prob(error)
    gain = torch.linalg.solve(total, cross.mT).mT
    return density, prior_mean(structure) + (gain @ error[..., None])[..., 0], covariance - gain @ cross.mT


def dense_posterior(structure: LinearGaussian, x: Tensor, low=-40.0, high=9.0, nodes=4001) -> dict[str, Tensor]:
    """Evidence, moments and nodes with cumulative weights for one datum, on an even grid in log s."""
    if structure.scale is None:
        density, mean, covariance = dense_conditional(structure, torch.ones(1, dtype=torch.float64), x)
        return {"log_evidence": density[0], "mean": mean[0], "covariance": covariance[0]}
    t = torch.linspace(low, high, nodes, dtype=torch.float64)
    density, means, covariances = dense_conditional(structure, t.exp(), x)
    prior = structure.scale_prior.log_prob(t.exp()[:, None])
    logw = density + prior.reshape(nodes, -1)[:, 0] + t + math.log(t[1] - t[0])
    w, s = logw.softmax(0), t.exp()
    mean, s_mean = w @ means, w @ s
    covariance = torch.einsum("n,nij->ij", w, covariances) + (means - mean).T @ ((means - mean) * w[:, None])
    s_sd = (w @ (s - s_mean) ** 2).sqrt()
    cdf = torch.cat([torch.zeros(1).double(), ((w[1:] + w[:-1]) / 2).cumsum(0)])
    return {
        "log_evidence": logw.logsumexp(0), "mean": mean, "covariance": covariance,
        "s_mean": s_mean, "s_sd": s_sd, "s": s, "cdf": cdf / cdf[-1],
    }  # fmt: skip


def assert_matches_dense(posterior: ExactPosterior, x: Tensor, rtol: float = 1e-7) -> None:
    for datum, row in enumerate(x):
        truth = dense_posterior(posterior.structure, row)
        sd = truth["covariance"].diagonal().clamp_min(0).sqrt()
        close = {"rtol": rtol, "atol": rtol}
        torch.testing.assert_close(posterior.log_evidence[datum], truth["log_evidence"], **close)
        torch.testing.assert_close(posterior.mean["z"][datum], truth["mean"], **close)
        torch.testing.assert_close(posterior.sd["z"][datum], sd, rtol=rtol, atol=1e-6)  # dense: a small difference
        torch.testing.assert_close(posterior.covariance(datum), truth["covariance"], **close)
        if posterior.structure.scale is not None:
            torch.testing.assert_close(posterior.mean["s"][datum], truth["s_mean"], **close)
            torch.testing.assert_close(posterior.sd["s"][datum], truth["s_sd"], **close)
