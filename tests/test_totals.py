"""Counts that add up to a total: data of another total than the program draws are refused, and the remedy is right."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from calibrant.errors import CalibrantError, DataError
from calibrant.program import check_program, log_density

TOPICS = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.2, 0.7]])
TOTALS = torch.tensor([5, 40, 12, 3, 80, 7])


def documents(totals=TOTALS):
    torch.manual_seed(0)
    shares = torch.distributions.Dirichlet(torch.ones(2)).sample((len(totals),)) @ TOPICS
    counts = [torch.distributions.Multinomial(int(n), p).sample() for n, p in zip(totals, shares, strict=True)]
    return {"w": torch.stack(counts)}


def program(likelihood):
    def model(size, n):
        with pyro.plate("data", size):
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
            pyro.sample("w", likelihood(theta @ TOPICS.to(theta.dtype), n))

    return model


def mixed(p, n):
    components = dist.Multinomial(80, probs=torch.stack([p, p.flip(-1)], 1))
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), components)


SPELLINGS = {
    "without a total": lambda p, n: dist.Multinomial(probs=p),
    "of the largest total": lambda p, n: dist.Multinomial(80, probs=p, validate_args=False),
    "of the largest total, validated": lambda p, n: dist.Multinomial(80, probs=p),
    "with logits": lambda p, n: dist.Multinomial(80, logits=p.log()),
    "expanded and masked": lambda p, n: dist.Multinomial(80, probs=p).expand([len(n)]).mask(n > 0),
    "a mixture": mixed,
    "DirichletMultinomial": lambda p, n: dist.DirichletMultinomial(50 * p, 80),
    "a total for each datum": lambda p, n: dist.Multinomial(n, probs=p),
    "DirichletMultinomial with a total for each datum": lambda p, n: dist.DirichletMultinomial(50 * p, n),
}


def poisson(p, n):
    return dist.Poisson(n[..., None] * p).to_event(1)


@pytest.mark.parametrize("likelihood", SPELLINGS.values(), ids=SPELLINGS)
def test_data_of_other_totals_are_refused_with_the_remedy(likelihood):
    with pytest.raises(CalibrantError, match=r"for totals that differ.*dist\.Poisson\(n\[\.\.\., None\] \* probs\)"):
        check_program(program(likelihood), documents(), {"n": TOTALS})
    check_program(program(poisson), documents(), {"n": TOTALS})


def test_it_names_the_datum_and_both_totals():
    data = documents(torch.tensor([80, 80, 12]))
    with pytest.raises(DataError, match=r"'w' adds up to 12 at datum 2, where the program draws 80 counts"):
        check_program(program(SPELLINGS["of the largest total"]), data, {"n": torch.tensor([80, 80, 12])})


def several(size, seen):
    """Three documents for every datum."""
    with pyro.plate("data", size):
        theta = pyro.sample("theta", dist.Dirichlet(torch.ones(2)))
        probs = (theta @ TOPICS.to(theta.dtype))[:, None].expand(-1, 3, -1)
        pyro.sample("w", dist.Multinomial(4, probs=probs).mask(seen).to_event(1))


def test_masked_documents_hold_any_total():
    w = torch.tensor([[4.0, 0.0, 0.0], [1.0, 2.0, 1.0], [0.0, 0.0, 0.0]]).expand(5, 3, 3).clone()
    seen = torch.tensor([True, True, False]).expand(5, 3)
    check_program(several, {"w": w}, {"seen": seen})
    with pytest.raises(DataError, match="'w' adds up to 0 at datum 0"):
        check_program(several, {"w": w}, {"seen": torch.ones(5, 3)})


@pytest.mark.parametrize("name", ["of the largest total", "DirichletMultinomial", "a mixture"])
def test_data_of_the_total_are_allowed(name):
    totals = torch.full((6,), 80)
    check_program(program(SPELLINGS[name]), documents(totals), {"n": totals})


def test_the_remedy_has_the_posterior_of_the_multinomial():
    """Its likelihood is that of the Multinomial times the probability of the total, which is the same for all θ."""
    data = {"w": documents()["w"].double()}
    wanted = dist.Poisson(TOTALS.double()).log_prob(TOTALS.double())
    for share in (0.01, 0.4, 0.99):
        theta = torch.tensor([share, 1 - share], dtype=torch.float64).expand(6, 2)
        found = log_density(program(poisson), {"theta": theta, **data}, covariates={"n": TOTALS}, observed=["w"])
        multinomial = [dist.Multinomial(int(n), p) for n, p in zip(TOTALS, theta @ TOPICS.double(), strict=True)]
        likelihood = torch.stack([m.log_prob(w) for m, w in zip(multinomial, data["w"], strict=True)])
        torch.testing.assert_close(found["w"] - likelihood, wanted)


@pytest.mark.parametrize("value", [7.0, -1.0, 0.5])
@pytest.mark.parametrize(
    "trials",
    [
        lambda p: dist.Binomial(5.0, p),
        lambda p: dist.BetaBinomial(p + 1, 2.0, torch.tensor(5.0)),
        lambda p: dist.ExtendedBinomial(torch.tensor(5.0), p),
        lambda p: dist.ExtendedBetaBinomial(p + 1, 2.0, torch.tensor(5.0)),
    ],
    ids=["Binomial", "BetaBinomial", "ExtendedBinomial", "ExtendedBetaBinomial"],
)
def test_counts_beyond_their_trials_are_refused(trials, value):
    def model(size):
        with pyro.plate("data", size):
            p = pyro.sample("p", dist.Beta(1.0, 1.0))
            pyro.sample("x", trials(p))

    check_program(model, {"x": torch.tensor([0.0, 5.0, 2.0])})
    with pytest.raises(DataError, match=r"'x' is outside the support of its .*at datum 1"):
        check_program(model, {"x": torch.tensor([0.0, value, 2.0])})
