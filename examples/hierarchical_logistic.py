"""Hierarchical logistic regression: hospitals whose patients do better or worse than their risk tells.

Source: Gelman & Hill 2007, "Data analysis using regression and multilevel/hierarchical models", chapter 14. The
outcomes are drawn from a stated truth: intercepts from N(−0.5, 0.8), slope 1. A datum is a hospital with 12 patients.
Latent: its `intercept` and, shared by all hospitals, their `centre` and `spread` and the `slope` of the patients'
risk. The check tells whether the guide's intercepts are shrunk as the posterior shrinks them, more where the spread
is small.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

import calibrant as cal


class Model(PyroModule):
    """Outcomes `died` of a hospital's patients given their `risk`, `(hospitals, patients)` each."""

    def forward(self, size: int, risk: torch.Tensor) -> torch.Tensor:
        centre = pyro.sample("centre", dist.Normal(0.0, 1.5))
        spread = pyro.sample("spread", dist.LogNormal(-0.5, 0.7))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            intercept = pyro.sample("intercept", dist.Normal(centre, spread))
            return pyro.sample("died", dist.Bernoulli(logits=intercept[:, None] + slope * risk).to_event(1))


def data() -> dict[str, cal.data.Data]:
    """80 hospitals; what they share is learned from all of them, so that none is held out."""
    generator = torch.Generator().manual_seed(0)
    risk = torch.randn(80, 12, generator=generator)
    intercept = -0.5 + 0.8 * torch.randn(80, 1, generator=generator)
    died = torch.bernoulli((intercept + risk).sigmoid(), generator=generator)
    hospitals = cal.data.Data({"died": died}, covariates={"risk": risk}, name="simulated hospitals")
    return {"train": hospitals, "validation": hospitals, "test": hospitals}
