"""What batched NUTS does in warm-up: windows, what chains pool, chains that leave places without mass."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import small_models
import torch
from agreement import limit
from small_models import nuts

from calibrant.inference.references import adaptation


@pytest.fixture
def one_look(monkeypatch):
    small_models.one_look(monkeypatch)


def test_windows_are_stans():
    plan = adaptation.schedule(1000)
    ends = plan.closes.nonzero()[:, 0] + 1
    assert ends.tolist() == [100, 150, 250, 450, 950]
    assert (plan.window[:75] == -1).all()
    assert (plan.window[950:] == -1).all()


@pytest.mark.parametrize("dense", [False, True])
def test_chains_of_a_datum_pool_what_they_know(dense):
    generator = torch.Generator().manual_seed(1)
    draws = torch.randn(4, 30, 3, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 2.0, 5.0]) + 1e6
    state = adaptation.start(torch.zeros(4, 3, dtype=torch.float64), 2, 1, 0, dense)
    for step in range(30):
        some = torch.arange(4)[: 4 if step < 20 else 2]  # two chains stop early
        window = torch.ones(len(some), dtype=torch.int64)
        adaptation.contribute(state, some, window, draws[some, step, None], torch.zeros(len(some), 0, 1), some.double())
    count, variance, _ = adaptation.pooled(state, torch.arange(4)[None], torch.tensor([1]))
    together = torch.cat([draws[:, :20].reshape(-1, 3), draws[:2, 20:].reshape(-1, 3)])
    expected = together.T.cov() if dense else together.var(0)
    assert int(count) == len(together) == 100
    torch.testing.assert_close(variance[0, 0], expected, rtol=1e-6, atol=1e-6)


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
