"""Poisson factor model: counts as sums of a few non-negative parts.

Source: Canny 2004, "GaP: a factor model for discrete data" (SIGIR). The data are scikit-learn's handwritten digits,
whose pixels count the inked dots of a 4 × 4 block (0 to 16). Latent: how much of each part an image holds (`amount`);
the parts are learned. The check tells whether the guide's Gamma distributions are the posterior of the amounts:
amounts of parts that share pixels are anticorrelated, which independent Gammas cannot say.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_digits
from torch.nn.functional import softplus

import calibrant as cal


class Model(PyroModule):
    """Counts with Poisson noise around a non-negative combination of parts.

    Args:
        parts: number of parts.
        pixels: number of counts.
    """

    def __init__(self, parts: int = 6, pixels: int = 64) -> None:
        super().__init__()
        self.parts = parts
        self.loading = torch.nn.Parameter(torch.randn(parts, pixels))
        self.floor = torch.nn.Parameter(torch.full((pixels,), -3.0))

    def forward(self, size: int) -> torch.Tensor:
        with pyro.plate("data", size):
            amount = pyro.sample("amount", dist.Gamma(2.0, 1.0).expand([self.parts]).to_event(1))
            rate = amount @ softplus(self.loading) + softplus(self.floor)
            return pyro.sample("counts", dist.Poisson(rate).to_event(1))


def data() -> cal.data.Data:
    """1,797 images of 64 counts."""
    return cal.data.Data({"counts": load_digits().data.astype("float32")}, name="digits as counts")
