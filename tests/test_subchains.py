"""Sub-chains with a common start: what their diagnostics see, and what chains that consist of them promise.

Synthetic chains have known autocorrelation, shifts and starts; the last part runs the sampler.
"""

import json

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from arviz_stats.base import array_stats
from scipy.signal import lfilter
from small_models import COUNTS, elementwise, nuts, one_look
from test_nuts import assert_same

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.inference.diagnostics import bfmi, diagnose
from calibrant.inference.references import lanes, modal
from calibrant.inference.references.chains import STATISTICS, McmcDraws
from calibrant.inference.references.gate import ESS_LIMIT, RHAT_LIMIT, mcmc_convergence
from calibrant.inference.references.lanes import NutsSettings, sample_nuts
from calibrant.inference.references.sampling import subchains_of
from calibrant.program import as_program

CHAINS, EACH, LENGTH = 4, 8, 125


def autoregressive(rng, chains, draws, posteriors, phi, start=None):
    """AR(1) chains with standard Normal draws `(chain, draw, posterior)`, stationary or from starts `(chain, …)`."""
    noise = rng.normal(size=(chains, draws, posteriors)) * np.sqrt(1 - phi**2)
    if start is None:
        noise[:, 0] /= np.sqrt(1 - phi**2)
    else:
        noise[:, 0] += phi * start
    return lfilter([1.0], [1.0, -phi], noise, axis=1)


def in_chains(x):
    """Sub-chains `(chain · sub-chain, draw, …)` one after another."""
    return x.reshape(CHAINS, -1, *x.shape[2:])


def share(mask):
    return float(mask.mean()), float(np.sqrt(mask.mean() * (1 - mask.mean()) / mask.size))


# -- diagnostics -------------------------------------------------------------------------------------------------------


def test_rhat_is_nested_and_ess_is_that_of_the_subchains():
    """Nested R-hat by its definition, from the ranks of the draws; bulk ESS by ArviZ, from the sub-chains."""
    x = autoregressive(np.random.default_rng(1), CHAINS * EACH, LENGTH, 1, 0.6)[..., 0]
    x = np.exp(x + 0.3 * np.repeat(np.arange(CHAINS), EACH)[:, None])
    found = diagnose(in_chains(x), EACH)
    # ArviZ's R-hat doesn't depend on the order of the draws in the halves of a chain: here, of all sub-chains.
    halves = [np.concatenate([x[:, :62].reshape(CHAINS, -1), x[:, -62:].reshape(CHAINS, -1)], 1)]
    np.testing.assert_allclose(found["rhat"], array_stats.rhat(halves[0]), rtol=1e-8)
    np.testing.assert_allclose(found["ess_bulk"], array_stats.ess(x, method="bulk"), rtol=1e-8)
    assert found["rhat"] > 1.02


def test_nested_rhat_is_that_of_margossian_and_others():
    """√(1 + B / W) with W the variance within sub-chains plus that between those of a chain, up to 1 in a thousand."""
    x = autoregressive(np.random.default_rng(2), CHAINS * EACH, LENGTH - 1, 1, 0.6)[..., 0]
    x += 0.4 * np.repeat(np.arange(CHAINS), EACH)[:, None]
    ranks = x.reshape(-1).argsort().argsort().reshape(x.shape)
    scores = torch.special.ndtri(torch.as_tensor((ranks + 1 - 0.375) / (x.size + 0.25))).numpy()
    split = np.moveaxis(scores.reshape(CHAINS, EACH, 2, -1), 2, 1).reshape(2 * CHAINS, EACH, -1)  # halves of chains
    between = split.mean((1, 2)).var(ddof=1)
    within = split.mean(2).var(1, ddof=1).mean() + split.var(2, ddof=1).mean()
    found = diagnose(in_chains(x), EACH)["rhat"]
    np.testing.assert_allclose(found - 1, np.sqrt(1 + between / within) - 1, rtol=0.02)


def test_the_energy_of_subchains_is_not_compared_across_their_ends():
    rng = np.random.default_rng(3)
    walk = rng.normal(size=(CHAINS * EACH, LENGTH)).cumsum(1)
    steps = np.diff(walk, axis=1) ** 2
    expected = steps.reshape(CHAINS, -1).mean(1) / in_chains(walk).var(1, ddof=1)
    np.testing.assert_allclose(bfmi(in_chains(walk), EACH), expected)
    np.testing.assert_allclose(bfmi(walk), steps.mean(1) / walk.var(1, ddof=1))


@pytest.mark.parametrize("phi", [0.0, 0.7, 0.8])
def test_stationary_chains_pass_as_often_as_ordinary_ones(phi):
    """Of 300 posteriors with 4,000, 706 and 444 effective draws; also, each defect fails as often."""
    rng, count = np.random.default_rng(4), 300
    ordinary = autoregressive(rng, CHAINS, EACH * LENGTH, count, phi)
    divided = autoregressive(rng, CHAINS * EACH, LENGTH, count, phi)
    for shift in (0.0, 0.25, 0.6):
        one, two = ordinary.copy(), divided.copy()
        one[0] += shift
        two[:EACH] += shift
        (often, se), (also, also_se) = (
            share(diagnose(*given)["rhat"] < RHAT_LIMIT) for given in ((one,), (in_chains(two), EACH))
        )
        assert abs(often - also) < 0.02 + 4 * np.hypot(se, also_se), (shift, often, also)
        if shift == 0.6:
            assert also < 0.02


def test_subchains_that_have_not_forgotten_their_start_fail():
    """After 125 steps, chains whose autocorrelation time is 200 stand where a third of their start is left.

    With an autocorrelation time of 9, the start is forgotten, and most chains pass. R-hat of the sub-chains, which is
    not nested, would let none of them pass.
    """
    rng, count = np.random.default_rng(5), 300
    starts = np.repeat(2 * rng.normal(size=(CHAINS, count)), EACH, 0)
    passed = []
    for phi in (0.99, 0.8):
        draws = autoregressive(rng, CHAINS * EACH, 2 * LENGTH, count, phi, starts)[:, LENGTH:]
        passed.append(share(diagnose(in_chains(draws), EACH)["rhat"] < RHAT_LIMIT)[0])
    assert passed[0] < 0.01
    assert passed[1] > 0.6
    assert share(diagnose(draws)["rhat"] < RHAT_LIMIT)[0] == 0.0  # what is not nested


def test_a_drift_that_all_chains_share_fails():
    rng = np.random.default_rng(6)
    drift = np.linspace(0.0, 1.0, LENGTH)[:, None]
    draws = rng.normal(size=(CHAINS * EACH, LENGTH, 200)) + drift
    assert (diagnose(in_chains(draws), EACH)["rhat"] > RHAT_LIMIT).all()


@pytest.mark.parametrize(
    ("where", "word"),
    [
        (np.repeat([0, 0, 0, 1], EACH), "R-hat"),  # a chain sits in a mode of its own
        (np.tile([0, 1], CHAINS * EACH // 2), "ESS"),  # every chain has sub-chains in both modes, and none moves
        (np.eye(CHAINS * EACH, dtype=int)[5], "ESS"),  # a single sub-chain
    ],
    ids=["chains apart", "sub-chains apart", "one sub-chain apart"],
)
def test_chains_that_sit_in_modes_fail(where, word):
    draws = np.random.default_rng(7).normal(size=(CHAINS * EACH, LENGTH)) + 8.0 * where[:, None]
    posterior = xr.Dataset({"z": (("chain", "draw"), in_chains(draws))}, attrs={"subchains": EACH})
    found = mcmc_convergence(posterior, xr.Dataset())
    assert not found["is_reference"].any()
    assert word in str(found["reason"].values[0])


def test_a_subchain_that_does_not_move_fails():
    draws = np.random.default_rng(8).normal(size=(CHAINS * EACH, LENGTH))
    draws[3] = draws[3, 0]
    posterior = xr.Dataset({"z": (("chain", "draw"), in_chains(draws))}, attrs={"subchains": EACH})
    assert "constant chain" in str(mcmc_convergence(posterior, xr.Dataset())["reason"].values[0])
    some = posterior.isel(draw=slice(0, 999))  # not divisible: these are ordinary chains
    assert "constant" not in str(mcmc_convergence(some, xr.Dataset())["reason"].values[0])


# -- how many ----------------------------------------------------------------------------------------------------------


def test_the_number_of_subchains_follows_from_the_lengths():
    lengths = [(1000, 1000), (500, 500), (300, 1000), (1000, 500), (4000, 4000), (100, 500), (1000, 997), (1, 1)]
    assert [subchains_of(*each) for each in lengths] == [8, 4, 2, 5, 16, 1, 1, 1]


@pytest.mark.parametrize("subchains", [3, 0, 20, "few"])
def test_a_number_that_does_not_divide_the_draws_is_refused(subchains):
    with pytest.raises(InferenceError, match=rf"subchains={subchains}: .* divides draws=500 .* 50 draws"):
        nuts(elementwise, COUNTS, subchains=subchains)


# -- with chains that are made up --------------------------------------------------------------------------------------


def slow(plans, phi):
    """A sampler of chains with autocorrelation that start far out, in place of the sampler of `elementwise`."""

    def sampler(model, data, settings, seed, progress, guide=None):
        plans.append(settings)
        rng, total = np.random.default_rng(seed + len(plans)), settings.warmup + settings.draws
        starts = np.repeat(10.0 * rng.normal(size=(settings.chains, len(data))), settings.subchains, 0)
        drawn = autoregressive(rng, settings.lanes, total, len(data), phi, starts)[:, settings.warmup :]
        drawn = torch.as_tensor(drawn.reshape(settings.chains, -1, len(data)))
        stats = {name: torch.zeros(drawn.shape, dtype=kind) for name, kind in STATISTICS.items()}
        stats["energy"] = torch.as_tensor(rng.normal(size=drawn.shape))
        nothing = torch.zeros(len(data), dtype=torch.int64)
        found = torch.arange(len(data)), nothing > 0, nothing, {}
        result = McmcDraws({"rate": drawn}, stats, ["rate"], ["rate"], *found, subchains=settings.subchains)
        return result, torch.zeros(len(data), settings.lanes, 0, dtype=torch.float64)

    return sampler


def test_too_short_a_warmup_fails_and_is_made_longer(monkeypatch):
    """Starts that are ten sds out are not forgotten in 125 iterations, but they are in 500."""
    plans = []
    monkeypatch.setattr(modal, "sample_nuts", slow(plans, 0.97))
    tree = nuts(elementwise, {"x": torch.zeros(40)}, starts=0, warmup=1000, draws=1000)
    assert [(plan.warmup, plan.draws, plan.subchains) for plan in plans[:2]] == [(125, 125, 8), (500, 500, 8)]
    first, last = plans[0], plans[-1]
    assert last.warmup == first.warmup * first.subchains  # the last look has the whole warm-up
    convergence = tree["convergence"].dataset
    assert (convergence["look"] >= 2).all()
    assert tree["posterior"].sizes["draw"] == 1000
    assert tree["posterior"].attrs["subchains"] == 8


# -- with real chains --------------------------------------------------------------------------------------------------


def few_draws(observed=COUNTS, seed=1, subchains=3):
    """Draws `(chain, draw, data)` of chains that no gate judges."""
    data = observed if isinstance(observed, cal.data.Data) else cal.data.Data(observed)
    settings = NutsSettings(warmup=20, draws=10, subchains=subchains)
    return sample_nuts(as_program(elementwise), data, settings, seed, cal.progress.silent)[0].draws["rate"].numpy()


def test_draws_depend_neither_on_the_place_in_the_batch_nor_on_other_data(monkeypatch):
    draws, order = few_draws(), torch.tensor([5, 0, 3])
    assert draws.shape == (4, 30, 6)
    own = draws.reshape(4, 3, 10, 6)[:, :, -1]  # the last draws of all sub-chains
    assert len(np.unique(own)) == own.size  # each has random numbers of its own
    assert_same(few_draws(cal.data.Data(COUNTS).subset(order)), draws[:, :, order])
    monkeypatch.setattr(lanes, "_LANES", {"cpu": 24})  # two data at a time
    assert_same(few_draws(), draws)


def test_subchains_share_a_start_after_new_starts_too(monkeypatch):
    """Of a program whose prior draws have no density."""

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(10.0, 0.1).expand([2]).to_event(1))
            pyro.factor("wall", torch.where(z.sum(-1) > 1, -torch.inf, 0.0))
            pyro.sample("x", dist.Normal(z.sum(-1), 10.0))

    starts, retry = [], lanes.lane_state._retry

    def watched(state, index, plan):
        retry(state, index, plan)
        starts.append((index, state.lanes.q[index].clone()))

    monkeypatch.setattr(lanes.lane_state, "_retry", watched)
    settings = NutsSettings(warmup=4, draws=4, subchains=3)
    sample_nuts(as_program(program), cal.data.Data({"x": torch.zeros(2)}), settings, 1, cal.progress.silent)
    index, found = starts[0]
    assert index.tolist() == list(range(24))
    groups = found.reshape(8, 3, 2)
    assert (groups == groups[:, :1]).all()
    assert len(groups[:, 0].unique(dim=0)) == 8


def test_a_reference_of_subchains_is_right_and_arviz_agrees_with_the_gate():
    tree = nuts(elementwise, COUNTS, warmup=480, draws=1000, starts=0)
    convergence, draws = tree["convergence"].dataset, tree["posterior"]["rate"].values
    assert tree["posterior"].attrs["subchains"] == 4
    assert "one after another" in tree["posterior"].attrs["draws_note"]
    assert json.loads(tree["posterior"].attrs["settings"])["warmup"] == 480
    assert draws.shape == (4, 1000, 6) == tree["sample_stats"]["lp"].shape
    assert bool(convergence["is_reference"].all()), convergence["reason"].values
    bulk = array_stats.ess(draws, chain_axis=0, draw_axis=1)
    np.testing.assert_allclose(bulk, convergence["ess_bulk"], rtol=0.25)
    assert (array_stats.rhat(draws, chain_axis=0, draw_axis=1) < RHAT_LIMIT).all()
    truth = dist.Gamma(2.0 + COUNTS["x"], torch.tensor(2.0))
    errors = draws.mean((0, 1)) - truth.mean.numpy()
    assert (np.abs(errors) < limit(6) * truth.stddev.numpy() / convergence["ess_bulk"].values ** 0.5).all()
    again = mcmc_convergence(tree["posterior"].to_dataset(), tree["sample_stats"].to_dataset())
    np.testing.assert_allclose(again["rhat"], convergence["rhat"], atol=1e-5)


def two_modes(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.3))


def test_a_mode_that_chains_do_not_leave_fails_and_the_search_finds_both(monkeypatch):
    observed = {"x": torch.linspace(4.0, 5.5, 6)}
    with monkeypatch.context() as patch:
        one_look(patch)
        blind = nuts(two_modes, observed, warmup=500, starts=0)
    sides = np.sign(blind["posterior"]["z"].values.reshape(4, 4, 125, 6)).mean(2)
    assert (np.abs(sides) == 1).all()  # no sub-chain moves after warm-up
    split = np.abs(sides.sum((0, 1))) < 16  # elsewhere all four starts lead to one side, and nothing can see the other
    assert split.any()
    assert (blind["convergence"]["ess_bulk"][split] < ESS_LIMIT / 4).all()
    assert (blind["convergence"]["rhat"][split] > RHAT_LIMIT).all()
    tree = nuts(two_modes, observed, warmup=500)
    assert bool(tree["convergence"]["is_reference"].all()), tree["convergence"]["reason"].values
    assert (tree["convergence"]["modes"] == 2).all()
    np.testing.assert_allclose((tree["posterior"]["z"] > 0).mean(("chain", "draw")), 0.5, atol=0.03)
