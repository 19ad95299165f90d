"""All metrics of a representation that apply to the data that are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data, as_data
from calibrant.errors import DataError
from calibrant.evaluation.representations.cropping import crop_shares, crop_test, cropped
from calibrant.evaluation.representations.inputs import Cluster, Embedded
from calibrant.evaluation.representations.match_probabilities import match_calibration
from calibrant.evaluation.representations.novelty import mixed_retrieval, ood_auroc
from calibrant.evaluation.representations.people import People, human_entropy
from calibrant.evaluation.representations.recall import retrieval
from calibrant.evaluation.representations.rejecting import reject_curve
from calibrant.evaluation.statistics.arrays import Array, Given, plain
from calibrant.progress import Progress, reporting
from calibrant.representations.learners.labelled import Labelled
from calibrant.representations.protocol import Representation

Images = Mapping[str, Any] | Data


def representation_metrics(
    representation: Representation,
    data: Images,
    *,
    human: Given | People | None = None,
    outside: Images | None = None,
    crops: tuple[Tensor, Given] | None = None,
    pairs: tuple[Given, Given] | None = None,
    cluster: Cluster = "class",
    resamples: int = 1000,
    seed: int = 0,
    progress: Progress | bool = True,
    **options: Any,
) -> xr.Dataset:
    """Retrieval, error versus reject, crop test, people, other sets and match probabilities, as far as data allow.

    Args:
        representation: anything with `embed(x)` and `uncertainty(x)`.
        data: inputs `x` and labels `y`, images or features.
        human: shares or counts of human labels `(image, class)`, or their entropies `(image,)`, or what
            `data.human_labels` gives; see `human_entropy`.
        outside: inputs `x` and labels `y` of another set of images; see `ood_auroc` and `mixed_retrieval`.
        crops: inputs of the crops, such as their features, and the shares of the side that they keep. Without them,
            `x` is cropped if it is images `(image, channel, height, width)`; see `cropped`.
        pairs: predicted probabilities that the images of a pair match, and whether they do; see `match_calibration`.
        cluster: what the bootstrap resamples: each "class" with all its images, or each "image". Pairs are
            resampled one by one.
        resamples: number of bootstrap resamples.
        seed: random seed for crops, the choice of images, and the bootstrap.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        options: further arguments of `retrieval`, such as `ks` or `self_match`.

    Returns:
        The variables of `retrieval`; of `reject_curve` for the share of wrong nearest neighbours, with names that start
        with `reject_`; of `crop_test`, `human_entropy`, `ood_auroc`, `mixed_retrieval`, and of `match_calibration`,
        with names that start with `match_`. All are explained there.

    Raises:
        DataError: for data that cannot be used.
        InferenceError: for settings that cannot be used.
    """
    progress = reporting(progress)
    images, crop_scores, shares = _represented(representation, as_data(data), crops, seed, progress)
    labels, scores = np.asarray(images.labels), np.asarray(images.uncertainty)
    how: dict[str, Any] = {"cluster": cluster, "resamples": resamples, "seed": seed}
    found = retrieval(images.embeddings, labels, scores, **how, progress=progress, **options)
    kept = found["image"].values
    parts = [found, _named("reject_", reject_curve(~found["correct"].values, scores[kept], labels[kept], **how))]
    if crop_scores is not None:
        parts.append(crop_test(scores, crop_scores, shares, labels, **how))
    if human is not None:
        parts.append(human_entropy(scores, human, labels, **how).drop_dims("image"))
    if outside is not None:
        parts += _of_outside(representation, images, as_data(outside), how, progress)
    if pairs is not None:
        parts.append(_named("match_", match_calibration(*pairs, resamples=resamples, seed=seed)))
    return xr.merge(parts, combine_attrs="override", compat="no_conflicts", join="exact")


def _represented(
    representation: Representation,
    data: Data,
    crops: tuple[Tensor, Given] | None,
    seed: int,
    progress: Progress,
    crop: bool = True,
) -> tuple[Embedded, Array | None, Array | None]:
    """Embeddings and uncertainties of images, uncertainties of their crops, and the shares that these keep."""
    if not isinstance(representation, Representation):
        raise DataError(
            f"{type(representation).__name__} has no embed(x) and uncertainty(x): give a trained representation, or an "
            "object with both methods"
        )
    labelled = Labelled(data)
    found: dict[str, list[np.ndarray]] = {"embeddings": [], "labels": [], "uncertainty": [], "crops": []}
    is_image = crop and crops is None and len(labelled.shape) == 3
    shares = crop_shares(len(data), seed)
    for block in labelled.blocks():
        batch = labelled.batch(block)
        found["embeddings"].append(_array(representation.embed(batch["x"])))
        found["uncertainty"].append(_array(representation.uncertainty(batch["x"])))
        found["labels"].append(labelled.classes[batch["y"].numpy()])
        if is_image:
            parts = cropped(batch["x"], shares[block.numpy()])
            found["crops"].append(_array(representation.uncertainty(parts)))
        progress("embeddings", int(block[-1]) + 1, len(data))
    whole = {name: np.concatenate(values) for name, values in found.items() if values}
    images = Embedded(whole["embeddings"], whole["labels"], whole["uncertainty"])
    if crops is None:
        return images, whole.get("crops"), shares
    if len(crops[0]) != len(data):
        raise DataError(f"crops: {len(crops[0])} inputs for {len(data)} images; give one crop of each image")
    blocks = (crops[0][block] for block in labelled.blocks())
    scores = np.concatenate([_array(representation.uncertainty(block)) for block in blocks])
    return images, scores, np.asarray(crops[1])


def _of_outside(
    representation: Representation, images: Embedded, outside: Data, how: dict[str, Any], progress: Progress
) -> list[xr.Dataset]:
    other, _, _ = _represented(representation, outside, None, how["seed"], progress, crop=False)
    novelty = ood_auroc(images.uncertainty, other.uncertainty, images.labels, other.labels, **how)
    return [novelty, mixed_retrieval(images, other, **how, progress=progress)]


def _named(start: str, found: xr.Dataset) -> xr.Dataset:
    return found.rename({name: f"{start}{name}" for name in found.data_vars})


def _array(values: Given) -> np.ndarray:
    return plain(values, "what embed and uncertainty return")
