"""Exact posteriors against brute-force integration, dense linear algebra and known limits."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from calibrant.inference.exact import ExactPosterior, solve
from calibrant.linear_gaussian.structure import LinearGaussian, join
from scipy.integrate import quad
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.transforms import SoftplusTransform

from calibrant.errors import InferenceError
from calibrant.inference import exact
from calibrant.linear_gaussian.density import log_joint, verify

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


# Evidence and moments


def brute_force(structure: LinearGaussian, x: Tensor, s_nodes: int, y_nodes: int) -> tuple[float, Tensor, Tensor]:
    """Log evidence, means and sds of (s, z) for one datum: the trapezoidal rule over log s and y = z sqrt(1 + s^2)."""
    t = torch.linspace(-32, 7, s_nodes, dtype=torch.float64)
    y = torch.linspace(-10, 10, y_nodes, dtype=torch.float64)
    latents = structure.loading.shape[1]
    points = torch.cartesian_prod(t, *[y] * latents)
    s, stretch = points[:, 0].exp(), (1 + (2 * points[:, 0]).exp()).sqrt()
    values = {"s": s, "z": points[:, 1:] / stretch[:, None], "x": x.expand(len(points), -1)}
    logw = program_density(structure, values) + points[:, 0] - latents * stretch.log()
    cell = math.log(t[1] - t[0]) + latents * math.log(y[1] - y[0])
    w, both = logw.softmax(0), torch.cat([s[:, None], values["z"]], dim=1)
    mean = w @ both
    return float(logw.logsumexp(0) + cell), mean, (w @ (both - mean) ** 2).sqrt()


BRUTE = ["lognormal", "gamma-2", "gamma-half", "rayleigh", "softplus-laplace", "half-normal"]


@pytest.mark.parametrize("name", BRUTE)
@pytest.mark.parametrize(("latents", "s_nodes", "y_nodes"), [(1, 1501, 201), (2, 161, 61)])
def test_brute_force_over_scale_and_latents(name, latents, s_nodes, y_nodes):
    root = 0.4 * normal(latents, latents, seed=9) + torch.eye(latents)
    parts = {"covariance": root @ root.T / 2, "noise": torch.tensor(0.7).double(), "shift": None}
    structure = gsm(3, latents, PRIORS[name], **parts)
    x = torch.stack([structure.offset, torch.tensor([1.0, -1.0, 0.4]).double()])
    posterior = solve(structure, x)
    # The even grid meets the kink between two nodes, with an error of the square of its step.
    tolerance = 4 / s_nodes if name == "softplus-laplace" else 1e-5
    for datum, row in enumerate(x):
        evidence, mean, sd = brute_force(structure, row, s_nodes, y_nodes)
        own_mean = torch.cat([posterior.mean["s"][datum, None], posterior.mean["z"][datum]])
        own_sd = torch.cat([posterior.sd["s"][datum, None], posterior.sd["z"][datum]])
        assert abs(posterior.log_evidence[datum] - evidence) < tolerance
        torch.testing.assert_close(own_mean, mean, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(own_sd, sd, rtol=tolerance, atol=tolerance)


@each_prior
def test_every_prior(prior):
    structure = gsm(8, 6, prior)
    x = torch.cat([structure.offset[None], 2 * normal(2, 8, seed=5)])
    posterior = solve(structure, x)
    kink = prior is PRIORS["softplus-laplace"]
    assert_matches_dense(posterior, x, rtol=1e-4 if kink else 1e-7)
    assert posterior.grid_error.max() < (1e-4 if kink else 1e-10)


SHAPES = {"tall": (6, 3), "square": (4, 4), "wide": (3, 5), "one pixel": (1, 3)}


@pytest.mark.parametrize(
    "prior", [None, PRIORS["lognormal"], PRIORS["gamma-2"]], ids=["no scale", "lognormal", "gamma"]
)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_part_of_the_structure(shape, prior):
    structure = gsm(*shape, prior)
    x = torch.stack([structure.offset, *normal(3, shape[0], seed=5)])
    posterior = solve(structure, x)
    assert_matches_dense(posterior, x)
    assert posterior.grid_error.max() < 1e-12 if prior is not None else (posterior.grid_error == 0).all()


@pytest.mark.parametrize("defect", ["singular covariance", "zero variance", "duplicate columns", "zero loading"])
@pytest.mark.parametrize("prior", [None, PRIORS["lognormal"]], ids=["no scale", "lognormal"])
def test_degenerate_structures(defect, prior):
    structure = gsm(5, 4, prior)
    if defect == "singular covariance":
        root = normal(4, 2, seed=6)
        structure = replace(structure, covariance=root @ root.T)
    elif defect == "zero variance":
        structure = replace(structure, covariance=torch.diag(torch.tensor([1.0, 1e-12, 0.0, 1e2])).double())
    elif defect == "duplicate columns":
        structure = replace(structure, loading=structure.loading[:, [0, 0, 1, 1]], covariance=None)
    else:
        structure = replace(structure, loading=torch.zeros(5, 4).double())
    x = normal(3, 5, seed=7)
    assert_matches_dense(solve(structure, x), x, rtol=1e-6)


def test_moments_do_not_depend_on_batch_chunks_or_precision(monkeypatch):
    structure = gsm(6, 4, PRIORS["lognormal"])
    x = 3 * normal(20, 2, 3, seed=8).float()
    whole, part = solve(structure, x), solve(structure, x[7:9].double())
    monkeypatch.setitem(exact._CHUNK_ELEMENTS, "cpu", 1)
    chunked = solve(structure, x)
    for one, other in [(whole, chunked), (solve(structure, x[7:9]), part)]:
        torch.testing.assert_close(one.log_evidence, other.log_evidence, rtol=1e-12, atol=0)
        torch.testing.assert_close(one.sd["z"], other.sd["z"], rtol=1e-10, atol=0)
    torch.testing.assert_close(whole.mean["z"][7:9], part.mean["z"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(whole.mean["s"][7:9], part.mean["s"], rtol=1e-10, atol=0)


# Known limits


@pytest.mark.parametrize("prior", [dist.Gamma(2.0, 3.0), PRIORS["rayleigh"]], ids=["gamma", "rayleigh"])
@pytest.mark.parametrize("latents", [4, 16, 64])
def test_blank_image_leaves_n_minus_2_over_n_of_the_prior_variance(prior, latents):
    """A prior density that goes as s at zero gives E[1 / (1 + s^2 / noise^2)] = (n - 2) / n for small noise."""
    basis = torch.linalg.qr(normal(latents + 9, latents)).Q
    structure = LinearGaussian("x", {"z": (latents,)}, basis, torch.tensor(1e-5), scale="s", scale_prior=prior)
    posterior = solve(structure, torch.zeros(1, latents + 9))
    assert posterior.sd["z"].square().mean() == pytest.approx((latents - 2) / latents, rel=0.01)


@pytest.mark.parametrize("noise", [0.05, 1.0])
def test_blank_image_with_a_lognormal_scale(noise):
    """Against scipy's adaptive quadrature of the posterior variance."""
    basis = torch.linalg.qr(normal(20, 12)).Q
    structure = LinearGaussian(
        "x", {"z": (12,)}, basis, torch.tensor(noise, dtype=torch.float64), scale="s", scale_prior=PRIORS["lognormal"]
    )

    def weight(t: float, power: float) -> float:
        return math.exp(-t * t / 2) * (1 + math.exp(2 * t) / noise**2) ** (-6 - power)

    options = {"epsabs": 0.0, "epsrel": 1e-11, "limit": 500}
    total, left = (quad(weight, -20, 10, (power,), **options)[0] for power in (0.0, 1.0))
    posterior = solve(structure, torch.zeros(1, 20))
    torch.testing.assert_close(
        posterior.sd["z"].square(), torch.full((1, 12), left / total, dtype=torch.float64), rtol=1e-8, atol=0
    )


@each_prior
def test_strong_image_pins_the_scale(prior):
    """CV(s) = 1 / sqrt(2 sum lambda_i^2), lambda_i the share of the signal in the variance along i."""
    loading = normal(100, 64, seed=3) / 10
    noise = 0.01
    structure = LinearGaussian("x", {"z": (64,)}, loading, torch.tensor(noise), scale="s", scale_prior=prior)
    true = torch.logspace(-0.5, 0, 8, dtype=torch.float64)[:, None]
    x = true * normal(8, 64, seed=4) @ loading.T + noise * normal(8, 100, seed=5)
    posterior = solve(structure, x)
    signal = posterior.mean["s"][:, None] ** 2 * torch.linalg.svdvals(loading) ** 2
    information = 2 * (signal / (noise**2 + signal)).square().sum(-1)
    assert (information >= 40).all()
    cv = posterior.sd["s"] / posterior.mean["s"]
    torch.testing.assert_close(cv, information.rsqrt(), rtol=0.1, atol=0)


def test_a_shift_far_above_the_noise():
    """The posterior of s is then 1e-6 wide: N(<b, x> / <b, b>, 1 / <b, b>), in units of the noise."""
    shift = 1e6 * normal(9, seed=1)
    structure = LinearGaussian(
        "x", {"z": (1,)}, torch.zeros(9, 1), torch.tensor(1.0), shift=shift, scale="s", scale_prior=PRIORS["lognormal"]
    )
    true = torch.tensor([1e-4, 1.0, 1e3]).double()
    posterior = solve(structure, true[:, None] * shift + normal(3, 9, seed=2))
    torch.testing.assert_close(posterior.sd["s"], (1 / shift.norm()).expand(3), rtol=1e-3, atol=0)
    torch.testing.assert_close(posterior.mean["s"], true, rtol=0, atol=float(5 / shift.norm()))
    assert posterior.grid_error.max() < 1e-3


@each_prior
def test_grid_error_from_blank_to_a_million_times_the_noise(prior):
    """Patches with a power-law spectrum, as natural ones, of every strength."""
    pixels, latents, noise = 64, 32, 0.1
    basis = torch.linalg.qr(normal(pixels, latents)).Q
    loading = basis * torch.arange(1, latents + 1).double().rsqrt() * 3
    strength = torch.cat([torch.zeros(1), torch.logspace(-3, 6, 46)]).double()[:, None] * noise
    x = strength * (normal(47, latents, seed=1) @ loading.T) + noise * (strength > 0) * normal(47, pixels, seed=2)
    structure = LinearGaussian("x", {"z": (latents,)}, loading, torch.tensor(noise), scale="s", scale_prior=prior)
    posterior = solve(structure, x)
    assert posterior.grid_error.max() < 1e-3
    assert all(value.isfinite().all() for value in [*posterior.mean.values(), *posterior.sd.values()])


def test_grid_error_sees_what_the_grid_does_not_hold():
    """Mass below the smallest float64, an improper posterior, a variance that is infinite, a scale pinned to 1e-18."""
    tiny, improper = dist.Gamma(0.005, 1.0), dist.ImproperUniform(torch.distributions.constraints.positive, (), ())
    for prior, latents, pull in [(tiny, 2, 0.0), (improper, 1, 0.0), (PRIORS["half-cauchy"], 1, 0.0), (tiny, 1, 1e18)]:
        loading, shift = torch.eye(3, latents), torch.full((3,), pull)
        sites = {"z": (latents,)}
        structure = LinearGaussian("x", sites, loading, torch.tensor(1.0), shift=shift, scale="s", scale_prior=prior)
        assert solve(structure, shift[None]).grid_error > 0.01


def test_a_prior_of_bounded_support():
    prior = dist.Uniform(torch.tensor(0.5).double(), torch.tensor(2.0).double())
    structure = gsm(5, 3, prior)
    x = normal(1, 5, seed=7)
    posterior = solve(structure, x)
    truth = dense_posterior(structure, x[0], low=math.log(0.5) + 1e-12, high=math.log(2.0) - 1e-12)
    torch.testing.assert_close(posterior.log_evidence[0], truth["log_evidence"], rtol=0, atol=1e-3)
    torch.testing.assert_close(posterior.mean["s"][0], truth["s_mean"], rtol=1e-3, atol=0)
    torch.testing.assert_close(posterior.mean["z"][0], truth["mean"], rtol=0, atol=1e-3)
    assert posterior.grid_error < 1e-3
    draws = posterior.sample(1, 1000, 0)["s"]
    assert draws.min() >= 0.5
    assert draws.max() <= 2.0


# Draws


def assert_draws_match(posterior: ExactPosterior, x: Tensor, draws: dict[str, Tensor]) -> None:
    """Mean and sd of every coordinate, and 5/50/95% quantiles of s, within Monte Carlo error; draws are i.i.d.

    With N draws it sees, with 95% power, a shift of about 6.6 / sqrt(N) posterior sd.
    """
    scores = []
    for site, values in draws.items():
        values = values.flatten(0, 1)
        count = len(values)
        scaled = (values - posterior.mean[site]) / posterior.sd[site]
        scores.append(scaled.mean(0).flatten() * math.sqrt(count))
        kurtosis = (scaled - scaled.mean(0)).pow(4).mean(0) / scaled.var(0) ** 2
        scores.append(((scaled.std(0) - 1) / (scaled.std(0) * ((kurtosis - 1) / (4 * count)).sqrt())).flatten())
    for datum, row in enumerate(x):
        s = draws["s"][:, :, datum].flatten()
        truth = dense_posterior(posterior.structure, row, low=-12.0, nodes=20001)
        for level in (0.05, 0.5, 0.95):
            quantile = float(np.interp(level, truth["cdf"].numpy(), truth["s"].numpy()))
            error = math.sqrt(level * (1 - level) / len(s))
            scores.append(((s < quantile).double().mean()[None] - level) / error)
    score = torch.cat(scores).abs()
    assert score.max() < limit(len(score)), f"{score.max():.1f} standard errors"


def drawn(count: int, data: int = 3, latents: int = 4) -> tuple[ExactPosterior, Tensor, dict[str, Tensor]]:
    structure = gsm(3, latents, PRIORS["lognormal"])
    x = torch.cat([structure.offset[None], 2 * normal(5, 3, seed=6)])[:data]
    posterior = solve(structure, x)
    return posterior, x, posterior.sample(4, count, 11)


def test_draws_agree_with_the_exact_posterior():
    posterior, x, draws = drawn(1000)
    assert draws["s"].shape == (4, 1000, 3)
    assert draws["z"].shape == (4, 1000, 3, 4)
    assert_draws_match(posterior, x, draws)
    centred = draws["z"][:, :, 1].flatten(0, 1) - posterior.mean["z"][1]
    covariance, sd = centred.T @ centred / 4000, posterior.sd["z"][1]
    assert ((covariance - posterior.covariance(1)) / sd / sd[:, None]).abs().max() < 5.5 * math.sqrt(2 / 4000) * 1.5


def test_narrow_draws_are_caught():
    posterior, x, draws = drawn(1000)
    narrow = draws | {"z": posterior.mean["z"] + 0.9 * (draws["z"] - posterior.mean["z"])}
    with pytest.raises(AssertionError, match="standard errors"):
        assert_draws_match(posterior, x, narrow)


def test_the_inverse_distribution_function_has_no_visible_error():
    """A million draws see .007 sd; half the resolution and a shift by one of its cells are caught."""
    posterior, x, draws = drawn(250_000, data=1, latents=1)
    assert_draws_match(posterior, x, draws)
    grid = posterior._grid
    step = 2 * grid.step
    shifted = grid._replace(step=step, start=grid.start + step, log_density=grid.log_density[:, ::2])
    with pytest.raises(AssertionError, match="standard errors"):
        assert_draws_match(posterior, x, replace(posterior, _grid=shifted).sample(4, 250_000, 11))


def test_draws_follow_the_seed_and_not_the_chunks(monkeypatch):
    posterior, _, draws = drawn(50)
    monkeypatch.setitem(exact._CHUNK_ELEMENTS, "cpu", 1)
    again, from_generator = posterior.sample(4, 50, 11), posterior.sample(4, 50, generator(11))
    for site, values in draws.items():
        torch.testing.assert_close(again[site], values, rtol=1e-12, atol=1e-12)
        assert torch.equal(from_generator[site], again[site])
        assert not torch.equal(posterior.sample(4, 50, 12)[site], again[site])


def test_draws_without_a_scale():
    structure = gsm(3, 2)
    posterior = solve(structure, normal(2, 3, seed=1))
    draws = posterior.sample(4, 2500, 0)
    assert set(draws) == set(posterior.mean) == {"z"}
    score = (draws["z"].mean((0, 1)) - posterior.mean["z"]) / posterior.sd["z"] * 100
    assert score.abs().max() < limit(4)
    error = (draws["z"].flatten(0, 1).std(0) / posterior.sd["z"] - 1) * math.sqrt(2 * 10_000)
    assert error.abs().max() < limit(4)


def test_several_sites_are_one_block():
    """Moments and draws of a scalar, a matrix and a vector are the parts of those of one vector."""
    whole = gsm(6, 8, PRIORS["lognormal"])
    parts = replace(whole, latents={"a": (), "b": (2, 2), "c": (3,)})
    x = normal(5, 6, seed=1)
    one, other = solve(whole, x), solve(parts, x)
    found = [other.mean, other.sd, other.sample(2, 7, 0)]
    for together, apart in zip([one.mean, one.sd, one.sample(2, 7, 0)], found, strict=True):
        assert list(apart) == ["a", "b", "c", "s"]
        lead = apart["s"].shape
        assert apart["b"].shape == (*lead, 2, 2)
        assert torch.equal(torch.cat([apart[name].reshape(*lead, -1) for name in "abc"], -1), together["z"])
    verify(parts, lambda values: program_density(whole, {**values, "z": join(values, parts.latents)}), x, generator())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    structure = gsm(16, 8, PRIORS["softplus-laplace"])
    x = 3 * normal(20, 16, seed=1)
    cpu, gpu = solve(structure, x), solve(structure, x.cuda())
    assert gpu.log_evidence.is_cuda
    torch.testing.assert_close(gpu.log_evidence.cpu(), cpu.log_evidence, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gpu.sd["z"].cpu(), cpu.sd["z"], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(gpu.sample(2, 5, 0)["s"].cpu(), cpu.sample(2, 5, 0)["s"], rtol=1e-5, atol=0)
    drawn_there = gpu.sample(4, 1000, torch.Generator("cuda").manual_seed(0))
    assert_draws_match(cpu, x, {site: values.cpu() for site, values in drawn_there.items()})
    verify(structure, partial(log_joint, structure), x.cuda(), generator())


# Whether a structure is the program's


@each_prior
def test_verify_accepts_the_programs_own_structure(prior):
    structure = gsm(4, 3, prior)
    state = torch.random.get_rng_state()
    verify(structure, partial(log_joint, structure), normal(2, 4), generator())
    assert torch.equal(torch.random.get_rng_state(), state)
    if not prior.batch_shape:
        verify(structure, partial(program_density, structure), normal(2, 2, 2), generator())


def test_verify_accepts_bounded_and_improper_scales_and_none():
    bounded = dist.Uniform(torch.tensor(0.5).double(), torch.tensor(2.0).double())
    improper = dist.ImproperUniform(torch.distributions.constraints.positive, (), ())
    for prior in (None, bounded, improper):
        structure = gsm(4, 3, prior)
        verify(structure, partial(program_density, structure), normal(2, 4), generator())


def nudged(value: Tensor) -> Tensor:
    """One entry changed by a thousandth."""
    change = torch.zeros_like(value)
    change.view(-1)[-1] = 1e-3
    return value + change


DEFECTS = {
    "noise": lambda structure: {"noise": structure.noise * 1.001},
    "one noise": lambda structure: {"noise": nudged(structure.noise)},
    "loading": lambda structure: {"loading": nudged(structure.loading)},
    "offset": lambda structure: {"offset": nudged(structure.offset)},
    "no shift": lambda structure: {"shift": None},
    "mean": lambda structure: {"mean": nudged(structure.mean)},
    "covariance": lambda structure: {"covariance": nudged(structure.covariance)},
    "prior": lambda structure: {"scale_prior": dist.LogNormal(0.0, torch.tensor(1.001).double())},
    "no prior": lambda structure: {"scale_prior": dist.HalfNormal(1.0)},
}


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_verify_refuses_another_structure(defect):
    structure = gsm(40, 20, PRIORS["lognormal"])
    wrong = replace(structure, **defect(structure))
    with pytest.raises(InferenceError, match=r"is not the program's.*differ by up to"):
        verify(wrong, partial(program_density, structure), 1e3 * normal(2, 40), generator())


def test_verify_refuses_densities_that_are_not_one_number_a_point():
    structure = gsm(4, 3, PRIORS["lognormal"])
    for density, message in [(torch.zeros(()), "shape"), (torch.full((64,), math.nan), "differ")]:
        with pytest.raises(InferenceError, match=message):
            verify(structure, lambda values, density=density: density, normal(2, 4), generator())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loading": torch.ones(3)}, "matrix"),
        ({"noise": torch.ones(5)}, "noise has shape"),
        ({"covariance": torch.eye(4)}, "covariance has shape"),
        ({"mean": torch.zeros(3)}, "mean has shape"),
        ({"latents": {"y": (3,), "z": ()}}, "loading has 2 columns"),
        ({"scale": None}, "or neither"),
        ({"noise": torch.zeros(3)}, "must be positive"),
        ({"shift": torch.full((3,), math.inf)}, "shift .* not finite"),
        ({"covariance": -torch.eye(2)}, "semi-definite"),
        ({"scale_prior": dist.Normal(0.0, 1.0)}, "positive"),
        ({"scale_prior": dist.LogNormal(torch.zeros(2), 1.0).to_event(1)}, "events"),
        ({"scale_prior": dist.LogNormal(torch.arange(2.0), 1.0)}, "differs between data"),
    ],
)
def test_what_cannot_be_solved_is_refused(change, message):
    with pytest.raises(InferenceError, match=message):
        solve(replace(gsm(3, 2, PRIORS["lognormal"]), **change), torch.zeros(1, 3))


@pytest.mark.parametrize(
    "x", [torch.tensor([[0.0, math.nan, 0.0]]), torch.zeros(2, 4), torch.zeros(0, 3), torch.zeros(())]
)
def test_images_that_do_not_fit_are_refused(x):
    with pytest.raises(InferenceError, match="'x'"):
        solve(gsm(3, 2, PRIORS["lognormal"]), x)
