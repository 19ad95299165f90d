"""Active units: the variance of posterior means over data, where it is known."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from linear_guides import Linear

import calibrant as cal
from calibrant.errors import InferenceError

LOADING = torch.zeros(6, 4).double()
LOADING[:, :2] = Linear.random(6, 2, 1.0).loading
LINEAR = Linear(LOADING, 1.0)  # the last two latents say nothing
TRUE = 1.0 - LINEAR.covariance.diagonal().numpy()  # Var E(z | x) = Var z − E Var(z | x)


@pytest.fixture(scope="module")
def found():
    return cal.evaluation.active_units(LINEAR.program(), LINEAR.guide(), LINEAR.data(2000), draws=20)


def test_the_variance_of_posterior_means_is_that_of_the_closed_form(found):
    scores = (found["variance"] - TRUE) / found["variance_se"]
    assert float(np.abs(scores).max()) < limit(4)
    assert found["active"].values.tolist() == [True, True, False, False]
    assert int(found["active_units"]) == 2
    np.testing.assert_allclose(found["posterior_variance"], LINEAR.covariance.diagonal(), rtol=0.1)


def test_the_noise_of_the_draws_left_in_is_caught(found):
    wrong = found["variance"] + found["posterior_variance"] / found.attrs["draws"]
    assert float(np.abs((wrong - TRUE) / found["variance_se"]).max()) > limit(4)
    assert (wrong > found.attrs["threshold"]).all()  # all four would count as active


def test_latents_are_counted_by_site():
    def program(size):
        with pyro.plate("data", size):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
            pyro.sample("x", dist.Normal(s + z[:, 0, 1], 1.0))

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("s", dist.LogNormal(0.0 * observed["x"], 1.0))
            mean = torch.zeros(size, 2, 2)
            mean[:, 0, 1] = observed["x"]
            pyro.sample("z", dist.Normal(mean, 0.5).to_event(2))

    found = cal.evaluation.active_units(program, guide, {"x": torch.linspace(-2.0, 2.0, 50)}, draws=200, threshold=0.2)
    assert found["latent"].values.tolist() == ["s", "z[0,0]", "z[0,1]", "z[1,0]", "z[1,1]"]
    assert found["latent"].values[found["active"].values].tolist() == ["z[0,1]"]
    assert found["latent_site"].values.tolist() == ["s", "z"]
    assert found["active_in_site"].values.tolist() == [0, 1]
    assert found["units_in_site"].values.tolist() == [1, 4]


def test_a_threshold_that_is_not_positive_is_refused():
    with pytest.raises(InferenceError, match="positive threshold"):
        cal.evaluation.active_units(LINEAR.program(), LINEAR.guide(), LINEAR.data(4), threshold=0.0)
