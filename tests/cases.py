"""The cases on the cards of the registered models, for the tests that run on every model: a model joins by existing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor

import calibrant as cal
from calibrant.program import covariate_names
from calibrant.program.environment import seeded
from calibrant.registries import Case


@dataclass(frozen=True)
class ModelCase:
    """One case of one registered model."""

    model: str
    case: Case

    def build(self, seed: int = 3) -> PyroModule:
        """The model, with the first weights that a seed gives; what is wrong with the card is said first."""
        with seeded(seed):
            model = cal.models.create(self.model, **self.case.arguments)
        where, taken = f"the case {self.case.name!r} of the model {self.model!r}", covariate_names(model)
        assert self.case.observed, f"{where} says no observed sites: Case(arguments, {{'x': shape}})"
        assert set(taken) == set(self.case.covariates), (
            f"{where} gives the covariates {sorted(self.case.covariates)}, its forward takes {sorted(taken)}: "
            "Case(..., covariates={NAME: function of the number of data})"
        )
        return model

    def covariates(self, size: int, seed: int = 0) -> dict[str, Tensor]:
        """The keyword tensors of so many data."""
        with seeded(seed):
            return {name: make(size) for name, make in self.case.covariates.items()}

    def values(self, model: PyroModule, size: int, seed: int = 1) -> dict[str, Tensor]:
        """Draws of all sites from the model, given `covariates(size)`."""
        return cal.program.sample_prior(model, size, self.covariates(size), seed=seed)

    def data(self, model: PyroModule, size: int, seed: int = 1) -> cal.data.Data:
        """Simulated observations beside their covariates."""
        values = self.values(model, size, seed)
        return cal.data.Data({name: values[name] for name in self.case.observed}, self.covariates(size))


def label(name: str, case: Case) -> str:
    """The name of a case in the list of tests."""
    words = case.name or "-".join(f"{key}={value}" for key, value in case.arguments.items()) or "default"
    return f"{name}-{words}"[:60]


def parameters(cases: list[tuple[str, Case, Any]]) -> list[Any]:
    """What `pytest.mark.parametrize` takes, for (name of the card, case, parameter)."""
    return [pytest.param(parameter, id=label(name, case)) for name, case, parameter in cases]


def preset_cases(name: str) -> list[Case]:
    """The presets of a model at the size for tests, as cases."""
    presets = cal.models.card(name).presets
    return [
        Case({"preset": one, **preset.small}, {"x": preset.small["shape"]}, name=one) for one, preset in presets.items()
    ]


def all_cases(name: str) -> list[Case]:
    """The cases of a model and its presets."""
    return [*cal.models.card(name).cases, *preset_cases(name)]


def model_cases(exact: bool = False, first: bool = False) -> list[Any]:
    """Parameters of a test: a `ModelCase` for each case and each preset of each registered model.

    Args:
        exact: only cases whose posterior is known exactly.
        first: only the first case of each model.
    """
    return parameters(
        [
            (name, case, ModelCase(name, case))
            for name in cal.models.list_models()
            for case in (cal.models.card(name).cases[:1] if first else all_cases(name))
            if case.is_exact or not exact
        ]
    )


def jittered(model: PyroModule, seed: int = 7) -> PyroModule:
    """The model with no weight left at zero, or at its neighbours' value."""
    with seeded(seed), torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()
