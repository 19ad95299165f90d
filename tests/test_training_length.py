"""How long a training goes on: the number of steps, patience, a training that ended too soon, and sets of few data."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch

import calibrant as cal
from calibrant.errors import DataError
from calibrant.inference.fitting.held_out import last_draws
from calibrant.inference.fitting.lengths import epochs_for, patient_epochs, still_rises
from calibrant.inference.fitting.state import Plan

PLAN = Plan("stl", 8, 100, 10, 1e-2, 10.0, 20, False, 0)


def history(values: list[float]) -> list[dict[str, float]]:
    return [{"epoch": float(i), "validation": value} for i, value in enumerate(values)]


def travelled(plan: Plan) -> list[float]:
    """The share of the sum of all learning rates after each epoch."""
    rates = torch.tensor([plan.learning_rate((i + 0.5) / plan.epochs) for i in range(plan.epochs)])
    return (rates.cumsum(0) / rates.sum()).tolist()


@pytest.mark.parametrize(
    ("steps", "batch_size", "epochs"), [(1, 8, 5000), (1, 256, 2000), (7, 256, 286), (50, 64, 100), (400, 256, 100)]
)
def test_a_training_of_few_data_has_steps_enough(steps, batch_size, epochs):
    assert epochs_for(steps, batch_size) == epochs


@pytest.mark.parametrize(
    ("epochs", "asked", "steps", "waits"),
    [(100, None, 50, 20), (5000, None, 1, 1000), (100, 20, 1, 500), (100, 20, 50, 20), (2000, 2000, 1, 2000)],
)
def test_patience_waits_for_500_steps(epochs, asked, steps, waits):
    assert patient_epochs(epochs, asked, steps) == waits


@pytest.mark.parametrize("epochs", [8, 22, 100, 2000])
@pytest.mark.parametrize("column", ["validation", "bound"])
@pytest.mark.parametrize(
    ("curve", "rises"),
    [
        (lambda travel: 10 * travel, True),
        (lambda travel: -10 * math.exp(-travel), True),
        (lambda travel: -10 * math.exp(-8 * travel), False),
        (lambda travel: 0.01 * travel, False),  # too little to matter
        (lambda travel: -10 * travel, False),
        (lambda travel: 0.0, False),
        (lambda travel: math.nan, False),
    ],
)
def test_a_curve_that_has_not_reached_its_end_still_rises(curve, rises, column, epochs):
    plan = replace(PLAN, epochs=epochs)
    rows = [
        {**row, column: curve(travel)} for row, travel in zip(history([0.0] * epochs), travelled(plan), strict=True)
    ]
    assert still_rises(rows, plan) == rises


@pytest.mark.parametrize(
    ("rows", "held", "draws"), [(512, 4000, 16), (20_000, 200, 100), (10**6, 100, 128), (0, 50, 16)]
)
def test_passes_after_a_short_training_are_few(rows, held, draws):
    assert last_draws(rows, held) == (16, draws)


@pytest.mark.parametrize(("held", "draws"), [(16_000, 16), (100_000, 3), (10**6, 1)])
def test_many_held_out_data_get_fewer_draws_each(held, draws):
    assert last_draws(10**7, held)[0] == draws


def centred(size):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def local(size):
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))


def rows(size: int) -> dict[str, torch.Tensor]:
    return {"x": 3 + 1.4 * torch.randn(size, generator=torch.Generator().manual_seed(1))}


def trained(program: Any, observed: dict[str, torch.Tensor], **options: Any) -> tuple[Any, cal.inference.Fit]:
    guide = cal.guides.amortize(program, observed)
    return guide, cal.inference.fit(program, guide, observed, **options)


@pytest.mark.parametrize(("size", "held_out"), [(1, 0), (2, 0), (19, 0), (20, 2), (40, 4)])
def test_few_data_are_not_split(size, held_out):
    _, fit = trained(local, rows(size), epochs=2)
    assert len(fit.held_out) == held_out
    assert math.isfinite(fit.elbo)
    assert math.isnan(fit.elbo_se) == (size == 1)


@pytest.mark.parametrize(("size", "share"), [(1, 0.1), (4, 0.1), (4, 1.0), (4, 0.0), (100, 1.5)])
def test_a_share_that_leaves_nothing_is_refused_with_a_remedy_that_works(size, share):
    observed = rows(size)
    with pytest.raises(DataError, match="give validation=None"):
        trained(local, observed, validation=share, epochs=1)
    trained(local, observed, validation=None, epochs=1)
    trained(local, observed, validation=cal.data.Data(observed), epochs=1)


def test_a_training_that_is_too_short_says_so():
    seen: list[tuple[Any, ...]] = []
    _, fit = trained(local, rows(64), epochs=40, compile=False, lr=1e-3, progress=lambda *what: seen.append(what))
    assert fit.stopped == "still rising"
    assert seen[-1][-1].endswith("still rising")
    assert len(fit.history) == 40
    assert len({row["validation"] for row in fit.history}) == 5  # every tenth of these short epochs, and the last


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 8, 20])
def test_the_posterior_of_few_data_is_right_at_the_defaults(size):
    """mu | x is Normal; local latents are exact given mu. Of 20 data, 2 are held out, which mu does not see."""
    observed = rows(size)
    guide, fit = trained(centred, observed)
    used = observed["x"][[i for i in range(size) if i not in fit.held_out]]
    precision = 1 / 25 + len(used) / 2
    mean, sd = float(used.sum()) / 2 / precision, precision**-0.5
    drawn = cal.inference.posterior(centred, guide, observed, draws=2000).posterior["mu"]
    assert abs(float(drawn.mean()) - mean) < 0.25 * sd, fit  # design.md: what shared latents reach
    assert 0.7 < float(drawn.std()) / sd < 1.1
    assert fit.stopped in ("finished", "early")


@pytest.mark.slow
def test_eight_schools_at_the_defaults():
    """The nearest guide of the family, found by quadrature: mu 4.44 (3.27), tau 3.66 (4.08); log evidence −31.31.

    The family's ELBO is −31.40 at best. The posterior's moments are mu 4.40 (3.32), tau 3.60 (3.22): a LogNormal has a
    longer tail than the posterior of tau.
    """
    y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])

    def schools(size, sigma):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("data", size):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, sigma))

    data = cal.data.Data({"y": y}, covariates={"sigma": sigma})
    guide = cal.guides.amortize(schools, data)
    fit = cal.inference.fit(schools, guide, data)
    assert fit.stopped in ("finished", "early")
    assert -31.75 < 8 * fit.elbo < -31.31 + 3 * 8 * fit.elbo_se
    drawn = cal.inference.posterior(schools, guide, data, draws=4000).posterior
    mean, sd = ({n: float(getattr(drawn[n], of)()) for n in ("mu", "tau")} for of in ("mean", "std"))
    assert abs(mean["mu"] - 4.40) < 0.25 * 3.32
    assert abs(mean["tau"] - 3.60) < 0.25 * 3.22
    assert 0.7 < sd["mu"] / 3.32 < 1.1
    assert 0.7 < sd["tau"] / 3.22 < 4.08 / 3.22 * 1.2
