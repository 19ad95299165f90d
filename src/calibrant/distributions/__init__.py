"""Distributions of directions, exact in every dimension: von Mises, and von Mises–Fisher on spheres."""

from calibrant.calls import own_calls
from calibrant.distributions.directional import (
    VonMises,
    VonMisesFisher,
    cap_cosine,
    cap_probability,
    cosine_nodes,
    log_normalizer,
    log_peak_density,
    mean_cosine,
)
from calibrant.distributions.matching import match_constant, match_probability
from calibrant.distributions.published import PublishedVonMisesFisher, published_mean_cosine

__all__ = [
    "PublishedVonMisesFisher",
    "VonMises",
    "VonMisesFisher",
    "cap_cosine",
    "cap_probability",
    "cosine_nodes",
    "log_normalizer",
    "log_peak_density",
    "match_constant",
    "match_probability",
    "mean_cosine",
    "published_mean_cosine",
]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
