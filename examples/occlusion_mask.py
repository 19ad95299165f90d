"""Occlusion mask: a grey sheet hides the left part of an image; where does it end, and what is behind it?

Source: layered image models, as in Williams & Titsias 2004, "Greedy learning of multiple objects in images using
robust statistics and factorial learning" (Neural Computation), here with one layer whose edge is a number, not a bit
a pixel. The data are scikit-learn's digits with a sheet of random width. Latent: the share of the image that is
`hidden`, and the digit's content `z`. The check tells whether the guide is as unsure of the content as the hidden
part makes it.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_digits

import calibrant as cal


class Model(PyroModule):
    """An image decoded from `z`, behind a sheet with a soft edge.

    Args:
        latents: dimension of `z`.
        units: of the decoder.
    """

    middle: torch.Tensor

    def __init__(self, latents: int = 4, units: int = 64) -> None:
        super().__init__()
        self.latents = latents
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(latents, units), torch.nn.SiLU(), torch.nn.Linear(units, 64), torch.nn.Unflatten(1, (8, 8))
        )
        self.log_noise = torch.nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("middle", torch.arange(8) + 0.5)

    def forward(self, size: int) -> torch.Tensor:
        with pyro.plate("data", size):
            hidden = pyro.sample("hidden", dist.Beta(1.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([self.latents]).to_event(1))
            return pyro.sample(
                "x", dist.Normal(self.covered(self.decoder(z), hidden), self.log_noise.exp()).to_event(2)
            )

    def covered(self, image: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Images `(size, 8, 8)` behind a sheet of grey 0.5 over the first columns."""
        seen = (2 * (self.middle - 8 * hidden[:, None])).sigmoid()[:, None, :]
        return seen * image + (1 - seen) * 0.5


def data() -> cal.data.Data:
    """1,797 digits with values from 0 to 1, each behind a sheet, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.as_tensor(load_digits().images).float() / 16
    covered = Model().covered(images, torch.rand(len(images), generator=generator))
    return cal.data.Data({"x": covered + 0.1 * torch.randn(covered.shape, generator=generator)}, name="covered digits")
