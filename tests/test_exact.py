"""Exact posteriors against brute-force integration, dense linear algebra and known limits."""

import math
from dataclasses import replace

import pyro.distributions as dist
import pytest
import torch
from linear_gaussian_truth import (
    PRIORS,
    assert_matches_dense,
    dense_posterior,
    each_prior,
    gsm,
    normal,
    program_density,
)
from scipy.integrate import quad
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.inference.references import exact
from calibrant.inference.references.exact import solve
from calibrant.linear_gaussian.parameters import LinearGaussian

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
    assert posterior.grid_error.max() < 1e-9 if prior is not None else (posterior.grid_error == 0).all()


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
        torch.testing.assert_close(one.log_evidence, other.log_evidence, rtol=1e-9, atol=0)
        torch.testing.assert_close(one.sd["z"], other.sd["z"], rtol=1e-8, atol=0)
    torch.testing.assert_close(whole.mean["z"][7:9], part.mean["z"], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(whole.mean["s"][7:9], part.mean["s"], rtol=1e-8, atol=0)


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
