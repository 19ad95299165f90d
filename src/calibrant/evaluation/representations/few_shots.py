"""Few-shot classification: some images of each class are a database for all others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import InferenceError
from calibrant.evaluation.representations.crossed import Variables, crossed_share, ranked, stacked
from calibrant.evaluation.representations.given import Images
from calibrant.evaluation.representations.inputs import Labels
from calibrant.evaluation.representations.neighbours import nearest_neighbours
from calibrant.evaluation.statistics.arrays import Array, Given
from calibrant.evaluation.statistics.resampling import Groups
from calibrant.evaluation.statistics.settings import whole, wholes
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

Method = Literal["class mean", "nearest"]
METHODS = ("class mean", "nearest")


def few_shot(
    embeddings: Given,
    labels: Labels,
    uncertainty: Given,
    shots: Sequence[int] = (1, 2, 5, 10),
    *,
    method: Method = "class mean",
    repeats: int = 20,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Accuracy, and R-AUROC of the uncertainty, of a classifier that knows a few images of each class.

    In every repetition, k images of each class are drawn as database. Those of fewer shots are among those of more, and
    queries are the images that no number of shots uses, so that all shots are compared on the same queries.

    Args:
        embeddings: `(image, feature)`; compared by the cosine.
        labels: class of each image, `(image,)`.
        uncertainty: larger for less certain images, `(image,)`.
        shots: numbers of images of each class.
        method: "class mean": the class whose mean of normalised embeddings has the largest cosine; "nearest": the class
            of the image with the largest cosine.
        repeats: number of draws of the database.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Over `shots`: `accuracy` and `r_auroc`, the probability that a wrong query is less certain than a correct one,
        averaged over repetitions, each with `…_se` and the ends of a 95% interval, `…_low` and `…_high`, which count
        the chance of draws and of queries of these classes. Over (shots, repeat): `accuracy_of_repeat` and
        `r_auroc_of_repeat`, NaN where fewer than two queries are correct, or fewer than two wrong. Over (repeat,
        image): `place` in the random order of its class: those below k are the database of k shots, those from the
        largest k on are queries. Attributes: `classes`, `queries` of each repetition, `method`.

    Raises:
        DataError: for embeddings, labels or uncertainties that cannot be used.
        InferenceError: for numbers of shots that some class does not have, or unknown methods.
    """
    progress = reporting(progress)
    images = Images.of(embeddings, labels, uncertainty)
    counts = _checked(images, sorted(wholes(shots, "shots", 1)), method)
    for name, value, least in (("repeats", repeats, 1), ("seed", seed, 0)):
        whole(value, name, least)
    of_draw = partial(stream, seed, "few_shot")
    size = (len(counts), repeats, len(images.classes))
    correct, ranks = np.full(size, np.nan), np.full(size, np.nan)
    places = np.stack([_order(images.classes, np.random.default_rng(of_draw(repeat))) for repeat in range(repeats)])
    for repeat, order in enumerate(places):
        queries = np.flatnonzero(order >= counts[-1])
        for i, count in enumerate(counts):
            hits = _correct(images, queries, np.flatnonzero(order < count), method)
            correct[i, repeat, queries] = hits
            ranks[i, repeat, queries] = ranked(images.uncertainty[queries], hits)
        progress("few-shot", repeat + 1, repeats)
    attrs = {"classes": int(images.classes.max()) + 1, "queries": len(queries), "method": method, "seed": seed}
    variables = {**_results(correct, ranks), "place": (("repeat", "image"), places)}
    return xr.Dataset(variables, coords={"shots": counts}, attrs=attrs)


def _checked(images: Images, counts: list[int], method: str) -> list[int]:
    if method not in METHODS:
        raise InferenceError(f"method={method!r}: give one of {METHODS}")
    fewest = int(np.bincount(images.classes).min())
    if counts[-1] >= fewest:
        raise InferenceError(
            f"shots={counts[-1]}: a class has only {fewest} images, and one is needed as a query; give fewer shots, or "
            "leave such classes out"
        )
    return counts


def _order(classes: Groups, generator: np.random.Generator) -> Groups:
    """The place of each image in a random order of its class, `(image,)`."""
    shuffled = generator.permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    sizes = np.bincount(classes)
    places = np.empty(len(classes), dtype=np.int64)
    places[by_class] = np.concatenate([np.arange(size) for size in sizes])
    return places


def _correct(images: Images, queries: Groups, stored: Groups, method: str) -> npt.NDArray[np.bool_]:
    """Whether each query gets its class from the stored images."""
    database, classes = images.embeddings[stored], images.classes[stored]
    if method == "class mean":
        database, classes = _class_means(database, classes), np.arange(classes.max() + 1)
    nearest = nearest_neighbours(images.embeddings[queries], database).index[:, 0]
    return np.asarray(classes[nearest] == images.classes[queries])


def _class_means(embeddings: np.ndarray, classes: Groups) -> Array:
    """Means of normalised embeddings, `(class, feature)`."""
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    unit = embeddings / np.where(lengths == 0, 1.0, lengths)
    return np.stack([unit[classes == one].mean(0) for one in range(classes.max() + 1)])


def _results(correct: Array, ranks: Array) -> Variables:
    found: Variables = {}
    for name, values in (("accuracy", correct), ("r_auroc", ranks)):
        known = [rows[~np.isnan(rows).all(1)] for rows in values]
        found |= stacked(name, ("shots",), [crossed_share(rows) for rows in known])
        sums, counts = np.nansum(values, -1), (~np.isnan(values)).sum(-1)
        of_repeat = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
        found[f"{name}_of_repeat"] = (("shots", "repeat"), of_repeat)
    return found
