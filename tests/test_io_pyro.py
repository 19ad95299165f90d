"""`to_datatree`: draws are Pyro's, dimensions are plates, log likelihoods are those computed by hand."""

import arviz_stats
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive, config_enumerate, infer_discrete
from pyro.infer.autoguide import (
    AutoNormal,
)
from pyro.infer.mcmc import api
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

# -- MCMC --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("num_chains", [1, 4])
def test_chains_are_those_of_pyro(num_chains, batch_size, tmp_path):
    mcmc = run_of_schools(num_chains)
    computed = {"log_likelihood": True, "posterior_predictive": True, "unconstrained": True}
    tree = to_datatree(mcmc, coords=NAMES, batch_size=batch_size, **computed)
    for name, value in mcmc.get_samples(group_by_chain=True).items():
        np.testing.assert_array_equal(tree["posterior"][name], value)
    assert tree["posterior"]["eta"].dims == tree["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert tree["posterior"]["mu"].dims == ("chain", "draw")
    assert tree["posterior"].sizes == {"chain": num_chains, "draw": 12, "school": 5}
    assert tree["posterior"]["school"].values.tolist() == NAMES["school"]
    theta = tree["posterior"]["mu"] + tree["posterior"]["tau"] * tree["posterior"]["eta"]
    np.testing.assert_allclose(tree["posterior"]["theta"], theta, rtol=1e-5)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], by_hand(tree), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(tree["unconstrained_posterior"]["tau"], np.log(tree["posterior"]["tau"]), atol=1e-5)
    np.testing.assert_array_equal(tree["observed_data"]["y"], Y)
    assert tree["posterior_predictive"]["y"].dims == ("chain", "draw", "school")
    assert tree["posterior_predictive"]["y"].std("draw").min() > 0.1
    xr.testing.assert_identical(saved(tree, tmp_path), tree)


def test_statistics_of_the_sampler():
    mcmc = run_of_schools(4)
    stats = to_datatree(mcmc)["sample_stats"]
    assert stats["diverging"].dtype == bool
    for chain, found in enumerate(mcmc._diagnostics):
        assert np.flatnonzero(stats["diverging"].values[chain]).tolist() == sorted(set(found["divergences"]))
        np.testing.assert_allclose(stats["mean_acceptance_rate"].values[chain], found["acceptance rate"])
    assert "step_size" not in stats
    single = run_of_schools(1)
    np.testing.assert_allclose(to_datatree(single)["sample_stats"]["step_size"], single.kernel.step_size)


def test_a_divergence_stands_at_its_draw():
    mcmc = run_of_schools(4)
    kept, mcmc._diagnostics[2] = mcmc._diagnostics[2], {"divergences": [7], "acceptance rate": 0.5}
    diverging = to_datatree(mcmc)["sample_stats"]["diverging"]
    mcmc._diagnostics[2] = kept
    assert bool(diverging.sel(chain=2, draw=7))
    assert int(diverging.sel(chain=2).sum()) == 1


def test_chains_in_processes(monkeypatch):
    monkeypatch.setattr(api.mp, "cpu_count", lambda: 8)
    mcmc = chains(schools, SIGMA, Y, num_chains=2, draws=5, mp_context="fork")
    assert type(mcmc.sampler).__name__ == "_MultiSampler"
    tree = to_datatree(mcmc, log_likelihood=True)
    np.testing.assert_array_equal(tree["posterior"]["eta"], mcmc.get_samples(group_by_chain=True)["eta"])
    np.testing.assert_allclose(tree["log_likelihood"]["y"], by_hand(tree), rtol=1e-4, atol=1e-5)


def test_attributes():
    attributes = to_datatree(run_of_schools())["posterior"].attrs
    assert attributes["inference_library"] == "pyro"
    assert attributes["inference_library_version"] == pyro.__version__
    assert attributes["created_at"]


def test_draws_of_a_density_without_a_model():
    def energy(z):
        return 0.5 * (z["z"] ** 2).sum()

    mcmc = MCMC(
        NUTS(potential_fn=energy), 5, warmup_steps=5, disable_progbar=True, initial_params={"z": torch.zeros(3)}
    )
    mcmc.run()
    assert to_datatree(mcmc)["posterior"]["z"].dims == ("chain", "draw", "z_dim_0")
    with pytest.raises(ValueError, match="need the model"):
        to_datatree(mcmc, log_likelihood=True)


# -- dimensions --------------------------------------------------------------------------------------------------------


def crossed(values=None):
    """Two plates of one size, entered in the other order than their dimensions; b varies along each in its own way."""
    columns, rows = pyro.plate("columns", 3, dim=-1), pyro.plate("rows", 3, dim=-2)
    scale = torch.tensor([1.0, 1e2, 1e4])
    with columns:
        a = pyro.sample("a", dist.Normal(scale, 1e-3))
    with rows:
        b = pyro.sample("b", dist.Normal(10 * scale[:, None], 1e-3))
    with columns, rows:
        pyro.sample("c", dist.Normal(a + b, 1e-3).expand([3, 3]), obs=values)
        pyro.sample("d", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def along(tree, dim, name, factor):
    """Whether a site follows the scale along a dimension."""
    means = tree["posterior"][name].mean([d for d in tree["posterior"][name].dims if d != dim])
    return np.allclose(means, factor * np.array([1.0, 1e2, 1e4]), rtol=1e-2)


def test_plates_name_dimensions_by_their_place_and_not_by_the_order_of_entering():
    draws = Predictive(crossed, num_samples=10)()
    tree = to_datatree({name: draws[name] for name in "abd"}, model=crossed, model_args=(torch.zeros(3, 3),))
    assert tree["posterior"]["a"].dims == ("chain", "draw", "columns")
    assert tree["posterior"]["b"].dims == ("chain", "draw", "rows")
    assert tree["posterior"]["d"].dims == ("chain", "draw", "rows", "columns", "d_dim_0")
    assert along(tree, "columns", "a", 1)
    assert along(tree, "rows", "b", 10)
    full = to_datatree(Predictive(crossed, num_samples=10))["prior"]
    sums = full["c"] - full["a"] - full["b"]
    assert float(abs(sums).max()) < 1
    planted = full.dataset.assign(c=full["c"].rename(rows="columns", columns="rows"))  # by the order of entering
    assert float(abs(planted["c"] - planted["a"] - planted["b"]).max()) > 1e4


def test_names_of_event_dimensions_and_of_all():
    draws = {"d": torch.randn(4, 3, 3, 2), "a": torch.randn(4, 3), "b": torch.randn(4, 3, 1)}
    call = {"model": crossed, "model_args": (torch.zeros(3, 3),)}
    named = to_datatree(draws, event_dims={"d": ["part"]}, coords={"part": ["x", "y"], "rows": [4, 5, 6]}, **call)
    assert named["posterior"]["d"].dims == ("chain", "draw", "rows", "columns", "part")
    assert named["posterior"]["part"].values.tolist() == ["x", "y"]
    assert named["posterior"]["rows"].values.tolist() == [4, 5, 6]
    renamed = to_datatree(draws, dims={"d": ["r", "s"], "c": ["r", "s"]}, log_likelihood=True, **call)
    assert renamed["posterior"]["d"].dims == ("chain", "draw", "r", "s", "d_dim_0")
    assert renamed["log_likelihood"]["c"].dims == ("chain", "draw", "r", "s")
    for options, message in {
        "dims": ({"dims": {"a": ["one", "two"]}}, r"dims\['a'\] has 2 names for 1 dimensions"),
        "events": ({"event_dims": {"e": ["one"]}}, "'e', no site with"),
        "coords": ({"coords": {"rows": [1, 2]}}, "coords has 2 labels of 'rows' for 3 of posterior"),
        "sample": (
            {"dims": {"a": ["draw"]}},
            "'draw', a dimension of 'a', has another meaning too: rename it by `dims`",
        ),
    }.values():
        with pytest.raises(ValueError, match=message):
            to_datatree(draws, **options, **call)


def test_names_of_event_dimensions_in_the_model():
    def model():
        pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1), infer={"event_dims": ["feature"]})

    assert to_datatree({"w": torch.zeros(5, 2)}, model=model)["posterior"]["w"].dims == ("chain", "draw", "feature")


def deterministic(y=None):
    z = pyro.sample("z", dist.Normal(0, 1))
    with pyro.plate("data", 4):
        with pyro.plate("part", 2):
            pyro.deterministic("both", z * torch.ones(2, 4))
        pyro.deterministic("local", z * torch.ones(4))
        pyro.deterministic("wide", z * torch.ones(4, 3))
        pyro.deterministic("square", z * torch.ones(4, 4))
        pyro.deterministic("told", z * torch.ones(4, 3), event_dim=1)
        pyro.deterministic("same", z)
        pyro.deterministic("one", z * torch.ones(1))
        pyro.sample("y", dist.Normal(z, 1), obs=y)
    pyro.deterministic("matrix", z * torch.ones(4, 2))


def test_deterministic_sites():
    call = {"model": deterministic, "model_args": (torch.zeros(4),)}
    posterior = to_datatree({"z": torch.randn(3)}, **call)["posterior"]
    dims = {name: variable.dims[2:] for name, variable in posterior.data_vars.items()}
    assert dims == {
        "z": (),
        "both": ("part", "data"),
        "local": ("data",),
        "wide": ("data", "wide_dim_0"),
        "square": ("data", "square_dim_0"),
        "told": ("data", "told_dim_0"),
        "same": (),
        "one": (),
        "matrix": ("matrix_dim_0", "matrix_dim_1"),
    }
    for name in dims:
        assert float(abs(posterior[name] - posterior["z"]).max()) == 0


def test_sites_in_scopes_and_plates_in_a_loop(tmp_path):
    def model(y):
        with pyro.contrib.autoname.scope(prefix="part"):
            z = pyro.sample("z", dist.Normal(0, 1))
        for i in pyro.plate("data", 2):
            pyro.sample(f"y_{i}", dist.Normal(z, 1), obs=y[i])

    import pyro.contrib.autoname

    tree = to_datatree(chains(model, torch.zeros(2)), log_likelihood=True)
    assert tree["posterior"]["part.z"].dims == ("chain", "draw")
    assert set(tree["log_likelihood"].data_vars) == {"y_0", "y_1"}
    xr.testing.assert_identical(saved(tree, tmp_path), tree)


# -- what has no density or no place -----------------------------------------------------------------------------------


def test_discrete_latents_are_summed_out_of_the_log_likelihood():
    y = torch.tensor([-1.0, 0.5, 3.0, 9.0])
    tree = to_datatree(chains(mixture, y), log_likelihood=True, posterior_predictive=True, unconstrained=True)
    assert set(tree["posterior"].data_vars) == {"weights"}  # "twice" depends on what is summed out
    weights = tree["posterior"]["weights"].values[..., None, :]
    wanted = np.log((weights * norm.pdf(y.numpy()[:, None], [-2.0, 0.0, 3.0])).sum(-1))
    np.testing.assert_allclose(tree["log_likelihood"]["y"], wanted, rtol=1e-3, atol=1e-4)
    assert tree["unconstrained_posterior"]["weights"].dims == ("chain", "draw", "weights_dim_0")
    assert tree["unconstrained_posterior"]["weights"].shape == (1, 12, 2)


def test_discrete_latents_that_observations_share_are_drawn():
    y, second = torch.tensor([-1.0, 0.5, 3.0, 9.0]), torch.ones(4)
    mcmc = chains(mixture, y, second)
    with pytest.raises(ValueError, match=r"observations share the sites \['k'\].*infer_discrete"):
        to_datatree(mcmc, log_likelihood=True)
    draws = mcmc.get_samples()  # the remedy of the message
    discrete = infer_discrete(config_enumerate(mixture), first_available_dim=-2)
    k = [
        poutine.trace(poutine.condition(discrete, {"weights": w})).get_trace(y, second).nodes["k"]["value"]
        for w in draws["weights"]
    ]
    draws["k"] = torch.stack(k)
    tree = to_datatree(draws, model=mixture, model_args=(y, second), log_likelihood=True)
    wanted = norm.logpdf(second.numpy(), tree["posterior"]["k"])
    np.testing.assert_allclose(tree["log_likelihood"]["second"], wanted, rtol=1e-5)
    np.testing.assert_array_equal(tree["posterior"]["twice"], 2 * tree["posterior"]["k"])


def masked(y, mask, by):
    mu = pyro.sample("mu", dist.Normal(0, 1))
    with pyro.plate("data", len(y)):
        if by == "obs_mask":
            pyro.sample("y", dist.Normal(mu, 1), obs=y, obs_mask=mask)
        elif by == "handler":
            with poutine.mask(mask=mask):
                pyro.sample("y", dist.Normal(mu, 1), obs=y)
        else:
            pyro.sample("y", dist.Normal(mu, 1).mask(mask), obs=y)


@pytest.mark.parametrize("by", ["handler", "distribution", "obs_mask"])
def test_masked_observations_are_missing(by):
    y, mask = torch.tensor([0.3, -99.0, 1.2, 0.1]), torch.tensor([True, False, True, True])
    draws = {"mu": 0.3 + 0.5 * torch.randn(1000)}
    if by == "obs_mask":
        draws["y_unobserved"] = torch.randn(1000, 4)
    name = "y_observed" if by == "obs_mask" else "y"
    tree = to_datatree(draws, model=masked, model_args=(y, mask, by), log_likelihood=True, batch_size=500)
    assert np.isnan(tree["observed_data"][name]).values.tolist() == [False, True, False, False]
    assert np.isnan(tree["log_likelihood"][name]).all(("chain", "draw")).values.tolist() == [False, True, False, False]
    tree["log_likelihood"] = xr.DataTree(tree["log_likelihood"].to_dataset().dropna("data"))
    found = arviz_stats.loo(tree, pointwise=True, var_name=name)
    kept = to_datatree(
        {"mu": draws["mu"]},
        model=masked,
        model_args=(y[mask], mask[mask], "handler"),
        log_likelihood=True,
        batch_size=500,
    )
    wanted = arviz_stats.loo(kept, pointwise=True)
    assert found.n_data_points == wanted.n_data_points == 3
    np.testing.assert_allclose(found.elpd_i, wanted.elpd_i, rtol=1e-5)


def test_subsampled_plates_are_refused_and_a_whole_one_is_taken():
    x, y = torch.arange(6.0), torch.arange(6.0)
    svi = trained(AutoNormal(regression), x, y, 2, model=regression)
    with pytest.raises(
        ValueError, match="'z' lies in plate 'data', of which a run sees 2 of 6: give a `model`, or a guide"
    ):
        to_datatree(svi, model_args=(x, y, 2))

    def shared(x, y, subsample_size=None):
        w = pyro.sample("w", dist.Normal(0, 1))
        with pyro.plate("data", len(x), subsample_size=subsample_size) as rows:
            pyro.sample("y", dist.Normal(w * x[rows], 1), obs=y[rows])

    svi = trained(AutoNormal(shared), x, y, 2, model=shared)
    with pytest.raises(ValueError, match="'y' lies in plate 'data'"):
        to_datatree(svi, model_args=(x, y, 2), log_likelihood=True)
    whole = to_datatree(svi, model_args=(x, y), log_likelihood=True, num_samples=4)  # the remedy of the message
    w = whole["posterior"]["w"].values
    np.testing.assert_allclose(whole["log_likelihood"]["y"], norm.logpdf(y, w[..., None] * x.numpy()), rtol=1e-4)


def test_factors_are_no_data():
    def model(y):
        z = pyro.sample("z", dist.Normal(0, 1))
        pyro.factor("penalty", -(z**2))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1), obs=y)

    tree = to_datatree({"z": torch.zeros(3)}, model=model, model_args=(torch.zeros(2),), log_likelihood=True)
    assert set(tree["log_likelihood"].data_vars) == set(tree["observed_data"].data_vars) == {"y"}


def test_scales_leave_the_log_likelihood_of_an_observation_alone():
    def model(y):
        z = pyro.sample("z", dist.Normal(0, 1))
        with pyro.plate("data", len(y)), poutine.scale(scale=100.0):
            pyro.sample("y", dist.Normal(z, 1), obs=y)

    tree = to_datatree({"z": torch.zeros(3)}, model=model, model_args=(torch.zeros(2),), log_likelihood=True)
    np.testing.assert_allclose(tree["log_likelihood"]["y"], norm.logpdf(0.0), rtol=1e-6)
