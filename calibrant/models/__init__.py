"""Generative models: every file here registers its models; a new model is one new file."""

from __future__ import annotations

import importlib
import pkgutil

from calibrant.models.likelihoods import Bernoulli, Gaussian
from calibrant.models.own import DecoderModel, from_decoder
from calibrant.models.registry import (
    ModelCard,
    Recipe,
    card,
    constructor_arguments,
    create,
    list_models,
    register_model,
)

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
globals().update({card(name).cls.__name__: card(name).cls for name in list_models()})

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
