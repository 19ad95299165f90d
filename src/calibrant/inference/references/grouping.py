"""Which chains of a posterior are in the same mode.

Two chains are linked if their draws overlap on the line between them, so that at least one of them moves towards the
other, or if the density has no valley between their centres: chains that are slow, or still travel, are not in
different modes. Groups are what links hold together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import connected_components

from calibrant.inference.references.partition import whitening

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]
Density = Callable[[Array], Array]

RHAT_OF_STARTS = 1.1  # nested R-hat above which chains may be in different modes
_VALLEY = 2.0  # nats by which the density between two centres has to be lower than at both
_BETWEEN = 15  # points between two centres
_SLACK, _SLACK_EACH = 15.0, 1.0  # nats, and nats per entry: a group with less mass is dropped, however rough its mass


def nested_rhat(draws: Array) -> Array:
    """Nested R-hat of every unit, the largest of its entries, where every start is a superchain of one chain.

    It is √(1 + B / W) with B the variance between the means of the superchains, and W the variance within (Margossian,
    Hoffman, Sountsov, Riou-Durand, Vehtari & Gelman 2024, Bayesian Analysis, eq. 5 with one chain per superchain).

    Args:
        draws: `(unit, start, draw, width)`; starts with NaN are ignored.

    Returns:
        `(unit,)`; 1 where fewer than two starts are left.
    """
    found = np.ones(len(draws))
    for unit, each in enumerate(draws):
        sound = each[np.isfinite(each).all((1, 2))]
        if len(sound) > 1:
            between, within = sound.mean(1).var(0, ddof=1), sound.var(1, ddof=1).mean(0)
            found[unit] = np.sqrt(1 + between / np.maximum(within, 1e-300)).max()
    return found


def groups_of(draws: Array, density: Density) -> Labels:
    """The group of every start, from 0 on by decreasing number of starts; −1 for lost starts and groups without mass.

    Args:
        draws: draws of all starts of one posterior, `(start, draw, width)`; NaN for starts without a finite density.
        density: the log density at vectors `(n, width)`.
    """
    sound = np.flatnonzero(np.isfinite(draws).all((1, 2)))
    result = np.full(len(draws), -1)
    if len(sound):
        draws = draws[sound]
        at_draws = density(draws.reshape(-1, draws.shape[2])).reshape(draws.shape[:2])
        labels = _linked(draws, at_draws, density)
        result[sound] = _by_size(np.where(_has_mass(draws, at_draws, labels), labels, -1))
    return result


def _linked(draws: Array, at_draws: Array, density: Density) -> Labels:
    """Components of chains whose draws overlap, then of those without a valley between them."""
    centres, at_centres = _centres(draws, at_draws, density)
    links = _overlap(draws)
    count, labels = connected_components(links, directed=False)
    if count == 1:
        return labels
    first, second = np.nonzero(np.triu(labels[:, None] != labels))
    share = (np.arange(_BETWEEN) + 1.0) / (_BETWEEN + 1)
    between = centres[first, None] + share[:, None] * (centres[second] - centres[first])[:, None]
    lowest = density(between.reshape(-1, draws.shape[2])).reshape(between.shape[:2])
    lowest = np.where(np.isnan(lowest), -np.inf, lowest).min(1)
    links[first, second] = lowest >= np.minimum(at_centres[first], at_centres[second]) - _VALLEY
    return connected_components(links, directed=False)[1]


def _centres(draws: Array, at_draws: Array, density: Density) -> tuple[Array, Array]:
    """The mean of every chain or, where the density is higher there, its best draw; and the log densities there.

    Between the draws of two chains, the density of many dimensions has a bulge that hides a valley.
    """
    means = draws.mean(1)
    at_means, best = density(means), at_draws.argmax(1)
    at_best = at_draws[np.arange(len(draws)), best]
    bent = ~(at_means >= at_best)
    return np.where(bent[:, None], draws[np.arange(len(draws)), best], means), np.where(bent, at_best, at_means)


def _overlap(draws: Array) -> npt.NDArray[np.bool_]:
    """Whether the draws of two chains overlap on the line between their means, by the covariance within chains."""
    means = draws.mean(1)
    whiten = whitening((draws - means[:, None]).reshape(-1, draws.shape[2]))
    on = draws @ (whiten.T @ (whiten @ means.T))  # (start, draw, start): product with the mean of every other chain
    own = np.diagonal(on, axis1=0, axis2=2).T  # (start, draw)
    ahead = on - own[:, :, None]  # how far a draw is on the way to each other chain
    farthest = ahead.max(1)  # (start, other)
    nearest = -farthest.T  # the draw of the other chain that is nearest to this one, on the same scale
    return farthest >= nearest


def _has_mass(draws: Array, at_draws: Array, labels: Labels) -> npt.NDArray[np.bool_]:
    """Whether the group of a start has mass, by its mean log density and its widths: only far too little is dropped."""
    rough = np.empty(labels.max() + 1)
    for label in range(len(rough)):
        own = draws[labels == label]
        variance = np.maximum(own.var(1).mean(0), 1e-300)
        rough[label] = at_draws[labels == label].mean() + 0.5 * np.log(variance).sum()
    return (rough >= rough.max() - _SLACK - _SLACK_EACH * draws.shape[2])[labels]


def _by_size(labels: Labels) -> Labels:
    """The same groups, numbered by decreasing size and then by their first start; −1 stays."""
    known, first, count = np.unique(labels[labels >= 0], return_index=True, return_counts=True)
    order = np.lexsort((first, -count))
    new = np.full(labels.max() + 2, -1)
    new[known[order]] = np.arange(len(known))
    return new[labels]
