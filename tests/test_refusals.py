"""Everything that breaks the contract is refused: by name, with the remedy, and before anything is computed with it."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import SoftplusTransform
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.distributions import AffineTransform, constraints

import calibrant as cal
from calibrant.errors import CalibrantError, DataError, InferenceError, ProgramError
from calibrant.program import Program, check_program, log_density, sample_prior, sites

X = {"x": torch.linspace(-1.0, 1.0, 6)}
IMAGES = {"x": torch.linspace(-1.0, 1.0, 12).reshape(6, 2)}


@dataclass
class Case:
    """A program that must be refused, and the words of the refusal."""

    build: Callable[[], Program]
    words: tuple[str, ...]
    error: type[CalibrantError] = ProgramError
    observed: dict[str, Tensor] = field(default_factory=lambda: X)
    covariates: dict[str, Tensor] = field(default_factory=dict)


def conjugate(size):
    """The smallest program that keeps the contract."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))


def plain(program: Program) -> Callable[[], Program]:
    return lambda: program


def module(parts: Callable[[], dict], forward: Callable[..., object]) -> Callable[[], PyroModule]:
    """A builder of a PyroModule with these attributes and this forward."""

    def build() -> PyroModule:
        cls = type("Model", (PyroModule,), {"forward": forward})
        model = cls()
        for name, part in parts().items():
            setattr(model, name, part)
        return model

    return build


# -- observations inside the program, plates, shapes -------------------------------------------------------------------


def obs_inside(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.zeros(size))


def conditioned_inside(size):
    pyro.condition(conjugate, data={"x": torch.zeros(size)})(size)


def partly_observed_inside(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        seen = torch.arange(size) % 2 == 0
        pyro.sample("x", dist.Normal(z, 0.5), obs=torch.zeros(size), obs_mask=seen)


def other_plate(size):
    with pyro.plate("batch", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))


def no_plate(size):
    pyro.sample("x", dist.Normal(0.0, 1.0).expand([size]).to_event(1))


def latent_outside(size):
    z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(z, 0.5))


def latent_in_another_plate(size):
    with pyro.plate("items", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(z, 0.5))


def observation_without_event(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(torch.zeros(size, 2), 1.0))


def latent_without_event(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def one_entry_without_event(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(torch.zeros(size, 1), 1.0))


def square_without_event(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(torch.zeros(size, size), 1.0))


def inner_plate(size):
    with pyro.plate("pixels", 2, dim=-2), pyro.plate("data", size):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def outer_plate(size):
    with pyro.plate("data", size, dim=-2), pyro.plate("pixels", 2, dim=-1):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def long_factor(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("penalty", -z[:, None].square().sum(-1).expand(size, 4).T)
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def minibatch(size):
    with pyro.plate("data", 1000, subsample_size=size):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def smaller_minibatch(size):
    with pyro.plate("data", size, subsample_size=max(1, size - 1)):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def shared_minibatch(size):
    with pyro.plate("weights", 10, subsample_size=5):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(w.sum(), 1.0))


def fixed_size(size):
    with pyro.plate("data", 6):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def data_plate_in_sequence(size):
    for datum in pyro.plate("data", size):
        pyro.sample(f"x_{datum}", dist.Normal(0.0, 1.0))


PLATES = {
    "obs= inside": Case(plain(obs_inside), ("'x'", "obs=", "observed={'x'")),
    "condition inside": Case(plain(conditioned_inside), ("'x'", "obs=", "observed={'x'")),
    "obs_mask inside": Case(plain(partly_observed_inside), ("'x_observed'", "obs=")),
    "another plate": Case(plain(other_plate), ("'x'", "plate 'batch'", 'pyro.plate("data", size)')),
    "no plate": Case(plain(no_plate), ("'x'", "no plate", 'pyro.plate("data", size)')),
    "latent outside the plate": Case(
        plain(latent_outside), ("'z'", "data-sized", "(3,) for 3", 'inside pyro.plate("data", size)')
    ),
    "latent in another plate": Case(plain(latent_in_another_plate), ("'z'", "data-sized", 'pyro.plate("data", size)')),
    "observation without to_event": Case(
        plain(observation_without_event), ("'x'", "2 entries", "'data' has 3", ".to_event("), observed=IMAGES
    ),
    "latent without to_event": Case(plain(latent_without_event), ("'z'", "2 entries", "'data' has 3", ".to_event(")),
    "one entry without to_event": Case(
        plain(one_entry_without_event),
        ("'x'", "(3, 3)", "wanted (3,)", ".to_event(1)"),
        observed={"x": torch.zeros(6, 1)},
    ),
    "data-sized event without to_event": Case(
        plain(square_without_event), ("'x'", "(3, 3)", "wanted (3,)", ".to_event(1)"), observed={"x": torch.zeros(3, 3)}
    ),
    "plate around the data plate": Case(plain(inner_plate), ("'x'", "(2, 3)", "wanted (3,)", ".to_event(1)")),
    "data plate around a plate": Case(plain(outer_plate), ("'x'", "dim -2", "wanted -1")),
    "factor beyond the data": Case(plain(long_factor), ("'penalty'", "(4, 3)", "sum its log factor")),
    "plate of the whole data": Case(plain(minibatch), ("'x'", "3 of 1000", "never by subsample_size")),
    "subsample_size": Case(plain(smaller_minibatch), ("'x'", "2 of 3", "never by subsample_size")),
    "subsample_size of weights": Case(plain(shared_minibatch), ("'w'", "5 of 10", "never by subsample_size")),
    "plate of fixed size": Case(plain(fixed_size), ("'data'", "6", 'pyro.plate("data", size)')),
    "sequential plate": Case(plain(data_plate_in_sequence), ("'x_0'", "dim None", "with pyro.plate")),
}

# -- sites -------------------------------------------------------------------------------------------------------------


def changing_sites(size):
    with pyro.plate("data", size):
        if size > 3:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))


def chance_of_a_site(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if z[0] > 0:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def changing_event(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([size + 1]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def twice(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))


def deterministic_observation(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("x", 2 * z)


def point_mass(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Delta(2 * z))
        pyro.sample("x", dist.Normal(c, 1.0))


def recorded_outside(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))
    pyro.deterministic("double", 2 * z)


def recorded_inside(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))
        pyro.deterministic("unit", torch.ones(2))


def moving_bound(size):
    with pyro.plate("data", size):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Uniform(torch.zeros(size), top))
        pyro.sample("x", dist.Normal(z, 1.0))


def moving_floor(size):
    with pyro.plate("data", size):
        floor = pyro.sample("floor", dist.LogNormal(0.0, 1.0))
        z = pyro.sample("z", dist.Pareto(floor[:, None].expand(-1, 2), 3.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def moving_observation(size):
    with pyro.plate("data", size):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(-top, top))


def angle(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.VonMises(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.cos(), 1.0))


def plate_built_twice(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(z, 1.0))


def named(name):
    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample(name, dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    return program


def shifted_exponential(size):
    """Its log_prob below 1 is a finite number without a meaning, where validation is off."""
    with pyro.plate("data", size):
        shifted = dist.TransformedDistribution(dist.Exponential(1.0), [AffineTransform(1.0, 2.0)])
        z = pyro.sample("z", shifted)
        pyro.sample("x", dist.Normal(z, 1.0))


def scaled_uniform(size):
    with pyro.plate("data", size):
        scaled = dist.TransformedDistribution(dist.Uniform(0.0, 1.0).expand([2]), [AffineTransform(-1.0, 2.0)])
        z = pyro.sample("z", scaled.to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def random_weight(self, size):
    weight = self.weight
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(weight, 1.0))


def random_weight_in_plate(self, size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(self.weight, 1.0))


def weight() -> dict:
    return {"weight": PyroSample(dist.Normal(0.0, 1.0))}


SITES = {
    "sites by size": Case(plain(changing_sites), ("['w']", "same sites each time")),
    "sites by chance": Case(plain(chance_of_a_site), ("['w']", "same sites each time")),
    "event by size": Case(plain(changing_event), ("'z'", "(3, 4)", "(5, 6)", "stay the same")),
    "a name twice": Case(plain(twice), ("does not run for 3 data", "Multiple sample sites named 'x'")),
    "unknown observation": Case(
        plain(conjugate), ("never samples 'y'", "['x', 'z']"), observed={"x": torch.zeros(6), "y": torch.zeros(6)}
    ),
    "deterministic conditioned": Case(plain(deterministic_observation), ("'x'", "deterministic", "never conditioned")),
    "point mass": Case(plain(point_mass), ("'c'", "pyro.deterministic('c'")),
    "recorded outside the plate": Case(plain(recorded_outside), ("'double'", "data-sized", 'pyro.plate("data", size)')),
    "recorded without the data": Case(plain(recorded_inside), ("'unit'", "leading dimension is the data")),
    "moving upper bound": Case(plain(moving_bound), ("'z'", "support", "other latents", "transform")),
    "moving lower bound": Case(plain(moving_floor), ("'z'", "support", "other latents", "transform")),
    "moving support of the data": Case(plain(moving_observation), ("'x'", "support", "other latents")),
    "plate built twice": Case(plain(plate_built_twice), ("'data'", 'plate = pyro.plate("data", size)')),
    "name of a result's dimension": Case(plain(named("draw")), ("'draw'", "rename")),
    "name with a slash": Case(plain(named("a/b")), ("'a/b'", "rename")),
    "shifted exponential": Case(plain(shifted_exponential), ("'z'", "no density", "Real()", "transform the value")),
    "scaled uniform": Case(plain(scaled_uniform), ("'z'", "no density", "base distribution")),
    "PyroSample in the plate": Case(
        module(weight, random_weight_in_plate), ("'weight'", "inside the plate", "before the plate")
    ),
}

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


def through_decoder(self, size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(self.decoder(z).squeeze(-1), 1.0))


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


def tensor_attribute(self, size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(self.centre, 1.0))


def deep_tensor_attribute() -> dict:
    decoder = nn.Linear(2, 1)
    decoder.gain = torch.ones(())
    return {"decoder": decoder}


def in_eval(build: Callable[[], PyroModule]) -> Callable[[], PyroModule]:
    return lambda: build().eval()


def decoder_of(*layers: Callable[[], nn.Module]) -> Callable[[], dict]:
    return lambda: {"decoder": nn.Sequential(nn.Linear(2, 3), *(layer() for layer in layers), nn.Linear(3, 1))}


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
        module(decoder_of(), calls_module), ("decoder$$$0.weight", "pyro.module", "submodule in __init__")
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
    "no size": Case(plain(lambda: None), ("number of data as its first argument",)),
    "unnamed covariates": Case(plain(lambda size, **labels: conjugate(size)), ("**labels", "name each covariate")),
    "observations as an argument": Case(
        plain(lambda x: conjugate(x.shape[0])), ("does not run for 3 data", "'int' object has no attribute 'shape'")
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
    "mask of data around a shared latent": Case(plain(masked_prior_of_shared), ("'w'", "outside the plate")),
    "recorded over the data": Case(plain(recorded_over_data), ("'centred'", "what is recorded for it")),
    "summary over the data": Case(
        plain(summary_over_data), ("'mean'", "outside the plate does not depend on the data")
    ),
    "latent changed in place": Case(plain(changed_in_place), ("'z'", "in place", "clone")),
    "shared latent changed in place": Case(plain(shared_changed_in_place), ("'w'", "in place", "clone")),
    "mask beyond the data": Case(plain(mask_of_the_event), ("'x'", "(4, 8)", "wanted (8,)", ".mask(")),
}

# -- data --------------------------------------------------------------------------------------------------------------


def images(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None, None], 1.0).expand([size, 2, 2]).to_event(2))


def binary(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z[:, None].expand(-1, 2)).to_event(1))


def counts(size, trials):
    with pyro.plate("data", size):
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        pyro.sample("x", dist.Binomial(trials, p))


def classes(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.sample("x", dist.Categorical(logits=z))


def labelled(size, label, dose=None):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(label, 1.0))


GREY = torch.zeros(5000, 2)
GREY[4321, 1] = 0.37
LABEL = {"label": torch.zeros(6)}

DATA = {
    "no observations": Case(plain(conjugate), ("no observations", "observed="), DataError, {}),
    "lists": Case(plain(conjugate), ("'x'", "no tensor"), DataError, {"x": [0.0, 1.0]}),
    "a number": Case(plain(conjugate), ("'x'", "leading dimension data"), DataError, {"x": torch.zeros(())}),
    "no data": Case(plain(conjugate), ("'x': 0", "one or more"), DataError, {"x": torch.zeros(0)}),
    "NaN": Case(
        plain(conjugate),
        ("'x'", "not finite at datum 2", "mask"),
        DataError,
        {"x": torch.tensor([0.0, 1.0, torch.nan])},
    ),
    "infinity": Case(
        plain(images),
        ("'x'", "not finite at datum 1"),
        DataError,
        {"x": torch.tensor([0.0, -torch.inf])[:, None, None]},
    ),
    "lengths of observations": Case(
        plain(conjugate), ("'x': 6", "'y': 5", "share the data"), DataError, {**X, "y": torch.zeros(5)}
    ),
    "wrong event shape": Case(
        plain(images), ("'x'", "shape (2, 3) a datum", "samples (2, 2)"), DataError, {"x": torch.zeros(6, 2, 3)}
    ),
    "missing channel": Case(
        plain(images), ("'x'", "shape (1, 2, 2) a datum", "samples (2, 2)"), DataError, {"x": torch.zeros(6, 1, 2, 2)}
    ),
    "event that would broadcast": Case(
        plain(images), ("'x'", "shape (1, 2) a datum", "samples (2, 2)"), DataError, {"x": torch.zeros(6, 1, 2)}
    ),
    "grey values": Case(
        plain(binary), ("'x'", "Bernoulli", "datum 4321", "transform", "likelihood"), DataError, {"x": GREY}
    ),
    "counts beyond their trials": Case(
        plain(counts),
        ("'x'", "Binomial", "datum 3", "support"),
        DataError,
        {"x": torch.tensor([0.0, 2.0, 5.0, 4.0])},
        {"trials": torch.tensor([1.0, 2.0, 5.0, 3.0])},
    ),
    "half a class": Case(plain(classes), ("'x'", "Categorical", "datum 1"), DataError, {"x": torch.tensor([0.0, 1.5])}),
    "a class too many": Case(plain(classes), ("'x'", "Categorical", "datum 1"), DataError, {"x": torch.tensor([0, 3])}),
    "missing covariate": Case(plain(labelled), ("['label']", "covariates="), DataError),
    "unknown covariate": Case(
        plain(labelled), ("['lable']", "['dose', 'label']"), DataError, X, {**LABEL, "lable": torch.zeros(6)}
    ),
    "length of a covariate": Case(
        plain(labelled), ("'label': 5", "share the data"), DataError, X, {"label": torch.zeros(5)}
    ),
    "NaN in a covariate": Case(
        plain(labelled), ("'label'", "not finite at datum 0"), DataError, X, {"label": torch.full((6,), torch.nan)}
    ),
}

CASES = {**PLATES, **SITES, **MODULES, **INDEPENDENCE, **DATA}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused_by_name_with_the_remedy(case):
    with pytest.raises(CalibrantError) as caught:
        check_program(case.build(), case.observed, case.covariates)
    assert type(caught.value) is case.error
    message = str(caught.value)
    assert "\n" not in message
    missing = [word for word in case.words if word not in message]
    assert not missing, f"{missing} not in {message!r}"


def test_refused_whatever_the_users_validation_setting():
    """Pyro's own validation is often switched off for speed; the refusals must not go with it."""
    with pyro.validation_enabled(False):
        for name in ("grey values", "pyro.param in a module", "observation without to_event", "a bad scale"):
            with pytest.raises(CASES[name].error):
                check_program(CASES[name].build(), CASES[name].observed, CASES[name].covariates)


def test_a_refused_model_is_left_as_it_was():
    model = MODULES["BatchNorm in training mode"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ProgramError):
        check_program(model, X)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# -- what the contract allows ------------------------------------------------------------------------------------------


def mixture_of_classes(size):
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 1.0])[k], 1.0))


def semi_supervised(size):
    with pyro.plate("data", size):
        k = pyro.sample("x", dist.Categorical(torch.ones(3)))
        pyro.sample("y", dist.Normal(torch.tensor([-1.0, 0.0, 1.0])[k], 1.0))


def shared_plates(size):
    with pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 2, dim=-1):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(w.sum(), 1.0))


def masked_by_covariate(size, seen):
    with pyro.plate("data", size), poutine.mask(mask=seen):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def masked_entries(size, seen):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([size, 2]).mask(seen).to_event(1))


def nested_events(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)).expand([2]).to_event(1))
        cov = torch.eye(3) / 2 + 0.5
        pyro.sample("x", dist.MultivariateNormal(z, cov).to_event(1))


def improper(size):
    w = pyro.sample("w", dist.ImproperUniform(constraints.positive, (), (2,)))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("x", dist.Normal(z + w.sum(), 1.0))


def with_factors(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.factor("shared", -w.square())
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.factor("each", -z.square())
        pyro.sample("x", dist.Normal(z, 1.0))


def bounded_by_covariate(size, top):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Uniform(torch.zeros_like(top), top))
        pyro.sample("x", dist.Normal(z, 1.0))


def softplus_of_laplace(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.TransformedDistribution(dist.Laplace(0.0, 1.0), [SoftplusTransform()]))
        pyro.sample("x", dist.Normal(z, 1.0))


def observed_angle(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.VonMises(z, 1.0))


def time_series(size):
    """Data that do not factorise are one datum: the steps are event."""
    zero, one = torch.zeros(1), torch.eye(1)
    noise = dist.Normal(zero, 1.0).to_event(1)
    with pyro.plate("data", size):
        pyro.sample("x", dist.GaussianHMM(noise, one, noise, one, noise, duration=5))


def cholesky_factor(size):
    root = pyro.sample("root", dist.LKJCholesky(3, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(3), scale_tril=root))


def direction(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.ProjectedNormal(torch.ones(2)))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def no_latents(size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def recorded(size):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * w)
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(w, 1.0))
        pyro.deterministic("pair", torch.stack([z, -z], -1), event_dim=1)
        pyro.sample("x", dist.Normal(z, 1.0))


SEEN = torch.tensor([True, False, True, True, False, True])
ALLOWED = {
    "a scalar site": Case(plain(conjugate), ()),
    "no latents": Case(plain(no_latents), ()),
    "an observed angle": Case(plain(observed_angle), ()),
    "a latent angle": Case(plain(angle), ()),
    "a time series": Case(plain(time_series), (), observed={"x": torch.randn(2, 5, 1)}),
    "a transformed prior": Case(plain(softplus_of_laplace), ()),
    "a Cholesky factor": Case(plain(cholesky_factor), (), observed={"x": torch.zeros(4, 3)}),
    "a support without a transform": Case(plain(direction), ()),
    "a discrete latent as an index": Case(plain(mixture_of_classes), ()),
    "an observed class as an index": Case(
        plain(semi_supervised), (), observed={"x": torch.tensor([0.0, 2.0, 1.0]), "y": torch.zeros(3)}
    ),
    "an integer class as an index": Case(
        plain(semi_supervised), (), observed={"x": torch.tensor([0, 2, 1]), "y": torch.zeros(3)}
    ),
    "only one of two observations": Case(plain(semi_supervised), (), observed={"y": torch.zeros(3)}),
    "plates of shared latents": Case(plain(shared_plates), ()),
    "masked data": Case(plain(masked_by_covariate), (), covariates={"seen": SEEN}),
    "masked entries": Case(
        plain(masked_entries), (), observed=IMAGES, covariates={"seen": torch.stack([SEEN, ~SEEN], 1)}
    ),
    "nested events": Case(plain(nested_events), (), observed={"x": torch.zeros(4, 2, 3)}),
    "improper priors": Case(plain(improper), ()),
    "factors": Case(plain(with_factors), ()),
    "bounds from a covariate": Case(plain(bounded_by_covariate), (), covariates={"top": torch.arange(1.0, 7.0)}),
    "integer images": Case(plain(images), (), observed={"x": torch.arange(24, dtype=torch.uint8).reshape(6, 2, 2)}),
    "boolean images": Case(plain(binary), (), observed={"x": torch.eye(2, dtype=torch.bool)}),
    "PyroSample before the plate": Case(module(weight, random_weight), ()),
    "PyroParam": Case(
        module(lambda: {"centre": PyroParam(torch.ones(()), constraints.positive)}, tensor_attribute), ()
    ),
    "BatchNorm in eval()": Case(in_eval(module(decoder_of(lambda: nn.BatchNorm1d(3)), through_decoder)), ()),
    "dropout in eval()": Case(in_eval(module(decoder_of(lambda: nn.Dropout(0.5)), through_decoder)), ()),
    "layer norm in training mode": Case(module(decoder_of(lambda: nn.LayerNorm(3)), through_decoder), ()),
    "one datum": Case(plain(conjugate), (), observed={"x": torch.zeros(1)}),
    "an optional covariate": Case(plain(labelled), (), covariates=LABEL),
    "a class that is no PyroModule": Case(
        lambda: type("M", (nn.Module,), {"forward": lambda self, n: conjugate(n)})(), ()
    ),
    "what is recorded": Case(plain(recorded), ()),
    "float64 data": Case(plain(conjugate), (), observed={"x": X["x"].double()}),
}


@pytest.mark.parametrize("case", ALLOWED.values(), ids=ALLOWED)
def test_allowed(case):
    program = check_program(case.build(), case.observed, case.covariates)
    assert isinstance(program, PyroModule)
    latent = sites(program, case.observed, case.covariates)
    assert not set(latent) & set(case.observed)
    check_program(program, case.observed, case.covariates)  # the first check leaves nothing behind


# -- simulation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "name"), [(with_factors, "shared"), (improper, "w")])
def test_what_cannot_be_simulated_has_a_density_and_sites(program, name):
    values = {n: torch.ones(3) for n in ("z", "x")} | {"w": torch.ones(2 if program is improper else ())}
    density = log_density(program, values, observed=["x"])
    assert density.joint.isfinite().all()
    assert {"w", "z"} == set(sites(program, X))
    with pytest.raises(ProgramError, match=f"'{name}'.*can't be simulated"):
        sample_prior(program, 3)


@pytest.mark.parametrize("group", ["prior", "prior_predictive", "posterior_predictive"])
def test_a_factor_is_refused_by_every_group_that_simulates(group):
    def guide(observed, size):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(observed["x"], 1.0))

    with pytest.raises(ProgramError, match=r"factor.*can't be simulated"):
        cal.inference.posterior(with_factors, guide, X, draws=2, groups=[group])
    assert "log_likelihood" in cal.inference.posterior(with_factors, guide, X, draws=2, groups=["log_likelihood"])


# -- values given to log_density ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"x": torch.zeros(3)}, ProgramError, r"\['z'\] are sampled by the program but have no value"),
        ({"x": torch.zeros(3), "z": torch.zeros(3), "y": torch.zeros(3)}, ProgramError, r"never samples \['y'\]"),
        ({"x": torch.zeros(3), "z": torch.zeros(2)}, ProgramError, "give size="),
        ({"x": torch.zeros(3, 1), "z": torch.zeros(3)}, DataError, r"'x' has a value of shape \(3, 1\), wanted \(3,\)"),
        ({"x": torch.zeros(3), "z": torch.zeros(())}, DataError, r"'z' has a value of shape \(\), wanted \(3,\)"),
    ],
)
def test_values_that_do_not_fit_are_named(values, error, match):
    with pytest.raises(error, match=match):
        log_density(conjugate, values)


def test_values_outside_the_support_are_named():
    with pytest.raises(DataError, match=r"'x': Bernoulli can't take this value"):
        log_density(binary, {"z": torch.zeros(3), "x": torch.full((3, 2), 0.5)})


# -- guides ------------------------------------------------------------------------------------------------------------


def normal_guide(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"], 1.0))


def positive(size):
    with pyro.plate("data", size):
        rate = pyro.sample("z", dist.Exponential(1.0))
        pyro.sample("x", dist.Normal(rate, 1.0))


def two_entries(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([4]).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def guide_without_event(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"][:, None].expand(-1, 4), 1.0))


def guide_of_another_site(observed, size):
    with pyro.plate("data", size):
        pyro.sample("y", dist.Normal(observed["x"], 1.0))


def guide_without_plate(observed, size):
    pyro.sample("z", dist.Normal(observed["x"], 1.0).to_event(1))


def guide_with_minibatch(observed, size):
    with pyro.plate("data", 2 * size, subsample_size=size):
        pyro.sample("z", dist.Normal(observed["x"], 1.0))


def guide_that_centres(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"] - observed["x"].mean(), 1.0))


def guide_with_param(observed, size):
    scale = pyro.param("scale", torch.ones(()), constraint=constraints.positive)
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"], scale))


def guide_with_scale(observed, size):
    with poutine.scale(scale=0.5):
        normal_guide(observed, size)


def guide_with_dropout(self, observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(self.dropout(observed["x"]), 1.0))


GUIDES = {
    "support": (positive, plain(normal_guide), ("'z'", "outside the model's support", "choose a family")),
    "event": (two_entries, plain(guide_without_event), ("'z'", ".to_event(")),
    "shape": (two_entries, plain(normal_guide), ("'z'", "(4,)", "(4, 4)")),
    "name": (conjugate, plain(guide_of_another_site), ("['y']", "['z']")),
    "plate": (conjugate, plain(guide_without_plate), ("'z'", "data plate", "not of both")),
    "minibatch": (conjugate, plain(guide_with_minibatch), ("'z'", "subsample_size")),
    "mixing": (conjugate, plain(guide_that_centres), ("'z'", "that datum")),
    "scale": (conjugate, plain(guide_with_scale), ("'z'", "masked or scaled", "not in both")),
    "pyro.param": (conjugate, plain(guide_with_param), ("['scale']", "nn.Parameter")),
    "dropout": (
        conjugate,
        module(lambda: {"dropout": nn.Dropout(0.5)}, guide_with_dropout),
        ("'dropout'", "training mode", ".eval()"),
    ),
}


@pytest.mark.parametrize(("model", "build", "words"), GUIDES.values(), ids=GUIDES)
def test_guide_that_does_not_fit_is_refused(model, build, words):
    observed = {"x": torch.linspace(-1.0, 1.0, 6)}
    with pytest.raises(ProgramError) as caught:
        cal.inference.posterior(model, build(), observed, draws=2)
    message = str(caught.value)
    assert message.startswith("the guide: ")
    assert not [word for word in words if word not in message], message


def test_dropout_of_a_guide_may_stay_in_eval_but_not_be_trained():
    guide, observed = GUIDES["dropout"][1]().eval(), {"x": torch.linspace(-1.0, 1.0, 6)}
    cal.inference.posterior(conjugate, guide, observed, draws=2)
    with pytest.raises(ProgramError, match=r"density of \['z'\] changes from run to run .*p=0"):
        cal.inference.fit(conjugate, guide, observed, epochs=1)
    guide.dropout.p = 0.0
    with pytest.raises(InferenceError, match="nothing to train"):
        cal.inference.fit(conjugate, guide, observed, epochs=1)


# -- before and after the import ---------------------------------------------------------------------------------------

PYRO_FIRST = """
import pyro
from pyro.nn import PyroModule, PyroSample
import pyro.distributions as dist, torch

class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
    def forward(self, size):
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(self.w, 1.0))

early = Model()
import calibrant as cal
late = Model()
cal.program.check_program(late, {"x": torch.zeros(2)})
try:
    cal.program.check_program(early, {"x": torch.zeros(2)})
except cal.errors.ProgramError as error:
    print(error)
assert not pyro.get_param_store().keys()
"""

CALIBRANT_FIRST = """
import sys
import calibrant as cal
assert "pyro" not in sys.modules and "torch" not in sys.modules
import pyro
from pyro.nn import PyroModule
import pyro.distributions as dist, torch
assert pyro.settings.get("module_local_params")

class Model(PyroModule):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
    def forward(self, size):
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(self.w, 1.0))

cal.program.check_program(Model(), {"x": torch.zeros(2)})
assert pyro.__spec__.name == "pyro" and pyro.__file__
print("built")
"""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (PYRO_FIRST, ("Model was built before `import calibrant`", "import calibrant first")),
        (CALIBRANT_FIRST, ("built",)),
    ],
    ids=["pyro first", "calibrant first"],
)
def test_order_of_imports(script, words):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words), done.stdout
