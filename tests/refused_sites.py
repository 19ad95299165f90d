"""Programs whose plates, shapes or sites break the contract, and the words of their refusal."""

import pyro
import pyro.distributions as dist
import torch
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
from torch.distributions import AffineTransform

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


def far_plate(size):
    with pyro.plate("data", size, dim=-2):
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
    "obs_mask inside": Case(plain(partly_observed_inside), ("'x'", "obs_mask=", ".mask(seen)", "observed={'x'")),
    "another plate": Case(plain(other_plate), ("'x'", "['batch']", 'pyro.plate("data", size)')),
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
    "plate around the data plate": Case(
        plain(inner_plate), ("'x'", "['pixels'] beside 'data'", ".expand([size, 2]).to_event(1)")
    ),
    "data plate around a plate": Case(
        plain(outer_plate), ("'x'", "['pixels'] beside 'data'", ".expand([size, 2]).to_event(1)")
    ),
    "data plate of another dimension": Case(plain(far_plate), ("'x'", "dim -2", "wanted -1")),
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


def torch_distribution(size):
    with pyro.plate("data", size):
        pyro.sample("x", torch.distributions.Normal(torch.zeros(size), 1.0))


def event_of_data(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(size, 2), 1.0).to_event(2))
        pyro.sample("x", dist.Normal(z.sum(), 1.0))


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


def plate_built_twice(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(z, 1.0))


def named_twice(name, dims=1):
    def model(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2] * dims).to_event(dims))
            other = pyro.sample(name, dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.flatten(1).sum(-1) + other, 1.0))

    return model


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


def random_weight_in_plate(self, size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(self.weight, 1.0))


SITES = {
    "sites by size": Case(plain(changing_sites), ("['w']", "same sites each time")),
    "sites by chance": Case(plain(chance_of_a_site), ("['w']", "same sites each time")),
    "a distribution of torch": Case(plain(torch_distribution), ("'x'", "Normal of torch", "pyro.distributions.Normal")),
    "to_event of the data": Case(plain(event_of_data), ("'z'", "(3, 3, 2)", ".to_event counts the dimensions after")),
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
    "name of an entry": Case(plain(named_twice("z[0]")), ("'z[0]'", "'z'", "rename one of them")),
    "name of an entry of a matrix": Case(plain(named_twice("z[1,0]", 2)), ("'z[1,0]'", "rename one of them")),
    "name with a slash": Case(plain(named("a/b")), ("'a/b'", "rename")),
    "shifted exponential": Case(plain(shifted_exponential), ("'z'", "no density", "Real()", "transform the value")),
    "scaled uniform": Case(plain(scaled_uniform), ("'z'", "no density", "base distribution")),
    "PyroSample in the plate": Case(
        module(weight, random_weight_in_plate), ("'weight'", "inside the plate", "before the plate")
    ),
}
