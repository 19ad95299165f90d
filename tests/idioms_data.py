"""Programs that take or hold their data, and each after the remedy that its refusal prints."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from idioms import BINARY, INPUTS, SEEN, SIZE, Idiom, X, of
from pyro.nn import PyroModule
from refused import conjugate
from torch import nn
from torch.distributions import Bernoulli, Beta, Normal

from calibrant.program import Program

IDIOMS: dict[str, Idiom] = {}

# -- data as the first argument ----------------------------------------------------------------------------------------


def regression_of_data(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def regression(size, x):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", size):
        pyro.sample("y", dist.Normal(x @ w, 1.0))


def regression_truth(v, c):
    return Normal(0, 1).log_prob(v["w"]).sum() + Normal(c["x"] @ v["w"], 1).log_prob(v["y"]).sum()


IDIOMS["model(x, y=None) with the covariates x"] = Idiom(
    of(regression_of_data),
    ("takes (x, y)", "def model(size, x)", "no obs=", "observed={site", "covariates={argument"),
    of(regression),
    regression_truth,
    {"y": X},
    {"x": INPUTS},
    {"x": INPUTS},
    reference=True,
)
IDIOMS["model(x, y=None) without covariates"] = Idiom(
    of(regression_of_data),
    ("takes (x, y)", "def model(size)", "covariates={argument"),
    of(regression),
    regression_truth,
    {"y": X},
    {"x": INPUTS},
)


def data_alone(data):
    fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
    for i in range(len(data)):
        pyro.sample(f"toss_{i}", dist.Bernoulli(fairness), obs=data[i])


def tosses_in_a_loop(size):
    fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
    for i in range(size):
        pyro.sample(f"toss_{i}", dist.Bernoulli(fairness))


def tosses(size):
    fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
    with pyro.plate("data", size):
        pyro.sample("toss", dist.Bernoulli(fairness))


def tosses_truth(v, c):
    return Beta(10.0, 10.0).log_prob(v["fairness"]) + Bernoulli(v["fairness"]).log_prob(v["toss"]).sum()


IDIOMS["data that a loop goes through"] = Idiom(
    of(data_alone),
    ("takes (data)", "def model(size)", 'pyro.plate("data", size)', "no obs="),
    of(tosses),
    tosses_truth,
    {"toss": BINARY[:, 0]},
)
IDIOMS["a loop over the data"] = Idiom(
    of(tosses_in_a_loop),
    ("toss_3", "all data at one site", 'pyro.plate("data", size)'),
    of(tosses),
    tosses_truth,
    {"toss": BINARY[:, 0]},
    reference=True,
)


def no_argument():
    fairness = pyro.sample("fairness", dist.Beta(10.0, 10.0))
    with pyro.plate("data", SIZE):
        pyro.sample("toss", dist.Bernoulli(fairness), obs=BINARY[:, 0])


IDIOMS["no argument"] = Idiom(
    of(no_argument), ("takes ()", "def model(size)"), of(tosses), tosses_truth, {"toss": BINARY[:, 0]}
)


class Autoencoder(nn.Module):
    """A model that is a method of a module, as in Pyro's tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.Linear(2, 3)
        with torch.no_grad():
            self.decoder.weight.copy_(torch.linspace(-1.0, 2.0, 6).reshape(3, 2))
            self.decoder.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), x.new_ones(len(x), 2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def sized(self, size):
        pyro.module("decoder", self.decoder)
        self.without_module(size)

    def without_module(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(size, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1))


def decoded() -> Program:
    return Autoencoder().without_module


def decoded_truth(v, c):
    logits = v["z"] @ torch.linspace(-1.0, 2.0, 6).reshape(3, 2).T + torch.tensor([0.1, -0.2, 0.3])
    return Normal(0, 1).log_prob(v["z"]).sum() + Bernoulli(logits=logits).log_prob(v["x"]).sum()


IDIOMS["vae.model(x)"] = Idiom(
    lambda: Autoencoder().model,
    ("takes (x)", "'shape'", "def model(self, size)"),
    decoded,
    decoded_truth,
    {"x": BINARY},
)
IDIOMS["pyro.module in a method"] = Idiom(
    lambda: Autoencoder().sized,
    ("['decoder']", "leave the call out"),
    decoded,
    decoded_truth,
    {"x": BINARY},
    reference=True,
)


def function_with_module():
    decoder = Autoencoder().decoder

    def model(size):
        pyro.module("decoder", decoder)
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(size, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1))

    return model


class WithModule(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.decoder = Autoencoder().decoder

    def forward(self, size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(size, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1))


IDIOMS["pyro.module in a function"] = Idiom(
    function_with_module,
    ("['decoder']", "attributes of the program", "__init__ of its PyroModule"),
    WithModule,
    decoded_truth,
    {"x": BINARY},
)

# -- values inside the program -----------------------------------------------------------------------------------------


def obs_of_an_argument(size, x=None):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def conjugate_truth(v, c):
    return Normal(0, 1).log_prob(v["z"]).sum() + Normal(v["z"], 0.5).log_prob(v["x"]).sum()


IDIOMS["obs= of an argument"] = Idiom(
    of(obs_of_an_argument),
    ("takes (size, x)", "def model(size)", "no obs="),
    of(conjugate),
    conjugate_truth,
    {"x": X},
)


def obs_of_a_covariate(size, seen_x):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=seen_x)


IDIOMS["obs= of a covariate"] = Idiom(
    of(obs_of_a_covariate),
    ("'x'", "obs= or pyro.condition", "observed={'x'"),
    of(conjugate),
    conjugate_truth,
    {"x": X},
    wrong={"seen_x": X},
)
IDIOMS["pyro.condition on the data"] = Idiom(
    lambda: pyro.condition(conjugate, data={"x": X}),
    ("'x'", "obs= or pyro.condition", "observed={'x'"),
    of(conjugate),
    conjugate_truth,
    {"x": X},
)


def two_levels(size):
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, spread))
        pyro.sample("x", dist.Normal(z, 0.5))


def one_level(size):
    spread = torch.tensor(1.0)
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, spread))
        pyro.sample("x", dist.Normal(z, 0.5))


IDIOMS["pyro.condition on a latent"] = Idiom(
    lambda: pyro.condition(two_levels, data={"spread": torch.tensor(1.0)}),
    ("'spread'", "takes the place of its pyro.sample"),
    of(one_level),
    conjugate_truth,
    {"x": X},
    reference=True,
)


def obs_and_mask(size, x_seen, seen):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x_seen, obs_mask=seen)


def mask_alone(size, seen):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(m, 1.0), obs_mask=seen)


def masked(size, seen):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(m, 1.0).mask(seen))


def masked_truth(v, c):
    return Normal(0, 1).log_prob(v["m"]) + Normal(v["m"], 1.0).log_prob(v["x"])[c["seen"]].sum()


_MASK_WORDS = ("site 'x'", "leave out obs= and obs_mask=", ".mask(seen)", "observed={'x'")
IDIOMS["obs= and obs_mask="] = Idiom(
    of(obs_and_mask),
    _MASK_WORDS,
    of(masked),
    masked_truth,
    {"x": X},
    {"seen": SEEN},
    {"x_seen": X, "seen": SEEN},
    reference=True,
)
IDIOMS["obs_mask= alone"] = Idiom(
    of(mask_alone), _MASK_WORDS, of(masked), masked_truth, {"x": X}, {"seen": SEEN}, {"seen": SEEN}
)
