"""Safe retrieval: images of large uncertainty leave the database or the queries, and what that is worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.representations.crossed import Variables
from calibrant.evaluation.representations.given import Images
from calibrant.evaluation.representations.inputs import Cluster, Labels, class_numbers, units_of
from calibrant.evaluation.representations.neighbours import nearest_neighbours
from calibrant.evaluation.representations.shared_database import worth_as_neighbour
from calibrant.evaluation.statistics.arrays import Array, Given
from calibrant.evaluation.statistics.resampling import Groups, Statistic, bootstrap
from calibrant.evaluation.statistics.settings import shares, whole
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

Quantile = Literal["all", "predicted class", "neighbourhood", "true class"]
QUANTILES = ("all", "predicted class", "neighbourhood", "true class")
DROPPED = ("nothing", "database", "queries", "both")
RESULTS = ("recall", "before", "recall_all", "selection", "gain", "gain_over_random", "gain_all", "without_match")

_NEAR, _LISTED = 50, 12  # neighbours of each image that are looked up, and those that are stored

Mask = npt.NDArray[np.bool_]

_UNSAFE = "the quantile is taken within each true class, so that it needs the labels of the images that it judges"


def safe_retrieval(
    embeddings: Given,
    labels: Labels,
    uncertainty: Given,
    *,
    keep: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    quantile: Quantile = "all",
    predicted: Labels | None = None,
    neighbours: int = 20,
    controls: int = 10,
    cluster: Cluster = "class",
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """R@1 before and after the least certain images leave the database, the queries, or both.

    Every image is a query, and all other images are its database. To leave out hard queries raises R@1 by itself, and a
    smaller database lowers it. Therefore R@1 is compared with that of the full database on the same queries, with that
    of all queries, and with databases from which as many images are left out at random.

    Args:
        embeddings: `(image, feature)`; compared by the cosine.
        labels: class of each image, `(image,)`; they judge the results, and are used for nothing else unless
            `quantile` is "true class".
        uncertainty: larger for less certain images, `(image,)`.
        keep: shares of the images to keep: those up to this quantile of the uncertainty.
        quantile: the images of which the quantile is taken: "all"; those of one "predicted class"; each image's own
            "neighbourhood", the image and its nearest neighbours; or, as published code does (arXiv 2402.16569), those
            of one "true class", which needs labels, so that the result is not called safe.
        predicted: class that a classifier gives to each image, `(image,)`, for "predicted class".
        neighbours: number of images in a neighbourhood, beside the image itself.
        controls: number of databases from which images are left out at random, one or more.
        cluster: what the bootstrap resamples: each "class" with all its images, for statements about new classes, or
            each "image" alone. In R@1 an image counts as a query, and for what it is worth as a neighbour of others.
            Gains are resampled over queries; in simulations their standard errors are .83 to 1.05 times the spread over
            new sets of images, and those of `selection` are larger than that.
        resamples: number of bootstrap resamples.
        seed: random seed for the controls and for the bootstrap.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Over (keep, dropped), where `dropped` is "nothing", "database", "queries" or "both", each with `…_se` and the
        ends of a 95% interval, `…_low` and `…_high`: `recall`, R@1 of the queries that remain, which is R@1 of all
        images plus two effects. `selection`: what it gives to leave out queries, with the full database. `gain`: what
        it gives to leave images out of the database, on the queries that remain, paired query by query; `before` is
        their R@1 with the full database. `gain_over_random`: R@1 of these queries minus that with databases that lack
        as many random images; it tells whether the uncertainty chooses better than chance. `recall_all` and `gain_all`:
        with all queries, those of large uncertainty too. `without_match`: share of the remaining queries of whose class
        the database holds no other image. `queries` and `database`: numbers of images. Over (keep, image): `kept`.
        Attributes: `quantile`; `needs_labels` and `safe`, 0 or 1, and `note`.

    Raises:
        DataError: for embeddings, labels or uncertainties that cannot be used.
        InferenceError: for settings that are unknown or lack an argument, or if no image is left.
    """
    progress = reporting(progress)
    images = Images.of(embeddings, labels, uncertainty)
    keep, controls = shares(keep, "keep"), whole(controls, "controls", 1)
    if quantile not in QUANTILES:
        raise InferenceError(f"quantile={quantile!r}: give one of {QUANTILES}")
    whole(neighbours, "neighbours", 1)
    groups = _groups(images, quantile, predicted, neighbours)
    near = _Near.of(images, progress)
    units, found = units_of(cluster, images.classes, len(images.classes)), []
    every = np.ones_like(images.classes, dtype=bool)
    for place, share in enumerate(keep):
        kept = _kept(images.uncertainty, groups, share)
        if kept.sum() < 2:
            raise InferenceError(f"keep={share}: {kept.sum()} images are left; keep more of them")
        random = _at_random(near, kept, controls, stream(seed, "safe_retrieval", place))
        full, reduced = (_Database.of(near, stored, kept, units) for stored in (every, kept))
        databases = _Databases(images.classes, kept, full, reduced, random)
        found.append(_estimates(databases, units, resamples, seed))
        progress("safe retrieval", place + 1, len(keep))
    labelled = quantile == "true class"
    note = _UNSAFE if labelled else "no label of an image decides whether it is kept"
    attrs = {"quantile": quantile, "needs_labels": int(labelled), "safe": int(not labelled), "note": note, "seed": seed}
    results = xr.concat(found, xr.Variable("keep", list(keep)))
    return results.assign_coords(dropped=list(DROPPED)).assign_attrs(attrs)


def _groups(images: Images, quantile: str, predicted: Labels | None, neighbours: int) -> Groups:
    """Groups of images that share a quantile: numbers `(image,)`, or the members of each image's own, `(image, k)`."""
    count = len(images.classes)
    if quantile == "all":
        return np.zeros(count, dtype=np.int64)
    if quantile == "neighbourhood":
        near = nearest_neighbours(images.embeddings, k=min(neighbours, count - 1)).index
        return np.concatenate([np.arange(count)[:, None], near], 1)
    if quantile == "true class":
        return images.classes
    if predicted is None:
        raise InferenceError('quantile="predicted class" needs predicted=, the class that a classifier gives')
    return class_numbers(predicted, count, "predicted")


def _kept(scores: Array, groups: Groups, keep: float) -> Mask:
    """Whether each image lies at or below the quantile of its group."""
    if groups.ndim == 2:
        return np.asarray(scores <= np.quantile(scores[groups], keep, axis=1))
    kept = np.zeros(len(scores), dtype=bool)
    for group in range(groups.max() + 1):
        of_group = groups == group
        kept[of_group] = scores[of_group] <= np.quantile(scores[of_group], keep)
    return kept


class _Near(NamedTuple):
    """Some nearest neighbours of each image, `(image, k)`, among which the stored ones are looked up.

    Images keep the positions that they have among all images, whatever is stored.
    """

    images: Images
    neighbours: Groups

    @classmethod
    def of(cls, images: Images, progress: Progress) -> _Near:
        count = min(_NEAR, len(images.classes) - 1)
        return cls(images, nearest_neighbours(images.embeddings, k=count, progress=progress).index)

    def among(self, stored: Mask) -> tuple[Groups, Mask]:
        """The first stored neighbours of each image, and whether they have its class, both `(image, neighbour)`."""
        count = min(_LISTED, self.neighbours.shape[1], int(stored.sum()) - 1)
        there = stored[self.neighbours]
        first = np.argsort(~there, axis=1, kind="stable")[:, :count]
        index = np.take_along_axis(self.neighbours, first, 1)
        far = np.flatnonzero(there.sum(1) < count)
        if len(far):
            index[far] = self._searched(far, stored, count)
        return index, self.images.classes[index] == self.images.classes[:, None]

    def _searched(self, queries: Groups, stored: Mask, count: int) -> Groups:
        """The nearest stored images of some queries; the database has positions of its own."""
        places = np.flatnonzero(stored)
        own = np.where(stored, np.cumsum(stored) - 1, -1)[queries]
        embeddings = self.images.embeddings
        return places[nearest_neighbours(embeddings[queries], embeddings[places], count, own=own).index]


class _Database(NamedTuple):
    """What a database gives to the queries.

    Attributes:
        right: whether the nearest stored image has the class of each query, 0 or 1, `(image,)`.
        worth: what each image is worth to R@1 as a neighbour of others, `(queries, image)`, where the queries are those
            that are kept, and all.
    """

    right: Array
    worth: Array

    @classmethod
    def of(cls, near: _Near, stored: Mask, kept: Mask, units: Groups) -> _Database:
        index, right = near.among(stored)
        worth = [_worth(index, right, units, queries) for queries in (kept, np.ones_like(kept))]
        return cls(right[:, 0].astype(np.float64), np.stack(worth))


def _at_random(near: _Near, kept: Mask, controls: int, seed: int) -> Array:
    """Share of databases of as many random images as are kept that give each query its class, `(image,)`."""
    generator = np.random.default_rng(seed)
    return np.mean([near.among(generator.permutation(kept))[1][:, 0] for _ in range(controls)], axis=0)


def _worth(index: Groups, right: Mask, units: Groups, queries: Mask) -> Array:
    of_query = queries / queries.mean()
    return worth_as_neighbour(index, right, units, 1, np.stack([np.zeros(len(queries)), of_query], 1))


class _Databases(NamedTuple):
    """What the full database and that of the kept images give; random ones of their number, `(image,)`."""

    classes: Groups
    kept: Mask
    full: _Database
    reduced: _Database
    random: Array


def _estimates(given: _Databases, units: Groups, resamples: int, seed: int) -> xr.Dataset:
    """The results of all ways of leaving images out, resampled together."""
    ways = [_means_of(given, dropped in ("queries", "both"), dropped in ("database", "both")) for dropped in DROPPED]
    found = bootstrap(lambda counts: np.stack([way(counts) for way in ways], 1), [units], resamples, seed)
    variables: Variables = {}
    for place, name in enumerate(RESULTS):
        variables |= found.part(place).variables(name, ("dropped",))
    kept, every = int(given.kept.sum()), len(given.kept)
    variables["queries"] = (("dropped",), [kept if way in ("queries", "both") else every for way in DROPPED])
    variables["database"] = (("dropped",), [kept if way in ("database", "both") else every for way in DROPPED])
    return xr.Dataset({**variables, "kept": (("image",), given.kept)})


def _means_of(given: _Databases, fewer_queries: bool, fewer_stored: bool) -> Statistic:
    """The results of one way of leaving images out, as a function of how often a resample holds each image."""
    every = np.ones_like(given.kept)
    queries, stored = (given.kept if fewer else every for fewer in (fewer_queries, fewer_stored))
    now, random = (given.reduced, given.random) if fewer_stored else (given.full, given.full.right)
    alone = np.bincount(given.classes[stored], minlength=given.classes.max() + 1)[given.classes] - stored == 0
    of_queries = np.stack([now.right, given.full.right, random, alone], 1) * queries[:, None]
    of_all = np.stack([now.right, given.full.right], 1)
    place = int(not fewer_queries)
    worth = np.stack([now.worth[place], given.full.worth[place], now.worth[1]], 1) / len(queries)

    def means(counts: Array) -> Array:
        with np.errstate(invalid="ignore", divide="ignore"):
            recall, before, by_chance, without = (counts @ of_queries / (counts @ queries)[:, None]).T
        recall_all, full = (counts @ of_all / counts.sum(1, keepdims=True)).T
        effects = (before - full, recall - before, recall - by_chance, recall_all - full)
        levels = np.stack([recall, before, recall_all], 1) + (counts - 1) @ worth
        return np.concatenate([levels.clip(0, 1), np.stack([*effects, without], 1)], 1)

    return means
