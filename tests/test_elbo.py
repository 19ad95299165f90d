"""The ELBO and its gradients against closed forms, for hand-written guides; what training refuses."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from pyro.nn import PyroModule, PyroParam
from small_models import X, conjugate, hierarchical
from torch import Tensor, nn
from torch.distributions import Normal, constraints

import calibrant as cal
from calibrant.errors import DataError, ProgramError
from calibrant.inference import posterior, reference
from calibrant.inference.fitting.objectives import analytic_kl, elbo_terms, path_derivative
from calibrant.program import as_program, seeded
from calibrant.program.tracing import guide_trace


class Guide(PyroModule):
    """A Normal guide of one latent, with free location and scale, linear in the observation."""

    def __init__(self, slope: float = 0.5, sd: float = 0.7) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))
        self.sd = PyroParam(torch.tensor(sd), constraints.positive)

    def forward(self, observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(self.slope * observed["x"], self.sd))


@pytest.mark.parametrize("objective", [path_derivative, elbo_terms])
def test_elbo_of_the_exact_posterior_is_the_evidence_at_every_draw(objective):
    terms = objective(as_program(conjugate), Guide(0.8, math.sqrt(0.2)), X, 4, {})
    torch.testing.assert_close(
        terms.local.detach(), Normal(0.0, math.sqrt(1.25)).log_prob(X["x"]), rtol=1e-5, atol=1e-5
    )
    assert float(terms.shared) == 0


def gradient(objective, guide: PyroModule, model=conjugate) -> Tensor:
    guide.zero_grad()
    (-objective(as_program(model), guide, X, 4, {}).per_datum(4)).backward()
    return torch.stack([weight.grad for weight in guide.parameters()])


def test_path_derivative_has_no_noise_at_the_optimum_and_the_same_mean_elsewhere():
    optimum = Guide(0.8, math.sqrt(0.2))
    assert gradient(path_derivative, optimum).abs().max() < 1e-5
    assert gradient(analytic_kl, optimum).abs().max() > 1e-3
    away = Guide(0.3, 0.9)
    paths, kls = (torch.stack([gradient(o, away) for _ in range(200)]) for o in (path_derivative, analytic_kl))
    error = (paths.mean(0) - kls.mean(0)) / ((paths.var(0) + kls.var(0)) / 200).sqrt()
    assert error.abs().max() < limit(2)


class Stretch(dist.TransformModule):
    """A flow in small: z = sd·u, with a weight of its own."""

    domain = codomain = constraints.real
    bijective = True

    def __init__(self, sd: float) -> None:
        super().__init__(cache_size=0)
        self.log_sd = nn.Parameter(torch.tensor(math.log(sd)))

    def _call(self, u: Tensor) -> Tensor:
        return u * self.log_sd.exp()

    def _inverse(self, z: Tensor) -> Tensor:
        return z / self.log_sd.exp()

    def log_abs_det_jacobian(self, u: Tensor, z: Tensor) -> Tensor:
        return self.log_sd.expand(u.shape)


class FlowGuide(PyroModule):
    """The same guide as a distribution that looks its weight up whenever it is scored."""

    def __init__(self, slope: float = 0.5, sd: float = 0.7) -> None:
        super().__init__()
        self.slope, self.stretch = nn.Parameter(torch.tensor(slope / sd)), Stretch(sd)

    def forward(self, observed, size):
        with pyro.plate("data", size):
            base = dist.Normal(self.slope * observed["x"], 1.0)
            pyro.sample("z", dist.TransformedDistribution(base, [self.stretch]))


def test_flows_are_scored_with_the_weights_of_the_run():
    """A distribution that holds a module must not be scored after the weights of a functional call are gone."""
    assert gradient(path_derivative, FlowGuide(0.8, math.sqrt(0.2))).abs().max() < 1e-5
    stats = posterior(conjugate, FlowGuide(0.8, math.sqrt(0.2)), X, draws=5)["sample_stats"].dataset
    evidence = Normal(0.0, math.sqrt(1.25)).log_prob(X["x"])
    np.testing.assert_allclose((stats["log_p"] - stats["log_q"]).values[0], evidence.expand(5, 4), atol=1e-6)


def test_objectives_agree_on_the_elbo():
    guide = Guide(0.3, 0.9)
    x = X["x"]
    loc, sd = 0.3 * x, 0.9
    prior = -0.5 * (loc**2 + sd**2 - 1) + math.log(sd)  # −KL(q, prior)
    exact = float((prior + Normal(loc, 0.5).log_prob(x) - 0.5 * sd**2 / 0.25).mean())
    for objective in (path_derivative, analytic_kl, elbo_terms):
        with torch.no_grad():
            draws = torch.stack([objective(as_program(conjugate), guide, X, 4, {}).per_datum(4) for _ in range(200)])
        assert abs(float(draws.mean()) - exact) < limit(3) * float(draws.std()) / math.sqrt(200)


def test_minibatches_add_up_to_the_whole():
    """The mean over minibatches of the ELBO per datum is that of all data: local terms count N/B-fold, shared once."""

    class Point(PyroModule):
        def forward(self, observed, size):
            pyro.sample("centre", dist.Delta(torch.tensor(2.0)))
            with pyro.plate("data", size):
                pyro.sample("z", dist.Delta(observed["x"]))

    def elbo(x):
        return float(path_derivative(as_program(hierarchical), Point(), {"x": x}, len(x), {}).per_datum(4))

    whole = elbo(X["x"])
    assert math.isclose(whole, (elbo(X["x"][:2]) + elbo(X["x"][2:])) / 2, rel_tol=1e-6)
    assert math.isclose(whole, sum(elbo(x[None]) for x in X["x"]) / 4, rel_tol=1e-6)


def test_closed_form_kl_refuses_another_order_and_unknown_pairs():
    def model(size):
        with pyro.plate("data", size):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.StudentT(4.0, a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0))

    def guide(order):
        def run(observed, size):
            with pyro.plate("data", size):
                for name in order:
                    pyro.sample(name, dist.Normal(observed["x"], 1.0))

        return as_program(run)

    with pytest.raises(ProgramError, match="model's order"):
        analytic_kl(as_program(model), guide("ba"), X, 4, {})
    with pytest.raises(ProgramError, match=r"'b': no closed form.*stl"):
        analytic_kl(as_program(model), guide("ab"), X, 4, {})


@pytest.mark.parametrize("objective", ["kl", "iwae", "dreg"])
def test_draws_without_gradient_are_refused_in_training(objective):
    """A score-function gradient is not what these objectives compute: q would never be trained."""

    def model(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(k, 1.0))

    class Discrete(PyroModule):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(()))

        def forward(self, observed, size):
            with pyro.plate("data", size):
                pyro.sample("k", dist.Bernoulli(logits=self.logits))

    with pytest.raises(ProgramError, match=r"\['k'\] carry no gradient"):
        cal.inference.fit(model, Discrete(), X, validation=0.25, epochs=1, objective=objective)
    assert "k" in posterior(model, Discrete(), X, draws=2)["posterior"]


def test_grey_values_are_refused_wherever_they_are():
    """Training runs without Pyro's validation, and Bernoulli gives grey values a density that means nothing."""

    def model(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z))

    for row in (0, 57, 99):
        x = torch.zeros(100)
        x[row] = 0.5
        data = cal.data.Data({"x": x}, coords={"data": np.arange(1000, 1100)})
        with pytest.raises(DataError, match=f"'x'.*Bernoulli.*datum {row if row < 16 else 1000 + row}"):
            cal.inference.fit(model, Guide(), data, epochs=1, batch_size=10)
        for call in (lambda d: posterior(model, Guide(), d, draws=2), lambda d: reference(model, d)):
            with pytest.raises(DataError, match=f"'x'.*Bernoulli.*datum {row}"):
                call({"x": x})


def test_guide_trace_and_seed():
    with seeded(1):
        first = guide_trace(Guide(), X, 4, {}).nodes["z"]["value"]
    with seeded(1):
        assert torch.equal(first, guide_trace(Guide(), X, 4, {}).nodes["z"]["value"])
