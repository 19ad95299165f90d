"""The structures of the examples that users of Pyro and NumPyro start from, as programs of a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import config_enumerate
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.nn.functional import softplus

from calibrant.program import Program

SIZE = 12
DRAWN = torch.Generator().manual_seed(5)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=DRAWN)


def counts(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape, generator=DRAWN).float()


@dataclass
class Example:
    """A program, its data and covariates."""

    build: Callable[[], Program]
    observed: dict[str, Tensor]
    covariates: dict[str, Tensor] | None = None


# -- deep generative models --------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    def __init__(self, latents: int, outputs: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(latents, 8), nn.Softplus(), nn.Linear(8, outputs))

    def forward(self, *parts: Tensor) -> Tensor:
        return self.net(torch.cat(parts, -1))


class VAE(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(2, 6)

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(size, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1))


class SemiSupervisedVAE(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(2 + 3, 6)

    @config_enumerate
    def forward(self, size):
        with pyro.plate("data", size):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(size, 3)))
            z = pyro.sample("z", dist.Normal(torch.zeros(size, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(y, z)).to_event(1))


class ConditionalVAE(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.prior, self.decoder = Decoder(2, 4), Decoder(4, 6)

    def forward(self, size, seen):
        with pyro.plate("data", size):
            loc, raw = self.prior(seen).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, softplus(raw)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z, seen)).to_event(1))


class DeepMarkov(PyroModule):
    """A sequence of latents, each from the one before through a network; entries after the end are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.transition, self.emission = Decoder(2, 4), Decoder(2, 3)
        self.start = nn.Parameter(torch.zeros(2))

    def forward(self, size, length):
        with pyro.plate("data", size):
            z = self.start.expand(size, 2)
            for t in pyro.markov(range(3)):
                loc, raw = self.transition(z).chunk(2, -1)
                z = pyro.sample(f"z_{t}", dist.Normal(loc, softplus(raw)).to_event(1))
                there = (t < length)[:, None]
                pyro.sample(f"x_{t}", dist.Bernoulli(logits=self.emission(z)).mask(there).to_event(1))


class AttendInferRepeat(PyroModule):
    """Up to two objects with a place each, drawn onto a line of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = Decoder(1, 3)
        self.register_buffer("pixels", torch.linspace(-1.0, 1.0, 6))

    def forward(self, size):
        with pyro.plate("data", size):
            canvas, there = torch.zeros(size, 6), torch.ones(size)
            for step in range(2):
                there = pyro.sample(f"there_{step}", dist.Bernoulli(0.6 * there))
                place = pyro.sample(f"place_{step}", dist.Normal(torch.zeros(size), 0.5))
                what = pyro.sample(f"what_{step}", dist.Normal(torch.zeros(size, 1), 1.0).to_event(1))
                near = torch.exp(-(self.pixels - place[:, None]).square() / 0.1)
                canvas = canvas + there[:, None] * near * self.decoder(what).mean(-1, keepdim=True)
            pyro.sample("x", dist.Normal(canvas, 0.3).to_event(1))


class ProdLDA(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.topics = nn.Linear(3, 8, bias=False)
        self.norm = nn.BatchNorm1d(8, affine=False)

    def forward(self, size):
        with pyro.plate("data", size):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(size, 3), 1.0).to_event(1)).softmax(-1)
            rate = self.norm(self.topics(theta)).softmax(-1)
            pyro.sample("x", dist.Multinomial(20, probs=rate))


class NormalizingFlowPrior(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))
        self.decoder = Decoder(2, 4)

    def forward(self, size):
        base = dist.Normal(torch.zeros(size, 2), 1.0).to_event(1)
        with pyro.plate("data", size):
            bend = dist.transforms.AffineTransform(self.shift, 2.0, event_dim=1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [bend]))
            pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1))


# -- mixtures and topics -----------------------------------------------------------------------------------------------


def mixture_of_normals(size):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(locs[k], scale))


def summed_mixture(size):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    locs = pyro.sample("locs", dist.Normal(torch.zeros(2), 10.0).to_event(1))
    with pyro.plate("data", size):
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 1.0)))


def topics(size):
    """Latent Dirichlet allocation with the topic of each word summed out."""
    with pyro.plate("topics", 2):
        words = pyro.sample("words", dist.Dirichlet(torch.ones(5)))
    with pyro.plate("data", size):
        share = pyro.sample("share", dist.Dirichlet(torch.ones(2)))
        pyro.sample("x", dist.Multinomial(8, probs=share @ words))


# -- regressions -------------------------------------------------------------------------------------------------------


def baseball(size, at_bats):
    """Partially pooled shares of hits."""
    mean = pyro.sample("mean", dist.Uniform(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with pyro.plate("data", size):
        share = pyro.sample("share", dist.Beta(mean * kappa, (1 - mean) * kappa))
        pyro.sample("hits", dist.Binomial(at_bats, share))


def varying_intercepts(size, group, x):
    spread = pyro.sample("spread", dist.HalfCauchy(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 3):
        intercept = pyro.sample("intercept", dist.Normal(0.0, spread))
    with pyro.plate("data", size):
        pyro.sample("y", dist.Normal(intercept[group.long()] + slope * x, 1.0))


def horseshoe(size, x):
    overall = pyro.sample("overall", dist.HalfCauchy(1.0))
    with pyro.plate("columns", 3):
        each = pyro.sample("each", dist.HalfCauchy(1.0))
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0)) * each * overall
    with pyro.plate("data", size):
        pyro.sample("y", dist.Normal(x @ weight, 1.0))


def ordinal_regression(size, x):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    cut = pyro.sample("cut", dist.TransformedDistribution(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), [dist.transforms.OrderedTransform()]
    ))  # fmt: skip
    with pyro.plate("data", size):
        pyro.sample("y", dist.OrderedLogistic(slope * x, cut))


def survival(size, censored, x):
    """Exponential times, of which some are known to be longer than what was recorded."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    base = pyro.sample("base", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        rate = (base + slope * x).exp()
        pyro.factor("longer", torch.where(censored.bool(), -rate.log(), torch.zeros(())))
        pyro.sample("time", dist.Exponential(rate))


def inflated_counts(size, x):
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("y", dist.ZeroInflatedPoisson((slope * x).exp(), gate=gate))


def negative_binomial(size, x):
    spread = pyro.sample("spread", dist.Gamma(2.0, 0.5))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("y", dist.GammaPoisson(spread, spread / (slope * x).exp()))


class BayesianNetwork(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PyroModule[nn.Linear](1, 4), PyroModule[nn.Linear](4, 1)
        for layer, shape in ((self.first, [4, 1]), (self.second, [1, 4])):
            layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(2))
            layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand(shape[:1]).to_event(1))

    def forward(self, size, x):
        noise = pyro.sample("noise", dist.Gamma(0.5, 1.0))
        mean = self.second(torch.tanh(self.first(x))).squeeze(-1)
        with pyro.plate("data", size):
            pyro.sample("y", dist.Normal(mean, noise))


def item_response(size):
    with pyro.plate("items", 4):
        hard = pyro.sample("hard", dist.Normal(0.0, 1.0))
        sharp = pyro.sample("sharp", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", size):
        able = pyro.sample("able", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Bernoulli(logits=sharp * (able[:, None] - hard)).to_event(1))


def factor_analysis(size):
    loading = pyro.sample("loading", dist.Normal(torch.zeros(4, 2), 1.0).to_event(2))
    noise = pyro.sample("noise", dist.HalfNormal(torch.ones(4)).to_event(1))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ loading.T, noise).to_event(1))


def matrix_factorisation(size, column):
    """Ratings of a row (the datum) for one column each."""
    with pyro.plate("columns", 3):
        v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", size):
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("rating", dist.Normal((u * v[column.long()]).sum(-1), 0.5))


def correlated(size):
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(3)).to_event(1))
    root = pyro.sample("root", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale[:, None] * root))


# -- series, processes, populations ------------------------------------------------------------------------------------


def gaussian_process(size):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    variance = pyro.sample("variance", dist.LogNormal(0.0, 1.0))
    times = torch.linspace(0.0, 1.0, 10)
    apart = (times[:, None] - times) / length
    with pyro.plate("data", size):
        covariance = variance * torch.exp(-apart.square() / 2) + 0.1 * torch.eye(10)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(10), covariance))


def state_space(size):
    drift = pyro.sample("drift", dist.LogNormal(-1.0, 0.5))
    one, still = torch.eye(1), dist.Normal(torch.zeros(1), 1.0).to_event(1)
    with pyro.plate("data", size):
        moves = dist.Normal(torch.zeros(1), drift).to_event(1)
        pyro.sample("y", dist.GaussianHMM(still, one, moves, one, still, duration=8))


def autoregression(size, before):
    """A series of order two, its steps data, and the two values before a step covariates."""
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 0.5).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", size):
        pyro.sample("y", dist.Normal(before @ phi, sigma))


def stochastic_volatility(size):
    """Steps of a random walk and returns of one series, which is one datum."""
    step = pyro.sample("step", dist.Exponential(10.0))
    nu = pyro.sample("nu", dist.Exponential(0.1))
    with pyro.plate("data", size):
        moves = pyro.sample("moves", dist.Normal(torch.zeros(10), 1.0).to_event(1))
        volatility = (step * moves).cumsum(-1).exp()
        pyro.sample("y", dist.StudentT(1.0 + nu, 0.0, volatility).to_event(1))


def epidemic(size):
    """Steps of a deterministic epidemic, with counts around it."""
    contact = pyro.sample("contact", dist.LogNormal(0.0, 0.5))
    recovery = pyro.sample("recovery", dist.Beta(2.0, 2.0))
    ill, well, found = torch.tensor(0.01), torch.tensor(0.99), []
    for _ in range(8):
        new = contact * ill * well
        well, ill = well - new, ill + new - recovery * ill
        found.append(1000 * new)
    with pyro.plate("data", size):
        pyro.sample("cases", dist.Poisson(torch.stack(found).clamp(min=1e-3)).to_event(1))


class LearnedFlow(PyroModule):
    """Euler steps of a learned vector field, as in a neural ODE."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("start", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            path = []
            for _ in range(4):
                z = z + 0.25 * self.field(z)
                path.append(z)
            pyro.sample("x", dist.Normal(torch.stack(path, -2), 0.1).to_event(2))


def capture_recapture(size):
    """Animals seen at the first or second visit: a Cormack–Jolly–Seber model of two steps, survival summed out."""
    survive = pyro.sample("survive", dist.Beta(1.0, 1.0))
    seen = pyro.sample("seen", dist.Beta(1.0, 1.0))
    with pyro.plate("data", size):
        alive = torch.ones(())
        for visit in range(2):
            alive = pyro.sample(f"alive_{visit}", dist.Bernoulli(survive * alive))
            pyro.sample(f"x_{visit}", dist.Bernoulli((seen * alive).clamp(1e-6, 1 - 1e-6)))


def predator_and_prey(size):
    """Growth rates and an observation with multiplicative noise; a series is a datum."""
    rates = pyro.sample("rates", dist.LogNormal(torch.full((2,), -0.5), 0.3).to_event(1))
    with pyro.plate("data", size):
        start = pyro.sample("start", dist.LogNormal(torch.zeros(2), 0.3).to_event(1))
        prey, hunters = start.unbind(-1)
        path = []
        for _ in range(5):
            prey, hunters = (
                prey + 0.2 * prey * (rates[0] - hunters),
                hunters + 0.2 * hunters * (prey - rates[1]),
            )
            path.append(torch.stack([prey, hunters], -1).clamp(min=1e-3))
        pyro.sample("x", dist.LogNormal(torch.stack(path, -2).log(), 0.25).to_event(2))


def of(program: Program) -> Callable[[], Program]:
    return lambda: program


BITS = (normal(SIZE, 6) > 0).float()
EXAMPLES = {
    "VAE": Example(VAE, {"x": BITS}),
    "semi-supervised VAE": Example(SemiSupervisedVAE, {"x": BITS}),
    "supervised half of it": Example(
        SemiSupervisedVAE, {"x": BITS, "y": torch.eye(3)[torch.randint(0, 3, (SIZE,), generator=DRAWN)]}
    ),
    "conditional VAE": Example(ConditionalVAE, {"x": BITS}, {"seen": normal(SIZE, 2)}),
    "deep Markov model": Example(
        DeepMarkov, {f"x_{t}": BITS[:, :3] for t in range(3)}, {"length": 1 + torch.arange(SIZE) % 3}
    ),
    "attend, infer, repeat": Example(AttendInferRepeat, {"x": normal(SIZE, 6)}),
    "ProdLDA": Example(
        lambda: ProdLDA().eval(), {"x": torch.tensor([5.0, 4.0, 3.0, 3.0, 2.0, 1.0, 1.0, 1.0]).expand(SIZE, 8).clone()}
    ),
    "flow prior": Example(NormalizingFlowPrior, {"x": normal(SIZE, 4)}),
    "Gaussian mixture": Example(of(mixture_of_normals), {"x": normal(SIZE)}),
    "summed-out mixture": Example(of(summed_mixture), {"x": normal(SIZE)}),
    "LDA": Example(of(topics), {"x": torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0]).expand(SIZE, 5).clone()}),
    "baseball": Example(of(baseball), {"hits": counts(SIZE)}, {"at_bats": torch.full((SIZE,), 9.0)}),
    "varying intercepts": Example(
        of(varying_intercepts), {"y": normal(SIZE)}, {"group": torch.arange(SIZE) % 3, "x": normal(SIZE)}
    ),
    "horseshoe": Example(of(horseshoe), {"y": normal(SIZE)}, {"x": normal(SIZE, 3)}),
    "ordinal regression": Example(of(ordinal_regression), {"y": torch.arange(SIZE) % 3}, {"x": normal(SIZE)}),
    "survival": Example(
        of(survival), {"time": normal(SIZE).exp()}, {"censored": torch.arange(SIZE) % 2, "x": normal(SIZE)}
    ),
    "zero-inflated counts": Example(of(inflated_counts), {"y": counts(SIZE)}, {"x": normal(SIZE)}),
    "negative binomial": Example(of(negative_binomial), {"y": counts(SIZE)}, {"x": normal(SIZE)}),
    "Bayesian network": Example(BayesianNetwork, {"y": normal(SIZE)}, {"x": normal(SIZE, 1)}),
    "item response": Example(of(item_response), {"x": BITS[:, :4]}),
    "factor analysis": Example(of(factor_analysis), {"x": normal(SIZE, 4)}),
    "matrix factorisation": Example(
        of(matrix_factorisation), {"rating": normal(SIZE)}, {"column": torch.arange(SIZE) % 3}
    ),
    "LKJ": Example(of(correlated), {"x": normal(SIZE, 3)}),
    "Gaussian process": Example(of(gaussian_process), {"y": normal(1, 10)}),
    "state space": Example(of(state_space), {"y": normal(3, 8, 1)}),
    "autoregression": Example(of(autoregression), {"y": normal(SIZE)}, {"before": normal(SIZE, 2)}),
    "stochastic volatility": Example(of(stochastic_volatility), {"y": normal(1, 10)}),
    "epidemic": Example(of(epidemic), {"cases": 3 * counts(1, 8)}),
    "neural ODE": Example(LearnedFlow, {"x": normal(SIZE, 4, 2)}),
    "capture–recapture": Example(of(capture_recapture), {"x_0": BITS[:, 0], "x_1": BITS[:, 0] * BITS[:, 1]}),
    "predator and prey": Example(of(predator_and_prey), {"x": normal(3, 5, 2).exp()}),
}
