"""Whether a user's function is a log density that can be sampled, found by calling it at a few points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calibrant.errors import InferenceError, warn
from calibrant.inference.references.plain import PlainTarget
from calibrant.inference.references.random_numbers import normal
from calibrant.program.contract import Values

_ROWS = range(6, 32, 2)  # even numbers of rows, of which one is taken that is no size of a parameter or datum
_ASIDE = 0.1  # distance on the line from a start at which a function is tried
_SAME = 1e-8  # relative difference of two values that should be equal: matrix products round by the shape of the batch
_STEP = 1e-4  # distance on the line between two points from which a slope is computed
_SLOPE = 0.05  # relative difference between a slope and the gradient that is told
_BLOCK = 16_384  # rows in one evaluation
_FLOAT32 = (
    "parameters and data are float64, and so must everything be that log_density computes with: module.double(), "
    "tensor.double()"
)
_TORCH = (
    "compute with torch from the first operation to the last, without numpy, .item(), .detach() and torch.no_grad()"
)


def check_density(target: PlainTarget, starts: Tensor, batched: bool) -> None:
    """Call a density near some starts, and refuse it if it is none, or warn if its gradient does not fit.

    Args:
        target: the density.
        starts: vectors `(posterior, chain, width)`.
        batched: whether the user's function takes many rows, or one point (and is run by vmap).

    Raises:
        InferenceError: for what is no function, or a function that fails, returns another shape or dtype than `(rows,)`
            and float64, cannot be differentiated, gives another value in a second call, or whose rows depend on each
            other.
    """
    function: Any = target.function
    if not callable(function):
        raise InferenceError("log_density is no function: give a function of tensors that returns the log density")
    index, q = _points(target, starts)
    value, slope = _value_and_slope(target, q, index, batched)
    again = _value(target, q, index)
    if not _equal(value, again):
        raise InferenceError(
            "log_density returns other values for the same points when it is called again: it must not draw random "
            "numbers (put modules with dropout into eval()) or change what it computes with"
        )
    _require_rows_apart(target, q, index, value)
    _warn_of_slopes(target, q, index, slope)


def require_finite_start(target: PlainTarget, starts: Tensor) -> None:
    """Refuse starts `(posterior, chain, width)` none of which has a finite density.

    Raises:
        InferenceError: with what the density is there.
    """
    flat = starts.flatten(0, 1)
    index = torch.arange(len(starts)).repeat_interleave(starts.shape[1])
    found = [_value(target, q, i) for q, i in zip(flat.split(_BLOCK), index.split(_BLOCK), strict=True)]
    value = torch.cat(found)
    if not value.isfinite().any():
        kinds = {"nan": value.isnan(), "-inf": value == -torch.inf, "inf": value == torch.inf}
        counts = ", ".join(f"{name} at {int(kind.sum())}" for name, kind in kinds.items() if kind.any())
        raise InferenceError(
            f"log_density is finite at none of the {len(value)} starts ({counts}): start where the density is positive"
        )


def _points(target: PlainTarget, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Posteriors `(rows,)` and vectors `(rows, width)` near starts, all different."""
    sizes = {size for shape in target.parameters.shapes.values() for size in shape}
    sizes |= {size for value in target.observed.values() for size in value.shape[1:]}
    rows = next((count for count in _ROWS if count not in sizes), _ROWS[-1])
    turns = torch.arange(rows)
    index = turns * len(starts) // rows if len(starts) > rows else turns % len(starts)
    aside = _ASIDE * normal(turns + 1, target.width)
    return index, starts[index, turns % starts.shape[1]] + aside


def _value(target: PlainTarget, q: Tensor, index: Tensor) -> Tensor:
    with torch.no_grad():
        return target.log_density(q, q.new_zeros(len(q), 0), *target.rows(index))


def _value_and_slope(target: PlainTarget, q: Tensor, index: Tensor, batched: bool) -> tuple[Tensor, Tensor]:
    q = q.clone().requires_grad_()
    values, log_det = target.placed(q)
    observed = target.rows(index)[1]
    called = _call(target, values, observed, batched)
    try:
        value = target.called(values, observed)
    except Exception as error:  # a user's function may raise anything
        raise InferenceError(_failure(called, error, target, batched)) from error
    _require_form(value, len(q), called, batched)
    if not value.requires_grad:
        raise InferenceError(f"{called} cannot be differentiated with respect to the parameters: {_TORCH}")
    try:
        (slope,) = torch.autograd.grad((value + log_det).sum(), q)
    except RuntimeError as error:
        raise InferenceError(f"{called} cannot be differentiated: {_first_line(error)}") from error
    return (value + log_det).detach(), slope


def _call(target: PlainTarget, values: Values, observed: Values, batched: bool) -> str:
    """The call of a user's function, with the shapes of what it takes."""

    def shown(given: Values, named: bool) -> str:
        shapes = {name: tuple(part.shape if batched else part.shape[1:]) for name, part in given.items()}
        text = ", ".join(f"{name!r}: {shape}" if named else f"{name}: {shape}" for name, shape in shapes.items())
        return f"{{{text}}}" if named else text

    parts = [shown(values, target.parameters.named), shown(observed, target.named)]
    return f"log_density({', '.join(parts if observed else parts[:1])})"


def _failure(called: str, error: Exception, target: PlainTarget, batched: bool) -> str:
    text = _first_line(error)
    if "dtype" in text or "scalar type" in text:
        return f"{called} failed: {text}; {_FLOAT32}"
    if isinstance(error, TypeError) and "positional argument" in text:
        taken = "parameters and data" if target.observed else "the parameters alone, since there is no data="
        return f"{called} failed: {text}; it is called with {taken}"
    if "numpy()" in text:
        return f"{called} failed: {text}; {_TORCH}"
    if target.parameters.named and ("dict" in text or isinstance(error, KeyError)):
        return f"{called} failed: {text}; as start is a mapping, it takes a dict with the same names"
    if batched:
        return (
            f"{called} failed: {text}; it is called with any number of rows, the first dimension of all that it takes "
            "(a function of one point is given with batched=False)"
        )
    return (
        f"{called} failed: {text}; it is called by torch.func.vmap, which cannot run control flow that depends on "
        "values (use torch.where), .item(), or writing into the entries of a tensor"
    )


def _require_form(value: object, rows: int, called: str, batched: bool) -> None:
    if not isinstance(value, Tensor):
        form = f"({rows},)" if batched else "()"
        what = type(value).__name__
        raise InferenceError(f"{called} returns {what}, not a tensor: return a tensor of shape {form}; {_TORCH}")
    wanted: tuple[int, ...] = (rows,) if batched else ()
    shape = tuple(value.shape if batched else value.shape[1:])
    if shape != wanted:
        remedy = "sum over the entries of a row, not over rows: .sum(-1)"
        if batched and shape == ():
            remedy += "; or, for a function of one point, give batched=False"
        elif not batched:
            remedy = "sum over all entries of the point; for a function that takes many points, leave out batched=False"
        raise InferenceError(f"{called} returns the shape {shape}, and should return {wanted}: {remedy}")
    if value.dtype != torch.float64:
        raise InferenceError(f"{called} returns {str(value.dtype).removeprefix('torch.')}: {_FLOAT32}")


def _require_rows_apart(target: PlainTarget, q: Tensor, index: Tensor, value: Tensor) -> None:
    """Refuse a density whose rows depend on other rows, or on their own place."""
    half = len(q) // 2
    order = torch.arange(len(q)).roll(1)
    try:
        apart = _equal(_value(target, q[:half], index[:half]), value[:half])
        apart = apart and _equal(_value(target, q[order], index[order]), value[order])
    except Exception as error:  # a user's function may raise anything
        raise InferenceError(
            f"log_density takes {len(q)} rows, but not {half}: {_first_line(error)}; it is called with any number of "
            "rows, so that values that differ between posteriors are given as data="
        ) from error
    if not apart:
        raise InferenceError(
            "the value of log_density in one row depends on other rows, or on the place of the row: compute every row "
            "from its own parameters and data alone (no mean, sum or normalisation over the first dimension), and give "
            "values that differ between posteriors as data="
        )


def _warn_of_slopes(target: PlainTarget, q: Tensor, index: Tensor, slope: Tensor) -> None:
    """Warn if gradients do not fit differences of values.

    Chains with another gradient draw from the same distribution, but turn inefficient.
    """
    along = normal(torch.arange(len(q)) + 100, target.width)
    along = along / along.norm(dim=1, keepdim=True)
    wide, near = (
        (_value(target, q + step * along, index) - _value(target, q - step * along, index)) / (2 * step)
        for step in (2 * _STEP, _STEP)
    )
    told = (slope * along).sum(1)
    smooth = (wide - near).abs() <= 0.1 * _SLOPE * near.abs()  # neither a kink nor the edge of a support between
    wrong = smooth & ~((told - near).abs() <= _SLOPE * near.abs())
    if smooth.any() and 2 * int(wrong.sum()) > int(smooth.sum()):
        row = int(wrong.int().argmax())
        warn(
            f"the gradient of log_density does not fit its values: along a line it is {float(told[row]):.4g}, and "
            f"differences of values give {float(near[row]):.4g}. The draws stay right, but chains move badly; look for "
            ".detach(), float32, or an autograd function of your own",
            RuntimeWarning,
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=_SAME, atol=_SAME, equal_nan=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().rstrip(":").splitlines()[0]
