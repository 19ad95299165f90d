"""The default lengths of a reference, 4 chains of 8 sub-chains of 125 + 125 iterations, against known truth.

The same comparison has to see what short chains could do wrong: draws of chains that still travel from their starts,
and sub-chains that are no chains of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import PROBABILITIES, Truth, assert_agrees, from_scipy, known, limit, signed_scores
from pyro.distributions import constraints
from scipy import special, stats
from small_models import one_look
from test_nuts_truth import Case, hierarchical_scale

import calibrant as cal
from calibrant.inference.references import lanes, sampling

pytestmark = pytest.mark.truth


def regression() -> Case:
    """Raw covariates, which correlate their coefficients by .998, and flat priors, whose starts lie far outside.

    With RSS the residual sum of squares of n data, p coefficients and ν = n − p − 1, the coefficients are multivariate
    t around those of least squares, and RSS / σ² is χ² with ν degrees of freedom.
    """
    rng, n = np.random.default_rng(11), 60
    height = rng.normal(66.0, 4.0, n)
    design = np.stack([np.ones(n), height], 1)
    y = design @ np.array([-60.0, 1.2]) + rng.normal(size=n)
    inverse = np.linalg.inv(design.T @ design)
    mean = inverse @ design.T @ y
    rss, degrees = ((y - design @ mean) ** 2).sum(), n - 3
    unit = np.sqrt(rss / degrees)

    def program(size, design):
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.independent(constraints.real, 1), (), (2,)))
        sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("data", size):
            pyro.sample("y", dist.Normal(design @ beta, sigma))

    def student(weights: np.ndarray) -> Truth:
        return from_scipy(stats.t(degrees, weights @ mean, unit * np.sqrt(weights @ inverse @ weights)))

    first = np.sqrt(rss / 2) * np.exp(special.gammaln((degrees - 1) / 2) - special.gammaln(degrees / 2))
    quantiles = np.sqrt(rss / stats.chi2(degrees).isf(PROBABILITIES))
    truth = {
        "intercept": student(np.array([1.0, 0.0])),
        "slope": student(np.array([0.0, 1.0])),
        "at 70": student(np.array([1.0, 70.0])),
        "sigma": known(first, np.sqrt(rss / (degrees - 2) - first**2), quantiles),
    }

    def quantities(posterior: xr.Dataset) -> dict[str, Any]:
        intercept, slope = np.moveaxis(posterior["beta"].values, -1, 0)
        at = intercept + 70 * slope
        return {"intercept": intercept, "slope": slope, "at 70": at, "sigma": posterior["sigma"].values}

    return Case(program, {"y": torch.as_tensor(y)}, truth, quantities, {"design": torch.as_tensor(design)})


def many_data() -> Case:
    """The mean and precision of four Normals for each of 40 data: Normal–Gamma posteriors, which are skewed."""
    rng, count, each = np.random.default_rng(12), 40, 4
    tau = rng.gamma(3.0, 0.5, count)
    x = rng.normal(size=count)[:, None] / np.sqrt(tau / 4)[:, None]
    x = x + rng.normal(size=(count, each)) / np.sqrt(tau)[:, None]

    def program(size):
        with pyro.plate("data", size):
            tau = pyro.sample("tau", dist.Gamma(3.0, 2.0))
            mu = pyro.sample("mu", dist.Normal(0.0, 2.0 * tau.rsqrt()))
            pyro.sample("x", dist.Normal(mu[:, None], tau.rsqrt()[:, None]).expand([size, each]).to_event(1))

    weight, shape = 0.25 + each, 3.0 + each / 2
    rate = 2.0 + 0.5 * ((x**2).sum(1) - x.sum(1) ** 2 / weight)
    mean = x.sum(1) / weight
    truth = {
        "tau": from_scipy(stats.gamma(shape, scale=1 / rate)),
        "mu": from_scipy(stats.t(2 * shape, mean, np.sqrt(rate / (shape * weight)))),
    }
    return Case(program, {"x": torch.as_tensor(x)}, truth)


CASES: dict[str, Callable[[], Case]] = {
    "regression": regression,
    "hierarchical scale": hierarchical_scale,
    "many data": many_data,
}


@cache
def case_of(name: str) -> Case:
    return CASES[name]()


def by_default(case: Case) -> xr.DataTree:
    """A reference by batched NUTS with default lengths; compiling would only change how draws are rounded."""
    return cal.inference.reference(
        case.program, case.observed, covariates=case.covariates, method="nuts", compile=False, seed=1
    )


def passes(tree: xr.DataTree) -> bool:
    return bool(tree["convergence"]["is_reference"].all())


def assert_right(case: Case, tree: xr.DataTree) -> None:
    """Every scalar agrees with its truth, and so does the average error of each quantity over all data."""
    draws = case.quantities(tree["posterior"].dataset)
    assert_agrees(draws, case.truth)
    for name, truth in case.truth.items():
        scores, _ = signed_scores(np.asarray(draws[name], dtype=np.float64), truth)
        scores = scores.reshape(5, -1)
        together = np.abs(scores.sum(1)) / np.sqrt(scores.shape[1])
        assert truth.mean.ndim == 0 or together.max() < limit(len(together) * len(case.truth)), (name, together)


@pytest.mark.parametrize("name", CASES)
def test_default_lengths_are_right(name: str) -> None:
    case = case_of(name)
    tree = by_default(case)
    assert tree["posterior"].attrs["subchains"] == 8
    assert dict(tree["posterior"].sizes)["chain"] == 4
    assert dict(tree["posterior"].sizes)["draw"] == 1000
    assert passes(tree), tree["convergence"]["reason"].values
    assert_right(case, tree)


# -- planted defects ---------------------------------------------------------------------------------------------------


def keep_travelling_chains(patch: pytest.MonkeyPatch) -> None:
    """A warm-up of 30 iterations, after which some chains still come from their starts."""
    whole = vars(sampling.ReferencePlan)["nuts"].fget
    patch.setattr(sampling.ReferencePlan, "nuts", property(lambda self: replace(whole(self), warmup=30)))


def share_random_numbers(patch: pytest.MonkeyPatch) -> None:
    """All eight sub-chains of a chain have the key of the first."""
    fold = lanes.fold
    patch.setattr(lanes, "fold", lambda key, number: fold(key, number // 8 * 8))


PLANTED = {
    "draws of chains that travel": ("regression", keep_travelling_chains),
    "the same sub-chains again": ("many data", share_random_numbers),
}


@pytest.mark.parametrize(("name", "plant"), PLANTED.values(), ids=PLANTED)
def test_a_planted_defect_is_seen(
    name: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the gate, and by the comparison for draws that no gate has judged."""
    plant(monkeypatch)
    one_look(monkeypatch)
    tree = by_default(case_of(name))
    assert not passes(tree)
    with pytest.raises(AssertionError):
        assert_right(case_of(name), tree)
