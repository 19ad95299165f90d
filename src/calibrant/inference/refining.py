"""Refinement of a guide: separate variational parameters for each datum, optimised on its ELBO."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import ProgramError
from calibrant.guides.many_draws import encoded_before, fixed
from calibrant.guides.refined import RefinedGuide, with_maps
from calibrant.inference.fitting.objectives import path_derivative
from calibrant.inference.graphs.of_modules import Gradient
from calibrant.inference.problem import Problem
from calibrant.program.contract import Program, Values
from calibrant.program.environment import defaults, on_tensors, seeded
from calibrant.program.modules import copied
from calibrant.program.tracing import guide_trace
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

LR = 0.05  # initial learning rate, in sds of the guide
_RECORDED_FROM = 300  # least number of steps for which a graph is recorded


def refine(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    *,
    covariates: Mapping[str, Any] | None = None,
    steps: int = 500,
    lr: float = LR,
    batch_size: int = 1024,
    seed: int = 0,
    progress: Progress | bool = True,
) -> RefinedGuide:
    """Refine a guide for a fixed set of data; the ELBO of each datum becomes higher, or stays about the same.

    Every continuous local site of the guide gets an affine map in unconstrained space for each datum and entry. The map
    starts as the identity and maximises the ELBO of the datum (Adam with cosine decay on the path-derivative gradient).
    The result can be used like any guide, with the same data: `inference.posterior(model, refined, observed)`.

    Args:
        model: the program, in `eval()`; it is not changed.
        guide: any guide of the program, in `eval()`; a copy of it is refined.
        observed: site → tensor, or a `Data`.
        covariates: keyword → tensor, leading dimension data.
        steps: number of gradient steps for each datum; 0 leaves the guide unchanged.
        lr: initial learning rate, in sds of the guide for locations and in units of the log scale for scales.
        batch_size: number of data that are optimised together.
        seed: random seed for the draws.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract, and for a guide without a
            continuous local site.
    """
    progress = reporting(progress)
    problem = Problem.of(model, guide, observed, covariates)
    return refined_of(problem, steps, lr, seed, progress, batch_size=batch_size)


def refined_of(
    problem: Problem, steps: int, lr: float, seed: int, progress: Progress, *, batch_size: int = 1024
) -> RefinedGuide:
    """Refine the guide, like `refine`, for a problem that is already checked."""
    program, data = problem.program, problem.data
    start = copied(problem.guide).requires_grad_(False)
    model_as_it_is = on_tensors(program, {name: tensor.detach() for name, tensor in program.named_parameters()})

    quiet = pyro.validation_enabled(False)
    with seeded(stream(seed, "refine")), quiet, fixed(start), defaults(program, data.batch([0])[0]) as place:
        refined = with_maps(start, *data.tensors(*place))
        if not refined.sites:
            raise ProgramError("the guide has no continuous local latent on a line: there is nothing to refine")
        progress("refine", 0, len(data))
        for index in torch.arange(len(data), device="cpu").split(batch_size):
            rows, cols = data.batch(index, *place)
            told = partial(_told, progress, int(index[0]), len(index), steps, len(data))
            encoded = partial(guide_trace, start, rows, len(index), cols)
            with refined.always(rows, cols), encoded_before(start, encoded):
                _climb(Gradient(refined, partial(_elbo, model_as_it_is, refined)), rows, cols, steps, lr, told)
            progress("refine", int(index[-1]) + 1, len(data))
    return refined.requires_grad_(False).eval()


def _elbo(model: Program, refined: RefinedGuide, observed: Values, covariates: Values) -> tuple[Tensor]:
    """The ELBO, summed over data: the maps of a datum affect only its own term."""
    size = len(next(iter(observed.values())))
    return (path_derivative(model, refined, observed, size, covariates).local.sum(),)


def _told(progress: Progress, before: int, size: int, steps: int, total: int, step: int) -> None:
    """Report the steps of a batch as the number of data that would be done if they came one after the other."""
    progress("refine", before + size * step // steps, total)


def _climb(
    gradient: Gradient, observed: Values, covariates: Values, steps: int, lr: float, told: Callable[[int], None]
) -> None:
    """Maximise with a new Adam optimiser, which does not move the maps of data without gradient."""
    weights = list(gradient.weights.values())
    optimizer = gradient.adam(lr, betas=(0.9, 0.99))
    if steps >= _RECORDED_FROM:
        gradient.record((observed, covariates), (observed, covariates), False)
    for step in range(steps):
        told(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        _, _, *slopes = gradient(observed, covariates)
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope.nan_to_num(0.0, 0.0, 0.0)  # an overflow for one datum does not affect other data
        optimizer.step()
