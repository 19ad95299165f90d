"""The split of the rate into mutual information and marginal KL, where both are known, and where no estimate can be."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from linear_guides import Linear
from scipy.stats import norm

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation.statistics import critic, mutual_information
from calibrant.evaluation.statistics.critic import marginal_bound
from calibrant.evaluation.statistics.guide_densities import log_densities
from calibrant.program.contract import as_program

LINEAR = Linear.random(4, 2, 1.5)
TRUE = float(0.5 * torch.logdet(torch.eye(2) + LINEAR.loading.T @ LINEAR.loading / LINEAR.noise**2))


def conjugate(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def moved(slope, shift, spread):
    """A guide whose aggregate posterior under x ~ N(0, 1) is N(shift, slope² + spread²)."""

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(slope * observed["x"] + shift, spread))

    return guide


def standard(size, seed=0):
    return {"x": torch.randn(size, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture(scope="module")
def exact():
    return cal.evaluation.information(LINEAR.program(), LINEAR.guide(), LINEAR.data(600), points=1200, seed=2)


def test_an_exact_guide_has_the_rate_of_the_closed_form_and_no_marginal_kl(exact):
    z = limit(4)
    assert bool(exact["split_known"])
    assert abs(float(exact["rate"]) - TRUE) < z * float(exact["rate_se"])  # E KL(q ‖ p) = I where m = p
    bias = float(exact["mutual_information_high"] - exact["mutual_information_low"])
    assert 0 < bias < 0.05
    for name, truth in (("mutual_information", TRUE), ("marginal_kl", 0.0)):
        assert abs(float(exact[name]) - truth) < z * float(exact[f"{name}_se"]) + bias, name
    assert float(exact["classifier_kl"]) <= z * float(exact["classifier_kl_se"])
    assert float(exact["ceiling"]) == pytest.approx(math.log(600))


def test_the_parts_add_up_to_the_rate(exact):
    for first, second in (("", ""), ("_low", "_high"), ("_high", "_low")):
        total = exact[f"mutual_information{first}"] + exact[f"marginal_kl{second}"]
        assert float(total) == pytest.approx(float(exact["rate"]), abs=1e-9)


THREE = {"x": torch.tensor([-1.0, 0.2, 3.0])}
FOUR = {"x": torch.tensor([-1.0, 0.2, 3.0, 3.1])}


def mixture_information(guide_slope, spread, x):
    """The mutual information of an equal mixture of Normals, by quadrature."""
    grid = np.linspace(-20.0, 20.0, 40_001)
    parts = norm.pdf(grid[:, None], guide_slope * x.numpy(), spread)
    mixed = parts.mean(1)
    entropy = -(mixed * np.log(np.maximum(mixed, 1e-300))).sum() * (grid[1] - grid[0])
    return entropy - 0.5 * math.log(2 * math.pi * math.e * spread**2)


@pytest.fixture(scope="module")
def few():
    """The split of four data, of which the mixture is known, given although it is near its ceiling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mutual_information, "_MARGIN", 0.0)
        patch.setattr(mutual_information, "_APART", 10.0)
        return cal.evaluation.information(conjugate, moved(0.5, 0.0, 0.7), FOUR, points=20_000, prior_draws=1000)


def miss(found, value):
    truth = mixture_information(0.5, 0.7, FOUR["x"])
    return abs(float(value) - truth) / float(found["mutual_information_mc_se"])


def test_the_information_of_a_mixture_is_that_of_quadrature(few):
    assert miss(few, few["mutual_information"]) < limit(1)


def test_a_wrong_aggregate_posterior_is_caught(few):
    assert miss(few, few["mutual_information_high"]) > limit(1)  # without the own posterior
    assert miss(few, few["mutual_information"] + math.log(3 / 4)) > limit(1)  # divided by N - 1
    assert miss(few, few["mutual_information"] + math.log(5 / 4)) > limit(1)  # divided by N + 1


def test_a_marginal_kl_that_is_known_is_found():
    slope, shift, spread = 0.6, 0.8, 0.5
    s = math.hypot(slope, spread)
    kl = 0.5 * (s**2 + shift**2 - 1.0) - math.log(s)
    found = cal.evaluation.information(conjugate, moved(slope, shift, spread), standard(800), points=1600)
    z = limit(3)
    assert abs(float(found["marginal_kl"]) - kl) < z * float(found["marginal_kl_se"])
    information = 0.5 * math.log(1 + slope**2 / spread**2)
    assert abs(float(found["mutual_information"]) - information) < z * float(found["mutual_information_se"])
    bound, error = (float(found[name]) for name in ("classifier_kl", "classifier_kl_se"))
    assert 0.7 * kl < bound < kl + z * error


def test_twenty_latents_that_say_much_have_no_split():
    """The true information is 32.2 nats and the marginal KL is zero; a naive split is 6 and 26."""
    sd = 0.2
    noise = sd / math.sqrt(1 - sd**2)

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, noise).to_event(1))

    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal((1 - sd**2) * observed["x"], sd).to_event(1))

    data = {"x": cal.program.sample_prior(program, 500, seed=0)["x"]}
    found = cal.evaluation.information(program, guide, data, points=100)
    assert not bool(found["split_known"])
    assert np.isnan(found["mutual_information"])
    assert np.isnan(found["marginal_kl"])
    assert float(found["mutual_information_low"]) > math.log(500) - 1
    assert abs(float(found["rate"]) - 20 * math.log(5)) < limit(1) * float(found["rate_se"])
    assert float(found["mutual_information_high"]) > 20 * math.log(5) > float(found["mutual_information_low"])
    assert float(found["classifier_kl"]) <= limit(1) * float(found["classifier_kl_se"])
    assert "cannot be split" in found.attrs["sentence"]


def test_sharp_and_wide_posteriors_have_no_split_either():
    """Half of the data are at the ceiling, and the average is far below it: the marginal KL is zero, not 21 nats."""
    noise = torch.tensor([0.1, 0.99]).double()

    def program(size, kind):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(20), 1.0).to_event(1))
            sd = noise[kind.long()].to(z.dtype)[:, None]
            pyro.sample("x", dist.Normal(z, sd / (1 - sd**2).sqrt()).to_event(1))

    def guide(observed, size, kind):
        sd = noise[kind.long()].to(observed["x"].dtype)[:, None]
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal((1 - sd**2) * observed["x"], sd.expand(-1, 20)).to_event(1))

    kind = torch.arange(400.0) % 2
    data = {"x": cal.program.sample_prior(program, 400, {"kind": kind}, seed=0)["x"]}
    found = cal.evaluation.information(program, guide, data, points=200, covariates={"kind": kind}, prior_draws=1000)
    assert float(found["mutual_information_low"]) < math.log(400) - 1  # which alone would have given a split
    truth = -10 * float(noise.log().sum())
    high, error = (float(found[f"mutual_information_high{end}"]) for end in ("", "_se"))
    assert float(found["mutual_information_low"]) < truth < high + limit(1) * error
    assert not bool(found["split_known"])
    assert np.isnan(found["marginal_kl"])
    assert "cannot be split" in found.attrs["sentence"]


def test_the_bound_of_the_classifier_lies_below_a_divergence_that_is_known():
    generator = np.random.default_rng(0)
    ours, prior = 0.25 + 0.9 * generator.normal(size=(1000, 1, 10)), generator.normal(size=(10_000, 10))
    kl = 10 * (0.5 * (0.9**2 + 0.25**2 - 1.0) - math.log(0.9))
    found = marginal_bound(ours, prior, 0)
    assert 0.6 * kl < found.value < kl + limit(1) * found.se
    far = marginal_bound(ours + 3.0, prior, 0)
    assert found.value < far.value < far.ceiling  # the divergence of 60 nats is out of reach


def test_a_bound_on_the_draws_that_trained_the_classifier_is_caught(monkeypatch):
    """Draws of the prior on both sides: on other draws than those of the training the bound is at most zero."""
    draws = np.random.default_rng(0).normal(size=(60, 1, 30))
    prior = np.random.default_rng(1).normal(size=(2000, 30))
    honest = marginal_bound(draws, prior, 0)
    assert honest.value <= limit(1) * honest.se
    monkeypatch.setattr(np, "array_split", lambda values, parts: [values, values])
    monkeypatch.setattr(critic, "_two_thirds", lambda side: (side, side))
    cheating = marginal_bound(draws, prior, 0)
    assert cheating.value > limit(1) * cheating.se


def test_a_prior_that_depends_on_covariates_is_refused():
    def program(size, age):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(age, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    def guide(observed, size, age):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"], 1.0))

    age = torch.arange(6.0)
    with pytest.raises(InferenceError, match="depends on the covariates"):
        cal.evaluation.information(program, guide, standard(6), covariates={"age": age})
    found = cal.evaluation.information(program, guide, standard(6), covariates={"age": 0.0 * age}, prior_draws=1000)
    assert np.isfinite(float(found["rate"]))


def test_too_few_data_are_refused():
    with pytest.raises(InferenceError, match="give 4 data"):
        cal.evaluation.information(conjugate, moved(0.5, 0.0, 0.7), THREE)


def ordered(observed, size):
    """A guide whose second latent depends on the first one."""
    with pyro.plate("data", size):
        a = pyro.sample("a", dist.Normal(observed["x"], 0.5))
        pyro.sample("b", dist.Normal(0.7 * a, 0.4))


def apart(observed, size):
    with pyro.plate("data", size):
        pyro.sample("a", dist.Normal(observed["x"], 0.5))
        pyro.sample("b", dist.Normal(0.7 * observed["x"], 0.4))


@pytest.mark.parametrize("guide", [ordered, apart])
def test_densities_of_the_guide_at_points_are_those_of_its_sites(guide):
    observed = {"x": torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)}
    points = {name: torch.randn(5, dtype=torch.float64) for name in "ab"}
    log_q = log_densities(as_program(guide), observed, {}, points)
    parent = points["a"][:, None] if guide is ordered else observed["x"]
    first = norm.logpdf(points["a"][:, None], observed["x"], 0.5)
    second = norm.logpdf(points["b"][:, None], 0.7 * parent, 0.4)
    np.testing.assert_allclose(log_q(observed, {}, points), first + second)
    assert log_q.__name__ == ("of_pairs" if guide is ordered else "of_distributions")
