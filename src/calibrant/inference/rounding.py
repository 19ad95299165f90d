"""In which precision draws are stored: float32 where rounding to it changes nothing, otherwise float64.

Draws are computed in float64. Rounding them to float32 is harmless unless numbers lie close together in comparison with
their size: where the mean of a posterior is a million times its sd; near one bound of an interval (a Beta variable
within 1e-8 of 1 would become 1, where the density is zero or infinite); for positive numbers below 1e-38; for ordered
vectors with entries that nearly coincide. One rule finds all these cases: it compares the unconstrained values of a
draw before and after rounding, in units of the posterior spread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import constraints
from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.program.environment import defaults, in_double, seeded
from calibrant.program.supports import base_support, bounds, from_line, is_circular, is_direction
from calibrant.program.tracing import sampled, trace

_HARMLESS = 1e-3  # largest change of a draw, in units of the spread
_ROUNDING = 2.0**-24  # relative change of a number that float32 rounds
_FEW_DRAWS = 64  # draws per chain, at most, from which the quick answer takes the spread
_SPREAD_DRAWS = 256  # draws per chain, at most, from which the spread is computed
_BLOCK_ELEMENTS = 2**20  # 8 MiB of float64; the rule holds a few copies of a block

ToLine = Callable[[Tensor], Tensor]


def as_stored(
    draws: Mapping[str, Any], program: PyroModule, data: Data, latents: Collection[str], local: Collection[str]
) -> dict[str, Tensor]:
    """Draws in the dtype in which they are stored.

    A floating-point variable becomes float32 unless rounding would change the unconstrained value of a draw by more
    than a thousandth of the spread of its datum. For a draw in the tail, its distance from the median is added to the
    spread. If one datum of a variable needs float64, the variable is float64, and the draws of all other data are those
    that float32 holds, so that the draws of a datum do not depend on other data. Latents whose bounds depend on other
    latents are always float64.

    Args:
        draws: site → `(chain, draw, data, *event)`, or `(chain, draw, *event)` for a shared site.
        program: the program.
        data: its data.
        latents: names of the latent sites in `draws`; the values of all other sites are compared as they are.
        local: names of the sites with a data dimension.
    """
    tensors = {name: torch.as_tensor(value).detach().cpu() for name, value in draws.items()}
    wide = {name for name, value in tensors.items() if value.dtype == torch.float64}
    to_lines, moving = _to_lines(program, data, wide & set(latents))
    return {
        name: _stored(value, to_lines.get(name), name in local) if name in wide - moving else value
        for name, value in tensors.items()
    }


def _to_lines(program: PyroModule, data: Data, names: set[str]) -> tuple[dict[str, ToLine | None], set[str]]:
    """The maps from the supports of latents to unconstrained space, and the latents whose bounds are not fixed."""
    if not names:
        return {}, set()
    with (
        torch.no_grad(),
        pyro.validation_enabled(False),
        defaults(program, data.tensors()[0], torch.float64) as place,
    ):
        double, (observed, covariates) = in_double(program), data.tensors(*place)
        runs = []
        for seed in (0, 1):
            with seeded(seed):
                runs.append(sampled(trace(double, len(data), covariates, observed)))
    fns = [{name: run[name]["fn"] for name in names} for run in runs]
    moving = {name for name in names if not _same(*([*map(Tensor.cpu, bounds(fn[name].support))] for fn in fns))}
    return {name: _to_line(fns[0][name], place[0]) for name in names - moving}, moving


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _to_line(fn: Any, device: torch.device) -> ToLine | None:
    """The map from a support to unconstrained space; None for the line, directions, and supports without such a map."""
    if is_circular(fn) or is_direction(fn) or fn.support.is_discrete or base_support(fn.support) is constraints.real:
        return None
    if base_support(fn.support) is constraints.simplex:  # each share has two bounds, which sticks do not show
        return torch.logit
    try:
        transform = from_line(fn.support)
    except NotImplementedError:
        return None
    return lambda values: transform.inv(values.to(device)).cpu()


def _stored(values: Tensor, to_line: ToLine | None, local: bool) -> Tensor:
    """One variable, `(chain, draw, …)`, in the dtype in which it is stored."""
    if to_line is None and _is_harmless(values):
        return values.float()
    to_line = to_line or _as_it_is
    few = to_line(values[:, :: max(1, values.shape[1] // _SPREAD_DRAWS)]).flatten(0, 1).sort(0).values
    lower, centre, upper = (few[(len(few) * quarter) // 4] for quarter in (1, 2, 3))
    harmless, parts = torch.ones_like(centre, dtype=torch.bool), []
    for block in values.split(max(1, _BLOCK_ELEMENTS // max(1, values[:, :1].numel())), 1):
        parts.append(block.float())
        line, moved = to_line(block), to_line(parts[-1].double())
        limit = _HARMLESS * ((upper - lower) / 1.349 + (line - centre).abs())
        harmless &= ((line == moved) | ((line - moved).abs() <= limit)).flatten(0, 1).all(0)
    harmless |= few.isnan().any(0)  # a datum without draws
    harmless = harmless.flatten(1).all(1) if local and harmless.dim() > 1 else harmless if local else harmless.all()
    rounded = torch.cat(parts, 1)
    if harmless.all():
        return rounded
    return torch.where(harmless.reshape(-1, *[1] * (values.dim() - 3)), rounded.double(), values)


def _is_harmless(values: Tensor) -> bool:
    """Whether rounding is harmless even for the largest number of every entry; the quick answer for most variables."""
    few = values[:, :: max(1, values.shape[1] // _FEW_DRAWS)].flatten(0, 1).sort(0).values
    spread = (few[3 * len(few) // 4] - few[len(few) // 4]) / 1.349
    largest = torch.maximum(values.amax((0, 1)), -values.amin((0, 1)))
    return bool((_ROUNDING * largest <= 0.5 * _HARMLESS * spread).all())


def _as_it_is(values: Tensor) -> Tensor:
    return values
