"""The standard deviation of a model's noise, as its likelihood returns it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from calibrant.calls import parameters_in_modules
from calibrant.errors import InferenceError
from calibrant.program.contract import Program, Values, as_program
from calibrant.program.environment import defaults, seeded

_SIMULATED = 16  # number of simulated data, if there are no covariates that determine it


def noise_sd(model: Program, covariates: Values | None = None) -> Tensor | None:
    """The result of `model.likelihood.noise_sd` for data that the model simulates: standard deviations in data units.

    Args:
        model: the program.
        covariates: keyword → tensor, as the program takes them.

    Returns:
        The standard deviations; None for a program without such a likelihood, or one that cannot be simulated.
    """
    program, given = as_program(model), covariates or {}
    likelihood = getattr(program, "likelihood", None)
    told: Callable[[Any], Tensor | None] | None = getattr(likelihood, "noise_sd", None)
    if not isinstance(likelihood, nn.Module) or told is None:
        return None
    outputs: list[object] = []

    def keep(module: nn.Module, inputs: tuple[object, ...], named: dict[str, object]) -> None:
        outputs.extend([*inputs, *named.values()][:1])

    handle = likelihood.register_forward_pre_hook(keep, with_kwargs=True)
    size = len(next(iter(given.values()), range(_SIMULATED)))
    try:
        with torch.no_grad(), seeded(0), pyro.validation_enabled(False), defaults(program, given):
            with parameters_in_modules():
                program(size, **given)
            found = told(outputs[-1]) if outputs else None
            return found if found is not None and bool(found.isfinite().all()) else None
    except NotImplementedError:  # an improper prior has no draws
        return None
    finally:
        handle.remove()


def noise_equivalent_contrast(model: Program, covariates: Values | None = None) -> float:
    """The standard deviation of a model's noise, in data units; over pixels, the root mean square.

    Raises:
        InferenceError: for a model whose likelihood does not return it.
    """
    found = noise_sd(model, covariates)
    if found is None:
        raise InferenceError(
            f"the noise of {type(model).__name__} is not known: its likelihood has no method `noise_sd`, or that "
            "returns None. Give noise=, the standard deviation of its noise in data units"
        )
    return float(found.detach().double().square().mean().sqrt())
