"""Credible-interval retrieval: all images in the cap where a query's posterior lies with a given probability."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from calibrant.distributions.directional import cap_cosine
from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations.crossed import Variables, crossed_share, stacked
from calibrant.evaluation.representations.given import two_matrices, unit_rows
from calibrant.evaluation.representations.inputs import Labels, image_numbers, joint_classes, positions
from calibrant.evaluation.statistics.arrays import Array, Given
from calibrant.evaluation.statistics.resampling import Groups
from calibrant.evaluation.statistics.settings import shares
from calibrant.progress import Progress, reporting

_BLOCK = 1 << 25  # cosines that are computed together


def credible_retrieval(
    directions: Given,
    concentration: Given,
    database: Given,
    *,
    match: npt.ArrayLike | None = None,
    labels: tuple[Labels, Labels] | None = None,
    own: npt.ArrayLike | None = None,
    levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95, 0.99),
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Retrieve all images in the credible cap of a query, and measure how often its true match is among them.

    The cap around a query's direction μ holds a point of its posterior vMF(μ, κ) with the probability of the level; its
    edge is exact (`distributions.cap_cosine`), where published code takes a quantile of draws (arXiv 2302.02865). If a
    match is a draw of the posterior, the measured coverage is the level. The embedding of a second view is the mean
    direction of another posterior and no draw of this one, so that its coverage may differ from the level although the
    posterior is right.

    Args:
        directions: mean directions of the queries, `(query, feature)`; they are normalised.
        concentration: κ ≥ 0 of each query, `(query,)`, of the posterior around these directions. A representation that
            was trained with `trunk="none"` embeds as the features that it is given, and its κ belong to another
            embedding, that of its program: take `trunk="linear"`, or directions of `program.embed`.
        database: embeddings of the images that may be retrieved, `(image, feature)`; they are normalised.
        match: position in the database of each query's true match, such as a second view of the same image, `(query,)`.
        labels: instead of `match`, classes of the queries `(query,)` and of the database `(image,)`; all images of the
            query's class are matches.
        own: position of each query itself in the database, −1 for none, `(query,)`; it is neither retrieved nor a
            match.
        levels: probabilities of the caps.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Over `level`: `coverage`, the share of matches in the cap (with labels, averaged over queries that have
        matches), with `coverage_se` and the ends of a 95% interval, `coverage_low` and `coverage_high`; `size_mean`
        and `size_median`, numbers of images retrieved. Over (level, query): `threshold`, the cosine at
        the edge; `size`, the number of images retrieved; `covered`, the share of the query's matches, NaN without any;
        and, with labels, `precision`, the share of the retrieved images that are matches, NaN where none is retrieved.
        Attribute: `database`, its number of images.

    Raises:
        DataError: for directions, concentrations or a database that cannot be used.
        InferenceError: if not exactly one of `match` and `labels` is given, for a match that is the query itself, or
            levels outside (0, 1).
    """
    progress = reporting(progress)
    names = ("directions", "database")
    queries, stored = (unit_rows(*part) for part in zip(two_matrices(directions, database, names), names, strict=True))
    kappa = image_numbers(concentration, len(queries), "concentration")
    if not (np.isfinite(kappa) & (kappa >= 0)).all():
        raise DataError("concentration: some are negative or infinite; give κ ≥ 0, not an uncertainty")
    if queries.shape[1] < 2:
        raise DataError("directions: they have one feature; a cap needs directions of two features or more")
    levels = shares(levels, "levels")
    edges = _edges(queries.shape[1], kappa, levels)
    places = positions(own, len(queries), len(stored), "own")
    truth = _Truth.of(match, labels, places, (len(queries), len(stored)))
    counts = _counted(queries, stored, edges, places, truth, progress)
    return _summary(counts, edges, levels, truth.labelled).assign_attrs(database=len(stored))


def _edges(dimension: int, kappa: Array, levels: Sequence[float]) -> Array:
    """Cosines at the edges of the caps, `(level, query)`."""
    of_level = torch.tensor(levels, dtype=torch.float64)[:, None]
    return cap_cosine(dimension, torch.from_numpy(kappa), of_level).numpy()


class _Truth(NamedTuple):
    """Which images match each query: codes that have to be equal, of queries and of the database."""

    queries: Groups
    database: Groups
    labelled: bool

    @classmethod
    def of(
        cls, match: npt.ArrayLike | None, labels: tuple[Labels, Labels] | None, own: Groups, sizes: tuple[int, int]
    ) -> _Truth:
        if (match is None) == (labels is None):
            raise InferenceError("give either match=, positions of the true matches, or labels=, those of both sides")
        if labels is not None:
            if not isinstance(labels, tuple | list) or len(labels) != 2:
                raise InferenceError("labels: give two of them, (labels of the queries, labels of the database)")
            names = ("labels of the queries", "labels of the database")
            return cls(*joint_classes((labels[0], labels[1]), sizes, names), True)
        places = positions(match, *sizes, "match", 0)
        if itself := int((places == own).sum()):
            raise InferenceError(
                f"match: {itself} queries are their own match, which every cap holds; give other images"
            )
        return cls(places, np.arange(sizes[1]), False)


def _counted(
    queries: np.ndarray, stored: np.ndarray, edges: Array, own: Groups, truth: _Truth, progress: Progress
) -> tuple[Array, Array, Array]:
    """Images retrieved and matches among them, `(level, query)`, and all matches of each query, `(query,)`."""
    size, found, total = np.empty(edges.shape), np.empty(edges.shape), np.empty(len(queries))
    rows = max(1, _BLOCK // len(stored))
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        cosines = queries[block] @ stored.T
        has_own = np.flatnonzero(own[block] >= 0)
        cosines[has_own, own[block][has_own]] = -np.inf
        matches = truth.queries[block, None] == truth.database
        matches[has_own, own[block][has_own]] = False
        total[block] = matches.sum(1)
        for level, of_level in enumerate(edges[:, block]):
            inside = cosines >= of_level[:, None]
            size[level, block], found[level, block] = inside.sum(1), (inside & matches).sum(1)
        progress("credible caps", min(start + rows, len(queries)), len(queries))
    return size, found, total


def _summary(counts: tuple[Array, Array, Array], edges: Array, levels: Sequence[float], labelled: bool) -> xr.Dataset:
    size, found, total = counts
    with np.errstate(invalid="ignore", divide="ignore"):
        covered, precision = found / total, found / size
    each = ("level", "query")
    variables: Variables = stacked("coverage", each[:1], [crossed_share(of_level[None]) for of_level in covered])
    for name, values in (("size_mean", size.mean(1)), ("size_median", np.median(size, 1))):
        variables[name] = (each[:1], values)
    variables |= {"threshold": (each, edges), "size": (each, size), "covered": (each, covered)}
    if labelled:
        variables["precision"] = (each, precision)
    return xr.Dataset(variables, coords={"level": list(levels)})
