"""Programs whose weights, modules or data depend on what they must not, and the words of their refusal."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from refused import (  # noqa
    IMAGES,
    Case,
    X,
    conjugate,
    decoder_of,
    in_eval,
    module,
    plain,
    random_weight,
    tensor_attribute,
    through_decoder,
    weight,
)
from torch import nn
from torch.distributions import constraints

from calibrant.program import Program

# -- parameters, buffers, modes ----------------------------------------------------------------------------------------


def calls_param(size):
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(loc, 1.0))


def method_calls_param(self, size):
    loc = pyro.param("loc", torch.zeros(()))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(loc, 1.0))


def calls_module(self, size):
    pyro.module("decoder", self.decoder)
    through_decoder(self, size)


def late_parameter(self, size):
    if not hasattr(self, "loc"):
        self.loc = nn.Parameter(torch.zeros(()))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(self.loc, 1.0))


class LatePyroParam(PyroModule):
    @PyroParam(constraint=constraints.positive)
    def scale(self):
        return torch.ones(())

    def forward(self, size):
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(0.0, self.scale))


def deep_tensor_attribute() -> dict:
    decoder = nn.Linear(2, 1)
    decoder.gain = torch.ones(())
    return {"decoder": decoder}


def listed_modules(self, size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(self.layers[0](z).squeeze(-1), 1.0))


def listed_weights(self, size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + self.weights[0], 1.0))


def outer_module() -> Program:
    decoder = nn.Linear(2, 1)

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).squeeze(-1), 1.0))

    return program


def outer_weight() -> Program:
    loc = nn.Parameter(torch.zeros(()))

    def program(size):
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(loc, 1.0))

    return program


MODULES = {
    "pyro.param in a function": Case(plain(calls_param), ("['loc']", "nn.Parameter", "__init__")),
    "pyro.param in a module": Case(module(dict, method_calls_param), ("['loc']", "nn.Parameter", "__init__")),
    "pyro.module": Case(
        module(decoder_of(), calls_module), ("['decoder']", "pyro.module", "leave the call out", "__init__")
    ),
    "parameter of the first run": Case(module(dict, late_parameter), ("['loc']", "create them in __init__")),
    "PyroParam of the first run": Case(LatePyroParam, ("['scale_unconstrained']", "create them in __init__")),
    "lazy module": Case(
        module(lambda: {"decoder": nn.LazyLinear(1)}, through_decoder), ("'decoder.weight'", "without lazy modules")
    ),
    "tensor attribute": Case(
        module(lambda: {"centre": torch.zeros(())}, tensor_attribute), ("'centre'", 'register_buffer("centre"')
    ),
    "tensor attribute of a part": Case(
        module(deep_tensor_attribute, through_decoder), ("'decoder.gain'", 'register_buffer("gain"')
    ),
    "BatchNorm in training mode": Case(
        module(decoder_of(lambda: nn.BatchNorm1d(3)), through_decoder), ("'decoder.1'", "training mode", ".eval()")
    ),
    "BatchNorm without statistics": Case(
        in_eval(module(decoder_of(lambda: nn.BatchNorm1d(3, track_running_stats=False)), through_decoder)),
        ("'decoder.1'", "batch statistics in eval()", "running statistics"),
    ),
    "dropout in training mode": Case(
        module(decoder_of(lambda: nn.Dropout(0.5)), through_decoder), ("'decoder.1'", "training mode", ".eval()")
    ),
    "modules in a list": Case(
        module(lambda: {"layers": [nn.Linear(2, 1)]}, listed_modules), ("float64", "parameters and buffers")
    ),
    "weights in a list": Case(
        module(lambda: {"weights": [nn.Parameter(torch.zeros(()))]}, listed_weights),
        ("no parameters", "nn.ParameterList"),
    ),
    "module around a function": Case(outer_module, ("float64", "parameters and buffers")),
    "weight around a function": Case(outer_weight, ("no parameters", "attributes of a PyroModule")),
    "no model": Case(lambda: "ea-vae", ("PyroModule or a function", "str")),
    "a class": Case(lambda: LatePyroParam, ("LatePyroParam is a class", "give an instance")),
    "a module without forward": Case(nn.Module, ("Module has no forward", "its .model")),
    "no size": Case(plain(lambda: None), ("number of data as its first argument",)),
    "unnamed covariates": Case(plain(lambda size, **labels: conjugate(size)), ("**labels", "name each covariate")),
    "observations as an argument": Case(
        plain(lambda x: conjugate(x.shape[0])),
        ("takes (x)", "'int' object has no attribute 'shape'", "def model(size)", "no obs=", "observed={"),
    ),
    "a bad scale": Case(
        plain(lambda size: pyro.sample("x", dist.Normal(0.0, -1.0))), ("does not run for 3 data", "scale")
    ),
}

# -- independence ------------------------------------------------------------------------------------------------------


def own_batch_statistics(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(), 1.0))


def neighbours(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.roll(1), 1.0))


def size_in_the_density(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(0.0, float(size)))


def index_in_the_density(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(torch.arange(float(size)), 1.0))


def special_case_of_one(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(0.0 if size > 1 else 1.0, 1.0))


def hidden_noise(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(torch.randn(size), 1.0))


def hidden_site(size):
    with poutine.block(hide=["z"]), pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def factor_over_data(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))
    pyro.factor("total", -z.sum().square())


def masked_prior_of_shared(size):
    with poutine.mask(mask=torch.ones(size, dtype=torch.bool)):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(w, 1.0))


def recorded_over_data(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("centred", z - z.mean())
        pyro.sample("x", dist.Normal(z, 1.0))


def summary_over_data(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))
    pyro.deterministic("mean", z.mean())


def changed_in_place(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.clamp_(min=0.0), 1.0))


def shared_changed_in_place(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    w.exp_()
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(w, 1.0))


def mask_of_the_event(size):
    with pyro.plate("data", size), poutine.mask(mask=torch.ones(4, size, dtype=torch.bool)):
        pyro.sample("x", dist.Normal(0.0, 1.0))


INDEPENDENCE = {
    "batch statistics": Case(plain(own_batch_statistics), ("'x'", "that datum", "shared latents")),
    "neighbours": Case(plain(neighbours), ("'x'", "permuting the data")),
    "size in the density": Case(plain(size_in_the_density), ("'x'", "doubling the data")),
    "index in the density": Case(plain(index_in_the_density), ("'x'", "permuting the data")),
    "one datum is special": Case(plain(special_case_of_one), ("'x'", "taking one datum alone")),
    "hidden noise": Case(plain(hidden_noise), ("'x'", "running it again")),
    "hidden site": Case(plain(hidden_site), ("'x'", "running it again")),
    "factor over the data": Case(plain(factor_over_data), ("'total'", "outside the plate does not depend on the data")),
    "mask of data around a shared latent": Case(plain(masked_prior_of_shared), ("'w'", "is masked")),
    "recorded over the data": Case(plain(recorded_over_data), ("'centred'", "what is recorded for it")),
    "summary over the data": Case(
        plain(summary_over_data), ("'mean'", "outside the plate does not depend on the data")
    ),
    "latent changed in place": Case(plain(changed_in_place), ("'z'", "in place", "clone")),
    "shared latent changed in place": Case(plain(shared_changed_in_place), ("'w'", "in place", "clone")),
    "mask beyond the data": Case(plain(mask_of_the_event), ("'x'", "(4, 8)", "wanted (8,)", ".mask(")),
}
