"""An ordinary Pyro model as a program: `from_pyro`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.data.dataset import Data
from calibrant.errors import CalibrantError, DataError, ProgramError
from calibrant.program.contract import Program, Values, as_program
from calibrant.program.environment import seeded
from calibrant.pyro_models.arguments import Roles, bound, guesses
from calibrant.pyro_models.handlers import AsProgram, Sites, plates_sized
from calibrant.pyro_models.looking import (
    Seen,
    first_look,
    look,
    observed_arguments,
    refuse_both,
    refuse_missing,
    with_plates_of_the_same_data,
)
from calibrant.pyro_models.parameters import OutsideModules, Parameters, modules_outside
from calibrant.pyro_models.verifying import verify

_BUFFER = "argument_"  # before the name of an argument whose tensor is a buffer
_NOT_REGISTERED = ".*was not registered in the param store"  # pyro.module, where weights need no gradient


class PyroProgram(PyroModule):
    """A program that runs an ordinary Pyro model, `program(size, **covariates)`; `from_pyro` makes it.

    Attributes:
        sites: what is known about the sites of the model.
        roles: argument of the model → what it is.
    """

    def __init__(self, model: Program, seen: Seen) -> None:
        super().__init__()
        self.inner = nn.ModuleList([as_program(model)])  # a PyroModule would rename the sites of one of its own
        self.outside = OutsideModules(modules_outside(model, seen.recorder.weights))
        self.parameters_used = Parameters(seen.recorder.found)
        self.sites: Sites = seen.sites
        self.roles: Roles = {}
        self._constants: dict[str, Any] = {}
        self.held = nn.Module()

    def take(self, values: Mapping[str, Any], roles: Roles, sites: Sites) -> None:
        """Let arguments and sites of the model be these, with the constants of one call."""
        self.roles, self.sites = roles, sites
        self.held, self._constants = nn.Module(), {}
        for name, role in roles.items():
            value = values[name]
            if role.kind == "observed":
                self.held.register_buffer(_BUFFER + name, value.detach().narrow(role.dim, 0, 1).clone(), False)
            elif role.kind == "constant" and isinstance(value, Tensor):
                self.held.register_buffer(_BUFFER + name, value.detach().clone())
            elif role.kind == "constant":
                self._constants[name] = value
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in ("size", *self.covariates)])

    @property
    def plate(self) -> str:
        """The plate of the model that holds the data."""
        return self.sites.plate

    @property
    def observed(self) -> tuple[str, ...]:
        """The sites with obs=, which inference is given by name."""
        return tuple(sorted(self.sites.name(name) for name in self.sites.observed))

    @property
    def covariates(self) -> tuple[str, ...]:
        """The arguments of the model that are covariates."""
        return tuple(name for name, role in self.roles.items() if role.kind == "covariate")

    def extra_repr(self) -> str:
        return f"plate={self.plate!r}, observed={self.observed}, covariates={self.covariates}"

    def forward(self, size: int, **covariates: Tensor) -> Any:
        arguments = {name: self._argument(name, size, covariates) for name in self.roles}
        sized, shown = plates_sized(self.sites.sizes(size)), AsProgram(self.sites, size, self.parameters_used.value)
        with warnings.catch_warnings(), sized, shown:
            warnings.filterwarnings("ignore", _NOT_REGISTERED)
            return self.outside.run(partial(self.inner[0], **arguments))

    def _argument(self, name: str, size: int, covariates: Values) -> Any:
        role = self.roles[name]
        if role.kind == "covariate":
            return covariates[name].movedim(0, role.dim)
        if role.kind == "size":
            return size
        if name in self._constants:
            return self._constants[name]
        value: Tensor = getattr(self.held, _BUFFER + name)
        return value if role.kind == "constant" else value.repeat_interleave(size, role.dim)

    def data(self, *args: Any, **kwargs: Any) -> Data:
        """The data of a call of the model: what its sites observe, and the arguments that are covariates.

        Args:
            args: what the model is called with, as in `svi.step(x, y)`.
            kwargs: the same, by name.

        Returns:
            `Data` whose observations are named by sites, and covariates by arguments, all with the data first. Missing
            entries, which are masked, have one of the other values.

        Raises:
            DataError: for arguments that the model does not take or whose lengths differ, or without observations.
            ProgramError: for missing observations that no mask excludes, and for an argument that is observed and on
                which a distribution or a mask depends too.
        """
        values = bound(self.inner[0], args, kwargs)
        kinds = ("covariate", "observed")
        of_data = [n for n, role in self.roles.items() if role.kind in kinds and isinstance(values[n], Tensor)]
        rows = {name: values[name].movedim(self.roles[name].dim, 0) for name in of_data}
        sizes = {name: len(row) for name, row in rows.items()}
        if len(set(sizes.values())) > 1:
            raise DataError(f"the arguments have different numbers of data: {sizes}")
        with torch.no_grad(), seeded(0):
            seen = look(self.inner[0], values, self.sites, next(iter(sizes.values()), None))
            refuse_missing(seen)
            observed = [n for n in of_data if self.roles[n].kind == "observed"]
            refuse_both(self.inner[0], values, seen, frozenset(observed))
        return Data(seen.observations(), {name: rows[name].detach() for name in self.covariates})


def from_pyro(
    model: Program,
    *args: Any,
    plate: str | None = None,
    covariates: Collection[str] | Mapping[str, Tensor] | None = None,
    **kwargs: Any,
) -> PyroProgram:
    """An ordinary Pyro model, with obs= and plates of any name, as a program.

    The model is run a few times with the arguments that are given here, to see which of its plates holds the data, and
    which arguments. It is neither copied nor changed. Then the program is compared with Pyro's own densities, site by
    site, on some of the data in another order.

    - A site that has obs= is observed by its name: `observed={site: tensor}`. `program.data(x, y)` returns data for
      the arguments of a call.
    - Tensors with an entry for each datum are covariates, by the name of the argument, with the data first. Tensors
      that are observed are no covariates. All other arguments are constants.
    - The plate of the data may have any name and dimension. Its other batch dimensions become event, in their order.
    - Minibatches are taken by the library: `subsample_size` and `subsample` are ignored.
    - `pyro.param` becomes an `nn.Parameter` of the program, with its constraint and its present value. Modules that
      the model uses are part of the program, with `pyro.module` or without.
    - Missing entries (obs_mask=) are summed out; without a mask they are refused.

    >>> import torch, pyro, pyro.distributions as dist
    >>> import calibrant as cal
    >>> def model(x, y=None):
    ...     w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     with pyro.plate("rows", len(x), subsample_size=2):
    ...         pyro.sample("obs", dist.Bernoulli(logits=x @ w), obs=y)
    >>> x, y = torch.randn(5, 2), torch.ones(5)
    >>> program = cal.from_pyro(model, x, y)
    >>> program.plate, program.observed, program.covariates
    ('rows', ('obs',), ('x',))
    >>> program.data(x, y).keys()
    ('obs', 'x')

    Args:
        model: a function, a module, or a method of one, with any handlers of Pyro around it.
        args: what the model is called with, as in `svi.step(x, y)`.
        plate: name of the plate whose entries are the data, if the observed sites lie in several.
        covariates: the arguments that are covariates, if their sizes do not tell, or a dict of these arguments.
        kwargs: further arguments of the model, by name.

    Raises:
        ProgramError: for a model that is no program, naming the site or argument and what to write instead.
        DataError: for arguments that the model does not take.
    """
    if isinstance(covariates, Mapping):
        kwargs, covariates = {**kwargs, **covariates}, list(covariates)
    values = bound(model, args, kwargs)
    with torch.no_grad(), seeded(0):
        seen = first_look(model, values, plate)
        observed = observed_arguments(model, values, seen)
        refuse_both(model, values, seen, observed)
        refuse_missing(seen)
        program = PyroProgram(model, seen)
        errors: list[CalibrantError] = []
        for run in with_plates_of_the_same_data(seen):
            for roles in guesses(values, observed, run.size(), covariates):
                program.take(values, roles, run.sites)
                try:
                    verify(program, values, roles, run)
                except (ProgramError, DataError) as error:
                    errors.append(error)
                else:
                    return program
    raise errors[0]
