"""What the tables of refused and of allowed programs are made of."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

from calibrant.errors import CalibrantError, ProgramError
from calibrant.program import Program

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


def in_eval(build: Callable[[], PyroModule]) -> Callable[[], PyroModule]:
    return lambda: build().eval()


def decoder_of(*layers: Callable[[], nn.Module]) -> Callable[[], dict]:
    return lambda: {"decoder": nn.Sequential(nn.Linear(2, 3), *(layer() for layer in layers), nn.Linear(3, 1))}


def through_decoder(self, size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.sample("x", dist.Normal(self.decoder(z).squeeze(-1), 1.0))


def tensor_attribute(self, size):
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(self.centre, 1.0))


def weight() -> dict:
    return {"weight": PyroSample(dist.Normal(0.0, 1.0))}


def random_weight(self, size):
    weight = self.weight
    with pyro.plate("data", size):
        pyro.sample("x", dist.Normal(weight, 1.0))
