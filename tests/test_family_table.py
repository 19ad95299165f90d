"""Every family of the table, by existing: its density against draws of a prior that it covers, its draws, its gradient.

With q the family and p the prior, the mean of q/p over draws of p is 1, and means weighted by q/p are means over q.
"""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from agreement import limit

from calibrant.errors import ProgramError
from calibrant.guides.families.choosing import FAMILIES, choose_family
from calibrant.guides.families.heads import Head
from calibrant.program.environment import seeded

PRIORS = {
    "real": dist.Normal(1.0, 2.0).expand([2]).to_event(1),
    "positive": dist.Gamma(2.0, 1.0).expand([2]).to_event(1),
    "interval": dist.Beta(2.0, 2.0).expand([2]).to_event(1),
    "simplex": dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])),
    "angle": dist.VonMises(1.0, 1.0).expand([2]).to_event(1),
    "sphere": dist.ProjectedNormal(torch.tensor([0.5, 0.0, 0.0])),
    "binary": dist.Bernoulli(0.3).expand([2]).to_event(1),
    "class": dist.Categorical(torch.tensor([0.1, 0.2, 0.7])),
    "onehot": dist.OneHotCategorical(torch.tensor([0.1, 0.2, 0.7])),
}
DRAWS = 20_000


def covered(family):
    """Support → the family's words for it."""
    found = {}
    for support, fn in PRIORS.items():
        try:
            found[support] = choose_family("s", fn.support, fn, family)
        except ProgramError:
            continue
    return found


CASES = [(family, support, words) for family in FAMILIES for support, words in covered(family).items()]


def test_every_family_covers_a_prior():
    assert {family for family, _, _ in CASES} == set(FAMILIES)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def posterior(request):
    """The head of a family, the family near the prior for so many data with the same features, and the prior."""
    _, support, words = request.param
    fn = PRIORS[support]
    with seeded(0):
        head = Head(4, 0, fn.event_shape, words)
        head.set_prior(fn.expand([1000]).sample())
        features = torch.randn(1, 4)
    return head, lambda size: head(features.expand(size, 4), None), fn


def test_density_is_normalised_and_that_of_the_draws(posterior):
    _, guide, fn = posterior
    with seeded(1), torch.no_grad():
        from_prior = fn.expand([DRAWS]).sample()
        draws = guide(2000).sample()
        ratios = (guide(DRAWS).log_prob(from_prior) - fn.log_prob(from_prior)).double().exp().numpy()
    error = ratios.std() / DRAWS**0.5
    assert abs(ratios.mean() - 1) < limit(1) * error
    assert limit(1) * error < 0.2  # a density off by a fifth would be noticed
    entries, own = (x.reshape(len(x), -1).double().numpy() for x in (from_prior, draws))
    scores = []
    for entry in range(entries.shape[1]):
        for edge in np.unique(np.quantile(own[:, entry], [0.2, 0.5, 0.8])):
            below = entries[:, entry] <= edge
            share = (ratios * below).mean()
            here = (own[:, entry] <= edge).mean()
            spread = (ratios * below).std() / DRAWS**0.5
            scores.append(abs(here - share) / np.hypot(spread, (here * (1 - here) / len(own)) ** 0.5 + 1e-4))
    assert max(scores) < limit(len(scores)), scores


def test_gradients_reach_the_features(posterior):
    head, _, fn = posterior
    features = torch.randn(5, 4, requires_grad=True)
    guide = head(features, None)
    value = guide.rsample() if guide.has_rsample else guide.sample()
    assert fn.support.check(value).all()
    guide.log_prob(value.detach()).sum().backward()
    assert features.grad.isfinite().all()
    assert (features.grad != 0).any()
