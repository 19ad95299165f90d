"""Objectives of several draws, and discrete latents that are summed out, against closed forms and quadrature."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

import calibrant as cal
from calibrant.errors import InferenceError, ProgramError
from calibrant.inference.fitting import objectives
from calibrant.inference.fitting.objectives import (
    OBJECTIVES,
    doubly_reparameterized,
    elbo_terms,
    importance_weighted,
    path_derivative,
)
from calibrant.program import as_program

X = 1.3
PARTICLES = 2


@pytest.fixture(autouse=True)
def float64():
    """Comparisons with closed forms are in float64 throughout."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


class Model(PyroModule):
    """z ~ N(centre, 1), x ~ N(z, 0.5)."""

    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(double(0.2)[0])

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(self.centre, double(1.0)[0]))
            pyro.sample("x", dist.Normal(z, 0.5))


class Guide(PyroModule):
    """q(z) = N(loc, exp(log_sd)), off the posterior N(1.08, 0.447)."""

    def __init__(self):
        super().__init__()
        self.loc, self.log_sd = nn.Parameter(double(0.6)[0]), nn.Parameter(double(-0.2)[0])

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(self.loc, self.log_sd.exp()))


def truth() -> tuple[Tensor, Tensor]:
    """The bound of two draws and its gradient (centre, loc, log sd), by quadrature over both draws' noise."""
    node, weight = (torch.as_tensor(part) for part in np.polynomial.hermite_e.hermegauss(80))
    weight = weight / weight.sum()
    centre, loc, log_sd = (double(value)[0].requires_grad_() for value in (0.2, 0.6, -0.2))
    z = loc + log_sd.exp() * node
    log_w = Normal(centre, 1.0).log_prob(z) + Normal(z, 0.5).log_prob(double(X))
    log_w = log_w - Normal(loc, log_sd.exp()).log_prob(z)
    pairs = torch.stack(torch.broadcast_tensors(log_w[:, None], log_w[None]))
    bound = (weight[:, None] * weight * (pairs.logsumexp(0) - math.log(2))).sum()
    return bound.detach(), torch.stack(torch.autograd.grad(bound, (centre, loc, log_sd)))


def evidence() -> float:
    return float(Normal(0.2, math.sqrt(1.25)).log_prob(torch.tensor(X)))


def sample(objective, calls: int = 300, rows: int = 200) -> tuple[Tensor, Tensor]:
    """Bounds `(calls,)` and gradients `(calls, 3)`, each a mean over rows."""
    model, guide = Model(), Guide()
    weights = (model.centre, guide.loc, guide.log_sd)
    observed = {"x": torch.full((rows,), X, dtype=torch.float64)}
    bounds, gradients = [], []
    for _ in range(calls):
        bound = objective(model, guide, observed, rows, {}, particles=PARTICLES).maximised(rows)
        bounds.append(bound.detach())
        gradients.append(torch.stack(torch.autograd.grad(bound, weights)))
    return torch.stack(bounds), torch.stack(gradients)


def scores(draws: Tensor, true: Tensor) -> Tensor:
    return (draws.mean(0) - true) / (draws.std(0) / math.sqrt(len(draws)))


@pytest.mark.parametrize("objective", [importance_weighted, doubly_reparameterized])
def test_bound_and_gradients_are_those_of_quadrature(objective):
    """Four statistics from 60,000 pairs of draws: an error of 2% of the bound's gap is seen with 95% power."""
    bound, gradient = truth()
    bounds, gradients = sample(objective)
    assert scores(bounds, bound).abs() < limit(4)
    assert scores(gradients, gradient).abs().max() < limit(4)


def test_planted_defects_of_the_bounds_are_seen(monkeypatch):
    bound, gradient = truth()
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "log", lambda count: 0.0)
        for objective in (importance_weighted, doubly_reparameterized):
            bounds, _ = sample(objective, calls=100)
            assert scores(bounds, bound) > limit(4)  # without log K
            assert float(bounds.mean()) > evidence()
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "_frozen", lambda guide: guide)
        assert scores(sample(doubly_reparameterized)[1], gradient)[1:].abs().max() > limit(4)  # the score left in
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "_weighted", lambda shares, gradient: gradient)
        found = scores(sample(doubly_reparameterized)[1], gradient)
        assert found[1:].abs().max() > limit(4)  # weights not squared
        assert found[0].abs() < limit(4)  # which is right for the model


def test_bounds_are_ordered():
    model, guide, observed = Model(), Guide(), {"x": torch.full((20_000,), X, dtype=torch.float64)}
    for objective in (importance_weighted, doubly_reparameterized):
        means = []
        for particles in (1, 4, 16):
            terms = objective(model, guide, observed, 20_000, {}, particles=particles)
            assert (terms.bound >= terms.local - 1e-12).all()
            means.append(float(terms.bound.detach().mean()))
            se = float(terms.bound.detach().std()) / math.sqrt(20_000)
            assert means[-1] < evidence() + limit(3) * se
        assert means == sorted(means)
        assert evidence() - means[-1] < 0.1 * (evidence() - means[0])


def test_draws_made_from_other_draws_are_weighted_once():
    """A chain a → b in the guide: DReG's mean gradient is that of the plain bound."""

    def model(size):
        with pyro.plate("data", size):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 0.5))

    class Chain(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc, self.slope = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.5))

        def forward(self, observed, size):
            with pyro.plate("data", size):
                a = pyro.sample("a", dist.Normal(self.loc, 0.8))
                pyro.sample("b", dist.Normal(self.slope * a + 0.5, 0.6))

    guide, observed = Chain(), {"x": torch.full((500,), X)}
    found = []
    for objective in (importance_weighted, doubly_reparameterized):
        gradients = []
        for _ in range(300):
            bound = objective(as_program(model), guide, observed, 500, {}, particles=3).maximised(500)
            gradients.append(torch.stack(torch.autograd.grad(bound, tuple(guide.parameters()))))
        found.append(torch.stack(gradients).double())
    difference = found[0].mean(0) - found[1].mean(0)
    error = ((found[0].var(0) + found[1].var(0)) / 300).sqrt()
    assert (difference / error).abs().max() < limit(2)
    assert float(found[1].var(0).sum()) < float(found[0].var(0).sum())


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_shared_latents_are_refused(objective):
    def model(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(observed, size):
        pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"], 1.0))

    with pytest.raises(ProgramError, match=r"\['centre'\] are shared.*stl"):
        OBJECTIVES[objective](as_program(model), as_program(guide), {"x": torch.zeros(3)}, 3, {}, particles=2)


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_training_reports_the_elbo_and_chooses_by_the_bound(objective):
    x = {"x": (0.2 + math.sqrt(1.25) * torch.randn(400)).double()}

    def trained(epochs):
        pyro.set_rng_seed(0)
        model, guide = Model(), Guide()
        fit = cal.inference.fit(
            model, guide, x, epochs=epochs, batch_size=100, lr=0.05, objective=objective, particles=4
        )
        return model, guide, fit

    model, guide, fit = trained(10)
    for row in fit.history:
        assert row["bound"] > row["validation"]
    assert max(fit.history, key=lambda row: row["bound"])["validation"] == pytest.approx(fit.elbo, abs=0.2)
    with pytest.raises(InferenceError, match="particles=0"):
        cal.inference.fit(model, guide, x, objective=objective, particles=0)


# -- discrete latents --------------------------------------------------------------------------------------------------

WEIGHTS, CENTRES = double(0.5, 0.3, 0.2), double(-2.0, 0.0, 3.0)


def mixture(size):
    """k ~ Categorical, z ~ N(centre_k, 1), x ~ N(z, 0.5)."""
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Categorical(WEIGHTS))
        z = pyro.sample("z", dist.Normal(CENTRES[k], 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))


class MixtureGuide(PyroModule):
    """The exact posterior of `mixture`, moved by parameters that are zero there."""

    def __init__(self):
        super().__init__()
        self.tilt, self.shift = nn.Parameter(double(0.0, 0.0, 0.0)), nn.Parameter(double(0.0)[0])

    def forward(self, observed, size):
        x = observed["x"].double()
        logits = WEIGHTS.log() + Normal(CENTRES, math.sqrt(1.25)).log_prob(x[:, None])
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Categorical(logits=logits + self.tilt))
            pyro.sample("z", dist.Normal(0.8 * x + 0.2 * CENTRES[k] + self.shift, math.sqrt(0.2)))


def mixture_evidence(x: Tensor) -> Tensor:
    return (WEIGHTS.log() + Normal(CENTRES, math.sqrt(1.25)).log_prob(x.double()[:, None])).logsumexp(1)


@pytest.mark.parametrize("objective", [path_derivative, elbo_terms])
def test_summed_out_elbo_has_no_noise_at_the_exact_posterior(objective):
    x, guide = torch.linspace(-3, 4, 7).double(), MixtureGuide()
    terms = objective(as_program(mixture), guide, {"x": x}, 7, {})
    torch.testing.assert_close(terms.local.detach(), mixture_evidence(x), rtol=1e-10, atol=1e-10)
    if objective is path_derivative:
        gradients = torch.autograd.grad(terms.local.sum(), tuple(guide.parameters()))
        assert all(gradient.abs().max() < 1e-8 for gradient in gradients)


def closed_elbo(guide: MixtureGuide, x: Tensor) -> Tensor:
    """Σ_k q(k) (…) of `MixtureGuide`, in closed form; all Normal."""
    q = Categorical(logits=WEIGHTS.log() + Normal(CENTRES, math.sqrt(1.25)).log_prob(x[:, None]) + guide.tilt).logits
    loc, variance = 0.8 * x[:, None] + 0.2 * CENTRES + guide.shift, 0.2
    prior = Normal(CENTRES, 1.0).log_prob(loc) - 0.5 * variance
    likelihood = Normal(loc, 0.5).log_prob(x[:, None]) - 0.5 * variance / 0.25
    entropy = 0.5 * math.log(2 * math.pi * math.e * variance)
    return (q.exp() * (WEIGHTS.log() + prior + likelihood + entropy - q)).sum(1)


def test_gradients_away_from_the_optimum_are_those_of_the_closed_form():
    x, guide = torch.linspace(-3, 4, 7).double(), MixtureGuide()
    with torch.no_grad():
        guide.tilt.copy_(double(0.5, -0.3, 0.1))
        guide.shift.fill_(0.3)
    weights = tuple(guide.parameters())
    wanted = torch.cat([g.reshape(-1) for g in torch.autograd.grad(closed_elbo(guide, x).mean(), weights)])
    rows, found, values = {"x": x.repeat(100)}, [], []
    for _ in range(100):
        terms = path_derivative(as_program(mixture), guide, rows, 700, {})
        gradient = torch.autograd.grad(terms.local.mean(), weights)
        found.append(torch.cat([g.reshape(-1) for g in gradient]))
        values.append(terms.local.mean().detach())
    assert scores(torch.stack(values), closed_elbo(guide, x).mean().detach()).abs() < limit(5)
    assert scores(torch.stack(found), wanted).abs().max() < limit(5)


def test_a_lost_weight_is_seen(monkeypatch):
    """Planted: every combination counts the same, away from the optimum (at it, all have the same terms)."""
    x, guide = torch.linspace(-3, 4, 7), MixtureGuide()
    with torch.no_grad():
        guide.tilt.copy_(double(0.5, -0.3, 0.1))
    monkeypatch.setattr(objectives._Drawn, "mean", lambda self, terms: terms.reshape(self.weights.shape).mean(1))
    terms = path_derivative(as_program(mixture), guide, {"x": x}, 7, {})
    assert (terms.local - closed_elbo(guide, x)).abs().max() > 0.1


class Before(PyroModule):
    """z is drawn before k: q(z) q(k|z), the exact conditional of k."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(double(0.7)[0])

    def forward(self, observed, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(self.loc, double(0.6)[0]))
            logits = WEIGHTS.log() + Normal(CENTRES, 1.0).log_prob(z[:, None])
            pyro.sample("k", dist.Categorical(logits=logits))


def test_what_is_drawn_before_a_discrete_latent_is_shared_by_its_values():
    """Then the sum over k is the ELBO of the model without k, at every draw; gradients follow z through q(k)."""

    def marginal(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(CENTRES, 1.0)))
            pyro.sample("x", dist.Normal(z, 0.5))

    class Alone(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(double(0.7)[0])

        def forward(self, observed, size):
            with pyro.plate("data", size):
                pyro.sample("z", dist.Normal(self.loc, double(0.6)[0]))

    found, observed = [], {"x": torch.linspace(-1, 2, 5).double()}
    for model, guide in ((mixture, Before()), (marginal, Alone())):
        pyro.set_rng_seed(3)
        terms = path_derivative(as_program(model), guide, observed, 5, {})
        found.append((terms.local.detach(), torch.autograd.grad(terms.local.sum(), guide.loc)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-8)


def switches(size):
    """Three switches: x is their sum with noise; beside a shared latent."""
    gain = pyro.sample("gain", dist.LogNormal(0.0, 0.1))
    with pyro.plate("data", size):
        on = pyro.sample("on", dist.Bernoulli(0.3).expand([3]).to_event(1))
        pyro.sample("x", dist.Normal(gain * (on * double(1.0, 2.0, 4.0)).sum(-1), 0.5))


def switch_guide(observed, size):
    pyro.sample("gain", dist.LogNormal(0.1, 0.05))
    with pyro.plate("data", size):
        probs = (0.2 + 0.1 * observed["x"].abs()[:, None]).clamp_max(0.9).expand(-1, 3)
        pyro.sample("on", dist.Bernoulli(probs).to_event(1))


def test_vectors_of_switches_and_shared_latents(monkeypatch):
    """All data share one draw of the gain, given which the ELBO is a sum over eight combinations."""
    x = torch.linspace(0, 5, 6).double()
    pyro.set_rng_seed(1)
    terms = path_derivative(as_program(switches), as_program(switch_guide), {"x": x}, 6, {})
    pyro.set_rng_seed(1)
    gain = dist.LogNormal(0.1, 0.05).sample()
    on = torch.cartesian_prod(*[double(0.0, 1.0)] * 3)
    q = dist.Bernoulli((0.2 + 0.1 * x[:, None, None]).clamp_max(0.9)).log_prob(on).sum(-1)
    p = dist.Bernoulli(0.3).log_prob(on).sum(-1) + Normal(gain * (on * double(1.0, 2.0, 4.0)).sum(-1), 0.5).log_prob(
        x[:, None]
    )
    torch.testing.assert_close(terms.local.double(), (q.exp() * (p - q)).sum(1), rtol=1e-5, atol=1e-5)
    wanted = dist.LogNormal(0.0, 0.1).log_prob(gain) - dist.LogNormal(0.1, 0.05).log_prob(gain)
    torch.testing.assert_close(terms.shared, wanted)
    monkeypatch.setattr(objectives, "ROWS", 16)  # two data at a time
    assert elbo_terms(as_program(switches), as_program(switch_guide), {"x": x}, 6, {}).local.shape == (6,)


def test_covariates_are_repeated_with_the_data():
    def model(size, dose):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k * dose, 1.0))

    def guide(observed, size, dose):
        with pyro.plate("data", size):
            pyro.sample("k", dist.Bernoulli(logits=dose * (observed["x"] - dose / 2)))

    x, dose = torch.linspace(-1, 3, 5).double(), torch.arange(5.0).double()
    terms = path_derivative(as_program(model), as_program(guide), {"x": x}, 5, {"dose": dose})
    exact = torch.stack([Normal(0.0, 1.0).log_prob(x), Normal(dose, 1.0).log_prob(x)]).logsumexp(0) - math.log(2)
    torch.testing.assert_close(terms.local, exact)


def counts(size):
    with pyro.plate("data", size):
        n = pyro.sample("n", dist.Poisson(3.0))
        pyro.sample("x", dist.Normal(n, 0.5))


def many(size):
    with pyro.plate("data", size):
        on = pyro.sample("on", dist.Bernoulli(0.3).expand([12]).to_event(1))
        pyro.sample("x", dist.Normal(on.sum(-1), 0.5))


@pytest.mark.parametrize(
    ("model", "draws", "match"),
    [
        (counts, lambda: dist.Poisson(2.0), r"'n' has infinitely many values.*a Categorical prior"),
        (many, lambda: dist.Bernoulli(0.4).expand([12]).to_event(1), r"'on' has 2\^12 values per datum; at most 1024"),
    ],
)
def test_what_can_not_be_summed_out_is_refused_in_training_and_drawn_in_evaluation(model, draws, match):
    name = match.split("'")[1]

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample(name, draws())

    observed = {"x": torch.linspace(0, 4, 5)}
    with pytest.raises(InferenceError, match=match):
        path_derivative(as_program(model), as_program(guide), observed, 5, {})
    assert elbo_terms(as_program(model), as_program(guide), observed, 5, {}).local.isfinite().all()


class Learned(PyroModule):
    """Of the family of the posterior of `mixture`, to be trained."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 3))
        self.loc, self.raw = nn.Linear(4, 1), nn.Parameter(torch.zeros(()))

    def forward(self, observed, size):
        x = observed["x"].to(self.raw.dtype)[:, None]
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Categorical(logits=self.logits(x)))
            seen = torch.cat([x, nn.functional.one_hot(k, 3).to(x.dtype)], -1)
            pyro.sample("z", dist.Normal(self.loc(seen)[:, 0], self.raw.exp()))


@pytest.mark.parametrize(
    ("size", "options", "error"),
    [
        pytest.param(2000, {"epochs": 12, "batch_size": 64, "lr": 2e-2}, 0.03, id="short"),
        pytest.param(6000, {"epochs": 30, "batch_size": 128, "lr": 1e-2}, 0.01, id="long", marks=pytest.mark.truth),
    ],
)
def test_a_trained_mixture_reaches_the_evidence(size, options, error):
    """The guide contains the posterior; the error, in nats, is five standard errors or more."""
    train, test = (cal.program.sample_prior(mixture, n, seed=n)["x"].float() for n in (size, 2001))
    guide = Learned()
    cal.inference.fit(mixture, guide, {"x": train}, **options)
    terms = elbo_terms(as_program(mixture), guide, {"x": test}, 2001, {})
    gap = mixture_evidence(test) - terms.local.double()
    se = float(gap.std()) / math.sqrt(2001)
    assert se < error / 5
    assert -limit(1) * se < float(gap.mean()) < error
