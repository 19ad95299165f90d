"""The contract of a model: what a generative Pyro program promises, and what follows from it.

A model is a `PyroModule` (or a plain function) called as `model(size, **covariates)`. It never sees observations.

>>> import torch, pyro, pyro.distributions as dist
>>> import calibrant as cal
>>> def factor(size):
...     with pyro.plate("data", size):
...         z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
...         pyro.sample("x", dist.Normal(z.sum(-1), 0.5))

**Local** sites live in `pyro.plate("data", size)`, the batch dimension −1; everything else of a site is event. Their
log density has one entry a datum:

>>> values = {"z": torch.zeros(3, 2), "x": torch.zeros(3)}
>>> density = cal.program.log_density(factor, values, observed=["x"])
>>> {name: tuple(term.shape) for name, term in density.items()}
{'z': (3,), 'x': (3,)}
>>> bool(torch.equal(density.joint, density.latent + density.observed))
True

**Shared** sites live outside that plate, in plates of their own if they like; their log density is one number:

>>> def hierarchical(size):
...     centre = pyro.sample("centre", dist.Normal(0.0, 10.0))
...     with pyro.plate("data", size):
...         z = pyro.sample("z", dist.Normal(centre, 1.0))
...         pyro.sample("x", dist.Normal(z, 0.5))
>>> {site.name: "local" if site.local else "shared" for site in cal.program.sites(hierarchical, {"x": torch.zeros(3)}).values()}
{'centre': 'shared', 'z': 'local'}

**Dependencies** are read from the program, and confirmed by changing one latent at a time, since in-place writes
hide them from Pyro:

>>> def hidden(size):
...     with pyro.plate("data", size):
...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
...         mean = torch.zeros(size, 2)
...         mean[:, 0] = z
...         w = pyro.sample("w", dist.Normal(mean, 1.0).to_event(1))
...         pyro.sample("x", dist.Normal(w.sum(-1), 1.0))
>>> cal.program.sites(hidden, {"x": torch.zeros(3)})["w"].parents
('z',)

What breaks the contract is refused by name, with the remedy:

>>> def unfinished(size):
...     with pyro.plate("data", size):
...         pyro.sample("x", dist.Normal(torch.zeros(size, 2), 1.0))
>>> cal.program.check_program(unfinished, {"x": torch.zeros(3, 2)})
Traceback (most recent call last):
    ...
calibrant.errors.ProgramError: site 'x' has batch shape (3, 2), wanted (3,): the dimensions beyond the data belong to \
the event, so end its distribution with .to_event(1)

The rest of the contract: covariates are keyword tensors with leading dimension data; weights are `nn.Parameter`s that
exist after `__init__`, constants are buffers; `pyro.deterministic` is recorded and never conditioned; `pyro.factor` is
allowed where nothing is simulated; a datum's density does not depend on other data; there is no device or dtype code
in a program (`defaults` sets both for the call); improper priors are allowed, without prior simulation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.func import functional_call

from calibrant.errors import DataError, ProgramError

PLATE = "data"
Values = Mapping[str, Tensor]
Program = Callable[..., Any]


class _Function(PyroModule):
    """A plain function, or an `nn.Module` that is no `PyroModule`, as a module."""

    def __init__(self, function: Program) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def as_program(model: Program) -> PyroModule:
    """The model (or guide) as a `PyroModule`; a plain function is wrapped in one.

    Raises:
        ProgramError: for what can't be called, or a PyroModule that was built before `import calibrant`.
    """
    if not isinstance(model, PyroModule):
        if not callable(model):
            raise ProgramError(f"a model is a PyroModule or a function of size, not {type(model).__name__}")
        return _Function(model)
    if not hasattr(model._pyro_context, "param_state"):
        raise ProgramError(
            f"{type(model).__name__} was built before `import calibrant`, which makes Pyro keep parameters in their "
            "module: import calibrant first, then build the model"
        )
    return model


def in_double(module: Program) -> Program:
    """The model or guide as a function that runs in float64 on cast copies of its weights and buffers.

    The module itself is never changed; gradients do not reach its weights.
    """
    program = as_program(module)
    tensors = {name: _double(tensor.detach()) for name, tensor in _state(program)}
    return lambda *args, **kwargs: functional_call(program, tensors, args, kwargs)


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def defaults(model: Program, values: Values, dtype: torch.dtype | None = None) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Default device and dtype for a call: from the model's parameters, else from the values; restored afterwards."""
    tensors = [t for _, t in _state(model)] if isinstance(model, nn.Module) else []
    tensors = [t for t in (*tensors, *values.values()) if t.is_floating_point()] or list(values.values())
    device = tensors[0].device if tensors else torch.get_default_device()
    found = tensors[0].dtype if tensors and tensors[0].is_floating_point() else torch.get_default_dtype()
    before_device, before_dtype = torch.get_default_device(), torch.get_default_dtype()
    torch.set_default_dtype(dtype or found)
    try:
        if device.type != before_device.type:
            torch.set_default_device(device)
        yield device, dtype or found
    finally:
        torch.set_default_dtype(before_dtype)
        if device.type != before_device.type:
            torch.set_default_device(before_device)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Draws inside follow `seed` and leave the random state outside untouched; None draws from the global state."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


# -- running a program -------------------------------------------------------------------------------------------------


class _StartImproper(Messenger):
    """Gives sites with an improper prior a value, U(−2, 2) in unconstrained space, so that the program runs."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None and is_improper(msg["fn"]):
            fn = msg["fn"]
            raw = torch.empty(biject_to(fn.support).inverse_shape(fn.shape())).uniform_(-2.0, 2.0)
            msg["value"] = biject_to(fn.support)(raw)
            msg["done"] = True


def is_improper(fn: Any) -> bool:
    """Whether a distribution is an `ImproperUniform`, under any wrapping."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.ImproperUniform)


def trace(program: Program, size: int, covariates: Values | None = None, values: Values | None = None) -> Trace:
    """One run of the program with the given sites held at their values; the other sites are drawn."""
    with _StartImproper():
        held = poutine.condition(program, data=dict(values or {}))
        return poutine.trace(held).get_trace(size, **(covariates or {}))


def sampled(run: Trace) -> dict[str, dict[str, Any]]:
    """The sample sites of a trace, without plates, deterministic sites and factors."""
    return {n: s for n, s in _sample_messages(run) if not _is_deterministic(s) and not _is_factor(s)}


def deterministic(run: Trace) -> dict[str, dict[str, Any]]:
    """The `pyro.deterministic` sites of a trace."""
    return {n: s for n, s in _sample_messages(run) if _is_deterministic(s)}


def is_local(site: Mapping[str, Any]) -> bool:
    """Whether a site lies in the data plate."""
    return any(frame.name == PLATE for frame in site["cond_indep_stack"])


def _sample_messages(run: Trace) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((n, s) for n, s in run.nodes.items() if s["type"] == "sample" and not site_is_subsample(s))


def _is_deterministic(site: Mapping[str, Any]) -> bool:
    return bool(site["infer"].get("_deterministic"))


def _is_factor(site: Mapping[str, Any]) -> bool:
    return isinstance(site["fn"], dist.Unit) or isinstance(getattr(site["fn"], "base_dist", None), dist.Unit)


@dataclass(frozen=True)
class LogDensity(Mapping[str, Tensor]):
    """A log density, site by site: `(size,)` for a local site, `()` for a shared one, in nats.

    `joint`, `latent` and `observed` are sums over sites: `(size,)` where every term is local, else `()`, summed over
    the data as well. `local` and `shared` always keep their shapes. Factors count as observed.
    """

    terms: Mapping[str, Tensor]
    observed_sites: frozenset[str]
    size: int

    def __getitem__(self, name: str) -> Tensor:
        return self.terms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)

    @property
    def joint(self) -> Tensor:
        return self._sum(self.terms.values())

    @property
    def latent(self) -> Tensor:
        return self._sum(t for n, t in self.terms.items() if n not in self.observed_sites)

    @property
    def observed(self) -> Tensor:
        return self._sum(t for n, t in self.terms.items() if n in self.observed_sites)

    @property
    def local(self) -> Tensor:
        """Sum of the local terms, `(size,)`."""
        return sum((t for t in self.terms.values() if t.dim()), torch.zeros(self.size))

    @property
    def shared(self) -> Tensor:
        """Sum of the shared terms, `()`."""
        return sum((t for t in self.terms.values() if not t.dim()), torch.zeros(()))

    def without(self, names: Iterable[str]) -> LogDensity:
        """The density less some sites."""
        left = set(self.terms) - set(names)
        return LogDensity({n: t for n, t in self.terms.items() if n in left}, self.observed_sites, self.size)

    def _sum(self, terms: Iterable[Tensor]) -> Tensor:
        terms = list(terms)
        if any(not term.dim() for term in terms):
            return sum((term.sum() for term in terms), torch.zeros(()))
        return sum(terms, torch.zeros(self.size))


def log_density(
    model: Program,
    values: Values,
    size: int | None = None,
    covariates: Values | None = None,
    *,
    observed: Iterable[str] = (),
) -> LogDensity:
    """The log density of every site of a program at given values.

    Args:
        model: the program.
        values: a tensor for every sample site, local ones with leading dimension `size`.
        size: number of data; read from the local values where left out.
        covariates: keyword tensors of the program, leading dimension `size`.
        observed: which of the sites count as observed.

    Raises:
        ProgramError: for a sample site without a value, or a local site without `to_event`.
    """
    size = _size_of(values, observed) if size is None else size
    return density_of(trace(model, size, covariates, values), size, values, observed)


def _size_of(values: Values, observed: Iterable[str]) -> int:
    names = [name for name in observed if name in values] or list(values)
    sizes = {len(values[name]) for name in names if values[name].dim()}
    if len(sizes) != 1:
        raise ProgramError("the number of data is not plain from the values: give size=")
    return sizes.pop()


def density_of(run: Trace, size: int, values: Values, observed: Iterable[str] = ()) -> LogDensity:
    """The log density of a trace whose sample sites were held at `values`."""
    terms = {}
    for name, site in _sample_messages(run):
        if _is_deterministic(site):
            continue
        if not _is_factor(site) and name not in values:
            raise ProgramError(f"site {name!r} is sampled by the program but has no value")
        terms[name] = _site_log_prob(name, site, size)
    factors = {name for name, site in _sample_messages(run) if _is_factor(site)}
    return LogDensity(terms, frozenset(observed) | factors, size)


def _site_log_prob(name: str, site: Mapping[str, Any], size: int) -> Tensor:
    try:
        term = site["fn"].log_prob(site["value"])
    except ValueError as error:
        raise DataError(
            f"site {name!r}: {type(site['fn']).__name__} can't take this value ({_first_line(error)})"
        ) from error
    term = dist.util.scale_and_mask(term, site["scale"], site["mask"])
    if not is_local(site):
        return term.sum()
    if term.shape != (size,):
        raise ProgramError(_batch_message(name, tuple(term.shape), size))
    return term


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _batch_message(name: str, found: tuple[int, ...], size: int) -> str:
    extra = len(found) - 1
    remedy = (
        "the dimensions beyond the data belong to the event, so end its distribution with "
        f".to_event({extra})"
        if extra > 0
        else f'sample it inside pyro.plate("{PLATE}", size)'
    )
    return f"site {name!r} has batch shape {found}, wanted ({size},): {remedy}"


def sample_prior(
    model: Program, size: int, covariates: Values | None = None, seed: int | None = None
) -> dict[str, Tensor]:
    """Draws of every site from the program: latents, observations and deterministic sites.

    Returns:
        site → tensor; local sites have leading dimension `size`.

    Raises:
        ProgramError: for a program with an improper prior or a factor, which can't be simulated.
    """
    program = as_program(model)
    with torch.no_grad(), seeded(seed), defaults(program, covariates or {}):
        run = trace(program, size, covariates)
        for name, site in _sample_messages(run):
            if _is_factor(site) or is_improper(site["fn"]):
                kind = "a factor" if _is_factor(site) else "an improper prior"
                raise ProgramError(f"site {name!r} is {kind}: this program can't be simulated")
        return {name: site["value"] for name, site in _sample_messages(run)}


# -- what a program's latents are --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """A latent site of a program.

    `prior` is its distribution in one run of the program; `parents` are the latents that its density depends on
    directly, `children` the sites (latent, observed or factor) whose density depends on it directly.
    """

    name: str
    support: constraints.Constraint
    event_shape: torch.Size
    prior: dist.Distribution
    local: bool
    parents: tuple[str, ...]
    children: tuple[str, ...]


def sites(model: Program, observed: Values, covariates: Values | None = None) -> dict[str, Site]:
    """The latent sites of a program, in its order, given which sites are observed.

    A dependency counts when Pyro's provenance tracking sees it, or when a change of one latent alone changes the log
    density of the other site at its fixed value.
    """
    program = as_program(model)
    rows, cols = _few(observed), _few(covariates or {})
    size = len(next(iter(rows.values())))
    with torch.no_grad(), seeded(0), defaults(program, rows):
        run = trace(program, size, cols, rows)
        latent = {name: site for name, site in sampled(run).items() if name not in rows}
        edges = _tracked_edges(program, size, cols, rows) | _perturbed_edges(program, size, cols, rows, set(latent))
    order = [name for name, _ in _sample_messages(run)]
    return {
        name: Site(
            name=name,
            support=site["fn"].support,
            event_shape=site["value"].shape[1:] if is_local(site) else site["value"].shape,
            prior=site["fn"],
            local=is_local(site),
            parents=tuple(p for p in order if p in latent and (p, name) in edges),
            children=tuple(c for c in order if (name, c) in edges),
        )
        for name, site in latent.items()
    }


def _few(values: Values, size: int = 3) -> dict[str, Tensor]:
    """The first rows, repeated up to `size` where there are fewer."""
    return {name: value[torch.arange(size, device=value.device) % len(value)] for name, value in values.items()}


def _tracked_edges(program: Program, size: int, covariates: Values, observed: Values) -> set[tuple[str, str]]:
    held = poutine.condition(program, data=dict(observed))
    with _StartImproper():
        found = get_dependencies(held, (size,), dict(covariates))["prior_dependencies"]
    return {(up, down) for down, ups in found.items() for up in ups if up != down}


def _perturbed_edges(
    program: Program, size: int, covariates: Values, observed: Values, latent: set[str], draws: int = 3
) -> set[tuple[str, str]]:
    edges = set()
    for _ in range(draws):
        here, there = ({n: s["value"] for n, s in sampled(trace(program, size, covariates, observed)).items()} for _ in "12")
        with pyro.validation_enabled(False):  # a latent moved alone may leave another's support: −∞ is an answer
            base = log_density(program, here, size, covariates)
            for name in latent:
                moved = log_density(program, {**here, name: there[name]}, size, covariates)
                edges |= {(name, down) for down in base if down != name and _differ(base[down], moved[down])}
    return edges


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


# -- the refusals ------------------------------------------------------------------------------------------------------


def check_program(model: Program, observed: Values, covariates: Values | None = None) -> PyroModule:
    """Refuse what breaks the contract, by name and with the remedy; returns the model as a `PyroModule`.

    Args:
        model: the program.
        observed: site → tensor, leading dimension data.
        covariates: keyword → tensor, leading dimension data.

    Raises:
        ProgramError: for a program that breaks the contract.
        DataError: for observations or covariates that it can't take.
    """
    program, covariates = as_program(model), covariates or {}
    check_values(observed, covariates)
    _check_signature(program, covariates)
    _check_attributes(program)
    weights = {name for name, _ in program.named_parameters()}
    with torch.no_grad(), seeded(0), defaults(program, observed):
        runs = [_run_prior(program, size, _few(covariates, size)) for size in (3, 5, 3)]
        if new := {name for name, _ in program.named_parameters()} - weights:
            raise ProgramError(f"parameters {sorted(new)} appeared when the program ran: create them in __init__")
        _check_same_sites(*runs[:2])
        _check_supports(runs[0], runs[2])
        for name, site in _sample_messages(runs[0]):
            _check_site(name, site, observed, size=3)
        _check_observed(runs[0], observed)
    _check_independence(program, observed, covariates)
    return program


def check_values(observed: Values, covariates: Values) -> None:
    """Refuse observations and covariates of different lengths, and values that are not finite."""
    if not observed:
        raise DataError("there are no observations: give observed={site: tensor}")
    for name, value in (*observed.items(), *covariates.items()):
        if not isinstance(value, Tensor) or not value.dim():
            raise DataError(f"{name!r} is no tensor with leading dimension data")
        if value.is_floating_point() and not value.isfinite().all():
            row = int((~value.isfinite()).flatten(1 if value.dim() > 1 else 0).reshape(len(value), -1).any(1).nonzero()[0])
            raise DataError(
                f"{name!r} is not finite at datum {row}: drop it, or mask it (a covariate as mask, and any value inside "
                "the support in the masked entries)"
            )
    lengths = {name: len(value) for name, value in (*observed.items(), *covariates.items())}
    if len(set(lengths.values())) > 1:
        raise DataError(f"leading dimensions differ: {lengths}; all observations and covariates share the data")


def covariate_names(model: Program) -> tuple[str, ...]:
    """The names of the covariates that a program takes: its arguments after `size`."""
    names = list(_parameters(as_program(model)))[1:]
    return tuple(names)


def _parameters(program: PyroModule) -> dict[str, inspect.Parameter]:
    target = program.function if isinstance(program, _Function) else program.forward
    target = target.forward if isinstance(target, nn.Module) else target
    return dict(inspect.signature(target).parameters)


def _check_signature(program: PyroModule, covariates: Values) -> None:
    parameters = list(_parameters(program).values())
    if not parameters:
        raise ProgramError("a program takes the number of data as its first argument: def forward(self, size, ...)")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    names = {p.name for p in parameters[1:]}
    missing = {p.name for p in parameters[1:] if p.default is p.empty} - set(covariates)
    if missing:
        raise DataError(f"the program takes the covariates {sorted(missing)}, which were not given: covariates={{...}}")
    if unknown := set(covariates) - names:
        raise DataError(f"the program takes no covariates {sorted(unknown)}; its own are {sorted(names)}")


def _check_attributes(program: PyroModule) -> None:
    for path, module in program.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                where = f"{path}.{name}" if path else name
                raise ProgramError(
                    f"attribute {where!r} is a tensor but no buffer, so it would stay behind on another device or "
                    f'dtype: self.register_buffer("{name}", tensor)'
                )


def _run_prior(program: PyroModule, size: int, covariates: Values) -> Trace:
    params = program._pyro_context.param_state["params"]
    try:
        run = trace(program, size, covariates)
    except NotImplementedError as error:
        if "pyro.param" not in str(error):
            raise
        raise _param_error(params) from error
    except (RuntimeError, ValueError) as error:
        raise ProgramError(f"the program does not run for {size} data: {error}") from error
    finally:
        found = list(params)
        params.clear()
    if found:
        raise _param_error(found)
    return run


def _param_error(names: Iterable[str]) -> ProgramError:
    return ProgramError(
        f"the program calls pyro.param or pyro.module for {sorted(names)}: make each an nn.Parameter, PyroParam or "
        "submodule in __init__, and use it as an attribute"
    )


def _check_same_sites(first: Trace, second: Trace) -> None:
    if changed := set(sampled(first)) ^ set(sampled(second)):
        raise ProgramError(f"sites {sorted(changed)} are not in every run: a program samples the same sites each time")
    for name, site in sampled(first).items():
        if not is_local(site) and site["value"].shape != sampled(second)[name]["value"].shape:
            raise ProgramError(
                f"site {name!r} has a data-sized shape {tuple(site['value'].shape)} outside the data plate: sample it "
                f'inside pyro.plate("{PLATE}", size)'
            )


def _check_supports(first: Trace, again: Trace) -> None:
    """A support that moves with another latent would be cut short by any fixed transform to the real line."""
    for name, site in sampled(first).items():
        bounds = [_bounds(run[name]["fn"].support) for run in (sampled(first), sampled(again))]
        if any(not torch.equal(a, b) for a, b in zip(*bounds, strict=True)):
            raise ProgramError(
                f"the support of site {name!r} changes with other latents: sample it on a fixed support and transform it"
            )


def _bounds(support: Any) -> list[Tensor]:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    return [torch.as_tensor(v) for k, v in vars(support).items() if k in ("lower_bound", "upper_bound")]


def _check_site(name: str, site: Mapping[str, Any], observed: Values, size: int) -> None:
    if _is_deterministic(site):
        return
    if site["is_observed"] and not _is_factor(site):
        raise ProgramError(f"site {name!r} has obs= inside the program: leave it out and give observed={{{name!r}: ...}}")
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    if name in observed and PLATE not in frames:
        around = f"plate {sorted(frames)}" if frames else "no plate"
        raise ProgramError(f'observed site {name!r} lies in {around}: put it in pyro.plate("{PLATE}", size)')
    if PLATE not in frames:
        return
    frame = frames[PLATE]
    if frame.dim != -1 or frame.size != size or frame.full_size not in (None, size):
        raise ProgramError(
            f'the plate "{PLATE}" of site {name!r} has dim {frame.dim} and size {frame.size} of {frame.full_size}: write '
            f'pyro.plate("{PLATE}", size) alone; minibatches are taken by the library, never by subsample_size'
        )
    batch = tuple(site["fn"].batch_shape)
    if batch != (size,):
        raise ProgramError(_batch_message(name, batch, size))


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


def _check_independence(program: PyroModule, observed: Values, covariates: Values) -> None:
    """A datum's density must not change when the other data are permuted, doubled or replaced."""
    rows, cols = _few(observed, 4), _few(covariates, 4)
    double = in_double(program)
    with torch.no_grad(), seeded(1), defaults(program, rows, torch.float64):
        cols = {name: _double(value) for name, value in cols.items()}
        values = {n: s["value"] for n, s in sampled(trace(double, 4, cols, _doubles(rows))).items()}
        local = {n for n, s in sampled(trace(double, 4, cols, values)).items() if is_local(s)}

        def density(index: list[int]) -> Tensor:
            at = {n: v[index] if n in local else v for n, v in values.items()}
            return log_density(double, at, len(index), {n: v[index] for n, v in cols.items()}).local

        base = density([0, 1, 2, 3])
        changed = {
            "running it again": (density([0, 1, 2, 3]), base),
            "permuting the data": (density([3, 1, 0, 2]), base[[3, 1, 0, 2]]),
            "doubling the data": (density([0, 1, 2, 3, 0, 1, 2, 3])[:4], base),
            "changing other data": (density([0, 2, 2, 3])[:1], base[:1]),
        }
    for what, (found, wanted) in changed.items():
        if not torch.allclose(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True):
            raise ProgramError(
                f"a datum's density changes on {what}: data must be independent given the shared latents"
                + _suspects(program)
            )


def _doubles(values: Values) -> dict[str, Tensor]:
    return {name: value.double() for name, value in values.items()}


def _suspects(program: nn.Module) -> str:
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    names = [name for name, module in program.named_modules() if isinstance(module, kinds) and module.training]
    return f"; {names} are in training mode: call model.eval() first" if names else ""
