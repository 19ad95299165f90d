"""Generative models: every file here registers its models; a new model is one new file."""

from __future__ import annotations

import importlib
import pkgutil

from calibrant.models.parts.likelihoods import Bernoulli, Gaussian
from calibrant.models.registry import (
    ModelCard,
    Recipe,
    card,
    constructor_arguments,
    create,
    list_models,
    register_model,
)
from calibrant.models.trained_decoder import DecoderModel, from_decoder

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
_CLASSES = {card(name).cls.__name__: card(name).cls for name in list_models()}
globals().update(_CLASSES)

__all__ = [
    "Bernoulli",
    "DecoderModel",
    "Gaussian",
    "ModelCard",
    "Recipe",
    "card",
    "constructor_arguments",
    "create",
    "from_decoder",
    "list_models",
    "register_model",
]


def __dir__() -> list[str]:
    return sorted([*__all__, *_CLASSES])
