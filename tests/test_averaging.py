"""Averaging the error over the entries of an observation: impossible here, and named in wrapped models."""

import pyro.distributions as dist
import pytest
import torch
from averaged_errors import LATENTS, PIXELS, REDUCTIONS, digits, train, wrapped
from cases import parameters
from torch import nn
from torch.distributions import kl_divergence

import calibrant as cal
from calibrant.evaluation.judgements.on_averaging import averaged_error
from calibrant.evaluation.statistics.powers import powers_of
from calibrant.inference.fitting.objectives import OBJECTIVES
from calibrant.inference.problem import Problem
from calibrant.models.parts.likelihoods.protocol import Likelihood
from calibrant.program.environment import seeded
from calibrant.program.tracing import guide_trace

WORDS = {
    "mse.mean() + kl.sum(1).mean()": ("the squared error was averaged", (PIXELS / 2) ** 0.5),
    "(mse / 2).mean() + kl.sum(1).mean()": ("half the squared error was averaged", PIXELS**0.5),
    "mse.mean() + kl.mean()": ("the squared error and the KL divergence were averaged", (PIXELS / 2 / LATENTS) ** 0.5),
}


@pytest.fixture(scope="module")
def averaged():
    """Reduction → decoder and encoder that were trained with it."""
    return {name: train(REDUCTIONS[name]) for name in WORDS}


@pytest.fixture(scope="module")
def correct():
    """Decoder and encoder that were trained with sums, for a noise of sd 3."""
    return train(lambda error, kl: error.sum(1).mean() / 18 + kl.sum(1).mean())


def named(model, guide):
    return averaged_error(powers_of(Problem.of(model, guide, {"x": digits()[:64]})))


@pytest.mark.parametrize("reduction", WORDS)
@pytest.mark.parametrize("scale", [0.5**0.5, 1.0, 0.1])
def test_it_is_named_under_every_scale_with_the_scale_that_was_trained(averaged, reduction, scale):
    words, remedy = WORDS[reduction]
    found = named(*wrapped(*averaged[reduction], scale))
    assert found is not None
    assert words in found.sentence
    assert f"Gaussian with scale {remedy:.4g}" in found.sentence
    assert not found.primary
    stated = float(found.sentence.rpartition("scale ")[2])
    assert named(*wrapped(*averaged[reduction], stated)) is None, "the remedy"


class Changed(nn.Module):
    """An encoder whose sds are multiplied by a factor."""

    def __init__(self, encoder, factor):
        super().__init__()
        self.encoder, self.factor = encoder, factor

    def forward(self, x):
        mean, sd = self.encoder(x)
        return mean, self.factor * sd


class Prior(nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), LATENTS), torch.ones(len(x), LATENTS)


@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0, 1.4, 2.0, 3.0, 4.0, 8.0])
def test_guides_that_are_right_or_merely_too_wide_or_narrow_are_not_named_so(correct, factor):
    decoder, encoder = correct
    assert named(*wrapped(decoder, Changed(encoder, factor), 3.0)) is None


def test_the_prior_and_another_weight_of_the_divergence_are_not_named_so(correct):
    decoder, encoder = correct
    assert named(*wrapped(decoder, Prior(), 3.0)) is None
    assert named(*wrapped(decoder, encoder, 1.0)) is None  # β of 9


def test_the_check_fails_and_names_it(averaged):
    model, guide = wrapped(*averaged["mse.mean() + kl.sum(1).mean()"], 1.0)
    found = cal.evaluation.check(model, guide, {"x": digits()[:40]}, draws=500, simulations=100)
    assert found.conclusion.status == "fail"
    sentence = "averaged over the 64 entries of an observation: train with sums over entries"
    assert sentence in str(found.conclusion)
    assert sentence in found.summary()


@pytest.mark.slow
def test_with_the_remedy_the_reference_agrees(averaged):
    model, guide = wrapped(*averaged["mse.mean() + kl.sum(1).mean()"], 32**0.5)
    found = cal.evaluation.check(model, guide, {"x": digits()[:128]}, draws=500, simulations=200)
    assert {v.status for v in found.verdicts if v.quantity in ("sd", "mean", "coverage", "shape")} == {"pass"}
    assert "averaged" not in found.summary()


# -- here, it is impossible --------------------------------------------------------------------------------------------

CARDS = parameters(
    [(card.name, case, (card.name, case)) for card in cal.models.list_likelihoods() for case in card.cases]
)


@pytest.mark.parametrize("objective", ["stl", "kl"])
@pytest.mark.parametrize("named", CARDS)
def test_entries_are_summed_and_data_averaged(named, objective):
    name, case = named
    model = cal.models.create("vae", shape=case.observed["x"], latents=2, likelihood={"name": name, **case.arguments})
    with torch.no_grad():
        x = model.likelihood(model.decoder(torch.randn(6, 2))).sample()
    guide = cal.guides.amortize(model, {"x": x})
    with seeded(0):
        found = OBJECTIVES[objective](model, guide, {"x": x}, 6, {}).maximised(total=6)
    with seeded(0):
        site = guide_trace(guide, {"x": x}, 6, {}).nodes["z"]
    z = site["value"]
    of_a_datum = model.likelihood(model.decoder(z)).log_prob(x)
    if type(model.likelihood).forward is Likelihood.forward:
        of_a_datum = model.likelihood.marginals(model.decoder(z)).log_prob(x).flatten(1).sum(1)
    prior = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    kl = site["fn"].log_prob(z) - prior.log_prob(z) if objective == "stl" else kl_divergence(site["fn"], prior)
    torch.testing.assert_close(found, (of_a_datum - kl).mean(), rtol=1e-5, atol=1e-5)
