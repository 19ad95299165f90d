"""Mixture of factor analysers: clusters, each a plane of its own in the space of the observations.

Source: Ghahramani & Hinton 1996, "The EM algorithm for mixtures of factor analyzers" (CRG-TR-96-1). The data are
drawn from the model with overlapping clusters. Latent: the cluster of a datum (`component`, summed out in training
and in the reference) and its place in the cluster's plane (`z`). The check tells whether the guide knows which data
belong to no cluster for sure, and whether `z` follows the cluster that it is paired with.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import calibrant as cal


class Model(PyroModule):
    """Components with their own means and loadings, and one diagonal noise.

    Args:
        components: number of components.
        factors: dimension of each plane.
        width: number of observed entries.
    """

    def __init__(self, components: int = 3, factors: int = 2, width: int = 6) -> None:
        super().__init__()
        self.factors = factors
        self.log_weight = torch.nn.Parameter(torch.zeros(components))
        self.mean = torch.nn.Parameter(torch.randn(components, width))
        self.loading = torch.nn.Parameter(0.5 * torch.randn(components, width, factors))
        self.log_noise = torch.nn.Parameter(torch.zeros(width))

    def forward(self, size: int) -> torch.Tensor:
        with pyro.plate("data", size):
            component = pyro.sample("component", dist.Categorical(logits=self.log_weight))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.factors]).to_event(1))
            centre = self.mean[component] + (self.loading[component] @ z[..., None]).squeeze(-1)
            return pyro.sample("x", dist.Normal(centre, self.log_noise.exp()).to_event(1))


def data() -> dict[str, torch.Tensor]:
    """4,000 draws from a model of this kind."""
    generator = torch.Generator().manual_seed(1)
    truth = Model()
    with torch.no_grad():
        truth.mean.copy_(0.5 * torch.randn(truth.mean.shape, generator=generator))
        truth.loading.copy_(0.6 * torch.randn(truth.loading.shape, generator=generator))
    return {"x": cal.program.sample_prior(truth, 4000, seed=1)["x"]}
