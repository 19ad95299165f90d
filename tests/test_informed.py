"""The direction that a likelihood informs, against programs in which it is known."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit

from calibrant.errors import InferenceError
from calibrant.evaluation import informed_directions
from calibrant.inference import posterior, reference
from calibrant.inference.references.gate import exact_convergence

V = torch.tensor([3.0, 0.0, 4.0]) / 5
X = {"x": torch.linspace(-2.0, 2.0, 40)[:, None]}


def one_direction(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), torch.tensor([1.0, 1.0, 2.0])).to_event(1))
        pyro.sample("x", dist.Normal((z @ V.to(z))[:, None], 0.5).to_event(1))


def with_a_scale(size, v):
    """The direction is a covariate; the noise is a shared latent."""
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 0.1))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((z * v).sum(1, keepdim=True), noise).to_event(1))


def draws_near_zero(observed, size, v):
    pyro.sample("noise", dist.LogNormal(-1.0, 0.1))
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def test_the_direction_is_that_of_the_gradient_in_units_of_the_posterior():
    found = informed_directions(one_direction, X, reference(one_direction, X, draws=1000, seed=0))
    assert found["latent"].values.tolist() == ["z[0]", "z[1]", "z[2]"]
    prior = np.diag([1.0, 1.0, 4.0])
    v = V.double().numpy()
    covariance = prior - np.outer(prior @ v, prior @ v) / (v @ prior @ v + 0.25)
    wanted = np.sqrt(np.diag(covariance)) * v
    wanted /= np.linalg.norm(wanted)
    cosine = np.abs(found["direction"].values @ wanted)
    assert cosine.min() > 0.995  # the reference's sds have an error of 1%


def test_the_number_of_informed_dimensions_is_twice_the_variance_of_the_log_likelihood():
    """log p(x|z) = −(x − v·z)²/2σ²: with v·z ~ N(m, s²) its variance is (s/σ)⁴/2 + (s/σ)² (x − m)²/σ²."""
    found = informed_directions(one_direction, X, reference(one_direction, X, draws=1000, seed=0))
    prior, noise = 0.6**2 + 4 * 0.8**2, 0.25
    variance = prior * noise / (prior + noise)
    error = X["x"][:, 0].double().numpy() * (1 - prior / (prior + noise))
    wanted = 2 * ((variance / noise) ** 2 / 2 + variance * error**2 / noise**2)
    ratio = found["dimensions"].values / wanted
    assert abs(ratio.mean() - 1) < limit(1) * 1.5 * math.sqrt(2 / 100) / math.sqrt(40)


def test_covariates_and_shared_latents_take_part():
    torch.manual_seed(0)
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]).repeat(4, 1)
    data = {"x": torch.randn(12, 1)}
    theirs = posterior(with_a_scale, draws_near_zero, data, 200, covariates={"v": v})
    theirs["convergence"] = xr.DataTree(exact_convergence(np.zeros(12), np.zeros(12), np.arange(12)))
    found = informed_directions(with_a_scale, data, theirs, covariates={"v": v})
    assert found["latent"].values.tolist() == ["z[0]", "z[1]"]
    np.testing.assert_allclose(np.abs(found["direction"].values[:2]), [[1, 0], [0, 1]], atol=1e-6)


def test_without_a_datum_that_passes_there_is_no_direction():
    theirs = reference(one_direction, X, draws=500, seed=0)
    none = theirs["convergence"].to_dataset().assign(is_reference=("data", np.zeros(40, dtype=bool)))
    theirs["convergence"] = none
    with pytest.raises(InferenceError, match="no datum passes its gate"):
        informed_directions(one_direction, X, theirs)


def test_the_draws_of_all_data_are_never_copied_at_once():
    data = {"x": X["x"].repeat(10, 1)}
    few = reference(one_direction, data, draws=500, seed=0)
    posterior = few["posterior"].to_dataset()
    many = xr.concat([posterior] * 16, "draw").assign_coords(draw=np.arange(8000))
    few["posterior"] = xr.DataTree(many)
    tracemalloc.start()
    informed_directions(one_direction, data, few)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < many["z"].nbytes
