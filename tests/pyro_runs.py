"""Scripts as users of Pyro write them, and short runs of their inference."""

import warnings
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from scipy.stats import norm

SIGMA = torch.tensor([1.5, 1.0, 1.6, 1.1, 0.9])
Y = torch.tensor([2.8, 0.8, -0.3, 0.7, 1.8])
NAMES = {"school": ["A", "B", "C", "D", "E"]}


@pytest.fixture(autouse=True)
def own_parameters():
    """Warnings are errors, and nothing is left in the parameter store."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "num_chains=", UserWarning)
        yield
    pyro.clear_param_store()


def schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0, 2))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.deterministic("theta", mu + tau * pyro.sample("eta", dist.Normal(0, 1)))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def chains(model, *args, num_chains=1, draws=12, **options):
    """A short run of NUTS."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc = MCMC(NUTS(model), draws, warmup_steps=10, num_chains=num_chains, disable_progbar=True, **options)
        mcmc.run(*args)
    return mcmc


@cache
def run_of_schools(num_chains=1):
    pyro.set_rng_seed(1)
    return chains(schools, SIGMA, Y, num_chains=num_chains)


def trained(guide, *args, model=schools, steps=3, loss=None):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss or Trace_ELBO())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            svi.step(*args)
    return svi


def saved(tree, path):
    """The tree after a round trip through a file."""
    tree.to_netcdf(path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(path / "tree.nc", engine="h5netcdf") as found:
        return found.load()


def by_hand(tree):
    """Log density of each school's observation at each draw."""
    posterior = tree["posterior"].dataset
    theta = posterior["mu"] + posterior["tau"] * posterior["eta"]
    scale = xr.DataArray(SIGMA.numpy(), dims="school", coords={"school": posterior["school"]})
    observed = xr.DataArray(Y.numpy(), dims="school", coords={"school": posterior["school"]})
    return xr.apply_ufunc(norm.logpdf, observed, theta, scale).transpose("chain", "draw", "school")


def mixture(y=None, second=None):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", 4):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.deterministic("twice", 2.0 * k)
        pyro.sample("y", dist.Normal(torch.tensor([-2.0, 0.0, 3.0])[k], 1.0), obs=y)
        if second is not None:
            pyro.sample("second", dist.Normal(k.float(), 1.0), obs=second)


def regression(x, y=None, subsample_size=None):
    w = pyro.sample("w", dist.Normal(0, 1))
    with pyro.plate("data", len(x), subsample_size=subsample_size) as rows:
        z = pyro.sample("z", dist.Normal(0, 1))
        pyro.sample("y", dist.Normal(w * x[rows] + z, 1), obs=None if y is None else y[rows])
