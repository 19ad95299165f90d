"""Pictures of single images by their uncertainty: the most and least certain of each class, and a map of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.reporting.image_plots import as_images, mosaic
from calibrant.evaluation.reporting.style import COLOURS, MARKERS, WIDTH, cycled, new_figure, plain_axes
from calibrant.evaluation.representations.given import Images
from calibrant.evaluation.representations.inputs import Labels, class_labels, class_numbers, image_numbers
from calibrant.evaluation.statistics.arrays import Array, Given, numbers
from calibrant.evaluation.statistics.resampling import Groups
from calibrant.evaluation.statistics.settings import whole
from calibrant.streams import stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TILE = 0.42  # height of an image, in inches
_METHODS = {"pca": "PCA", "t-sne": "t-SNE"}
_FEWEST = 4  # images of a map by t-SNE
_MOST_COLOURS = 20  # classes that a legend can tell apart
_SIZES = (4.0, 90.0)  # areas of the points of the most and the least certain image, in square points


def certainty_figure(
    images: Given, labels: Labels, uncertainty: Given, *, count: int = 6, names: Sequence[str] | None = None
) -> Figure:
    """The most and the least certain images of each class, a class in each row, less certain ones further right.

    No image stands on both sides: those of a class with fewer than 2 · count images are halved.

    Args:
        images: `(image, h, w)`, `(image, 1, h, w)` or `(image, 3, h, w)`, with any range of grey values.
        labels: class of each image, `(image,)`.
        uncertainty: larger for less certain images, `(image,)`.
        count: largest number of images on each side.
        names: names of the classes in the order of the sorted labels.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        DataError: for arrays that do not belong together, or data that are no images.
        InferenceError: for names of another number of classes, or a count below 1.
    """
    pictures = _grey(images)
    classes = class_numbers(labels, len(pictures))
    scores = image_numbers(uncertainty, len(pictures), "uncertainty")
    rows, called = _rows(classes, scores, count), _named(labels, classes, names)
    with new_figure(WIDTH, _TILE * len(rows) + 0.5) as figure:
        for axes, side, title in zip(figure.subplots(1, 2), (0, 1), ("most certain", "least certain"), strict=True):
            tiles = [pictures[row[side]] for row in rows]
            blank = np.ones((count, *pictures.shape[1:]))
            padded = np.concatenate([np.concatenate([tile, blank])[:count] for tile in tiles])
            axes.imshow(mosaic(padded, count), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            axes.set(title=title, xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            if side == 0:
                places = (pictures.shape[1] + 1) * (np.arange(len(rows)) + 0.5)
                axes.set_yticks(places, [plain_axes(name) for name in called], fontsize=8)
                axes.tick_params(length=0)
        return figure


def embedding_map_figure(
    embeddings: Given,
    labels: Labels,
    uncertainty: Given,
    *,
    method: Literal["pca", "t-sne"] = "pca",
    images: int = 2000,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Figure:
    """A map of embeddings in two dimensions: classes have colours, and larger points are less certain.

    Sizes follow the ranks of the uncertainties, since their units differ between methods.

    Args:
        embeddings: `(image, feature)`.
        labels: class of each image, `(image,)`.
        uncertainty: larger for less certain images, `(image,)`.
        method: "pca", the two directions of largest variance; or "t-sne" (scikit-learn), which keeps neighbours
            together and no distances.
        images: number of images that are shown, at random.
        names: names of the classes in the order of the sorted labels.
        seed: random seed for the choice of images and for t-SNE.

    Returns:
        A figure of matplotlib, made without pyplot.

    Raises:
        DataError: for arrays that do not belong together.
        InferenceError: for another method, names of another number of classes, or fewer than four images for t-SNE.
    """
    given = Images.of(embeddings, labels, uncertainty)
    called = _named(labels, given.classes, names)
    order = np.random.default_rng(stream(seed, "embedding_map_figure")).permutation(len(given.classes))
    order = order[: whole(images, "images", 1)]
    places = _mapped(given.embeddings[order].astype(np.float64), method, seed)
    ranks = given.uncertainty[order].argsort(kind="stable").argsort(kind="stable") / max(len(order) - 1, 1)
    sizes, classes = _SIZES[0] + (_SIZES[1] - _SIZES[0]) * ranks**2, given.classes[order]
    with new_figure(WIDTH, 0.72 * WIDTH) as figure:
        axes = figure.subplots()
        for number, name in enumerate(called):
            of_class = classes == number
            look: dict[str, Any] = {"color": _colour(number, len(called)), "marker": cycled(MARKERS, number)}
            look |= {"s": sizes[of_class], "alpha": 0.45, "linewidths": 0, "label": plain_axes(name)}
            axes.scatter(places[of_class, 0], places[of_class, 1], **look)
        axes.set(xticks=[], yticks=[], title=f"{_METHODS[method]}: a larger point is less certain")
        if len(called) <= _MOST_COLOURS:
            for handle in figure.legend(loc="outside right upper", fontsize=8).legend_handles:
                if handle is not None:
                    handle.set(sizes=[30.0], alpha=1.0)
        return figure


def _grey(images: Given) -> Array:
    """Images `(image, h, w)` or `(image, h, w, 3)` between 0 and 1."""
    values = numbers(images, "images")
    found = as_images(values)
    if found is None or not found.size:
        raise DataError(f"images of shape {values.shape}: give (image, h, w), (image, 1, h, w) or (image, 3, h, w)")
    low, high = float(found.min()), float(found.max())
    return (found - low) / ((high - low) or 1.0)


def _rows(classes: Groups, scores: Array, count: int) -> list[tuple[Groups, Groups]]:
    """Of each class, positions of the most and of the least certain images, each in rising order of uncertainty."""
    whole(count, "count", 1)
    found = []
    for number in range(classes.max() + 1):
        members = np.flatnonzero(classes == number)
        ordered = members[np.argsort(scores[members], kind="stable")]
        half = (len(ordered) + 1) // 2
        found.append((ordered[: min(count, half)], ordered[max(len(ordered) - count, half) :]))
    return found


def _named(labels: Labels, classes: Groups, names: Sequence[str] | None) -> list[str]:
    distinct = np.unique(class_labels(labels, len(classes)))
    distinct = distinct.astype(int) if distinct.dtype.kind == "f" else distinct
    if names is not None and len(names) != len(distinct):
        raise InferenceError(f"names: {len(names)} of them for {len(distinct)} classes; give one for each")
    return [str(name) for name in (distinct if names is None else names)]


def _mapped(embeddings: Array, method: str, seed: int) -> Array:
    """Places `(image, 2)`."""
    centred = embeddings - embeddings.mean(0)
    if method == "pca":
        _, _, directions = np.linalg.svd(centred, full_matrices=False)
        places = centred @ directions[:2].T
        return np.pad(places, ((0, 0), (0, 2 - places.shape[1])))  # one image, or one feature, has no second direction
    if method != "t-sne":
        raise InferenceError(f'method={method!r}: give "pca" or "t-sne"')
    from sklearn.manifold import TSNE

    if len(centred) < _FEWEST:
        raise InferenceError(f'method="t-sne" needs {_FEWEST} images or more: take method="pca" for {len(centred)}')
    near = min(30.0, (len(centred) - 1) / 3)
    start = "pca" if min(centred.shape) > 1 and centred.any() else "random"
    return np.asarray(
        TSNE(perplexity=near, init=start, random_state=stream(seed, "t-sne") % 2**32).fit_transform(centred)
    )


def _colour(number: int, count: int) -> Any:
    """A colour that differs from those of the other classes."""
    if count <= len(COLOURS):
        return COLOURS[number]
    import matplotlib

    return matplotlib.colormaps["tab20" if count <= 20 else "hsv"](
        (number + 0.5) / max(count, 20 if count <= 20 else 1)
    )
