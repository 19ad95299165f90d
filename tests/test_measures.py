"""What tables of papers measure of a model and its guide."""

from __future__ import annotations

from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from linear_guides import Linear

import calibrant as cal
from calibrant.inference.problem import Problem
from calibrant.reproductions.measures import pixels_of, samples_of, units_in_use

USED, UNUSED = 4, 16
CONTEXT = SimpleNamespace(stream=lambda *names: 0)


def program(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(USED + UNUSED), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[:, :USED], 0.5).to_event(1))


def guide(observed, size):
    x = observed["x"]
    mean = torch.cat([0.8 * x, x.new_zeros(size, UNUSED)], 1)
    sd = torch.cat([x.new_full((size, USED), 0.2**0.5), x.new_ones(size, UNUSED)], 1)
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(mean, sd).to_event(1))


def test_latents_that_are_not_used_are_not_counted():
    """As many data as the Frey faces have for the test: with 8 draws of the guide, 7 to 10 latents are counted."""
    data = {"x": cal.program.sample_prior(program, 195, seed=1)["x"]}
    assert units_in_use(CONTEXT, Problem.of(program, guide, data)) == {"active units": USED}
    few = cal.evaluation.active_units(program, guide, data, draws=8)
    assert int(few["active_units"]) > USED


def test_pixels_of_the_models_own_data_have_no_distance_and_ten_percent_of_noise_are_seen():
    linear = Linear.random(60, 3, 1.0)
    data = linear.data(200)

    def scores(model: Linear) -> dict[str, float]:
        found = pixels_of(CONTEXT, Problem.of(model.program(), model.guide(), data), 16)
        return {name: found[name].value / found[name].se for name in ("pixel PIT", "80% of pixels")}

    assert max(map(abs, scores(linear).values())) < limit(2)
    assert scores(Linear(linear.loading, 1.1))["pixel PIT"] > limit(2)
    assert scores(Linear(linear.loading, 1.1))["80% of pixels"] > limit(2)
    assert scores(Linear(linear.loading, 0.9))["80% of pixels"] < -limit(2)


@pytest.mark.parametrize("freedom", [1.2, 100.0])
def test_samples_with_heavy_tails_are_compared_as_pictures(freedom):
    """Without a cut, a noise of 1.2 degrees of freedom gives a distance of hundreds between equal means."""

    def pictures(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.5, 0.1))
            pyro.sample("x", dist.StudentT(freedom, z[:, None].expand(-1, 60), 0.01).to_event(1))

    def true(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(0.5, 0.1))

    x = cal.program.sample_prior(pictures, 400, seed=1)["x"].clamp(0.0, 1.0)
    found = samples_of(CONTEXT, Problem.of(pictures, true, {"x": x}), cal.data.Data({"x": x}))
    assert found["Fréchet"] < 3 * found["Fréchet floor"]
