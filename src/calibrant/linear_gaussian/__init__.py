"""Programs in which all sites except one scale are jointly Gaussian: their structure, and how it is detected."""

from calibrant.linear_gaussian.detection import detect
from calibrant.linear_gaussian.parameters import LinearGaussian

__all__ = ["LinearGaussian", "detect"]
