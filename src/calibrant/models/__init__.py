"""Generative models: every file here registers its models; a new model is one new file."""

from __future__ import annotations

from calibrant.calls import own_calls
from calibrant.models.parts.likelihoods.bernoulli import Bernoulli
from calibrant.models.parts.likelihoods.gaussian import Gaussian
from calibrant.models.parts.likelihoods.grey import grey_values
from calibrant.models.parts.likelihoods.protocol import Likelihood
from calibrant.models.parts.likelihoods.registry import (
    LikelihoodCard,
    list_likelihoods,
    make_likelihood,
    register_likelihood,
)
from calibrant.models.presets import Preset, Training, TrainingProtocol
from calibrant.models.registry import (
    ModelCard,
    Recipe,
    card,
    constructor_arguments,
    create,
    list_models,
    list_presets,
    register_model,
    training,
)
from calibrant.models.shared_negatives import SharedNegatives
from calibrant.models.trained_decoder import DecoderModel, from_decoder
from calibrant.registries import Case, import_all

import_all(__name__, __path__)
_CLASSES: dict[str, type] = {entry.cls.__name__: entry.cls for entry in list_likelihoods()}
_CLASSES.update({card(name).cls.__name__: card(name).cls for name in list_models()})
globals().update(_CLASSES)

__all__ = [
    "Bernoulli",
    "Case",
    "DecoderModel",
    "Gaussian",
    "Likelihood",
    "LikelihoodCard",
    "ModelCard",
    "Preset",
    "Recipe",
    "SharedNegatives",
    "Training",
    "TrainingProtocol",
    "card",
    "constructor_arguments",
    "create",
    "from_decoder",
    "grey_values",
    "list_likelihoods",
    "list_models",
    "list_presets",
    "make_likelihood",
    "register_likelihood",
    "register_model",
    "training",
]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted({*__all__, *_CLASSES})
