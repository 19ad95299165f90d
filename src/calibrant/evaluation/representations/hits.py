"""Neighbours that are right or wrong, and the statistics of queries that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from calibrant.errors import DataError
from calibrant.evaluation.representations.neighbours import Neighbours
from calibrant.evaluation.representations.shared_database import with_database, worth_as_neighbour, worth_for_auroc
from calibrant.evaluation.statistics.arrays import Array
from calibrant.evaluation.statistics.counted import counted_auroc, counted_mean
from calibrant.evaluation.statistics.resampling import Groups, Statistic


@dataclass(frozen=True)
class Hits:
    """Neighbours of queries, and whether they are right.

    Attributes:
        found: the neighbours.
        right: whether each has the class of its query, `(query, k)`.
        classes: class of each query, `(query,)`.
        others: number of other images of its class in the database, `(query,)`.
    """

    found: Neighbours
    right: npt.NDArray[np.bool_]
    classes: Groups
    others: Groups

    def kept(self, singletons: str) -> Groups:
        """Positions of the queries that count: all, or those with other images of their class ("left-out")."""
        kept = np.flatnonzero(self.others > 0) if singletons == "left-out" else np.arange(len(self.others))
        if not len(kept):
            raise DataError("no query has another image of its class: give classes with two images or more")
        return kept


@dataclass(frozen=True)
class Judged:
    """The queries that count, with what is resampled together.

    Attributes:
        hits: neighbours of all queries.
        kept: positions of the queries that count.
        units: unit of each of these, `(kept,)`.
        shared: whether the queries are the database.
    """

    hits: Hits
    kept: Groups
    units: Groups
    shared: bool

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """Whether each neighbour of the queries that count has their class, `(kept, k)`."""
        return self.hits.right[self.kept]

    def recall(self, ks: Sequence[int]) -> Statistic:
        """Share of queries with a right image among the k nearest, `(resample, k)`."""
        statistic = counted_mean(np.stack([self.right[:, :k].any(1) for k in ks], 1))
        return self._with_database(statistic, ks, np.tile([0.0, 1.0], (len(self.kept), 1)))

    def r_auroc(self, uncertainty: Array) -> Statistic:
        """Probability that a query with a right nearest neighbour is more certain than a wrong one, `(resample,)`.

        Args:
            uncertainty: of the queries that count, `(kept,)`.
        """
        right = self.right[:, 0]
        plain = counted_auroc(-uncertainty, right)
        if right.all() or not right.any():
            return plain
        found = self._with_database(lambda counts: plain(counts)[:, None], (1,), worth_for_auroc(-uncertainty, right))
        return lambda counts: found(counts)[:, 0]

    def _with_database(self, statistic: Statistic, ks: Sequence[int], worth: Array) -> Statistic:
        """The statistic, with what queries are worth as neighbours where they are the database."""
        if not self.shared:
            return statistic
        return with_database(statistic, np.stack([self._database(k, worth) for k in ks], 1))

    def _database(self, k: int, worth: Array) -> Array:
        """What each query is worth as a neighbour; queries that do not count are not resampled."""
        size = len(self.hits.others)
        units, values = np.arange(size) + size, np.zeros((size, 2))  # their units are like no other
        units[self.kept], values[self.kept] = self.units, worth
        index, right = self.hits.found.index, self.hits.right
        return worth_as_neighbour(index, right, units, k, values)[self.kept]
