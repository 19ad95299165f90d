"""The checks of the contract of `calibrant.program`: every refusal names the site and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import nn

from calibrant.errors import DataError, ProgramError
from calibrant.program.contract import PLATE, Program, Values, as_program, check_arguments, check_values
from calibrant.program.environment import cast, defaults, in_double, seeded
from calibrant.program.independence import DATA_COMPARED, IN_DOUBLE, check_independence
from calibrant.program.latents import few
from calibrant.program.modules import buffers_kept, check_modules, dotted
from calibrant.program.running import running
from calibrant.program.supports import anywhere, bounds, innermost, inside, is_made_from_angles
from calibrant.program.tracing import (
    TERM,
    batch_error,
    deterministic,
    is_deterministic,
    is_factor,
    is_local,
    messages,
    sampled,
    trace,
)

_SIZES = (3, 5, 1, 3)  # numbers of data in the runs that are compared; 3 comes twice
_RESERVED = (PLATE, "chain", "draw")  # names of dimensions in results
_ROWS = 4096  # data whose support is checked in one run


def check_program(model: Program, observed: Values, covariates: Values | None = None) -> PyroModule:
    """Refuse a program that breaks the contract, and return the model as a `PyroModule`.

    Besides the plates and batch dimensions that the docstring of `calibrant.program` describes, the contract says:

    - Covariates are keyword tensors with leading dimension data.
    - Weights are `nn.Parameter`s that exist after `__init__`; constants are buffers. `PyroSample` weights are read
      before the plate.
    - The density and the recorded values of a datum depend on that datum and the shared latents alone; sites outside
      the plate do not depend on the data.
    - The support of a site does not depend on other latents, and no value of a site is changed in place.
    - `pyro.deterministic` is recorded, never conditioned. `pyro.factor` and improper priors are allowed where nothing
      is simulated.
    - A program contains no device or dtype code: `defaults` sets both for the call. Integer observations are cast
      before the density is computed, except where the site itself draws integers (classes).

    Args:
        model: the program; neither it nor its buffers are changed.
        observed: site → tensor, leading dimension data. All values are compared with the supports of the sites.
        covariates: keyword → tensor, leading dimension data.

    Raises:
        ProgramError: for a program that breaks the contract.
        DataError: for observations or covariates that the program cannot take.
    """
    program, covariates = as_program(model), covariates or {}
    check_values(observed, covariates)
    _refuse(program, observed, covariates)
    return program


def _refuse(program: PyroModule, observed: Values, covariates: Values) -> None:
    """All checks of `check_program` except those of `check_values`."""
    check_arguments(program, covariates)
    check_modules(program)
    with torch.no_grad(), seeded(0), buffers_kept(program), pyro.validation_enabled(True):
        with defaults(program, {**observed, **covariates}) as place:
            runs = _runs(program, cast(few(covariates, max(_SIZES)), *place))
            for name, site in sampled(runs[0]).items():
                _check_kind(name, site, observed)
            for name, site in messages(runs[0]).items():
                check_site(name, site, _SIZES[0])
            _check_same_sites(runs)
            _check_weights(program, runs[0])
            _check_supports(runs[0], runs[-1])
            _check_observed(runs[0], observed)
            for index in torch.arange(len(next(iter(observed.values()))), device="cpu").split(_ROWS):
                parts = ({n: v[index.to(v.device)] for n, v in part.items()} for part in (observed, covariates))
                rows, cols = (cast(part, *place) for part in parts)
                check_support(program, rows, cols, labels=index.tolist())
        _check_declared_supports(program, few(observed, DATA_COMPARED), few(covariates, DATA_COMPARED))
    check_independence(program, in_double(program), few(observed, DATA_COMPARED), few(covariates, DATA_COMPARED))


def _runs(program: PyroModule, covariates: Values) -> list[Trace]:
    weights = {name for name, _ in program.named_parameters()}
    runs = []
    for size in _SIZES:
        with running(program, f"the program does not run for {size} data"):
            runs.append(trace(program, size, {name: value[:size] for name, value in covariates.items()}))
    if new := {name for name, _ in program.named_parameters()} - weights:
        raise ProgramError(f"parameters {sorted(new)} appeared when the program ran: create them in __init__")
    return runs


def _check_kind(name: str, site: Mapping[str, Any], observed: Values) -> None:
    if site["is_observed"]:
        raise ProgramError(
            f"site {name!r} has obs= inside the program: leave it out and give observed={{{name!r}: ...}}"
        )
    if "/" in name or name in _RESERVED:
        raise ProgramError(f"a site is called {name!r}, a name that results can't contain: rename the site")
    if isinstance(innermost(site["fn"]), dist.Delta):
        raise ProgramError(f"site {name!r} is a point mass: record it with pyro.deterministic({name!r}, ...)")
    if is_made_from_angles(site["fn"]):
        raise ProgramError(f"site {name!r} transforms angles: sample the angle, and transform its value in the program")
    if name in observed and not is_local(site):
        plates = [frame.name for frame in site["cond_indep_stack"]]
        where = f"the plate {plates[0]!r}" if plates else "no plate"
        raise ProgramError(f'observed site {name!r} lies in {where}: put it in pyro.plate("{PLATE}", size)')


def check_site(name: str, site: Mapping[str, Any], size: int) -> None:
    """Refuse minibatches, a data plate that is not the last dimension, and batch dimensions beyond the data."""
    for frame in site["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size) or (frame.name == PLATE and frame.size != size):
            raise ProgramError(
                f"the plate {frame.name!r} of site {name!r} has size {frame.size} of {frame.full_size} in a run of "
                f'{size} data: write pyro.plate("{PLATE}", size); minibatches are taken by the library, never by '
                "subsample_size"
            )
        if frame.name == PLATE and frame.dim != -1:
            raise ProgramError(
                f"the plate {PLATE!r} of site {name!r} has dim {frame.dim}, wanted -1: write `with pyro.plate(...)`, "
                "as the innermost plate"
            )
    if is_local(site) and not is_deterministic(site) and tuple(site["fn"].batch_shape) != (size,):
        raise batch_error(name, site, size)


def _check_same_sites(runs: list[Trace]) -> None:
    names = [messages(run).keys() for run in runs]
    if changing := {name for found in names for name in found if not all(name in other for other in names)}:
        raise ProgramError(f"sites {sorted(changing)} are not in every run: a program samples the same sites each time")
    for name, site in messages(runs[0]).items():
        shapes = [tuple(messages(run)[name]["value"].shape) for run in runs]
        if not is_local(site) and len(set(shapes)) > 1:
            raise ProgramError(
                f"site {name!r} has a data-sized shape outside the data plate, {shapes[0]} for {_SIZES[0]} data and "
                f'{shapes[1]} for {_SIZES[1]}: put it inside pyro.plate("{PLATE}", size)'
            )
        if is_local(site) and not is_factor(site):
            events = {shape[1:] if shape[:1] == (size,) else None for shape, size in zip(shapes, _SIZES, strict=True)}
            if len(events) > 1 or None in events:
                raise ProgramError(
                    f"site {name!r} has the shapes {shapes} for {_SIZES} data: in the plate {PLATE!r}, the leading "
                    "dimension is the data and all other dimensions stay the same"
                )


def _check_weights(program: nn.Module, run: Trace) -> None:
    """Refuse a `PyroSample` that is first read inside the plate, since it would be drawn once per datum."""
    for path, module in program.named_modules():
        for name in getattr(module, "_pyro_samples", ()):
            site = sampled(run).get(dotted(path, name))
            if site is not None and is_local(site):
                raise ProgramError(
                    f"the PyroSample {dotted(path, name)!r} is read inside the plate {PLATE!r}, which draws one for "
                    "every datum: read it once before the plate"
                )


def _check_supports(first: Trace, again: Trace) -> None:
    """Refuse supports that depend on other latents: a fixed transform to the real line would not cover them."""
    for name, site in sampled(first).items():
        found = [bounds(s["fn"].support) for s in (site, sampled(again)[name])]
        if any(not torch.equal(a, b) for a, b in zip(*found, strict=True)):
            raise ProgramError(
                f"the support of site {name!r} changes with other latents: sample it on a fixed support and "
                "transform it"
            )


def _check_declared_supports(program: PyroModule, observed: Values, covariates: Values) -> None:
    """Refuse latents without density in parts of their declared support, where inference would move them.

    A transformed distribution declares the range of its last transform: for a shifted exponential, the whole line.
    """
    size, double = len(next(iter(observed.values()))), in_double(program)
    with defaults(program, {**observed, **covariates}, torch.float64) as place, running(program, IN_DOUBLE):
        rows, cols = cast(observed, *place), cast(covariates, *place)
        for name, site in sampled(trace(double, size, cols, rows)).items():
            value = None if name in observed else anywhere(site["fn"])
            if value is not None and not _has_density(double, size, cols, {**rows, name: value}, name):
                raise ProgramError(
                    f"site {name!r} has no density at some values of its declared support {site['fn'].support}: sample "
                    "the base distribution, and transform the value in the program"
                )


def _has_density(program: Program, size: int, covariates: Values, values: Values, name: str) -> bool:
    try:
        return bool(messages(trace(program, size, covariates, values))[name][TERM].isfinite().all())
    except DataError:
        return False


def _check_observed(run: Trace, observed: Values) -> None:
    found = sampled(run)
    for name, value in observed.items():
        if name in deterministic(run):
            raise ProgramError(f"site {name!r} is deterministic: it is recorded, never conditioned")
        if name not in found:
            raise ProgramError(f"the program never samples {name!r}; its sites are {sorted(found)}")
        wanted = tuple(found[name]["value"].shape[1:])
        if tuple(value.shape[1:]) != wanted:
            raise DataError(f"{name!r} has shape {tuple(value.shape[1:])} per datum, the program samples {wanted}")


def check_support(program: Program, observed: Values, covariates: Values, labels: Sequence[Any] | None = None) -> None:
    """Refuse observations outside the support of their site, where a density is meaningless.

    Args:
        program: the program.
        observed: site → tensor, leading dimension data.
        covariates: keyword → tensor, leading dimension data.
        labels: names of the data in errors; their indices if None.

    Raises:
        DataError: naming the site and the first datum outside its support.
    """
    size = len(next(iter(observed.values())))
    run = trace(program, size, covariates)
    for name, value in observed.items():
        fn = messages(run)[name]["fn"]
        allowed = inside(fn, value).reshape(size, -1).all(1)
        if not allowed.all():
            row = int(allowed.logical_not().nonzero()[0])
            raise DataError(
                f"{name!r} is outside the support of its {type(innermost(fn)).__name__} likelihood, {fn.support}, at "
                f"datum {row if labels is None else labels[row]}: transform the data, or choose a likelihood that "
                "takes such values (masked entries hold any value inside the support)"
            )
