"""Posterior trees against closed forms: hand-written guides, shared latents, groups."""

import json
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from pyro.nn import PyroModule
from small_models import X, hierarchical
from torch import nn
from torch.distributions import Normal

import calibrant as cal
from calibrant.errors import DataError, InferenceError
from calibrant.inference import posterior, reference

NOISE = 0.01


def aligned_guide(observed, size):
    """z is the shared draw with a little noise, so that draws of the two that do not belong together are seen."""
    centre = pyro.sample("centre", dist.Normal(1.0, 2.0))
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(centre + observed["x"], NOISE))


def vector(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.deterministic("mean", z.mean(-1))
        pyro.sample("x", dist.Normal(z.sum(-1), 0.5))
    pyro.deterministic("noise", torch.tensor(0.5))


def vector_guide(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"][:, None].expand(-1, 2) / 3, 0.6).to_event(1))


# -- draws and their densities -----------------------------------------------------------------------------------------


def misalignment(tree: xr.DataTree) -> float:
    """The largest distance of z from what its own shared draw makes of it, in standard deviations of the noise."""
    group = tree["posterior"].dataset
    wanted = group["centre"] + xr.DataArray(X["x"].numpy(), dims="data")
    return float(abs(group["z"] - wanted).max()) / NOISE


def test_shared_and_local_draws_belong_together():
    tree = posterior(hierarchical, aligned_guide, X, draws=50, seed=3)
    assert tree["posterior"]["z"].dims == ("chain", "draw", "data")
    assert tree["posterior"]["centre"].dims == ("chain", "draw")
    assert float(tree["posterior"]["centre"].std()) > 1
    assert misalignment(tree) < limit(200)
    tree["posterior"]["centre"] = tree["posterior"]["centre"].roll(draw=1)
    assert misalignment(tree) > limit(200)


def test_densities_are_those_of_the_draws():
    """Draws are stored in float32, densities of the float64 draws: hence the tolerance for q, whose scale is 0.01."""
    tree = posterior(hierarchical, aligned_guide, X, draws=20)
    stats = tree["sample_stats"].dataset
    assert stats["log_p"].dims == stats["log_q"].dims == ("chain", "draw", "data")
    assert stats["log_p_shared"].dims == stats["log_q_shared"].dims == ("chain", "draw")
    assert stats["log_p"].dtype == np.float64
    centre, z, x = (
        torch.tensor(tree["posterior"][name].values[0]).double() if name != "x" else X["x"].double()
        for name in ("centre", "z", "x")
    )
    wanted = {
        "log_p": Normal(centre[:, None], 1.0).log_prob(z) + Normal(z, 0.5).log_prob(x),
        "log_q": Normal(centre[:, None] + x, NOISE).log_prob(z),
        "log_p_shared": Normal(3.0, 0.5).log_prob(centre),
        "log_q_shared": Normal(1.0, 2.0).log_prob(centre),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(torch.tensor(stats[name].values[0]), value, rtol=1e-5, atol=5e-4)


def test_deterministic_sites_follow_their_draws():
    group = posterior(hierarchical, aligned_guide, X, draws=20)["posterior"].dataset
    assert json.loads(group.attrs["latents"]) == ["centre", "z"]
    assert group["double"].dims == ("chain", "draw", "data")
    assert group["square"].dims == ("chain", "draw")
    np.testing.assert_allclose(group["double"], 2 * group["z"], rtol=1e-5)
    np.testing.assert_allclose(group["square"], group["centre"] ** 2, rtol=1e-5)


def test_local_draws_are_those_of_each_datum():
    tree = posterior(vector, vector_guide, X, draws=4000)
    group, stats = tree["posterior"].dataset, tree["sample_stats"].dataset
    assert dict(group["z"].sizes) == {"chain": 1, "draw": 4000, "data": 4, "z_dim_0": 2}
    assert set(stats.data_vars) == {"log_p", "log_q"}
    z = torch.tensor(group["z"].values[0]).double()
    x = X["x"].double()
    log_p = Normal(0.0, 1.0).log_prob(z).sum(-1) + Normal(z.sum(-1), 0.5).log_prob(x)
    log_q = Normal(x[:, None] / 3, 0.6).log_prob(z).sum(-1)
    torch.testing.assert_close(torch.tensor(stats["log_p"].values[0]), log_p, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.tensor(stats["log_q"].values[0]), log_q, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(group["mean"], group["z"].mean("z_dim_0"), atol=1e-6)
    assert group["noise"].dims == ("chain", "draw")
    assert float(group["noise"].min()) == float(group["noise"].max()) == 0.5
    # Eight means and eight variances: a shift of 0.10 sd, or a variance 15% off, is seen with 95% power.
    error = (z.mean(0) - x[:, None] / 3).abs() / 0.6 * math.sqrt(4000)
    ratio = (z.var(0) / 0.36 - 1).abs() * math.sqrt(4000 / 2)
    assert float(error.max()) < limit(16)
    assert float(ratio.max()) < limit(16)
    draws = z.reshape(4000, -1)
    assert abs(torch.corrcoef(draws.T) - torch.eye(8)).max() < limit(28) / math.sqrt(4000)


def test_blocks_of_data_join_in_order(monkeypatch):
    module = __import__("calibrant.inference.drawing", fromlist=["posterior"])
    monkeypatch.setattr(module, "ROWS", 20)  # two data a block
    data = cal.data.Data(X, coords={"data": ["a", "b", "c", "d"]})
    seen = []
    tree = posterior(vector, vector_guide, data, draws=10, progress=lambda *step: seen.append(step[1:3]))
    assert seen == [(0, 4), (2, 4), (4, 4)]
    assert tree["posterior"]["data"].values.tolist() == ["a", "b", "c", "d"]
    z = tree["posterior"]["z"]
    assert float(abs(z.mean(("chain", "draw", "z_dim_0")) - X["x"].numpy() / 3).max()) < 0.6 * 5 / math.sqrt(20)
    assert len(np.unique(z.values)) == z.size


def test_seed_decides_the_draws():
    first, again, other = (
        posterior(vector, vector_guide, X, draws=3, seed=seed)["posterior"].dataset for seed in (1, 1, 2)
    )
    assert first.identical(again)
    assert not first["z"].equals(other["z"])


def test_integer_covariates_stay_integers():
    def model(size, label):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.tensor([-1.0, 1.0])[label], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5))

    def guide(observed, size, label):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(torch.tensor([-5.0, 5.0])[label], 0.1))

    label = torch.tensor([0, 1, 1, 0])
    tree = posterior(model, guide, X, draws=5, covariates={"label": label}, groups=["prior", "log_likelihood"])
    assert torch.equal(torch.tensor(tree["posterior"]["z"].values[0] > 0), (label > 0).expand(5, 4))
    assert tree["constant_data"]["label"].values.tolist() == label.tolist()


def test_discrete_latents_of_a_guide():
    def model(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample("x", dist.Normal(torch.tensor([-1.0, 1.0])[k], 1.0))

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("k", dist.Categorical(logits=torch.stack([-observed["x"], observed["x"]], -1)))

    tree = posterior(model, guide, X, draws=100, groups=["log_likelihood", "posterior_predictive"])
    stats, k = tree["sample_stats"].dataset, tree["posterior"]["k"].values
    assert set(np.unique(k)) == {0.0, 1.0}
    # This guide is the exact posterior, so that log p − log q is the log evidence at every draw.
    evidence = (Normal(-1.0, 1.0).log_prob(X["x"]).exp() / 2 + Normal(1.0, 1.0).log_prob(X["x"]).exp() / 2).log()
    np.testing.assert_allclose((stats["log_p"] - stats["log_q"]).values[0], evidence.expand(100, 4), atol=1e-5)
    mean = Normal(torch.tensor(2 * k - 1), 1.0).log_prob(X["x"])
    np.testing.assert_allclose(tree["log_likelihood"]["x"], mean, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_either_dtype_take_float32_data(dtype):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.decoder = nn.Linear(2, 1)

        def forward(self, size, dose):
            with pyro.plate("data", size):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z * dose[:, None]).squeeze(-1), 1.0))

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(2, 4)

        def forward(self, observed, size, dose):
            loc, raw = self.encoder(torch.stack([observed["x"], dose], -1)).chunk(2, -1)
            with pyro.plate("data", size):
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    model, guide, data = Model().to(dtype), Guide().to(dtype), {**X, "dose": torch.arange(4.0)}
    before = [weight.clone() for weight in (*model.parameters(), *guide.parameters())]
    tree = posterior(model, guide, data, draws=3, groups=["prior", "posterior_predictive", "log_likelihood"])
    assert np.isfinite(tree["sample_stats"]["log_p"]).all()
    after = [*model.parameters(), *guide.parameters()]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(before, after, strict=True))
    fit = cal.inference.fit(model, guide, data, validation=0.25, epochs=1, batch_size=2)
    assert math.isfinite(fit.elbo)


def add_noise(batch):
    return {**batch, "x": batch["x"] + torch.randn(batch["x"].shape)}


def centre(batch):
    return {**batch, "x": batch["x"] - batch["x"].mean()}


@pytest.mark.parametrize("transform", [add_noise, centre])
@pytest.mark.parametrize(
    "call", [lambda d: posterior(vector, vector_guide, d, draws=2), lambda d: reference(vector, d)]
)
def test_data_that_change_between_looks_are_refused(transform, call):
    """Posterior and reference read the data on their own, in batches of their own: they would be of other data."""
    with pytest.raises(DataError, match=r"transform.*'x'.*posterior needs fixed data"):
        call(cal.data.Data(X, transform=transform))
    scaled = cal.data.Data(X, transform=lambda batch: {"x": batch["x"] / 2})
    tree = posterior(vector, vector_guide, scaled, draws=2)
    np.testing.assert_array_equal(tree["observed_data"]["x"], X["x"] / 2)


# -- groups ------------------------------------------------------------------------------------------------------------


def test_groups_of_a_program_with_shared_latents():
    groups = ["prior", "prior_predictive", "posterior_predictive", "log_likelihood"]
    tree = posterior(hierarchical, aligned_guide, X, draws=200, groups=groups)
    assert {*groups, "posterior", "sample_stats", "observed_data", "constant_data"} == set(tree.children)
    prior = tree["prior"].dataset
    assert set(prior.data_vars) == {"centre", "z", "double", "square"}
    assert prior["double"].dims == prior["z"].dims == ("chain", "draw", "data")
    assert prior["centre"].dims == prior["square"].dims == ("chain", "draw")
    np.testing.assert_allclose(prior["double"], 2 * prior["z"], rtol=1e-6)
    # Moments of 200 draws: centre, z − centre, x − z of the prior; x − z of the posterior (4 × 200).
    replicated = tree["posterior_predictive"]["x"] - tree["posterior"]["z"]
    checks = [
        (prior["centre"] - 3, 0.5, 200),
        (prior["z"] - prior["centre"], 1.0, 800),
        (tree["prior_predictive"]["x"] - prior["z"], 0.5, 800),
        (replicated, 0.5, 800),
    ]
    for value, sd, count in checks:  # a mean off by 0.47 sd, or a variance by 66%, is seen with 95% power
        assert abs(float(value.mean())) / sd * math.sqrt(count) < limit(8)
        assert abs(float(value.var()) / sd**2 - 1) * math.sqrt(count / 2) < limit(8)
    z = torch.tensor(tree["posterior"]["z"].values)
    np.testing.assert_allclose(tree["log_likelihood"]["x"], Normal(z, 0.5).log_prob(X["x"]), rtol=1e-4, atol=1e-4)
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "data")


def test_log_likelihood_is_summed_over_the_event():
    def model(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None, None], 1.0).expand([size, 2, 3]).to_event(2))

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"].mean((-1, -2)), 0.3))

    x = torch.randn(5, 2, 3)
    tree = posterior(model, guide, {"x": x}, draws=4, groups=["log_likelihood", "posterior_predictive"])
    assert tree["log_likelihood"]["x"].dims == ("chain", "draw", "data")
    assert tree["posterior_predictive"]["x"].dims == ("chain", "draw", "data", "x_dim_0", "x_dim_1")
    z = torch.tensor(tree["posterior"]["z"].values)[..., None, None]
    np.testing.assert_allclose(tree["log_likelihood"]["x"], Normal(z, 1.0).log_prob(x).sum((-1, -2)), rtol=1e-5)


def test_unknown_group_and_too_much_memory_are_refused():
    with pytest.raises(InferenceError, match=r"unknown groups \['loglik'\]"):
        posterior(vector, vector_guide, X, draws=2, groups=["loglik"])
    with pytest.raises(InferenceError, match="reduce draws"):
        posterior(vector, vector_guide, X, draws=10**9)


def test_dimensions_and_coordinates_that_the_model_names():
    class Named(PyroModule):
        dims = {"z": ["feature"]}
        coords = {"feature": ["left", "right"]}

        def forward(self, size):
            vector(size)

    tree = posterior(Named(), vector_guide, X, draws=2, groups=["prior"])
    for group in ("posterior", "prior"):
        assert tree[group]["z"].dims == ("chain", "draw", "data", "feature")
        assert tree[group]["feature"].values.tolist() == ["left", "right"]
