"""How well the scores of images separate other sets from the model's own, as shown and at matched contrast or power."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.separation import Placements, Separation, difference, pooled, strata_of
from calibrant.evaluation.uncertainty.matching import MATCHED, strata
from calibrant.evaluation.uncertainty.refused import is_decided
from calibrant.evaluation.uncertainty.sets import INSIDE

SHOWN = ("as shown", *MATCHED)

Mask = npt.NDArray[np.bool_]
Variables = dict[str, tuple[tuple[str, ...], Any]]


def auroc_difference(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """Differences of the AUROCs of two models or guides on the same images, with paired intervals.

    Args:
        first: result of `ood_experiment` for one model.
        second: result for the other model, with the same sets and the same seed.

    Returns:
        `difference`, first minus second, with `difference_se` and the ends of its 95% interval, `difference_low` and
        `difference_high`, over (source, matching, set), for the sources of both, on the images that both results have.

    Raises:
        InferenceError: for results on different images.
    """
    same = all(np.array_equal(first[n], second[n]) for n in ("of_set", "label", *MATCHED))
    if not same or first.attrs["matched_by"] != second.attrs["matched_by"]:
        raise InferenceError("the two results are of different images: run both with the same sets, images= and seed=")
    sources = [source for source in first["source"].values if source in second["source"].values]
    pair = [result.sel(source=sources) for result in (first, second)]
    there = np.all([_there(result) for result in pair], axis=0)
    one, other = (partial(_strata, result, there) for result in pair)
    found = _over_sets(pair[0], "difference", lambda *at: difference(one(*at), other(*at)))
    return xr.Dataset(found, coords={name: pair[0][name].values for name in ("source", "matching", "set")})


def aurocs(scores: xr.Dataset) -> Variables:
    """AUROCs of every set, with their intervals and what refused images could change."""
    there = _there(scores)
    found = _over_sets(scores, "auroc", lambda *at: pooled(_strata(scores, there, *at)))
    for name, sign in (("least", -1.0), ("most", 1.0)):
        filled = scores.assign(score=_with_extremes(scores, sign))
        bound = _over_sets(filled, "auroc", lambda *at, filled=filled: pooled(_strata(filled, _there(filled), *at)))
        found[f"auroc_{name}"] = bound["auroc"]
    refused = np.array(
        [[row[_of_pair(scores, name)].mean() for name in scores["set"].values] for row in scores["refused"].values]
    )
    dims = ("matching", "set")
    return {**found, "share_refused": (dims, refused), "decided": (dims, np.vectorize(is_decided)(1 - refused))}


def _there(scores: xr.Dataset) -> Mask:
    """Images that all sources have, `(matching, image)`."""
    return ~np.isnan(scores["score"].values).any(0)


def _with_extremes(scores: xr.Dataset, sign: float) -> xr.DataArray:
    """Scores with refused images at the extreme that makes the AUROC least (sign −1) or most (+1)."""
    extreme = xr.where(scores["of_set"] == INSIDE, -sign * np.inf, sign * np.inf)
    return scores["score"].where(~(scores["refused"] & scores["score"].isnull()), extreme)


def _of_pair(scores: xr.Dataset, name: str) -> Mask:
    return np.isin(scores["of_set"].values, [INSIDE, name])


def _strata(scores: xr.Dataset, there: Mask, source: int, matching: int, name: str) -> list[Placements]:
    """Placements of a set and the inside set, in strata where these match them."""
    values, of_set = scores["score"].values[source, matching], scores["of_set"].values
    sides = [(of_set == side) & there[matching] for side in (name, INSIDE)]
    labels = [np.zeros(side.sum(), dtype=int) for side in sides]
    if matching and scores.attrs["matched_by"] == "strata":
        amounts = scores[SHOWN[matching]].values
        labels = list(strata(amounts[sides[0]], amounts[sides[1]], scores.attrs["strata"]))
    return strata_of(values[sides[0]], values[sides[1]], (labels[0], labels[1]))


def _over_sets(scores: xr.Dataset, name: str, judge: Callable[[int, int, str], Separation]) -> Variables:
    """A separation of every source, way of matching and set."""
    dims = ("source", "matching", "set")
    sizes = (range(scores.sizes[dims[0]]), range(scores.sizes[dims[1]]), scores["set"].values)
    found = np.array([[[judge(s, m, k) for k in sizes[2]] for m in sizes[1]] for s in sizes[0]])
    ends = ("", "_se", "_low", "_high")
    return {f"{name}{end}": (dims, found[..., i]) for i, end in enumerate(ends)}
