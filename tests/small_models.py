"""Small models that several tests share: registered ones with every ingredient away from zero, and programs."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import calibrant as cal


def build(name: str, latents: int, **options: Any) -> tuple[PyroModule, dict[str, torch.Tensor]]:
    """A model of 5 pixels, and three data: weak, typical, strong."""
    torch.manual_seed(7)
    model = cal.models.create(name, shape=(5,), latents=latents, **options)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)
            if parameter_name.endswith("log_scale"):
                parameter.fill_(-0.5).add_(0.2 * torch.randn_like(parameter))
    model.eval()
    image = torch.randn(5)
    return model, {"x": torch.stack([0.1 * image, image, 4 * image])}


def coin(size):
    """A local latent that is discrete, and no other."""
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(k, 1.0))


def coin_guide(observed, size):
    """Its prior."""
    with pyro.plate("data", size):
        pyro.sample("k", dist.Bernoulli(0.5 * torch.ones(size)))


def hierarchical(size):
    """Normals on three levels, of which the first is shared."""
    centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(centre, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))
