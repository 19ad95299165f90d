"""Draws against what is known of a posterior, in Monte Carlo standard errors.

Five expectations of every scalar are compared: its mean, its squared deviation from the true mean, and the shares of
draws below the true 5, 50 and 95% quantiles. With m of them, the largest |z| must stay below Φ⁻¹(1 − 1e-5/(2m)): one
false alarm in 100,000. Every comparison is made again with draws that are 15% too narrow, and with draws that are a
quarter of a standard deviation off: both must fail it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from calibrant.inference import diagnostics

PROBABILITIES = np.array([0.05, 0.5, 0.95])
MIN_ESS = 400

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Truth:
    """What is known of scalars `(…)`; NaN is not compared.

    `errors` `(5, …)` are the standard errors of the five expectations, where the truth is known from draws.
    """

    mean: Array
    sd: Array
    quantiles: Array  # (3, …)
    errors: Array
    probabilities: Array  # (3,): the levels of the quantiles

    @property
    def expected(self) -> Array:
        """The five expectations, `(5, …)`."""
        shares = self.probabilities.reshape(-1, *[1] * self.mean.ndim) + 0.0 * self.quantiles
        return np.concatenate([self.mean[None], self.sd[None] ** 2, shares])

    def statistics(self, draws: Array) -> Array:
        """What the five are expectations of, `(chain, draw, 5, …)`."""
        below = draws[:, :, None] < self.quantiles
        both = np.stack([draws, (draws - np.nan_to_num(self.mean)) ** 2], 2)
        return np.concatenate([both, below], 2)


def known(mean: Any, sd: Any = np.nan, quantiles: Any = np.nan, probabilities: Array = PROBABILITIES) -> Truth:
    """The truth from numbers that broadcast; quantiles have a leading dimension of 3."""
    mean, sd, *three = np.broadcast_arrays(mean, sd, *np.broadcast_to(quantiles, (3, *np.shape(quantiles)[1:])))
    errors = np.zeros((5, *mean.shape))
    return Truth(*(np.asarray(part, dtype=np.float64) for part in (mean, sd, np.stack(three), errors)), probabilities)


def from_scipy(distribution: Any, probabilities: Array = PROBABILITIES) -> Truth:
    """The truth of a frozen distribution of SciPy."""
    quantiles = np.stack([distribution.ppf(p) for p in probabilities])
    return known(distribution.mean(), distribution.std(), quantiles, probabilities)


def from_grid(values: npt.ArrayLike, log_weights: npt.ArrayLike, probabilities: Array = PROBABILITIES) -> Truth:
    """The truth by quadrature: values and log weights of the cells of a grid, `(…, cell)`, of any dimensions."""
    x, log_w = np.broadcast_arrays(np.asarray(values, dtype=np.float64), np.asarray(log_weights, dtype=np.float64))
    w = np.exp(log_w - log_w.max(-1, keepdims=True))
    w /= w.sum(-1, keepdims=True)
    mean = (w * x).sum(-1)
    sd = np.sqrt((w * (x - mean[..., None]) ** 2).sum(-1))
    order = x.argsort(-1)
    x, w = (np.take_along_axis(part, order, -1) for part in (x, w))
    middle = w.cumsum(-1) - 0.5 * w
    rows = zip(x.reshape(-1, x.shape[-1]), middle.reshape(-1, x.shape[-1]), strict=True)
    quantiles = np.array([np.interp(probabilities, at, value) for value, at in rows])
    return known(mean, sd, quantiles.T.reshape(3, *mean.shape), probabilities)


def from_draws(draws: npt.ArrayLike) -> Truth:
    """The truth as draws `(chain, draw, …)` of another source know it."""
    draws = np.asarray(draws, dtype=np.float64)
    quantiles = np.quantile(draws, PROBABILITIES, axis=(0, 1))
    truth = known(draws.mean((0, 1)), draws.std((0, 1)), quantiles)
    statistics = truth.statistics(draws)
    return replace(truth, errors=statistics.std((0, 1)) / np.sqrt(diagnostics.ess(statistics)))


def limit(count: int) -> float:
    """|z| of a simultaneous test of so many statistics with a false-alarm probability of 1e-5."""
    return NormalDist().inv_cdf(1 - 1e-5 / (2 * count))


def signed_scores(draws: Array, truth: Truth) -> tuple[Array, Array]:
    """z of the five expectations and their effective sample sizes, `(5, …)`; NaN where nothing is compared."""
    assert draws.shape[2:] == truth.mean.shape, (draws.shape, truth.mean.shape)
    statistics, expected = truth.statistics(draws), truth.expected
    sizes = diagnostics.ess(statistics)
    variance = np.concatenate([statistics[:, :, :2].var((0, 1)), expected[2:] * (1 - expected[2:])])
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = (statistics.mean((0, 1)) - expected) / np.sqrt(variance / sizes + truth.errors**2)
    return scores, np.where(np.isnan(expected), np.nan, sizes)


def z_scores(draws: Array, truth: Truth) -> tuple[Array, Array]:
    """|z| of the five expectations and their effective sample sizes, `(5, …)`; NaN where nothing is compared."""
    scores, sizes = signed_scores(draws, truth)
    return np.abs(scores), sizes


def assert_agrees(draws: Mapping[str, npt.ArrayLike], truth: Mapping[str, Truth]) -> None:
    """Draws `(chain, draw, …)` by name agree with the truth, and would not with a planted defect."""
    arrays = {name: np.asarray(draws[name], dtype=np.float64) for name in truth}
    found = {name: z_scores(arrays[name], truth[name]) for name in truth}
    few = {name: np.nanmin(sizes) for name, (_, sizes) in found.items() if np.nanmin(sizes) < MIN_ESS}
    assert not few, f"effective sample sizes below {MIN_ESS}: {few}"
    count = sum(int(np.isfinite(sizes).sum()) for _, sizes in found.values())
    largest = limit(count)
    worst = {name: _worst(scores) for name, (scores, _) in found.items()}
    assert all(score < largest for score, _ in worst.values()), f"|z| beyond {largest:.2f}: {worst}"
    for name, true in truth.items():
        centre, spread = arrays[name].mean((0, 1)), arrays[name].std((0, 1))
        planted = {"shifted": arrays[name] + 0.25 * spread}
        if np.isfinite(true.sd).any() or np.isfinite(true.quantiles).any():
            planted["narrow"] = centre + 0.85 * (arrays[name] - centre)
        for defect, wrong in planted.items():
            assert _worst(z_scores(wrong, true)[0])[0] > largest, f"{name}: the {defect} draws were not noticed"


def _worst(scores: Array) -> tuple[float, tuple[int, ...]]:
    """The largest |z| and where it is: statistic, then the scalar's position."""
    place = np.unravel_index(np.nanargmax(scores), scores.shape)
    return float(scores[place]), tuple(int(i) for i in place)
