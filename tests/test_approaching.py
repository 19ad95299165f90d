"""Starts that are hopelessly far from the posterior come nearer, and no others move."""

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from small_models import COUNTS, elementwise

import calibrant as cal
from calibrant.inference.references import approaching, lanes
from calibrant.inference.references.approaching import approached
from calibrant.inference.references.lanes import NutsSettings, sample_nuts
from calibrant.inference.references.starts import keys_of, prior_and_guide
from calibrant.inference.references.target import target_of
from calibrant.program import as_program

SD = torch.tensor([0.1, 1.0, 10.0])
PLACES = {"x": torch.tensor([[0.0, 0.0, 0.0], [1.0, -5.0, 2e4]], dtype=torch.float64)}


def plane(size):
    """A flat prior: the posterior is Normal(x, SD)."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.ImproperUniform(constraints.independent(constraints.real, 1), (size,), (3,)))
        pyro.sample("x", dist.Normal(z, SD).to_event(1))


def two_places(size):
    """The same about x and about −x."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (size,), ()))
        pyro.sample("x", dist.Normal(z.abs(), 0.01))


def funnel(size):
    """Neal's funnel of 30 dimensions as a density of one vector, in which no structure can be seen."""
    with pyro.plate("data", size):
        q = pyro.sample("q", dist.ImproperUniform(constraints.independent(constraints.real, 1), (size,), (31,)))
        v, z = q[..., 0], q[..., 1:]
        pyro.factor("v", dist.Normal(0.0, 10.0).log_prob(v))
        pyro.factor("z", dist.Normal(0.0, (v / 2).exp()[:, None]).log_prob(z).sum(-1))
        pyro.sample("x", dist.Normal(0.0, 1.0).expand([size]))


def nearer(program, observed, starts):
    with target_of(as_program(program), cal.data.Data(observed)) as target:
        return approached(target, starts)


def far(spread, *shape, seed=0):
    return spread * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_hopeless_starts_come_to_the_outskirts_and_stay_wider_than_the_posterior():
    starts = far(1e4, 2, 16, 3)
    found = nearer(plane, PLACES, starts)
    below = 0.5 * ((found - PLACES["x"][:, None]) / SD).square().sum(-1)
    assert (below > 0.85 * 4000).all()
    assert (below < 2 * 4000).all()  # of the mode, where some ascents have not ended
    assert len(found.reshape(-1, 3).unique(dim=0)) == 32
    sides = ((found - PLACES["x"][:, None]) / SD)[..., 0] > 0
    assert (sides.sum(1) > 0).all()
    assert (sides.sum(1) < 16).all()


def test_other_starts_stay_where_they_are():
    starts = far(20.0, 2, 16, 3) * SD + PLACES["x"][:, None]
    assert torch.equal(nearer(plane, PLACES, starts), starts)


def test_draws_of_the_prior_stay_where_they_are():
    data = cal.data.Data(COUNTS)
    with target_of(as_program(elementwise), data) as target:
        starts = prior_and_guide(target, keys_of(target, data, 1), 4, None)
        assert torch.equal(approached(target, starts), starts)


def test_a_start_depends_on_its_own_datum_alone(monkeypatch):
    starts = far(1e4, 2, 8, 3)
    found = nearer(plane, PLACES, starts)
    alone = nearer(plane, {"x": PLACES["x"][1:]}, starts[1:, 3:5])
    torch.testing.assert_close(alone, found[1:, 3:5], rtol=0, atol=0)
    monkeypatch.setattr(approaching, "_ROWS", {"cpu": 5})
    torch.testing.assert_close(nearer(plane, PLACES, starts), found, rtol=0, atol=0)


def test_starts_stay_on_their_side_of_two_modes():
    starts = far(1e3, 1, 64, 1, seed=1)
    found = nearer(two_places, {"x": torch.tensor([5.0], dtype=torch.float64)}, starts)
    assert (found != starts).any(-1).sum() > 60
    assert torch.equal(found > 0, starts > 0)
    assert ((found.abs() - 5).abs() > 0.4).all()  # 44 sds


def draws_of_the_funnel():
    v = far(10.0, 1, 16, 1)
    return torch.cat([v, (v / 2).exp() * far(1.0, 1, 16, 30, seed=1)], -1)


def test_no_start_falls_into_the_neck_of_a_funnel(monkeypatch):
    """The density rises by 15 nats per unit towards lower v, as far as float64 goes, where there is no mass."""
    starts, observed = draws_of_the_funnel(), {"x": torch.zeros(1, dtype=torch.float64)}
    assert torch.equal(nearer(funnel, observed, starts), starts)
    hopeless = starts.clone()
    hopeless[..., 1:] *= 1e6
    found = nearer(funnel, observed, hopeless)
    assert (found != hopeless).any(-1).all()
    assert (found[..., 0] > -30).all()
    monkeypatch.setattr(approaching, "_SLACK", 0.1)  # planted: every gain counts
    assert (nearer(funnel, observed, starts)[..., 0] < -50).sum() > 4


def test_starts_without_a_density_or_an_end_stay():
    def wall(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (size,), ()))
            pyro.factor("cliff", torch.where(z < 0, -torch.inf, 1e6 * z))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([size]))

    starts = far(10.0, 1, 16, 1)
    assert torch.equal(nearer(wall, {"x": torch.zeros(1)}, starts), starts)


def test_chains_start_there(monkeypatch):
    monkeypatch.setattr(lanes, "sample_target", lambda target, keys, places, *rest: places)
    data = cal.data.Data(PLACES)
    found = sample_nuts(as_program(plane), data, NutsSettings(), 1, cal.progress.silent).starts
    with target_of(as_program(plane), data) as target:
        starts = prior_and_guide(target, keys_of(target, data, 1), 4, None)
        assert torch.equal(found, approached(target, starts))
    assert (starts[1, :, 2] < 100).all()
    assert (found[1, :, 2] > 1e4).all()
