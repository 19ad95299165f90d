"""Habits of Pyro's users that the contract allows as they are, with the log joint that each program should have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from idioms import INPUTS, MATRIX, Values, X
from idioms_data import decoded, decoded_truth
from idioms_weights import decentred, schools, schools_truth
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import Bernoulli, Gamma, LogNormal, Normal

from calibrant.program import Program


@dataclass
class Habit:
    """A program that is allowed, and its log joint from values and covariates, in nats."""

    build: Callable[[], Program]
    truth: Callable[[Values, Values], Tensor]
    observed: Values
    covariates: Values | None = None


# -- handlers around a program -----------------------------------------------------------------------------------------


class Schools(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(1.0))

    def forward(self, size):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", size):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, self.noise))


class DecoratedSchools(Schools):
    @poutine.reparam(config={"theta": LocScaleReparam(0.0)})
    def decentred(self, size):
        return super().forward(size)

    def forward(self, size):
        with poutine.reparam(config={"theta": LocScaleReparam(0.0)}):
            return super().forward(size)


def positive(size):
    with pyro.plate("data", size):
        s = pyro.sample("s", dist.LogNormal(0.3, 2.0))
        pyro.sample("x", dist.Normal(0.0, s))


def positive_truth(v, c):
    return Normal(0.3, 2.0).log_prob(v["s_base"]).sum() + Normal(0.0, v["s_base"].exp()).log_prob(v["x"]).sum()


@config_enumerate
def switching(size):
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))


def switching_truth(v, c):
    prior = Bernoulli(0.3).log_prob(v["k"]) + Normal(v["k"], 1.0).log_prob(v["z"])
    return (prior + Normal(v["z"], 0.5).log_prob(v["x"])).sum()


class Switching(PyroModule):
    """Decorated methods, as in Pyro's semi-supervised examples."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(0.5))

    @config_enumerate
    def forward(self, size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("x", dist.Normal(z, self.noise))

    @config_enumerate(default="parallel")
    def model(self, size):
        return self.forward(size)


def marked(size):
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Bernoulli(0.3), infer={"enumerate": "parallel"})
        z = pyro.sample("z", dist.Normal(k, 1.0), infer={"is_auxiliary": True})
        pyro.sample("x", dist.Normal(z, 0.5), obs=None)


def with_noise(size, noise):
    with pyro.plate("data", size) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, noise if isinstance(noise, float) else noise[rows]))


def fixed_noise_truth(v, c):
    return (Normal(0, 1).log_prob(v["z"]) + Normal(v["z"], 0.5).log_prob(v["x"])).sum()


def rows_of_a_plate(size, inputs, given=None):
    with pyro.plate("data", size) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + inputs[rows].sum(-1), 0.5), obs=given)


def rows_truth(v, c):
    return (Normal(0, 1).log_prob(v["z"]) + Normal(v["z"] + c["inputs"].sum(-1), 0.5).log_prob(v["x"])).sum()


def learned(size):
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(loc, scale))


def lifted_truth(v, c):
    prior = Normal(0, 1).log_prob(v["loc"]) + LogNormal(0.0, 1.0).log_prob(v["scale"])
    return prior + Normal(v["loc"], v["scale"]).log_prob(v["x"]).sum()


# -- loops and weights -------------------------------------------------------------------------------------------------


def columns(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for column in pyro.plate("columns", 2):
            pyro.sample(f"x_{column}", dist.Normal(z, 1.0 + column))


def columns_truth(v, c):
    likelihood = Normal(v["z"], 1.0).log_prob(v["x_0"]) + Normal(v["z"], 2.0).log_prob(v["x_1"])
    return (Normal(0, 1).log_prob(v["z"]) + likelihood).sum()


def chain(size):
    with pyro.plate("data", size):
        z = torch.zeros(())
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z_{t}", dist.Normal(0.9 * z, 1.0))
            pyro.sample(f"x_{t}", dist.Normal(z, 0.5))


def chain_truth(v, c):
    z = torch.stack([torch.zeros_like(v["z_0"]), *(v[f"z_{t}"] for t in range(3))])
    x = torch.stack([v[f"x_{t}"] for t in range(3)])
    return Normal(0.9 * z[:-1], 1.0).log_prob(z[1:]).sum() + Normal(z[1:], 0.5).log_prob(x).sum()


class Hierarchy(PyroModule):
    """Weights whose prior depends on another random weight."""

    def __init__(self) -> None:
        super().__init__()
        self.precision = PyroSample(dist.Gamma(2.0, 1.0))
        self.weight = PyroSample(lambda self: dist.Normal(torch.zeros(3), self.precision.rsqrt()).to_event(1))

    def forward(self, size, inputs):
        mean = inputs @ self.weight
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(mean, 1.0))


def hierarchy_truth(v, c):
    prior = Gamma(2.0, 1.0).log_prob(v["precision"]) + Normal(0, v["precision"].rsqrt()).log_prob(v["weight"]).sum()
    return prior + Normal(c["inputs"] @ v["weight"], 1.0).log_prob(v["x"]).sum()


HABITS = {
    "a method of a module": Habit(decoded, decoded_truth, {"x": (MATRIX > 0).float()}),
    "reparam of a function": Habit(decentred, schools_truth, {"y": X}),
    "reparam of a PyroModule": Habit(
        lambda: poutine.reparam(Schools(), config={"theta": LocScaleReparam(0.0)}), schools_truth, {"y": X}
    ),
    "reparam in a program": Habit(DecoratedSchools, schools_truth, {"y": X}),
    "TransformReparam": Habit(
        lambda: poutine.reparam(positive, config={"s": TransformReparam()}), positive_truth, {"x": X}
    ),
    "two reparams": Habit(
        lambda: poutine.reparam(
            poutine.reparam(schools, config={"theta": LocScaleReparam(0.0)}), config={"nothing": TransformReparam()}
        ),
        schools_truth,
        {"y": X},
    ),
    "config_enumerate": Habit(lambda: switching, switching_truth, {"x": X}),
    "config_enumerate of a PyroModule": Habit(lambda: config_enumerate(Switching()), switching_truth, {"x": X}),
    "config_enumerate of forward": Habit(Switching, switching_truth, {"x": X}),
    "config_enumerate of a method": Habit(lambda: Switching().model, switching_truth, {"x": X}),
    "infer=": Habit(lambda: marked, switching_truth, {"x": X}),
    "a partial": Habit(lambda: partial(with_noise, noise=0.5), fixed_noise_truth, {"x": X}),
    "rows of a plate, obs=None": Habit(lambda: rows_of_a_plate, rows_truth, {"x": X}, {"inputs": INPUTS}),
    "lifted parameters": Habit(
        lambda: poutine.lift(learned, prior={"loc": dist.Normal(0.0, 1.0), "scale": dist.LogNormal(0.0, 1.0)}),
        lifted_truth,
        {"x": X},
    ),
    "a sequential plate": Habit(lambda: columns, columns_truth, {"x_0": X, "x_1": 2 * X}),
    "pyro.markov": Habit(lambda: chain, chain_truth, {f"x_{t}": X for t in range(3)}),
    "a PyroSample that depends on another": Habit(Hierarchy, hierarchy_truth, {"x": X}, {"inputs": INPUTS}),
}
