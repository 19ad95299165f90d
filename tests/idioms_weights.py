"""Programs with weights, supports or records of another kind, and each after the remedy that its refusal prints."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from idioms import INPUTS, Idiom, X, of
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, SplitReparam
from pyro.infer.reparam.strategies import AutoReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import Beta, Binomial, Categorical, LogNormal, Normal

from calibrant.program import Program

IDIOMS: dict[str, Idiom] = {}

# -- weights -----------------------------------------------------------------------------------------------------------


class RandomLayer(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 1)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.layer.bias = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))


class ReadInThePlate(RandomLayer):
    def forward(self, size, x):
        with pyro.plate("data", size):
            pyro.sample("y", dist.Normal(self.layer(x).squeeze(-1), 1.0))


class ReadBeforeThePlate(RandomLayer):
    def forward(self, size, x):
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("data", size):
            pyro.sample("y", dist.Normal(mean, 1.0))


def layer_truth(v, c):
    prior = Normal(0, 1).log_prob(v["layer.weight"]).sum() + Normal(0, 1).log_prob(v["layer.bias"]).sum()
    mean = (c["x"] @ v["layer.weight"].T + v["layer.bias"]).squeeze(-1)
    return prior + Normal(mean, 1.0).log_prob(v["y"]).sum()


IDIOMS["PyroSample read in the plate"] = Idiom(
    ReadInThePlate,
    ("'layer.weight'", "once before the plate", "call its layer there"),
    ReadBeforeThePlate,
    layer_truth,
    {"y": X},
    {"x": INPUTS},
    {"x": INPUTS},
)


class ForwardOfData(RandomLayer):
    def forward(self, x, y=None):
        mean = self.layer(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


IDIOMS["forward(x, y=None) of a PyroModule"] = Idiom(
    ForwardOfData,
    ("takes (x, y)", "def model(self, size, x)"),
    ReadBeforeThePlate,
    layer_truth,
    {"y": X},
    {"x": INPUTS},
    {"x": INPUTS},
)


def parameters_of_pyro(size):
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("x", dist.Normal(z, 1.0))


class Parameters(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.5))
        self.scale = PyroParam(torch.tensor(1.5), constraint=dist.constraints.positive)

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(self.loc, self.scale))
            pyro.sample("x", dist.Normal(z, 1.0))


IDIOMS["pyro.param"] = Idiom(
    of(parameters_of_pyro),
    ("['loc', 'scale']", "PyroModule", "self.loc = nn.Parameter(tensor)", "PyroParam(tensor, constraint=...)"),
    Parameters,
    lambda v, c: Normal(0.5, 1.5).log_prob(v["z"]).sum() + Normal(v["z"], 1.0).log_prob(v["x"]).sum(),
    {"x": X},
    reference=True,
)


def schools(size):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", size):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0))


def decentred() -> Program:
    return poutine.reparam(schools, config={"theta": LocScaleReparam(0.0)})


def schools_truth(v, c):
    shared = Normal(0, 5).log_prob(v["mu"]) + LogNormal(0.0, 1.0).log_prob(v["tau"])
    theta = v["mu"] + v["tau"] * v["theta_decentered"]
    return shared + Normal(0, 1).log_prob(v["theta_decentered"]).sum() + Normal(theta, 1.0).log_prob(v["y"]).sum()


for _name, _config in {
    "a learned LocScaleReparam": {"theta": LocScaleReparam()},
    "AutoReparam": AutoReparam(),
}.items():
    IDIOMS[_name] = Idiom(
        lambda config=_config: poutine.reparam(schools, config=config),
        ("theta_centered", "a dict of latents alone", "LocScaleReparam(0.0)"),
        decentred,
        schools_truth,
        {"y": X},
    )


def two_centres(size):
    mu = pyro.sample("mu", dist.Normal(torch.zeros(2), 5.0).to_event(1))
    with pyro.plate("data", size):
        pyro.sample("y", dist.Normal(mu.sum(), 1.0))


IDIOMS["SplitReparam"] = Idiom(
    lambda: poutine.reparam(two_centres, config={"mu": SplitReparam([1, 1], -1)}),
    ("'mu'", "SplitReparam", "leave it out of poutine.reparam"),
    of(two_centres),
    lambda v, c: Normal(0, 5).log_prob(v["mu"]).sum() + Normal(v["mu"].sum(), 1.0).log_prob(v["y"]).sum(),
    {"y": X},
)
IDIOMS["an observed site in reparam"] = Idiom(
    lambda: poutine.reparam(schools, config={"theta": LocScaleReparam(0.0), "y": LocScaleReparam(0.0)}),
    ("'y' is deterministic", "no observed site in the config of poutine.reparam"),
    decentred,
    schools_truth,
    {"y": X},
)

# -- supports, recorded values -----------------------------------------------------------------------------------------


def moving_latent(size):
    with pyro.plate("data", size):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(torch.zeros(size), top))
        pyro.sample("x", dist.Normal(z, 1.0))


def moved_latent(size):
    with pyro.plate("data", size):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        z = top * pyro.sample("share", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


IDIOMS["a latent on a moving support"] = Idiom(
    of(moving_latent),
    ("'z'", "sample it on a fixed support and transform it"),
    of(moved_latent),
    lambda v, c: (
        LogNormal(0.0, 1.0).log_prob(v["top"]).sum() + Normal(v["top"] * v["share"], 1.0).log_prob(v["x"]).sum()
    ),
    {"x": X},
)


def tank(size):
    top = pyro.sample("top", dist.LogNormal(1.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Uniform(0.0, top))


def tank_with_noise(size):
    top = pyro.sample("top", dist.LogNormal(1.0, 1.0))
    with pyro.plate("data", size):
        share = pyro.sample("share", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Normal(top * share, 0.1))


IDIOMS["an observation on a moving support"] = Idiom(
    of(tank),
    ("'x'", "a latent on a fixed support", "observe the result with some noise", "dist.Normal(result, noise)"),
    of(tank_with_noise),
    lambda v, c: LogNormal(1.0, 1.0).log_prob(v["top"]) + Normal(v["top"] * v["share"], 0.1).log_prob(v["x"]).sum(),
    {"x": X.abs()},
)
COUNTS = 6


def caught_of_unknown(size):
    rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    with pyro.plate("data", size):
        count = pyro.sample("count", dist.Categorical(torch.ones(COUNTS)))
        pyro.sample("x", dist.Binomial(count.float(), rate))


def table(rate: Tensor) -> Tensor:
    """Probabilities of each number caught (columns) of each number present (rows)."""
    impossible = torch.full_like(rate, 1e-6)
    rows = [
        torch.stack(
            [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) if k <= n else impossible for k in range(COUNTS)]
        )
        for n in range(COUNTS)
    ]
    return torch.stack(rows)


def caught_of_a_table(size):
    rate = pyro.sample("rate", dist.Beta(2.0, 2.0))
    with pyro.plate("data", size):
        count = pyro.sample("count", dist.Categorical(torch.ones(COUNTS)))
        pyro.sample("x", dist.Categorical(table(rate)[count]))


def caught_truth(v, c):
    total, x = v["count"], v["x"]
    possible = Binomial(total.double(), v["rate"], validate_args=False).log_prob(x.double())
    assert (x <= total).all()
    return Beta(2.0, 2.0).log_prob(v["rate"]) + Categorical(torch.ones(COUNTS)).log_prob(total).sum() + possible.sum()


IDIOMS["a count of an unknown number"] = Idiom(
    of(caught_of_unknown),
    ("'x'", "dist.Categorical over every value", "1e-6"),
    of(caught_of_a_table),
    caught_truth,
    {"x": torch.tensor([0, 1, 2, 1, 3, 0, 1, 2])},
)


def recorded_sum(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.deterministic("v", 2 * w)
        pyro.sample("x", dist.Normal(w, 1.0))


def recorded_before(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("v", 2 * w)
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(w, 1.0))


def recorded_first(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.deterministic("pair", torch.stack([z, -z]))
        pyro.sample("x", dist.Normal(z, 1.0))


def recorded_last(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.deterministic("pair", torch.stack([z, -z], -1))
        pyro.sample("x", dist.Normal(z, 1.0))


IDIOMS["what all data share, recorded in the plate"] = Idiom(
    of(recorded_sum),
    ("'v'", "what all share before the plate"),
    of(recorded_before),
    lambda v, c: Normal(0, 1).log_prob(v["w"]) + Normal(v["w"], 1.0).log_prob(v["x"]).sum(),
    {"x": X},
)
IDIOMS["several values, recorded along the first dimension"] = Idiom(
    of(recorded_first),
    ("'pair'", "torch.stack(..., -1)"),
    of(recorded_last),
    lambda v, c: (
        Normal(0, 1).log_prob(v["w"])
        + Normal(v["w"], 1).log_prob(v["z"]).sum()
        + Normal(v["z"], 1).log_prob(v["x"]).sum()
    ),
    {"x": X},
)
