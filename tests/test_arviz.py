"""ArviZ takes every tree as it is: diagnostics, leave-one-out, plots, NetCDF. The API is what 0.8 and 1.x share."""

from __future__ import annotations

import json
from typing import Any

import arviz_plots
import arviz_stats
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.nn import PyroModule
from scipy.stats import kstest, norm
from small_models import any_length

import calibrant as cal
from calibrant.data import Data
from calibrant.errors import InferenceError
from calibrant.evaluation import calibration, pit, weights
from calibrant.inference import GROUPS

LABELS = [7, 3, 11]


class Curve(PyroModule):
    """A model with a covariate, a named dimension and a deterministic site, and with neither name nor form of ours."""

    dims = {"weights": ["term"]}
    coords = {"term": ["slope", "square"]}

    def forward(self, size: int, dose: torch.Tensor) -> None:
        with pyro.plate("data", size):
            weights = pyro.sample("weights", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            width = pyro.sample("width", dist.LogNormal(0.0, 0.3))
            mean = weights[:, :1] * dose + weights[:, 1:] * dose**2
            pyro.deterministic("mean", mean, event_dim=1)
            pyro.sample("x", dist.Normal(mean, width[:, None]).to_event(1))


def curve_data() -> Data:
    generator = torch.Generator().manual_seed(0)
    dose = torch.rand(3, 6, generator=generator) * 2 - 1
    return Data({"x": dose + 0.5 * torch.randn(3, 6, generator=generator)}, {"dose": dose}, coords={"data": LABELS})


@pytest.fixture(scope="module")
def trees() -> dict[str, xr.DataTree]:
    """The three methods: amortized and exact for the EA-VAE, NUTS for one datum of the curve."""
    torch.manual_seed(0)
    model = cal.models.create("ea-vae", shape=[1, 4, 4], latents=3).eval()
    data = Data({"x": torch.randn(3, 1, 4, 4)}, coords={"data": LABELS})
    guide = cal.guides.amortize(model, data).eval()
    with pytest.MonkeyPatch.context() as patch:  # too few draws for the gate are enough for the form of a tree
        any_length(patch)
        nuts = cal.inference.reference(Curve().eval(), curve_data()[:1], draws=30, warmup=30, groups=GROUPS, seed=3)
    return {
        "amortized": cal.inference.posterior(model, guide, data, draws=100, groups=GROUPS, seed=1),
        "exact": cal.inference.reference(model, data, draws=25, groups=GROUPS, seed=2),
        "nuts": nuts,
    }


@pytest.fixture(params=["amortized", "exact", "nuts"])
def tree(request: pytest.FixtureRequest, trees: dict[str, xr.DataTree]) -> xr.DataTree:
    return trees[request.param]


@pytest.fixture(autouse=True)
def _agg() -> Any:
    before = plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


def drawn(plot: Any) -> None:
    figure = plot.viz["figure"].item()
    figure.canvas.draw()
    assert figure.axes


# -- what is in a tree -------------------------------------------------------------------------------------------------


def test_groups_dimensions_and_coordinates(tree):
    posterior = tree["posterior"]
    assert {"posterior", "sample_stats", "observed_data", "constant_data", *GROUPS} <= set(tree.children)
    for name in ("posterior", "prior", "posterior_predictive", "prior_predictive", "log_likelihood"):
        for variable in tree[name].data_vars.values():
            assert variable.dims[:3] == ("chain", "draw", "data")
    for group in tree.children.values():
        if "data" in group.dims:
            assert group["data"].values.tolist() == posterior["data"].values.tolist()
        assert set(group.coords) == set(group.dims)
    assert posterior["data"].values.tolist() == LABELS[: posterior.sizes["data"]]
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "data")


def test_event_dimensions_have_names(trees):
    assert trees["exact"]["posterior"]["z"].dims == ("chain", "draw", "data", "feature")
    assert trees["exact"]["observed_data"]["x"].dims == ("data", "channel", "height", "width")
    for group in ("prior_predictive", "posterior_predictive"):
        assert trees["exact"][group]["x"].dims == ("chain", "draw", "data", "channel", "height", "width")
    assert trees["nuts"]["observed_data"]["x"].dims == ("data", "x_dim_0")
    weights = trees["nuts"]["posterior"]["weights"]
    assert weights.dims == ("chain", "draw", "data", "term")
    assert weights["term"].values.tolist() == ["slope", "square"]
    assert trees["nuts"]["posterior"]["mean"].dims == ("chain", "draw", "data", "mean_dim_0")
    assert set(trees["nuts"]["constant_data"].data_vars) == {"dose"}


def test_a_comparison_shares_no_dimension_with_a_tree_but_the_data(trees):
    """`latent` labels the rows of a comparison, so that a model should not name a dimension like it."""
    result = cal.evaluation.compare(trees["amortized"], trees["exact"])
    assert set(result.dims) & set(trees["exact"]["posterior"].dims) == {"data"}
    by_datum = result["mean_error"] * trees["exact"]["posterior"]["z"].mean(("chain", "draw"))
    assert by_datum.sizes == {"data": 3, "latent": 4, "feature": 3}


def test_attributes_are_text_and_numbers(tree):
    for group in tree.subtree:
        assert all(isinstance(value, str | int | float) for value in group.attrs.values())
    attributes = tree["posterior"].attrs
    assert attributes["inference_library"] == "calibrant"
    assert attributes["independent_draws"] == int(attributes["method"] != "nuts")
    assert set(json.loads(attributes["latents"])) <= set(tree["posterior"].data_vars)
    assert isinstance(json.loads(attributes["settings"]), dict)


def test_netcdf_keeps_everything(tree, tmp_path):
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as found:
        xr.testing.assert_identical(found.load(), tree)


# -- arviz-stats -------------------------------------------------------------------------------------------------------


def test_summary_and_diagnostics(tree):
    latents = json.loads(tree["posterior"].attrs["latents"])
    summary = arviz_stats.summary(tree, var_names=latents)
    entries = sum(int(np.prod(tree["posterior"][name].shape[2:])) for name in latents)
    assert len(summary) == entries
    assert {"mean", "sd"} <= set(summary.columns)
    ess, rhat = arviz_stats.ess(tree, var_names=latents), arviz_stats.rhat(tree, var_names=latents)
    draws = tree["posterior"].sizes["chain"] * tree["posterior"].sizes["draw"]
    for name in latents:
        assert ess[name].shape == tree["posterior"][name].shape[2:]
        if tree["posterior"].attrs["independent_draws"]:
            assert (ess[name] > 0.3 * draws).all()
        if tree["posterior"].attrs["method"] == "exact":
            assert (rhat[name] < 1.2).all()


@pytest.mark.filterwarnings("ignore:Estimated shape parameter", "ignore:The point-wise LOO")
@pytest.mark.parametrize("method", ["exact", "nuts"])
def test_leave_one_out_works_on_the_log_likelihood(trees, method):
    found = arviz_stats.loo(trees[method], pointwise=True)
    assert np.isfinite(found.elpd)
    assert found.n_data_points == trees[method]["posterior"].sizes["data"]


@pytest.fixture(scope="module")
def wide() -> xr.DataTree:
    """Draws for z ~ N(0, 1), x ~ N(z, ½) from a guide so wide that weights are bounded."""

    def conjugate(size):
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 0.5))

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(0.5 * observed["x"], 1.1))

    observed = {"x": torch.linspace(-2.0, 2.0, 6)}
    return cal.inference.posterior(conjugate, guide, observed, 2_000, groups=["log_likelihood"])


@pytest.mark.filterwarnings("ignore:Estimated shape parameter")  # of leave-one-out without the correction
def test_log_weights_correct_the_guide_in_leave_one_out(wide):
    """With the datum left out, its local latent has the prior: the predictive density is the evidence, N(0, √1.25)."""
    stats = wide["sample_stats"].dataset
    found = arviz_stats.loo_approximate_posterior(wide, log_p=stats["log_p"], log_q=stats["log_q"], pointwise=True)
    wanted = norm.logpdf(wide["observed_data"]["x"], scale=np.sqrt(1.25))
    assert float(found.pareto_k.max()) < 0.5
    np.testing.assert_allclose(found.elpd_i, wanted, atol=0.1)
    uncorrected = arviz_stats.loo(wide, pointwise=True)
    assert np.abs(uncorrected.elpd_i - wanted).max() > 0.1


def test_log_likelihoods_come_with_the_draws(wide):
    assert wide["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    wanted = norm.logpdf(wide["observed_data"]["x"].values, wide["posterior"]["z"].values, 0.5)
    np.testing.assert_allclose(wide["log_likelihood"]["x"], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("error")
def test_leave_one_out_of_a_shared_latent():
    """mu ~ N(0, 2), x ~ N(mu, 1): the other data leave a Normal for each; the guide is 1.4 times too wide."""

    def model(size):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(mu, 1.0))

    def guide(observed, size):
        precision = 0.25 + size
        pyro.sample("mu", dist.Normal(observed["x"].sum() / precision, 1.4 * precision**-0.5))

    x = torch.linspace(-1.0, 2.0, 8)
    tree = cal.inference.posterior(model, guide, {"x": x}, 2_000, groups=["log_likelihood"])
    stats = tree["sample_stats"].dataset
    log_p, log_q = (stats[f"{name}_shared"] + stats[name].sum("data") for name in ("log_p", "log_q"))
    found = arviz_stats.loo_approximate_posterior(tree, log_p=log_p, log_q=log_q, pointwise=True)
    precision = 0.25 + 7
    wanted = norm.logpdf(x, (x.sum() - x) / precision, np.sqrt(1 + 1 / precision))
    np.testing.assert_allclose(found.elpd_i, wanted, atol=0.05)
    assert abs(arviz_stats.loo(tree, pointwise=True).elpd_i - wanted).max() > 0.05


# -- arviz-plots -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_khat_of_every_datum_is_drawn(wide):
    drawn(arviz_plots.plot_khat(weights(wide), backend="matplotlib"))


def test_ranks_of_a_calibration_are_drawn_as_they_are():
    torch.manual_seed(0)
    model = cal.models.create("ea-vae", shape=[1, 4, 4], latents=3).eval()
    data = {"x": torch.randn(3, 1, 4, 4)}
    tree = calibration(model, cal.guides.amortize(model, data).eval(), data, simulations=100, draws=50)
    assert {"scale", "z", "log_likelihood", "log_joint", "hpd", "tarp"} == set(tree["prior_sbc"].data_vars)
    drawn(arviz_plots.plot_ecdf_pit(tree, var_names=["scale", "log_joint"], backend="matplotlib"))
    drawn(arviz_plots.plot_ecdf_pit(tree, var_names=["hpd"], coverage=True, backend="matplotlib"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("plot", ["plot_dist", "plot_trace", "plot_forest"])
def test_plots_of_one_datum(plot, tree):
    latents = json.loads(tree["posterior"].attrs["latents"])
    drawn(getattr(arviz_plots, plot)(tree, var_names=latents, coords={"data": [7]}, backend="matplotlib"))


TOGETHER = {
    "forest": lambda both: arviz_plots.plot_forest(both, var_names=["z"], coords={"data": [3]}, backend="matplotlib"),
    "dist": lambda both: arviz_plots.plot_dist(
        both, var_names=["scale"], coords={"data": [3, 11]}, backend="matplotlib"
    ),
    "ppc": lambda both: arviz_plots.plot_ppc_dist(both["guide"], backend="matplotlib"),
    "ppc of the reference": lambda both: arviz_plots.plot_ppc_dist(both["reference"], backend="matplotlib"),
    "ecdf": lambda both: arviz_plots.plot_ecdf_pit(
        pit(both["guide"], both["reference"], draws=20),
        group="pit",
        var_names=["z"],
        sample_dims=["chain", "draw", "data"],
        backend="matplotlib",
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("plot", TOGETHER)
def test_plots_of_guide_and_reference_together(plot, trees):
    drawn(TOGETHER[plot](cal.evaluation.side_by_side(trees["amortized"], trees["exact"])))


def test_guide_and_reference_side_by_side(trees):
    both = cal.evaluation.side_by_side(trees["amortized"], trees["exact"])
    for tree, name in ((both["guide"], "amortized"), (both["reference"], "exact")):
        assert tree["posterior"].sizes == {"chain": 4, "draw": 25, "data": 3, "feature": 3}
        assert tree["posterior"]["z"].dims == trees[name]["posterior"]["z"].dims
        given = trees[name]["posterior"]["z"].values.reshape(100, 3, 3)
        np.testing.assert_array_equal(tree["posterior"]["z"].values.reshape(100, 3, 3), given)  # each draw once
        assert tree["log_likelihood"]["x"].sizes == {"chain": 4, "draw": 25, "data": 3}
        assert tree["posterior"].attrs == trees[name]["posterior"].attrs
    gate = trees["exact"]["convergence"].to_dataset()
    failed = trees["exact"].copy()
    failed["convergence"] = xr.DataTree(gate.assign(is_reference=("data", np.array([True, False, True]))))
    fewer = cal.evaluation.side_by_side(trees["amortized"].isel(data=[2, 1, 0]), failed)
    assert all(tree["posterior"]["data"].values.tolist() == [11, 7] for tree in fewer.values())
    np.testing.assert_array_equal(
        fewer["guide"]["posterior"]["z"].sel(data=7), both["guide"]["posterior"]["z"].sel(data=7)
    )
    failed["convergence"] = xr.DataTree(gate.assign(is_reference=("data", np.zeros(3, dtype=bool))))
    with pytest.raises(InferenceError, match="none of the data has a reference posterior"):
        cal.evaluation.side_by_side(trees["amortized"], failed)


def test_energy_of_nuts(trees):
    drawn(arviz_plots.plot_energy(trees["nuts"].isel(data=0), backend="matplotlib"))


@pytest.mark.parametrize(
    ("sample_dims", "coords"), [(["chain", "draw", "data"], None), (["chain", "draw"], {"data": 3})], ids=["all", "one"]
)
def test_ecdf_of_pit_values(trees, sample_dims, coords):
    values = pit(trees["amortized"], trees["exact"], draws=20)
    options = {"group": "pit", "sample_dims": sample_dims, "coords": coords, "backend": "matplotlib"}
    drawn(arviz_plots.plot_ecdf_pit(values, var_names=["z"], **options))


# -- what runs write, and guides of ours in the converter for plain Pyro ---------------------------------------------


@pytest.mark.filterwarnings("ignore:Estimated shape parameter", "ignore:The point-wise LOO")
def test_leave_one_out_takes_what_a_run_writes(made_runs):
    file = next((made_runs / "whole").rglob("amortized.nc"))
    tree = cal.store.load_tree(file)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    stats = tree["sample_stats"].dataset
    found = arviz_stats.loo_approximate_posterior(tree, log_p=stats["log_p"], log_q=stats["log_q"])
    assert np.isfinite(found.elpd)
    assert np.isfinite(arviz_stats.loo(tree).elpd)


def test_the_converter_takes_guides_of_ours(tmp_path):
    torch.manual_seed(0)
    model = cal.models.create("ppca", shape=[1, 3, 3], latents=2).eval()
    x = torch.randn(4, 1, 3, 3)
    guide = cal.guides.amortize(model, {"x": x}, structure="full").eval()

    def conditioned(observed, size):
        return pyro.poutine.condition(model, data=observed)(size)

    call = {"model": conditioned, "model_args": ({"x": x}, 4), "log_likelihood": True, "num_samples": 200}
    tree = cal.to_datatree(guide, event_dims={"x": ["channel", "height", "width"]}, **call)
    pyro.clear_param_store()  # which holds what a user calls
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data", "z_dim_0")
    assert tree["observed_data"]["x"].dims == ("data", "channel", "height", "width")
    ours = cal.inference.posterior(model, guide, {"x": x}, 2000)
    errors = ours["posterior"]["z"].std(("chain", "draw")).values / np.sqrt(200)
    off = (
        tree["posterior"]["z"].mean(("chain", "draw")).values - ours["posterior"]["z"].mean(("chain", "draw"))
    ) / errors
    assert float(abs(off).max()) < norm.isf(1e-5 / 16) * np.sqrt(1.1)
    for name in ("log_p", "log_q"):
        mean, per_datum = (t["sample_stats"][name].mean(("chain", "draw")) for t in (tree, ours))
        spread = float(tree["sample_stats"][name].std()) / np.sqrt(200)
        assert abs(float(mean) - float(per_datum.sum())) < 5 * spread
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as found:
        xr.testing.assert_identical(found.load(), tree)


# -- PIT values --------------------------------------------------------------------------------------------------------


def pair(shift: float = 0.0, width: float = 1.0) -> tuple[xr.DataTree, xr.DataTree]:
    """A guide and a reference that are normal, and the same but for a shift and a width of the guide."""
    generator = np.random.default_rng(5)

    def normal(chains: int, draws: int, **attributes: Any) -> xr.DataTree:
        z = generator.normal(size=(chains, draws, 40, 2))
        dataset = xr.Dataset(
            {"z": (("chain", "draw", "data", "z_dim_0"), z)},
            coords={"data": np.arange(40)},
            attrs={"latents": '["z"]', "independent_draws": 1, **attributes},
        )
        return xr.DataTree.from_dict({"/posterior": dataset, "/sample_stats": xr.Dataset()})

    guide = normal(1, 4000)
    guide["posterior"]["z"] = shift + width * guide["posterior"]["z"]
    return guide, normal(4, 500)


def uniform(tree: xr.DataTree) -> bool:
    """Kolmogorov and Smirnov's test of each of two latents."""
    values = tree["pit"]["z"].values
    return all(kstest(values[..., i].ravel(), "uniform").pvalue > 1e-5 / 2 for i in range(2))


def test_pit_values_of_equal_posteriors_are_uniform_and_those_of_others_are_not():
    assert uniform(pit(*pair(), draws=200))
    # 8,000 values see a shift of 0.15 or a factor of 1.2 of the sd with more than 95% power
    assert not uniform(pit(*pair(shift=0.15), draws=200))
    assert not uniform(pit(*pair(width=1.2), draws=200))
    assert not uniform(pit(*pair(width=1 / 1.2), draws=200))


def test_pit_values_with_few_guide_draws_are_uniform_too():
    """Ranked among ten draws each: plain ranks, or an empirical distribution function shared by all, would not be."""
    values = pit(*pair(), draws=400)
    assert values["pit"].attrs["guide_draws"] == 10
    assert uniform(values)


def test_pit_values_point_where_the_reference_lies():
    guide, reference = pair(shift=-5.0)
    assert pit(guide, reference, draws=20)["pit"]["z"].values.min() > 0.5


def test_pit_values_join_on_labels_and_leave_failures_out(trees):
    exact = trees["exact"].copy(deep=True)
    gate = exact["convergence"].to_dataset()
    exact["convergence"] = xr.DataTree(gate.assign(is_reference=("data", np.array([True, False, True]))))
    reordered = trees["amortized"].isel(data=[2, 1, 0])
    values = pit(reordered, exact, draws=10)["pit"]
    assert values["data"].values.tolist() == [11, 7]
    straight = pit(trees["amortized"], exact, draws=10)["pit"]
    assert straight["data"].values.tolist() == [7, 11]
    ranks = [np.floor(v["z"].sel(data=7).values * (v.attrs["guide_draws"] + 1)) for v in (values, straight)]
    np.testing.assert_array_equal(*ranks)


def test_pit_values_that_cannot_be_had(trees):
    with pytest.raises(InferenceError, match="draws=101: there are 100 draws of the guide and 100 of the reference"):
        pit(trees["amortized"], trees["exact"], draws=101)
    failed = trees["exact"].copy(deep=True)
    gate = failed["convergence"].to_dataset()
    failed["convergence"] = xr.DataTree(gate.assign(is_reference=("data", np.zeros(3, dtype=bool))))
    with pytest.raises(InferenceError, match="no datum with a reference posterior"):
        pit(trees["amortized"], failed)
