"""Refining a guide: variational parameters for each datum of its own, climbed on the ELBO."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor
from torch.func import functional_call

from calibrant.binding import bind_fixed
from calibrant.data.dataset import Data
from calibrant.errors import ProgramError
from calibrant.guides.refined import RefinedGuide
from calibrant.program.contract import Program, Values, as_program
from calibrant.program.environment import defaults, seeded
from calibrant.program.refusals import check_program
from calibrant.progress import Progress, silent
from calibrant.streams import stream

if TYPE_CHECKING:
    from calibrant.inference.graphs.of_modules import Gradient
_RECORDED_FROM = 300  # steps


def refine(
    model: Program,
    guide: Program,
    observed: Mapping[str, Any] | Data,
    *,
    covariates: Mapping[str, Any] | None = None,
    steps: int = 500,
    lr: float = 0.05,
    batch_size: int = 1024,
    seed: int = 0,
    progress: Progress = silent,
) -> RefinedGuide:
    """A guide for exactly these data, which does at least about as well as the given one on each of them.

    Every continuous local site of the guide gets an affine map on the line for each datum and entry, which starts as
    the identity and climbs the datum's ELBO (Adam with cosine decay on the path-derivative gradient). The result takes
    part wherever a guide does, with the same data: `inference.posterior(model, refined, observed)`.

    Args:
        model: the program, in `eval()`; it is not changed.
        guide: any guide of it, in `eval()`; a copy of it is refined.
        observed: site → tensor, or a `Data`.
        covariates: keyword → tensor.
        steps: gradient steps of each datum; 0 leaves the guide as it is.
        lr: first learning rate, in the guide's own sds (of a mean) and in log scale.
        batch_size: how many data are optimised together.
        seed: of the draws.
        progress: called with (stage, done, total, text).

    Raises:
        ProgramError, DataError: for a model, guide or data that break the contract; for a guide without a continuous
            local site.
    """
    from calibrant.guides.contract import check_guide
    from calibrant.guides.many_draws import fixed  # it is built on this module, and inference on guides
    from calibrant.inference.graphs.of_modules import Gradient

    data, program = bind_fixed(model, observed, covariates), as_program(model)
    check_program(program, *data.tensors())
    start = copy.deepcopy(as_program(guide)).requires_grad_(False)
    check_guide(program, start, *data.batch(torch.arange(min(len(data), 4))))
    weights = {name: tensor.detach() for name, tensor in program.named_parameters()}

    def model_as_it_is(size: int, **given: Tensor) -> Any:
        return functional_call(program, weights, (size,), given)

    quiet = pyro.validation_enabled(False)
    with seeded(stream(seed, "refine")), quiet, fixed(start), defaults(program, data.batch([0])[0]) as place:
        refined = RefinedGuide(start, *data.tensors(*place))
        if not refined.sites:
            raise ProgramError("the guide has no continuous local latent on a line: there is nothing to refine")
        for index in torch.arange(len(data), device="cpu").split(batch_size):
            rows, cols = data.batch(index, *place)
            with refined.trusting():
                _climb(Gradient(refined, partial(_elbo, model_as_it_is, refined)), rows, cols, steps, lr)
            progress("refine", int(index[-1]) + 1, len(data))
    return refined.requires_grad_(False).eval()


def _elbo(model: Program, refined: RefinedGuide, observed: Values, covariates: Values) -> tuple[Tensor]:
    """The ELBO summed over these data: the maps of one datum have no part in the others' terms."""
    from calibrant.inference.fitting.objectives import path_derivative

    size = len(next(iter(observed.values())))
    return (path_derivative(model, refined, observed, size, covariates).local.sum(),)


def _climb(gradient: Gradient, observed: Values, covariates: Values, steps: int, lr: float) -> None:
    """Gradient steps with an Adam of their own, which leaves data without gradient where they are."""
    weights = list(gradient.weights.values())
    optimizer = gradient.adam(lr, betas=(0.9, 0.99), maximize=True)
    if steps >= _RECORDED_FROM:
        gradient.record((observed, covariates), (observed, covariates), False)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        _, *slopes = gradient(observed, covariates)
        for weight, slope in zip(weights, slopes, strict=True):
            weight.grad = slope.nan_to_num(0.0, 0.0, 0.0)  # one datum's overflow stays its own
        optimizer.step()
