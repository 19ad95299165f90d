"""The sites of a program and their dependencies."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import calibrant as cal
from calibrant.program import check_program, sites, trace
from calibrant.program.tracing import deterministic, sampled

X = torch.tensor([0.3, -1.2, 0.8])

# -- dependencies ------------------------------------------------------------------------------------------------------


def local(name: str, loc: Tensor | float, scale: Tensor | float = 1.0) -> Tensor:
    return pyro.sample(name, dist.Normal(loc, scale))


def chain(size):
    with pyro.plate("data", size):
        local("x", local("b", local("a", 0.0)))


def fork(size):
    with pyro.plate("data", size):
        a = local("a", 0.0)
        local("b", a)
        local("x", a)


def collider(size):
    with pyro.plate("data", size):
        a, b = local("a", 0.0), local("b", 0.0)
        c = local("c", a * b)
        local("x", c)


def in_place(size):
    with pyro.plate("data", size):
        a, b = local("a", 0.0), local("b", 0.0)
        mean = torch.zeros(size, 2)
        mean[:, 0] = a
        mean[:, 1] += b
        local("x", mean.sum(-1))


def copied_into(size):
    with pyro.plate("data", size):
        a = local("a", 0.0)
        mean = torch.empty(size)
        mean.copy_(a)
        local("x", mean)


def through_detach(size):
    with pyro.plate("data", size):
        local("x", local("a", 0.0).detach())


def through_data(size):
    with pyro.plate("data", size):
        local("x", local("a", 0.0).data.clone())


def through_numpy(size):
    with pyro.plate("data", size):
        a = local("a", 0.0)
        local("x", torch.tensor([float(entry) for entry in a]))


def through_where(size):
    with pyro.plate("data", size):
        local("x", torch.where(local("a", 0.0) > 0, 1.0, -1.0))


def through_index(size):
    with pyro.plate("data", size):
        k = pyro.sample("a", dist.Categorical(torch.ones(4)))
        local("x", torch.arange(4.0)[k])


def through_scale(size):
    with pyro.plate("data", size):
        local("x", 0.0, local("a", 0.0).exp())


def through_mask(size):
    with pyro.plate("data", size):
        a = local("a", 0.0)
        with poutine.mask(mask=a > 0):
            local("x", 0.0)


def through_scale_of_the_site(size):
    with pyro.plate("data", size):
        a = local("a", 0.0)
        with poutine.scale(scale=a.exp()):
            local("x", 0.0)


def through_deterministic(size):
    with pyro.plate("data", size):
        local("x", pyro.deterministic("m", 2 * local("a", 0.0)))


def through_a_factor(size):
    with pyro.plate("data", size):
        a = local("a", 0.0)
        pyro.factor("f", -a.square())
        local("x", 0.0)


def weakly(size):
    with pyro.plate("data", size):
        mean = torch.full((size,), 1000.0)
        mean += 1e-9 * local("a", 0.0)
        local("x", mean)


def one_entry(size):
    with pyro.plate("data", size):
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand([5]).to_event(1))
        mean = torch.zeros(size)
        mean += a[:, 3]
        local("x", mean)


def cancelled(size):
    with pyro.plate("data", size):
        a = local("a", 0.0)
        b = local("b", a)
        local("x", a + (b - a))


def shared_parent(size):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("groups", 2):
        b = pyro.sample("b", dist.Normal(a, 1.0))
    mean = torch.zeros(2)
    mean[0] = b[0]
    with pyro.plate("data", size):
        c = local("c", mean.sum())
        local("x", c)


def to_a_truncated_support(size):
    """Moved alone, `a` may put `b` where its density is zero: −∞ is an answer, too."""
    with pyro.plate("data", size):
        a = pyro.sample("a", dist.Beta(2.0, 2.0))
        b = pyro.sample("b", dist.Exponential(a + 0.5))
        local("x", b)


GRAPHS: dict[str, tuple[Callable, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]]] = {
    "chain": (chain, {"a": ((), ("b",)), "b": (("a",), ("x",))}),
    "fork": (fork, {"a": ((), ("b", "x")), "b": (("a",), ())}),
    "collider": (collider, {"a": ((), ("c",)), "b": ((), ("c",)), "c": (("a", "b"), ("x",))}),
    "in place": (in_place, {"a": ((), ("x",)), "b": ((), ("x",))}),
    "factor": (through_a_factor, {"a": ((), ("f",))}),
    "cancelled": (cancelled, {"a": ((), ("b", "x")), "b": (("a",), ("x",))}),
    "shared": (shared_parent, {"a": ((), ("b",)), "b": (("a",), ("c",)), "c": (("b",), ("x",))}),
    "support": (to_a_truncated_support, {"a": ((), ("b",)), "b": (("a",), ("x",))}),
    **{
        program.__name__: (program, {"a": ((), ("x",))})
        for program in (
            copied_into,
            through_detach,
            through_data,
            through_numpy,
            through_where,
            through_index,
            through_scale,
            through_mask,
            through_scale_of_the_site,
            through_deterministic,
            weakly,
            one_entry,
        )
    },
}


DATA = {"zeros": torch.zeros(3), "three data": X, "one datum": X[:1]}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        *((name, "three data") for name in GRAPHS),
        *((name, data) for name in ("collider", "in place", "cancelled", "shared") for data in ("zeros", "one datum")),
    ],
)
def test_known_graphs(name, data):
    (program, wanted), x = GRAPHS[name], DATA[data]
    found = sites(program, {"x": x})
    if program is cancelled:  # it cancels in numbers, and Pyro still sees it: seen by either counts
        assert found["a"].children in (("b",), ("b", "x"))
        return
    assert {name: (site.parents, site.children) for name, site in found.items()} == wanted


FAMILIES: dict[str, Callable[[Tensor], dist.Distribution]] = {
    "asymmetric-laplace": lambda a: dist.AsymmetricLaplace(a, 1.0, 1.0),
    "beta": lambda a: dist.Beta(a.exp(), 1.0),
    "beta-binomial": lambda a: dist.BetaBinomial(a.exp(), 1.0, 3),
    "categorical": lambda a: dist.Categorical(logits=torch.stack([a, -a], -1)),
    "cauchy": lambda a: dist.Cauchy(a, 1.0),
    "continuous-bernoulli": lambda a: dist.ContinuousBernoulli(logits=a),
    "dirichlet": lambda a: dist.Dirichlet(a.exp()[:, None].expand(-1, 3)),
    "exponential": lambda a: dist.Exponential(a.exp()),
    "gamma-poisson": lambda a: dist.GammaPoisson(a.exp(), 1.0),
    "gumbel": lambda a: dist.Gumbel(a, 1.0),
    "half-cauchy": lambda a: dist.HalfCauchy(a.exp()),
    "inverse-gamma": lambda a: dist.InverseGamma(a.exp(), 1.0),
    "kumaraswamy": lambda a: dist.Kumaraswamy(a.exp(), 1.0),
    "laplace": lambda a: dist.Laplace(a[:, None].expand(-1, 3), 1.0).to_event(1),
    "lkj": lambda a: dist.LKJCholesky(3, a.exp()),
    "logistic-normal": lambda a: dist.LogisticNormal(a[:, None].expand(-1, 2), torch.ones(2)),
    "low-rank": lambda a: dist.LowRankMultivariateNormal(a[:, None].expand(-1, 2), torch.ones(2, 1), torch.ones(2)),
    "mixture": lambda a: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.stack([a, -a], -1), 1.0)
    ),
    "multivariate-t": lambda a: dist.MultivariateStudentT(4.0, a[:, None].expand(-1, 2), torch.eye(2)),
    "one-hot": lambda a: dist.OneHotCategorical(logits=torch.stack([a, -a], -1)),
    "pareto": lambda a: dist.Pareto(1.0, a.exp()),
    "projected-normal": lambda a: dist.ProjectedNormal(a[:, None].expand(-1, 2) + 1),
    "relaxed-bernoulli": lambda a: dist.RelaxedBernoulli(torch.tensor(0.5), logits=a),
    "softplus-normal": lambda a: dist.TransformedDistribution(
        dist.Normal(a, 1.0), [dist.transforms.SoftplusTransform()]
    ),
    "stable": lambda a: dist.Stable(1.5, 0.0, a.exp(), a),
    "student-t": lambda a: dist.StudentT(3.0, a, 1.0),
    "weibull": lambda a: dist.Weibull(a.exp(), 1.0),
    "zero-inflated": lambda a: dist.ZeroInflatedPoisson(rate=a.exp(), gate=torch.tensor(0.3)),
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_family_keeps_the_contract_and_shows_its_parents(family):
    def program(size):
        with pyro.plate("data", size):
            a = local("a", 0.0)
            z = pyro.sample("z", family(a))
            local("x", z.to(a.dtype).reshape(size, -1).mean(-1))

    check_program(program, {"x": X})
    found = sites(program, {"x": X})
    assert {name: (site.parents, site.children) for name, site in found.items()} == {
        "a": ((), ("z",)),
        "z": (("a",), ("x",)),
    }


def test_what_a_site_is():
    def program(size, top):
        w = pyro.sample("w", dist.Gamma(2.0, 1.0).expand([4]).to_event(1))
        with pyro.plate("data", size):
            u = pyro.sample("u", dist.Uniform(torch.zeros(size), top))
            v = pyro.sample("v", dist.Dirichlet(torch.ones(3)).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(w.sum() + u + v.sum((-1, -2)), 1.0))

    found = sites(program, {"x": X}, {"top": torch.tensor([1.0, 2.0, 3.0])})
    assert {name: tuple(site.event_shape) for name, site in found.items()} == {"w": (4,), "u": (), "v": (2, 3)}
    assert {name: site.local for name, site in found.items()} == {"w": False, "u": True, "v": True}
    assert found["u"].support.upper_bound[:3].tolist() == [1.0, 2.0, 3.0]
    assert isinstance(found["w"].prior.base_dist, dist.Gamma)
    assert found["v"].support.event_dim == 2


def test_latents_depend_on_which_sites_are_observed():
    def program(size):
        with pyro.plate("data", size):
            z = local("z", 0.0)
            local("x", z)
            local("y", z)

    assert list(sites(program, {"x": X})) == ["z", "y"]
    assert list(sites(program, {"x": X, "y": X})) == ["z"]
    assert sites(program, {"z": X})["x"].parents == ()


@pytest.mark.parametrize("name", ["ea-vae", "gsm", "ppca", "vae"])
def test_sites_of_the_models_of_images(name):
    model = cal.models.create(name, shape=(1, 8, 8), latents=3)
    latent = sites(model, {"x": torch.randn(4, 1, 8, 8)})
    assert all(site.local and "x" in site.children for site in latent.values())


def test_sampled_leaves_out_what_is_no_sample():
    def program(size):
        with pyro.plate("data", size):
            z = local("z", 0.0)
            pyro.deterministic("m", z)
            pyro.factor("f", z)
            local("x", z)

    run = trace(program, 3, {}, {"x": X})
    assert list(sampled(run)) == ["z", "x"]
    assert list(deterministic(run)) == ["m"]
