"""The check that the density has a gradient wherever it moves with a continuous latent.

Python control flow on a latent (`while`, `if`, `.item()`) and comparisons give a density that moves in steps, with a
gradient of zero: a guide would be trained to a wrong answer without a warning. Only latents whose gradient is zero at
draws from the prior are looked at further. They are moved to other draws, and where the density moves too, the step is
narrowed down by bisection. Kinks, dead units and saturated functions are not refused, since the search ends in a place
where their gradient is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions.transforms import Transform

from calibrant.errors import ProgramError
from calibrant.program.contract import Program, Values
from calibrant.program.density import LogDensity, density_of
from calibrant.program.environment import cast, defaults
from calibrant.program.running import running
from calibrant.program.supports import from_line
from calibrant.program.tracing import TERM, Hold, is_deterministic, is_factor, is_local, sampled, site_log_prob, trace

_MOVES = 8  # draws to which a latent without a gradient is moved
_HALVINGS = 40
_EVALUATIONS = 400  # of the density, in the search for gradients of one latent; it is not refused after these
_NOISE = 1e-6  # relative change of a log density that may be rounding
_TRIES, _STEPS = 3, (1e-4, 1e-5)  # draws at which a gradient has to be wrong; steps of finite differences
_AGREE, _ROUNDING = 1e-3, 1e-13  # relative errors of finite differences, and of a log density
_FURTHEST = 30.0  # of unconstrained values
_FAILURE = "the density of the program has no gradient"


def check_gradients(module: PyroModule, program: Program, observed: Values, covariates: Values) -> None:
    """Refuse a program whose density has a wrong gradient by a continuous latent, or none where it moves.

    It draws from torch's global random state.

    Args:
        module: the model, for its parameters.
        program: the same model as a function of (size, **covariates) that runs in float64 on weights without gradients.
        observed: site → tensor, leading dimension data; a few data.
        covariates: keyword → tensor, leading dimension data.

    Raises:
        ProgramError: naming the latent.
    """
    quiet = pyro.validation_enabled(False)  # moving one latent may put another outside its support: −∞ is valid
    with torch.enable_grad(), quiet, defaults(module, {**observed, **covariates}, torch.float64) as place:
        rows, cols = cast(observed, *place), cast(covariates, *place)
        with running(_FAILURE):
            search = _Search.start(program, rows, cols)
            for name, flat in search.without_gradient().items():
                if search.is_stuck(name, flat):
                    raise _error(name, "the density moves with latent {}, but its gradient does not")
            for name in search.points:
                if search.is_contradicted(name):
                    raise _error(name, "the gradient of the density by latent {} is not the slope of the density")


def _error(name: str, fault: str) -> ProgramError:
    return ProgramError(
        f"{fault.format(repr(name))}, so that nothing right can be learned about {name!r}: compute with tensors, "
        "without Python control flow, .item(), .detach(), rounding or comparisons of its value, or make a choice "
        "between branches a discrete latent"
    )


class _OthersAlone(Hold):
    """Fixes all sites; the term of a site depends on the values of other sites alone, not on its own."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_factor(msg) or (msg["name"] in self.values and not is_deterministic(msg)):
            own = msg if is_factor(msg) else {**msg, "value": msg["value"].detach()}
            msg[TERM] = site_log_prob(msg["name"], own, self.size or 0)


@dataclass(frozen=True)
class _Search:
    """A program at a draw from its prior: `fixed` are values, and `points` unconstrained values of latents."""

    program: Program
    covariates: Values
    size: int
    fixed: Values
    points: Values
    transforms: Mapping[str, Transform]
    local: frozenset[str]

    @classmethod
    def start(cls, program: Program, observed: Values, covariates: Values) -> _Search:
        size = len(next(iter(observed.values())))
        run = sampled(trace(program, size, covariates, observed))
        transforms = {}
        for name, site in run.items():
            if name not in observed and not site["fn"].support.is_discrete:
                try:
                    transforms[name] = from_line(site["fn"].support)
                except NotImplementedError:  # points of a sphere, for example
                    continue
        fixed = {name: site["value"].detach() for name, site in run.items() if name not in transforms}
        points = {name: _unconstrained(transform, run[name]["value"]) for name, transform in transforms.items()}
        local = frozenset(name for name, site in run.items() if is_local(site))
        return cls(program, covariates, size, fixed, points, transforms, local)

    def other_points(self, name: str) -> Tensor:
        """Unconstrained values of one latent at another draw from the prior."""
        run = sampled(trace(self.program, self.size, self.covariates, self.fixed))
        return _unconstrained(self.transforms[name], run[name]["value"])

    def density(self, points: Values) -> LogDensity:
        values = {**self.fixed, **{name: self.transforms[name](point) for name, point in points.items()}}
        with _OthersAlone(values, self.size), poutine.trace() as tracer:
            self.program(self.size, **self.covariates)
        return density_of(tracer.get_trace(), self.size, values)

    def without_gradient(self) -> dict[str, Tensor]:
        """The latents with entries, True in a tensor of the shape of an event, whose gradient is zero for all data."""
        points = {name: point.requires_grad_() for name, point in self.points.items()}
        if not points:
            return {}
        total = self.density(points).joint.sum()
        found = {}
        for (name, point), gradient in zip(points.items(), _gradients(total, list(points.values())), strict=True):
            flat = gradient == 0
            flat = flat.all(0) if name in self.local else flat
            if flat.any() and point.numel():
                found[name] = flat
        return found

    def is_stuck(self, name: str, flat: Tensor) -> bool:
        """Whether the density moves with entries of a latent whose gradient is zero wherever it is looked for."""
        budget = _EVALUATIONS
        for _ in range(_MOVES):
            there = self.other_points(name)
            while flat.any():
                stuck, alive, used = self._bisect(name, flat, there)
                budget -= used
                if budget < 0:
                    return False
                if stuck:
                    return True
                if not alive.any():
                    break
                flat = flat & ~alive
        return False

    def is_contradicted(self, name: str) -> bool:
        """Whether the derivative along a random direction is not what two finite differences say, at several draws."""
        return all(self._is_contradicted_at_another_draw(name) for _ in range(_TRIES))

    def _is_contradicted_at_another_draw(self, name: str) -> bool:
        points = {other: self.other_points(other) for other in self.points}
        there = replace(self, points=points)
        point = points[name].detach()
        direction = torch.randn_like(point)
        start, slope = there.slope(name, point, direction)
        steps = [(there.total(name, point + h * direction), there.total(name, point - h * direction)) for h in _STEPS]
        wide, narrow = ((up - down) / (2 * h) for (up, down), h in zip(steps, _STEPS, strict=True))
        noise = _ROUNDING * start.abs() / _STEPS[1]
        size = torch.maximum(wide.abs(), narrow.abs())
        if not torch.stack([wide, narrow, slope]).isfinite().all() or (wide - narrow).abs() > _AGREE * size + noise:
            return False  # a kink, or rounding
        return bool((narrow - slope).abs() > 3 * _AGREE * torch.maximum(size, slope.abs()) + noise)

    def slope(self, name: str, point: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        """The log density of all other sites at a point, and its derivative along a direction."""
        point = point.requires_grad_()
        total = self.total(name, point)
        (gradient,) = _gradients(total, [point])
        return total.detach(), (gradient * direction).sum()

    def total(self, name: str, point: Tensor) -> Tensor:
        """The log density of all other sites, over all data."""
        density = self.density({**self.points, name: point}).without([name])
        return density.local.sum() + density.shared

    def _bisect(self, name: str, flat: Tensor, there: Tensor) -> tuple[bool, Tensor, int]:
        """Narrow down where the density moves with the entries `flat` on the way to other values.

        Returns:
            Whether it moves with a gradient of zero; the entries whose gradient was found; the number of evaluations.
        """
        low = self.points[name].detach()
        high = torch.where(flat, there, low)
        (at_low, _), (at_high, alive) = (self._others(name, point) for point in (low, high))
        moved = (at_high - at_low).abs() > _NOISE * (1 + at_low.abs())  # False for values that are not finite
        if not moved.any():
            return False, torch.zeros_like(flat), 2
        for step in range(_HALVINGS):
            if (alive & flat).any():
                return False, alive & flat, step + 2
            middle = (low + high) / 2
            at_middle, alive = self._others(name, middle)
            left = (at_middle - at_low).abs() >= (at_high - at_middle).abs()
            at_low, at_high = torch.where(left, at_low, at_middle), torch.where(left, at_middle, at_high)
            left = left.reshape([*left.shape, *[1] * (low.dim() - left.dim())])
            low, high = torch.where(left, low, middle), torch.where(left, middle, high)
        return True, torch.zeros_like(flat), _HALVINGS + 2

    def _others(self, name: str, point: Tensor) -> tuple[Tensor, Tensor]:
        """The log density of all other sites, for each datum if the latent is local, and where it has a gradient."""
        point = point.detach().requires_grad_()
        density = self.density({**self.points, name: point}).without([name])
        value = density.local if name in self.local else density.local.sum() + density.shared
        (gradient,) = _gradients(value.sum(), [point])
        alive = gradient != 0
        return value.detach(), alive.any(0) if name in self.local else alive


def _unconstrained(transform: Transform, value: Tensor) -> Tensor:
    raw = transform.inv(value.detach())
    return torch.nan_to_num(raw, 0.0, _FURTHEST, -_FURTHEST)


def _gradients(total: Tensor, points: list[Tensor]) -> list[Tensor]:
    """The gradients with respect to the points; zero where the total does not depend on them."""
    if not total.requires_grad:
        return [torch.zeros_like(point) for point in points]
    found = torch.autograd.grad(total, points, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(points, found, strict=True)]
