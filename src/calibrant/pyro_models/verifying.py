"""The check that a program has the densities of the ordinary Pyro model that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calibrant.errors import CalibrantError, ProgramError
from calibrant.program.contract import Program
from calibrant.program.environment import defaults
from calibrant.program.tracing import TERM, is_deterministic, messages, trace
from calibrant.pyro_models.arguments import Roles
from calibrant.pyro_models.looking import Seen

_ROUNDING = 1e-3, 1e-4  # of log densities in float32, absolute and relative


def verify(program: Program, values: Mapping[str, Any], roles: Roles, seen: Seen) -> None:
    """Refuse a program that has other densities than its model, at some of the data in another order.

    Two sets of rows are tried: one has the first and the last datum, the other neither. Columns that are sorted have
    their extremes there, and a mean in the middle, so that a model that scales or centres them agrees on one set alone.

    Args:
        program: the program.
        values: the arguments of the run of the model.
        roles: what they are.
        seen: that run.

    Raises:
        ProgramError: naming the site.
    """
    for rows in _rows(seen.size()):
        _verify_rows(program, values, roles, seen, rows)


def _verify_rows(program: Program, values: Mapping[str, Any], roles: Roles, seen: Seen, rows: list[int]) -> None:
    covariates = {n: values[n].movedim(role.dim, 0)[rows] for n, role in roles.items() if role.kind == "covariate"}
    names = seen.with_density()
    held = {names[n]: _of_rows(seen.value(n), seen.is_local(n), rows) for n in seen.sampled()}
    try:
        with defaults(program, {**held, **covariates}):
            run = messages(trace(program, len(rows), covariates, held))
    except CalibrantError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ProgramError(
            f"the model does not run for {len(rows)} of its {seen.size()} data ({type(error).__name__}: {reason}): "
            "whatever has an entry for each datum is an argument of the model, and the number of data is taken from it"
        ) from error
    found = {name for name, site in run.items() if not is_deterministic(site)}
    if changing := set(names.values()) ^ found:
        raise ProgramError(f"the sites {sorted(changing)} are not in every run: a model has the same sites each time")
    for name, new in names.items():
        _compare(new, run[new][TERM], _of_rows(seen.density(name), seen.is_local(name), rows))


def _rows(size: int) -> list[list[int]]:
    return [[size - 1, 0, size // 2] if size > 2 else [size - 1, 0], [size // 3, size // 4]]


def _of_rows(value: Tensor, local: bool, rows: list[int]) -> Tensor:
    return value[rows] if local else value


def _compare(name: str, found: Tensor, wanted: Tensor) -> None:
    wanted = wanted.to(found)
    if found.shape != wanted.shape or not torch.allclose(
        found, wanted, atol=_ROUNDING[0], rtol=_ROUNDING[1], equal_nan=True
    ):
        raise ProgramError(
            f"site {name!r} has other densities for some of the data than in a run of the whole model: the density of "
            "a datum depends on that datum and the shared latents alone, and whatever has an entry for each datum is "
            "an argument of the model"
        )
