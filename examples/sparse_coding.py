"""Sparse coding: patches of photographs as sums of few features out of many.

Source: Olshausen & Field 1996, "Emergence of simple-cell receptive field properties by learning a sparse code for
natural images" (Nature). The data are 8 × 8 cuttings of the natural patches that come with the package. Latent: the
Laplace coefficients `z` of the features, which are learned. The check tells what a most probable code hides: how
uncertain the coefficients are, and how they trade off against one another where features overlap.
"""

from math import sqrt

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import calibrant as cal


class Model(PyroModule):
    """Patches with Gaussian noise around a sparse combination of features.

    Args:
        features: number of features.
        side: of a patch, in pixels.
    """

    dims = {"z": ["feature"]}

    def __init__(self, features: int = 24, side: int = 8) -> None:
        super().__init__()
        self.features = features
        self.dictionary = torch.nn.Parameter(torch.randn(features, side * side) / sqrt(features))
        self.log_noise = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, size: int) -> torch.Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Laplace(0.0, 1.0).expand([self.features]).to_event(1))
            return pyro.sample("x", dist.Normal(z @ self.dictionary, self.log_noise.exp()).to_event(1))


def data() -> dict[str, cal.data.Data]:
    """Whitened patches of 8 × 8 pixels, 20,000 for training."""
    return {
        split: cal.data.Data({"x": part.batch(slice(0, 20_000))[0]["x"][:, 0, :8, :8].flatten(1)}, name="patches")
        for split, part in cal.data.load("natural-patches").items()
    }
