"""Programs in which everything but one scale is jointly Gaussian: what they are, and how they are found."""

from calibrant.linear_gaussian.detection import detect
from calibrant.linear_gaussian.parameters import LinearGaussian

__all__ = ["LinearGaussian", "detect"]
