"""Means over images of which some have no reference: what they could be, and when they decide nothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from calibrant.evaluation.uncertainty.moments import Array, mean_and_error

REFUSED_LIMIT = 0.1  # share of images without a reference above which there is no verdict

Passed = npt.NDArray[np.bool_]
Variables = dict[str, tuple[tuple[str, ...], Array]]


def with_refused(
    stem: str,
    dims: tuple[str, ...],
    exact: Array,
    guide: Array,
    passed: Passed,
    extremes: tuple[float, float] | None = None,
) -> Variables:
    """What a mean over images is, where the references of some images are refused.

    Images whose reference fails the gate are no random part of all images. Two numbers tell how much their absence can
    matter: whether the guide's statistic differs between passed and refused images, and how far the reference's mean
    could move.

    Args:
        stem: name of the statistic.
        dims: dimensions of the means.
        exact: the reference's statistic, `(*dims, image)`; what it holds for refused images is ignored.
        guide: the guide's statistic for all images, `(*dims, image)`.
        passed: whether the reference of an image passed, `(*dims, image)`.
        extremes: smallest and largest value that the statistic of a refused image could have; None for the smallest
            and the largest of all values, of both sources.

    Returns:
        `STEM_guide_passed` and `STEM_guide_refused`, the guide's means over the images whose reference passed and was
        refused, with standard errors `…_se` over images (NaN for fewer than two); `STEM_low` and `STEM_high`, the
        reference's mean over all images, with the statistic of the refused ones at either extreme.
    """
    known = np.where(passed, exact, np.nan)
    low, high = extremes if extremes is not None else _range(known, guide)
    found: Variables = {}
    for name, which in (("passed", passed), ("refused", ~passed)):
        mean, error = mean_and_error(np.where(which, guide, np.nan))
        found |= {f"{stem}_guide_{name}": (dims, mean), f"{stem}_guide_{name}_se": (dims, error)}
    for name, value in (("low", low), ("high", high)):
        found[f"{stem}_{name}"] = (dims, np.where(passed, exact, value).mean(-1))
    return found


def _range(*parts: Array) -> tuple[float, float]:
    values = np.concatenate([part[np.isfinite(part)] for part in parts])
    return (float(values.min()), float(values.max())) if len(values) else (np.nan, np.nan)


def is_decided(share_reference: float) -> bool:
    """Whether so large a share of images has a reference that a verdict may be given."""
    return 1.0 - share_reference <= REFUSED_LIMIT
