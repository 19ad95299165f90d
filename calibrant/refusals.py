"""What breaks the contract of `calibrant.program`, refused by name and with the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from calibrant.errors import CalibrantError, DataError, ProgramError
from calibrant.program import (
    PLATE,
    TERM,
    Program,
    Values,
    arguments,
    batch_error,
    cast,
    defaults,
    density_of,
    deterministic,
    few,
    in_double,
    is_deterministic,
    is_factor,
    is_local,
    messages,
    sampled,
    seeded,
    trace,
    unwrapped,
)

_SIZES = (3, 5, 1, 3)  # of the runs that are compared; 3 comes twice
_RESERVED = (PLATE, "chain", "draw")  # dimensions of results
DATA_COMPARED = 8
_ROWS = 4096  # data whose support is looked at together
_IN_DOUBLE = "the program does not run in float64 (hold its tensors as parameters and buffers)"
_SHAPE_MISMATCH = re.compile(r"inside plate\('(.*)'\) at site (.*) dim (-\d+), (\d+) vs (\d+)")


def refuse(program: PyroModule, observed: Values, covariates: Values) -> None:
    """All refusals of `check_program` but those of `check_values`."""
    _check_arguments(program, covariates)
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


# -- before it runs ----------------------------------------------------------------------------------------------------


def _check_arguments(program: PyroModule, covariates: Values) -> None:
    given = arguments(program)
    if not given:
        raise ProgramError("a program takes the number of data as its first argument: def forward(self, size, ...)")
    if any(p.kind is p.VAR_KEYWORD for p in given):
        raise ProgramError(f"the program takes **{given[-1].name}: name each covariate, def forward(self, size, label)")
    names = {p.name for p in given[1:]}
    if missing := {p.name for p in given[1:] if p.default is p.empty} - set(covariates):
        raise DataError(f"the program takes the covariates {sorted(missing)}, which were not given: covariates={{...}}")
    if unknown := set(covariates) - names:
        raise DataError(f"the program takes no covariates {sorted(unknown)}; its own are {sorted(names)}")


def check_modules(program: nn.Module) -> None:
    """Refuse tensors that are no buffers, weights without a shape, and layers whose output depends on chance or on
    other data."""
    for path, module in program.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                raise ProgramError(
                    f"attribute {_join(path, name)!r} is a tensor but no buffer, so it would stay behind on another "
                    f'device or dtype: self.register_buffer("{name}", tensor)'
                )
    if lazy := [name for name, weight in program.named_parameters() if is_lazy(weight)]:
        raise ProgramError(f"parameters {lazy} have no shape yet: give it in __init__, without lazy modules")
    if random := [name for name, module in program.named_modules() if _is_random(module)]:
        raise ProgramError(
            f"{random} are in training mode, where data share statistics or drop out: call .eval() first"
        )
    if batch := [name for name, module in program.named_modules() if _is_batch_norm(module)]:
        raise ProgramError(f"{batch} use batch statistics in eval() too: let them track running statistics")


def _is_random(module: nn.Module) -> bool:
    dropout = isinstance(module, _DropoutNd) and module.p > 0
    return module.training and (dropout or isinstance(module, _BatchNorm))


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.running_mean is None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@contextmanager
def buffers_kept(program: nn.Module) -> Iterator[None]:
    """Some modules count their calls in training mode."""
    before = {name: buffer.clone() for name, buffer in program.named_buffers()}
    try:
        yield
    finally:
        for name, buffer in program.named_buffers():
            if name in before:
                buffer.copy_(before[name])


# -- while it runs -----------------------------------------------------------------------------------------------------


@contextmanager
def running(program: PyroModule, failure: str) -> Iterator[None]:
    """Turns what goes wrong in a run of the program into a `ProgramError`, and refuses parameters of Pyro's store."""
    state = program._pyro_context.param_state
    try:
        yield
    except CalibrantError:
        raise
    except Exception as error:
        if state["params"]:
            raise _param_error(state["params"]) from error
        if found := _SHAPE_MISMATCH.search(str(error)):
            raise _mismatch_error(*found.groups()) from error
        reason = str(error).partition("\n")[0]
        if "Multiple sample sites" in reason:
            reason += f'; a plate that is entered twice is built once, plate = pyro.plate("{PLATE}", size)'
        raise ProgramError(f"{failure}: {type(error).__name__}: {reason}") from error
    else:
        if state["params"]:
            raise _param_error(state["params"])
    finally:
        state.update({"params": {}, "constraints": {}})


def _param_error(names: Iterable[str]) -> ProgramError:
    return ProgramError(
        f"pyro.param or pyro.module is called for {sorted(names)}: make each an nn.Parameter, PyroParam or "
        "submodule in __init__, and use it as an attribute"
    )


def _mismatch_error(plate: str, site: str, dim: str, size: str, found: str) -> ProgramError:
    return ProgramError(
        f"site {site!r} has {found} entries in batch dimension {dim} where the plate {plate!r} has {size}: the "
        "dimensions beyond the data belong to the event, so end its distribution with .to_event(their number)"
    )


# -- what it samples ---------------------------------------------------------------------------------------------------


def _check_kind(name: str, site: Mapping[str, Any], observed: Values) -> None:
    if site["is_observed"]:
        raise ProgramError(
            f"site {name!r} has obs= inside the program: leave it out and give observed={{{name!r}: ...}}"
        )
    if "/" in name or name in _RESERVED:
        raise ProgramError(f"a site is called {name!r}, which results can't be called: rename it")
    if isinstance(unwrapped(site["fn"]), dist.Delta):
        raise ProgramError(f"site {name!r} is a point mass: record it with pyro.deterministic({name!r}, ...)")
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
                    "dimension is the data and the others stay the same"
                )


def _check_weights(program: nn.Module, run: Trace) -> None:
    """A `PyroSample` that is first read in the plate would be a weight for every datum."""
    for path, module in program.named_modules():
        for name in getattr(module, "_pyro_samples", ()):
            site = sampled(run).get(_join(path, name))
            if site is not None and is_local(site):
                raise ProgramError(
                    f"the PyroSample {_join(path, name)!r} is read inside the plate {PLATE!r}, which draws one for "
                    "every datum: read it once before the plate"
                )


def _check_supports(first: Trace, again: Trace) -> None:
    """A support that moves with another latent would be cut short by any fixed transform to the real line."""
    for name, site in sampled(first).items():
        bounds = [_bounds(s["fn"].support) for s in (site, sampled(again)[name])]
        if any(not torch.equal(a, b) for a, b in zip(*bounds, strict=True)):
            raise ProgramError(
                f"the support of site {name!r} changes with other latents: sample it on a fixed support and "
                "transform it"
            )


def _check_declared_supports(program: PyroModule, observed: Values, covariates: Values) -> None:
    """Inference moves a latent all over the support that its distribution declares, so that must be the true one.

    A transformed distribution declares what its last transform can reach: a shifted exponential, the whole line.
    """
    size, double = len(next(iter(observed.values()))), in_double(program)
    with defaults(program, {**observed, **covariates}, torch.float64) as place, running(program, _IN_DOUBLE):
        rows, cols = cast(observed, *place), cast(covariates, *place)
        for name, site in sampled(trace(double, size, cols, rows)).items():
            value = None if name in observed else _anywhere(site["fn"])
            if value is not None and not _has_density(double, size, cols, {**rows, name: value}, name):
                raise ProgramError(
                    f"site {name!r} has no density at some values of its declared support {site['fn'].support}: sample "
                    "the base distribution, and transform the value in the program"
                )


def _anywhere(fn: Any) -> Tensor | None:
    """A value at U(−2, 2) in unconstrained space; None for a support without one."""
    try:
        transform = biject_to(fn.support)
    except NotImplementedError:
        return None
    return transform(torch.empty(transform.inverse_shape(fn.shape())).uniform_(-2.0, 2.0))


def _has_density(program: Program, size: int, covariates: Values, values: Values, name: str) -> bool:
    try:
        return bool(messages(trace(program, size, covariates, values))[name][TERM].isfinite().all())
    except DataError:
        return False


def _bounds(support: Any) -> list[Tensor]:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return [torch.as_tensor(v) for k, v in vars(support).items() if k in ("lower_bound", "upper_bound")]


# -- the observations --------------------------------------------------------------------------------------------------


def _check_observed(run: Trace, observed: Values) -> None:
    found = sampled(run)
    for name, value in observed.items():
        if name in deterministic(run):
            raise ProgramError(f"site {name!r} is deterministic: it is recorded, never conditioned")
        if name not in found:
            raise ProgramError(f"the program never samples {name!r}; its sites are {sorted(found)}")
        wanted = tuple(found[name]["value"].shape[1:])
        if tuple(value.shape[1:]) != wanted:
            raise DataError(f"{name!r} has shape {tuple(value.shape[1:])} a datum, the program samples {wanted}")


def check_support(program: Program, observed: Values, covariates: Values, labels: Sequence[Any] | None = None) -> None:
    """Refuse observations outside the support of their site, where a density would be a number without a meaning.

    Args:
        program: the program.
        observed: site → tensor, leading dimension data.
        covariates: keyword → tensor, leading dimension data.
        labels: what to call each datum; its index where left out.

    Raises:
        DataError: naming the site and the first such datum.
    """
    size = len(next(iter(observed.values())))
    run = trace(program, size, covariates)
    for name, value in observed.items():
        fn = messages(run)[name]["fn"]
        allowed = inside(fn, value).reshape(size, -1).all(1)
        if not allowed.all():
            row = int(allowed.logical_not().nonzero()[0])
            raise DataError(
                f"{name!r} is outside the support of its {type(unwrapped(fn)).__name__} likelihood, {fn.support}, at "
                f"datum {row if labels is None else labels[row]}: transform the data, or choose a likelihood that "
                "takes such values (masked entries hold any value inside the support)"
            )


def inside(fn: Any, value: Tensor) -> Tensor:
    """Whether a value lies in the support of a distribution, entry by entry of what the support checks."""
    try:
        return fn.support.check(value if value.is_floating_point() else value.double())
    except NotImplementedError:  # a support that torch can't tell
        return torch.ones(value.shape[:1], dtype=torch.bool, device=value.device)


# -- independence ------------------------------------------------------------------------------------------------------


def check_independence(module: PyroModule, program: Program, observed: Values, covariates: Values) -> None:
    """Refuse what depends on data that it does not belong to, on chance, on changed values or on weights elsewhere.

    Args:
        module: the model or guide, for its parameters.
        program: it as a function of (size, **covariates) that runs in float64 without its weights' gradients.
        observed: site → `DATA_COMPARED` data.
        covariates: keyword → `DATA_COMPARED` data.
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
        with running(module, _IN_DOUBLE):
            with _Copies() as copies:
                start = trace(program, len(base), covariates, observed)
            values = cast({name: copies.values[name] for name in sampled(start)}, *place)
            local = {name for name, site in messages(start).items() if is_local(site)}
            known = _terms(program, values, covariates, local, base)
            found = {what: _terms(program, values, covariates, local, index) for what, index in changes.items()}
    if any(term.requires_grad for term in known.values()):
        raise ProgramError(
            "weights that are no parameters of the module take part: hold them, and the modules they belong to, as "
            "attributes of a PyroModule (several in an nn.ModuleList or nn.ParameterList)"
        )
    for what, index in changes.items():
        for name, term in found[what].items():
            wanted = known[name][index] if name in local else known[name]
            if not torch.allclose(term, wanted, rtol=1e-6, atol=1e-6, equal_nan=True):
                raise ProgramError(
                    f"site {name!r} changes on {what}: a datum's density, and what is recorded for it, depend on that "
                    "datum and the shared latents alone; what lies outside the plate does not depend on the data"
                )


class _Copies(Messenger):
    """Keeps a copy of every value before the program can change it."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        self.values[msg["name"]] = msg["value"].clone()


def _terms(
    program: Program, values: Values, covariates: Values, local: set[str], index: list[int]
) -> dict[str, Tensor]:
    """Log densities, and the values of deterministic sites, of some of the data."""
    held = {name: value[index] if name in local else value for name, value in values.items()}
    given = {name: value.clone() for name, value in held.items()}
    run = trace(program, len(index), {name: value[index] for name, value in covariates.items()}, given)
    if changed := [name for name, value in held.items() if not torch.equal(messages(run)[name]["value"], value)]:
        raise ProgramError(f"the program changes the value of site {changed[0]!r} in place: let it work on a clone")
    recorded = {name: site["value"] for name, site in deterministic(run).items()}
    return {**density_of(run, len(index), held), **recorded}
