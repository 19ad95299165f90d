"""Nearest neighbours by cosine, exact to the last tie, in bounded memory.

Blocks of queries are compared with the whole database in float32, and a few more candidates than asked for are kept.
Their cosines are then computed again in float64, always in one order, so that the result does not depend on the
processor. Queries whose candidates are not clearly separated from the rest, as among duplicates, are compared with the
whole database in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations.inputs import matrix_of, positions
from calibrant.evaluation.statistics.arrays import Array, Given
from calibrant.evaluation.statistics.settings import whole
from calibrant.progress import Progress, reporting

Index = npt.NDArray[np.int64]
SelfMatch = Literal["excluded", "second-hit"]

_BLOCK = 1 << 28  # bytes of the largest array of a block, beside a normalised copy of the database in float32
_SPARE = 8  # candidates beyond those that are asked for
_ROUNDING = 4e-6  # largest error of a cosine in float32, generously
_DIGITS = 12  # cosines that agree to so many decimals are tied


@dataclass(frozen=True)
class Neighbours:
    """The nearest images of every query, the nearest first.

    Attributes:
        index: positions in the database, `(query, k)`; of tied images, the one that comes first in the database.
        similarity: their cosines, `(query, k)`.
        tied: whether the first neighbour is tied with the next image, `(query,)`: another order of the database might
            then give another neighbour.
    """

    index: Index
    similarity: Array
    tied: npt.NDArray[np.bool_]


def nearest_neighbours(
    queries: Given,
    database: Given | None = None,
    k: int = 1,
    *,
    own: npt.ArrayLike | None = None,
    self_match: SelfMatch = "excluded",
    progress: Progress | bool = True,
) -> Neighbours:
    """The k images of a database with the largest cosines to each query.

    100,000 images with 1,280 features each take less than 2 GB beside the input. An embedding of zeros has the cosine 0
    with every image.

    Args:
        queries: embeddings `(query, feature)`.
        database: embeddings `(image, feature)`; without it, the queries are the database, and no query is its own
            neighbour.
        k: number of neighbours.
        own: position of each query in the database, `(query,)`, −1 for those that it does not hold. Needed where a
            database that is given holds queries.
        self_match: "excluded" leaves out the query itself, by its position. "second-hit" is what published code does
            (arXiv 2307.03810): it ignores the first hit and takes it for the query, which is wrong among duplicates.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Raises:
        DataError: for embeddings that are no matrix or hold NaN, or matrices with different numbers of features.
        InferenceError: for more neighbours than there are other images, or an `own` that is no position.
    """
    progress = reporting(progress)
    asked = matrix_of(queries, "queries")
    stored = asked if database is None else matrix_of(database, "database")
    if asked.shape[1] != stored.shape[1]:
        raise DataError(f"queries have {asked.shape[1]} features and the database {stored.shape[1]}: give the same")
    places = _places(own, len(asked), len(stored), database is None)
    _check(k, places, len(stored), self_match)
    second = self_match == "second-hit"
    wanted = k + second
    base = _Database(stored)
    found: list[Neighbours] = []
    rows = max(1, _BLOCK // (4 * max(len(stored), 1)))
    for start in range(0, len(asked), rows):
        block = slice(start, start + rows)
        found.append(base.nearest(asked[block], wanted, np.full_like(places[block], -1) if second else places[block]))
        progress("nearest neighbours", min(start + rows, len(asked)), len(asked))
    index, similarity = (np.concatenate([getattr(part, name) for part in found]) for name in ("index", "similarity"))
    return Neighbours(index[:, second:], similarity[:, second:], np.concatenate([part.tied for part in found]))


def _places(own: npt.ArrayLike | None, queries: int, stored: int, same: bool) -> Index:
    return np.arange(queries) if own is None and same else positions(own, queries, stored, "own")


def _check(k: int, places: Index, stored: int, self_match: str) -> None:
    if self_match not in ("excluded", "second-hit"):
        raise InferenceError(f"self_match={self_match!r}: give 'excluded' or 'second-hit'")
    others = stored - int(self_match == "second-hit" or (places >= 0).any())
    if not 1 <= whole(k, "k", 0) <= others:
        raise InferenceError(f"k={k}: a query has {others} other images, so that k goes from 1 to {others}")


class _Database:
    """Embeddings with their lengths in float64, and a normalised copy in float32."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        self.lengths = _lengths(rows, "database")
        self.unit = torch.empty(rows.shape, dtype=torch.float32)
        for part in _slices(len(rows), rows.shape[1]):
            self.unit[part] = _unit(rows[part], self.lengths[part])

    def nearest(self, queries: np.ndarray, k: int, own: Index) -> Neighbours:
        """The k nearest images of a block of queries, without the image at the position `own` where that is not −1."""
        lengths = _lengths(queries, "queries")
        has_own = np.flatnonzero(own >= 0)
        with torch.inference_mode():
            cosines = _unit(queries, lengths) @ self.unit.T
            cosines[has_own, own[has_own]] = -torch.inf
            kept = min(k + _SPARE, len(self.rows) - bool(len(has_own)))
            best = cosines.topk(kept, sorted=True)
            del cosines
        values, index = best.values.numpy(), np.sort(best.indices.numpy(), 1)
        found = self._again(queries, lengths, index, k)
        if kept < len(self.rows) - bool(len(has_own)):
            crowded = np.flatnonzero(values[:, -1] >= values[:, k - 1] - _ROUNDING)
            whole = self._of_all(queries[crowded], lengths[crowded], k, own[crowded])
            for name in ("index", "similarity", "tied"):
                getattr(found, name)[crowded] = getattr(whole, name)
        return found

    def _again(self, queries: np.ndarray, lengths: Array, index: Index, k: int) -> Neighbours:
        """The k nearest of a few candidates `(query, candidate)`, whose positions rise, by cosines in float64."""
        cosines = np.empty(index.shape)
        for part in _slices(len(queries), 2 * index.shape[1] * queries.shape[1]):
            some = self.rows[index[part]].astype(np.float64)
            some *= queries[part, None].astype(np.float64)
            cosines[part] = some.sum(-1)
        return _first(cosines / (lengths[:, None] * self.lengths[index]), index, k)

    def _of_all(self, queries: np.ndarray, lengths: Array, k: int, own: Index) -> Neighbours:
        """The k nearest of the whole database, by cosines in float64."""
        index, similarity = np.empty((len(queries), k), dtype=np.int64), np.empty((len(queries), k))
        tied = np.empty(len(queries), dtype=bool)
        for part in _slices(len(queries), 2 * len(self.rows)):
            unit = queries[part] / lengths[part, None]
            cosines = np.empty((len(unit), len(self.rows)))
            for some in _slices(len(self.rows), 4 * self.rows.shape[1]):
                cosines[:, some] = unit @ (self.rows[some] / self.lengths[some, None]).T
            cosines = cosines.round(_DIGITS)
            has_own = np.flatnonzero(own[part] >= 0)
            cosines[has_own, own[part][has_own]] = -np.inf
            candidates = np.stack([_lowest_of_largest(row, min(k + 1, len(row))) for row in cosines])
            found = _first(np.take_along_axis(cosines, candidates, 1), candidates, k)
            index[part], similarity[part], tied[part] = found.index, found.similarity, found.tied
        return Neighbours(index, similarity, tied)


def _first(cosines: Array, index: Index, k: int) -> Neighbours:
    """The k largest of candidates, of which tied ones are sorted by position, which must rise along the rows."""
    rounded = cosines.round(_DIGITS)
    order = np.argsort(-rounded, axis=1, kind="stable")
    ordered = np.take_along_axis(rounded, order, 1)
    tied = ordered[:, 0] == ordered[:, 1] if ordered.shape[1] > 1 else np.zeros(len(ordered), dtype=bool)
    return Neighbours(np.take_along_axis(index, order[:, :k], 1), ordered[:, :k], tied)


def _lowest_of_largest(row: Array, k: int) -> Index:
    """Positions of the k largest numbers, those that come first among equal ones, in rising order."""
    least = np.partition(row, len(row) - k)[len(row) - k]
    above = np.flatnonzero(row > least)
    return np.sort(np.concatenate([above, np.flatnonzero(row == least)[: k - len(above)]]))


def _lengths(rows: np.ndarray, name: str) -> Array:
    """Length of every row in float64; 1 for rows of zeros, which have the cosine 0 with all others."""
    parts = [np.sqrt(np.square(rows[part], dtype=np.float64).sum(1)) for part in _slices(len(rows), 2 * rows.shape[1])]
    lengths = np.concatenate(parts) if parts else np.empty(0)
    if not np.isfinite(lengths).all():
        wrong = int((~np.isfinite(lengths)).sum())
        raise DataError(f"{name}: {wrong} of {len(rows)} embeddings hold NaN or infinite numbers; remove those images")
    return np.where(lengths == 0, 1.0, lengths)


def _unit(rows: np.ndarray, lengths: Array) -> Tensor:
    return torch.from_numpy((rows / lengths[:, None]).astype(np.float32))


def _slices(rows: int, entries: int) -> list[slice]:
    """Blocks of rows that have so many entries of four bytes each."""
    size = max(1, _BLOCK // (4 * max(entries, 1)) // 2)
    return [slice(start, start + size) for start in range(0, rows, size)]
