"""The check that a datum's density depends on nothing but that datum and the shared latents."""

from __future__ import annotations

from typing import Any

import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor

from calibrant.errors import ProgramError
from calibrant.program.contract import Program, Values
from calibrant.program.density import density_of
from calibrant.program.environment import cast, defaults, seeded
from calibrant.program.running import running
from calibrant.program.tracing import deterministic, is_local, messages, sampled, trace

DATA_COMPARED = 8
IN_DOUBLE = "the program does not run in float64 (hold its tensors as parameters and buffers)"


def check_independence(module: PyroModule, program: Program, observed: Values, covariates: Values) -> None:
    """Refuse a program whose densities depend on other data or on chance, that changes values in place, or that uses
    weights which are not its parameters.

    Args:
        module: the model or guide, for its parameters.
        program: the same model or guide as a function of (size, **covariates) that runs in float64 on weights without
            gradients.
        observed: site → tensor with `DATA_COMPARED` rows.
        covariates: keyword → tensor with `DATA_COMPARED` rows.

    Raises:
        ProgramError: naming the site, and the change of the data that reveals the dependency.
    """
    base = list(range(DATA_COMPARED))
    changes = {
        "running it again": base,
        "permuting the data": base[::-1],
        "doubling the data": base + base,
        "changing other data": [2 * (index // 2) for index in base],
        "taking one datum alone": [2],
    }
    with torch.enable_grad(), seeded(1), defaults(module, {**observed, **covariates}, torch.float64) as place:
        observed, covariates = cast(observed, *place), cast(covariates, *place)
        with running(IN_DOUBLE):
            with _Copies() as copies:
                start = trace(program, len(base), covariates, observed)
            values = cast({name: copies.values[name] for name in sampled(start)}, *place)
            local = {name for name, site in messages(start).items() if is_local(site)}
            known = _terms(program, values, covariates, local, base)
            found = {what: _terms(program, values, covariates, local, index) for what, index in changes.items()}
    if any(term.requires_grad for term in known.values()):
        raise ProgramError(
            "it uses weights that are no parameters of the module: hold them, and the modules they belong to, as "
            "attributes of a PyroModule (several in an nn.ModuleList or nn.ParameterList)"
        )
    for what, index in changes.items():
        for name, term in found[what].items():
            wanted = known[name][index] if name in local else known[name]
            if not torch.allclose(term, wanted, rtol=1e-6, atol=1e-6, equal_nan=True):
                raise ProgramError(
                    f"site {name!r} changes on {what}: a datum's density, and what is recorded for it, may depend on "
                    "that datum and the shared latents alone; a site outside the plate does not depend on the data"
                )


class _Copies(Messenger):
    """Copies every value before the program can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.values[msg["name"]] = msg["value"].clone()


def _terms(
    program: Program, values: Values, covariates: Values, local: set[str], index: list[int]
) -> dict[str, Tensor]:
    """Log densities and values of deterministic sites for the data at `index`."""
    held = {name: value[index] if name in local else value for name, value in values.items()}
    given = {name: value.clone() for name, value in held.items()}
    run = trace(program, len(index), {name: value[index] for name, value in covariates.items()}, given)
    if changed := [name for name, value in held.items() if not torch.equal(messages(run)[name]["value"], value)]:
        raise ProgramError(f"the program changes the value of site {changed[0]!r} in place: let it work on a clone")
    recorded = {name: site["value"] for name, site in deterministic(run).items()}
    return {**density_of(run, len(index), held), **recorded}
