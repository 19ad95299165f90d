"""Posteriors that are hard to sample: what passes the gate is right, and what is refused is refused for its reason."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest
import xarray as xr
from agreement import Array, Truth, limit, signed_scores
from awkward_programs import CASES, LEVELS, Case
from scipy import stats

import calibrant as cal
from calibrant.inference.references import repair

ABSOLUTE = np.array([0.02, 0.12, 0.02])  # largest errors of the shares below the 1, 50 and 99% quantiles
AMONG_ALL = 0.02  # largest error of the shares of all data together


case_of = cache(lambda name: CASES[name]())


def sampled(case: Case, **options: Any) -> xr.DataTree:
    lengths = {"chains": 16, "warmup": 300, "draws": 500}  # few lanes cost as much as one
    settings = {"method": "nuts", "compile": False, "seed": 3, **lengths, **case.options, **options}
    return cal.inference.reference(case.program, case.observed, covariates=case.covariates, **settings)


def of_data(truth: Truth, kept: Array) -> Truth:
    """The truth of some of the data."""
    parts = truth.mean[kept], truth.sd[kept], truth.quantiles[:, kept], truth.errors[:, kept]
    return Truth(*parts, truth.probabilities)


def found(draws: Mapping[str, Any], truth: Mapping[str, Truth], kept: Array) -> dict[str, dict[str, float]]:
    """The largest errors by quantity: |z| of a datum, |z| over all data, and errors of shares."""
    result = {}
    for name, whole in truth.items():
        values, true = np.asarray(draws[name], dtype=np.float64)[:, :, kept], of_data(whole, kept)
        scores, _ = signed_scores(values, true)
        shares = (values[:, :, None] < true.quantiles).mean((0, 1)) - LEVELS.reshape(3, *[1] * true.mean.ndim)
        together = np.nansum(scores, 1) / np.sqrt(np.maximum(1, np.isfinite(scores).sum(1)))
        result[name] = {
            "z": float(np.nanmax(np.abs(scores))),
            "z over all data": float(np.abs(together).max()),
            "share": float((np.abs(shares).reshape(3, -1).max(1) / ABSOLUTE).max()),
            "share over all data": float(np.abs(shares.mean(1)).max() / AMONG_ALL),
        }
    return result


def complaints(case: Case, draws: Mapping[str, Any], kept: Array) -> list[str]:
    """What is wrong with the draws of the data that passed."""
    if not kept.any():
        return []
    count = sum(5 * truth.mean[kept].size for truth in case.truth.values())
    limits = {"z": limit(count), "z over all data": limit(count), "share": 1.0, "share over all data": 1.0}
    return [
        f"{name}: {what} {value:.2f} (limit {limits[what]:.2f})"
        for name, errors in found(draws, case.truth, kept).items()
        for what, value in errors.items()
        if not value < limits[what]
    ]


def unexplained(case: Case, reasons: list[str]) -> list[str]:
    """Refusals that do not name a reason of the case."""
    return [reason for reason in reasons if reason and not any(word in reason for word in case.reasons)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_passes_is_right_and_what_is_refused_has_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of(name)
    monkeypatch.setattr(repair, "_LOOKS", case.looks)
    assert_right(case, sampled(case))


def test_ordered_vectors_are_right_in_short_chains() -> None:
    case = case_of("ordered by a transform")
    assert_right(case, sampled(case, chains=8, warmup=100))


def assert_right(case: Case, tree: xr.DataTree) -> None:
    """All refusals have their reason, enough data pass, and what passes is right."""
    convergence = tree["convergence"].dataset
    kept, reasons = convergence["is_reference"].values, convergence["reason"].values.tolist()
    assert unexplained(case, reasons) == []
    assert kept.sum() >= case.at_least, reasons
    assert complaints(case, case.quantities(tree["posterior"].dataset), kept) == []


# -- planted defects ---------------------------------------------------------------------------------------------------


def exact_draws(quantiles: Any, shape: tuple[int, ...]) -> Array:
    """Independent draws `(4, 1000, *shape)` by a function from levels to values."""
    return quantiles(np.random.default_rng(0).uniform(size=(4, 1000, *shape)))


def banana_draws(case: Case, spread: float = 1.0, shift: float = 0.0) -> dict[str, Array]:
    a, b = case.truth["a"], case.truth["b"]
    unit = exact_draws(stats.norm.ppf, (2, *a.mean.shape))
    first = a.mean + a.sd * unit[:, :, 0]
    second = first**2 / 2 + unit[:, :, 1]
    return {"a": a.mean + spread * (first - a.mean), "b": b.mean + spread * (second - b.mean) + shift * b.sd}


def normal_draws(case: Case) -> dict[str, Array]:
    """The draws of a Normal guide with the right means and sds."""
    return {
        name: truth.mean + truth.sd * exact_draws(stats.norm.ppf, truth.mean.shape)
        for name, truth in case.truth.items()
    }


def test_draws_of_the_posterior_pass() -> None:
    case = case_of("banana")
    assert complaints(case, banana_draws(case), np.ones(8, dtype=bool)) == []


PLANTED = {
    "10% too wide": lambda case: banana_draws(case, spread=1.1),
    "10% too narrow": lambda case: banana_draws(case, spread=0.9),
    "shifted by a tenth of an sd": lambda case: banana_draws(case, shift=0.1),
    "a Normal guide": normal_draws,
}


@pytest.mark.parametrize("wrong", PLANTED.values(), ids=PLANTED)
def test_planted_defects_are_seen(wrong: Any) -> None:
    case = case_of("banana")
    assert complaints(case, wrong(case), np.ones(8, dtype=bool))
    some = np.arange(8) < 2  # when the gate keeps few data too
    assert complaints(case, wrong(case), some)


def test_a_missed_mode_is_seen() -> None:
    """Draws of the larger mode alone."""
    case = case_of("two modes")
    seen = case.observed["x"].numpy()
    z = seen + exact_draws(stats.norm.ppf, (8,))
    assert complaints(case, {"z": z}, np.ones(8, dtype=bool))


def test_another_reason_is_not_accepted() -> None:
    case = case_of("Beta(.1, .1)")
    slow = "R-hat 1.200 of `p` (limit 1.01)"
    edge = "2.7% of the draws of `p` closer to the edge of its support than float64 resolves (limit 0.5%)"
    assert unexplained(case, ["", slow, edge, f"{slow}; {edge}"]) == [slow]
