"""Other sets of images: whether a representation is less certain about them, and retrieval in a mixture of both."""

from __future__ import annotations

import numpy as np
import xarray as xr

from calibrant.errors import DataError
from calibrant.evaluation.representations.given import Images
from calibrant.evaluation.representations.inputs import (
    Cluster,
    Embedded,
    Labels,
    class_numbers,
    image_numbers,
    refuse_unless_embedded,
    units_of,
)
from calibrant.evaluation.representations.neighbours import SelfMatch
from calibrant.evaluation.representations.recall import Nan, Plan, Singletons, judged_queries
from calibrant.evaluation.statistics.arrays import Array, Given, numbers
from calibrant.evaluation.statistics.counted import counted_auroc
from calibrant.evaluation.statistics.resampling import Estimate, Groups, bootstrap
from calibrant.evaluation.statistics.settings import whole
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

MOST = 50_000  # images of each set in the code of URL


def ood_auroc(
    inside: Given,
    outside: Given,
    inside_labels: Labels | None = None,
    outside_labels: Labels | None = None,
    *,
    balanced: bool = False,
    most: int | None = None,
    cluster: Cluster = "image",
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """AUROC of an uncertainty for images of another set than the known one.

    It says how well these two sets are told apart, and nothing of a third. Below a half, the other set is the more
    certain one.

    Args:
        inside: uncertainty of images of the known set, `(image,)`.
        outside: uncertainty of images of the other set, `(image,)`.
        inside_labels: classes of the former, for `cluster="class"`.
        outside_labels: classes of the latter, for `cluster="class"`.
        balanced: whether to take equally many images of both, as the code of URL does (arXiv 2307.03810), which
            changes nothing but the noise. The choice is random, and always the same for one seed.
        most: largest number of images of each set; 50,000 in the code of URL.
        cluster: what the bootstrap resamples, in each set on its own: each "image" alone, or each "class" with all its
            images.
        resamples: number of bootstrap resamples.
        seed: random seed for the choice of images and the bootstrap.

    Returns:
        `ood_auroc`, the probability that an image of the other set is less certain than one of the known set, where
        ties count a half, with `…_se`, and `…_low` and `…_high`, the ends of the 95% interval. Attributes:
        `images_inside`, `images_outside`.

    Raises:
        DataError: for arrays that do not belong together, or hold NaN.
        InferenceError: for settings that cannot be used.
    """
    both = [
        image_numbers(values, numbers(values, name).size, name)
        for values, name in ((inside, "inside"), (outside, "outside"))
    ]
    for values, name in zip(both, ("inside", "outside"), strict=True):
        if not len(values):
            raise DataError(f"{name}: there are no images; give the uncertainty of one or more")
    chosen = chosen_of((len(both[0]), len(both[1])), balanced, most, seed)
    units = [
        units_of(cluster, None if labels is None else class_numbers(labels, len(values))[index], len(index))
        for values, labels, index in zip(both, (inside_labels, outside_labels), chosen, strict=True)
    ]
    found = _auroc(both[0][chosen[0]], both[1][chosen[1]], units, resamples, seed)
    attrs = {
        "images_inside": len(chosen[0]), "images_outside": len(chosen[1]),
        "cluster": cluster, "resamples": resamples, "seed": seed,
    }  # fmt: skip
    return xr.Dataset(found.variables("ood_auroc"), attrs=attrs)


def mixed_retrieval(
    inside: Embedded,
    outside: Embedded,
    *,
    balanced: bool = True,
    most: int | None = MOST,
    self_match: SelfMatch = "excluded",
    nan: Nan = "refuse",
    singletons: Singletons = "wrong",
    cluster: Cluster = "class",
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Retrieval among the images of two sets together, whose classes are all different.

    The uncertainty has to tell apart the images that are retrieved correctly, both within each set and between them.
    Where R@1 differs between the sets, an uncertainty that only tells the sets apart has a mixed R-AUROC other than a
    half.

    Args:
        inside: embeddings, labels and uncertainties of the known set.
        outside: those of the other set; its labels have nothing to do with the former, even where they are equal.
        balanced: whether to take equally many images of both. The choice is random, and always the same for one seed.
        most: largest number of images of each set; None for all.
        self_match: how the query itself is left out; see `nearest_neighbours`.
        nan: see `retrieval`.
        singletons: see `retrieval`. To take some of the images leaves some classes with one.
        cluster: what the bootstrap resamples: each "class" with all its images, or each "image"; see `retrieval`.
        resamples: number of bootstrap resamples.
        seed: random seed for the choice of images and the bootstrap.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        `mixed_r_at_1` and `mixed_r_auroc`, each with `…_se`, `…_low` and `…_high`, the ends of the 95% interval, and
        `r_at_1_inside` and `r_at_1_outside`, the shares of correct queries of either set in the mixture. Attributes:
        `images_inside`, `images_outside`, `singletons`.

    Raises:
        DataError: for arrays that do not belong together, or hold NaN.
        InferenceError: for settings that cannot be used.
    """
    progress = reporting(progress)
    for given in (inside, outside):
        refuse_unless_embedded(given)
    first, second = (
        Images.of(images.embeddings, images.labels, images.uncertainty, finite=False) for images in (inside, outside)
    )
    chosen = chosen_of((len(first.classes), len(second.classes)), balanced, most, seed)
    first, second = first.some(chosen[0]), second.some(chosen[1])
    if first.embeddings.shape[1] != second.embeddings.shape[1]:
        raise DataError("inside and outside have embeddings with different numbers of features: embed both alike")
    judged = judged_queries(
        np.concatenate([first.embeddings, second.embeddings]),
        np.concatenate([first.classes, second.classes + int(first.classes.max()) + 1]),
        plan=Plan((1,), False, self_match, nan, singletons),
        cluster=cluster,
        progress=progress,
    )
    is_inside = judged.kept < len(chosen[0])
    # Each set is resampled on its own: how many images are of which set is no chance.
    units = [np.unique(judged.units[of], return_inverse=True)[1] for of in (is_inside, ~is_inside)]
    scores = np.concatenate([first.uncertainty, second.uncertainty])[judged.kept]
    variables = {
        **bootstrap(judged.recall((1,)), units, resamples, seed).part(0).variables("mixed_r_at_1"),
        **bootstrap(judged.r_auroc(scores), units, resamples, seed).variables("mixed_r_auroc"),
        "r_at_1_inside": ((), judged.right[is_inside, 0].mean()),
        "r_at_1_outside": ((), judged.right[~is_inside, 0].mean()),
    }
    attrs = {
        "images": len(judged.kept), "images_inside": len(chosen[0]), "images_outside": len(chosen[1]),
        "singletons": int((judged.hits.others == 0).sum()), "self_match": self_match, "cluster": cluster,
        "resamples": resamples, "seed": seed,
    }  # fmt: skip
    return xr.Dataset(variables, attrs=attrs)


def chosen_of(sizes: tuple[int, int], balanced: bool, most: int | None, seed: int) -> tuple[Groups, Groups]:
    """Positions of the images of both sets that take part, rising.

    Raises:
        InferenceError: for a `most` that is not positive.
    """
    if most is not None:
        whole(most, "most", 1)
    limit = max(sizes) if most is None else most
    wanted = [min(min(sizes) if balanced else size, limit) for size in sizes]
    inside, outside = (
        np.sort(np.random.default_rng(stream(seed, "chosen", side)).permutation(size)[:count])
        for side, size, count in zip(("inside", "outside"), sizes, wanted, strict=True)
    )
    return inside, outside


def _auroc(inside: Array, outside: Array, units: list[Groups], resamples: int, seed: int) -> Estimate:
    marked = np.arange(len(inside) + len(outside)) >= len(inside)
    return bootstrap(counted_auroc(np.concatenate([inside, outside]), marked), units, resamples, seed)
