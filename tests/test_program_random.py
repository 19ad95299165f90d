"""Random small programs: the log density against Pyro's own and against one datum at a time; random graphs of sites."""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor

from calibrant import program as cal
from calibrant.errors import CalibrantError
from calibrant.program import density, tracing

REAL = ("normal", "laplace", "student", "mvn")
OTHER = ("lognormal", "gamma", "half-normal", "beta", "uniform", "dirichlet", "bernoulli", "poisson", "categorical")
VECTORS = {"mvn": (3,), "dirichlet": (3,)}
ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 1.1]], dtype=torch.float64)


@dataclass(frozen=True)
class Part:
    """One sample site of a random program."""

    name: str
    kind: str
    event: tuple[int, ...] = ()
    local: bool = True
    parents: tuple[str, ...] = ()
    covariate: bool = False
    plate: bool = False  # a shared site in a plate of its own
    mask: str = ""  # "site": the data that a covariate names; "entries": single entries of every event
    scale: float = 1.0
    deterministic: bool = False
    factor: bool = False


@dataclass(frozen=True)
class Spec:
    """A random program: latents in order, then the observed site `x`."""

    parts: tuple[Part, ...]
    size: int = 3
    covariates: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def program(self):
        def run(size, dose, seen):
            values: dict[str, Tensor] = {}
            plate = pyro.plate("data", size)
            for part in self.parts:
                values[part.name] = _sample(part, values, plate, dose, seen)

        return run

    def given(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.size)
        dose = torch.randn(self.size, generator=generator, dtype=torch.float64)
        return {"dose": dose, "seen": torch.arange(self.size) % 2 == 0}


def _sample(part: Part, values: Mapping[str, Tensor], plate: pyro.plate, dose: Tensor, seen: Tensor) -> Tensor:
    signal = torch.zeros((), dtype=torch.float64)
    for parent in part.parents:
        value = values[parent].double()
        signal = signal + torch.tanh(value.reshape(*value.shape[:1], -1).mean(-1) if value.dim() else value)
    if part.covariate and part.local:
        signal = signal + dose
    with ExitStack() as around:
        if part.local:
            around.enter_context(plate)
        if part.plate:
            around.enter_context(pyro.plate(f"{part.name}s", 2))
        if part.mask == "site" and part.local:
            around.enter_context(poutine.mask(mask=seen))
        if part.scale != 1.0:
            around.enter_context(poutine.scale(scale=part.scale))
        value = pyro.sample(part.name, _distribution(part, signal))
        if part.deterministic:
            pyro.deterministic(f"{part.name}_square", value.double().square())
        if part.factor:
            pyro.factor(f"{part.name}_factor", -signal.square())
    # Shared values act through one number, so that a later site sees the same of them whatever the number of data.
    return value if part.local else value.double().mean()


def _distribution(part: Part, signal: Tensor) -> dist.Distribution:
    loc = signal.reshape(signal.shape + (1,) * len(part.event)).expand(signal.shape + part.event)
    scalar = {
        "normal": lambda: dist.Normal(loc, 1.3),
        "laplace": lambda: dist.Laplace(loc, 0.7),
        "student": lambda: dist.StudentT(4.0, loc, 0.9),
        "lognormal": lambda: dist.LogNormal(loc, 0.6),
        "gamma": lambda: dist.Gamma(loc.exp() + 0.5, 2.0),
        "half-normal": lambda: dist.HalfNormal(loc.exp()),
        "beta": lambda: dist.Beta(loc.exp(), 2.0),
        "uniform": lambda: dist.Uniform(torch.full_like(loc, -1.0), 2.0),
        "bernoulli": lambda: dist.Bernoulli(logits=loc),
        "poisson": lambda: dist.Poisson(loc.exp()),
        "dirichlet": lambda: dist.Dirichlet(loc.exp()[..., None] + torch.arange(1.0, 4.0, dtype=torch.float64)),
        "mvn": lambda: dist.MultivariateNormal(loc[..., None].expand(*loc.shape, 3), scale_tril=ROOT),
        "categorical": lambda: dist.Categorical(logits=torch.stack([loc, -loc, torch.zeros_like(loc)], -1)),
    }[part.kind]()
    if part.mask == "entries" and part.event:
        scalar = scalar.mask(torch.arange(part.event[-1]) % 2 == 0)
    return scalar.to_event(len(part.event))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    parts: list[Part] = []
    for i in range(draw(st.integers(1, 5))):
        local = draw(st.booleans())
        kind = draw(st.sampled_from(REAL + OTHER))
        event = draw(st.sampled_from([(), (2,), (3,), (2, 2)]))[: 1 if kind in VECTORS else 2]
        # A shared site follows shared sites alone: what lies outside the plate does not depend on the data.
        candidates = [part.name for part in parts if local or not part.local]
        parts.append(
            Part(
                name=f"z{i}",
                kind=kind,
                event=event,
                local=local,
                parents=tuple(draw(st.lists(st.sampled_from(candidates), unique=True))) if candidates else (),
                covariate=draw(st.booleans()),
                plate=not local and draw(st.booleans()),
                mask=draw(st.sampled_from(["", "site", "entries"])),
                scale=draw(st.sampled_from([1.0, 0.3])),
                deterministic=draw(st.booleans()),
                factor=draw(st.booleans()),
            )
        )
    names = [part.name for part in parts]
    x = Part(
        name="x",
        kind=draw(st.sampled_from(REAL + OTHER)),
        event=draw(st.sampled_from([(), (2,)])),
        parents=tuple(draw(st.lists(st.sampled_from(names), unique=True, min_size=1))),
        covariate=draw(st.booleans()),
        mask=draw(st.sampled_from(["", "site", "entries"])),
    )
    return Spec((*parts, x), size=draw(st.integers(1, 4)))


EVERYTHING = Spec(
    (
        Part("w", "gamma", (2,), local=False, plate=True, deterministic=True, factor=True),
        Part("a", "mvn", (2,), parents=("w",), mask="site", scale=0.3),
        Part("b", "beta", (2, 2), parents=("w", "a"), mask="entries", covariate=True, factor=True),
        Part("x", "normal", (2,), parents=("a", "b"), deterministic=True),
    )
)


@contextmanager
def float64() -> Iterator[None]:
    """Programs without weights take their dtype from the values; the oracle runs outside of the library."""
    with cal.defaults(lambda: None, {}, torch.float64):
        yield


def prior_values(spec: Spec) -> dict[str, Tensor]:
    with float64(), cal.seeded(spec.size):
        run = cal.trace(spec.program, spec.size, spec.given())
    return {name: site["value"] for name, site in tracing.sampled(run).items()}


def assert_density_is_pyros(spec: Spec) -> None:
    """Site by site and in all, in float64, to 1e-10 of the larger of one nat and the density."""
    values, covariates = prior_values(spec), spec.given()
    with float64():
        run = poutine.trace(pyro.condition(spec.program, data=values)).get_trace(spec.size, **covariates)
        total = run.log_prob_sum()
        density = cal.log_density(spec.program, values, spec.size, covariates, observed=["x"])
    sites = {name: site for name, site in tracing.messages(run).items() if not tracing.is_deterministic(site)}
    assert set(density) == set(sites)
    for name, site in sites.items():
        assert density[name].shape == ((spec.size,) if tracing.is_local(site) else ())
        assert_close(density[name].sum(), site["log_prob_sum"], name)
    assert_close(density.joint.sum(), total, "joint")
    assert_close(density.local.sum() + density.shared, total, "local and shared")
    assert_close(density.latent.sum() + density.observed.sum(), total, "latent and observed")
    factors = {name for name in sites if name.endswith("_factor")}
    assert density.observed_sites == factors | {"x"}


def assert_data_are_independent(spec: Spec) -> None:
    """The local terms of one datum are those of a run with that datum alone."""
    values, covariates = prior_values(spec), spec.given()
    local = {part.name for part in spec.parts if part.local}
    with float64():
        density = cal.log_density(spec.program, values, spec.size, covariates)
        for i in range(spec.size):
            alone = {name: value[i : i + 1] if name in local else value for name, value in values.items()}
            single = cal.log_density(spec.program, alone, 1, {n: v[i : i + 1] for n, v in covariates.items()})
            assert_close(single.local[0], density.local[i], f"datum {i}")
            assert_close(single.shared, density.shared, "shared")
            for name in density:
                assert_close(single[name].sum(), density[name][i] if density[name].dim() else density[name], name)


def assert_close(found: Tensor, wanted: Tensor, what: str) -> None:
    error = abs(float(found) - float(wanted))
    assert math.isfinite(float(wanted)), what
    assert error <= 1e-10 * max(1.0, abs(float(wanted))), (what, error)


@given(specs())
@example(EVERYTHING)
@settings(max_examples=60, deadline=None)
def test_density_is_pyros(spec):
    assert_density_is_pyros(spec)


@given(specs())
@example(EVERYTHING)
@settings(max_examples=40, deadline=None)
def test_density_of_a_datum_is_that_of_a_run_with_it_alone(spec):
    assert_data_are_independent(spec)


@given(specs())
@example(EVERYTHING)
@settings(max_examples=8, deadline=None)
def test_contract_is_kept_and_sites_are_known(spec):
    parts = tuple(part if part.name == "x" else replace(part, mask="", scale=1.0) for part in spec.parts)
    spec = replace(spec, parts=parts)  # masks and scales of latents are refused
    observed, covariates = {"x": prior_values(spec)["x"]}, spec.given()
    with float64():
        cal.check_program(spec.program, observed, covariates)
        sites = cal.sites(spec.program, observed, covariates)
    latents = [part for part in spec.parts if part.name != "x"]
    assert list(sites) == [part.name for part in latents]
    for part in latents:
        site = sites[part.name]
        shape = (2,) * part.plate + part.event + VECTORS.get(part.kind, ())
        assert (site.local, tuple(site.event_shape)) == (part.local, shape)
        assert set(site.parents) <= set(part.parents)
        if not part.mask and part.kind != "uniform":
            assert set(site.parents) == set(part.parents)


def _without_mask(site, size, name, compute):
    return compute(name, {**site, "mask": None}, size)


def _without_scale(site, size, name, compute):
    return compute(name, {**site, "scale": 1.0}, size)


def _without_one_site(site, size, name, compute):
    term = compute(name, site, size)
    return term * 0 if name == "b" else term


def _mean_over_events(site, size, name, compute):
    term = compute(name, site, size)
    return term / 2 if name == "x" else term


def _first_of_a_plate(site, size, name, compute):
    return site["fn"].log_prob(site["value"]).flatten()[0] if name == "w" else compute(name, site, size)


def plant(monkeypatch, defect):
    for module in (tracing, density):
        monkeypatch.setattr(module, "site_log_prob", defect)


@pytest.mark.parametrize(
    "defect", [_without_mask, _without_scale, _without_one_site, _mean_over_events, _first_of_a_plate]
)
def test_the_assertion_sees_a_defect(monkeypatch, defect):
    compute = tracing.site_log_prob
    plant(monkeypatch, lambda name, site, size: defect(site, size, name, compute))
    with pytest.raises(AssertionError):
        assert_density_is_pyros(EVERYTHING)


def test_the_assertion_sees_data_that_touch(monkeypatch):
    compute = tracing.site_log_prob

    def centred(name, site, size):
        term = compute(name, site, size)
        return term - term.mean() if name == "a" else term

    assert_data_are_independent(EVERYTHING)
    plant(monkeypatch, centred)
    with pytest.raises(AssertionError):
        assert_data_are_independent(EVERYTHING)


@given(specs(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_missing_to_event_never_gives_a_density(spec, data):
    """Of every site with an event, in turn: the program is refused, or its density is still Pyro's."""
    part = data.draw(st.sampled_from(spec.parts))
    if not part.event or not part.local:
        return
    values, covariates = prior_values(spec), spec.given()

    def broken(size, dose, seen):
        with _WithoutEvent(part.name):
            spec.program(size, dose=dose, seen=seen)

    with float64(), pytest.raises((CalibrantError, ValueError, RuntimeError)):
        cal.log_density(broken, values, spec.size, covariates)


class _WithoutEvent(poutine.messenger.Messenger):
    """Takes the last `to_event` from a site."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def _pyro_sample(self, msg) -> None:
        if msg["name"] == self.name:
            msg["fn"] = msg["fn"].base_dist


# -- random graphs -----------------------------------------------------------------------------------------------------

WAYS = ("in place", "location", "scale", "detached", "data", "where", "index", "product")


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, dict[str, str]]:
    """Site → parent → the way in which it depends on it; `x` is observed, every other site latent."""
    names = [f"z{i}" for i in range(draw(st.integers(1, 5)))] + ["x"]
    return {
        name: {parent: draw(st.sampled_from(WAYS)) for parent in names[:i] if draw(st.booleans())}
        for i, name in enumerate(names)
    }


def program_of(graph: dict[str, dict[str, str]], shared: frozenset[str] = frozenset()):
    def program(size):
        values: dict[str, Tensor] = {}
        plate = pyro.plate("data", size)
        for name, parents in graph.items():
            local = name not in shared
            mean, scale = torch.zeros(size if local else 1, len(WAYS)), torch.ones(())
            for parent, way in parents.items():
                _depend(mean, values[parent], way)
                if way == "scale":
                    scale = scale + values[parent].square()
            loc = mean.sum(-1) if local else mean.sum()
            with plate if local else ExitStack():
                values[name] = pyro.sample(name, dist.Normal(loc, scale))

    return program


def _depend(mean: Tensor, value: Tensor, way: str) -> None:
    column = WAYS.index(way)
    change = {
        "in place": lambda: value,
        "location": lambda: value.tanh(),
        "scale": lambda: torch.zeros(()),
        "detached": lambda: value.detach(),
        "data": lambda: value.data,
        "where": lambda: torch.where(value > 0, 1.0, -1.0),
        "index": lambda: torch.linspace(-1.0, 1.0, 64)[(value.abs() * 8).long().clamp(max=63)],
        "product": lambda: 1e-9 * value,
    }[way]()
    mean[:, column] += change


@given(graphs())
@settings(max_examples=20, deadline=None)
def test_random_graphs_are_recovered(graph):
    sites = cal.sites(program_of(graph), {"x": torch.zeros(3)})
    assert list(sites) == [name for name in graph if name != "x"]
    for name, site in sites.items():
        assert set(site.parents) == set(graph[name])
        assert set(site.children) == {child for child, parents in graph.items() if name in parents}


@given(graphs(), st.integers(0, 4))
@settings(max_examples=15, deadline=None)
def test_random_graphs_with_shared_latents_are_recovered(graph, count):
    shared = frozenset(list(graph)[: min(count, len(graph) - 1)])
    # The sign of one number, written in place, may stay the same in all perturbations: that is for local latents.
    graph = {
        name: {parent: "location" if way == "where" and parent in shared else way for parent, way in parents.items()}
        for name, parents in graph.items()
    }
    sites = cal.sites(program_of(graph, shared), {"x": torch.zeros(3)})
    for name, site in sites.items():
        assert site.local == (name not in shared)
        assert set(site.parents) == set(graph[name])
        assert set(site.children) == {child for child, parents in graph.items() if name in parents}
