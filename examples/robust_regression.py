"""Robust regression: a linear model whose noise has Student-t tails, so that a few gross errors don't move the line.

Source: Lange, Little & Taylor 1989, "Robust statistical modeling using the t distribution" (JASA); the prior of the
degrees of freedom is Juárez & Steel's (2010). The data are scikit-learn's diabetes patients, standardised, with every
twentieth response moved by six standard deviations. Latent, and shared by all patients: the intercept, the slopes,
the noise's scale and its degrees of freedom (`freedom`, small where tails are heavy). The check tells whether the
learned distribution of all of them is the posterior, tails and correlations included.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from sklearn.datasets import load_diabetes

import calibrant as cal

COLUMNS = ["sex", "bmi", "bp", "s5"]  # body mass index, blood pressure, log triglycerides


class Model(PyroModule):
    """Linear regression on the covariate `x` with Student-t noise."""

    def forward(self, size: int, x: torch.Tensor) -> torch.Tensor:
        intercept = pyro.sample("intercept", dist.Normal(0.0, 1.0))
        slopes = pyro.sample("slopes", dist.Normal(0.0, 1.0).expand([x.shape[-1]]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.5))
        freedom = pyro.sample("freedom", dist.Gamma(2.0, 0.1))
        with pyro.plate("data", size):
            return pyro.sample("y", dist.StudentT(freedom, intercept + x @ slopes, scale))


def data() -> dict[str, cal.data.Data]:
    """442 patients; all latents are shared, so that nothing is held out."""
    table = load_diabetes(as_frame=True, scaled=False)
    x, y = table.data[COLUMNS].to_numpy(), table.target.to_numpy()
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    y[::20] += np.where(np.arange(len(y[::20])) % 3, 6.0, -6.0)
    patients = cal.data.Data(
        {"y": y.astype("float32")}, covariates={"x": x.astype("float32")}, name="diabetes with gross errors"
    )
    return {"train": patients, "validation": patients, "test": patients}
