"""Programs whose posteriors are hard to sample and yet known for each of eight data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from agreement import Array, Truth, from_grid, from_scipy, known
from pyro.distributions import constraints
from pyro.distributions.transforms import OrderedTransform
from scipy import special, stats

LEVELS = np.array([0.01, 0.5, 0.99])
SLOW = ("R-hat", "ESS")  # reasons for which chains that move slowly are refused
ILL = (*SLOW, "divergent", "E-BFMI")  # reasons for which chains that do not reach a narrow region are refused


@dataclass
class Case:
    """A program, eight data, and the truth about quantities that are computed from its draws.

    `reasons` are words of which one must appear in the reason for every refused datum.
    `at_least` is the number of data that have to pass. `looks` limits the number of runs per datum, which are long
    where trees are deep. `options` are those of `reference`.
    """

    program: Callable[..., Any]
    observed: dict[str, torch.Tensor]
    truth: dict[str, Truth]
    quantities: Callable[[xr.Dataset], Mapping[str, Any]]
    at_least: int = 8
    reasons: tuple[str, ...] = ()
    covariates: dict[str, torch.Tensor] = field(default_factory=dict)
    looks: int = 3
    options: dict[str, Any] = field(default_factory=dict)


def double(values: Any) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


def normal(mean: Any, sd: Any) -> Truth:
    return from_scipy(stats.norm(mean, sd), LEVELS)


def quantile_cells(count: int) -> Array:
    """Standard Normal values of cells of equal mass."""
    return stats.norm.ppf((np.arange(count) + 0.5) / count)


def mixed(log_scale: Array, log_weights: Array, mean: Array, sd: Array) -> Truth:
    """The truth of a Normal that is mixed over a grid of `log_scale`; arguments `(…, grid)`.

    Quantiles are found by bisection on the exact distribution function.
    """
    weights = special.softmax(log_weights, -1)
    centre = (weights * mean).sum(-1)
    spread = np.sqrt((weights * (sd**2 + mean**2)).sum(-1) - centre**2)
    found = []
    for level in LEVELS:
        low, high = centre - 1e9, centre + 1e9
        for _ in range(110):
            middle = 0.5 * (low + high)
            below = (weights * stats.norm.cdf((middle[..., None] - mean) / sd)).sum(-1) < level
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        found.append(0.5 * (low + high))
    return known(centre, spread, np.stack(found), LEVELS)


def without_moments(truth: Truth) -> Truth:
    """The quantiles alone, for tails that are too heavy for a standard error of the mean."""
    return known(truth.mean * np.nan, np.nan, truth.quantiles, LEVELS)


# -- funnels -----------------------------------------------------------------------------------------------------------

FUNNEL_SEEN = np.linspace(-4.0, 4.0, 8)


def funnel_truth(count: int) -> dict[str, Truth]:
    """v ~ N(0, 3²) is seen with noise of sd 3; the latents given v are N(0, exp(v))."""
    mean, sd = FUNNEL_SEEN / 2, 3 / np.sqrt(2)
    node = np.linspace(-9, 9, 4001)
    v = mean[:, None] + sd * node
    wide = mixed(v, -0.5 * node**2 + 0 * v, 0 * v, np.exp(v / 2))
    latents = np.repeat(wide.quantiles[..., None], count, -1)
    nothing = np.full(latents.shape[1:], np.nan)
    return {"v": normal(mean, sd), "z": known(nothing, np.nan, latents, LEVELS)}


def funnel(count: int = 9, centred: bool = True) -> Case:
    def program(size):
        with pyro.plate("data", size):
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            scale = (v / 2).exp()[:, None].expand(-1, count)
            if centred:
                pyro.sample("z", dist.Normal(0.0, scale).to_event(1))
            else:
                unit = pyro.sample("unit", dist.Normal(0.0, 1.0).expand([count]).to_event(1))
                pyro.deterministic("z", scale * unit)
            pyro.sample("x", dist.Normal(v, 3.0))

    return Case(
        program,
        {"x": double(FUNNEL_SEEN)},
        funnel_truth(count),
        lambda p: {"v": p["v"], "z": p["z"]},
        at_least=0 if centred else 8,
        reasons=ILL if centred else (),
        looks=1 if centred else 3,
    )


def funnel_with_a_scale() -> Case:
    """The centred form with a positive latent as the scale, which lets the sampler choose its coordinates."""

    def program(size):
        with pyro.plate("data", size):
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.5))
            pyro.sample("z", dist.Normal(0.0, scale[:, None].expand(-1, 9)).to_event(1))
            pyro.sample("x", dist.Normal(2 * scale.log(), 3.0))

    return Case(
        program, {"x": double(FUNNEL_SEEN)}, funnel_truth(9), lambda p: {"v": 2 * np.log(p["scale"]), "z": p["z"]}
    )


def variance_near_zero() -> Case:
    """Eight groups of eight means, which lie closer together than their noise explains, or just as close."""
    seen = np.random.default_rng(0).normal(size=(8, 8))
    seen *= np.linspace(0.05, 2.0, 8)[:, None] / seen.std(1, keepdims=True)

    def program(size):
        with pyro.plate("data", size):
            spread = pyro.sample("spread", dist.HalfCauchy(1.0))
            z = pyro.sample("z", dist.Normal(0.0, spread[:, None].expand(-1, 8)).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    log_spread = np.linspace(-25, 8, 6601)
    variance = np.exp(2 * log_spread)
    energy = np.square(seen).sum(1)[:, None]
    weight = log_spread - np.log1p(variance) - 4 * np.log1p(variance) - 0.5 * energy / (1 + variance)
    share = variance / (1 + variance)
    z = mixed(log_spread, weight[:, None], share * seen[..., None], np.sqrt(share)[None, None] + 0 * seen[..., None])
    truth = {"log_spread": from_grid(log_spread, weight, LEVELS), "z": z}
    return Case(program, {"x": double(seen)}, truth, lambda p: {"log_spread": np.log(p["spread"]), "z": p["z"]})


# -- curved, long and narrow -------------------------------------------------------------------------------------------


def banana() -> Case:
    """The second latent is half the square of the first, up to a tenth of the length of the banana."""
    seen = np.linspace(-3.0, 3.0, 8)

    def program(size):
        with pyro.plate("data", size):
            a = pyro.sample("a", dist.Normal(0.0, 2.0))
            pyro.sample("b", dist.Normal(a**2 / 2, 1.0))
            pyro.sample("x", dist.Normal(a, 2.0))

    mean, sd = seen / 2, np.sqrt(2.0)
    node = np.linspace(-8, 8, 4001)
    a = mean[:, None] + sd * node
    b = mixed(a, -0.5 * node**2 + 0 * a, a**2 / 2, 1 + 0 * a)
    truth = {"a": normal(mean, sd), "b": b}
    return Case(program, {"x": double(seen)}, truth, lambda p: {"a": p["a"], "b": p["b"]}, 0, ILL, looks=2)


def donut() -> Case:
    """The distance from the origin is seen, and the direction is not."""
    seen = np.linspace(0.5, 4.0, 8)

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.norm(dim=-1), 0.25))

    radius = np.linspace(1e-4, 6, 3001)
    weight = np.log(radius) - radius**2 / 18 - 0.5 * ((seen[:, None] - radius) / 0.25) ** 2
    turn = (np.arange(720) + 0.5) / 360 * np.pi
    inside = weight > weight.max(1, keepdims=True) - 40
    along = []
    for row, kept in zip(weight, inside, strict=True):
        z = radius[kept][:, None] * np.cos(turn)
        along.append(from_grid(z.reshape(-1), np.broadcast_to(row[kept][:, None], z.shape).reshape(-1), LEVELS))
    both = [np.repeat(np.stack([getattr(t, name) for t in along], -1)[..., None], 2, -1) for name in ("mean", "sd")]
    quantiles = np.repeat(np.stack([t.quantiles for t in along], -1)[..., None], 2, -1)
    truth = {"radius": from_grid(radius, weight, LEVELS), "z": known(0 * both[0], both[1], quantiles, LEVELS)}

    def quantities(p: xr.Dataset) -> Mapping[str, Any]:
        return {"radius": np.sqrt((p["z"] ** 2).sum(p["z"].dims[-1])), "z": p["z"]}

    return Case(program, {"x": double(seen)}, truth, quantities, 6, ILL)


def flat_normal(covariance: Array, **options: Any) -> Case:
    """Under a flat prior, the posterior is Normal around the data with the covariance of the noise."""
    factor = double(np.linalg.cholesky(covariance))
    width = len(covariance)
    seen = np.random.default_rng(1).normal(size=(8, width))

    def program(size):
        with pyro.plate("data", size):
            flat = constraints.independent(constraints.real, 1)
            z = pyro.sample("z", dist.ImproperUniform(flat, (size,), (width,)))
            pyro.sample("x", dist.MultivariateNormal(z, scale_tril=factor.to(z)))

    truth = {"z": normal(seen, np.sqrt(np.diag(covariance)))}
    return Case(program, {"x": double(seen)}, truth, lambda p: {"z": p["z"]}, options=options)


def correlated() -> Case:
    """A dense metric, as the documentation says for few latents with strong correlations."""
    return flat_normal(np.array([[1.0, 0.999], [0.999, 1.0]]), dense=True)


def ill_conditioned() -> Case:
    """100 dimensions, variances from 1 to 10,000.

    Along random directions, a dense metric takes minutes to learn this.
    """
    case = flat_normal(np.diag(np.geomspace(1.0, 1e4, 100)), chains=4)
    return replace(case, at_least=3, reasons=SLOW, looks=1)


# -- heavy tails and modes ---------------------------------------------------------------------------------------------


def student(freedom: float) -> Case:
    """Under a flat prior, the posterior is the noise around the data; from scales of 0.01 to 100."""
    seen, scale = np.linspace(-30.0, 30.0, 8), np.geomspace(0.01, 100.0, 8)

    def program(size, scale):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (size,), ()))
            pyro.sample("x", dist.StudentT(freedom, z, scale))

    truth = without_moments(from_scipy(stats.t(freedom, seen, scale), LEVELS))
    return Case(
        program,
        {"x": double(seen)},
        {"z": truth},
        lambda p: {"z": p["z"]},
        at_least=0,
        reasons=ILL,
        covariates={"scale": double(scale)},
        looks=1 if freedom == 1 else 3,
        options={"chains": 4} if freedom == 1 else {},
    )


def two_modes() -> Case:
    """90% around the datum, and 10% six standard deviations below."""
    seen = np.linspace(-5.0, 5.0, 8)

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.ImproperUniform(constraints.real, (size,), ()))
            halves = dist.Categorical(torch.tensor([0.9, 0.1]).to(z))
            pyro.sample("x", dist.MixtureSameFamily(halves, dist.Normal(torch.stack([z, z + 6], -1), 1.0)))

    grid = seen[:, None] + np.linspace(-15, 9, 24_001)
    log_density = np.logaddexp(
        np.log(0.9) - 0.5 * (grid - seen[:, None]) ** 2, np.log(0.1) - 0.5 * (grid - seen[:, None] + 6) ** 2
    )
    truth = {"z": from_grid(grid, log_density, LEVELS)}
    return Case(
        program,
        {"x": double(seen)},
        truth,
        lambda p: {"z": p["z"]},
        4,
        ILL,
        options={"chains": 4, "warmup": 500, "starts": 128},  # 32 starts miss a mode of 10% for one datum of thirty
    )


# -- next to bounds ----------------------------------------------------------------------------------------------------


def log_odds_of_beta(a: Any, b: Any) -> Truth:
    """The log odds of a Beta variable, exactly in both tails."""
    a, b = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    found = []
    for level in LEVELS:
        low, high = stats.beta.ppf(level, a, b), stats.beta.ppf(1 - level, b, a)
        found.append(np.where(low < 0.5, special.logit(low), -special.logit(high)))
    mean = special.digamma(a) - special.digamma(b)
    return known(mean, np.sqrt(special.polygamma(1, a) + special.polygamma(1, b)), np.stack(found), LEVELS)


def beta() -> Case:
    """A Beta(.1, .1) prior, with no trial, one trial, or many; where all succeed, numbers next to 1 are missing."""
    trials = np.array([0.0, 1.0, 1.0, 10.0, 10.0, 10.0, 30.0, 100.0])
    hits = np.array([0.0, 0.0, 1.0, 0.0, 1.0, 10.0, 15.0, 99.0])

    def program(size, trials):
        with pyro.plate("data", size):
            p = pyro.sample("p", dist.Beta(0.1, 0.1))
            pyro.sample("x", dist.Binomial(trials, p))

    return Case(
        program,
        {"x": double(hits)},
        {"log_odds": log_odds_of_beta(0.1 + hits, 0.1 + trials - hits)},
        lambda p: {"log_odds": special.logit(p["p"])},
        at_least=5,
        reasons=("closer to the edge of its support",),
        covariates={"trials": double(trials)},
    )


def dirichlet() -> Case:
    """Concentrations of .1 in a corner, on an edge, or together with larger ones."""
    more = np.array(
        [[0] * 4, [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [5, 0, 0, 0], [3, 0, 3, 0], [1] * 4, [50, 1, 0, 9]]
    )

    def program(size, concentration):
        with pyro.plate("data", size):
            pyro.sample("w", dist.Dirichlet(concentration))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([size]))

    def quantities(p: xr.Dataset) -> Mapping[str, Any]:
        w = p["w"].values.astype(np.float64)
        rest = np.stack([np.delete(w, i, -1).sum(-1) for i in range(4)], -1)
        return {"log_odds": np.log(w) - np.log(rest)}

    concentration = 0.1 + more
    rest = concentration.sum(1, keepdims=True) - concentration
    return Case(
        program,
        {"x": torch.zeros(8)},
        {"log_odds": log_odds_of_beta(concentration, rest)},
        quantities,
        covariates={"concentration": double(concentration)},
    )


def ordered_by_transform() -> Case:
    """An ordered vector made from Normals, which are seen with noise of sd 1."""
    seen = np.random.default_rng(3).normal(size=(8, 4)) * 3

    def program(size):
        with pyro.plate("data", size):
            base = dist.Normal(0.0, 2.0).expand([size, 4]).to_event(1)
            z = pyro.sample("z", dist.TransformedDistribution(base, [OrderedTransform()]))
            unit = torch.cat([z[:, :1], z.diff(dim=-1).log()], -1)
            pyro.sample("x", dist.Normal(unit, 1.0).to_event(1))

    def quantities(p: xr.Dataset) -> Mapping[str, Any]:
        z = p["z"].values.astype(np.float64)
        return {"unit": np.concatenate([z[..., :1], np.log(np.diff(z, axis=-1))], -1)}

    return Case(program, {"x": double(seen)}, {"unit": normal(0.8 * seen, np.sqrt(0.8))}, quantities)


def order_statistics() -> Case:
    """A flat prior on ordered vectors: the posterior is that of five sorted independent Normals."""
    seen = np.linspace(-10.0, 10.0, 8)

    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.ImproperUniform(constraints.ordered_vector, (size,), (5,)))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1))

    rank = np.arange(1, 6)[:, None]
    quantiles = stats.norm.ppf(stats.beta.ppf(LEVELS, rank, 6 - rank))
    level = (np.arange(200_000) + 0.5) / 200_000
    unit = stats.norm.ppf(level)
    truth = from_grid(unit, stats.beta.logpdf(level, rank, 6 - rank), LEVELS)
    return Case(
        program,
        {"x": double(np.repeat(seen[:, None], 5, 1))},
        {"z": known(truth.mean + seen[:, None], truth.sd, quantiles.T[:, None] + seen[:, None], LEVELS)},
        lambda p: {"z": p["z"]},
    )


def correlations() -> Case:
    """Cholesky factors of 3 × 3 correlation matrices, from nearly singular to nearly the identity.

    At sharpness .1, a partial correlation is Beta(.1, .1) on (−1, 1), which is refused.
    """
    sharpness = np.geomspace(0.1, 30.0, 8)

    def program(size, sharpness):
        with pyro.plate("data", size):
            pyro.sample("factor", dist.LKJCholesky(3, sharpness))
            pyro.sample("x", dist.Normal(0.0, 1.0).expand([size]))

    def quantities(p: xr.Dataset) -> Mapping[str, Any]:
        factor = p["factor"].values.astype(np.float64)
        matrix = factor @ np.swapaxes(factor, -1, -2)
        above = np.stack([matrix[..., 1, 0], matrix[..., 2, 0], matrix[..., 2, 1]], -1)
        return {"twice_artanh": np.log1p(above) - np.log1p(-above)}

    half = np.repeat((sharpness + 0.5)[:, None], 3, 1)
    return Case(
        program,
        {"x": torch.zeros(8)},
        {"twice_artanh": log_odds_of_beta(half, half)},
        quantities,
        at_least=7,
        reasons=("closer to the edge of its support",),
        covariates={"sharpness": double(sharpness)},
    )


CASES: dict[str, Callable[[], Case]] = {
    "funnel": lambda: funnel(centred=False),
    "centred funnel": funnel,
    "centred funnel with a scale": funnel_with_a_scale,
    "variance near zero": variance_near_zero,
    "banana": banana,
    "donut": donut,
    "correlation .999": correlated,
    "condition number 1e4": ill_conditioned,
    "t with 1 degree of freedom": lambda: student(1.0),
    "t with 2 degrees of freedom": lambda: student(2.0),
    "two modes": two_modes,
    "Beta(.1, .1)": beta,
    "Dirichlet corner": dirichlet,
    "ordered by a transform": ordered_by_transform,
    "order statistics": order_statistics,
    "LKJ": correlations,
}
