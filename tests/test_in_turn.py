"""Programs with shared latents that vmap cannot run: their chains run in turn, with the right posterior."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import assert_agrees, from_grid
from torch import Tensor

import calibrant as cal
from calibrant.inference.references.target import target_of
from calibrant.program import as_program

GRID = torch.linspace(-4.0, 4.0, 1601, dtype=torch.float64)
LEVELS, STAY = torch.tensor([-1.0, 1.0]), torch.tensor([[0.8, 0.2], [0.3, 0.7]]).log()


def in_place(size):
    s = pyro.sample("s", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        mean = torch.zeros(size, 2)
        mean[:, 0] = s
        mean[:, 1] = -s
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1))


def in_place_likelihood(s: Tensor, x: Tensor) -> Tensor:
    return dist.Normal(torch.stack([s, -s], -1), 1.0).log_prob(x).sum(-1)


def ordinal(size):
    s = pyro.sample("s", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.OrderedLogistic(s.expand(size), LEVELS.to(s)))


def ordinal_likelihood(s: Tensor, x: Tensor) -> Tensor:
    above = torch.sigmoid(s - LEVELS.to(s))
    probabilities = torch.stack([1 - above[0], above[0] - above[1], above[1]])
    return probabilities.log()[x.long()]


def markov(size):
    s = pyro.sample("s", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        seen = dist.Normal(s + LEVELS.to(s), 0.7)
        pyro.sample("x", dist.DiscreteHMM(torch.zeros(2).to(s), STAY.to(s), seen, duration=3))


def markov_likelihood(s: Tensor, x: Tensor) -> Tensor:
    """The sum over all paths; the chain makes a step before each observation, the first one too."""
    paths = torch.tensor(list(itertools.product(range(2), repeat=4)))
    steps = STAY.double().log_softmax(1)[paths[:, :-1], paths[:, 1:]].sum(1) - torch.tensor(2.0).log()
    seen = dist.Normal(s + LEVELS.double()[paths[:, 1:]], 0.7).log_prob(x[:, None]).sum(-1)
    return (steps + seen).logsumexp(1)


def branching(size):
    """Python reads the value of a shared latent, but the density is the same in both branches."""
    s = pyro.sample("s", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        mean = s.expand(size) if s > 0 else -(-s).expand(size)
        pyro.sample("x", dist.Normal(mean, 1.0))


def plain_likelihood(s: Tensor, x: Tensor) -> Tensor:
    return dist.Normal(s, 1.0).log_prob(x)


def with_local(size):
    """A local latent, a discrete one and a recorded value beside the shared one."""
    s = pyro.sample("s", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        mean = torch.zeros(size, 2)
        mean[:, 0] = s + k
        pyro.deterministic("mean", mean)
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1))


def with_local_likelihood(s: Tensor, x: Tensor) -> Tensor:
    terms = [dist.Normal(torch.stack([s + k, 0 * s], -1), 1.0).log_prob(x).sum(-1) for k in (0, 1)]
    return torch.logaddexp(terms[0] + torch.tensor(0.7).log(), terms[1] + torch.tensor(0.3).log())


CASES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor], tuple[int, ...]]] = {
    "in place": (in_place, in_place_likelihood, (6, 2)),
    "ordered logistic": (ordinal, ordinal_likelihood, (6,)),
    "hidden markov": (markov, markov_likelihood, (6, 3)),
    "branches": (branching, plain_likelihood, (6,)),
    "with local latents": (with_local, with_local_likelihood, (6, 2)),
}


def observations(name: str) -> dict[str, Tensor]:
    x = torch.randn(CASES[name][2], generator=torch.Generator().manual_seed(2)) + 0.5
    return {"x": x.clamp(0, 2).round() if name == "ordered logistic" else x}


def log_posterior(name: str, at: Tensor) -> Tensor:
    x = observations(name)["x"].double()
    likelihood = torch.stack([CASES[name][1](s, x).sum() for s in at])
    return dist.Normal(0.0, 1.0).log_prob(at) + likelihood


@pytest.mark.parametrize("name", CASES)
def test_the_density_of_lanes_in_turn_is_right(name: str) -> None:
    """So are gradients, and what is recorded for the draws."""
    q, x = torch.tensor([[-0.7], [0.2], [1.1]], dtype=torch.float64), observations(name)
    with target_of(as_program(CASES[name][0]), cal.data.Data(x)) as target:
        assert target.in_turn
        q.requires_grad_()
        found = target.log_density(q, q.new_zeros(3, 0), target.covariates, target.observed)
        [gradient] = torch.autograd.grad(found.sum(), q)
        with torch.no_grad():
            levels = torch.full((3, len(x["x"])), 0.5, dtype=torch.float64)
            drawn, edges = target.record(q, levels, target.covariates, target.observed)
    step = torch.tensor([-1e-5, 0.0, 1e-5], dtype=torch.float64)
    wanted = torch.stack([log_posterior(name, at + step) for at in q.detach()[:, 0]])
    torch.testing.assert_close(found, wanted[:, 1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient[:, 0], (wanted[:, 2] - wanted[:, 0]) / 2e-5, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn["s"], q.detach()[:, 0])
    assert edges["s"].shape == (3,)
    if name == "with local latents":
        torch.testing.assert_close(drawn["mean"][..., 0], drawn["s"][:, None] + drawn["k"])


def test_programs_that_vmap_runs_are_not_run_in_turn() -> None:
    def program(size):
        s = pyro.sample("s", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(torch.stack([s, -s]).expand(size, 2), 1.0).to_event(1))

    with target_of(as_program(program), cal.data.Data(observations("in place"))) as target:
        assert not target.in_turn


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_reference_in_turn_is_right_and_says_once_that_it_is_slow(name: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tree = cal.inference.reference(CASES[name][0], observations(name), warmup=300, draws=600, starts=8)
    told = [str(one.message) for one in caught if "one after the other" in str(one.message)]
    assert len(told) == 1
    assert "torch.stack" in told[0]
    assert tree["convergence"]["is_reference"].values.all(), tree["convergence"]["reason"].values
    truth = from_grid(GRID.numpy(), log_posterior(name, GRID).numpy())
    assert_agrees({"s": tree["posterior"]["s"].values}, {"s": truth})
