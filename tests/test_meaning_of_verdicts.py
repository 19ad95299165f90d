"""Verdicts carry what they mean: no decision depends on how a sentence is worded."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from calibrant.evaluation import compare, conclude, verdicts
from calibrant.inference import posterior, reference

X = {"x": torch.linspace(-2.0, 2.0, 80)[:, None].repeat(1, 2)}


def model(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


def guide_with(factor):
    """The exact posterior, N(x/2, 1/√2), with its sds multiplied."""

    def guide(observed, size):
        x = observed["x"]
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5 * factor(x)).to_event(1))

    return guide


CASES = {
    "too narrow": (lambda x: torch.full_like(x, 0.6), "", "its posterior sd is too small by 40%"),
    "too wide": (lambda x: torch.full_like(x, 1.6), "", "its posterior sd is too large by 60%"),
    "off": (lambda x: torch.where(x > 0, 1.4, 1 / 1.4), "", "its posterior sd is off by"),
    "one entry": (lambda x: torch.ones_like(x) * torch.tensor([1.0, 0.85]), "z[1]", "is too small by 15% for `z[1]`"),
}


@pytest.fixture(scope="module", params=CASES)
def judged(request):
    factor, entry, words = CASES[request.param]
    exact = reference(model, X, draws=1000, seed=1)
    comparison = compare(posterior(model, guide_with(factor), X, 1000, seed=2), exact)
    direction = "too narrow" if request.param == "one entry" else request.param
    return comparison, verdicts(comparison), direction, entry, words


def test_an_error_of_the_sd_has_its_direction_and_the_entry_that_decided(judged):
    _, found, direction, entry, _ = judged
    sd = next(verdict for verdict in found if verdict.quantity == "sd")
    assert (sd.status, sd.direction, sd.entry) == ("fail", direction, entry)
    assert all(verdict.direction == "" for verdict in found if verdict.quantity != "sd")


def test_the_conclusion_is_the_same_whatever_the_sentences_say(judged):
    comparison, found, _, _, words = judged
    conclusion = conclude(found, comparison)
    assert words in str(conclusion)
    for sentence in ("", "off by, the worst of"):
        reworded = [v if v.quantity == "single data" else replace(v, sentence=sentence) for v in found]
        assert conclude(reworded, comparison) == conclusion  # the worst datum is quoted from its sentence
