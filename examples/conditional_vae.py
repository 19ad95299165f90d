"""Conditional VAE: given which digit it is, what is left to know about how it is written?

Source: Sohn, Lee & Yan 2015, "Learning structured output representation using deep conditional generative models"
(NeurIPS); the decoder's label as in Kingma et al. 2014, arXiv 1406.5298. The data are scikit-learn's digits; the
`label` is a covariate, which decoder and encoder both see. Latent: the style `z`. The check tells whether the
encoder's style is the posterior's, for every class of digits.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_digits
from torch.nn.functional import one_hot

import calibrant as cal


class Model(PyroModule):
    """A style and a label make an image.

    Args:
        latents: dimension of the style `z`.
        units: of the decoder.
    """

    def __init__(self, latents: int = 4, units: int = 64) -> None:
        super().__init__()
        self.latents = latents
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latents + 10, units), torch.nn.SiLU(), torch.nn.Linear(units, 64)
        )
        self.log_noise = torch.nn.Parameter(torch.tensor(-1.0))

    def forward(self, size: int, label: torch.Tensor) -> torch.Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.latents]).to_event(1))
            mean = self.decoder(torch.cat([z, label], 1))
            return pyro.sample("x", dist.Normal(mean, self.log_noise.exp()).to_event(1))


def data() -> cal.data.Data:
    """1,797 digits with values from 0 to 1, and their labels as indicators."""
    digits = load_digits()
    labels = one_hot(torch.as_tensor(digits.target), 10).float()
    return cal.data.Data(
        {"x": torch.as_tensor(digits.data).float() / 16}, covariates={"label": labels}, name="labelled digits"
    )
