"""Refined guides: exact where the family holds the truth, the guide itself at zero steps, and bound to their data."""

import copy
import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from pyro.nn import PyroModule
from small_models import coin, coin_guide
from torch import nn

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.guides import refine
from calibrant.guides.refined import is_movable

DATA = 2000


def diagonal_ppca(pixels=6, latents=3):
    """A ppca with orthogonal columns: its posterior is a product of Normals."""
    model = cal.models.create("ppca", shape=(pixels,), latents=latents)
    basis, _ = torch.linalg.qr(torch.randn(pixels, latents, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        model.decoder.directions.copy_(basis * torch.tensor([2.0, 1.0, 0.5]))
        model.likelihood.log_scale.fill_(math.log(0.5))
    return model.requires_grad_(False).eval()


class Bad(PyroModule):
    """Knows nothing of the data: wrong mean, wrong scale."""

    def __init__(self, latents=3):
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.full((latents,), 0.7)), nn.Parameter(torch.tensor(0.4))

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(self.loc, self.scale).expand([size, 3]).to_event(1))


def elbos(model, guide, observed, draws=20, **options):
    stats = cal.inference.posterior(model, guide, observed, draws, **options)["sample_stats"]
    return torch.as_tensor((stats["log_p"] - stats["log_q"]).mean(("chain", "draw")).values)


def test_a_bad_guide_refined_reaches_the_exact_evidence():
    """Gap below 0.01 nats with a standard error below 0.002, over 2,000 data; tens of nats before."""
    model = diagonal_ppca()
    observed = {"x": cal.program.sample_prior(model, DATA, seed=1)["x"]}
    exact, guide = cal.inference.log_evidence(model, observed), Bad()
    refined = refine(model, guide, observed, batch_size=1000)
    gap = exact - elbos(model, refined, observed)
    se = float(gap.std()) / math.sqrt(DATA)
    assert se < 0.002
    assert -limit(1) * se < float(gap.mean()) < 0.01
    assert float((exact - elbos(model, guide, observed)).mean()) > 2


def many_supports(size):
    with pyro.plate("data", size):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0).expand([3]).to_event(1))
        c = pyro.sample("c", dist.Beta(2.0, 2.0))
        d = pyro.sample("d", dist.Dirichlet(torch.ones(4)))
        e = pyro.sample("e", dist.ProjectedNormal(torch.zeros(3)))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        mean = a.sum((-1, -2)) + b.sum(-1) + c + d[:, 0] + e[:, 0] + k
        pyro.sample("x", dist.Normal(mean, 1.0))


class ManySupports(PyroModule):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.1))

    def forward(self, observed, size):
        x = self.slope * observed["x"]
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(logits=x))
            pyro.sample("a", dist.Normal(x[:, None, None].expand(-1, 2, 2), 0.5).to_event(2))
            b = pyro.sample("b", dist.LogNormal((x + k)[:, None].expand(-1, 3), 0.5).to_event(1))
            pyro.sample("c", dist.Beta(2.0 + b[:, 0], 3.0))
            pyro.sample("d", dist.Dirichlet(1.0 + x.exp()[:, None].expand(-1, 4)))
            pyro.sample("e", dist.ProjectedNormal(x[:, None].expand(-1, 3)))


def test_zero_steps_are_the_guide_itself():
    observed, guide = {"x": torch.linspace(0, 6, 9)}, ManySupports()
    refined = refine(many_supports, guide, observed, steps=0)
    assert refined.sites == ["a", "b", "c", "d"]  # a direction and a discrete site stay
    before, after = (cal.inference.posterior(many_supports, g, observed, 50) for g in (guide, refined))
    for name in ("log_p", "log_q"):
        np.testing.assert_allclose(after["sample_stats"][name], before["sample_stats"][name], rtol=0, atol=1e-6)
    for name in ("k", "a", "e"):
        np.testing.assert_allclose(after["posterior"][name], before["posterior"][name], rtol=1e-6, atol=1e-6)
    for name in ("b", "c", "d"):
        np.testing.assert_allclose(after["posterior"][name], before["posterior"][name], rtol=1e-5)


def test_every_support_climbs_and_stays_inside():
    """Latents of all supports beside a discrete one, which the objective sums out; the ELBO of every datum rises."""
    observed, guide = {"x": torch.linspace(0, 12, 16)}, ManySupports()
    refined = refine(many_supports, guide, observed, steps=80)
    stats = [cal.inference.posterior(many_supports, g, observed, 2000)["sample_stats"] for g in (guide, refined)]
    bounds = [(s["log_p"] - s["log_q"]).values[0] for s in stats]
    gain = bounds[1].mean(0) - bounds[0].mean(0)
    error = np.sqrt((bounds[0].var(0) + bounds[1].var(0)) / 2000)
    assert (gain > -limit(16) * error).all()
    assert gain.mean() > 0.3


def test_rows_are_found_by_value():
    """Order, repetition, subset and dtype don't matter; equal data share their map."""
    model = diagonal_ppca()
    x = cal.program.sample_prior(model, 12, seed=1)["x"]
    x[7] = x[3]
    refined = refine(model, Bad(), {"x": x}, steps=100)
    assert len(refined.known) == 11

    def location(rows):
        with pyro.get_param_store().scope():
            run = pyro.poutine.trace(refined).get_trace({"x": rows}, len(rows))
        fn = run.nodes["z"]["fn"]
        return fn.base_dist.base_dist.loc, fn.transforms[1].loc

    loc, shift = location(x)
    assert torch.equal(shift[7], shift[3])
    assert len(shift.unique(dim=0)) == 11
    order = torch.tensor([5, 5, 0, 11])
    assert torch.equal(location(x[order])[1], shift[order])
    assert torch.equal(location(x[order].double())[1], shift[order])
    part, whole = (cal.inference.posterior(model, refined, {"x": rows}, 4000)["posterior"]["z"] for rows in (x[8:], x))
    error = (
        abs(part.mean("draw").values - whole.isel(data=slice(8, None)).mean("draw").values) / part.std("draw").values
    )
    assert (error < limit(12) * math.sqrt(2 / 4000)).all()
    assert loc.shape == shift.shape


@pytest.mark.parametrize("change", [lambda x: x + 1e-3, lambda x: x.flip(1)])
def test_other_data_are_refused(change):
    model = diagonal_ppca()
    x = cal.program.sample_prior(model, 12, seed=1)["x"]
    refined = refine(model, Bad(), {"x": x}, steps=1)
    with pytest.raises(ProgramError, match="refined for 12 data, and the datum in row 0"):
        refined({"x": change(x)}, 12)
    with pytest.raises(ProgramError, match="refined for 12 data"):
        cal.inference.posterior(model, refined, {"x": change(x)}, 5)


def test_covariates_tell_data_apart():
    """The same x at two doses: the posterior means differ, and each is found."""

    def model(size, dose, label):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(dose * z + label, 0.5))

    def guide(observed, size, dose, label):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))

    x, dose, label = torch.ones(4), torch.tensor([0.5, 2.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 0])
    covariates = {"dose": dose, "label": label}
    refined = refine(model, guide, {"x": x}, covariates=covariates, steps=300)
    assert len(refined.known) == 3
    z = cal.inference.posterior(model, refined, {"x": x}, 4000, covariates=covariates)["posterior"]["z"].values
    precision = 1 + dose**2 / 0.25
    mean, sd = (dose * (x - label) / 0.25 / precision).numpy(), precision.rsqrt().numpy()
    np.testing.assert_allclose(z.mean((0, 1)), mean, atol=limit(8) * float(sd.max()) / math.sqrt(4000) + 0.005)
    np.testing.assert_allclose(z.std((0, 1)), sd, rtol=limit(8) / math.sqrt(8000) + 0.01)


def test_model_and_guide_are_left_alone_and_seeds_repeat():
    model, observed = diagonal_ppca().requires_grad_(True), {"x": torch.randn(5, 6)}
    guide = cal.guides.amortize(model, observed)
    before = copy.deepcopy({**model.state_dict(), **guide.state_dict()})
    first, again = (refine(model, guide, observed, steps=5, seed=3) for _ in range(2))
    after = {**model.state_dict(), **guide.state_dict()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(weight.grad is None and weight.requires_grad for weight in (*model.parameters(), *guide.parameters()))
    assert all(torch.equal(first.state_dict()[n], again.state_dict()[n]) for n in first.state_dict())
    other = refine(model, guide, observed, steps=0)
    other.load_state_dict(first.state_dict())
    bounds = [elbos(model, g, observed, seed=1) for g in (first, other, copy.deepcopy(first))]
    torch.testing.assert_close(bounds[1:], bounds[:1] * 2)


def test_float64_weights():
    model, observed = diagonal_ppca().double(), {"x": torch.randn(5, 6).double()}
    refined = refine(model, cal.guides.amortize(model, observed).double(), observed, steps=5)
    assert all(weight.dtype == torch.float64 for weight in refined.parameters())
    assert elbos(model, refined, observed).isfinite().all()


def test_shared_latents_keep_their_distribution():
    """Two levels: the local sites reach what is best given the guide of the shared one."""

    def model(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5))

    def guide(observed, size):
        pyro.sample("centre", dist.Normal(0.3, 1e-3))
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))

    x = torch.linspace(-2, 2, 5)
    refined = refine(model, guide, {"x": x}, steps=300)
    group = cal.inference.posterior(model, refined, {"x": x}, 1000)["posterior"]
    np.testing.assert_allclose(group["centre"].mean(), 0.3, atol=1e-3)
    tolerance = limit(10) * math.sqrt(0.2 / 1000)
    np.testing.assert_allclose(group["z"].mean(("chain", "draw")), 0.2 * 0.3 + 0.8 * x, atol=tolerance + 0.005)
    np.testing.assert_allclose(
        group["z"].std(("chain", "draw")), math.sqrt(0.2), rtol=limit(10) / math.sqrt(2000) + 0.01
    )


@pytest.mark.parametrize("fn", [dist.VonMises(0.0, 1.0), dist.Delta(torch.zeros(())), dist.Normal(0.0, 1.0).mask(True)])
def test_angles_points_and_masked_sites_stay(fn):
    def run(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", fn.expand([size]))
            pyro.sample("w", dist.Normal(torch.zeros(size), 1.0))

    found = pyro.poutine.trace(run).get_trace({}, 3).nodes
    assert [is_movable(found[name]) for name in ("z", "w")] == [False, True]


def test_nothing_to_refine():
    with pytest.raises(ProgramError, match="nothing to refine"):
        refine(coin, coin_guide, {"x": torch.zeros(3)})


def test_the_encoder_sees_data_that_stay_the_same_once(monkeypatch):
    model = cal.models.create("ea-vae", shape=(16,), latents=2).eval()
    observed = {"x": cal.program.sample_prior(model, 4, seed=1)["x"]}
    guide = cal.guides.amortize(model, observed, seed=0).eval()
    kind, runs = type(guide.encoder), list[int]()
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, given: runs.append(1) or forward(self, given))

    def refined(steps: int) -> tuple[Any, int]:
        before = len(runs)
        return refine(model, guide, observed, steps=steps), len(runs) - before

    _, without_steps = refined(0)
    once, with_steps = refined(5)
    assert with_steps == without_steps  # the moments of its draws, and once before the steps
    assert "forward" not in vars(guide.encoder)
    monkeypatch.setattr("calibrant.inference.refining.encoded_before", lambda *given: nullcontext())
    plain, in_every_step = refined(5)
    assert in_every_step >= without_steps + 4
    for one, other in zip(once.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
