"""What batched NUTS does in warm-up: windows, what chains pool, chains that leave places without mass."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import small_models
import torch
from agreement import limit
from small_models import nuts

import calibrant as cal
from calibrant.inference.references import adaptation, lane_state, metrics
from calibrant.inference.references import nuts as nuts_module
from calibrant.inference.references.lanes import NutsSettings, sample_nuts
from calibrant.program import as_program


@pytest.fixture
def one_look(monkeypatch):
    small_models.one_look(monkeypatch)


@pytest.mark.parametrize(
    ("warmup", "chains", "ends"),
    [
        (1000, 4, [30, 80, 180, 380, 950]),
        (1000, 16, [13, 25, 43, 70, 110, 190, 350, 950]),
        (125, 16, [13, 25, 43, 70, 106]),
        (34, 32, [13, 29]),
        (2, 4, [2]),
        (0, 4, []),
    ],
)
def test_windows_grow_and_are_shorter_where_many_chains_pool(warmup, chains, ends):
    plan = adaptation.schedule(warmup, chains)
    assert (plan.closes.nonzero()[:, 0] + 1).tolist() == ends
    assert plan.first == (ends or [0])[0]
    assert plan.settled.tolist()[-1:] == [True][: len(ends)]
    assert not plan.settled[: sum(end <= 60 for end in ends[:-1])].any()
    assert (plan.window[(ends or [0])[-1] :] == -1).all()
    within = plan.window[plan.window >= 0]
    assert within.tolist() == sorted(within.tolist())


@pytest.mark.parametrize(("dense", "at_once"), [(False, 1), (True, 1), (False, 7), (True, 7)])
def test_chains_of_a_datum_pool_what_they_know(dense, at_once):
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([4.0, 1.0, 0.1])
    vectors = torch.randn(4, 30, 2, 3, dtype=torch.float64, generator=generator) * torch.stack(size) + 1e6
    state = adaptation.start(torch.zeros(4, 3, dtype=torch.float64), 2, 1, 0, dense)
    made = torch.tensor([(lane, step) for step in range(30) for lane in range(4 if step < 20 else 2)])
    for some in made.split(4 * at_once):  # two chains stop early
        lane, step = some.unbind(1)
        window, none = torch.ones(len(some), dtype=torch.int64), torch.zeros(len(some), 0, 1)
        adaptation.contribute(state, lane, window, vectors[lane, step, :, None], none, lane.double())
    count, variance, _ = adaptation.pooled(state, torch.arange(4)[None], torch.tensor([1]))
    together = torch.cat([vectors[:, :20].reshape(-1, 2, 3), vectors[:2, 20:].reshape(-1, 2, 3)])
    assert int(count) == len(together) == 100
    for kind in range(2):
        expected = together[:, kind].T.cov() if dense else together[:, kind].var(0)
        torch.testing.assert_close(variance[0, kind, 0], expected, rtol=1e-6, atol=1e-6)


def test_chains_that_still_travel_are_not_pooled():
    vectors = torch.randn(5, 30, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    state = adaptation.start(torch.zeros(5, 3, dtype=torch.float64), 1, 1, 0, False)
    vectors[4] *= 1e6
    lane, window, none = torch.arange(5), torch.zeros(5, dtype=torch.int64), torch.zeros(5, 0, 1)
    for step in range(30):
        density = torch.tensor([0.0, -49.0, 10.0, 5.0, -51.0], dtype=torch.float64)
        adaptation.contribute(state, lane, window, vectors[:, step, :, None], none, density)
    count, variance, _ = adaptation.pooled(state, lane[None], window[:1])
    assert int(count) == 120
    torch.testing.assert_close(variance[0, 0, 0], vectors[:4, :, 0].reshape(-1, 3).var(0))


def long_and_narrow(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([1e-3, 1e3])).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


@pytest.mark.parametrize("most", [nuts_module.EARLY_DEPTH, 8], ids=["as it is", "without the limit"])
def test_trees_are_short_before_the_first_metric(monkeypatch, most):
    monkeypatch.setattr(nuts_module, "EARLY_DEPTH", most)
    lengths, tend = [], lane_state.tend

    def watched(state, ended, plan):
        early = ended.over & (ended.iteration < plan.schedule.first)
        lengths.extend(ended.n_steps[early].tolist())
        tend(state, ended, plan)

    monkeypatch.setattr(lane_state, "tend", watched)
    settings, data = NutsSettings(warmup=40, draws=4, dense=False), cal.data.Data({"x": torch.zeros(2)})
    sample_nuts(as_program(long_and_narrow), data, settings, 0, cal.progress.silent)
    assert len(lengths) == 8 * adaptation.schedule(40, 4).first
    assert (max(lengths) <= 31) == (most == 5)


def test_step_sizes_after_warm_up_are_means_over_the_chains_of_the_datum(monkeypatch):
    settled, settle = [], lane_state._settle_step_size

    def watched(state, index, plan):
        lanes = state.lanes
        before = [(lanes.iteration.tolist(), lanes.count.tolist(), lanes.average.tolist()), lanes.step_size.tolist()]
        settle(state, index, plan)
        settled.append((before[0], index.tolist(), lanes.step_size.tolist()))
        others = [lane for lane in range(len(before[1])) if lane not in index.tolist()]
        assert [before[1][lane] for lane in others] == lanes.step_size[others].tolist()

    monkeypatch.setattr(lane_state, "_settle_step_size", watched)
    settings, data = NutsSettings(warmup=120, draws=4, dense=False), cal.data.Data({"x": torch.zeros(2)})
    draws, _ = sample_nuts(as_program(long_and_narrow), data, settings, 0, cal.progress.silent)
    last = adaptation.schedule(120, 4).last
    steps, own = {}, {}
    for (iterations, counts, averages), index, found in settled:
        for lane in index:
            assert iterations[lane] == 120
            mates = [4 * (lane // 4) + chain for chain in range(4)]
            after = [mate for mate in mates if iterations[mate] > last]
            expected = np.average([averages[mate] for mate in after], weights=[counts[mate] for mate in after])
            np.testing.assert_allclose(found[lane], np.exp(expected))
            steps[lane], own[lane] = found[lane], np.exp(averages[lane])
    assert sorted(steps) == list(range(8))
    assert np.ptp(np.log(list(steps.values()))) < np.ptp(np.log(list(own.values())))
    kept = draws.stats["step_size"].numpy()  # (chain, draw, data)
    np.testing.assert_allclose(
        kept, np.broadcast_to(np.array([steps[i] for i in range(8)]).reshape(2, 1, 4).T, kept.shape)
    )


# -- the metric --------------------------------------------------------------------------------------------------------


def normal_target(width, draws, seed=0):
    """The covariance of a Normal with scales from 1e-3 to 1e3, draws far from its own, and gradients at the draws."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-3, 3, width, dtype=torch.float64)
    loading = torch.randn(width, width, dtype=torch.float64, generator=generator)
    covariance = loading @ loading.T * scale * scale[:, None]
    q = (5 + torch.rand(draws, width, dtype=torch.float64, generator=generator)) * 3 * scale
    return covariance, q, -q @ torch.linalg.inv(covariance)


def metric_of(q, grad, dense=True):
    width = q.shape[1]
    spread = [part.T.cov()[None] if dense else part.var(0)[None] for part in (q, grad)]
    before = torch.eye(width, dtype=q.dtype)[None] if dense else q.new_ones(1, width)
    return metrics.metric(torch.tensor([float(len(q))]), *spread, before)[0]


def condition(found, covariance):
    """The condition number of the posterior under a metric; 1 if the metric is exact."""
    values = torch.linalg.eigvals(torch.linalg.solve(found, covariance)).real
    return float(values.max() / values.min())


def test_the_metric_of_a_normal_is_exact_from_few_draws_from_anywhere():
    covariance, q, grad = normal_target(6, 12)
    assert condition(metric_of(q, grad), covariance) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(metric_of(q, grad), covariance, rtol=1e-4, atol=0)


SIGN = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
PLANTED = {
    "the inverse": lambda q, grad: (grad, q),
    "draws for gradients": lambda q, grad: (q, q),
    "a wrong sign of one entry": lambda q, grad: (q, grad * SIGN),
    "entries of different draws": lambda q, grad: (torch.stack([q[:, i].roll(i) for i in range(6)], 1), grad),
}


@pytest.mark.parametrize("wrong", PLANTED.values(), ids=PLANTED)
def test_planted_defects_of_the_metric_are_seen(wrong):
    covariance, q, grad = normal_target(6, 12)
    assert condition(metric_of(*wrong(q, grad)), covariance) > 2


def test_few_draws_give_a_diagonal_metric_and_draws_that_do_not_move_none():
    _, q, grad = normal_target(6, 11)
    found = metric_of(q, grad)
    torch.testing.assert_close(found, torch.diag(metric_of(q, grad, dense=False)))
    torch.testing.assert_close(found.diagonal(), q.std(0) / grad.std(0))
    assert torch.equal(metric_of(q[:9], grad[:9]), torch.eye(6, dtype=q.dtype))
    still = q.clone()
    still[:, 2] = 7.0
    assert torch.equal(metric_of(still, grad), torch.eye(6, dtype=q.dtype))
    assert float(metric_of(still, grad, dense=False)[2]) == 1.0
    assert torch.isfinite(metric_of(q, grad * torch.nan)).all()


def two_places(size, nats):
    """z is near −20, or near 20 where the density is lower by so many nats."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(-30.0, 30.0))  # one start in six is on the wrong side
        near, far = -(z + 20).square() / 2, -(z - 20).square() / 2 - nats
        pyro.factor("place", torch.logaddexp(near, far))
        pyro.sample("x", dist.Normal(torch.zeros_like(z), 1.0))


@pytest.mark.parametrize("slack", [None, torch.inf], ids=["as it is", "without the move"])
def test_chains_leave_places_without_mass_and_no_other(monkeypatch, one_look, slack):
    """The other place has no mass for twelve data, and an eighth of it for the others."""
    if slack is not None:
        monkeypatch.setattr(adaptation, "_SLACK", slack)
    nats = torch.tensor([200.0] * 12 + [2.0] * 12)
    tree = nuts(two_places, {"x": torch.zeros(24)}, covariates={"nats": nats}, seed=2, starts=0)
    found, both = (tree["convergence"].dataset.isel(data=part) for part in (slice(12), slice(12, None)))
    assert bool((found["rhat"] < 1.1).all()) == (slack is None), found["reason"].values
    assert (both["moved"] == 0).all()
    assert both["rhat"].max() > 1.5
    assert not both["is_reference"].all()
    if slack is None:
        assert found["moved"].values.max() in (1, 2)
        mean = tree["posterior"]["z"].mean(("chain", "draw")).values[:12]
        exact, sd = (-20 * 900 - 30) / 901, (900 / 901) ** 0.5
        assert (abs(mean - exact) < limit(12) * sd / found["ess_bulk"].values ** 0.5).all()


def test_a_chain_is_astray_far_below_the_median_of_the_others():
    state = adaptation.start(torch.zeros(8, 3, dtype=torch.float64), 1, 1, 0, False)
    state.draws[:] = 30.0
    state.density[:, 0] = 30 * torch.tensor([0.0, -49.0, -51.0, 1000.0, 0.0, -51.0, -300.0, 0.0]).double()
    state.draws[4], state.draws[7] = 5.0, 0.0  # of these nothing is known
    lane = torch.arange(8)
    chains = torch.arange(4) + lane[:, None] // 4 * 4
    astray, other = adaptation.stray(state, lane, chains, torch.zeros(8, dtype=torch.int64))
    assert astray.tolist() == [False, False, True, False] + 4 * [False]
    assert int(other[2]) == 0
    adaptation.forget(state, torch.tensor([2]), torch.tensor([0]))
    assert state.draws[:4, 0].tolist() == [30.0, 30.0, 0.0, 30.0]
    assert float(state.density[2, 0]) == 0.0


@pytest.mark.slow
def test_a_dense_metric_shortens_the_trajectories_of_correlated_latents(one_look):
    def program(size):
        near = torch.tensor([[1.0, 0.99], [0.99, 1.0]])
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), near))
            pyro.sample("x", dist.Normal(z.sum(-1), 100.0))

    observed = {"x": torch.zeros(2)}
    plain, dense = (nuts(program, observed, dense=dense, compile=False) for dense in (False, True))
    lengths = [float(tree["sample_stats"]["n_steps"].mean()) for tree in (plain, dense)]
    assert lengths[1] < 0.5 * lengths[0], lengths
    z = dense["posterior"]["z"].values.reshape(-1, 2, 2)
    assert bool(dense["convergence"]["is_reference"].all())
    np.testing.assert_allclose([np.corrcoef(z[:, i].T)[0, 1] for i in range(2)], 0.99, atol=0.005)
