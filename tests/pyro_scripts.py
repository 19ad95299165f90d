"""Ordinary Pyro models as their users write them, and where each of their sites has its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.ops.indexing import Vindex
from torch import Tensor, nn

from calibrant.program import Program

To = Callable[[Tensor], Tensor]


@dataclass
class Script:
    """A model, what it is called with for n data, and how its values differ from those with the data first.

    `moved` takes a value of a site, data first, to where the model has it; `names` are sites of the model whose names
    in the program differ.
    """

    build: Callable[[], Program]
    call: Callable[[int], tuple[Any, ...]]
    plate: str | None = None
    moved: Mapping[str, To] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    size: int = 7


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.get_default_dtype())


def whole(*shape: int, below: int = 3) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(6))


SCRIPTS: dict[str, Script] = {}


def logistic(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", x.shape[0]):
        return pyro.sample("y", dist.Bernoulli(logits=x @ w + b), obs=y)


SCRIPTS["logistic regression"] = Script(lambda: logistic, lambda n: (drawn(n, 3), whole(n, below=2).to(drawn(1))))

# -- two plates --------------------------------------------------------------------------------------------------------


def dawid_skene(ratings):
    """Annotators in the dimension to the left of the items; each has a confusion matrix."""
    annotators, items = ratings.shape
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("annotators", annotators, dim=-2):
        confusion = pyro.sample("confusion", dist.Dirichlet(0.5 + 3 * torch.eye(3)).to_event(1))
    with pyro.plate("items", items, dim=-1):
        true = pyro.sample("true", dist.Categorical(share), infer={"enumerate": "parallel"})
        with pyro.plate("raters", annotators, dim=-2):
            rates = Vindex(confusion)[torch.arange(annotators)[:, None], 0, true, :]
            pyro.sample("rating", dist.Categorical(rates), obs=ratings)


SCRIPTS["Dawid-Skene, items to the right"] = Script(
    lambda: dawid_skene, lambda n: (whole(4, n),), "items", {"rating": lambda v: v.T}
)


def dawid_skene_left(ratings, raters, K=3):
    """Items in the dimension to the left of their ratings, each by another annotator."""
    share = pyro.sample("share", dist.Dirichlet(torch.ones(K)))
    with pyro.plate("annotator", 5):
        confusion = pyro.sample("confusion", dist.Dirichlet(0.5 + 3 * torch.eye(K)).to_event(1))
    with pyro.plate("item", ratings.shape[0], dim=-2):
        true = pyro.sample("true", dist.Categorical(share))
        with pyro.plate("position", ratings.shape[1]):
            pyro.sample("rating", dist.Categorical(Vindex(confusion)[raters, true, :]), obs=ratings)


SCRIPTS["Dawid-Skene, items to the left"] = Script(
    lambda: config_enumerate(dawid_skene_left),
    lambda n: (whole(n, 4), whole(n, 4, below=5)),
    "item",
    {"true": lambda v: v[:, None]},
)


def mixed_effects(group, x, y=None):
    groups = len(torch.unique(group))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", groups):
        level = pyro.sample("level", dist.Normal(0.0, spread))
    with pyro.plate("rows", len(x)):
        mean = pyro.deterministic("mean", level[group] + slope * x)
        pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


SCRIPTS["mixed effects"] = Script(lambda: mixed_effects, lambda n: (torch.arange(n) % 3, drawn(n), drawn(n + 1)[1:]))


def measured_twice(y):
    """Persons to the right, measurements to the left, with a scale for each measurement."""
    times, persons = y.shape
    with pyro.plate("times", times, dim=-2):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
    with pyro.plate("persons", persons, dim=-1):
        level = pyro.sample("level", dist.StudentT(4.0, 0.0, 2.0))
        with pyro.plate("again", times, dim=-2):
            pyro.sample("y", dist.LogNormal(level, scale), obs=y)


SCRIPTS["several measurements of a person"] = Script(
    lambda: measured_twice, lambda n: (drawn(3, n).exp(),), "persons", {"y": lambda v: v.T}
)


def factor_analysis(x):
    rows, columns = x.shape
    with pyro.plate("columns", columns, dim=-1):
        loading = pyro.sample("loading", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        centre = pyro.sample("centre", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", rows, dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("entries", columns, dim=-1):
            pyro.sample("x", dist.Normal((z * loading).sum(-1) + centre, 0.5), obs=x)


SCRIPTS["factor analysis"] = Script(
    lambda: factor_analysis, lambda n: (drawn(n, 4),), "rows", {"z": lambda v: v[:, None]}
)


def two_plates_of_the_data(x, y=None):
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("latents", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, spread))
    with pyro.plate("observations", len(x)):
        pyro.sample("y", dist.Normal(z + x, 1.0), obs=y)


SCRIPTS["two plates of the same data"] = Script(
    lambda: two_plates_of_the_data, lambda n: (drawn(n), drawn(n + 1)[1:]), "observations"
)


# -- one plate ---------------------------------------------------------------------------------------------------------


def schools(sigma, effect=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, sigma), obs=effect)


EFFECTS = (
    torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18]),
    torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12]),
)


def _schools(n: int) -> tuple[Tensor, Tensor]:
    return tuple(part.to(drawn(1)) for part in EFFECTS)  # type: ignore[return-value]


SCRIPTS["eight schools"] = Script(lambda: schools, _schools, size=8)
SCRIPTS["eight schools, reparam"] = Script(
    lambda: poutine.reparam(schools, config={"theta": LocScaleReparam(0.0)}), _schools, size=8
)
SCRIPTS["eight schools, condition"] = Script(
    lambda: pyro.condition(schools, {"effect": _schools(8)[1]}), lambda n: _schools(n)[:1], size=8
)


def counts(exposure, rows, batch, y=None):
    """Minibatches by subsample_size, in the way of Pyro's tutorials."""
    with pyro.plate("rows", rows, subsample_size=batch) as index:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Poisson(rate * exposure[index]), obs=None if y is None else y[index])


SCRIPTS["Poisson with exposure, subsample_size"] = Script(
    lambda: counts, lambda n: (1 + drawn(n).abs(), n, n, whole(n).to(drawn(1)))
)


def beta_binomial(trials, successes):
    a = pyro.sample("a", dist.HalfNormal(3.0))
    with pyro.plate("units", successes.shape[0]):
        p = pyro.sample("p", dist.Beta(1.0 + a, 2.0))
        pyro.sample("k", dist.Binomial(trials, p), obs=pyro.subsample(successes, event_dim=0))


SCRIPTS["beta-binomial"] = Script(lambda: beta_binomial, lambda n: (3 + whole(n).to(drawn(1)), whole(n).to(drawn(1))))


@config_enumerate(default="parallel")
def mixture(data, components=2):
    weights = pyro.sample("weights", dist.Dirichlet(torch.full((components,), 0.5)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
    with pyro.plate("components", components):
        locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
    with pyro.plate("data", len(data)):
        which = pyro.sample("which", dist.Categorical(weights))
        pyro.sample("obs", dist.Normal(locs[which], scale), obs=data)


SCRIPTS["a mixture, enumerated"] = Script(lambda: mixture, lambda n: (drawn(n),))


def hidden_markov(series):
    with pyro.plate("states", 3):
        move = pyro.sample("move", dist.Dirichlet(0.2 + torch.eye(3)[0]))
    with pyro.plate("series", series.shape[0], dim=-2):
        state = torch.zeros((), dtype=torch.long)
        channels = pyro.plate("channels", series.shape[-1], dim=-1)
        for t in pyro.markov(range(series.shape[1])):
            state = pyro.sample(f"state_{t}", dist.Categorical(move[state]), infer={"enumerate": "parallel"})
            with channels:
                pyro.sample(f"y_{t}", dist.Normal(state.to(series.dtype), 0.5), obs=series[:, t])


SCRIPTS["a hidden Markov model"] = Script(
    lambda: hidden_markov, lambda n: (drawn(n, 3, 2),), "series", {f"state_{t}": lambda v: v[:, None] for t in range(3)}
)


def missing(x, seen, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y, obs_mask=seen)


SCRIPTS["missing data, obs_mask="] = Script(
    lambda: missing,
    lambda n: (drawn(n), torch.arange(n) % 3 > 0, drawn(n + 1)[1:]),
    names={"y_observed": "y"},
)


def masked_series(length, y=None):
    """Series of different lengths, in an outer plate of steps."""
    with pyro.plate("series", len(length), dim=-1):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("steps", 4, dim=-2), poutine.mask(mask=torch.arange(4)[:, None] < length):
            pyro.sample("y", dist.Normal(level, 0.5), obs=y)


SCRIPTS["series of different lengths, poutine.mask"] = Script(
    lambda: masked_series, lambda n: (1 + whole(n), drawn(4, n)), "series", {"y": lambda v: v.T}
)


class TutorialVAE(nn.Module):
    """A decoder that pyro.module registers, as in Pyro's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Sequential(nn.Linear(2, 5), nn.Softplus(), nn.Linear(5, 16), nn.Sigmoid())
        self.to(torch.get_default_dtype())

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = x.new_zeros(x.shape[0], 2), x.new_ones(x.shape[0], 2)
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            image = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(image).to_event(1), obs=x.reshape(-1, 16))
            return image


SCRIPTS["a VAE"] = Script(lambda: TutorialVAE().model, lambda n: ((drawn(n, 4, 4) > 0).to(drawn(1)),))


def with_parameters() -> Program:
    decoder = nn.Linear(2, 3).to(torch.get_default_dtype())

    def model(x):
        pyro.module("net", decoder)
        scale = pyro.param("scale.of.x", lambda: torch.tensor([0.5, 1.0, 2.0]), constraint=dist.constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), scale).to_event(1), obs=x)

    return model


SCRIPTS["pyro.param, and a module outside"] = Script(with_parameters, lambda n: (drawn(n, 3),))


class Regression(PyroModule):
    """Random weights, and a parameter of a module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
        self.noise = PyroParam(torch.tensor(0.7), dist.constraints.positive)
        self.to(torch.get_default_dtype())

    def forward(self, x, y=None):
        mean = self.linear(x).squeeze(-1)
        with pyro.plate("data", x.shape[0]):
            return pyro.sample("obs", dist.Normal(mean, self.noise), obs=y)


SCRIPTS["a PyroModule with random weights"] = Script(lambda: Regression(), lambda n: (drawn(n, 3), drawn(n)))


def weighted(penalty, weight, y=None):
    with pyro.plate("rows", len(weight)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wish", -penalty * z**2)
        with poutine.scale(scale=weight):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)


SCRIPTS["poutine.scale and pyro.factor"] = Script(
    lambda: partial(weighted, 0.3), lambda n: (1 + drawn(n).abs(), drawn(n + 1)[1:])
)
