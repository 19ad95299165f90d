"""`to_datatree`: guides, `Predictive`, what is refused."""

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
)
from pyro_runs import (
    NAMES,
    SIGMA,
    Y,
    by_hand,
    chains,
    mixture,
    own_parameters,  # noqa: F401  a fixture of every test
    regression,
    run_of_schools,
    saved,
    schools,
    trained,
)
from scipy.stats import norm

from calibrant import to_datatree

# -- guides ------------------------------------------------------------------------------------------------------------


def parts(model):
    guide = AutoGuideList(model)
    guide.append(AutoNormal(poutine.block(model, hide=["eta"])))
    guide.append(AutoDiagonalNormal(poutine.block(model, expose=["eta"])))
    return guide


DENSITIES = {
    "normal": AutoNormal,
    "diagonal": AutoDiagonalNormal,
    "multivariate": AutoMultivariateNormal,
    "messenger": AutoNormalMessenger,
    "list": parts,
}
POINTS = {"delta": AutoDelta, "laplace": AutoLaplaceApproximation}


@pytest.mark.parametrize("name", [*DENSITIES, *POINTS])
def test_autoguides(name, tmp_path):
    svi = trained({**DENSITIES, **POINTS}[name](schools), SIGMA, Y)
    tree = to_datatree(svi, model_args=(SIGMA, Y), num_samples=30, log_likelihood=True, coords=NAMES, batch_size=10)
    assert {n: v.dims[2:] for n, v in tree["posterior"].data_vars.items()} == {
        "mu": (),
        "tau": (),
        "eta": ("school",),
        "theta": ("school",),
    }
    assert tree["posterior"].sizes == {"chain": 1, "draw": 30, "school": 5}
    np.testing.assert_allclose(tree["log_likelihood"]["y"], by_hand(tree), rtol=1e-4, atol=1e-5)
    assert ("sample_stats" in tree.children) == (name in DENSITIES)
    if name in DENSITIES:
        posterior = tree["posterior"].dataset
        log_prior = norm.logpdf(posterior["mu"], 0, 2) + np.log(2) + norm.logpdf(posterior["tau"])
        log_prior = log_prior + norm.logpdf(posterior["eta"]).sum(-1)
        log_p = log_prior + tree["log_likelihood"]["y"].sum("school")
        np.testing.assert_allclose(tree["sample_stats"]["log_p"], log_p, rtol=1e-4, atol=1e-4)
    else:
        assert float(tree["posterior"].dataset.std("draw").to_array().max()) < 1e-5
    xr.testing.assert_identical(saved(tree, tmp_path), tree)


@pytest.mark.parametrize("name", ["normal", "diagonal", "messenger"])
def test_the_density_of_a_guide_is_that_of_its_draws(name):
    """Of independent Normals on the line, tau's with the slope of its logarithm."""
    guide = DENSITIES[name](schools)
    tree = to_datatree(trained(guide, SIGMA, Y), model_args=(SIGMA, Y), num_samples=20)
    draws = {n: torch.as_tensor(tree["posterior"][n].values[0]) for n in ("mu", "tau", "eta")}
    line = torch.cat([draws["mu"][:, None], draws["tau"].log()[:, None], draws["eta"]], 1)
    if name == "diagonal":
        loc, scale = guide.loc, guide.scale
    else:
        loc, scale = (
            torch.cat([getattr(values, n).reshape(-1) for n in ("mu", "tau", "eta")])
            for values in (guide.locs, guide.scales)
        )
    log_q = dist.Normal(loc, scale).log_prob(line).sum(1) - draws["tau"].log()
    np.testing.assert_allclose(tree["sample_stats"]["log_q"][0], log_q.detach(), rtol=1e-4, atol=1e-4)


def conjugate(y, loc=0.0):
    mu = pyro.sample("mu", dist.Normal(loc, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def left_out(y, loc=0.0):
    """The exact log density of each of y ~ Normal(mu, 1) given the others, mu ~ Normal(loc, 2)."""
    precision = 1 / 4 + len(y) - 1
    mean = (loc / 4 + y.sum() - y) / precision
    return norm.logpdf(y, mean, np.sqrt(1 + 1 / precision))


DATA = np.array([-0.3, 0.8, 1.7, 0.4, 2.0, 0.1, 1.1, -0.9], dtype=np.float32)


@pytest.mark.parametrize("batch_size", [1, 500])
def test_leave_one_out_is_that_of_a_conjugate_model(batch_size):
    y, rng = torch.tensor(DATA), np.random.default_rng(0)
    precision = 1 / 4 + len(DATA)
    draws = rng.normal(DATA.sum() / precision, precision**-0.5, 4000)
    tree = to_datatree(
        {"mu": torch.tensor(draws)}, model=conjugate, model_args=(y,), log_likelihood=True, num_chains=4,
        batch_size=batch_size,
    )  # fmt: skip
    assert tree["posterior"].sizes == {"chain": 4, "draw": 1000}
    found = arviz_stats.loo(tree, pointwise=True)
    np.testing.assert_allclose(found.elpd_i, left_out(DATA), atol=0.04)
    tree["log_likelihood"]["y"] = tree["log_likelihood"]["y"] * 2  # a likelihood counted twice
    assert abs(arviz_stats.loo(tree, pointwise=True).elpd_i - left_out(DATA)).max() > 0.3


def wide(y, loc=0.0):
    precision = 1 / 4 + len(y)
    pyro.sample("mu", dist.Normal((loc / 4 + y.sum()) / precision, 1.4 * precision**-0.5))


def test_leave_one_out_from_a_guide_that_is_too_wide():
    tree = to_datatree(
        wide, model=conjugate, model_args=(torch.tensor(DATA),), log_likelihood=True, num_samples=4000, batch_size=500
    )
    stats = tree["sample_stats"].dataset
    found = arviz_stats.loo_approximate_posterior(tree, log_p=stats["log_p"], log_q=stats["log_q"], pointwise=True)
    np.testing.assert_allclose(found.elpd_i, left_out(DATA), atol=0.04)
    assert abs(arviz_stats.loo(tree, pointwise=True).elpd_i - left_out(DATA)).max() > 0.04


def test_keyword_arguments():
    tree = to_datatree(
        wide, model=conjugate, model_args=(torch.tensor(DATA),), model_kwargs={"loc": 30.0}, num_samples=500
    )
    assert abs(float(tree["posterior"]["mu"].mean()) - (30 / 4 + DATA.sum()) / 8.25) < 0.15


class Amortized(torch.nn.Module):
    """A guide by hand, whose latent follows the observation of the same place in the plate."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 2)

    def forward(self, x):
        pyro.module("guide", self)
        with pyro.plate("image", len(x)):
            pyro.sample("z", dist.Normal(self.net(x), 1e-3).to_event(1))


def images(x):
    with pyro.plate("image", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_an_amortized_guide_by_hand(batch_size, tmp_path):
    x, guide = torch.randn(3, 2), Amortized()
    given = {"model_args": (x,), "log_likelihood": True, "posterior_predictive": True, "num_samples": 20}
    tree = to_datatree(guide, model=images, batch_size=batch_size, event_dims={"x": ["pixel"]}, **given)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "image", "z_dim_0")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "image", "pixel")
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "image")
    means = tree["posterior"]["z"].mean(("chain", "draw"))
    np.testing.assert_allclose(means, guide.net(x).detach(), atol=0.01)
    wanted = norm.logpdf(x.numpy(), tree["posterior"]["z"]).sum(-1)
    np.testing.assert_allclose(tree["log_likelihood"]["x"], wanted, rtol=1e-4)
    xr.testing.assert_identical(saved(tree, tmp_path), tree)
    alone = to_datatree(guide, model_args=(x,), num_samples=5)  # dimensions from the guide's own plates
    assert alone["posterior"]["z"].dims == ("chain", "draw", "image", "z_dim_0")


def test_a_discrete_latent_that_the_guide_leaves_out():
    y = torch.tensor([-1.0, 0.5, 3.0, 9.0])
    guide = AutoNormal(poutine.block(mixture, hide=["k"]))
    svi = trained(guide, y, model=config_enumerate(mixture), loss=TraceEnum_ELBO(max_plate_nesting=1))
    tree = to_datatree(svi, model_args=(y,), num_samples=5, log_likelihood=True)
    assert np.isfinite(tree["log_likelihood"]["y"]).all()
    assert "k" not in tree["posterior"]


# -- Predictive --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_what_predictive_returns(parallel, tmp_path):
    mcmc = run_of_schools(4)
    prior = Predictive(schools, num_samples=7, parallel=parallel)(SIGMA)
    again = Predictive(schools, mcmc.get_samples(), parallel=parallel)(SIGMA)
    new = Predictive(schools, mcmc.get_samples(), parallel=parallel, return_sites=["mu"])(SIGMA)
    tree = to_datatree(
        mcmc,
        prior=prior,
        posterior_predictive=again,
        predictions=new,
        constant_data={"sigma": SIGMA},
        predictions_constant_data={"sigma": SIGMA[:2]},
        dims={"sigma": ["school"]},
        pred_dims={"sigma": ["new school"]},
        coords=NAMES,
    )
    assert tree["prior"].sizes == {"chain": 1, "draw": 7, "school": 5}
    assert set(tree["prior"].data_vars) == {"mu", "tau", "eta", "theta"}
    assert tree["prior"]["mu"].dims == tree["predictions"]["mu"].dims == ("chain", "draw")
    np.testing.assert_array_equal(tree["prior_predictive"]["y"][0], prior["y"].reshape(7, 5))
    np.testing.assert_array_equal(tree["posterior_predictive"]["y"], again["y"].reshape(4, 12, 5))
    np.testing.assert_array_equal(tree["predictions"]["mu"], tree["posterior"]["mu"])
    assert tree["constant_data"]["sigma"].dims == ("school",)
    assert tree["predictions_constant_data"]["sigma"].dims == ("new school",)
    xr.testing.assert_identical(saved(tree, tmp_path), tree)


def test_predictions_of_other_data():
    draws = {"w": torch.arange(3.0), "z": torch.zeros(3, 4)}
    new = Predictive(regression, {"w": draws["w"]}, return_sites=["y", "z"])(torch.ones(1))
    call = {"model": regression, "model_args": (torch.ones(4), torch.zeros(4))}
    tree = to_datatree(draws, predictions=new, **call)
    assert tree["predictions"]["y"].dims == ("chain", "draw", "data")
    assert tree["predictions"].sizes["data"] == 1
    with pytest.raises(ValueError, match="coords has 4 labels of 'data' for 1 of predictions"):
        to_datatree(draws, predictions=new, coords={"data": list("abcd")}, **call)
    with pytest.raises(ValueError, match="'y' has 6 draws, not those of 3 chains of 1"):
        to_datatree(draws, posterior_predictive={"y": torch.zeros(6, 4)}, num_chains=3, **call)


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_objects(parallel):
    guide = trained(AutoNormal(schools), SIGMA, Y).guide
    of_guide = Predictive(schools, guide=guide, num_samples=9, parallel=parallel)
    tree = to_datatree(of_guide, model_args=(SIGMA, Y), log_likelihood=True)
    assert tree["posterior"].sizes == {"chain": 1, "draw": 9, "school": 5}
    assert tree["posterior_predictive"]["y"].std("draw").min() > 0  # not the observations again
    samples = run_of_schools(4).get_samples()
    tree = to_datatree(Predictive(schools, samples, parallel=parallel), model_args=(SIGMA, Y), num_chains=4)
    np.testing.assert_array_equal(tree["posterior"]["mu"], samples["mu"].reshape(4, 12))
    assert tree["posterior_predictive"].sizes == {"chain": 4, "draw": 12, "school": 5}
    tree = to_datatree(Predictive(schools, num_samples=6, parallel=parallel), model_args=(SIGMA, Y))
    assert set(tree.children) == {"prior", "prior_predictive", "observed_data"}
    assert tree["prior_predictive"]["y"].std("draw").min() > 0


# -- what is refused, and what stays as it was -------------------------------------------------------------------------


def test_a_model_whose_draws_cannot_be_run_at_once():
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        mean = pyro.deterministic("mean", (x * w).sum() * torch.ones(3))  # the sum runs over draws too
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(mean, 1), obs=y)

    call = {"model": model, "model_args": (torch.ones(2), torch.zeros(3)), "log_likelihood": True}
    with pytest.raises(ValueError, match="leave out `batch_size`"):
        to_datatree({"w": torch.randn(6, 2)}, batch_size=3, **call)
    to_datatree({"w": torch.randn(6, 2)}, **call)


def test_what_has_no_draws_is_refused():
    with pytest.raises(ValueError, match=r"holds no draws: call its run\(...\) first"):
        to_datatree(MCMC(NUTS(schools), 5))
    with pytest.raises(
        TypeError, match="posterior is of type int: give an MCMC, SVI or Predictive object, a guide, or a dict of draws"
    ):
        to_datatree(3)
    with pytest.raises(ValueError, match=r"latent sites \['tau', 'eta'\] have no draws"):
        to_datatree({"mu": torch.zeros(3)}, model=schools, model_args=(SIGMA, Y), log_likelihood=True)
    with pytest.raises(ValueError, match="'mu' has 5 draws, not those of 2 chains of one length"):
        to_datatree({"mu": torch.zeros(5)}, num_chains=2)
    with pytest.raises(ValueError, match=r"draws of 'eta' have shape \(4,\), and the model's \(5,\): give"):
        to_datatree({"eta": torch.zeros(3, 4)}, model=schools, model_args=(SIGMA, Y))


def test_draws_of_some_sites_are_taken_alone():
    tree = to_datatree(chains(schools, SIGMA, Y, save_params=["mu"]))
    assert set(tree["posterior"].data_vars) == {"mu"}


def test_the_seed_decides_and_the_random_state_stays():
    guide = trained(AutoNormal(schools), SIGMA, Y).guide
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (to_datatree(guide, model_args=(SIGMA, Y), num_samples=4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), wanted)
    assert one["posterior"].dataset.equals(same["posterior"].dataset)
    assert not one["posterior"].dataset.equals(other["posterior"].dataset)
