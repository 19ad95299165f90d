"""Retrieval by representations: whether the nearest images have the right class, and whether uncertainty knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations.hits import Hits, Judged
from calibrant.evaluation.representations.inputs import (
    Cluster,
    Labels,
    class_numbers,
    image_numbers,
    joint_classes,
    matrix_of,
    positions,
    units_of,
    without_nan,
)
from calibrant.evaluation.representations.neighbours import SelfMatch, nearest_neighbours
from calibrant.evaluation.statistics.arrays import Array, Given
from calibrant.evaluation.statistics.counted import counted_mean
from calibrant.evaluation.statistics.resampling import Groups, bootstrap
from calibrant.evaluation.statistics.settings import wholes
from calibrant.progress import Progress, reporting, silent

Nan = Literal["refuse", "zero"]
Singletons = Literal["wrong", "left-out"]

_DEEPER = 32  # neighbours beyond those that are asked for


def retrieval(
    embeddings: Given,
    labels: Labels,
    uncertainty: Given | None = None,
    *,
    database: Given | None = None,
    database_labels: Labels | None = None,
    own: npt.ArrayLike | None = None,
    ks: Sequence[int] = (1, 5, 10),
    map_at_r: bool = False,
    self_match: SelfMatch = "excluded",
    nan: Nan = "refuse",
    singletons: Singletons = "wrong",
    cluster: Cluster = "class",
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Recall among nearest neighbours by cosine, and the R-AUROC of an uncertainty.

    `self_match="second-hit", nan="zero"` computes what the code of URL does (Kirchhof et al., arXiv 2307.03810). The
    R-AUROC is the probability that a query whose nearest neighbour has its class is more certain than one whose nearest
    neighbour has not, where ties count a half. R-AUROCs of representations with different R@1 judge different queries
    and are not comparable.

    Args:
        embeddings: embeddings of the queries, `(image, feature)`, of any length.
        labels: their classes, `(image,)`.
        uncertainty: larger where the representation is less certain, `(image,)`; without it there is no R-AUROC.
        database: embeddings among which neighbours are searched; without them, the other queries.
        database_labels: their classes, in the same numbers or names as `labels`.
        own: position of each query in the database that is given, −1 for those that it does not hold.
        ks: numbers of neighbours for the recall.
        map_at_r: whether to compute MAP@R, for which all images of a class are searched.
        self_match: how the query itself is left out; see `nearest_neighbours`.
        nan: "zero" sets NaN in embeddings to 0, and refuses them if more than 90% of all entries are zero then.
        singletons: queries whose class has no image in the database besides themselves count as "wrong" (as in the code
            of URL), or are "left-out". Their number is the attribute `singletons`.
        cluster: what the bootstrap resamples: each "class" with all its images, for statements about new classes, or
            each "image", for new images of the same classes. An image counts as a query and, unless a database is
            given, as a neighbour of others, to first order. Intervals over images are somewhat too wide then.
        resamples: number of bootstrap resamples.
        seed: random seed for the bootstrap.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        `r_at_1`, the share of queries whose nearest neighbour has their class; `recall` (k), the share with at least
        one such image among the k nearest; `r_auroc`, NaN if all queries are right or all are wrong; `map_at_r`, whose
        interval takes the database as it is. Each with its standard error `…_se` and the ends of its 95% interval,
        `…_low` and `…_high`. Per image: `correct`, whether its nearest neighbour has its class, `neighbour`, its
        position in the database, `similarity`, the cosine, and `tied`, whether another image is equally near;
        `uncertainty`. With `singletons="left-out"`, the coordinate `image` has the positions of the queries that are
        left.

    Raises:
        DataError: for arrays that do not belong together or hold NaN.
        InferenceError: for settings that cannot be used.
    """
    progress = reporting(progress)
    plan = Plan(tuple(wholes(ks, "ks", 1)), map_at_r, self_match, nan, singletons)
    judged = judged_queries(embeddings, labels, database, database_labels, own, plan, cluster, progress)
    hits, kept = judged.hits, judged.kept
    given = None if uncertainty is None else image_numbers(uncertainty, len(hits.others), "uncertainty")[kept]
    found = _estimates(judged, given, (resamples, seed), plan)
    per_image = {
        "correct": hits.right[kept, 0],
        "neighbour": hits.found.index[kept, 0],
        "similarity": hits.found.similarity[kept, 0],
        "tied": hits.found.tied[kept],
        **({} if given is None else {"uncertainty": given}),
    }
    attrs = {
        "images": len(kept), "classes": len(np.unique(hits.classes[kept])), "singletons": int((hits.others == 0).sum()),
        "self_match": self_match, "cluster": cluster, "resamples": resamples, "seed": seed,
    }  # fmt: skip
    variables = {**found, **{name: (("image",), values) for name, values in per_image.items()}}
    return xr.Dataset(variables, {"k": list(plan.ks), "image": kept}, attrs)


@dataclass(frozen=True)
class Plan:
    """How neighbours are searched and judged: arguments of `retrieval`."""

    ks: tuple[int, ...] = (1,)
    map_at_r: bool = False
    self_match: SelfMatch = "excluded"
    nan: Nan = "refuse"
    singletons: Singletons = "wrong"

    def __post_init__(self) -> None:
        if self.singletons not in ("wrong", "left-out"):
            raise InferenceError(f"singletons={self.singletons!r}: give 'wrong' or 'left-out'")


def judged_queries(
    embeddings: Given,
    labels: Labels,
    database: Given | None = None,
    database_labels: Labels | None = None,
    own: npt.ArrayLike | None = None,
    plan: Plan = Plan(),
    cluster: Cluster = "class",
    progress: Progress = silent,
) -> Judged:
    """Search the neighbours of all queries and judge them; arguments as those of `retrieval`."""
    queries = without_nan(matrix_of(embeddings), plan.nan)
    stored = None if database is None else without_nan(matrix_of(database), plan.nan)
    classes, stored_classes = _classes(labels, len(queries), database_labels, None if stored is None else len(stored))
    hits = _search(queries, stored, own, classes, stored_classes, plan, progress)
    kept = hits.kept(plan.singletons)
    units = units_of(cluster, np.unique(classes[kept], return_inverse=True)[1], len(kept))
    return Judged(hits, kept, units, stored is None)


def _search(
    queries: np.ndarray,
    stored: np.ndarray | None,
    own: npt.ArrayLike | None,
    classes: Groups,
    stored_classes: Groups,
    plan: Plan,
    progress: Progress,
) -> Hits:
    others = np.bincount(stored_classes, minlength=int(classes.max()) + 1)[classes]
    is_there = positions(own, len(queries), len(stored_classes), "own") >= 0
    others = others - (is_there if own is not None else stored is None)
    most = max(*plan.ks, int(others.max()) if plan.map_at_r else 1)
    if stored is None:  # more of them, to know what queries would find without some images
        most = max(most, min(max(plan.ks) + _DEEPER, len(queries) - 1))
    found = nearest_neighbours(queries, stored, most, own=own, self_match=plan.self_match, progress=progress)
    return Hits(found, stored_classes[found.index] == classes[:, None], classes, others)


def _estimates(
    judged: Judged, uncertainty: Array | None, how: tuple[int, int], plan: Plan
) -> dict[str, tuple[tuple[str, ...], Any]]:
    variables = bootstrap(judged.recall(plan.ks), [judged.units], *how).variables("recall", ("k",))
    variables |= bootstrap(judged.recall((1,)), [judged.units], *how).part(0).variables("r_at_1")
    if uncertainty is not None:
        variables |= bootstrap(judged.r_auroc(uncertainty), [judged.units], *how).variables("r_auroc")
    if plan.map_at_r:
        precision = _average_precision(judged.right, judged.hits.others[judged.kept])
        variables |= bootstrap(counted_mean(precision), [judged.units], *how).variables("map_at_r")
    return variables


def _average_precision(right: npt.NDArray[np.bool_], others: Groups) -> Array:
    """Average precision among the R nearest, where R is the number of other images of the class; 0 if there is none."""
    ranks = np.arange(1, right.shape[1] + 1)
    counted = right & (ranks <= others[:, None])
    return (counted.cumsum(1) / ranks * counted).sum(1) / np.maximum(others, 1)


def _classes(labels: Labels, queries: int, stored_labels: Labels | None, stored: int | None) -> tuple[Groups, Groups]:
    """Classes of queries and database as the same whole numbers."""
    if (stored_labels is None) != (stored is None):
        raise DataError("give database and database_labels together")
    if stored is None or stored_labels is None:
        classes = class_numbers(labels, queries)
        return classes, classes
    return joint_classes((labels, stored_labels), (queries, stored), ("labels", "database_labels"))
