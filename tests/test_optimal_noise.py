"""The optimal noise scale: of a minibatch in training, of the whole training set in all that is reported."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from pyro.nn import PyroModule
from torch import nn

import calibrant as cal
from calibrant.errors import ProgramError
from calibrant.inference.fitting import state
from calibrant.models.parts.likelihoods.gaussian import Gaussian
from calibrant.models.parts.likelihoods.gaussian_optimal import GaussianOptimal
from calibrant.program.environment import seeded
from calibrant.program.tracing import guide_trace

SHAPE = (1, 4, 4)


def images(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    loading = torch.randn(3, 16, generator=torch.Generator().manual_seed(99))
    z = torch.randn(count, 3, generator=draw)
    return (z @ loading + 0.5 * torch.randn(count, 16, generator=draw)).reshape(count, *SHAPE)


def vae(seed=0):
    with seeded(seed):
        return cal.models.create("vae", shape=SHAPE, latents=3, likelihood="gaussian-optimal")


def trained(count=400, **options):
    model, x = vae(), images(count)
    with seeded(0):
        guide = cal.guides.amortize(model, {"x": x})
    found = cal.inference.fit(model, guide, {"x": x}, **{"epochs": 4, "batch_size": 40, "compile": False} | options)
    return model, guide, x, found


def test_at_the_optimum_a_minibatch_has_the_loss_and_gradient_of_a_shared_scale():
    torch.manual_seed(0)
    x, start = (torch.randn(20, *SHAPE, dtype=torch.float64) for _ in range(2))
    losses, slopes = [], []
    for likelihood in (GaussianOptimal().double().train(), Gaussian(1.0).double()):
        mean = start.clone().requires_grad_()
        if isinstance(likelihood, Gaussian):
            likelihood.log_scale.data = (x - start).square().mean().sqrt().log()
        loss = -likelihood(mean).log_prob(x).mean()
        loss.backward()
        losses.append(loss.detach())
        slopes.append(mean.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-6, atol=1e-9)
    assert likelihood.log_scale.grad.abs() < 1e-9


def rmse(model, guide, x, draws=64):
    """Root mean squared error over the guide's draws, and the standard error of that of one draw per datum."""
    with torch.no_grad(), seeded(5):
        errors = []
        for _ in range(draws):
            z = guide_trace(guide, {"x": x}, len(x), {}).nodes["z"]["value"]
            errors.append((x - model.decoder(z)).square().mean())
    squares = torch.stack(errors)
    return float(squares.mean().sqrt()), float(squares.std() / (2 * squares.mean().sqrt()))


def test_after_fit_the_scale_is_the_error_of_the_training_set():
    model, guide, x, _ = trained(validation=cal.data.Data({"x": images(40, 1)}))
    expected, error = rmse(model, guide, x)
    bound = limit(1) * error * (1 + 1 / 64) ** 0.5
    assert abs(float(model.likelihood.scale) - expected) < bound
    few, _ = rmse(model, guide, x[:8])
    assert abs(few - expected) > bound, "the test would not see the scale of a minibatch of few data"


def test_the_reported_elbo_is_that_of_the_scale_of_the_whole_training_set():
    held = images(2000, 1)
    model, guide, _, found = trained(validation=cal.data.Data({"x": held}))
    sigma, total = float(model.likelihood.scale), []
    with torch.no_grad(), seeded(7):
        for _ in range(16):
            site = guide_trace(guide, {"x": held}, len(held), {}).nodes["z"]
            z, q = site["value"], site["fn"]
            p = dist.Normal(model.decoder(z), sigma).to_event(3).log_prob(held)
            total.append(p + dist.Normal(0, 1).expand([3]).to_event(1).log_prob(z) - q.log_prob(z))
    terms = torch.stack(total)
    error = float((terms.var(0).mean() / terms.numel()) ** 0.5)
    assert abs(float(terms.mean()) - found.elbo) < limit(1) * error * 2**0.5
    assert not model.likelihood.training


def test_a_recorded_step_computes_the_scale_of_each_minibatch(monkeypatch, recwarn):
    monkeypatch.setattr(state, "RECORDED_FROM", 20)
    plain, graph = (trained(epochs=3, compile=how) for how in (False, "auto"))
    assert not recwarn.list
    assert [row["train"] for row in graph[3].history] == pytest.approx([row["train"] for row in plain[3].history])
    torch.testing.assert_close(plain[0].likelihood.scale, graph[0].likelihood.scale, rtol=1e-4, atol=1e-5)


def test_an_interrupted_training_goes_on_with_the_same_numbers(tmp_path):
    whole = trained(run_dir=tmp_path / "whole")

    def stop(stage, done, total, text):
        if done == 2:
            raise KeyboardInterrupt

    first = trained(run_dir=tmp_path / "parts", progress=stop)
    assert first[3].stopped == "interrupted"
    again = trained(run_dir=tmp_path / "parts", resume=True)
    assert (again[3].history, again[3].elbo) == (whole[3].history, whole[3].elbo)
    assert torch.equal(again[0].likelihood.scale, whole[0].likelihood.scale)


def test_it_starts_at_the_data_s_spread_once():
    model, guide, x, _ = trained(epochs=0)
    torch.testing.assert_close(
        model.likelihood.scale, (x[: len(x)] - x.mean(0)).square().mean().sqrt(), rtol=0.05, atol=0
    )
    model.likelihood.settle_noise(torch.tensor([4.0]))
    cal.inference.fit(model, guide, {"x": x}, epochs=0)
    assert float(model.likelihood.scale) == 2.0


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_objectives_that_weight_draws_are_refused_and_the_remedies_work(objective):
    with pytest.raises(ProgramError, match=f"'likelihood'.*'{objective}'.*objective='stl' or 'kl'.*'gaussian'"):
        trained(objective=objective)
    for remedy in ("stl", "kl"):
        trained(objective=remedy, epochs=1)


class Mixed(PyroModule):
    """A discrete latent, which is summed out."""

    def __init__(self, masked=False):
        super().__init__()
        self.masked = masked
        self.shift = nn.Parameter(torch.zeros(2, 4))
        self.noise = cal.models.make_likelihood("gaussian-optimal")

    def forward(self, size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Categorical(torch.ones(2))) if not self.masked else torch.zeros(size).long()
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            fn = self.noise(self.shift[k] + z[:, None])
            return pyro.sample("x", fn.mask(torch.ones(size).bool()) if self.masked else fn)


@pytest.mark.parametrize(("masked", "words"), [(False, r"\['k'\] are summed out"), (True, "'x', but some are masked")])
def test_what_has_no_error_of_a_minibatch_is_refused(masked, words):
    model, x = Mixed(masked), torch.randn(40, 4)
    with pytest.raises(ProgramError, match=f"'noise'.*{words}"):
        cal.inference.fit(model, cal.guides.amortize(model, {"x": x}), {"x": x}, epochs=1)


class Two(PyroModule):
    def __init__(self):
        super().__init__()
        self.noise = cal.models.make_likelihood("gaussian-optimal")

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
            for name in "xy":
                pyro.sample(name, self.noise(z))


def test_a_scale_of_two_sites_is_refused():
    model, data = Two(), {"x": torch.randn(40, 4), "y": torch.randn(40, 4)}
    with pytest.raises(ProgramError, match=r"'noise'.*one observed site.*\['x', 'y'\].*'gaussian'"):
        cal.inference.fit(model, cal.guides.amortize(model, data), data, epochs=1)


def test_in_train_mode_it_is_refused_and_the_remedy_works():
    model, x = vae(), images(30)
    assert not model.likelihood.training, "a new model is used before any training"
    cal.program.check_program(model, {"x": x})
    with pytest.raises(ProgramError, match=r"\['likelihood'\] are in training mode.*call \.eval\(\) first"):
        cal.program.check_program(model.train(), {"x": x})
    cal.program.check_program(model.eval(), {"x": x})
