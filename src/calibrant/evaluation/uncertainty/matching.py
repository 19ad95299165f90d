"""Images of other sets at the contrast, or the power, of a first set: rescaled, or sorted into strata.

Contrast is the root mean square deviation of an image's pixels from their mean, power the mean square of its pixels.
For whitened patches of mean zero the two are nearly the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from calibrant.evaluation.uncertainty.images import centred, contrast_of_images

_BLANK = 1e-6  # of the largest of a set: images with less cannot be rescaled

Array = npt.NDArray[np.float64]
MATCHED = ("contrast", "power")


def amount_of(images: Tensor, matched: str) -> Tensor:
    """Contrast or root mean square of every image, `(image,)`, in float64."""
    if matched == "contrast":
        return contrast_of_images(images.double())
    return images.double().flatten(1).square().mean(1).sqrt()


def rescaled(images: Tensor, like: Tensor, matched: str) -> tuple[Tensor, Tensor]:
    """Images with the distribution of contrast, or power, of other images.

    The image with the r-th smallest amount of n gets the quantile (r − ½)/n of the other images. Contrast is scaled
    about each image's mean, power about zero.

    Args:
        images: images that are rescaled, `(image, *event)`.
        like: images with the wanted distribution.
        matched: "contrast" or "power".

    Returns:
        The images, and which of them could not be rescaled since they are blank, `(image,)`; these are unchanged.
    """
    amount, wanted = amount_of(images, matched), amount_of(like, matched)
    quantiles = (amount.argsort().argsort().double() + 0.5) / len(amount)
    blank = amount <= _BLANK * amount.max()
    factor = torch.where(blank, 1.0, wanted.quantile(quantiles) / amount.clamp_min(1e-300))
    changed = centred(images) if matched == "contrast" else images
    return images + (factor - 1).reshape(-1, *[1] * (images.dim() - 1)).to(images) * changed, blank


def strata(first: Array, second: Array, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Strata 0, 1, … of the images of two sets by their contrast or power, with as many images of both in each.

    Args:
        first: amounts of the images of one set.
        second: amounts of the images of the other.
        count: number of strata.
    """
    edges: Sequence[float] = np.quantile(np.concatenate([first, second]), np.arange(1, count) / count).tolist()
    return np.searchsorted(edges, first, "right"), np.searchsorted(edges, second, "right")
