"""A program, its guide and the data that they are of: bound and checked once, for all that is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pyro.nn import PyroModule

from calibrant.binding import bind, bind_fixed
from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.guides.contract import check_guide
from calibrant.program.contract import Program, as_program
from calibrant.program.environment import defaults, seeded
from calibrant.program.latents import sites
from calibrant.program.losses import refuse_training_losses
from calibrant.program.refusals import check_program, refuse_outside, supports_are_fixed
from calibrant.program.tracing import trace

_LOOKED_AT = 16  # data, where their values take no part
_FEW = 4  # data that a guide is run on
_ROWS = 4096  # data whose support is looked at together


@dataclass(frozen=True)
class Problem:
    """A program and its guide, with data that both can take.

    `of` makes one and refuses what breaks the contract. What is derived from it is not checked again: only what has
    changed is. `peaks` holds the memory that small runs of program and guide took, which is measured once for all data.
    """

    program: PyroModule
    guide: PyroModule
    data: Data
    peaks: dict[tuple[int, int], int] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        model: Program,
        guide: Program,
        observed: Mapping[str, Any] | Data,
        covariates: Mapping[str, Any] | None = None,
    ) -> Problem:
        """Bind the data, and check program, data and guide.

        Raises:
            ProgramError, DataError: for a model, guide or data that break the contract.
        """
        program, data = checked(model, observed, covariates)
        return cls(program, _checked_guide(program, guide, data), data)

    @classmethod
    def of_kind(
        cls,
        model: Program,
        guide: Program,
        observed: Mapping[str, Any] | Data,
        covariates: Mapping[str, Any] | None = None,
    ) -> Problem:
        """As `of`, where the data only show what a datum looks like: the values of most of them are not looked at, and
        a transform may be random.
        """
        program, data = as_program(model), bind(model, observed, covariates)
        some = data.batch(torch.arange(min(len(data), _LOOKED_AT)))
        check_program(program, *some)
        refuse_training_losses(program, *some)
        return cls(program, _checked_guide(program, guide, data), data)

    def of_some(self, data: Data) -> Problem:
        """The same program and guide with some of the data, or all of them in another order."""
        return replace(self, data=data)

    def of_others(self, data: Data) -> Problem:
        """The same program and guide with data of the same shapes, but other values.

        Raises:
            DataError: for values outside the support of their site.
        """
        check_supports(self.program, data)
        return replace(self, data=data)

    def require_local(self, reason: str, purpose: str) -> None:
        """Refuse a program with shared latents.

        Args:
            reason: why they are not taken, a clause.
            purpose: what can be done once they are fixed, an infinitive.

        Raises:
            InferenceError: naming the latents.
        """
        found = sites(self.program, *self.data.batch(torch.arange(1)))
        if shared := [name for name, site in found.items() if not site.local]:
            raise InferenceError(
                f"latents {shared} are shared: {reason}; fix these latents in the program (for example, at their "
                f"posterior mean in a buffer) {purpose}"
            )

    def with_guide(self, guide: Program) -> Problem:
        """The same program and data with a guide that was made for them."""
        return replace(self, guide=as_program(guide), peaks={})


def checked(
    model: Program, observed: Mapping[str, Any] | Data, covariates: Mapping[str, Any] | None = None
) -> tuple[PyroModule, Data]:
    """The program as a module, and the data as it takes them, where there is no guide.

    Raises:
        ProgramError, DataError: for a model or data that break the contract.
    """
    data, program = bind_fixed(model, observed, covariates), as_program(model)
    check_program(program, *data.tensors())
    refuse_training_losses(program, *data.batch(torch.arange(min(len(data), _FEW))))
    return program, data


def check_supports(program: PyroModule, *parts: Data) -> None:
    """Refuse data outside the support of their site; all of them are looked at, some at a time.

    The program runs for all of them only if the support of a site may depend on covariates: by its contract, it depends
    on no latent and not on the place of a datum, so that without covariates it is that of other rows too.

    Raises:
        DataError: naming the site and the first such datum.
    """
    with torch.no_grad(), seeded(0), defaults(program, {}) as (device, _):
        for data in parts:
            run, rows = None, 0
            for index in torch.arange(len(data), device="cpu").split(_ROWS):
                observed, covariates = data.batch(index, device)
                is_same = rows == len(index) and not covariates
                if run is None or not (is_same or supports_are_fixed(run, observed)):
                    run, rows = trace(program, len(index), covariates), len(index)
                refuse_outside(run, observed, data.labels()[index])


def _checked_guide(program: PyroModule, guide: Program, data: Data) -> PyroModule:
    guided = as_program(guide)
    check_guide(program, guided, *data.batch(torch.arange(min(len(data), _FEW))))
    return guided
