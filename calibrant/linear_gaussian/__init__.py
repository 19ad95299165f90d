"""Programs in which everything but one scale is jointly Gaussian: what they are, and how they are found."""

from calibrant.linear_gaussian.detect import detect
from calibrant.linear_gaussian.structure import LinearGaussian

__all__ = ["LinearGaussian", "detect"]
