"""The checks of the contract of `calibrant.program`: every refusal names the site and the remedy."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from calibrant.errors import DataError, ProgramError, warn
from calibrant.program.contract import (
    PLATE,
    Program,
    Values,
    as_program,
    check_arguments,
    check_not_arguments,
    check_values,
)
from calibrant.program.copied_data import covariate_with_data
from calibrant.program.environment import cast, defaults, in_double, seeded
from calibrant.program.gradients import check_gradients
from calibrant.program.idioms import (
    Statements,
    check_plates,
    plate_error,
    shapes_error,
    support_error,
    taking_size,
)
from calibrant.program.independence import DATA_COMPARED, IN_DOUBLE, check_independence
from calibrant.program.latents import few
from calibrant.program.losses import refuse_scales_from_data
from calibrant.program.modules import buffers_kept, check_modules
from calibrant.program.running import TOTALS_THAT_DIFFER, in_full_precision, running
from calibrant.program.supports import (
    anywhere,
    base_support,
    bounds,
    has_fixed_total,
    innermost,
    inside,
    is_made_from_angles,
    undressed,
)
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
from calibrant.program.weighting import is_masked_at_all, kept, refuse_moving_masks, refuse_weighted_latent

_SIZES = (3, 5, 1, 3)  # numbers of data in the runs that are compared; 3 comes twice
_MASKS_COMPARED = 24  # runs whose masks are compared: a mask that is False in one draw of five is found but for .5%
_RESERVED = (PLATE, "chain", "draw")  # names of dimensions in results
_ROWS = 4096  # data whose support is checked in one run


def check_program(model: Program, observed: Values, covariates: Values | None = None) -> PyroModule:
    """Refuse a program that breaks the contract, and return the model as a `PyroModule`.

    Besides the plates and batch dimensions that the docstring of `calibrant.program` describes, the contract says:

    - A program is a function, a module, or a method of one, with any handlers of Pyro around it (`poutine.reparam`,
      `config_enumerate`). Sites that `poutine.reparam` computes from others are recorded.
    - Covariates are keyword tensors with leading dimension data; observations are no arguments.
    - Weights are `nn.Parameter`s that exist after `__init__`, all float32 or all float64; constants are buffers.
      `PyroSample` weights are read before the plate.
    - The density and the recorded values of a datum depend on that datum and the shared latents alone; sites outside
      the plate do not depend on the data.
    - The support of a site does not depend on other latents, and no value of a site is changed in place.
    - `pyro.deterministic` is recorded, never conditioned. `pyro.factor` and improper priors are allowed where nothing
      is simulated.
    - Masks and scales stand around observations alone, never around latents. A mask says which entries are missing; a
      scale makes a weighted likelihood, which is allowed where nothing is simulated.
    - A covariate that holds the observed data, as in autoregression, is allowed where nothing is simulated; a warning
      says so.
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
    _warn_of_copies(observed, covariates)
    return program


def _warn_of_copies(observed: Values, covariates: Values) -> None:
    if found := covariate_with_data(observed, covariates):
        warn(
            f"the covariate {found[0]!r} holds the data of {found[1]!r}: simulated data would keep these data, so that "
            "calibration and predictive checks are left out",
        )


def _refuse(program: PyroModule, observed: Values, covariates: Values) -> None:
    """All checks of `check_program` except those of `check_values`."""
    check_arguments(program, covariates)
    check_not_arguments(program, observed, covariates)
    check_modules(program)
    rows, cols = few(observed, DATA_COMPARED), few(covariates, DATA_COMPARED)
    with seeded(0):
        run = _check_sites(program, observed, covariates)
        double = in_double(program)
        check_independence(program, double, rows, cols)
        _check_masks(program, [name for name in observed if is_masked_at_all(sampled(run)[name])], rows, cols)
        with defaults(program, {**rows, **cols}, torch.float64) as place:
            refuse_scales_from_data(double, observed, cast(rows, *place), cast(cols, *place))
        check_gradients(program, double, rows, cols)


def _check_sites(program: PyroModule, observed: Values, covariates: Values) -> Trace:
    """The checks of plates, shapes, supports and observations; returns a run of the program."""
    with torch.no_grad(), buffers_kept(program), pyro.validation_enabled(True):
        with defaults(program, {**observed, **covariates}) as place:
            runs = _runs(program, cast(few(covariates, max(_SIZES)), *place))
            for name, site in sampled(runs[0]).items():
                _check_kind(name, site, observed)
            for run, size in zip(runs, _SIZES, strict=True):
                for name, site in messages(run).items():
                    check_site(name, site, size)
            for name, site in sampled(runs[0]).items():
                if name not in observed:
                    refuse_weighted_latent(name, site)
            _check_labels(runs[0])
            _check_same_sites(runs)
            _check_supports(runs[0], runs[-1], observed)
            _check_observed(runs[0], observed)
            for index in torch.arange(len(next(iter(observed.values()))), device="cpu").split(_ROWS):
                parts = ({n: v[index.to(v.device)] for n, v in part.items()} for part in (observed, covariates))
                rows, cols = (cast(part, *place) for part in parts)
                check_support(program, rows, cols, labels=index.tolist())
        _check_declared_supports(program, few(observed, DATA_COMPARED), few(covariates, DATA_COMPARED))
    return runs[0]


def _runs(program: PyroModule, covariates: Values) -> list[Trace]:
    weights = {name for name, _ in program.named_parameters()}
    runs: list[Trace] = []
    for size in _SIZES:
        start = running(f"the program does not run for {size} data"), taking_size(program, covariates)
        with start[0], start[1], Statements(program), nullcontext() if runs else in_full_precision():
            runs.append(trace(program, size, {name: value[:size] for name, value in covariates.items()}))
    if new := {name for name, _ in program.named_parameters()} - weights:
        raise ProgramError(f"parameters {sorted(new)} appeared when the program ran: create them in __init__")
    return runs


def _check_kind(name: str, site: Mapping[str, Any], observed: Values) -> None:
    if "/" in name or name in _RESERVED:
        raise ProgramError(f"a site is called {name!r}, a name that results can't contain: rename the site")
    if isinstance(innermost(site["fn"]), dist.Delta):
        raise ProgramError(f"site {name!r} is a point mass: record it with pyro.deterministic({name!r}, ...)")
    if is_made_from_angles(site["fn"]):
        raise ProgramError(f"site {name!r} transforms angles: sample the angle, and transform its value in the program")
    if name in observed and not is_local(site):
        raise plate_error(name, site)


def _check_labels(run: Trace) -> None:
    """Refuse a site called like an entry of another site, since results name entries `z[0]`, `z[1]`, and so on."""
    found = sampled(run)
    shapes = {name: site["value"].shape[1 if is_local(site) else 0 :] for name, site in found.items()}
    for name in found:
        other, bracket, position = name.rpartition("[")
        index = position.removesuffix("]").split(",")
        if bracket and len(shapes.get(other, ())) == len(index) and all(one.isdecimal() for one in index):
            raise ProgramError(
                f"site {name!r} has the name that results give to an entry of site {other!r}: rename one of them"
            )


def check_site(name: str, site: Mapping[str, Any], size: int) -> None:
    """Refuse minibatches, plates beside the data, and batch dimensions beyond the data."""
    check_plates(name, site)
    for frame in site["cond_indep_stack"]:
        if frame.full_size not in (None, frame.size) or (frame.name == PLATE and frame.size != size):
            raise ProgramError(
                f"the plate {frame.name!r} of site {name!r} has size {frame.size} of {frame.full_size} in a run of "
                f'{size} data: write pyro.plate("{PLATE}", size); minibatches are taken by the library, never by '
                "subsample_size"
            )
        if frame.name == PLATE and frame.dim != -1:
            raise ProgramError(
                f"the plate {PLATE!r} of site {name!r} has dim {frame.dim}, wanted -1: write "
                f'`with pyro.plate("{PLATE}", size):`'
            )
    if is_local(site) and not is_deterministic(site) and tuple(site["fn"].batch_shape) != (size,):
        raise batch_error(name, site, size)


def _check_same_sites(runs: list[Trace]) -> None:
    names = [messages(run).keys() for run in runs]
    if changing := {name for found in names for name in found if not all(name in other for other in names)}:
        raise ProgramError(
            f"sites {sorted(changing)} are not in every run: a program samples the same sites each time, and all data "
            f'at one site, in `with pyro.plate("{PLATE}", size):`'
        )
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
                raise shapes_error(name, site, shapes, _SIZES)


def _check_supports(first: Trace, again: Trace, observed: Values) -> None:
    """Refuse supports that depend on other latents: a fixed transform to the real line would not cover them."""
    for name, site in sampled(first).items():
        found = [bounds(s["fn"].support) for s in (site, sampled(again)[name])]
        if any(not torch.equal(a, b) for a, b in zip(*found, strict=True)):
            raise support_error(name, site, name in observed)


def _check_declared_supports(program: PyroModule, observed: Values, covariates: Values) -> None:
    """Refuse latents without density in parts of their declared support, where inference would move them.

    A transformed distribution declares the range of its last transform: for a shifted exponential, the whole line.
    """
    size, double = len(next(iter(observed.values()))), in_double(program)
    with defaults(program, {**observed, **covariates}, torch.float64) as place, running(IN_DOUBLE):
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
            raise ProgramError(
                f"site {name!r} is deterministic: it is recorded, never conditioned; give the site from which it is "
                "computed, and name no observed site in the config of poutine.reparam"
            )
        if name not in found:
            raise ProgramError(_unknown_site(name, observed, found))
        wanted = tuple(found[name]["value"].shape[1:])
        if tuple(value.shape[1:]) != wanted:
            shape = tuple(value.shape[1:])
            raise DataError(
                f"{name!r} has shape {shape} per datum, the program samples {wanted}{_in_shape(shape, wanted)}"
            )


def _unknown_site(name: str, observed: Values, found: Mapping[str, Any]) -> str:
    """What is wrong with data under a name that no site has, and how they get the name of a site."""
    told = f"the program never samples {name!r}; its sites are {sorted(found)}"
    for site, node in found.items():
        if tuple(node["value"].shape[1:]) == (len(observed),) and all(value.dim() == 1 for value in observed.values()):
            return f"{told}: if your {len(observed)} columns are the entries of {site!r}, give {{{site!r}: frame}}"
    near = get_close_matches(name, found, n=1)
    if near and observed[name].shape[1:] == found[near[0]]["value"].shape[1:]:
        return f"{told}: did you mean {near[0]!r}? Give the data under that name"
    return (
        f"{told}: give its observed sites alone, as data.select(NAMES) does, or rename it, "
        f"calibrant.data.as_data(data).select({{'SITE': {name!r}}})"
    )


def _in_shape(found: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """How values of one shape get the other, where that can be told."""
    if len(found) == 3 and found != wanted == (found[2], *found[:2]):
        return ": its channels are last, so give torch.as_tensor(x).permute(0, 3, 1, 2)"
    if prod(found) == prod(wanted):
        return f": if only the shape differs, give x.reshape({', '.join(map(str, (-1, *wanted)))})"
    return ""


def _check_masks(program: PyroModule, masked: list[str], observed: Values, covariates: Values) -> None:
    """Refuse masks of observations that change with latents."""
    if not masked:
        return
    with torch.no_grad(), buffers_kept(program), defaults(program, {**observed, **covariates}) as place:
        rows, cols = cast(observed, *place), cast(covariates, *place)
        run, *others = (trace(program, DATA_COMPARED, cols, rows) for _ in range(_MASKS_COMPARED))
    for again in others:
        refuse_moving_masks(run, again, masked)


def check_support(program: Program, observed: Values, covariates: Values, labels: Sequence[Any] | None = None) -> None:
    """Refuse observations outside the support of their site, where a density is meaningless.

    Args:
        program: the program.
        observed: site → tensor, leading dimension data.
        covariates: keyword → tensor, leading dimension data.
        labels: names of the data in errors; their indices if None.

    Raises:
        DataError: naming the site and the first datum outside its support, or with another total of counts than the
            program draws. A support with an attribute `remedy` says there what to do with the data.
    """
    size = len(next(iter(observed.values())))
    refuse_outside(trace(program, size, covariates), observed, range(size) if labels is None else labels)


def supports_are_fixed(run: Trace, names: Collection[str]) -> bool:
    """Whether the supports of these sites are those of their distributions' classes, whatever the parameters are."""
    plain = [undressed(sampled(run)[name]["fn"]) for name in names]
    supports = [inspect.getattr_static(type(fn), "support", None) for fn in plain]
    known = all(isinstance(one, constraints.Constraint) and not constraints.is_dependent(one) for one in supports)
    return known and not any(has_fixed_total(fn) for fn in plain)


def refuse_outside(run: Trace, observed: Values, labels: Sequence[Any]) -> None:
    """As `check_support`, for a run of the program with these data, or with others if the supports are fixed."""
    for name, value in observed.items():
        site = sampled(run)[name]
        if has_fixed_total(site["fn"]):
            _check_totals(name, site, value, labels)
        allowed = inside(site["fn"], value).reshape(len(value), -1).all(1)
        if not allowed.all():
            support = base_support(site["fn"].support)
            usual = "transform the data"
            if support is constraints.boolean:
                usual += f" to 0 and 1, such as {name} > 0.5, or values='binarised' for images"
            remedy = getattr(support, "remedy", usual)
            raise DataError(
                f"{name!r} is outside the support of its {type(innermost(site['fn'])).__name__} likelihood, "
                f"{support}, at datum {labels[int(allowed.int().argmin())]}: {remedy}, or choose a "
                "likelihood that takes such values (masked entries hold any value inside the support)"
            )


def _check_totals(name: str, site: Mapping[str, Any], value: Tensor, labels: Sequence[Any]) -> None:
    """Refuse counts that do not add up to the total that the program draws: torch takes all smaller totals too."""
    drawn, found = site["value"].sum(-1), value.to(site["value"]).sum(-1)
    wrong = ((drawn != found) & kept(site).any(-1)).reshape(len(value), -1)
    if wrong.any():
        row, column = (int(index) for index in wrong.nonzero()[0])
        raise DataError(
            f"{name!r} adds up to {float(found.reshape(wrong.shape)[row, column]):g} at datum {labels[row]}, where the "
            f"program draws {float(drawn.reshape(wrong.shape)[row, column]):g} counts: {TOTALS_THAT_DIFFER}"
        )
