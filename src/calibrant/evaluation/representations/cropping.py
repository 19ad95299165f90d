"""The crop test: whether a representation is less certain about a part of an image than about the whole image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import interpolate

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations.inputs import Cluster, Labels, class_numbers, image_numbers, units_of
from calibrant.evaluation.statistics.arrays import Array, Given, numbers, plain
from calibrant.evaluation.statistics.counted import counted_mean, counted_spearman
from calibrant.evaluation.statistics.resampling import bootstrap
from calibrant.evaluation.statistics.settings import real
from calibrant.evaluation.statistics.settings import whole as whole_number
from calibrant.streams import stream


def crop_shares(count: int, seed: int = 0, low: float = 0.1, high: float = 0.75) -> Array:
    """One share of the shorter side for each image, uniform from `low` to `high`, `(image,)`.

    The same seed gives the same shares, so that all representations are judged by the same crops.

    Args:
        count: number of images.
        seed: random seed for the shares.
        low: smallest share; 0.1 in the code of URL (arXiv 2307.03810).
        high: largest share; 0.75 in the code of URL.

    Raises:
        InferenceError: for shares that are no parts of an image.
    """
    whole_number(count, "count", 0)
    if not 0 < real(low, "low") <= real(high, "high") <= 1:
        raise InferenceError(f"low={low}, high={high}: give shares of the side, 0 < low <= high <= 1")
    return np.random.default_rng(stream(seed, "crops")).uniform(low, high, count)


def cropped(images: Tensor, shares: npt.ArrayLike) -> Tensor:
    """The middle square of each image, resized to the size of the image, bilinearly.

    The side of the square is the share of the shorter side, rounded to whole pixels, and at least one. Images that are
    not square are stretched.

    Args:
        images: `(image, channel, height, width)`, floating.
        shares: share of the shorter side, above 0 and at most 1, `(image,)`.

    Returns:
        Images of the same shape and dtype.

    Raises:
        DataError: for images of another shape, integers, or another number of shares.
    """
    parts = numbers(plain(shares, "shares"), "shares")
    if not isinstance(images, Tensor):
        raise DataError(f"images: {type(images).__name__}; give a tensor, such as torch.from_numpy(images)")
    if images.ndim != 4 or not images.is_floating_point():
        raise DataError(
            f"images: {images.dtype} of shape {tuple(images.shape)}; give floats (image, channel, height, width)"
        )
    if parts.shape != (len(images),) or not ((parts > 0) & (parts <= 1)).all():
        raise DataError(f"shares: give one above 0 and at most 1 for each of the {len(images)} images")
    size = images.shape[-2:]
    sides = np.maximum(np.rint(min(size) * parts), 1).astype(int)
    result = torch.empty_like(images)
    for side in np.unique(sides):
        of = torch.from_numpy(np.flatnonzero(sides == side))
        top, left = (round((int(whole) - int(side)) / 2) for whole in size)
        middle = images[of, :, top : top + side, left : left + side]
        result[of] = interpolate(middle, size=tuple(size), mode="bilinear", align_corners=False)
    return result


def crop_test(
    whole: Given,
    crops: Given,
    shares: npt.ArrayLike | None = None,
    labels: Labels | None = None,
    *,
    cluster: Cluster = "image",
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Whether crops are less certain than whole images, and the smaller ones the least.

    Crops lose more than the object: what is left is larger and less sharp. An uncertainty that follows blur alone
    passes too.

    Args:
        whole: uncertainty of each image, `(image,)`.
        crops: uncertainty of its crop, `(image,)`.
        shares: share of the side that the crop keeps, `(image,)`; without it there is no rank correlation.
        labels: classes `(image,)`, for `cluster="class"`.
        cluster: what the bootstrap resamples: each "image" alone, or each "class" with all its images.
        resamples: number of bootstrap resamples.
        seed: random seed for the bootstrap.

    Returns:
        `crop_less_certain`, the share of images whose crop has the larger uncertainty, where ties do not count;
        `crop_ties`, the share of ties; `crop_spearman`, the rank correlation of minus the uncertainty of crops and
        `shares`, which is positive if smaller crops are less certain. The first and the last have `…_se`, and
        `…_low` and `…_high`, the ends of the 95% interval.

    Raises:
        DataError: for arrays that do not belong together, or hold NaN.
        InferenceError: for settings that cannot be used.
    """
    size = numbers(whole, "whole").size
    if not size:
        raise DataError("whole: there are no images; give the uncertainty of one or more")
    first, second = (image_numbers(values, size, name) for values, name in ((whole, "whole"), (crops, "crops")))
    units = units_of(cluster, None if labels is None else class_numbers(labels, size), size)
    variables = bootstrap(counted_mean(first < second), [units], resamples, seed).variables("crop_less_certain")
    variables["crop_ties"] = ((), (first == second).mean())
    if shares is not None:
        kept = image_numbers(plain(shares, "shares"), size, "shares")
        variables |= bootstrap(counted_spearman(-second, kept), [units], resamples, seed).variables("crop_spearman")
    return xr.Dataset(variables, attrs={"images": size, "cluster": cluster, "resamples": resamples, "seed": seed})
