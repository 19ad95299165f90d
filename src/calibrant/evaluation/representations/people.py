"""Uncertainty beside people: whether a representation is less certain where people disagree about the class."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import numpy as np
import xarray as xr
from scipy.special import entr

from calibrant.errors import DataError
from calibrant.evaluation.representations.inputs import (
    Cluster,
    Labels,
    class_labels,
    class_numbers,
    image_numbers,
    units_of,
)
from calibrant.evaluation.statistics.arrays import Array, Given, numbers
from calibrant.evaluation.statistics.counted import counted_auroc, counted_spearman
from calibrant.evaluation.statistics.resampling import Groups, bootstrap


@runtime_checkable
class People(Protocol):
    """Human labels with the share of each class, `(image, class)`, such as those of `data.human_labels`."""

    @property
    def probabilities(self) -> np.ndarray: ...


def human_entropy(
    uncertainty: Given,
    human: Given | People,
    labels: Labels | None = None,
    *,
    ambiguous_above: float = 0.0,
    cluster: Cluster = "image",
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Rank correlation of uncertainty with the entropy of human labels: overall, and within classes.

    An uncertainty that tells no more than the class correlates with human entropy overall, if some classes are harder
    than others. The correlation within classes is of ranks among the images of a class, so that it does not count this.

    Args:
        uncertainty: larger where the representation is less certain, `(image,)`.
        human: shares or counts of the labels that people gave, `(image, class)`, or the entropies, `(image,)`, or
            what `data.human_labels` gives, for the same images. Images with NaN are left out.
        labels: classes of the images, `(image,)`; without them, there is nothing within classes.
        ambiguous_above: images with a larger human entropy than this, in nats, are ambiguous.
        cluster: what the bootstrap resamples: each "image" alone, or each "class" with all its images.
        resamples: number of bootstrap resamples.
        seed: random seed for the bootstrap.

    Returns:
        `human_spearman`; `human_spearman_within`, NaN if uncertainty or entropy are constant in every class;
        `human_auroc`, the AUROC of the uncertainty for ambiguous images, and `human_auroc_within`, which compares
        images of one class only, averaged over pairs. Each with `…_se`, and `…_low` and `…_high`, the ends of the 95%
        interval. `human_ambiguous`, the share of ambiguous images. Over `image`, the positions that are left:
        `human_entropy`, in nats. Over `label`, the sorted classes: `human_spearman_of_class`.

    Raises:
        DataError: for arrays that do not belong together, negative shares or entropies, or no image with human labels.
        InferenceError: for settings that cannot be used.
    """
    entropy = _entropy(human)
    scores = image_numbers(uncertainty, len(entropy), "uncertainty")
    there = np.flatnonzero(np.isfinite(entropy))
    if not len(there):
        raise DataError("human: no image has human labels; give shares or entropies that are not all NaN")
    classes = None if labels is None else class_numbers(labels, len(entropy))[there]
    names = None if labels is None else np.unique(class_labels(labels, len(entropy))[there])
    if classes is not None:
        classes = np.unique(classes, return_inverse=True)[1]
    scores, entropy = scores[there], entropy[there]
    units = units_of(cluster, classes, len(there))
    ambiguous = entropy > ambiguous_above
    variables = bootstrap(counted_spearman(scores, entropy), [units], resamples, seed).variables("human_spearman")
    variables |= bootstrap(counted_auroc(scores, ambiguous), [units], resamples, seed).variables("human_auroc")
    variables |= {"human_ambiguous": ((), ambiguous.mean()), "human_entropy": (("image",), entropy)}
    coords: dict[str, Any] = {"image": there}
    if classes is not None:
        variables |= _within(scores, entropy, ambiguous, classes, (units, resamples, seed))
        coords["label"] = names
    attrs = {"images": len(there), "cluster": cluster, "resamples": resamples, "seed": seed}
    return xr.Dataset(variables, coords, attrs)


def _within(
    scores: Array, entropy: Array, ambiguous: np.ndarray, classes: Groups, how: tuple[Groups, int, int]
) -> dict[str, tuple[tuple[str, ...], Any]]:
    units, resamples, seed = how
    within = bootstrap(counted_spearman(scores, entropy, classes), [units], resamples, seed)
    auroc = bootstrap(counted_auroc(scores, ambiguous, classes), [units], resamples, seed)
    of_class = [
        float(counted_spearman(scores[of], entropy[of])(np.ones((1, int(of.sum()))))[0])
        for of in (classes == place for place in range(int(classes.max()) + 1))
    ]
    return {
        **within.variables("human_spearman_within"),
        **auroc.variables("human_auroc_within"),
        "human_spearman_of_class": (("label",), np.array(of_class)),
    }


def _entropy(human: Given | People) -> Array:
    """Entropy of human labels in nats, `(image,)`."""
    values = numbers(human.probabilities if isinstance(human, People) else human, "human")
    if values.ndim not in (1, 2) or (values < 0).any():
        raise DataError(
            f"human has the shape {values.shape}: give shares (image, class) from 0 up, or entropies from 0 up"
        )
    if values.ndim == 1:
        return values
    with np.errstate(invalid="ignore", divide="ignore"):
        return entr(values / values.sum(1, keepdims=True)).sum(1)
