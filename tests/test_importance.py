"""PSIS resampling: k-hat is ArviZ's, draws and evidence are those of the posterior, and the error bars count copies."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from arviz_stats.base import array_stats
from torch.distributions import Normal

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.inference import importance, posterior
from calibrant.inference.reweighting import MIN_DRAWS

X = {"x": torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])}
MEAN, SD = 0.8 * X["x"].numpy(), math.sqrt(0.2)


def conjugate(size):
    """Posterior N(0.8 x, √0.2), evidence N(0, √1.25)."""
    pyro.deterministic("constant", torch.ones(()))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * z)
        pyro.sample("x", dist.Normal(z, 0.5))


def guide(observed, size):
    """Shifted by half a posterior sd, and 1.3 times as wide."""
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(0.8 * observed["x"] + 0.2, 0.6))


@pytest.fixture(scope="module")
def pool() -> xr.DataTree:
    return posterior(conjugate, guide, X, draws=20_000)


def weights(tree: xr.DataTree) -> np.ndarray:
    stats = tree["sample_stats"].dataset
    return (stats["log_p"] - stats["log_q"]).transpose("data", "chain", "draw").values


def test_k_hat_is_that_of_arviz(pool):
    """Against the approximate-posterior LOO, whose weights are p/q where the likelihood is flat."""
    found = importance(pool)["importance"]["pareto_k"].values
    stats = pool["sample_stats"].dataset
    for datum, k in enumerate(found):
        log_p, log_q = (stats[name].values[:, :, datum] for name in ("log_p", "log_q"))
        flat = np.zeros_like(log_p)
        wanted = array_stats.loo_approximate_posterior(flat, log_p, log_q, chain_axis=0, draw_axis=1)[1]
        assert k == pytest.approx(float(wanted), rel=1e-6)
    assert (found < importance(pool)["importance"].attrs["good_k"]).all()


def test_draws_are_those_of_the_posterior_with_honest_errors(pool):
    """Mean and variance of five data; the errors are ESS by autocorrelation, which has to see the copies."""
    tree = importance(pool, seed=1)
    z = tree["posterior"]["z"].values
    size = array_stats.ess(z, chain_axis=0, draw_axis=1, method="mean")
    assert (np.abs(z.mean((0, 1)) - MEAN) / (SD / np.sqrt(size)) < limit(10)).all()
    square = (z - MEAN) ** 2
    size = array_stats.ess(square, chain_axis=0, draw_axis=1, method="mean")
    assert (np.abs(square.mean((0, 1)) - SD**2) / (square.std((0, 1)) / np.sqrt(size)) < limit(10)).all()
    plain = pool["posterior"]["z"].values
    assert (np.abs(plain.mean((0, 1)) - MEAN) / (SD / np.sqrt(20_000)) > limit(10)).all()  # the pool is off


def test_autocorrelation_and_kish_count_alike(pool):
    """The copies cost what their numbers say, a little more than the weights; a random order would hide it."""
    tree = importance(pool)
    kish = tree["importance"]["ess"].values
    assert ((kish > 5_000) & (kish < 19_000)).all()
    noise = np.random.default_rng(0).normal(size=(1, 20_000, 1))  # a function of the draws with nothing to do with p/q
    labels = np.argsort(np.argsort(pool["posterior"]["z"].values, axis=1), axis=1)
    stored = pool.copy(deep=True)
    stored["posterior"]["z"].values[:] = np.take_along_axis(np.repeat(noise, 5, 2), labels, 1)
    copies = importance(stored)["posterior"]["z"].values
    found = array_stats.ess(copies, chain_axis=0, draw_axis=1, method="mean")
    counted = [20_000**2 / (np.unique(z, return_counts=True)[1] ** 2).sum() for z in copies[0].T]
    np.testing.assert_allclose(found, counted, rtol=0.15)
    assert (counted < kish).all()
    shuffled = np.random.default_rng(1).permuted(copies, axis=1)
    hidden = array_stats.ess(shuffled, chain_axis=0, draw_axis=1, method="mean")
    assert (hidden > 1.3 * np.array(counted)).all()


def test_errors_over_repetitions():
    """The spread of the resampled mean over 400 pools of one datum is what its own error says."""
    z = importance(posterior(conjugate, guide, {"x": torch.ones(400)}, draws=400))["posterior"]["z"].values
    errors = z.std((0, 1)) / np.sqrt(array_stats.ess(z, chain_axis=0, draw_axis=1, method="mean"))
    ratio = z.mean((0, 1)).std() / math.sqrt(np.square(errors).mean())
    assert abs(math.log(ratio)) < limit(1) / math.sqrt(2 * 400), ratio


def test_evidence_within_its_error(pool):
    group = importance(pool)["importance"].dataset
    exact = Normal(0.0, math.sqrt(1.25)).log_prob(X["x"]).numpy()
    z = (group["log_evidence"].values - exact) / group["log_evidence_se"].values
    assert np.abs(z).max() < limit(5)
    assert group["log_evidence_se"].values.max() < 0.01


def test_format_is_that_of_posterior():
    pool = posterior(conjugate, guide, X, draws=500, groups=["log_likelihood", "prior"])
    tree = importance(pool, draws=300, seed=2)
    group = tree["posterior"].dataset
    assert group["z"].sizes == {"chain": 1, "draw": 300, "data": 5}
    assert group["constant"].sizes == {"chain": 1, "draw": 300}
    np.testing.assert_allclose(group["double"], 2 * group["z"], rtol=1e-6)
    expected = Normal(torch.tensor(group["z"].values), 0.5).log_prob(X["x"])
    np.testing.assert_allclose(tree["log_likelihood"]["x"], expected, rtol=1e-4, atol=1e-4)
    assert tree["sample_stats"]["log_p"].sizes == {"chain": 1, "draw": 300, "data": 5}
    xr.testing.assert_identical(tree["prior"].dataset, pool["prior"].dataset)
    xr.testing.assert_identical(tree["observed_data"].dataset, pool["observed_data"].dataset)
    assert group.attrs["method"] == "importance"
    assert group.attrs["independent_draws"] == 0
    assert group.attrs["model_sha256"] == pool["posterior"].attrs["model_sha256"]
    assert "not independent" in group.attrs["draws_note"]
    assert tree.identical(importance(pool, draws=300, seed=2))
    assert not tree.identical(importance(pool, draws=300, seed=3))


def test_written_and_read_back(pool, tmp_path):
    tree = importance(pool, draws=200)
    cal.store.save_tree(tree, tmp_path / "weighted.nc")
    assert cal.store.load_tree(tmp_path / "weighted.nc").identical(tree)


def test_comparison_with_the_exact_posterior():
    """A guide that is off fails; its draws, resampled from a large pool, pass."""
    model = cal.models.create("ppca", shape=(4,), latents=2).eval().requires_grad_(False)
    observed = {"x": cal.program.sample_prior(model, 20, seed=1)["x"]}
    exact = cal.inference.reference(model, observed, draws=2000)
    mean, sd = (getattr(exact["posterior"]["z"], name)(("chain", "draw")).values for name in ("mean", "std"))

    class Off(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            for name, value in (("known", observed["x"]), ("loc", mean), ("scale", sd)):
                self.register_buffer(name, torch.as_tensor(value))

        def forward(self, observed, size):
            nearest = torch.cdist(observed["x"].to(self.known.dtype), self.known).argmin(1)
            loc, scale = self.loc[nearest], 1.3 * self.scale[nearest]
            with pyro.plate("data", size):
                pyro.sample("z", dist.Normal(loc + 0.5 * scale, scale).to_event(1))

    post = posterior(model, Off(), observed, draws=20_000)
    status = []
    for tree in (post, importance(post)):
        result = cal.evaluation.compare(tree, exact)
        status.append({v.quantity: v.status for v in cal.evaluation.verdicts(result) if v.site == "z"})
    assert status[0]["mean"] == "fail"
    assert "fail" not in status[1].values(), status


def planted(pool: xr.DataTree, change) -> xr.DataTree:
    tree = pool.copy(deep=True)
    change(tree["sample_stats"]["log_p"].values)
    return tree


def test_weights_without_a_tail(pool):
    def equal(log_p):
        log_p[:, :, 1] = pool["sample_stats"]["log_q"].values[:, :, 1]

    def impossible(log_p):
        log_p[:, 30:, 1] = -np.inf

    def half(log_p):
        log_p[:, ::2, 1] = -np.inf

    found = [importance(planted(pool, change)) for change in (equal, impossible, half)]
    ks = [tree["importance"]["pareto_k"].values[1] for tree in found]
    assert ks[:2] == [-np.inf, np.inf]
    assert np.isfinite(ks[2])
    for tree in found[1:]:
        assert np.isfinite(tree["sample_stats"]["log_p"]).all()
    assert found[0]["importance"]["ess"].values[1] == pytest.approx(20_000)


def test_a_guide_that_misses_is_told_by_k_hat():
    def narrow(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(0.8 * observed["x"], 0.1))

    group = importance(posterior(conjugate, narrow, X, draws=4000))["importance"]
    assert float(group["pareto_k"].mean()) > group.attrs["good_k"]


def test_k_hat_does_not_grow_with_the_number_of_data():
    """Of a whole batch it would (1.1 for 256 data of a guide with .35 for one)."""
    many = {"x": torch.zeros(256)}

    def close(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(0.8 * observed["x"], 0.38))

    k = importance(posterior(conjugate, close, many, draws=2000))["importance"]["pareto_k"].values
    assert abs(np.median(k) - k[0]) < 0.3
    assert np.median(k) < 0.6


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda pool: importance(pool), "resampled already"),
        (lambda pool: pool.filter(lambda node: node.name != "sample_stats"), "log_p"),
        (lambda pool: planted(pool, lambda log_p: log_p.fill(np.nan)), "datum 0 has weights"),
        (lambda pool: planted(pool, lambda log_p: log_p[:, :, 3].fill(-np.inf)), "datum 3"),
        (lambda pool: pool.isel(draw=slice(MIN_DRAWS - 1)), "99 draws"),
    ],
)
def test_refusals(pool, make, match):
    with pytest.raises(InferenceError, match=match):
        importance(make(pool))
    with pytest.raises(InferenceError, match="draws=0"):
        importance(pool, draws=0)


def test_shared_latents_are_refused():
    def model(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(centre, 1.0))

    def shared(observed, size):
        pyro.sample("centre", dist.Normal(0.0, 1.0))

    with pytest.raises(InferenceError, match=r"\['centre'\] are shared.*reference"):
        importance(posterior(model, shared, X, draws=200))
