"""Guides whose family contains the posterior: after training the ELBO is the log evidence, and moments are exact.

Evidence and posterior are in closed form (the programs are conjugate), and are held against each other by Bayes' rule.
Two defects are planted in every trained guide, a posterior too narrow and one that is off: both must be noticed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log, pi
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from scipy import special, stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import calibrant as cal
from calibrant.distributions.directional import VonMisesFisher
from calibrant.guides.families import densities, finite, on_spheres
from calibrant.program import defaults, in_double, log_density, seeded, trace
from calibrant.program.tracing import sampled

HELD_OUT, DRAWS = 2000, 20


@dataclass(frozen=True)
class Effort:
    """How long a guide is trained, and what is asked of it then: as in `Found`."""

    data: int
    batch: int
    gap_se: float
    gap: float
    off: float
    spread: float


SHORT, LONG = Effort(2000, 64, 0.006, 0.03, 0.2, 0.07), Effort(4000, 128, 0.002, 0.01, 0.1, 0.05)


class Small(nn.Module):
    """An encoder of one's own: linear features of `embed(x)`, beside those of two hidden layers.

    Args:
        entries: of an embedded datum.
        embed: the observed site `(size, *event)` → `(size, entries)`.
    """

    features = 64

    def __init__(self, entries: int, embed: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, half = embed, self.features // 2
        self.linear = nn.Linear(entries, half)
        self.network = nn.Sequential(nn.Linear(entries, half), nn.SiLU(), nn.Linear(half, half), nn.SiLU())

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        vector = self.embed(inputs["x"])
        return torch.cat([self.linear(vector), self.network(vector)], -1)


@dataclass(frozen=True)
class Case:
    """A conjugate program of one latent site and the observed site `x`.

    `evidence` and `posterior` take x in float64: log p(x), `(n,)`, and the distribution of what `entries` makes of the
    latent's value, `(n, k)`.
    """

    program: Any
    family: str
    evidence: Callable[[Tensor], Tensor]
    posterior: Callable[[Tensor], Any]
    encoder: Callable[[], nn.Module]
    entries: Callable[[Tensor], Tensor] = lambda value: value
    structure: str = "faithful"
    objective: str = "stl"
    epochs: int = 15  # of a long training
    short: int = 8


def conjugate(size: int, latent: str, prior: Any, likelihood: Callable[[Tensor], Any]) -> None:
    """Sample the latent, and x given it."""
    with pyro.plate("data", size):
        pyro.sample("x", likelihood(pyro.sample(latent, prior)))


# -- the programs ------------------------------------------------------------------------------------------------------


def ppca(loading: Tensor) -> Any:
    """A ppca of given loadings `(pixels, latents)`."""
    model = cal.models.create("ppca", shape=(len(loading),), latents=loading.shape[1])
    with torch.no_grad():
        model.decoder.directions.copy_(loading)
        model.decoder.bias.copy_(torch.linspace(-1, 1, len(loading)))
        model.likelihood.log_scale.fill_(-0.3)
    return model.requires_grad_(False)


LOADING = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
DENSE = ppca(LOADING)
DIAGONAL = ppca(torch.linalg.qr(LOADING)[0] * torch.tensor([2.0, 1.0, 0.5]))  # orthogonal columns


def ppca_evidence(model: Any, x: Tensor) -> Tensor:
    weight, noise = model.decoder.weight.double(), model.likelihood.scale.double()
    return MultivariateNormal(model.decoder.bias.double(), weight @ weight.T + noise**2 * torch.eye(5)).log_prob(x)


def ppca_posterior(model: Any, x: Tensor) -> Any:
    weight, noise = model.decoder.weight.double(), model.likelihood.scale.double()
    precision = torch.eye(3) + weight.T @ weight / noise**2
    mean = torch.linalg.solve(precision, weight.T @ (x - model.decoder.bias).T / noise**2).T
    return MultivariateNormal(mean, precision_matrix=precision)


def gamma_poisson(size: int) -> None:
    conjugate(size, "rate", dist.Gamma(3.0, 2.0), lambda rate: dist.Poisson(rate[:, None].expand(-1, 5)).to_event(1))


def gamma_poisson_evidence(x: Tensor) -> Tensor:
    shape = 3 + x.sum(1)
    return shape.lgamma() - shape * log(7) + 3 * log(2) - log(2) - (x + 1).lgamma().sum(1)


def beta_bernoulli(size: int) -> None:
    conjugate(
        size, "share", dist.Beta(2.0, 3.0), lambda share: dist.Bernoulli(share[:, None].expand(-1, 8)).to_event(1)
    )


def beta_bernoulli_evidence(x: Tensor) -> Tensor:
    heads = x.sum(1)
    return special_tensor(special.betaln, 2 + heads, 3 + 8 - heads) - float(special.betaln(2, 3))


SHARES = [0.7, 1.5, 3.0]


def dirichlet_multinomial(size: int) -> None:
    conjugate(size, "shares", dist.Dirichlet(torch.tensor(SHARES)), lambda shares: dist.Multinomial(12, shares))


def dirichlet_multinomial_evidence(x: Tensor) -> Tensor:
    return torch.as_tensor(stats.dirichlet_multinomial.logpmf(x.numpy(), np.array(SHARES), 12))


def circular(size: int) -> None:
    conjugate(
        size,
        "angle",
        dist.VonMises(2.5, 1.5),
        lambda angle: dist.VonMises(angle[:, None].expand(-1, 3), 0.8).to_event(1),
    )


def unit(angle: Tensor) -> Tensor:
    """Angles as vectors: one more dimension."""
    return torch.stack([angle.cos(), angle.sin()], -1)


def circular_natural(x: Tensor) -> Tensor:
    """Mean direction times concentration of the posterior."""
    return 1.5 * unit(x.new_tensor(2.5)) + 0.8 * unit(x).sum(1)


def circular_evidence(x: Tensor) -> Tensor:
    normalizer = log_c(2, x.new_tensor([1.5, 0.8, 0.8, 0.8])).sum()
    return normalizer - log_c(2, circular_natural(x).norm(dim=-1))


def spherical(size: int) -> None:
    """A uniform direction, seen in Normal noise."""
    conjugate(size, "direction", dist.ProjectedNormal(torch.zeros(3)), lambda mean: dist.Normal(mean, 0.7).to_event(1))


def spherical_evidence(x: Tensor) -> Tensor:
    return -log(4 * pi) + seen_in_noise(x, 0.7) - log_c(3, (x / 0.49).norm(dim=-1))


def hyperspherical(size: int) -> None:
    conjugate(
        size,
        "direction",
        VonMisesFisher(torch.eye(10)[0], torch.tensor(3.0)).expand([size]),
        lambda mean: dist.Normal(mean, 0.4).to_event(1),
    )


def hyperspherical_evidence(x: Tensor) -> Tensor:
    natural = hyperspherical_natural(x)
    return log_c(10, x.new_tensor(3.0)) + seen_in_noise(x, 0.4) - log_c(10, natural.norm(dim=-1))


def hyperspherical_natural(x: Tensor) -> Tensor:
    return 3 * torch.eye(10, dtype=x.dtype)[0] + x / 0.16


def seen_in_noise(x: Tensor, noise: float) -> Tensor:
    """log N(x; m, noise²) less x·m/noise², for a unit vector m."""
    return dist.Normal(0.0, noise).log_prob(x).sum(-1) - 0.5 / noise**2


def log_c(dimension: int, concentration: Tensor) -> Tensor:
    """log of the von Mises–Fisher normaliser κ^ν / ((2π)^(p/2) I_ν(κ))."""
    order = dimension / 2 - 1
    bessel = special_tensor(special.ive, torch.full_like(concentration, order), concentration).log() + concentration
    return order * concentration.log() - dimension / 2 * log(2 * pi) - bessel


def special_tensor(function: Callable[..., Any], *values: Tensor) -> Tensor:
    return torch.as_tensor(function(*(value.numpy() for value in values)))


class Direction(VonMisesFisher):
    """Of vectors, from mean direction times concentration; its moments come from SciPy."""

    def __init__(self, natural: Tensor) -> None:
        concentration = natural.norm(dim=-1)
        super().__init__(natural / concentration[:, None], concentration)

    @property
    def length(self) -> Tensor:
        """Of the mean, `(n, 1)`."""
        order = torch.full_like(self.concentration, self.event_shape[0] / 2)
        above, below = (special_tensor(special.ive, nu, self.concentration) for nu in (order, order - 1))
        return (above / below)[:, None]

    @property
    def mean(self) -> Tensor:
        return self.length * self.direction

    @property
    def variance(self) -> Tensor:
        across = self.length / self.concentration[:, None]
        return across + (1 - self.event_shape[0] * across - self.length**2) * self.direction**2


WEIGHTS = [0.2, 0.3, 0.5]
CENTRES = [[-1.0, 0.5], [1.5, 0.0], [0.0, -1.0]]


def mixture(size: int) -> None:
    prior, centres = dist.Categorical(torch.tensor(WEIGHTS)), torch.tensor(CENTRES)
    conjugate(size, "kind", prior, lambda kind: dist.Normal(centres[kind], 1.0).to_event(1))


def mixture_joint(x: Tensor) -> Tensor:
    """log p(x, kind), `(n, 3)`."""
    return x.new_tensor(WEIGHTS).log() + dist.Normal(x.new_tensor(CENTRES), 1.0).log_prob(x[:, None]).sum(-1)


CASES = {
    "ppca": Case(
        DENSE,
        "dense",
        partial(ppca_evidence, DENSE),
        partial(ppca_posterior, DENSE),
        lambda: Small(5, lambda x: x),
        structure="full",
    ),
    "diagonal ppca": Case(
        DIAGONAL,
        "normal",
        partial(ppca_evidence, DIAGONAL),
        partial(ppca_posterior, DIAGONAL),
        lambda: Small(5, lambda x: x),
        structure="mean-field",
        objective="kl",
    ),
    "gamma-poisson": Case(
        gamma_poisson,
        "gamma",
        gamma_poisson_evidence,
        lambda x: dist.Gamma(3 + x.sum(1, keepdim=True), x.new_tensor(7.0)),
        lambda: Small(6, lambda x: torch.cat([(x - 1.5) / 2, (x.sum(1, keepdim=True) + 3).log() - 2], -1)),
        lambda rate: rate[..., None],
    ),
    "beta-bernoulli": Case(
        beta_bernoulli,
        "beta",
        beta_bernoulli_evidence,
        lambda x: dist.Beta(2 + x.sum(1, keepdim=True), 11 - x.sum(1, keepdim=True)),
        lambda: Small(8, lambda x: x - 0.4),
        lambda share: share[..., None],
    ),
    "dirichlet-multinomial": Case(
        dirichlet_multinomial,
        "dirichlet",
        dirichlet_multinomial_evidence,
        lambda x: dist.Dirichlet(x + x.new_tensor(SHARES)),
        lambda: Small(6, lambda x: torch.cat([(x - 4) / 4, x.log1p() - 1], -1)),
        epochs=30,
    ),
    "von mises": Case(
        circular,
        "vonmises",
        circular_evidence,
        lambda x: Direction(circular_natural(x)),
        lambda: Small(6, lambda x: unit(x).flatten(1)),
        unit,
        short=12,
    ),
    "von mises-fisher, 3": Case(
        spherical, "vmf", spherical_evidence, lambda x: Direction(x / 0.49), lambda: Small(3, lambda x: x), epochs=20
    ),
    "von mises-fisher, 10": Case(
        hyperspherical,
        "vmf",
        hyperspherical_evidence,
        lambda x: Direction(hyperspherical_natural(x)),
        lambda: Small(10, lambda x: x),
        epochs=30,
    ),
    "mixture": Case(
        mixture,
        "categorical[3]",
        lambda x: mixture_joint(x).logsumexp(-1),
        lambda x: dist.OneHotCategorical(logits=mixture_joint(x)),
        lambda: Small(2, lambda x: x),
        lambda kind: nn.functional.one_hot(kind.long(), 3).double(),
        epochs=8,
    ),
}


# -- what must hold ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_evidence_and_posterior_obey_bayes_rule(name):
    """log p(x, z) − log p(z | x) is log p(x), at draws of the program: the truth itself is right."""
    case = CASES[name]
    program = in_double(case.program)
    with torch.no_grad(), seeded(3), defaults(program, {}, torch.float64):
        drawn = {site: node["value"] for site, node in sampled(trace(program, 50, {})).items()}
        joint = log_density(program, drawn, 50, observed=["x"]).joint
    (latent,) = set(drawn) - {"x"}
    exact = case.posterior(drawn["x"]).log_prob(case.entries(drawn[latent])).reshape(50)
    evidence = case.evidence(drawn["x"])
    torch.testing.assert_close(joint - exact, evidence, rtol=0, atol=1e-5)  # torch's I₀ is good to 1e-7


def simulate(case: Case, size: int, seed: int) -> dict[str, Tensor]:
    return cal.program.sample_prior(case.program, size, seed=seed)


def train(case: Case, effort: Effort) -> Any:
    pyro.set_rng_seed(0)  # fixtures of a module run before the test's own seed is set
    observed = {"x": simulate(case, effort.data, seed=1)["x"]}
    guide = cal.guides.amortize(case.program, observed, case.structure, encoder=case.encoder())
    assert guide.spec["sites"][0]["family"] == case.family
    options = {"epochs": case.epochs if effort is LONG else case.short, "objective": case.objective}
    cal.inference.fit(case.program, guide, observed, lr=2e-2, batch_size=effort.batch, **options)
    return guide


@dataclass(frozen=True)
class Found:
    """A guide against the truth, on held-out data.

    `gap` is log evidence − ELBO in nats per datum; `off` the root mean square error of the posterior means in posterior
    sds; `spread` the ratio of posterior sds: both over all data, of all entries at once, without the draws' own error.
    """

    gap: float
    gap_se: float
    off: float
    spread: float

    def faults(self, effort: Effort) -> set[str]:
        """What is not as it must be."""
        right = {
            "evidence": -limit(1) * self.gap_se < self.gap < effort.gap,
            "mean": self.off < effort.off,
            "sd": abs(self.spread - 1) < effort.spread,
        }
        return {quantity for quantity, holds in right.items() if not holds}


def compare(case: Case, guide: Any) -> Found:
    observed = {"x": simulate(case, HELD_OUT, seed=2)["x"]}
    tree = cal.inference.posterior(case.program, guide, observed, draws=DRAWS)
    stats = tree["sample_stats"]
    elbo = torch.as_tensor((stats["log_p"] - stats["log_q"]).mean("draw").values[0])
    gap = case.evidence(observed["x"].double()) - elbo
    exact = case.posterior(observed["x"].double())
    (latent,) = tree["posterior"].data_vars
    draws = case.entries(torch.as_tensor(tree["posterior"][latent].values[0])).double()
    error = (draws.mean(0) - exact.mean).square() - draws.var(0) / DRAWS
    total = exact.variance.sum(-1)
    off, spread = ((part.sum(-1) / total).mean().clamp_min(0).sqrt() for part in (error, draws.var(0)))
    return Found(float(gap.mean()), float(gap.std()) / HELD_OUT**0.5, float(off), float(spread))


LONG_ALONE = ("von mises-fisher, 10",)


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((name, SHORT), id=name) for name in CASES if name not in LONG_ALONE),
        *(pytest.param((name, LONG), id=f"{name}, long", marks=pytest.mark.truth) for name in CASES),
    ],
)
def trained(request):
    name, effort = request.param
    return CASES[name], train(CASES[name], effort), effort


def test_the_trained_guide_is_the_exact_posterior(trained):
    case, guide, effort = trained
    found = compare(case, guide)
    assert found.gap_se < effort.gap_se
    assert not found.faults(effort), found


def test_planted_defects_are_noticed(trained, monkeypatch):
    """Posterior sds of 80% (of classes: half the logits), and a first location that is 1.5 prior sds off."""
    case, guide, effort = trained
    scale, logits = densities.softplus_scale, finite.Finite.logits
    with monkeypatch.context() as patch:
        for module in (densities, on_spheres):
            patch.setattr(module, "softplus_scale", lambda raw: 0.8 * scale(raw))
        patch.setattr(finite.Finite, "logits", lambda self, raw, center: 0.5 * logits(self, raw, center))
        assert {"evidence", "sd"} <= compare(case, guide).faults(effort)
    shifted = copy.deepcopy(guide)
    with torch.no_grad():
        shifted.heads[0].out.bias[0] += 1.5
    assert {"evidence", "mean"} <= compare(case, shifted).faults(effort)
