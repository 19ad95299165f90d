"""Representations with uncertainties: backbones, cached features, tuples of images, methods with one interface."""

import importlib

from calibrant.calls import own_calls
from calibrant.representations.backbones import Backbone, backbone, list_backbones
from calibrant.representations.caching import features, read_features
from calibrant.representations.generator import Generator
from calibrant.representations.learners.registry import MethodCard, method_card, methods
from calibrant.representations.protocol import Representation
from calibrant.representations.small_networks import small_network
from calibrant.representations.trained import Trained, load_representation, train_representation
from calibrant.representations.tuples import batches, candidates, matchable, pairs
from calibrant.representations.views import Views

importlib.import_module("calibrant.representations.learners")

__all__ = [
    "Backbone",
    "Generator",
    "MethodCard",
    "Representation",
    "Trained",
    "Views",
    "backbone",
    "batches",
    "candidates",
    "features",
    "list_backbones",
    "load_representation",
    "matchable",
    "method_card",
    "methods",
    "pairs",
    "read_features",
    "small_network",
    "train_representation",
]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
