"""Draws are stored in float32 where that changes nothing: not next to a bound, and not far from zero."""

from __future__ import annotations

from math import log

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import biject_to

import calibrant as cal
from calibrant.inference.references import repair
from calibrant.inference.rounding import as_stored
from calibrant.program.contract import as_program
from calibrant.program.supports import from_line

FAR, WIDTH = 1e6, 0.01


def far(size):
    """A posterior whose mean is 100 million times its sd."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(FAR, 1.0))
        pyro.sample("x", dist.Normal(z, WIDTH))


def exact_guide(observed, size):
    total = 1 + WIDTH**2
    with pyro.plate("data", size):
        mean = (WIDTH**2 * FAR + observed["x"]) / total
        pyro.sample("z", dist.Normal(mean, WIDTH / total**0.5))


X = {"x": torch.tensor([FAR - 1, FAR, FAR + 0.5, FAR + 1], dtype=torch.float64)}


@pytest.mark.parametrize("method", ["exact", "nuts"])
def test_a_latent_far_from_zero_is_compared_rightly(method, tmp_path):
    lengths = {} if method == "exact" else {"warmup": 100, "draws": 500, "compile": False}
    reference = cal.inference.reference(far, X, method=method, **lengths)
    guided = cal.inference.posterior(far, exact_guide, X)
    for tree, name in ((reference, "reference.nc"), (guided, "posterior.nc")):
        cal.store.save_tree(tree, tmp_path / name)
        loaded = cal.store.load_tree(tmp_path / name)["posterior"]["z"]
        assert loaded.dtype == np.float64
        assert loaded.equals(tree["posterior"]["z"])
    result = cal.evaluation.compare(guided, reference)
    assert result.sizes["data"] == 4
    for name, right in (("mean_error", 0.0), ("sd_ratio", 1.0), ("coverage", 0.9)):
        error = abs(result[name] - right) / result[f"{name}_se"]
        assert float(error.max()) < 4.5, name
    rounded = reference.copy(deep=True)
    rounded["posterior"] = rounded["posterior"].to_dataset().astype(np.float32)
    wrong = cal.evaluation.compare(guided, rounded)
    assert float(abs(wrong["sd_ratio"] - 1).min()) > 0.5  # what float32 would have done


# -- the rule ----------------------------------------------------------------------------------------------------------


def stored(program, draws, x=None, latents=("z",)):
    data = cal.data.Data({"x": torch.zeros(draws["z"].shape[2]) if x is None else x})
    return as_stored(draws, as_program(program), data, latents, list(draws))


def prior_of(distribution):
    def program(size):
        with pyro.plate("data", size):
            pyro.sample("z", distribution.expand([size, *distribution.batch_shape[1:]]))
            pyro.sample("x", dist.Normal(torch.zeros(size), 1.0))

    return program


def draws_of(distribution, count=500):
    torch.manual_seed(0)
    return {"z": distribution.expand([2]).sample(torch.Size([2, count])).double()}


def wide(value):
    return torch.tensor(value, dtype=torch.float64)


HARMLESS = {
    "Normal": dist.Normal(wide(3.0), wide(1.0)),
    "LogNormal": dist.LogNormal(wide(0.0), wide(2.0)),
    "Cauchy": dist.Cauchy(wide(0.0), wide(1.0)),
    "Beta": dist.Beta(wide(2.0), wide(3.0)),
    "Dirichlet": dist.Dirichlet(wide([2.0, 3.0, 4.0])),
    "von Mises": dist.VonMises(wide(1.0), wide(2.0)),
    "Poisson": dist.Poisson(wide(3.0)),
}


@pytest.mark.parametrize("distribution", HARMLESS.values(), ids=HARMLESS)
def test_usual_draws_are_stored_in_float32(distribution):
    draws = draws_of(distribution)
    kept = stored(prior_of(distribution), draws)["z"]
    assert kept.dtype == torch.float32
    assert torch.equal(kept, draws["z"].float())


AWKWARD = {
    "Beta next to 1": dist.Beta(wide(1.0), wide(0.1)),
    "Dirichlet in a corner": dist.Dirichlet(wide([0.1, 0.1, 0.1])),
    "below 1e-38": dist.LogNormal(wide(-90.0), wide(5.0)),
    "above 1e38": dist.LogNormal(wide(90.0), wide(5.0)),
    "far from zero": dist.Normal(wide(1e4), wide(1e-2)),
    "heavy tails far from zero": dist.Cauchy(wide(1e4), wide(1e-2)),
    "inside an interval": dist.TransformedDistribution(
        dist.Normal(wide(0.0), wide(1e-5)), biject_to(constraints.interval(0.0, 1e6))
    ),
    "nearly equal": dist.TransformedDistribution(
        dist.Normal(wide([1.0, -18.0]), wide([1.0, 2.0])).to_event(1), biject_to(constraints.ordered_vector)
    ),
}


@pytest.mark.parametrize("distribution", AWKWARD.values(), ids=AWKWARD)
def test_draws_that_float32_cannot_tell_apart_keep_float64(distribution):
    draws = draws_of(distribution)
    kept = stored(prior_of(distribution), draws)["z"]
    assert torch.equal(kept, draws["z"])
    assert kept.dtype == torch.float64


def test_bounds_that_move_keep_float64():
    def program(size):
        with pyro.plate("data", size):
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("z", dist.Uniform(torch.zeros_like(s), s))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([size]))

    draws = {"s": torch.rand(2, 500, 3).double() + 1, "z": torch.rand(2, 500, 3).double()}
    kept = stored(program, draws, latents=["s", "z"])
    assert (kept["s"].dtype, kept["z"].dtype) == (torch.float32, torch.float64)


def test_one_datum_does_not_change_the_draws_of_another():
    torch.manual_seed(0)
    draws = torch.randn(2, 500, 3).double() * 0.01
    program = prior_of(dist.Normal(wide(0.0), wide(1e6)))
    alone = stored(program, {"z": draws})["z"]
    draws[:, :, 1] += 1e6
    beside = stored(program, {"z": draws})["z"]
    assert alone.dtype == torch.float32
    assert torch.equal(beside[:, :, 1], draws[:, :, 1])
    assert torch.equal(beside[:, :, ::2], alone[:, :, ::2].double())


def test_shared_latents_are_judged_as_a_whole():
    def program(size):
        pyro.sample("far", dist.Normal(0.0, 1e6))
        pyro.sample("w", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([size]))

    torch.manual_seed(0)
    draws = {"far": torch.randn(2, 500).double() + 1e6, "w": dist.Dirichlet(wide([2.0, 2, 2])).sample((2, 500))}
    data = cal.data.Data({"x": torch.zeros(3)})
    kept = as_stored(draws, as_program(program), data, ["far", "w"], [])
    assert (kept["far"].dtype, kept["w"].dtype) == (torch.float64, torch.float32)


# -- next to bounds ----------------------------------------------------------------------------------------------------


def test_small_shares_of_a_simplex_are_right():
    """After a share of nearly 1 there are others of 1e-20, which `1 − share` does not leave room for."""
    to_simplex, plain = from_line(constraints.simplex), biject_to(constraints.simplex)
    line = torch.randn(100, 4, dtype=torch.float64)
    assert torch.allclose(to_simplex(line), plain(line), rtol=1e-12, atol=0)
    for where in (to_simplex, from_line(constraints.independent(constraints.simplex, 1))):
        far_out = wide([[48.0, 60.0, -40.0], [-300.0, 30.0, 45.0]])
        value = where(far_out)
        assert (value > 0).all()
        assert torch.allclose(where.inv(value), far_out, rtol=1e-12)
    assert abs(float(to_simplex(far_out)[0, 1].log()) + 48 - log(3)) < 1e-9


def test_mass_that_float64_cannot_hold_is_refused(monkeypatch):
    """Of a Beta(10.1, .1) variable, 4% lie between 1 and the number before it; for the other datum there is none."""

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Beta(0.1, 0.1))
            pyro.sample("x", dist.Binomial(10, z))

    monkeypatch.setattr(repair, "_LOOKS", 1)
    tree = cal.inference.reference(program, {"x": torch.tensor([9.0, 10.0])}, warmup=100, draws=500, compile=False)
    convergence, z = tree["convergence"].dataset, tree["posterior"]["z"].values
    assert "closer to the edge of its support" in str(convergence["reason"].values[1])
    assert not bool(convergence["is_reference"][1])
    assert convergence["at_edge"][0] < 0.001 < 0.005 < convergence["at_edge"][1]
    assert z.dtype == np.float64
    assert ((z > 0) & (z < 1)).all()
    assert np.unique(z[:, :, 0], return_counts=True)[1].max() < 20  # a rejection repeats a draw
