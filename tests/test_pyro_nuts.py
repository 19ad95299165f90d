"""Pyro's NUTS against closed forms, datum by datum and with shared latents; planted defects."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from arviz_stats.base import array_stats
from small_models import X, any_length, conjugate, hierarchical
from torch.distributions import constraints

import calibrant as cal
from calibrant.errors import InferenceError, ProgramError
from calibrant.inference import reference
from calibrant.inference.references.pyro_nuts import sample_pyro_nuts
from calibrant.program import LogDensity, as_program, sample_prior
from calibrant.progress import silent


def scores(draws: np.ndarray, mean: np.ndarray, sd: np.ndarray, least: int = 400) -> np.ndarray:
    """Errors of means and sds in Monte Carlo standard errors, `(2, latent)`, after a gate on the effective sample size.

    Args:
        draws: (chain, draw, latent).
        mean: exact posterior means.
        sd: exact posterior standard deviations.
        least: the smallest effective sample size that the gate accepts.
    """
    axes = {"chain_axis": 0, "draw_axis": 1}
    assert array_stats.ess(draws, **axes, method="bulk").min() > least
    errors = draws.mean((0, 1)) - mean, draws.std((0, 1)) - sd
    return np.stack(
        [e / array_stats.mcse(draws, **axes, method=m) for e, m in zip(errors, ("mean", "sd"), strict=True)]
    )


def exact_hierarchical(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd of (centre, z…): a Gaussian with this precision."""
    size = len(x)
    precision = np.zeros((size + 1, size + 1))
    precision[0, 0] = 1 / 0.25 + size
    precision[0, 1:] = precision[1:, 0] = -1.0
    precision[1:, 1:] = np.diag(np.full(size, 1.0 + 4.0))
    covariance = np.linalg.inv(precision)
    return covariance @ np.concatenate([[3.0 / 0.25], 4 * x]), np.sqrt(np.diag(covariance))


def run_hierarchical() -> xr.DataTree:
    return reference(hierarchical, {"x": X["x"][:2]}, "pyro-nuts", warmup=200, draws=500)


def hierarchical_scores(tree: xr.DataTree) -> np.ndarray:
    group = tree["posterior"].dataset
    draws = np.concatenate([group["centre"].values[..., None], group["z"].values], -1)
    return scores(draws, *exact_hierarchical(X["x"][:2].numpy()))


@pytest.mark.slow
def test_nuts_with_a_shared_latent():
    """Six statistics of a Gaussian posterior: a mean off by 0.25 sd is seen with 95% power at ESS 600."""
    tree = run_hierarchical()
    assert np.abs(hierarchical_scores(tree)).max() < limit(6)
    group, stats = tree["posterior"].dataset, tree["sample_stats"].dataset
    assert group["centre"].dims == group["square"].dims == ("chain", "draw")
    np.testing.assert_allclose(group["square"], group["centre"] ** 2, rtol=1e-5)
    np.testing.assert_allclose(group["double"], 2 * group["z"], rtol=1e-5)
    assert group.attrs["independent_draws"] == 0
    # The correlation of shared and local latents shows that their draws belong together.
    covariance = np.cov(group["centre"].values.ravel(), group["z"].values[..., 0].ravel())
    assert covariance[0, 1] > 0.5 * np.linalg.inv(np.array([[6.0, -1, -1], [-1, 5, 0], [-1, 0, 5]]))[0, 1]
    assert_statistics_are_sane(stats, dimension=3)
    assert bool(tree["convergence"]["is_reference"].all())


def assert_statistics_are_sane(stats: xr.Dataset, dimension: int) -> None:
    assert set(stats.data_vars) == {
        "lp",
        "energy",
        "acceptance_rate",
        "step_size",
        "tree_depth",
        "n_steps",
        "diverging",
    }
    assert all(stats[name].dims == ("chain", "draw", "data") for name in stats.data_vars)
    # H = −lp + kinetic energy at the start of the transition, and the kinetic energy is χ²(dimension) / 2.
    kinetic = stats["energy"].values[:, 1:] + stats["lp"].values[:, :-1]
    assert kinetic.min() >= 0
    error = (kinetic.mean() - dimension / 2) / math.sqrt(dimension / 2 / kinetic[..., 0].size)
    assert abs(error) < limit(1)
    steps, depth = stats["n_steps"].values, stats["tree_depth"].values
    assert steps.min() >= 1
    np.testing.assert_array_equal(depth, np.ceil(np.log2(steps + 1)))
    assert depth.max() <= 10
    assert ((stats["acceptance_rate"] > 0) & (stats["acceptance_rate"] <= 1)).all()
    assert 0.6 < float(stats["acceptance_rate"].mean()) < 0.99
    assert np.ptp(stats["step_size"].values, 1).max() == 0  # adaptation has ended
    assert int(stats["diverging"].sum()) == 0


@pytest.mark.slow
def test_a_lost_prior_is_seen(monkeypatch):
    """Without the shared terms the posterior of `centre` is improper or far off: the same statistics must show it."""
    shared = LogDensity.shared
    monkeypatch.setattr(LogDensity, "shared", property(lambda self: shared.fget(self) * 0.7))
    assert np.abs(hierarchical_scores(run_hierarchical())).max() > limit(6)


def improper(size):
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.ImproperUniform(constraints.positive, (), ()))
        pyro.sample("x", dist.Exponential(rate[:, None].expand(-1, 3)).to_event(1))


WAITS = {"x": torch.tensor([[4.0, 2.0, 3.0]])}


def improper_scores(tree: xr.DataTree, least: int = 400) -> np.ndarray:
    """Flat prior, three waiting times: the posterior is Gamma(4, Σx)."""
    total = WAITS["x"].sum(-1).double().numpy()
    return scores(tree["posterior"]["rate"].values, 4 / total, 2 / total, least)


def run_improper() -> xr.DataTree:
    return reference(improper, WAITS, "pyro-nuts", warmup=200, draws=1000)


def test_nuts_with_an_improper_prior(monkeypatch):
    """Fewer draws than could pass the gate, whose density is known: lp does without statistics."""
    any_length(monkeypatch)
    tree = reference(improper, WAITS, "pyro-nuts", chains=2, warmup=60, draws=100)
    assert np.abs(improper_scores(tree, least=20)).max() < limit(2)
    assert not tree["convergence"]["is_reference"].any()
    stats = tree["sample_stats"].dataset
    assert_statistics_are_sane(stats, dimension=1)
    # lp is the log density on the unconstrained line, log rate: 3 log rate − rate Σx, + log rate of the Jacobian.
    rate = tree["posterior"]["rate"].values.astype(float)
    wanted = 4 * np.log(rate) - rate * WAITS["x"].sum(-1).double().numpy()
    np.testing.assert_allclose(stats["lp"], wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ProgramError, match="improper"):
        sample_prior(improper, 2)


@pytest.mark.truth
def test_draws_with_an_improper_prior():
    """Two statistics of a Gamma posterior: a mean off by 0.25 sd is seen with 95% power at ESS 600."""
    tree = run_improper()
    assert np.abs(improper_scores(tree)).max() < limit(2)
    assert_statistics_are_sane(tree["sample_stats"].dataset, dimension=1)


@pytest.mark.slow
def test_a_lost_jacobian_is_seen(monkeypatch):
    transform = torch.distributions.transforms.ExpTransform
    monkeypatch.setattr(transform, "log_abs_det_jacobian", lambda self, x, y: 0 * x)
    assert np.abs(improper_scores(run_improper())).max() > limit(2)


def test_nuts_records_constants_once():
    def model(size):
        pyro.deterministic("sd", torch.tensor(0.5))
        conjugate(size)

    data = cal.data.Data({"x": X["x"][:2]})
    with torch.no_grad():  # gradients are the library's own affair
        result = sample_pyro_nuts(as_program(model), data, chains=2, warmup=5, draws=7, seed=0, progress=silent)
    assert result.local == ["z"]
    assert {name: tuple(value.shape) for name, value in result.draws.items()} == {"z": (2, 7, 2), "sd": (2, 7)}
    assert result.draws["sd"].unique().tolist() == [0.5]


def test_nuts_refuses_discrete_latents_and_densities_without_a_start():
    def discrete(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0))

    def impossible(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("never", torch.full_like(z, -torch.inf))
            pyro.sample("x", dist.Normal(z, 1.0))

    def angle(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.VonMises(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.cos(), 1.0))

    with pytest.raises(InferenceError, match=r"all latents \(k\) are discrete.*method='exact'"):
        reference(discrete, X, "pyro-nuts")
    with pytest.raises(InferenceError, match=r"\['z'\] are angles"):
        reference(angle, X, "pyro-nuts")
    with pytest.raises(InferenceError, match="no finite log density"):
        reference(impossible, X, "pyro-nuts")


@pytest.mark.slow
def test_nuts_of_a_support_that_follows_a_covariate():
    """Each datum has its own transform: a likelihood that says nothing leaves Uniform(0, top)."""

    def model(size, top):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Uniform(torch.zeros_like(top), top))
            pyro.sample("x", dist.Normal(0.0 * z, 1.0))

    top = torch.tensor([0.5, 20.0])
    data = {"x": torch.zeros(2)}
    tree = reference(model, data, "pyro-nuts", warmup=200, draws=500, covariates={"top": top})
    z = tree["posterior"]["z"].values
    assert z.min() > 0
    assert (z.max((0, 1)) < top.numpy()).all()
    assert np.abs(scores(z, top.numpy() / 2, top.numpy() / math.sqrt(12))).max() < limit(4)


@pytest.mark.slow
def test_divergences_are_counted():
    """Neal's funnel: no step size suits both its mouth and its neck."""

    def funnel(size):
        with pyro.plate("data", size):
            width = pyro.sample("width", dist.Normal(0.0, 3.0))
            z = pyro.sample("z", dist.Normal(0.0, (width / 2).exp()[:, None]).expand([size, 4]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1000.0))

    data = cal.data.Data({"x": torch.zeros(1)})
    result = sample_pyro_nuts(as_program(funnel), data, chains=2, warmup=100, draws=150, seed=0, progress=silent)
    assert int(result.stats["diverging"].sum()) > 0
    assert result.stats["diverging"].shape == (2, 150, 1)
