"""Data far from what the program simulates are warned of once, with a remedy that works; well-scaled data are not."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import model_cases

import calibrant as cal
from calibrant.inference.fitting.scales import warn_of_far_data
from calibrant.inference.fitting.state import Modules

SHAPE = (1, 4, 4)


def told(model: Any, observed: Any) -> list[str]:
    """The warnings before training."""
    data = observed if isinstance(observed, cal.data.Data) else cal.data.Data(observed)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_far_data(Modules(cal.program.as_program(model), torch.nn.Module()), data, seed=0)
    return [str(one.message) for one in found]


def vae() -> Any:
    torch.manual_seed(0)
    return cal.models.create("vae", shape=SHAPE, latents=2)


def normal(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def vague(size):
    centre = pyro.sample("centre", dist.Normal(0.0, 1000.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(centre, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def shared_scale(size):
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("x", dist.Normal(z, scale))


def heavy(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Cauchy(z, 1.0))


def counts(size):
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Poisson(rate))


def masked(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0).mask(torch.arange(size) % 2 == 0))


def factored(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("extra", -z.square())
        pyro.sample("x", dist.Normal(z, 1.0))


def grey(kind: str) -> torch.Tensor:
    """Pixels from 0 to 255, most of them black or not."""
    rng = np.random.default_rng(0)
    share = 0.15 if kind == "mostly black" else 1.0
    pixels = rng.integers(0, 256, size=(300, *SHAPE)) * (rng.random((300, *SHAPE)) < share)
    return torch.as_tensor(pixels.astype("uint8" if kind == "uint8" else "float32"))


def scaled(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(z, 1.0))


def test_a_program_in_float64_is_simulated_in_float64():
    assert told(vae().double(), {"x": torch.randn(20, *SHAPE)}) == []
    assert len(told(vae().double(), {"x": grey("float")})) == 1


@pytest.mark.parametrize("kind", ["uint8", "float", "mostly black"])
def test_pixels_from_0_to_255_under_a_gaussian(kind):
    pixels = grey(kind)
    (message,) = told(vae(), {"x": pixels})
    assert "site 'x' (from 0 to 255)" in message
    assert "divide them by 255" in message
    assert told(vae(), {"x": pixels.float() / 255}) == []


@pytest.mark.parametrize("factor", [0.001, 1.0, 5.0, 100.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("model", [normal, vae()], ids=["normal", "vae"])
def test_the_remedy_works(model, offset, factor):
    x = cal.program.sample_prior(model, 300, seed=1)["x"]
    data = offset + factor * x
    found = told(model, {"x": data})
    assert len(found) == (factor > 50)
    if found:
        divisor = float(re.search(r"divide them by ([\d.e+]+)", found[0]).group(1))
        assert told(model, {"x": data / divisor}) == []


@pytest.mark.parametrize("size", [1, 2, 5, 300])
def test_data_that_are_far_by_an_offset(size):
    assert len(told(normal, {"x": 1e4 + torch.randn(size)})) == 1


@pytest.mark.parametrize(
    ("model", "scale"),
    [(vague, 500.0), (counts, 300.0), (masked, 1e5), (factored, 1e5)],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_no_warning_where_the_prior_reaches_or_nothing_is_known(model, scale):
    x = scale * torch.rand(200, generator=torch.Generator().manual_seed(4))
    assert told(model, {"x": x.round() if model is counts else x}) == []


@pytest.mark.parametrize("model", [normal, vague, shared_scale, heavy])
def test_no_warning_for_what_the_program_simulates(model):
    for seed in range(20):
        assert told(model, {"x": cal.program.sample_prior(model, 100, seed=seed)["x"]}) == []


@pytest.mark.parametrize("case", model_cases())
def test_no_warning_for_simulations_of_registered_models(case):
    model = case.build()
    assert told(model, case.data(model, 64)) == []


def test_fit_warns_once():
    model, pixels = vae(), grey("uint8")
    data = {"x": pixels[:64]}
    guide = cal.guides.amortize(model, data)
    with pytest.warns(UserWarning, match="divide them by 255") as found:
        cal.inference.fit(model, guide, data, epochs=2, batch_size=32)
    assert len([one for one in found if "divide" in str(one.message)]) == 1
