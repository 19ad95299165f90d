"""Programs with other plates or shapes, and each after the remedy that its refusal prints."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from idioms import MATRIX, SIZE, Idiom, X, of
from torch import Tensor
from torch.distributions import LogNormal, Normal, Uniform

from calibrant.program import Program

IDIOMS: dict[str, Idiom] = {}

# -- plates ------------------------------------------------------------------------------------------------------------


def subsampled(size):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size, subsample_size=min(size, 4)):
        pyro.sample("x", dist.Normal(m, 1.0))


def not_subsampled(size):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(m, 1.0))


def not_subsampled_truth(v, c):
    return Normal(0, 1).log_prob(v["m"]) + Normal(v["m"], 1.0).log_prob(v["x"]).sum()


IDIOMS["subsample_size"] = Idiom(
    of(subsampled),
    ("'x'", 'write pyro.plate("data", size)', "never by subsample_size"),
    of(not_subsampled),
    not_subsampled_truth,
    {"x": X},
)


def plates(data: dict, features: dict, inside: bool) -> Program:
    def model(size):
        outer, inner = pyro.plate("data", size, **data), pyro.plate("features", 3, **features)
        if inside:
            outer, inner = inner, outer
        with outer, inner:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    return model


def features_as_event(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([size, 3]).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1))


def features_truth(v, c):
    return Normal(0, 1).log_prob(v["z"]).sum() + Normal(v["z"], 1.0).log_prob(v["x"]).sum()


for _name, _program in {
    "plates without dim": plates({}, {}, False),
    "features around the data": plates({"dim": -1}, {"dim": -2}, True),
    "features as the last dimension": plates({"dim": -2}, {"dim": -1}, False),
}.items():
    IDIOMS[_name] = Idiom(
        of(_program),
        ("'z'", "['features'] beside 'data'", ".expand([size, 3]).to_event(1)"),
        of(features_as_event),
        features_truth,
        {"x": MATRIX},
    )


def observed_in_a_nested_plate(size):
    with pyro.plate("data", size, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("features", 3, dim=-2):
            pyro.sample("x", dist.Normal(z, 1.0))


def observed_as_event(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[:, None], 1.0).expand([size, 3]).to_event(1))


def observed_as_event_truth(v, c):
    return Normal(0, 1).log_prob(v["z"]).sum() + Normal(v["z"][:, None], 1.0).log_prob(v["x"]).sum()


IDIOMS["a plate inside the data plate"] = Idiom(
    of(observed_in_a_nested_plate),
    ("'x'", "['features'] beside 'data'", ".expand([size, 3]).to_event(1)", "loc[:, None]"),
    of(observed_as_event),
    observed_as_event_truth,
    {"x": MATRIX},
    reference=True,
)


def stack_of_plates(size):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate_stack("data", (size, 3)):
        pyro.sample("x", dist.Normal(m, 1.0))


def stack_in_the_plate(size):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(m, 1.0).expand([size, 3]).to_event(1))


IDIOMS["plate_stack"] = Idiom(
    of(stack_of_plates),
    ("['data_0', 'data_1']", "none called 'data'", 'pyro.plate("data", size)'),
    of(stack_in_the_plate),
    not_subsampled_truth,
    {"x": MATRIX},
)


def without_to_event(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


def with_to_event(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0))


IDIOMS["to_event missing"] = Idiom(
    of(without_to_event),
    ("'z'", "2 entries", "end its distribution with .to_event(their number)"),
    of(with_to_event),
    lambda v, c: Normal(0, 1).log_prob(v["z"]).sum() + Normal(v["z"].sum(-1), 1.0).log_prob(v["x"]).sum(),
    {"x": X},
)
TIMES = torch.linspace(0.0, 1.0, SIZE)


def kernel(length: Tensor, times: Tensor) -> Tensor:
    apart = (times[:, None] - times) / length
    return torch.exp(-apart.square()) + 0.1 * torch.eye(len(times), dtype=times.dtype)


def process_without_plate(size):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    times = torch.linspace(0.0, 1.0, size)
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(size), kernel(length, times)))


def process(size):
    length = pyro.sample("length", dist.LogNormal(0.0, 1.0))
    times = torch.linspace(0.0, 1.0, SIZE)
    with pyro.plate("data", size):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(SIZE), kernel(length, times)))


def process_truth(v, c):
    covariance = kernel(v["length"], torch.linspace(0.0, 1.0, SIZE, dtype=torch.float64))
    term = -0.5 * (v["x"] @ torch.linalg.solve(covariance, v["x"].T)).trace()
    return LogNormal(0.0, 1.0).log_prob(v["length"]) + term - 0.5 * (2 * math.pi * covariance).logdet() * len(v["x"])


IDIOMS["a Gaussian process"] = Idiom(
    of(process_without_plate),
    ("'x'", "no plate", "one datum", "observed={'x': value[None]}"),
    of(process),
    process_truth,
    {"x": X[None]},
    reference=True,
)


def series_without_plate(size):
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    last = torch.zeros(())
    for t in range(4):
        last = pyro.sample(f"x_{t}", dist.Normal(phi * last, 1.0))


def series(size):
    phi = pyro.sample("phi", dist.Uniform(-1.0, 1.0))
    last = torch.zeros(())
    with pyro.plate("data", size):
        for t in range(4):
            last = pyro.sample(f"x_{t}", dist.Normal(phi * last, 1.0))


def series_truth(v, c):
    x = torch.stack([torch.zeros(1), *(v[f"x_{t}"] for t in range(4))])
    return Uniform(-1.0, 1.0).log_prob(v["phi"]) + Normal(v["phi"] * x[:-1], 1.0).log_prob(x[1:]).sum()


IDIOMS["a series in a loop"] = Idiom(
    of(series_without_plate),
    ("'x_0'", "no plate", "a series", "observed={'x_0': value[None]}"),
    of(series),
    series_truth,
    {f"x_{t}": X[t][None] for t in range(4)},
    reference=True,
)
