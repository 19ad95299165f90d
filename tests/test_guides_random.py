"""Guides of random programs: samples in the support, finite ELBO and gradients, sites and plates, storing, float64."""

import importlib
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyro.distributions.transforms import OrderedTransform
from pyro.nn import PyroModule
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.distributions import constraints

from calibrant.distributions.directional import VonMisesFisher
from calibrant.errors import ProgramError
from calibrant.guides import AmortizedGuide, amortize
from calibrant.guides.contract import check_guide
from calibrant.guides.structure import STRUCTURES
from calibrant.inference.fitting.objectives import OBJECTIVES
from calibrant.program import defaults, seeded, trace
from calibrant.program.density import density_of
from calibrant.program.tracing import guide_trace, is_local, sampled

ROOT = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 1.1]])
SIZE = 8
PRIORS = {
    "normal": lambda loc: dist.Normal(loc, 1.3),
    "laplace": lambda loc: dist.Laplace(loc, 0.7),
    "student": lambda loc: dist.StudentT(4.0, loc, 0.9),
    "cauchy": lambda loc: dist.Cauchy(loc, 0.5),
    "mvn": lambda loc: dist.MultivariateNormal(loc[..., None].expand(*loc.shape, 3), scale_tril=ROOT.to(loc)),
    "lognormal": lambda loc: dist.LogNormal(loc, 0.6),
    "gamma": lambda loc: dist.Gamma(loc.exp() + 0.5, 2.0),
    "half-normal": lambda loc: dist.HalfNormal(loc.exp()),
    "half-cauchy": lambda loc: dist.HalfCauchy(loc.exp()),
    "inverse-gamma": lambda loc: dist.InverseGamma(loc.exp() + 2.0, 1.0),
    "pareto": lambda loc: dist.Pareto(torch.full_like(loc, 1.5), loc.exp() + 1.0),
    "beta": lambda loc: dist.Beta(loc.exp() + 0.5, 2.0),
    "uniform": lambda loc: dist.Uniform(torch.full_like(loc, -1.0), 2.0),
    "dirichlet": lambda loc: dist.Dirichlet(loc.exp()[..., None] + torch.arange(1.0, 4.0).to(loc)),
    "ordered": lambda loc: dist.TransformedDistribution(
        dist.Normal(loc[..., None].expand(*loc.shape, 3), 1.0).to_event(1), [OrderedTransform()]
    ),
    "lkj": lambda loc: dist.LKJCholesky(3, loc.exp() + 0.5),
    "angle": lambda loc: dist.VonMises(loc, 2.0),
    "circle": lambda loc: dist.ProjectedNormal(torch.stack([loc, 0.5 - loc], -1)),
    "sphere": lambda loc: dist.ProjectedNormal(torch.stack([loc, 0.5 - loc, 1.0 + loc], -1)),
    "vmf": lambda loc: VonMisesFisher(torch.eye(6).to(loc)[0], loc.exp()),
    "improper": lambda loc: dist.ImproperUniform(constraints.real, loc.shape, ()),
    "improper positive": lambda loc: dist.ImproperUniform(constraints.positive, loc.shape, ()),
    "improper simplex": lambda loc: dist.ImproperUniform(constraints.simplex, loc.shape, (3,)),
    "bernoulli": lambda loc: dist.Bernoulli(logits=loc),
    "categorical": lambda loc: dist.Categorical(logits=torch.stack([0.0 * loc, loc, 0.5 - loc], -1)),
}
DISCRETE = ("bernoulli", "categorical")  # local, and of few entries, so that they can be summed out


@dataclass(frozen=True)
class Part:
    """One latent of a random program; a shared one may lie in a plate of its own, of 3."""

    name: str
    kind: str
    event: tuple[int, ...] = ()
    local: bool = True
    parents: tuple[str, ...] = ()
    covariate: bool = False
    plated: bool = False


@dataclass(frozen=True)
class Spec:
    """A random program: latents in order, then the observed site `x` with two entries."""

    parts: tuple[Part, ...]
    seen: tuple[str, ...]
    structure: str


class Random(PyroModule):
    """The program of a specification; it has weights, which say the dtype, and a covariate passes through them."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, self.linear = spec, nn.Linear(1, 1)

    def forward(self, size: int, dose: Tensor) -> None:
        values: dict[str, Tensor] = {}
        plate, dose = pyro.plate("data", size), self.linear(dose[:, None])[:, 0]
        for part in self.spec.parts:
            loc = _signal(part.parents, values, size if part.local else None)
            loc = loc + dose if part.covariate and part.local else loc
            own = (3,) if part.plated else ()
            loc = loc.reshape(loc.shape + (1,) * len(part.event)).expand(own + loc.shape + part.event)
            fn = PRIORS[part.kind](loc).to_event(len(part.event))
            with plate if part.local else pyro.plate(f"{part.name}_plate", 3) if part.plated else nullcontext():
                values[part.name] = _summary(pyro.sample(part.name, fn), int(part.local))
        with plate:
            loc = _signal(self.spec.seen, values, size)
            pyro.sample("x", dist.Normal(torch.stack([loc, loc + dose], -1), 0.8).to_event(1))


def _summary(value: Tensor, batch: int) -> Tensor:
    """One bounded number of a datum, or of a shared latent."""
    value = value.to(torch.get_default_dtype())
    return torch.tanh(value.flatten(batch).mean(-1) if value.dim() > batch else value)


def _signal(parents: tuple[str, ...], values: Mapping[str, Tensor], size: int | None) -> Tensor:
    return sum((values[parent] for parent in parents), torch.zeros(() if size is None else (size,)))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    parts: list[Part] = []
    for i in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(sorted(PRIORS)))
        local = kind in DISCRETE or draw(st.booleans())
        event = () if kind in DISCRETE else draw(st.sampled_from([(), (2,), (3,), (2, 2)]))
        candidates = [part.name for part in parts if local or not part.local]
        parents = tuple(draw(st.lists(st.sampled_from(candidates), unique=True))) if candidates else ()
        plated = not local and draw(st.booleans())
        parts.append(Part(f"z{i}", kind, event, local, parents, draw(st.booleans()), plated))
    names = [part.name for part in parts]
    seen = tuple(draw(st.lists(st.sampled_from(names), unique=True, min_size=1)))
    return Spec(tuple(parts), seen, draw(st.sampled_from(sorted(set(STRUCTURES) - {"collapsed"}))))


def data_of(spec: Spec, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(len(spec.parts))
    draws = torch.randn(SIZE, 3, generator=generator, dtype=dtype)
    return {"x": draws[:, :2]}, {"dose": draws[:, 2]}


def assert_guide_is_right(spec: Spec, dtype: torch.dtype) -> None:
    """Sites, plates and supports are the program's, the ELBO and all its gradients finite, in the dtype of the data."""
    observed, covariates = data_of(spec, dtype)
    program = Random(spec).to(dtype)
    guide = amortize(program, observed, spec.structure, covariates=covariates)
    assert {parameter.dtype for parameter in guide.parameters()} == {dtype}
    check_guide(program, guide, observed, covariates)
    with defaults(guide, observed):
        with torch.no_grad(), seeded(1):
            run = guide_trace(guide, observed, SIZE, covariates)
            model = trace(program, SIZE, covariates, observed)
        wanted = {name: site for name, site in sampled(model).items() if name != "x"}
        assert set(sampled(run)) == set(wanted)
        for name, site in wanted.items():
            value = run.nodes[name]["value"]
            assert (value.shape, is_local(run.nodes[name])) == (site["value"].shape, is_local(site)), name
            assert bool(site["fn"].support.check(value).all()), name
            assert not value.is_floating_point() or value.dtype == dtype
        terms = OBJECTIVES["stl"](program, guide, observed, SIZE, covariates)
        elbo = terms.per_datum(100)
        elbo.backward()
    assert elbo.dtype == dtype
    assert bool(elbo.isfinite())
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    assert_stored(guide, run, observed, covariates)


def assert_stored(guide: AmortizedGuide, run, observed: dict[str, Tensor], covariates: dict[str, Tensor]) -> None:
    """What is written (JSON and safetensors) rebuilds the guide: the same densities at the same values."""
    spec, weights = json.dumps(guide.spec), save(guide.state_dict())
    dtype = next(guide.parameters()).dtype
    again = AmortizedGuide(json.loads(spec)).to(dtype)
    again.load_state_dict(load(weights))
    values = {name: run.nodes[name]["value"] for name in guide.order}
    with torch.no_grad(), defaults(guide, observed):
        before, after = (
            density_of(trace(lambda size, g=g: g(observed, size, **covariates), SIZE, {}, values), SIZE, values)
            for g in (guide, again)
        )
    for name in values:
        assert bool(before[name].isfinite().all()), name
        torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-4)


EVERYTHING = Spec(
    (
        Part("w", "gamma", (2,), local=False),
        Part("v", "normal", local=False, parents=("w",), plated=True),
        Part("a", "mvn", (2,), parents=("w",)),
        Part("b", "lognormal", (2, 2), parents=("v", "a"), covariate=True),
    ),
    ("a", "b"),
    "faithful",
)


@given(specs())
@example(EVERYTHING)
@settings(max_examples=3, deadline=None)
def test_guide_of_a_random_program(spec):
    assert_guide_is_right(spec, torch.float32)


@given(specs())
@settings(max_examples=2, deadline=None)
def test_guide_of_a_random_program_in_float64(spec):
    assert_guide_is_right(spec, torch.float64)


@pytest.mark.slow
@given(specs(), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=300, deadline=None)
def test_guides_of_many_random_programs(spec, dtype):
    assert_guide_is_right(spec, dtype)


@pytest.mark.parametrize("kind", PRIORS)
def test_guide_of_every_prior(kind):
    parts = (
        Part("z0", kind, local=kind in DISCRETE),
        Part("z1", kind, (2,), parents=("z0",)),
    )
    assert_guide_is_right(Spec(parts, ("z1",), "faithful"), torch.float32)


def test_the_assertion_sees_samples_outside_the_support(monkeypatch):
    """A positive latent under a Normal guide."""
    module = importlib.import_module("calibrant.guides.amortizing")
    monkeypatch.setattr(module, "choose_family", lambda *_: "normal")
    with pytest.raises(ProgramError, match="support"):
        assert_guide_is_right(Spec((Part("z0", "half-cauchy", (40,)),), ("z0",), "faithful"), torch.float32)


def test_the_assertion_sees_a_guide_that_is_not_what_was_stored():
    observed, covariates = data_of(EVERYTHING, torch.float32)
    guide = amortize(Random(EVERYTHING), observed, covariates=covariates)
    with torch.no_grad():
        run = guide_trace(guide, observed, SIZE, covariates)
    guide.heads[0].register_buffer("width", 2 * guide.heads[0].width, persistent=False)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_stored(guide, run, observed, covariates)
