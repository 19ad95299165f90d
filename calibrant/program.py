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
>>> latents = cal.program.sites(hierarchical, {"x": torch.zeros(3)})
>>> {name: site.local for name, site in latents.items()}
{'centre': False, 'z': True}

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
calibrant.errors.ProgramError: site 'x' has 2 entries in batch dimension -1 where the plate 'data' has 3: the \
dimensions beyond the data belong to the event, so end its distribution with .to_event(their number)

The rest of the contract:

- Covariates are keyword tensors with leading dimension data.
- Weights are `nn.Parameter`s that exist after `__init__`; constants are buffers. `PyroSample` weights are read before
  the plate.
- A datum's density, and what is recorded for it, depend on that datum and the shared latents alone; what lies outside
  the plate does not depend on the data.
- The support of a site does not move with other latents, and no value of a site is changed in place.
- `pyro.deterministic` is recorded, never conditioned. `pyro.factor` and improper priors are allowed where nothing is
  simulated.
- There is no device or dtype code in a program: `defaults` sets both for the call. Integer observations are cast
  before the density, except where the site itself draws integers (classes).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
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
from torch.distributions import Distribution, biject_to, constraints
from torch.func import functional_call

from calibrant.errors import DataError, ProgramError

PLATE = "data"
TERM = "calibrant.log_prob"  # of a message: its term of the log density
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


def covariate_names(model: Program) -> tuple[str, ...]:
    """The names of the covariates that a program takes: its arguments after `size`."""
    return tuple(p.name for p in arguments(as_program(model))[1:] if p.kind is not p.VAR_KEYWORD)


def arguments(program: PyroModule) -> list[inspect.Parameter]:
    """The arguments of a program, `size` first."""
    target = program.function if isinstance(program, _Function) else program.forward
    target = target.forward if isinstance(target, nn.Module) else target
    return list(inspect.signature(target).parameters.values())


# -- dtype, device, random state ---------------------------------------------------------------------------------------


def in_double(module: Program) -> Program:
    """The model or guide as a function that runs in float64 on cast copies of its weights and buffers.

    The module itself is never changed, nor are its buffers; gradients do not reach its weights.
    """
    program = as_program(module)
    copies = {name: _copy_in_double(tensor.detach()) for name, tensor in _state(program)}
    return lambda *args, **kwargs: functional_call(program, copies, args, kwargs)


def _copy_in_double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def cast(values: Values, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The values on a device, the floating ones in one dtype; integers keep theirs."""
    return {n: v.to(device, dtype if v.is_floating_point() else v.dtype) for n, v in values.items()}


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


@contextmanager
def defaults(
    model: Program, values: Values, dtype: torch.dtype | None = None
) -> Iterator[tuple[torch.device, torch.dtype]]:
    """Default device and dtype for a call: from the model's weights, else from the values; restored afterwards."""
    weights = [tensor for _, tensor in _state(model)] if isinstance(model, nn.Module) else []
    tensors = [*weights, *values.values()]
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    before_device, before = torch.get_default_device(), torch.get_default_dtype()
    device = next((tensor.device for tensor in (*floating, *tensors)), before_device)
    dtype = dtype or next((tensor.dtype for tensor in floating), before)
    torch.set_default_dtype(dtype)
    try:
        with nullcontext() if device == before_device else device:
            yield device, dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def validation_kept() -> Iterator[None]:
    """Undo what an import or a compiler inside does to the validation of all of torch's distributions."""
    before = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


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


class Hold(Messenger):
    """Holds sites at given values, and gives improper priors a start, U(−2, 2) in unconstrained space.

    What is drawn has the default dtype (a prior that was built in `__init__` draws in the dtype of that time). Given
    the number of data, sites are scored as they are met: a distribution may hold modules (a flow), whose weights are
    other ones once a functional call is over.
    """

    def __init__(
        self, values: Values, size: int | None = None, score_draws: bool = False, latent: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.values, self.size, self.score_draws, self.latent = values, size, score_draws, latent

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if is_deterministic(msg) or is_factor(msg):
            return
        fn = msg["fn"]
        if msg["name"] in self.values:
            msg["value"] = _as_drawn(fn, self.values[msg["name"]])
            msg["is_observed"] = msg["name"] not in self.latent
        elif msg["value"] is None and is_improper(fn):
            raw = torch.empty(biject_to(fn.support).inverse_shape(fn.shape())).uniform_(-2.0, 2.0)
            msg["value"] = biject_to(fn.support)(raw)

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["value"].is_floating_point():
            msg["value"] = msg["value"].to(torch.get_default_dtype())
        wanted = self.score_draws or is_factor(msg) or msg["name"] in self.values
        if self.size is not None and wanted and not is_deterministic(msg) and not site_is_subsample(msg):
            msg[TERM] = _log_prob(msg["name"], msg, self.size)


def _as_drawn(fn: Any, value: Tensor) -> Tensor:
    """A given value as the site would draw it: classes as integers, everything else floating."""
    if isinstance(unwrapped(fn), dist.Categorical):
        return value.long()
    return value if value.is_floating_point() else value.to(torch.get_default_dtype())


def unwrapped(fn: Any) -> Any:
    """A distribution without `expand`, `to_event` and `mask` around it."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def is_improper(fn: Any) -> bool:
    """Whether a distribution is an `ImproperUniform`, under any wrapping."""
    return isinstance(unwrapped(fn), dist.ImproperUniform)


def is_masked(fn: Any) -> bool:
    """Whether some entries of a distribution don't count, under any wrapping."""
    while hasattr(fn, "base_dist"):
        if isinstance(fn, dist.MaskedDistribution):
            return True
        fn = fn.base_dist
    return False


def trace(program: Program, size: int, covariates: Values | None = None, values: Values | None = None) -> Trace:
    """One run of the program with the given sites held at their values; the other sites are drawn."""
    with Hold(values or {}, size), poutine.trace() as tracer:
        program(size, **(covariates or {}))
    return tracer.get_trace()


def guide_trace(guide: Program, observed: Values, size: int, covariates: Values, values: Values | None = None) -> Trace:
    """One run of a guide, some of its sites held at given values, ready for `density_of`."""
    with Hold(values or {}, size, score_draws=True), poutine.trace() as tracer:
        guide(observed, size, **covariates)
    return tracer.get_trace()


def sampled(run: Trace) -> dict[str, Any]:
    """The sample sites of a trace, without plates, deterministic sites and factors."""
    return {n: s for n, s in messages(run).items() if not is_deterministic(s) and not is_factor(s)}


def deterministic(run: Trace) -> dict[str, Any]:
    """The `pyro.deterministic` sites of a trace."""
    return {n: s for n, s in messages(run).items() if is_deterministic(s)}


def factors(run: Trace) -> dict[str, Any]:
    """The `pyro.factor` sites of a trace."""
    return {n: s for n, s in messages(run).items() if is_factor(s)}


def messages(run: Trace) -> dict[str, Any]:
    """The sites of a trace, of all three kinds."""
    return {n: s for n, s in run.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}


def is_local(site: Mapping[str, Any]) -> bool:
    """Whether a site lies in the data plate."""
    return any(frame.name == PLATE for frame in site["cond_indep_stack"])


def is_factor(site: Mapping[str, Any]) -> bool:
    """Whether a site is a `pyro.factor`."""
    return isinstance(unwrapped(site["fn"]), dist.Unit)


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a site is a `pyro.deterministic`."""
    return bool(site["infer"].get("_deterministic"))


# -- log density -------------------------------------------------------------------------------------------------------


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
        """Sum of all terms."""
        return self._sum(self.terms.values())

    @property
    def latent(self) -> Tensor:
        """Sum of the latents' terms: the log prior."""
        return self._sum(t for n, t in self.terms.items() if n not in self.observed_sites)

    @property
    def observed(self) -> Tensor:
        """Sum of the observations' (and factors') terms: the log likelihood."""
        return self._sum(t for n, t in self.terms.items() if n in self.observed_sites)

    @property
    def local(self) -> Tensor:
        """Sum of the local terms, `(size,)`."""
        return _total((t for t in self.terms.values() if t.dim()), (self.size,))

    @property
    def shared(self) -> Tensor:
        """Sum of the shared terms, `()`."""
        return _total((t for t in self.terms.values() if not t.dim()), ())

    def without(self, names: Iterable[str]) -> LogDensity:
        """The density less some sites."""
        left = set(self.terms) - set(names)
        return LogDensity({n: t for n, t in self.terms.items() if n in left}, self.observed_sites, self.size)

    def _sum(self, terms: Iterable[Tensor]) -> Tensor:
        terms = list(terms)
        if any(not term.dim() for term in terms):
            return _total((term.sum() for term in terms), ())
        return _total(terms, (self.size,))


def _total(terms: Iterable[Tensor], shape: tuple[int, ...]) -> Tensor:
    terms = list(terms)
    return sum(terms[1:], terms[0]) if terms else torch.zeros(shape)


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
        values: a tensor for every sample site, local ones with leading dimension `size`; deterministic sites among
            them are left out of account.
        size: number of data; read from the local values where left out.
        covariates: keyword tensors of the program, leading dimension `size`.
        observed: which of the sites count as observed.

    Raises:
        ProgramError: for a sample site without a value, a value without a site, or a site without `to_event`.
        DataError: for a value of the wrong shape, or outside its support.
    """
    size = _size_of(values, observed) if size is None else size
    with defaults(model, values):
        return density_of(trace(model, size, covariates, values), size, values, observed)


def _size_of(values: Values, observed: Iterable[str]) -> int:
    names = [name for name in observed if name in values] or list(values)
    sizes = {len(values[name]) for name in names if values[name].dim()}
    if len(sizes) != 1:
        raise ProgramError("the number of data is not plain from the values: give size=")
    return sizes.pop()


def density_of(run: Trace, size: int, values: Values, observed: Iterable[str] = ()) -> LogDensity:
    """The log density of a trace whose sample sites were held at `values`."""
    if absent := set(sampled(run)) - set(values):
        raise ProgramError(f"sites {sorted(absent)} are sampled by the program but have no value")
    if unknown := set(values) - set(messages(run)):
        raise ProgramError(f"the program never samples {sorted(unknown)}; its sites are {sorted(sampled(run))}")
    scored = {n: s for n, s in messages(run).items() if not is_deterministic(s)}
    terms = {n: s[TERM] if TERM in s else _log_prob(n, s, size) for n, s in scored.items()}
    return LogDensity(terms, frozenset(observed) | set(factors(run)), size)


def _log_prob(name: str, site: Mapping[str, Any], size: int) -> Tensor:
    fn, value = site["fn"], site["value"]
    if is_local(site) and fn.batch_shape != (size,):
        raise batch_error(name, site, size)
    if not is_factor(site) and value.shape != fn.shape():
        raise DataError(f"site {name!r} has a value of shape {tuple(value.shape)}, wanted {tuple(fn.shape())}")
    try:
        term = fn.log_prob(value)
    except ValueError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"site {name!r}: {type(unwrapped(fn)).__name__} can't take this value ({reason})") from error
    term = dist.util.scale_and_mask(term, site["scale"], site["mask"])
    if not is_local(site):
        return term.sum()
    if term.shape != (size,):
        raise ProgramError(
            f"the mask or scale around site {name!r} makes its density {tuple(term.shape)}, wanted ({size},): mask "
            "single entries of a datum with .mask(...) before .to_event(...)"
        )
    return term


def batch_error(name: str, site: Mapping[str, Any], size: int) -> ProgramError:
    """The error for a local site whose batch shape is not the data."""
    found = tuple(site["fn"].batch_shape)
    event = f"end its distribution with .to_event({len(found) - 1})"
    remedy = "sum its log factor over them" if is_factor(site) else event
    return ProgramError(
        f"site {name!r} has batch shape {found}, wanted ({size},): the dimensions beyond the data belong to the event, "
        f"so {remedy}"
    )


def sample_prior(
    model: Program, size: int, covariates: Values | None = None, seed: int | None = None
) -> dict[str, Tensor]:
    """Draws of every site from the program: latents, observations and deterministic sites.

    Returns:
        site → tensor; local sites have leading dimension `size`.

    Raises:
        ProgramError: for a program with an improper prior or a factor, which can't be simulated.
    """
    program, covariates = as_program(model), covariates or {}
    with torch.no_grad(), seeded(seed), defaults(program, covariates) as place:
        run = trace(program, size, cast(covariates, *place))
    refuse_factors(run)
    if improper := [name for name, site in sampled(run).items() if is_improper(site["fn"])]:
        raise ProgramError(f"site {improper[0]!r} has an improper prior: this program can't be simulated")
    return {name: site["value"] for name, site in messages(run).items()}


def refuse_factors(run: Trace) -> None:
    """Refuse a program with a factor, whose weight no simulation could follow."""
    if factors(run):
        raise ProgramError(f"site {next(iter(factors(run)))!r} is a factor: this program can't be simulated")


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
    rows, cols = few(observed, 8), few(covariates or {}, 8)
    size = len(next(iter(rows.values())))
    with torch.no_grad(), seeded(0):
        with defaults(program, {**rows, **cols}) as place:
            rows, cols = cast(rows, *place), cast(cols, *place)
            run = trace(program, size, cols, rows)
            latent = {name: site for name, site in sampled(run).items() if name not in rows}
            edges = _tracked_edges(program, run, size, cols, set(latent))
        edges |= _perturbed_edges(program, size, cols, rows, set(latent))
    order = list(messages(run))
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


def few(values: Values, size: int) -> dict[str, Tensor]:
    """The first rows, repeated up to `size` where there are fewer."""
    return {name: value[torch.arange(size, device=value.device) % len(value)] for name, value in values.items()}


def _tracked_edges(
    program: Program, run: Trace, size: int, covariates: Values, latent: set[str]
) -> set[tuple[str, str]]:
    """Of a run at known values, since not every distribution can draw from tracked parameters (Laplace can't)."""
    values = {name: site["value"] for name, site in sampled(run).items()}
    with Hold(values, latent=latent):
        found: Any = get_dependencies(program, (size,), dict(covariates))["prior_dependencies"]
    return {(up, down) for down, ups in found.items() for up in ups if up != down}


def _perturbed_edges(
    program: Program, size: int, covariates: Values, observed: Values, latent: set[str], draws: int = 8
) -> set[tuple[str, str]]:
    """In float64, where a weak dependency still changes the density; every other time at simulated observations, since
    the given ones may be special (all zero, say)."""
    double, edges = in_double(program), set()
    with defaults(program, observed, torch.float64) as place:
        observed, covariates = cast(observed, *place), cast(covariates, *place)
        for draw in range(draws):
            runs = [trace(double, size, covariates, {} if draw % 2 else observed) for _ in range(2)]
            here, there = ({name: site["value"] for name, site in sampled(run).items()} for run in runs)
            with pyro.validation_enabled(False):  # a latent moved alone may leave another's support: −∞ is an answer
                base = log_density(double, here, size, covariates)
                for name in latent:
                    moved = log_density(double, {**here, name: there[name]}, size, covariates)
                    edges |= {(name, down) for down in base if down != name and _differ(base[down], moved[down])}
    return edges


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


# -- the refusals ------------------------------------------------------------------------------------------------------


def check_program(model: Program, observed: Values, covariates: Values | None = None) -> PyroModule:
    """Refuse what breaks the contract, by name and with the remedy; returns the model as a `PyroModule`.

    Args:
        model: the program; neither it nor its buffers are changed.
        observed: site → tensor, leading dimension data. All of them are compared with the sites' supports.
        covariates: keyword → tensor, leading dimension data.

    Raises:
        ProgramError: for a program that breaks the contract.
        DataError: for observations or covariates that it can't take.
    """
    from calibrant import refusals  # it is built on this module

    program, covariates = as_program(model), covariates or {}
    check_values(observed, covariates)
    refusals.refuse(program, observed, covariates)
    return program


def check_values(observed: Values, covariates: Values) -> None:
    """Refuse observations and covariates of different lengths, and values that are not finite."""
    if not observed:
        raise DataError("there are no observations: give observed={site: tensor}")
    values = {**observed, **covariates}
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.dim():
            raise DataError(f"{name!r} is no tensor with leading dimension data")
        if not value.isfinite().all():
            row = int((~value.isfinite()).reshape(len(value), -1).any(1).nonzero()[0])
            raise DataError(
                f"{name!r} is not finite at datum {row}: drop it, or mask it (a covariate as mask, and any value "
                "inside the support in the masked entries)"
            )
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise DataError(f"leading dimensions {lengths}: all observations and covariates share the data, one or more")
