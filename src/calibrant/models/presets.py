"""Presets: the models of a paper as named arguments, with named ways to train them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TrainingProtocol:
    """A way to train the model of a preset. A function in the place of a value is called with the event shape.

    Attributes:
        about: what it is, in one line, and where it departs from its source.
        data: name of a registered data set, with values in the support of the model.
        data_options: its options.
        arguments: arguments of `create` in place of those of the preset.
        guide: arguments of `calibrant.guides.amortize`.
        fit: arguments of `calibrant.inference.fit`.
    """

    about: str
    data: str
    data_options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    guide: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preset:
    """Arguments of a registered model, under a name. A function in the place of a value is called with the event shape.

    Attributes:
        about: what the model is, in one line.
        arguments: arguments of the constructor; `shape` is the default one.
        small: arguments with which the model is small enough for the tests.
        trainings: ways to train it, by name.
    """

    about: str
    arguments: Mapping[str, Any]
    small: Mapping[str, Any] = field(default_factory=dict)
    trainings: Mapping[str, TrainingProtocol] = field(default_factory=dict)


@dataclass(frozen=True)
class Training:
    """How a model of a preset is trained: what `create`, `amortize` and `fit` take.

    Attributes:
        model: name of the model.
        preset: name of the preset.
        by: name of the way to train it.
        about: what it is, in one line, and where it departs from its source.
        data: name of the data set, for `calibrant.data.load`.
        data_options: options of the data set.
        arguments: arguments of `calibrant.models.create`, in full.
        guide: arguments of `calibrant.guides.amortize`.
        fit: arguments of `calibrant.inference.fit`.
    """

    model: str
    preset: str
    by: str
    about: str
    data: str
    data_options: dict[str, Any]
    arguments: dict[str, Any]
    guide: dict[str, Any]
    fit: dict[str, Any]


def at_shape(values: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """The values of a preset at an event shape: functions, also in inner mappings, are called with it."""
    return {name: _value(value, shape) for name, value in values.items()}


def _value(value: Any, shape: Shape) -> Any:
    if isinstance(value, Mapping):
        return at_shape(value, shape)
    return value(shape) if callable(value) else value
