"""Measuring remedies on the same data and against the same reference."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from pyro.nn import PyroModule

from calibrant.errors import CalibrantError, InferenceError
from calibrant.evaluation.judgements.against_reference import verdicts
from calibrant.evaluation.statistics.comparison import LEFT_OUT_LIMIT, compare
from calibrant.evaluation.statistics.gaps import MAX_SE
from calibrant.evaluation.statistics.joining import check_same_problem
from calibrant.inference.bounds.evidence import evidence
from calibrant.inference.drawing import posterior_of
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import log_evidence_of
from calibrant.inference.reweighting import importance, log_mean, log_weights, reliable, weights
from calibrant.progress import Progress
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
GUIDE, REFINED, RESAMPLED = "guide", "refined", "resampled"
_POOL = 10  # number of guide draws for each draw that resampling keeps
_POOL_ROWS = 500_000  # number of rows of the pool that are in memory at a time
_STATISTICS = (
    *(name + end for name in ("elbo", "gain", "gap", "recovered", "sd_error", "mean_error") for end in ("", "_se")),
    *("coverage", "fails", "unclear", "khat_good", "seconds"),
)


@dataclass
class Tried:
    """A remedy that was tried, with its results for every datum.

    Attributes:
        reason: why it could not be tried, or "".
        weights: log p − log q at its draws, `(data, draw)`; None for resampling.
        bound: log of the mean weight, `(data,)`: in expectation no more than log p(x).
        numbers: statistics of the remedy, its row in the table of results.
    """

    name: str
    reason: str = ""
    guide: PyroModule | None = None
    weights: Array | None = None
    bound: Array | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    @property
    def reached(self) -> Array | None:
        """The ELBO of every datum, `(data,)`, or the importance bound for resampling; None if it was not tried."""
        return self.bound if self.weights is None else self.weights.mean(1)


_NOTES = {"checks": 0, "comparison": "no reference given", "trained_on": "nothing", "training_data": 0}


@dataclass
class Bench:
    """The data and the reference on which all remedies are measured."""

    problem: Problem
    reference: xr.DataTree | None
    draws: int
    seed: int
    total: int
    progress: Progress
    done: int = 0
    notes: dict[str, Any] = field(default_factory=lambda: dict(_NOTES))

    def advance(self, name: str) -> None:
        """Report that one more remedy was measured."""
        self.done += 1
        self.progress("remedies", self.done, self.total, name)

    def judge(self, name: str, make: Callable[[], PyroModule], timed: bool = True) -> Tried:
        """Build a guide, and measure it."""
        begun = time.perf_counter()
        try:
            guide = make()
            seconds = time.perf_counter() - begun if timed else 0.0
            # All guides get the same noise, which cancels in the difference of guide and refined guide.
            tree = posterior_of(self.problem.with_guide(guide), self.draws, seed=stream(self.seed, "posterior"))
        except CalibrantError as error:
            if name == GUIDE:
                raise
            return Tried(name, str(error))
        logs = log_weights(tree)
        row = Tried(name, "", guide, logs, log_mean(logs)[0], {"seconds": seconds, **self.compared(tree)})
        with suppress(InferenceError):  # too few draws, or a datum outside the support
            row.numbers["khat_good"] = float(reliable(weights(tree)).mean())
        self.advance(name)
        return row

    def resample(self) -> Tried:
        """Resample the guide's draws; the pool of draws is computed and discarded block by block."""
        begun, pool = time.perf_counter(), _POOL * self.draws
        data = self.problem.data
        parts = np.array_split(np.arange(len(data)), math.ceil(len(data) * pool / _POOL_ROWS))
        trees = []
        try:
            for number, index in enumerate(part for part in parts if len(part)):
                some = self.problem.of_some(data[index])
                drawn = posterior_of(some, pool, seed=stream(self.seed, "pool", number))
                trees.append(importance(drawn, self.draws, stream(self.seed, "resampled", number)))
        except CalibrantError as error:
            return Tried(RESAMPLED, str(error))
        tree = _joined(trees)
        numbers = {
            "seconds": time.perf_counter() - begun,
            "khat_good": float(reliable(tree["importance"].dataset).mean()),
            **self.compared(tree),
        }
        self.advance(RESAMPLED)
        return Tried(RESAMPLED, "", None, None, tree["importance"].dataset["log_evidence"].values, numbers)

    def compared(self, tree: xr.DataTree) -> dict[str, float]:
        """Statistics of a tree against the reference; empty if they cannot be compared."""
        if self.reference is None:
            return {}
        check_same_problem(tree, self.reference)
        try:
            comparison = compare(tree, self.reference)
        except InferenceError as error:  # there are too few draws
            self.notes["comparison"] = str(error)
            return {}
        if not comparison.sizes["data"]:
            self.notes["comparison"] = "no datum has a reference posterior"
            return {}
        if not comparison.sizes["latent"]:
            self.notes["comparison"] = "no continuous local latent"
            return {}
        found = [verdict.status for verdict in verdicts(comparison)]
        self.notes |= {"checks": len(found), "comparison": ""}
        ratio, ratio_se = (comparison[name].values for name in ("sd_ratio", "sd_ratio_se"))
        sd, sd_se = _root(np.log(ratio), ratio_se / ratio)
        mean, mean_se = _root(comparison["mean_error"].values, comparison["mean_error_se"].values)
        return {
            "sd_error": sd,
            "sd_error_se": sd_se,
            "mean_error": mean,
            "mean_error_se": mean_se,
            "coverage": float(comparison["coverage"].mean()),
            "fails": found.count("fail"),
            "unclear": found.count("cannot tell"),
        }

    def evidence(self, rows: list[Tried]) -> tuple[Array, str]:
        """log p(x) of the data that are judged (NaN for all other data), and the method that gave it."""
        guides = [(row.guide, row.weights) for row in rows if row.guide is not None and row.weights is not None]
        guides = [(guide, weights) for guide, weights in guides if np.isfinite(weights).all()]
        program, data = self.problem.program, self.problem.data
        known, method = np.full(len(data), np.nan), "exact"
        if self.reference is None:
            with suppress(InferenceError):
                known = log_evidence_of(program, data).cpu().numpy()
        elif guides:
            best, weights = max(guides, key=lambda one: float(one[1].mean()))
            bridge = stream(self.seed, "bridge")
            found = evidence(program, best, data, self.reference, weights, MAX_SE, bridge)
            known, method = found.log_evidence, "exact" if "exact" in found.method else "bridge"
        if np.isfinite(known).mean() >= 1 - LEFT_OUT_LIMIT:
            return known, method
        bounds = [row.bound for row in rows if row.bound is not None and np.isfinite(row.bound).all()]
        return max(bounds, key=lambda bound: float(bound.mean()), default=known), "bound"


def _joined(trees: list[xr.DataTree]) -> xr.DataTree:
    """Join trees of parts of the data into one."""

    def whole(name: str) -> xr.Dataset:
        parts = [tree[name].to_dataset() for tree in trees]
        if len(parts) == 1 or "data" not in parts[0].dims:
            return parts[0]
        return xr.concat(parts, "data", data_vars="minimal", coords="minimal", compat="override", join="override")

    return xr.DataTree.from_dict({f"/{name}": whole(name) for name in trees[0].children})


def _mean(values: Array) -> tuple[float, float]:
    """The mean over data with its standard error, which is NaN for a single datum."""
    se = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), se


def _root(errors: Array, noise: Array) -> tuple[float, float]:
    """Root mean square of errors `(data, latent)` without the contribution of noise, and its standard error."""
    square, se = _mean((errors**2 - noise**2).mean(1))
    root = math.sqrt(max(square, 0.0))
    return root, math.sqrt(square + se) - root if square > 0 else math.sqrt(max(se, 0.0))


def results_table(rows: list[Tried], known: Array, method: str) -> xr.Dataset:
    kept = np.isfinite(known)
    with np.errstate(invalid="ignore"):  # the ELBO is −∞ if a guide leaves the support
        for row in rows:
            row.numbers |= _worth(row, rows[0], known, kept, method)
    names = [row.name for row in rows]
    variables: dict[str, Any] = {
        name: ("remedy", np.array([row.numbers.get(name, math.nan) for row in rows])) for name in _STATISTICS
    }
    variables["reason"] = ("remedy", np.array([row.reason for row in rows], dtype=str))
    attrs = {"data": int(kept.sum()), "left_out": int((~kept).sum()), "evidence": method}
    return xr.Dataset(variables, coords={"remedy": names}, attrs=attrs)


def _worth(row: Tried, guide: Tried, known: Array, kept: npt.NDArray[np.bool_], method: str) -> dict[str, float]:
    """ELBO, gap, gain and recovered share of a remedy, over the same data for all remedies."""
    if row.reached is None or guide.reached is None or not kept.any():
        return {}
    numbers = {}
    if row.weights is not None:
        numbers["elbo"], numbers["elbo_se"] = _mean(row.reached[kept])
    elif method == "bound":  # the best bound, which may be that of resampling
        return {}
    gap, first = known[kept] - row.reached[kept], known[kept] - guide.reached[kept]
    numbers["gap"], numbers["gap_se"] = _mean(gap)
    if row is guide:
        return numbers
    gain = row.reached[kept] - guide.reached[kept]
    numbers["gain"], numbers["gain_se"] = _mean(gain)
    share = gain.mean() / first.mean()
    numbers["recovered"], numbers["recovered_se"] = float(share), _mean((gain - share * first) / first.mean())[1]
    return numbers
