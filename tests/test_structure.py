"""Linear-Gaussian structure is found in users' programs, with the evidence of dense algebra, and in no others."""

from __future__ import annotations

import doctest
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from gaussian_programs import (
    BIAS,
    CENTRE,
    LATENTS,
    LOGNORMAL,
    PIXELS,
    SOLVED,
    A,
    Truth,
    affine,
    here,
    hierarchical,
    hierarchical_scaled,
    normal,
    simulate,
    standard,
    two_observations,
)
from torch import Tensor, nn

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.linear_gaussian.detection import detect


@pytest.mark.parametrize(("program", "truth"), SOLVED.values(), ids=SOLVED)
def test_evidence_of_users_programs(program, truth):
    observed = simulate(program)
    observed["x"][2] *= 3
    evidence = cal.inference.log_evidence(program, observed).tolist()
    wanted = [truth.log_evidence(x.flatten()) for x in observed["x"].double()]
    # A scale's prior is written in float32; a grid that ends where a density does not vanish has a larger error.
    error = 1e-10 if truth.scale is None else 1e-5 if isinstance(truth.scale, dist.Uniform) else 1e-7
    assert evidence == pytest.approx(wanted, rel=error, abs=error)


def score(draws: np.ndarray, mean: Tensor, covariance: Tensor) -> float:
    """The largest error of means and covariances of independent draws (n, k), in standard errors; the draws' own
    moments set the errors, for they need not be Gaussian."""
    centred = draws - mean.numpy()
    products = centred[:, :, None] * centred[:, None, :] - covariance.numpy()
    errors = [values.mean(0) / (values.std(0) / math.sqrt(len(draws))) for values in (centred, products)]
    return max(float(np.abs(error).max()) for error in errors)


@pytest.mark.parametrize("program", [hierarchical, hierarchical_scaled])
def test_draws_come_back_by_site_with_their_joint_posterior(program):
    """Against the conditional of the joint Gaussian of (top, z, x) given s, written out by hand; 10,000 draws."""
    scaled = program is hierarchical_scaled
    observed = simulate(program, 2)
    tree = cal.inference.reference(program, observed, chains=4, draws=2500)
    posterior = tree["posterior"].dataset
    assert posterior.attrs["method"] == "exact"
    assert list(posterior.data_vars) == ["top", "z", *["s"] * scaled]
    assert posterior["top"].dims == ("chain", "draw", "data")
    assert posterior["z"].shape == (4, 2500, 2, LATENTS)
    draws = np.concatenate([posterior[name].values.reshape(10_000, 2, -1) for name in posterior.data_vars], -1)
    largest = limit(2 * (5 * scaled or 4) * 6)
    truth = SOLVED["scale, hierarchical" if scaled else "hierarchical"][1]
    for datum, x in enumerate(observed["x"].double()):
        mean, covariance = joint_moments(truth, x)
        assert score(draws[:, datum], mean, covariance) < largest
        shifted = mean + 0.1 * covariance.diagonal().sqrt()
        assert score(draws[:, datum], shifted, covariance) > largest
        assert score(draws[:, datum], mean, 1.15 * covariance) > largest


def joint_moments(truth: Truth, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of (top, z) and, where there is one, s."""
    slope = torch.tensor([1.0, 2.0, 2.0, 2.0]).double()[:, None]
    prior = 4.0 * slope * slope.T + 0.49 * torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0]).double())
    centre, loading = torch.cat([torch.ones(1), CENTRE + 2.0]), torch.cat([torch.zeros(PIXELS, 1), A], 1)
    s, weight = torch.ones(1).double(), torch.ones(1).double()
    if truth.scale is not None:
        s, density = truth.log_joint(x)
        weight = density.softmax(0)
    gain = s[:, None, None] * prior @ loading.T
    gain = gain @ torch.linalg.inv(s[:, None, None] ** 2 * loading @ prior @ loading.T + 0.25 * torch.eye(PIXELS))
    bias = BIAS if truth.scale is None else 0.0
    means = centre + (gain @ (x - bias - s[:, None] * (loading @ centre))[..., None])[..., 0]
    within = prior - gain @ (s[:, None, None] * loading @ prior)
    if truth.scale is not None:
        means, within = torch.cat([means, s[:, None]], 1), torch.nn.functional.pad(within, (0, 1, 0, 1))
    mean = weight @ means
    return mean, torch.einsum("n,nij->ij", weight, within) + (means - mean).T @ ((means - mean) * weight[:, None])


def test_a_site_that_is_not_observed_is_a_latent():
    """The posterior of y is then its prediction."""
    observed = simulate(two_observations)
    found = cal.inference.reference(two_observations, observed, chains=2, draws=20)["posterior"].dataset
    assert (found["y"].dims, found.attrs["method"]) == (("chain", "draw", "data"), "exact")


# -- what is something else --------------------------------------------------------------------------------------------


def decoded(function: Callable[[Tensor], Tensor], scale: Callable[[], Any] | None = None) -> Callable[[int], None]:
    """A decoder that is linear but for a function of the latents, or (with a scale) of s and the latents."""

    def program(size: int) -> None:
        with pyro.plate("data", size):
            s = pyro.sample("s", scale())[:, None] if scale else None
            z = pyro.sample("z", standard())
            pyro.sample("x", dist.Normal((function(z) if s is None else function(s, z)) @ here(A.T), 0.5).to_event(1))

    return program


def noisy(noise: Callable[..., Any], scale: bool = False) -> Callable[[int], None]:
    """The likelihood is a function of the mean, and of the latents or the scale."""

    def program(size: int) -> None:
        with pyro.plate("data", size):
            s = pyro.sample("s", LOGNORMAL) if scale else torch.ones(size)
            z = pyro.sample("z", standard())
            pyro.sample("x", noise(s[:, None] * (z @ here(A.T)), s[:, None] if scale else z))

    return program


def shared(size: int) -> None:
    centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(centre, 1.0).expand([size, LATENTS]).to_event(1))
        pyro.sample("x", dist.Normal(z @ here(A.T), 0.5).to_event(1))


def discrete(size: int) -> None:
    with pyro.plate("data", size):
        on = pyro.sample("on", dist.Bernoulli(0.5))
        z = pyro.sample("z", standard())
        pyro.sample("x", dist.Normal((1.0 + on[:, None]) * (z @ here(A.T)), 0.5).to_event(1))


def two_scales(size: int) -> None:
    with pyro.plate("data", size):
        s, r = pyro.sample("s", LOGNORMAL), pyro.sample("r", LOGNORMAL)
        z = pyro.sample("z", standard())
        pyro.sample("x", dist.Normal((s * r)[:, None] * (z @ here(A.T)), 0.5).to_event(1))


def bent_hierarchy(size: int) -> None:
    with pyro.plate("data", size):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal((top + 1e-10 * top**2)[:, None].expand(-1, LATENTS), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ here(A.T), 0.5).to_event(1))


def scaled_prior(size: int) -> None:
    with pyro.plate("data", size):
        s = pyro.sample("s", LOGNORMAL)
        z = pyro.sample("z", dist.Normal(0.0, s[:, None].expand(-1, LATENTS)).to_event(1))
        pyro.sample("x", dist.Normal(z @ here(A.T), 0.5).to_event(1))


def scale_after(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", standard())
        s = pyro.sample("s", dist.LogNormal(0.1 * z[:, 0], 1.0))
        pyro.sample("x", dist.Normal(s[:, None] * (z @ here(A.T)), 0.5).to_event(1))


def weighted(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", standard())
        pyro.factor("weight", -0.1 * z[:, 0].square())
        pyro.sample("x", dist.Normal(z @ here(A.T), 0.5).to_event(1))


def tempered(size: int) -> None:
    with pyro.plate("data", size):
        z = pyro.sample("z", standard())
        with pyro.poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z @ here(A.T), 0.5).to_event(1))


def fragile(size: int) -> None:
    """It cannot be evaluated far from its prior."""
    with pyro.plate("data", size):
        z = pyro.sample("z", standard())
        if z.abs().max() > 100:
            raise RuntimeError("no convergence")
        pyro.sample("x", dist.Normal(z @ here(A.T), 0.5).to_event(1))


def correlated(mean: Tensor, _: Tensor) -> Any:
    return dist.MultivariateNormal(mean, here(torch.eye(PIXELS) + 0.01))


OTHERS = {
    "Student-t prior": affine(lambda: dist.StudentT(100.0, 0.0, 1.0).expand([LATENTS]).to_event(1)),
    "Laplace prior": affine(lambda: dist.Laplace(0.0, 1.0).expand([LATENTS]).to_event(1)),
    "improper prior": affine(
        lambda: dist.ImproperUniform(dist.constraints.real, (), ()).expand([LATENTS]).to_event(1)
    ),
    "positive latents": affine(lambda: dist.LogNormal(0.0, 1.0).expand([LATENTS]).to_event(1)),
    "tanh": decoded(lambda z: torch.tanh(1e-3 * z) / 1e-3),
    "square": decoded(lambda z: z + 1e-10 * z**2),
    "threshold": decoded(lambda z: torch.nn.functional.softshrink(z, 1e-3)),
    "rectifier far away": decoded(lambda z: torch.relu(z + 100.0)),
    "network": decoded(nn.Sequential(nn.Linear(LATENTS, 20), nn.SiLU(), nn.Linear(20, LATENTS)).double()),
    "squared scale": decoded(lambda s, z: s**2 * z, lambda: LOGNORMAL),
    "power of the scale": decoded(lambda s, z: s**1.0001 * z, lambda: LOGNORMAL),
    "clipped scale": decoded(lambda s, z: s.clamp(max=100.0) * z, lambda: LOGNORMAL),
    "scaled and unscaled": decoded(lambda s, z: (s + 1.0) * z, lambda: LOGNORMAL),
    "scale of some": decoded(lambda s, z: torch.cat([s * z[:, :1], z[:, 1:]], 1), lambda: LOGNORMAL),
    "Student-t noise": noisy(lambda mean, _: dist.StudentT(100.0, mean, 0.5).to_event(1)),
    "Laplace noise": noisy(lambda mean, _: dist.Laplace(mean, 0.5).to_event(1)),
    "noise by the latents": noisy(lambda mean, z: dist.Normal(mean, 0.5 + 1e-4 * z[:, :1].tanh()).to_event(1)),
    "noise by the scale": noisy(lambda mean, s: dist.Normal(mean, 0.5 * s**0.001).to_event(1), True),
    "correlated noise": noisy(correlated),
    "masked noise": noisy(lambda mean, _: dist.Normal(mean, 0.5).mask(torch.arange(PIXELS) < 3).to_event(1)),
    "counts": noisy(lambda mean, _: dist.Poisson(mean.exp()).to_event(1)),
    "positive observations": noisy(lambda mean, _: dist.LogNormal(mean, 0.5).to_event(1)),
    "shared latents": shared,
    "discrete latents": discrete,
    "two scales": two_scales,
    "hierarchy": bent_hierarchy,
    "prior by the scale": scaled_prior,
    "scale by the latents": scale_after,
    "factor": weighted,
    "tempered likelihood": tempered,
    "fragile": fragile,
}  # fmt: skip


@pytest.mark.parametrize("program", OTHERS.values(), ids=OTHERS)
def test_other_programs_are_left_to_mcmc(program):
    assert detect(program, {"x": normal(4, PIXELS, seed=9).exp().round()}, {}) is None


def test_the_other_programs_differ_from_solved_ones_in_one_thing_alone():
    """Each has its Gaussian twin, so that none is refused for another reason than its own."""
    twins = {
        "decoder": decoded(lambda z: z),
        "module": decoded(nn.Linear(LATENTS, LATENTS).double()),
        "scale": decoded(lambda s, z: s * z, lambda: LOGNORMAL),
        "noise": noisy(lambda mean, _: dist.Normal(mean, 0.5).to_event(1)),
        "noise, scale": noisy(lambda mean, _: dist.Normal(mean, 0.5).to_event(1), True),
    }
    observed = {"x": normal(4, PIXELS, seed=9)}
    assert [name for name, twin in twins.items() if detect(twin, observed, {}) is None] == []


def test_two_observed_sites_and_covariates_are_left_to_mcmc():
    def placed(size: int, at: Tensor) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + at, 0.5))

    both = {"x": normal(4, PIXELS, seed=1), "y": torch.zeros(4)}
    assert detect(two_observations, both, {}) is None
    assert detect(placed, {"x": torch.zeros(4)}, {"at": torch.zeros(4)}) is None
    with pytest.raises(InferenceError, match="no covariates"):
        cal.inference.reference(placed, {"x": torch.zeros(4)}, "exact", covariates={"at": torch.zeros(4)})
    with pytest.raises(InferenceError, match="no exact evidence"):
        cal.inference.log_evidence(two_observations, both)


# -- under which circumstances -----------------------------------------------------------------------------------------

UNITS = {
    "small latents": affine(lambda: dist.Normal(0.0, 1e-6).expand([LATENTS]).to_event(1)),
    "large latents": affine(lambda: dist.Normal(0.0, 1e6).expand([LATENTS]).to_event(1)),
    "far offset": affine(offset=1e6),
    "little noise": affine(noise=1e-6),
    "much noise": affine(noise=1e6),
    "small scale": affine(scale=lambda: dist.LogNormal(-14.0, 1.0)),
    "wide scale": affine(scale=lambda: dist.LogNormal(0.0, 5.0), offset=10.0),
    "heavy tail": affine(scale=lambda: dist.HalfCauchy(1.0)),
}


@pytest.mark.parametrize("program", UNITS.values(), ids=UNITS)
def test_units_do_not_matter(program):
    assert detect(program, {"x": normal(4, PIXELS, seed=9)}, {}) is not None


class Deep(pyro.nn.PyroModule):
    """A linear decoder of several layers; a scale whose prior is learned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(5, 64), nn.Linear(64, 8 * 4 * 4), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 2, 4, 2, 1)
        )
        self.loc = nn.Parameter(torch.tensor(0.3))

    def forward(self, size: int) -> Tensor:
        with pyro.plate("data", size):
            s = pyro.sample("s", dist.LogNormal(self.loc, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
            return pyro.sample("x", dist.Normal(s[:, None, None, None] * self.layers(z), 0.1).to_event(3))


def test_the_module_the_random_state_and_the_callers_modes_are_left_alone(global_state):
    model, observed = Deep(), {"x": normal(3, 2, 8, 8, seed=1)}
    weights, random = {n: v.clone() for n, v in model.state_dict().items()}, torch.random.get_rng_state()
    before = global_state()
    found = [detect(model, observed, {})]
    assert global_state() == before
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found.append(detect(model, observed, {}))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for one in found:
        assert one is not None
        torch.testing.assert_close(one.loading, found[0].loading)
        assert not any(part.requires_grad for part in (one.loading, one.noise, one.covariance, one.mean))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_agrees_with_cpu():
    observed = {"x": normal(3, 2, 8, 8, seed=1)}
    cpu, gpu = cal.inference.log_evidence(Deep(), observed), cal.inference.log_evidence(Deep().cuda(), observed)
    torch.testing.assert_close(gpu.cpu(), cpu, rtol=1e-9, atol=1e-9)


def test_docstring():
    assert doctest.testmod(sys.modules[detect.__module__]).failed == 0
