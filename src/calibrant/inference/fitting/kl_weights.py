"""Weights of the divergences of latents from their priors, constant or changing from epoch to epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite

import numpy as np

from calibrant.errors import InferenceError
from calibrant.guides.from_prior import PriorGuide
from calibrant.inference.fitting.objectives import MULTI_SAMPLE
from calibrant.program.contract import Program, Values
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.latents import sites
from calibrant.program.tracing import guide_trace, is_local, sampled

KLWeight = float | Sequence[Sequence[float]]
Schedules = dict[str, list[list[float]]]
"""Latent → points (epoch, weight) in JSON form, in the order of the epochs."""


def schedules_of(kl_weights: Mapping[str, KLWeight] | None) -> Schedules:
    """The weights as points (epoch, weight); a constant is one point.

    Raises:
        InferenceError: for weights that are negative, not finite or zero at the end, and for epochs out of order.
    """
    if kl_weights is not None and not isinstance(kl_weights, Mapping):
        raise InferenceError(f"kl_weights={kl_weights!r}: give a weight for each latent, such as {{'z': 4.0}}")
    return {name: _points(name, weight) for name, weight in (kl_weights or {}).items()}


def _points(name: str, weight: KLWeight) -> list[list[float]]:
    given = f"kl_weights: {name!r} has {weight!r}"
    try:
        points = [[float(x) for x in point] for point in weight] if isinstance(weight, Sequence) else [[0.0, weight]]
        epochs, weights = zip(*((float(epoch), float(value)) for epoch, value in points), strict=True)
    except (TypeError, ValueError) as error:
        raise InferenceError(f"{given}; give a number, or points such as [[0, 0.1], [20, 1.0]]") from error
    if not all(isfinite(value) and value >= 0 for value in (*epochs, *weights)) or weights[-1] == 0:
        raise InferenceError(f"{given}; epochs and weights are 0 or more, and the last weight is above 0")
    if any(later <= earlier for earlier, later in pairwise(epochs)):
        raise InferenceError(f"{given}; the epochs of its points must rise")
    return [list(point) for point in zip(epochs, weights, strict=True)]


def weights_at(schedules: Schedules, epochs: float) -> dict[str, float]:
    """The weights after a number of epochs, interpolated linearly between the points and constant beyond them."""
    return {name: _at(points, epochs) for name, points in schedules.items()}


def _at(points: list[list[float]], epochs: float) -> float:
    places, weights = zip(*points, strict=True)
    return float(np.interp(epochs, places, weights))


def last_weights(schedules: Schedules) -> dict[str, float]:
    """The weights at the end."""
    return {name: points[-1][1] for name, points in schedules.items()}


def still_change(schedules: Schedules, epochs: float) -> bool:
    """Whether a weight changes after a number of epochs."""
    return any(points[-1][0] > epochs for points in schedules.values())


def check_weights(
    schedules: Schedules, objective: str, model: Program, guide: Program, observed: Values, covariates: Values
) -> None:
    """Refuse weights that no divergence belongs to.

    Raises:
        InferenceError: for objectives of several draws, a collapsed guide, names that are no latents of a datum, and
            different weights of two latents of which the guide draws the first before the one on which its prior
            depends.
    """
    if not schedules:
        return
    if objective in MULTI_SAMPLE:
        raise InferenceError(
            f"kl_weights: objective={objective!r} has no divergences to be weighted: use objective='stl' or 'kl'"
        )
    size = len(next(iter(observed.values())))
    with seeded(0), defaults(model, observed) as place:
        rows, cols = cast(observed, *place), cast(covariates, *place)
        order = [name for name, site in sampled(guide_trace(guide, rows, size, cols)).items() if is_local(site)]
    if unknown := sorted(set(schedules) - set(order)):
        raise InferenceError(f"kl_weights names {unknown}, which are no latents of a datum; those are {order}")
    if isinstance(guide, PriorGuide):
        raise InferenceError(
            "kl_weights: the guide is the model's own prior, so that all divergences are zero: leave kl_weights out"
        )
    if getattr(guide, "spec", {}).get("structure") == "collapsed":
        raise InferenceError(
            "kl_weights: a collapsed guide has the model's own conditional, which no weight changes: use "
            "structure='faithful'"
        )
    _check_order(schedules, order, {name: site.parents for name, site in sites(model, observed, covariates).items()})


def _check_order(schedules: Schedules, order: list[str], parents: Mapping[str, Sequence[str]]) -> None:
    one = [[0.0, 1.0]]
    for place, name in enumerate(order):
        for later in set(order[place + 1 :]) & set(parents[name]):
            if schedules.get(name, one) != schedules.get(later, one):
                raise InferenceError(
                    f"kl_weights: the guide draws {name!r} before {later!r}, on which its prior depends, so that their "
                    f"divergences are one: give both the same weight, or let the guide draw {later!r} first"
                )
