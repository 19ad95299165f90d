"""The split of log p(x) − ELBO, and the bridge that finds log p(x), where both are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from pyro.nn import PyroModule
from scipy.special import ndtr
from scipy.stats import gamma
from small_models import coin, coin_guide
from torch import Tensor
from torch.distributions.transforms import AffineTransform

import calibrant as cal
from calibrant.data import Data, as_data
from calibrant.errors import InferenceError, ProgramError
from calibrant.evaluation import gap
from calibrant.guides import refine
from calibrant.inference.bounds.evidence import Evidence, evidence, normal_log_ratios
from calibrant.inference.bridging import bridge
from calibrant.inference.trees import build_tree
from calibrant.program import as_program

DATA = 40


def worst(errors: np.ndarray, se: np.ndarray) -> float:
    """The largest |z|, over the limit for so many."""
    return float(np.abs(errors / se).max() / limit(errors.size))


# -- the bridge alone --------------------------------------------------------------------------------------------------


def chains(replicates: int, length: int, rho: float) -> np.ndarray:
    """Standard Normals `(replicate, 4, length)` with autocorrelation rho."""
    rng = np.random.default_rng(1)
    z = rng.standard_normal((replicates, 4, length))
    for t in range(1, length):
        z[..., t] = rho * z[..., t - 1] + math.sqrt(1 - rho**2) * z[..., t]
    return z


def ratio(z: np.ndarray, loc: float, scale: float) -> np.ndarray:
    """log of a standard Normal times e³ over a Normal."""
    return 3.0 - 0.5 * z**2 + 0.5 * ((z - loc) / scale) ** 2 + math.log(scale)


@pytest.mark.parametrize(("loc", "scale", "rho"), [(0.5, 1.3, 0.0), (0.0, 0.3, 0.5), (1.5, 0.6, 0.8)])
def test_the_bridge_is_as_far_off_as_it_says(loc, scale, rho):
    """400 replicates: mean and spread of z. The proposal's tails are lighter than the target's in two of three cases.

    A bias of a third of a standard error, and an error that is stated a sixth too small, are seen with 95% power.
    """
    z, q = chains(400, 200, rho), loc + scale * np.random.default_rng(2).standard_normal((400, 500))
    sides = ratio(z, loc, scale), ratio(q, loc, scale)
    found = bridge(*sides, independent=rho == 0.0)
    assert (found.overlap > 0.2).all()
    assert (found.se < 0.2).all()

    def misses(bridged, planted: float = 0.0) -> float:
        scores = (bridged.log_evidence + planted - 3.0) / bridged.se
        mean, square = scores.mean() * 20.0, ((scores**2).mean() - 1.0) / math.sqrt(2 / 400)
        return max(abs(mean), abs(square)) / limit(2)

    assert misses(found) < 1
    assert misses(found, planted=0.1) > 1
    if rho:
        assert misses(bridge(*sides, independent=True)) > 1
    np.testing.assert_allclose(found.influence.mean(1), 0, atol=1e-9)


def test_equal_densities_leave_no_error():
    found = bridge(np.full((2, 4, 100), -7.0), np.full((2, 50), -7.0))
    np.testing.assert_allclose(found.log_evidence, -7.0, atol=1e-9)
    np.testing.assert_allclose(found.se, 0.0, atol=1e-9)
    np.testing.assert_allclose(found.overlap, 1.0)


def test_draws_without_density_count_for_nothing():
    """A uniform proposal on (0, 4) for a Uniform(0, 1) posterior, and the other way round: +∞ and −∞."""
    inside = np.random.default_rng(0).random((20, 2000)) * 4 < 1
    wide = bridge(np.full((20, 4, 500), math.log(4.0)), np.where(inside, math.log(4.0), -np.inf))
    assert worst(wide.log_evidence, wide.se) < 1
    seen = np.random.default_rng(0).random((20, 4, 500)) * 4 < 1
    narrow = bridge(np.where(seen, -math.log(4.0), np.inf), np.full((20, 2000), -math.log(4.0)), independent=True)
    assert worst(narrow.log_evidence, narrow.se) < 1
    nothing = bridge(np.full((1, 4, 50), np.inf), np.zeros((1, 50)))
    assert np.isnan(nothing.log_evidence).all()
    assert not nothing.se[0] <= 1e9


# -- models with known evidence ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppca():
    """A posterior far from a product: columns at an angle, little noise."""
    built = cal.models.create("ppca", shape=(4,), latents=2)
    with torch.no_grad():
        built.decoder.directions.copy_(torch.tensor([[1.0, 0.8], [0.9, 1.0], [0.2, 0.4], [0.0, 0.3]]))
        built.likelihood.log_scale.fill_(math.log(0.4))
    return built.requires_grad_(False).eval()


class Known(PyroModule):
    """The best product of Normals for each datum, shifted by `shift` and stretched by `stretch` posterior sds."""

    precision: Tensor
    gain: Tensor
    bias: Tensor

    def __init__(self, model, shift=0.0, stretch=1.0):
        super().__init__()
        directions, variance = model.decoder.directions.double(), 0.4**2
        precision = torch.eye(2).double() + directions.T @ directions / variance
        self.register_buffer("precision", precision.float())
        self.register_buffer("gain", torch.linalg.solve(precision, directions.T / variance).float())
        self.register_buffer("bias", model.decoder.bias.detach().clone())
        self.shift, self.stretch = shift, stretch

    def forward(self, observed, size):
        sd = self.precision.diagonal().rsqrt()
        loc = (observed["x"] - self.bias) @ self.gain.T + self.shift * sd
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(loc, self.stretch * sd).to_event(1))

    def correlation(self) -> float:
        """KL of the best product: −½ log det of the precision's correlation matrix."""
        sd = self.precision.double().diagonal().rsqrt()
        return float(-0.5 * (sd[:, None] * self.precision.double() * sd).logdet())

    def divergence(self) -> float:
        """KL(q‖p) of Normals with one mean apart from a shift; q is a product."""
        precision = self.precision.double()
        variance = self.stretch**2 / precision.diagonal()
        offset = self.shift * precision.diagonal().rsqrt()
        inner = (precision.diagonal() * variance).sum() + offset @ precision @ offset
        return float(0.5 * (inner - 2 - precision.logdet() - variance.log().sum()))


@pytest.fixture(scope="module")
def observed(ppca):
    return {"x": cal.program.sample_prior(ppca, DATA, seed=1)["x"]}


@pytest.fixture(scope="module")
def reference(ppca, observed):
    return cal.inference.reference(ppca, observed, draws=500, seed=7)


def judged_by(tree: xr.DataTree, convergence: xr.Dataset) -> xr.DataTree:
    """The same draws with another group `convergence`."""
    groups = {n: g.to_dataset() for n, g in tree.children.items()} | {"convergence": convergence}
    return xr.DataTree.from_dict({f"/{name}": group for name, group in groups.items()})


def without_evidence(tree: xr.DataTree) -> xr.DataTree:
    """The same draws, as those of a method that does not know the evidence."""
    return judged_by(tree, tree["convergence"].to_dataset().drop_vars("log_evidence"))


def misses(result: xr.Dataset, wanted: dict[str, float], slack: float = 0.01) -> float:
    """How far the means over data are beyond the limit; refining may leave `slack` nats."""
    found = []
    for name, value in wanted.items():
        se = math.sqrt(float((result[f"{name}_se"] ** 2).sum())) / result.sizes["data"]
        found.append((abs(float(result[name].mean()) - value) - slack) / (limit(len(wanted)) * se))
    return max(found)


@pytest.mark.parametrize(
    ("method", "shift", "stretch"),
    [
        ("exact", 0.0, 1.0),
        ("bridge", 0.7, 1.4),
        pytest.param("exact", 0.7, 1.4, marks=pytest.mark.truth),
        pytest.param("bridge", 0.0, 1.0, marks=pytest.mark.truth),
    ],
)
def test_both_gaps_are_those_of_the_closed_form(ppca, observed, reference, shift, stretch, method):
    """The best product leaves approximation alone; a bias added to it is amortization."""
    guide, tree = Known(ppca, shift, stretch), reference
    result = gap(ppca, guide, observed, tree if method == "exact" else without_evidence(tree))
    best = guide.correlation()
    assert best == pytest.approx(Known(ppca).divergence(), abs=1e-5)
    assert best > 0.3
    wanted = {"approximation": best, "amortization": guide.divergence() - best, "gap": guide.divergence()}
    assert misses(result, wanted) < 1
    assert misses(result.assign(approximation=result["approximation"] + 0.1), wanted) > 1
    np.testing.assert_allclose(result["gap"], result["approximation"] + result["amortization"], atol=1e-9)
    assert (result["method"] == method).all()
    exact = cal.inference.log_evidence(ppca, observed).numpy()
    if method == "exact":
        np.testing.assert_allclose(result["log_evidence"], exact, atol=1e-9)
        assert (result["log_evidence_se"] == 0).all()
        convergence = tree["convergence"].to_dataset()
        off = judged_by(tree, convergence.assign(log_evidence=convergence["log_evidence"] + 0.1))
        assert misses(gap(ppca, guide, observed, off, steps=100), wanted) > 1
    else:
        assert worst(result["log_evidence"].values - exact, result["log_evidence_se"].values) < 1
        assert worst(result["log_evidence"].values + 0.1 - exact, result["log_evidence_se"].values) > 1


def test_without_refining_all_is_approximation(ppca, observed):
    """Planted: a guide that is never refined. The same noise on both sides makes the amortization gap zero."""
    guide = Known(ppca, 0.7, 1.4)
    result = gap(ppca, guide, observed, steps=0, draws=500)
    assert np.abs(result["amortization"]).max() < 1e-6
    assert misses(result, {"approximation": guide.correlation()}) > 1
    assert misses(result, {"approximation": guide.divergence()}) < 1


def test_scale_mixture_by_bridge():
    """gsm: a scale times Normals, under a fresh guide that has only been refined."""
    torch.manual_seed(3)
    model = cal.models.create("gsm", shape=(6,), latents=3).requires_grad_(False).eval()
    x = {"x": cal.program.sample_prior(model, 20, seed=1)["x"]}
    tree = cal.inference.reference(model, x, draws=500, seed=7)
    guide = cal.guides.amortize(model, x, seed=0).eval()
    result = gap(model, guide, x, without_evidence(tree), draws=500, steps=300)
    known = result.isel(data=result["method"].values != "")
    assert known.sizes["data"] >= 18
    assert set(known["method"].values) <= {"bridge", "normal bridge"}
    exact = tree["convergence"]["log_evidence"].sel(data=known["data"]).values
    errors, se = known["log_evidence"].values - exact, known["log_evidence_se"].values
    assert worst(errors, se) < 1
    assert abs(((errors / se) ** 2).mean() - 1) < limit(1) * math.sqrt(2 / len(se))
    biased = [((errors + bias) / se).mean() * math.sqrt(len(se)) for bias in (0.0, 0.1)]
    assert abs(biased[0]) < limit(1) < biased[1]


# -- a skewed posterior, by Markov chains ------------------------------------------------------------------------------


def counts(size):
    with pyro.plate("data", size):
        rate = pyro.sample("rate", dist.Gamma(3.0, 2.0))
        pyro.sample("x", dist.Poisson(rate[:, None].expand(-1, 5)).to_event(1))


def fixed(observed, size):
    with pyro.plate("data", size):
        pyro.sample("rate", dist.LogNormal(torch.zeros(size), 0.6))


def by_hand(program, data: Data, draws: dict[str, np.ndarray], independent: bool) -> xr.DataTree:
    """A reference tree of draws `(chain, draw, data)`, to be judged by the draws alone."""
    options = {"method": "by hand", "independent": independent, "sample_stats": {}, "settings": {}}
    return build_tree(draws, model=as_program(program), data=data, local=draws, latents=draws, **options)


@pytest.fixture(scope="module")
def counted():
    """Counts, autocorrelated draws of their posteriors Gamma(shape, 7), log evidence, and shape."""
    x = cal.program.sample_prior(counts, 20, seed=1)["x"]
    shape = 3 + x.double().sum(1)
    levels = ndtr(np.moveaxis(chains(20, 1000, 0.6), 0, 2))
    tree = by_hand(counts, as_data({"x": x}), {"rate": gamma.ppf(levels, shape.numpy()) / 7.0}, False)
    exact = 3 * math.log(2.0) - math.lgamma(3.0) + torch.lgamma(shape) - shape * math.log(7.0)
    return x, tree, (exact - torch.lgamma(x.double() + 1).sum(1)).numpy(), shape.numpy()


@pytest.mark.slow
def test_a_reference_by_nuts(counted):
    x, _, exact, _ = counted
    result = gap(counts, fixed, {"x": x})
    assert (result["method"] == "bridge").all()
    assert worst(result["log_evidence"].values - exact, result["log_evidence_se"].values) < 1


def test_lognormal_guide_of_gamma_posteriors(counted):
    """The best LogNormal for Gamma(a, b), at log(a/b) − 1/2a with sd 1/√a of the log, leaves Stirling's remainder:
    log Γ(a) − (a − ½) log a + a − ½ log 2π."""
    x, tree, exact, a = counted
    result = gap(counts, fixed, {"x": x}, tree)
    assert (result["method"] == "bridge").all()
    assert worst(result["log_evidence"].values - exact, result["log_evidence_se"].values) < 1
    assert worst(result["log_evidence"].values + 0.1 - exact, result["log_evidence_se"].values) > 1
    best = np.array([math.lgamma(n) for n in a]) - (a - 0.5) * np.log(a) + a - 0.5 * math.log(2 * math.pi)
    all_ = -math.log(0.6) - 0.5 * math.log(2 * math.pi * math.e) - a * math.log(7.0) + 7 * math.exp(0.18)
    all_ += np.array([math.lgamma(n) for n in a])
    wanted = {"approximation": best.mean(), "gap": all_.mean(), "amortization": (all_ - best).mean()}
    assert misses(result, wanted, slack=0.002) < 1
    assert 0.005 < best.mean() < 0.05 < (all_ - best).mean()
    apart = np.hypot(result["log_evidence_se"], result["elbo_refined_se"])
    assert (result["approximation_se"] < apart).all()  # what is common to evidence and ELBO cancels


def bridged(model, guide, data: Data, tree: xr.DataTree) -> Evidence:
    post = cal.inference.posterior(model, guide, data, 1000, seed=5)["sample_stats"].dataset
    weights = (post["log_p"] - post["log_q"]).isel(chain=0).transpose("data", "draw").values
    return evidence(as_program(model), guide, data, tree, weights, 0.1, seed=6)


def test_a_proposal_without_its_jacobian_is_caught(counted, monkeypatch):
    x, tree, exact, _ = counted
    data = as_data({"x": x})
    refined = refine(counts, fixed, data, steps=200)
    right = bridged(counts, refined, data, tree)
    assert worst(right.log_evidence - exact, np.full(20, 0.05)) < 1
    monkeypatch.setattr(AffineTransform, "log_abs_det_jacobian", lambda self, x, y: torch.zeros_like(x))
    wrong = bridged(counts, refined, data, tree)
    assert worst(wrong.log_evidence - exact, np.full(20, 0.05)) > 1


def test_bridge_from_a_fitted_normal(counted, ppca, observed, reference):
    """Where the guide is too far away: on the line for positive latents, and with those of a product known exactly."""
    x, tree, exact, _ = counted
    sides = normal_log_ratios(as_program(counts), as_data({"x": x}), tree["posterior"].dataset, 1000, 0)
    assert sides is not None
    found = bridge(*sides)
    assert worst(found.log_evidence - exact, found.se) < 1
    assert worst(found.log_evidence + 0.1 - exact, found.se) > 1
    assert (found.overlap > 0.9).all()
    far = Known(ppca, 60.0)
    result = bridged(ppca, far, as_data(observed), without_evidence(reference))
    assert set(result.method) == {"normal bridge"}
    true = cal.inference.log_evidence(ppca, observed).numpy()
    assert worst(result.log_evidence - true, np.sqrt(result.variance)) < 1
    assert (result.influence == 0).all()


# -- discrete latents --------------------------------------------------------------------------------------------------


def two(size):
    with pyro.plate("data", size):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Normal(2.0 * k, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5))


class ExactTwo(PyroModule):
    """The exact posterior of `two`, its z shifted by `shift` sds."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def forward(self, observed, size):
        x = observed["x"]
        low, high = (dist.Normal(2.0 * k, 1.25**0.5).log_prob(x) for k in (0.0, 1.0))
        with pyro.plate("data", size):
            k = pyro.sample("k", dist.Bernoulli(logits=high - low + math.log(0.3 / 0.7)))
            pyro.sample("z", dist.Normal((2.0 * k + 4.0 * x) / 5.0 + self.shift * 0.2**0.5, 0.2**0.5))


def test_discrete_latents_are_part_of_the_bridge():
    """The exact guide with a bias: KL is half its square in sds, all of it amortization."""
    x = cal.program.sample_prior(two, 20, seed=1)["x"]
    data, program = as_data({"x": x}), as_program(two)
    drawn = cal.inference.posterior(two, ExactTwo(), data, 2000, seed=2)["posterior"].dataset
    tree = by_hand(two, data, {n: drawn[n].values.reshape(4, 500, 20) for n in ("k", "z")}, True)
    exact = torch.logaddexp(
        dist.Normal(0.0, 1.25**0.5).log_prob(x) + math.log(0.7), dist.Normal(2.0, 1.25**0.5).log_prob(x) + math.log(0.3)
    )
    result = gap(two, ExactTwo(1.5), data, tree, steps=150)
    assert worst(result["log_evidence"].values - exact.numpy(), result["log_evidence_se"].values + 1e-4) < 1
    assert misses(result, {"approximation": 0.0, "amortization": 1.125, "gap": 1.125}) < 1
    summed_out = normal_log_ratios(program, data, tree["posterior"].dataset, 1000, 0)
    assert summed_out is not None
    found = bridge(*summed_out, independent=True)
    assert worst(found.log_evidence - exact.numpy(), found.se) < 1


# -- what can't be told, and what is refused ---------------------------------------------------------------------------


def test_what_cannot_be_told_is_nan_with_a_reason(ppca, observed, reference):
    tree = without_evidence(reference)
    convergence = tree["convergence"].to_dataset().copy(deep=True)
    convergence["is_reference"][:3] = False
    convergence["reason"] = convergence["reason"].astype(object)
    convergence["reason"][:3] = "R-hat 1.3 of `z[0]` (limit 1.01)"
    tree["convergence"] = xr.DataTree(convergence)
    result = gap(ppca, Known(ppca), observed, tree, steps=5, draws=200, max_se=1e-9)
    for name in ("log_evidence", "gap", "approximation"):
        assert np.isnan(result[name]).all()
        assert np.isnan(result[f"{name}_se"]).all()
    assert np.isfinite(result["amortization"]).all()
    assert (result["method"] == "").all()
    assert str(result["reason"].values[0]) == "no reference posterior: R-hat 1.3 of `z[0]` (limit 1.01)"
    assert "limit 1e-09" in str(result["reason"].values[3])


def test_results_are_joined_on_the_label(ppca, observed, tmp_path):
    data = Data(observed, coords={"data": np.arange(100, 100 + DATA)})
    tree = cal.inference.reference(ppca, data[10:14], chains=4, draws=500, seed=7)
    result = gap(ppca, Known(ppca), data, tree, steps=2, draws=100)
    assert result["data"].values.tolist() == [110, 111, 112, 113]
    exact = cal.inference.log_evidence(ppca, observed).numpy()[10:14]
    np.testing.assert_allclose(result["log_evidence"], exact, atol=1e-9)
    cal.store.save_dataset(result, tmp_path / "gap.nc")
    assert cal.store.load_dataset(tmp_path / "gap.nc").identical(result)
    with pytest.raises(InferenceError, match="none of the data"):
        gap(ppca, Known(ppca), data[:3], tree)
    moved = Data({"x": observed["x"] + 1}, coords=data.coords)
    with pytest.raises(InferenceError, match="differ in variable `x`"):
        gap(ppca, Known(ppca), moved, tree, steps=0, draws=100)


def test_shared_latents_are_refused():
    def model(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(centre, 1.0))

    def guide(observed, size):
        pyro.sample("centre", dist.Normal(0.0, 1.0))

    with pytest.raises(InferenceError, match=r"\['centre'\] are shared"):
        gap(model, guide, {"x": torch.zeros(3)})


def test_a_guide_without_continuous_latents_is_refused():
    data = as_data({"x": torch.zeros(3)})
    with pytest.raises(ProgramError, match="nothing to refine"):
        gap(coin, coin_guide, data, by_hand(coin, data, {"k": np.zeros((4, 500, 3))}, False))
