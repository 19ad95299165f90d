"""Pareto-smoothed importance resampling of guide draws, datum by datum.

The weights p(x, z) / q(z | x) are smoothed and diagnosed by PSIS (Vehtari, Simpson, Gelman, Yao & Gabry 2024, JMLR
25(72)) as implemented in arviz_stats. This is done for each datum, since the k-hat of a whole batch would grow with the
size of the batch.
"""

from __future__ import annotations

import json
import math

import numpy as np
import numpy.typing as npt
import xarray as xr
from arviz_stats.base import array_stats

from calibrant.errors import InferenceError
from calibrant.inference.trees import SAMPLE, latent_names
from calibrant.streams import stream

Array = npt.NDArray[np.float64]

MIN_DRAWS = 100  # with fewer, the tail is too short for a fit
NEARLY_EQUAL = 0.9  # ESS per draw from which weights are reliable whatever k-hat says

_ROUNDING = 1e-6  # nats; the k-hat of weights that differ by less would be that of rounding errors
_OF_DRAWS = ("posterior", "sample_stats", "posterior_predictive", "log_likelihood")
_NOTE = (
    "copies of independent draws of the guide, resampled by PSIS weights, those of one draw side by side: they are not "
    "independent, so count them by autocorrelation, or as `ess` of the group `importance`"
)


def importance(post: xr.DataTree, draws: int | None = None, seed: int = 0) -> xr.DataTree:
    """Resample the draws of a guide for every datum by Pareto-smoothed importance weights.

    Copies of a draw are adjacent (systematic resampling in the order of the draws), so that the autocorrelation of the
    resampled draws reflects the loss of effective draws; the standard errors of `evaluation.compare` and ArviZ account
    for it.

    Args:
        post: a tree from `posterior`, ideally with ten times as many draws as are kept.
        draws: number of draws kept per datum; None keeps as many as the tree has.
        seed: random seed for the resampling.

    Returns:
        A tree in the same format (one chain; method "importance", `independent_draws` 0) with the group `importance`,
        dimension `data`: `pareto_k`; `ess`, the effective number of draws of the smoothed weights (resampling loses
        some more, but few if many more draws are given than kept); `log_evidence`, the log of the mean weight (nats;
        its expectation is a lower bound) ± `log_evidence_se` (delta method; both are meaningless where k-hat is large).
        The attribute `good_k` is the k-hat below which weights from so many draws are reliable. k-hat is −inf where the
        largest weights are all equal, and inf where too few draws have a positive weight.

    Raises:
        InferenceError: for a tree without `log_p` and `log_q`, with shared latents (their draws have one weight for all
            data together, which degenerates as data are added), with few draws, or weights that are not finite.
    """
    logs = _checked_log_weights(post)
    pool = logs.shape[1]
    count = pool if draws is None else draws
    if count < 1:
        raise InferenceError(f"draws={draws}: give the number of draws to keep, 1 or more")
    smoothed, khat = _psis(logs)
    offsets = np.random.default_rng(stream(seed, "importance")).random(len(logs))
    index = np.stack([_resample(w, count, u) for w, u in zip(np.exp(smoothed), offsets, strict=True)], 1)
    groups = {name: group.to_dataset() for name, group in post.children.items()}
    groups |= {name: _gathered(groups[name], index) for name in _OF_DRAWS if name in groups}
    old = groups["posterior"].attrs
    settings = {**json.loads(old.get("settings", "{}")), "pool": pool, "resampled": count, "resampling_seed": seed}
    new = {"method": "importance", "independent_draws": 0, "draws_note": _NOTE, "settings": json.dumps(settings)}
    groups["posterior"] = groups["posterior"].assign_attrs({**old, **new})
    groups["importance"] = _summary(logs, smoothed, khat, post["posterior"].coords["data"].values)
    return xr.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})


def weights(post: xr.DataTree) -> xr.Dataset:
    """Diagnose a guide by its importance weights, datum by datum and without a reference posterior.

    The weights p(x, z) / q(z | x) are all equal if the guide is the posterior. They depend only on the places where the
    guide draws, so that they do not reveal a mode that the guide misses, and hardly a guide that is too wide.

    Args:
        post: a tree from `posterior`.

    Returns:
        A dataset with dimension `data`: `pareto_k` and `ess`, the k-hat and effective number of draws of the smoothed
        weights; `log_evidence`, the log of the mean weight; `elbo`, the mean log weight; and `gap`, the difference of
        the two, each with a standard error `…_se` (nats; Monte Carlo, delta method). The expectation of `log_evidence`
        is a lower bound of log p(x), and that of `gap` a lower bound of KL(q ‖ p); both are close where k-hat is small.
        The attribute `good_k` is the k-hat below which weights from so many draws are reliable.
        `arviz_plots.plot_khat` takes the result.

    Raises:
        InferenceError: for the trees that `importance` refuses.
    """
    logs = _checked_log_weights(post)
    summary = diagnosis(logs, post["posterior"].coords["data"].values)
    elbo = logs.mean(1)
    with np.errstate(invalid="ignore"):  # −∞ where a guide leaves the support
        relative = np.exp(logs - summary["log_evidence"].values[:, None])
        terms = {"elbo": (elbo, logs), "gap": (summary["log_evidence"].values - elbo, relative - logs)}
        for name, (value, influence) in terms.items():
            summary[name] = ("data", value)
            summary[f"{name}_se"] = ("data", influence.std(1, ddof=1) / math.sqrt(influence.shape[1]))
    return summary


def diagnosis(log_weights: Array, labels: np.ndarray) -> xr.Dataset:
    """`pareto_k`, `ess` and `log_evidence`, as in `weights`, of log weights `(data, draw)`, labelled along `data`."""
    return _summary(log_weights, *_psis(log_weights), labels)


def log_weights(post: xr.DataTree) -> Array:
    """Log weights log p − log q, `(data, chain · draw)`; their mean over the draws estimates the ELBO."""
    stats = post["sample_stats"].dataset
    found = (stats["log_p"] - stats["log_q"]).transpose("data", *SAMPLE).values.astype(np.float64)
    return found.reshape(len(found), -1)


def reliable(summary: xr.Dataset) -> npt.NDArray[np.bool_]:
    """Whether the weights of each datum are reliable, `(data,)`.

    A small k-hat or nearly equal weights suffice: k-hat does not depend on the scale of log weights, so that it may be
    large even where all weights are nearly equal.

    Args:
        summary: result of `weights`, or the group `importance`.
    """
    small = summary["pareto_k"].values < summary.attrs["good_k"]
    return np.asarray(small | (summary["ess"].values > NEARLY_EQUAL * summary.attrs["pool"]))


def _checked_log_weights(post: xr.DataTree) -> Array:
    """Log weights, after checking that every datum has draws and finite weights of its own."""
    missing = {"posterior", "sample_stats"} - set(post.children)
    if missing or not {"log_p", "log_q"} <= set(post["sample_stats"].data_vars):
        raise InferenceError(
            "importance weights need `log_p` and `log_q` in `sample_stats`: give a tree of inference.posterior"
        )
    group = post["posterior"].dataset
    if group.attrs.get("method") == "importance":
        raise InferenceError("these draws are resampled already: give the tree of calibrant.inference.posterior")
    if shared := [name for name in latent_names(group) if "data" not in group[name].dims]:
        raise InferenceError(
            f"latents {shared} are shared: a draw has one weight for all data together, whose noise grows with their "
            "number, not one per datum; use calibrant.inference.reference"
        )
    found = log_weights(post)
    if found.shape[1] < MIN_DRAWS:
        raise InferenceError(f"{found.shape[1]} draws per datum are too few for a k-hat: {MIN_DRAWS} are needed")
    usable = ~(np.isnan(found) | np.isposinf(found)).any(1) & np.isfinite(found).any(1)
    if not usable.all():
        label = group["data"].values.tolist()[int((~usable).argmax())]
        raise InferenceError(
            f"datum {label!r} has weights that are not finite, or no draw inside the model's support: look at it and "
            "at its guide"
        )
    return found


def _psis(log_weights: Array) -> tuple[Array, Array]:
    """Smoothed log weights `(data, draw)`, normalised to sum to one, and k-hat `(data,)`."""
    rows, khats = [], []
    for row in log_weights:
        largest = np.sort(row)[-_tail_length(len(row)) :]
        smoothed, khat = row, -np.inf
        if largest[-1] - largest[0] > _ROUNDING:
            with np.errstate(divide="ignore", invalid="ignore"):
                smoothed, khat = array_stats.psislw(-row)  # psislw expects log likelihoods, the negative log weights
        if not np.isfinite(khat) or np.isnan(smoothed).any() or np.isneginf(largest[0]):
            smoothed, khat = row, (-np.inf if khat == -np.inf else np.inf)
        rows.append(smoothed - np.logaddexp.reduce(smoothed))
        khats.append(float(khat))
    return np.stack(rows), np.array(khats)


def _tail_length(draws: int) -> int:
    """Number of the largest weights to which PSIS fits the tail."""
    return int(min(0.2 * draws, 3 * math.sqrt(draws)))


def _resample(weights: Array, count: int, offset: float) -> npt.NDArray[np.intp]:
    """Systematic resampling: ascending positions of `count` draws; a draw of weight zero is never chosen."""
    total = weights.cumsum()
    index = np.searchsorted(total, (np.arange(count) + offset) / count * total[-1], side="right")
    return np.minimum(index, np.flatnonzero(weights)[-1])


def _gathered(group: xr.Dataset, index: npt.NDArray[np.intp]) -> xr.Dataset:
    """The draws at `index` `(draw, data)` as one chain; values without a data dimension follow the first datum."""
    flat = group.drop_vars(SAMPLE, errors="ignore").stack(pool=SAMPLE, create_index=False)
    pool = xr.DataArray(index, dims=("draw", "data"))
    datum = xr.DataArray(np.arange(index.shape[1]), dims="data")
    kept = {}
    for name, variable in flat.data_vars.items():
        place = {"pool": pool, "data": datum} if "data" in variable.dims else {"pool": pool[:, 0]}
        kept[name] = variable.isel(place).expand_dims("chain").transpose(*group[name].dims)
    coords = {"chain": [0], "draw": np.arange(len(index)), **flat.coords}
    return xr.Dataset(kept, coords=coords, attrs=group.attrs)


def _summary(log_weights: Array, smoothed: Array, khat: Array, labels: np.ndarray) -> xr.Dataset:
    evidence, se = log_mean(log_weights)
    variables = {
        "pareto_k": khat,
        "ess": np.exp(-np.logaddexp.reduce(2 * smoothed, axis=1)),
        "log_evidence": evidence,
        "log_evidence_se": se,
    }
    good = min(1 - 1 / math.log10(log_weights.shape[1]), 0.7)
    attrs = {"good_k": good, "pool": log_weights.shape[1]}
    return xr.Dataset({n: ("data", v) for n, v in variables.items()}, coords={"data": labels}, attrs=attrs)


def log_mean(log_weights: Array) -> tuple[Array, Array]:
    """Log of the mean weight of each datum, and its standard error (delta method), from `(data, draw)`."""
    draws = log_weights.shape[1]
    evidence = np.logaddexp.reduce(log_weights, axis=1) - math.log(draws)
    relative = np.exp(log_weights - evidence[:, None])
    return evidence, relative.std(1, ddof=1) / math.sqrt(draws)
