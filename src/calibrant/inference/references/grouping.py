"""Which chains of a posterior are in the same mode.

Two chains are linked if their draws overlap on the line between them, so that at least one of them moves towards the
other, or if the density has no valley between their centres: chains that are slow, or still travel, are not in
different modes. Groups are what links hold together. Where a few chains have moved between groups that hardly mix,
these chains are ignored: chains that are kept in each group know its mass better than a few moves do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse.csgraph import connected_components

from calibrant.inference.references.partition import whitening

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]
Links = npt.NDArray[np.bool_]
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


@dataclass(frozen=True)
class Grouped:
    """The groups of the starts of one posterior.

    Attributes:
        labels: group of every start, from 0 on by decreasing number of starts; −1 for lost starts, for chains that
            moved between groups, and for groups without mass.
        apart: whether no chain moved between groups.
    """

    labels: Labels
    apart: bool

    @property
    def count(self) -> int:
        """Number of groups."""
        return int(self.labels.max()) + 1


def groups_of(draws: Array, density: Density) -> Grouped:
    """The groups of chains of one posterior.

    Args:
        draws: draws of all starts of one posterior, `(start, draw, width)`; NaN for starts without a finite density.
        density: the log density at vectors `(n, width)`.
    """
    sound = np.flatnonzero(np.isfinite(draws).all((1, 2)))
    labels, apart = np.full(len(draws), -1), False
    if len(sound):
        draws = draws[sound]
        at_draws = density(draws.reshape(-1, draws.shape[2])).reshape(draws.shape[:2])
        found, apart = _divided(_links(draws, at_draws, density))
        labels[sound] = _by_size(_with_mass(draws, at_draws, found))
    return Grouped(labels, apart and labels.max() > 0)


def _links(draws: Array, at_draws: Array, density: Density) -> Links:
    """Which pairs of chains overlap, or have no valley between them."""
    centres, at_centres = _centres(draws, at_draws, density)
    links = _overlap(draws)
    first, second = np.nonzero(np.triu(~links))
    if len(first):
        share = (np.arange(_BETWEEN) + 1.0) / (_BETWEEN + 1)
        between = centres[first, None] + share[:, None] * (centres[second] - centres[first])[:, None]
        lowest = density(between.reshape(-1, draws.shape[2])).reshape(between.shape[:2])
        lowest = np.where(np.isnan(lowest), -np.inf, lowest).min(1)
        open_way = lowest >= np.minimum(at_centres[first], at_centres[second]) - _VALLEY
        links[first, second] = links[second, first] = open_way
    return links


def _divided(links: Links) -> tuple[Labels, bool]:
    """Components of links, and whether no chain moved between them.

    If all chains are linked, those that link most pairs of chains which are not linked with each other are ignored
    (their label is −1): they have moved between groups. At most half of the chains are ignored.
    """
    count, labels = connected_components(links, directed=False)
    if count > 1:
        return labels, True
    kept = np.arange(len(links))
    while True:
        own = links[np.ix_(kept, kept)]
        crossing = ((own @ (~own).astype(np.int64)) * own).sum(1)
        stays = 2 * crossing < crossing.max()
        if not stays.any() or 2 * stays.sum() < len(links):
            return np.zeros(len(links), np.intp), False
        kept = kept[stays]
        count, part = connected_components(links[np.ix_(kept, kept)], directed=False)
        if count > 1:
            labels = np.full(len(links), -1, np.intp)
            labels[kept] = part
            return labels, False


def _centres(draws: Array, at_draws: Array, density: Density) -> tuple[Array, Array]:
    """The mean of every chain or, where the density is higher there, its best draw; and the log densities there.

    Between the draws of two chains, the density of many dimensions has a bulge that hides a valley.
    """
    means = draws.mean(1)
    at_means, best = density(means), at_draws.argmax(1)
    at_best = at_draws[np.arange(len(draws)), best]
    bent = ~(at_means >= at_best)
    return np.where(bent[:, None], draws[np.arange(len(draws)), best], means), np.where(bent, at_best, at_means)


def _overlap(draws: Array) -> Links:
    """Whether the draws of two chains overlap on the line between their means, by the covariance within chains."""
    means = draws.mean(1)
    whiten = whitening((draws - means[:, None]).reshape(-1, draws.shape[2]))
    on = draws @ (whiten.T @ (whiten @ means.T))  # (start, draw, start): product with the mean of every other chain
    own = np.diagonal(on, axis1=0, axis2=2).T  # (start, draw)
    ahead = on - own[:, :, None]  # how far a draw is on the way to each other chain
    farthest = ahead.max(1)  # (start, other)
    nearest = -farthest.T  # the draw of the other chain that is nearest to this one, on the same scale
    return farthest >= nearest


def _with_mass(draws: Array, at_draws: Array, labels: Labels) -> Labels:
    """The labels, −1 for groups with far too little mass, by their mean log density and their widths."""
    rough = np.empty(labels.max() + 1)
    for label in range(len(rough)):
        own = draws[labels == label]
        variance = np.maximum(own.var(1).mean(0), 1e-300)
        rough[label] = at_draws[labels == label].mean() + 0.5 * np.log(variance).sum()
    enough = np.append(rough >= rough.max() - _SLACK - _SLACK_EACH * draws.shape[2], False)
    return np.where(enough[labels], labels, -1)


def _by_size(labels: Labels) -> Labels:
    """The same groups, numbered by decreasing size and then by their first start; −1 stays."""
    known, count = np.unique(labels[labels >= 0], return_counts=True)
    first = [np.flatnonzero(labels == label)[0] for label in known]
    new = np.full(labels.max() + 2, -1)
    new[known[np.lexsort((first, -count))]] = np.arange(len(known))
    return new[labels]
