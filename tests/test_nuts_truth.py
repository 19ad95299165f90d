"""Batched NUTS on posteriors that are known: closed forms, quadrature, enumeration, and the library's exact method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import Truth, assert_agrees, from_draws, from_grid, from_scipy, known
from pyro.distributions import constraints
from scipy import special, stats
from small_models import build

import calibrant as cal

P = np.array([0.05, 0.5, 0.95])

SHORT = {"chains": 16, "warmup": 300, "draws": 500, "compile": False}  # few lanes cost as much as one


def as_they_are(posterior: xr.Dataset) -> Mapping[str, Any]:
    """The quantities compared are the sites."""
    return posterior


@dataclass
class Case:
    """A program, data, and what is known of quantities computed from its draws."""

    program: Callable[..., Any]
    observed: dict[str, torch.Tensor]
    truth: dict[str, Truth]
    quantities: Callable[[xr.Dataset], Mapping[str, Any]] = as_they_are
    covariates: dict[str, torch.Tensor] = field(default_factory=dict)


def data(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def log_normal_density(x: Any, mean: Any, sd: Any) -> np.ndarray:
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd)


# -- one latent a datum ------------------------------------------------------------------------------------------------


def skewed() -> Case:
    """With u = exp(−z), the posterior of u is Gamma(2, 1 + x)."""
    x = data([0.1, 1.0, 8.0])

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Gumbel(0.0, 1.0))
            pyro.sample("x", dist.Exponential((-z).exp()))

    quantiles = -np.log(stats.gamma(2.0).ppf(1 - P)[:, None] / (1 + x.numpy()))
    mean = np.log(1 + x.numpy()) - special.digamma(2.0)
    return Case(program, {"x": x}, {"z": known(mean, np.sqrt(special.polygamma(1, 2.0)), quantiles)})


def exponential_normal() -> Case:
    """A Normal cut off at zero."""
    x = data([-0.7, 0.4, 3.0])

    def program(size):
        with pyro.plate("data", size):
            a = pyro.sample("a", dist.Exponential(1.0))
            pyro.sample("x", dist.Normal(a, 0.5))

    mean = x.numpy() - 0.25
    return Case(program, {"x": x}, {"a": from_scipy(stats.truncnorm(-mean / 0.5, np.inf, mean, 0.5))})


def gamma_poisson() -> Case:
    x = data([[0, 0, 0], [3, 1, 2], [9, 14, 7]])

    def program(size):
        with pyro.plate("data", size):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            pyro.sample("x", dist.Poisson(rate[:, None].expand(-1, 3)).to_event(1))

    posterior = stats.gamma(2.0 + x.sum(1).numpy(), scale=1 / 3.5)
    return Case(program, {"x": x}, {"rate": from_scipy(posterior)})


def beta_binomial() -> Case:
    x = data([0.0, 4.0, 10.0])

    def program(size):
        with pyro.plate("data", size):
            p = pyro.sample("p", dist.Beta(2.0, 3.0))
            pyro.sample("x", dist.Binomial(10, p))

    return Case(program, {"x": x}, {"p": from_scipy(stats.beta(2 + x.numpy(), 13 - x.numpy()))})


def uniform_normal() -> Case:
    """A Normal cut off at both sides."""
    x = data([-2.0, 0.5, 2.5])

    def program(size):
        with pyro.plate("data", size):
            u = pyro.sample("u", dist.Uniform(-1.0, 2.0))
            pyro.sample("x", dist.Normal(u, 1.0))

    return Case(program, {"x": x}, {"u": from_scipy(stats.truncnorm(-1 - x.numpy(), 2 - x.numpy(), x.numpy()))})


def dirichlet_multinomial() -> Case:
    x = data([[0, 2, 10], [4, 4, 4]])

    def program(size):
        with pyro.plate("data", size):
            w = pyro.sample("w", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            pyro.sample("x", dist.Multinomial(12, w))

    after = x.numpy() + np.array([1.0, 2.0, 3.0])
    return Case(program, {"x": x}, {"w": from_scipy(stats.beta(after, after.sum(1, keepdims=True) - after))})


def improper() -> Case:
    """Flat priors on the plane and on the half-line."""
    x, count = data([[0.0, 5.0], [-300.0, 1.0]]), data([0.0, 7.0])

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.ImproperUniform(constraints.independent(constraints.real, 1), (size,), (2,)))
            rate = pyro.sample("rate", dist.ImproperUniform(constraints.positive, (size,), ()))
            pyro.sample("x", dist.Normal(z, 2.0).to_event(1))
            pyro.sample("count", dist.Poisson(rate))

    truth = {"z": from_scipy(stats.norm(x.numpy(), 2.0)), "rate": from_scipy(stats.gamma(count.numpy() + 1))}
    return Case(program, {"x": x, "count": count}, truth)


def several_supports() -> Case:
    """A positive latent, one in an interval and a simplex in one program, each with data of its own."""
    counts, heads, votes = data([[3, 1, 2], [9, 14, 7]]), data([4.0, 10.0]), data([[0, 2, 10], [4, 4, 4]])

    def program(size):
        with pyro.plate("data", size):
            rate = pyro.sample("rate", dist.Gamma(2.0, 0.5))
            p = pyro.sample("p", dist.Beta(2.0, 3.0))
            w = pyro.sample("w", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
            pyro.sample("counts", dist.Poisson(rate[:, None].expand(-1, 3)).to_event(1))
            pyro.sample("heads", dist.Binomial(10, p))
            pyro.sample("votes", dist.Multinomial(12, w))

    after = votes.numpy() + np.array([1.0, 2.0, 3.0])
    truth = {
        "rate": from_scipy(stats.gamma(2.0 + counts.sum(1).numpy(), scale=1 / 3.5)),
        "p": from_scipy(stats.beta(2 + heads.numpy(), 13 - heads.numpy())),
        "w": from_scipy(stats.beta(after, after.sum(1, keepdims=True) - after)),
    }
    return Case(program, {"counts": counts, "heads": heads, "votes": votes}, truth)


# -- circle and sphere -------------------------------------------------------------------------------------------------


def circular() -> Case:
    """A von Mises prior is conjugate to the mean of von Mises data."""
    x = data([[0.3, -0.4], [3.0, -3.1], [1.5, -1.6]])

    def program(size):
        with pyro.plate("data", size):
            angle = pyro.sample("angle", dist.VonMises(0.5, 1.0))
            pyro.sample("x", dist.VonMises(angle[:, None].expand(-1, 2), 2.0).to_event(1))

    pull = np.exp(0.5j) + 2 * np.exp(1j * x.numpy()).sum(1)
    turn = (np.arange(40_000) + 0.5) / 40_000 * 2 * np.pi
    log_density = (pull[:, None] * np.exp(-1j * turn)).real
    truth = {name: from_grid(part(turn), log_density) for name, part in (("cos", np.cos), ("sin", np.sin))}
    np.testing.assert_allclose(  # the closed form of the mean direction
        truth["cos"].mean + 1j * truth["sin"].mean, pull * special.i1(abs(pull)) / (abs(pull) * special.i0(abs(pull)))
    )
    return Case(program, {"x": x}, truth, lambda p: {"cos": np.cos(p["angle"]), "sin": np.sin(p["angle"])})


def spherical() -> Case:
    """A projected Normal prior; on the sphere, Normal data tilt it as a von Mises–Fisher density would."""
    x, towards = data([[0.5, -0.2, 1.0], [0.0, 0.0, -2.0]]), [0.3, 1.0, -0.5]

    def program(size):
        with pyro.plate("data", size):
            u = pyro.sample("u", dist.ProjectedNormal(torch.tensor(towards)))
            pyro.sample("x", dist.Normal(u, 0.7).to_event(1))

    height, turn = np.meshgrid((np.arange(300) + 0.5) / 150 - 1, (np.arange(600) + 0.5) / 300 * np.pi, indexing="ij")
    flat = np.sqrt(1 - height**2)  # cells of equal area, by Archimedes
    points = np.stack([flat * np.cos(turn), flat * np.sin(turn), height]).reshape(3, -1)
    prior = dist.ProjectedNormal(data(towards)).log_prob(data(points.T)).numpy()
    log_density = prior + x.numpy() @ points / 0.49
    return Case(program, {"x": x}, {"u": from_grid(points, log_density[:, None])})


def on_a_circle() -> Case:
    """The same in the plane, two directions a datum."""
    x, towards = data([[[1.0, 0.2], [-0.5, 0.0]], [[0.0, -2.0], [0.1, 0.1]]]), [0.5, 0.8]

    def program(size):
        with pyro.plate("data", size):
            u = pyro.sample("u", dist.ProjectedNormal(torch.tensor(towards)).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(u, 0.7).to_event(2))

    turn = (np.arange(40_000) + 0.5) / 20_000 * np.pi
    points = np.stack([np.cos(turn), np.sin(turn)])
    prior = dist.ProjectedNormal(data(towards)).log_prob(data(points.T)).numpy()
    log_density = prior + x.numpy() @ points / 0.49
    return Case(program, {"x": x}, {"u": from_grid(points, log_density[:, :, None])})


# -- several latents a datum -------------------------------------------------------------------------------------------


def correlated() -> Case:
    """Correlation .99 in the prior, hardly less in the posterior."""
    x, prior = data([[0.0, 0.0], [3.0, -3.0]]), [[1.0, 0.99], [0.99, 1.0]]

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), torch.tensor(prior)))
            pyro.sample("x", dist.Normal(z, 3.0).to_event(1))

    covariance = np.linalg.inv(np.linalg.inv(prior) + np.eye(2) / 9)
    marginal = stats.norm(x.numpy() @ covariance / 9, np.sqrt(np.diag(covariance)))
    return Case(program, {"x": x}, {"z": from_scipy(marginal)})


def shares_of_a_product() -> np.ndarray:
    """Quantiles of s·z with log s ~ N(0, 1.5²), z ~ N(0, 1): its density is a mixture over s."""
    node, weight = np.polynomial.hermite_e.hermegauss(200)
    upper = np.geomspace(1e-3, 1e3, 20_001)
    share = stats.norm.cdf(upper[:, None] / np.exp(1.5 * node)) @ (weight / weight.sum())
    return np.array([-np.interp(0.95, share, upper), 0.0, np.interp(0.95, share, upper)])


def funnel_truth(shape: tuple[int, ...]) -> dict[str, Truth]:
    product = shares_of_a_product().reshape(3, *[1] * len(shape)) + np.zeros(shape)
    return {
        "log_scale": from_scipy(stats.norm(np.zeros(shape[:1]), 1.5)),
        "unit": from_scipy(stats.norm(np.zeros(shape), 1.0)),
        "product": known(np.full(shape, np.nan), np.nan, product),  # its tails are too heavy for means
    }


def multiplied_funnel() -> Case:
    """Neal's funnel, the real latents multiplied by the scale; the data say nothing of it."""

    def program(size):
        with pyro.plate("data", size):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.5))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([9]).to_event(1))
            pyro.deterministic("product", scale[:, None] * z)
            pyro.sample("x", dist.Normal(0.0, 1.0))

    def quantities(p: xr.Dataset) -> Mapping[str, Any]:
        return {"log_scale": np.log(p["scale"]), "unit": p["z"], "product": p["product"]}

    return Case(program, {"x": torch.zeros(2)}, funnel_truth((2, 9)), quantities)


def centred_funnel() -> Case:
    """Neal's funnel as he wrote it: the scale is that of the latents' prior."""

    def program(size):
        with pyro.plate("data", size):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.5))
            pyro.sample("z", dist.Normal(0.0, scale[:, None].expand(-1, 9)).to_event(1))
            pyro.sample("x", dist.Normal(0.0, 1.0))

    def quantities(p: xr.Dataset) -> Mapping[str, Any]:
        return {"log_scale": np.log(p["scale"]), "unit": p["z"] / p["scale"], "product": p["z"]}

    return Case(program, {"x": torch.zeros(2)}, funnel_truth((2, 9)), quantities)


def strong_product() -> Case:
    """Data that know the product and not its factors; by quadrature over log s, z given s being Normal."""
    x = data([[0.5], [4.0], [40.0]])

    def program(size):
        with pyro.plate("data", size):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([1]).to_event(1))
            pyro.sample("x", dist.Normal(scale[:, None] * z, 0.2).to_event(1))

    log_scale = np.linspace(-8, 8, 1601)
    scale, spread = np.exp(log_scale), np.sqrt(0.04 + np.exp(2 * log_scale))
    weight = log_normal_density(log_scale, 0.0, 1.0) + log_normal_density(x.numpy(), 0.0, spread)
    gain, sd = scale / spread**2, 0.2 / spread
    unit = stats.norm.ppf((np.arange(201) + 0.5) / 201)  # z given s, in cells of equal mass
    z = gain[:, None] * x.numpy()[:, :, None] + sd[:, None] * unit
    joint = np.broadcast_to(weight[:, :, None], z.shape).reshape(3, -1)
    truth = {
        "log_scale": from_grid(log_scale, weight),
        "z": from_grid(z.reshape(3, 1, -1), joint[:, None]),
        "product": from_grid((scale[:, None] * z).reshape(3, 1, -1), joint[:, None]),
    }

    def quantities(p: xr.Dataset) -> Mapping[str, Any]:
        return {"log_scale": np.log(p["scale"]), "z": p["z"], "product": p["z"] * p["scale"]}

    return Case(program, {"x": x}, truth, quantities)


def registered(name: str) -> Case:
    """A model with an exact method; data weak, typical and strong."""
    model, observed = build(name, latents=4)
    exact = cal.inference.reference(model, observed, method="exact", draws=10_000)["posterior"].dataset
    return Case(model, observed, {name: from_draws(value.values) for name, value in exact.data_vars.items()})


# -- discrete latents --------------------------------------------------------------------------------------------------


def mixture() -> Case:
    """Three components, enumerated; given the component all is Normal."""
    x = data([-0.8, 0.6, 1.4, 2.2])
    share, centre = [0.3, 0.4, 0.3], [-1.0, 0.0, 2.0]

    def program(size):
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Categorical(torch.tensor(share)))
            z = pyro.sample("z", dist.Normal(torch.tensor(centre)[k], 0.7))
            pyro.sample("x", dist.Normal(z, 0.8))

    total = 0.7**2 + 0.8**2
    weight = np.log(share) + log_normal_density(x.numpy()[:, None], centre, np.sqrt(total))
    mean, sd = (0.8**2 * np.array(centre) + 0.7**2 * x.numpy()[:, None]) / total, 0.7 * 0.8 / np.sqrt(total)
    unit = stats.norm.ppf((np.arange(20_001) + 0.5) / 20_001)
    z = mean[..., None] + sd * unit
    log_weights = np.broadcast_to(weight[..., None], z.shape).reshape(4, -1)
    truth = {"z": from_grid(z.reshape(4, -1), log_weights), "k": known(special.softmax(weight, 1))}

    def quantities(p: xr.Dataset) -> Mapping[str, Any]:
        return {"z": p["z"], "k": np.stack([p["k"] == k for k in range(3)], -1)}

    return Case(program, {"x": x}, truth, quantities)


def switches() -> Case:
    """Three switches a datum, all eight settings enumerated, beside a discrete scale."""
    x, effect, noise = data([0.0, 1.2, 3.0]), [1.0, 2.0, -1.5], [0.5, 2.0]

    def program(size):
        with pyro.plate("data", size):
            on = pyro.sample("on", dist.Bernoulli(0.3).expand([3]).to_event(1))
            wide = pyro.sample("wide", dist.Bernoulli(0.4))
            z = pyro.sample("z", dist.Normal((on * torch.tensor(effect)).sum(-1), 1.0))
            pyro.sample("x", dist.Normal(z, torch.tensor(noise)[wide.long()]))

    setting = np.array(list(np.ndindex(2, 2, 2, 2)), dtype=float)
    centre, sd = setting[:, :3] @ effect, np.array(noise)[setting[:, 3].astype(int)]
    share = np.log(np.where(setting == 1, [0.3, 0.3, 0.3, 0.4], [0.7, 0.7, 0.7, 0.6])).sum(1)
    weight = share + log_normal_density(x.numpy()[:, None], centre, np.sqrt(1 + sd**2))
    posterior = special.softmax(weight, 1)
    mean, spread = (sd**2 * centre + x.numpy()[:, None]) / (1 + sd**2), sd / np.sqrt(1 + sd**2)
    unit = stats.norm.ppf((np.arange(5001) + 0.5) / 5001)
    z = mean[..., None] + spread[:, None] * unit
    log_weights = np.broadcast_to(weight[..., None], z.shape).reshape(3, -1)
    truth = {
        "z": from_grid(z.reshape(3, -1), log_weights),
        "on": known(posterior @ setting[:, :3]),
        "wide": known(posterior @ setting[:, 3]),
    }
    return Case(program, {"x": x}, truth)


# -- shared latents ----------------------------------------------------------------------------------------------------


def hierarchy() -> Case:
    """Normal means with a Normal centre: the joint posterior is one Gaussian."""
    x = data([0.3, -1.2, 0.8, 2.5])

    def program(size):
        centre = pyro.sample("centre", dist.Normal(1.0, 2.0))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(centre, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5))

    precision = np.diag([1 / 4 + 4, *[1 + 4.0] * 4])
    precision[0, 1:] = precision[1:, 0] = -1
    covariance = np.linalg.inv(precision)
    mean = covariance @ np.array([1 / 4, *(4 * x.numpy())])
    sd = np.sqrt(np.diag(covariance))
    return Case(
        program,
        {"x": x},
        {"centre": from_scipy(stats.norm(mean[0], sd[0])), "z": from_scipy(stats.norm(mean[1:], sd[1:]))},
    )


def hierarchical_scale() -> Case:
    """A shared scale of local means; by quadrature over its logarithm."""
    x = data([0.5, -3.0, 2.0, 4.0, -1.0])

    def program(size):
        spread = pyro.sample("spread", dist.HalfNormal(3.0))
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, spread))
            pyro.sample("x", dist.Normal(z, 1.0))

    log_spread = np.linspace(-9, 4, 2601)
    spread = np.exp(log_spread)
    total = np.sqrt(1 + spread**2)
    weight = log_spread - spread**2 / 18 + log_normal_density(x.numpy()[:, None], 0.0, total).sum(0)
    unit = stats.norm.ppf((np.arange(201) + 0.5) / 201)
    share, sd = spread**2 / total**2, spread / total
    z = share[:, None] * x.numpy()[:, None, None] + sd[:, None] * unit
    joint = np.broadcast_to(weight[:, None], z.shape[1:]).reshape(-1)
    return Case(program, {"x": x}, {"spread": from_grid(spread, weight), "z": from_grid(z.reshape(5, -1), joint)})


def shared_centre_of_components() -> Case:
    """A shared centre, and a class for every datum: enumerated, by quadrature over the centre."""
    x = data([-0.4, 0.2, 2.5, 3.1, 1.6])

    def program(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 2.0))
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(centre + 3 * k, 1.0))

    centre = np.linspace(-8, 8, 8001)
    by_class = np.stack([log_normal_density(x.numpy()[:, None], centre + 3 * k, 1.0) for k in (0, 1)])
    by_class += np.log([0.6, 0.4])[:, None, None]
    weight = log_normal_density(centre, 0.0, 2.0) + special.logsumexp(by_class, 0).sum(0)
    second = special.softmax(by_class, 0)[1] @ special.softmax(weight)
    return Case(program, {"x": x}, {"centre": from_grid(centre, weight), "k": known(second)})


CASES = {
    "skewed": skewed,
    "exponential-normal": exponential_normal,
    "gamma-poisson": gamma_poisson,
    "beta-binomial": beta_binomial,
    "uniform-normal": uniform_normal,
    "dirichlet-multinomial": dirichlet_multinomial,
    "improper": improper,
    "several supports": several_supports,
    "circular": circular,
    "spherical": spherical,
    "on a circle": on_a_circle,
    "correlated": correlated,
    "multiplied funnel": multiplied_funnel,
    "centred funnel": centred_funnel,
    "strong product": strong_product,
    "ppca": lambda: registered("ppca"),
    "gsm": lambda: registered("gsm"),
    "ea-vae": lambda: registered("ea-vae"),
    "mixture": mixture,
    "switches": switches,
    "hierarchy": hierarchy,
    "hierarchical scale": hierarchical_scale,
    "shared centre of components": shared_centre_of_components,
}


QUICK = ("several supports", "shared centre of components")  # local, shared and discrete
TRUTH = ("gamma-poisson", "improper", "mixture")


def mark(name: str) -> list[pytest.MarkDecorator]:
    return [] if name in QUICK else [pytest.mark.truth if name in TRUTH else pytest.mark.slow]


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark(name)) for name in CASES])
def test_posterior_is_the_known_one(name: str) -> None:
    case = CASES[name]()
    tree = cal.inference.reference(case.program, case.observed, method="nuts", seed=1, **SHORT)
    convergence = tree["convergence"].dataset
    assert bool(convergence["is_reference"].all()), convergence["reason"].values
    assert_agrees(case.quantities(tree["posterior"].dataset), case.truth)
