"""Rate, distortion and the importance-weighted bound of linear-Gaussian programs, where all are known."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from linear_guides import Linear
from small_models import hierarchical

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.inference import scoring

LINEAR = Linear.random(5, 2, 0.5)
WRONG = {"shift": 0.3, "widen": 1.2}
X = LINEAR.data(40)
TRUE, OFF = LINEAR.terms(X["x"]), LINEAR.terms(X["x"], **WRONG)


def scores(found, name, truth):
    """How far estimates per datum lie from the truth, in standard errors; exact ones count as they are rounded."""
    error = found[name].values - truth.numpy()
    return np.where(np.abs(error) < 1e-9, 0.0, error / found[f"{name}_se"].values)


@pytest.fixture(scope="module", params=[{}, WRONG], ids=["exact guide", "wrong guide"])
def split(request):
    found = cal.evaluation.rate_distortion(LINEAR.program(), LINEAR.guide(**request.param), X, draws=400)
    return found, (OFF if request.param else TRUE)


def test_rate_and_distortion_are_those_of_the_closed_form(split):
    found, truth = split
    elbo = truth["log_evidence"] - truth["gap"]
    for name, value in {"rate": truth["rate"], "distortion": truth["distortion"], "elbo": elbo}.items():
        assert np.abs(scores(found, name, value)).max() < limit(3 * 40), name
        average = float(found[f"average_{name}"])
        assert abs(average - float(value.mean())) < limit(3) * float(found[f"average_{name}_mc_se"]) + 1e-9
        assert float(found[f"average_{name}_se"]) == pytest.approx(float(found[name].std(ddof=1)) / 40**0.5)
    np.testing.assert_allclose(found["elbo"], -(found["distortion"] + found["rate"]))


def test_the_sum_over_pixels_or_latents_taken_as_a_mean_is_caught(split):
    found, truth = split
    for name, entries in (("distortion", 5), ("rate", 2)):
        assert np.abs(scores(found / entries, name, truth[name])).max() > limit(3 * 40)


def test_the_rate_without_a_closed_form_agrees_with_it(monkeypatch):
    closed = cal.evaluation.rate_distortion(LINEAR.program(), Ordinary.guide, X, draws=200)
    monkeypatch.setattr(scoring, "_closed_form", lambda site, prior: None)
    drawn = cal.evaluation.rate_distortion(LINEAR.program(), Ordinary.guide, X, draws=200)
    assert float(closed["rate_se"].max()) < 1e-9 < float(drawn["rate_se"].min())
    assert np.abs(scores(drawn, "rate", torch.from_numpy(closed["rate"].values))).max() < limit(40)


class Ordinary:
    """Independent Normals, whose divergence from the prior torch knows."""

    @staticmethod
    def guide(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(0.1 * observed["x"][:, :2], 0.5).to_event(1))


def test_the_importance_weighted_bound_rises_to_the_evidence():
    found = {k: bound(k, repeats=100) for k in (1, 10, 200)}
    means = [float(result["average_bound"]) for result in found.values()]
    assert means == sorted(means)
    gaps = {k: float(result["average_bound"]) - float(TRUE["log_evidence"].mean()) for k, result in found.items()}
    errors = {k: limit(3) * float(result["average_bound_mc_se"]) for k, result in found.items()}
    assert abs(gaps[1] + float(OFF["gap"].mean())) < errors[1]
    assert gaps[10] < -errors[10]
    bias = -excess(**WRONG) / (2 * 200)  # to first order in the variance of the mean weight
    assert abs(gaps[200] - bias) < errors[200] + 0.2 * abs(bias)
    assert abs(gaps[1]) > errors[1]  # what a bound without its draws would show


def excess(shift, widen):
    """The variance of the weights p/q, relative to their mean, in closed form."""
    distance = shift**2 * torch.linalg.inv(LINEAR.covariance).sum()
    rest = 2 * widen**2 - 1
    return float((widen**2 / rest**0.5) ** 2 * (distance / rest).exp()) - 1


def bound(particles, repeats, wrong=WRONG):
    return cal.inference.iwae_bound(LINEAR.program(), LINEAR.guide(**wrong), X, particles, repeats=repeats, seed=3)


def test_one_particle_is_the_elbo_and_an_exact_guide_has_the_evidence():
    one = bound(1, 50)
    np.testing.assert_allclose(one["bound"], one["elbo"])
    exact = bound(4, 50, {})
    np.testing.assert_allclose(exact["bound"], TRUE["log_evidence"], atol=1e-4)
    assert (exact["ess"] > 0.999 * 200).all()
    assert np.isnan(bound(4, 5)["pareto_k"]).all()  # of 20 weights there is none


def test_a_seed_gives_the_same_and_another_seed_other_numbers():
    first, again, other = (
        cal.evaluation.rate_distortion(LINEAR.program(), LINEAR.guide(), X, draws=3, seed=seed) for seed in (1, 1, 2)
    )
    assert first.identical(again)
    assert not np.array_equal(first["distortion"], other["distortion"])


@pytest.mark.parametrize("function", [cal.evaluation.rate_distortion, cal.inference.iwae_bound])
def test_shared_latents_are_refused_by_name(function):
    def guide(observed, size):
        pyro.sample("centre", dist.Normal(3.0, 0.5))
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"], 1.0))

    with pytest.raises(InferenceError, match=r"\['centre'\] are shared.*fix these latents"):
        function(hierarchical, guide, {"x": torch.zeros(4)})


def test_too_few_draws_are_refused():
    with pytest.raises(InferenceError, match="two draws"):
        cal.evaluation.rate_distortion(LINEAR.program(), LINEAR.guide(), X, draws=1)
    with pytest.raises(InferenceError, match="two repeats"):
        bound(4, 1)
