"""The VAE with a noise scale for each image: with a linear decoder, everything given the scale is Gaussian, and one
integral over the scale is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from agreement import Truth, assert_agrees, from_grid, known
from scipy.special import logsumexp
from small_models import build
from torch.distributions import MultivariateNormal, Normal

import calibrant as cal
from calibrant.errors import ProgramError

LOG_SIGMA = torch.linspace(-6.0, 5.0, 2201, dtype=torch.float64)
STEP = float(LOG_SIGMA[1] - LOG_SIGMA[0])
SHORT = {"chains": 16, "warmup": 300, "draws": 500, "compile": False}


@pytest.fixture(scope="module")
def model_and_data():
    return build("sigma-image-vae", latents=2, scale=0.5, spread=0.6)


def on_a_grid(model, x):
    """log p(x, log sigma) on the grid, and mean and covariance of z given each sigma, for one datum."""
    weight, bias = (part.detach().double() for part in (model.decoder.weight, model.decoder.bias))
    prior = Normal(model.log_scale.detach().double(), model.log_spread.detach().double().exp())
    noise = LOG_SIGMA.exp()[:, None, None] ** 2
    of_x = MultivariateNormal(bias, weight @ weight.T + noise * torch.eye(len(bias)).double())
    covariance = torch.linalg.inv(torch.eye(2).double() + weight.T @ weight / noise)
    mean = covariance @ (weight.T @ (x.double() - bias)) / noise[:, 0]
    joint = prior.log_prob(LOG_SIGMA) + of_x.log_prob(x.double())
    return joint.numpy(), mean.numpy(), covariance.numpy()


def evidence_of_the_program(model, x):
    """log p(x) of one datum: the program's own density, summed over a grid of z and sigma."""
    z = torch.linspace(-6, 6, 97, dtype=torch.float64)
    plane = torch.stack(torch.meshgrid(z, z, indexing="ij"), -1).reshape(-1, 2)
    double, terms = cal.program.in_double(model), []
    log_sigmas = torch.linspace(-4, 4, 65, dtype=torch.float64)
    with torch.no_grad(), cal.program.defaults(model, {"x": x}, torch.float64):
        for log_sigma in log_sigmas:
            values = {"z": plane, "sigma": log_sigma.exp().expand(len(plane)), "x": x.double().expand(len(plane), -1)}
            terms.append(torch.logsumexp(cal.program.log_density(double, values).joint, 0) + log_sigma)
    cell = float(z[1] - z[0]) ** 2 * float(log_sigmas[1] - log_sigmas[0])
    return float(torch.logsumexp(torch.stack(terms), 0)) + np.log(cell)


def test_the_density_of_the_program_is_the_integral_over_the_noise(model_and_data):
    model, data = model_and_data
    for row in data["x"][1:]:
        joint = on_a_grid(model, row)[0]
        exact = float(logsumexp(joint) + np.log(STEP))
        found = evidence_of_the_program(model, row[None])
        assert abs(found - exact) < 2e-3
        at_median = int((LOG_SIGMA - model.log_scale.detach()).abs().argmin())
        prior = -float(model.log_spread.detach()) - 0.5 * np.log(2 * np.pi)  # of log sigma at its median
        assert abs(found - (joint[at_median] - prior)) > 0.02  # the defect: every image has the same noise


@pytest.mark.slow
def test_draws_of_the_reference_are_those_of_the_integral(model_and_data):
    model, data = model_and_data
    tables = [on_a_grid(model, row) for row in data["x"]]
    sigma = from_grid(LOG_SIGMA.exp().numpy(), np.stack([joint for joint, *_ in tables]))
    tree = cal.inference.reference(model, data, method="nuts", seed=2, **SHORT)
    truth = {"sigma": sigma, "z": moments(tables)}
    draws = tree["posterior"].dataset
    assert bool(tree["convergence"]["is_reference"].all())
    assert_agrees({name: draws[name].values for name in truth}, truth)


def moments(tables: list) -> Truth:
    """Mean and sd of z, `(data, 2)`: mixtures over sigma."""
    means, sds = [], []
    for joint, mean, covariance in tables:
        share = np.exp(joint - logsumexp(joint))
        centre = share @ mean
        second = np.einsum("s,sij->ij", share, covariance) + np.einsum("s,si,sj->ij", share, mean, mean)
        means.append(centre)
        sds.append(np.sqrt(np.diag(second) - centre**2))
    return known(np.array(means), np.array(sds))


def test_wrong_arguments_are_refused():
    for arguments in ({"scale": 0.0}, {"spread": -1.0}):
        with pytest.raises(ProgramError, match="both must be positive"):
            cal.models.create("sigma-image-vae", shape=(5,), **arguments)
