"""References by importance: right where they pass, chains where they do not, and what they cannot see."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import assert_agrees, from_grid, from_scipy, known, limit
from binary_images import Grid, GridGuide, binary_images, binary_model
from contrast_models import ExactGuide, images, model
from scipy import stats
from test_importance import MEAN, SD, X, conjugate, guide

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.guides.fitted import FREEDOM, FittedGuide
from calibrant.inference import reference, referencing
from calibrant.inference.references.exact import solve
from calibrant.inference.references.gate import importance_convergence
from calibrant.inference.references.sampling import exact_structure

FAST: dict[str, Any] = {"warmup": 200, "draws": 1000, "starts": 0}
GROUPS = ("posterior", "sample_stats", "observed_data", "constant_data", "convergence")
EVIDENCE = stats.norm(0, math.sqrt(1.25)).logpdf(X["x"].numpy())


def by_importance(program: Any, data: Any, chosen: Any, **options: Any) -> xr.DataTree:
    return reference(program, data, method="importance", init=chosen, **options)


def gate(tree: xr.DataTree) -> xr.Dataset:
    return tree["convergence"].to_dataset()


def treatments(tree: xr.DataTree) -> list[str]:
    return gate(tree)["treatment"].values.tolist()


# -- known truth -------------------------------------------------------------------------------------------------------


def test_a_normal_posterior():
    tree = by_importance(conjugate, X, guide)
    found = gate(tree)
    assert treatments(tree) == ["importance"] * 5
    assert found["is_reference"].all()
    assert (found["look"] == 0).all()
    assert (found["pareto_k"] < 0.5).all()
    assert_agrees({"z": tree["posterior"]["z"].values}, {"z": from_scipy(stats.norm(MEAN, SD))})
    score = (found["log_evidence"].values - EVIDENCE) / found["log_evidence_se"].values
    assert np.abs(score).max() < limit(5)
    assert tree["posterior"].attrs["method"] == "importance"
    assert tree["posterior"].sizes["chain"] == 4


def test_a_gaussian_scale_mixture():
    target, data = model("ea-vae"), {"x": images()["x"][:4]}
    tree = by_importance(target, data, ExactGuide(target, widen=1.15))
    assert treatments(tree) == ["importance"] * 4
    truth = solve(exact_structure(target, data), data["x"].double())
    wanted = {name: known(truth.mean[name].numpy(), truth.sd[name].numpy()) for name in ("z", "scale")}
    assert_agrees({name: tree["posterior"][name].values for name in wanted}, wanted)
    score = (gate(tree)["log_evidence"].values - truth.log_evidence.numpy()) / gate(tree)["log_evidence_se"].values
    assert np.abs(score).max() < limit(4)


def test_a_bernoulli_model_by_quadrature():
    target, data = binary_model(), binary_images(4)
    tree = by_importance(target, data, GridGuide(target))
    assert treatments(tree) == ["importance"] * 4
    grid = Grid(target, 81)
    weights = grid.log_weights(data["x"]).numpy()
    values = grid.values.numpy().T
    marginals = [from_grid(part, weights) for part in values]
    z = tree["posterior"]["z"].values
    draws = {"one": z[..., 0], "two": z[..., 1], "log s": np.log(tree["posterior"]["scale"].values)}
    # quantiles of a grid are coarse, moments are not
    wanted = {name: known(truth.mean, truth.sd) for name, truth in zip(draws, marginals, strict=True)}
    assert_agrees(draws, wanted)
    score = (gate(tree)["log_evidence"].values - np.logaddexp.reduce(weights, 1)) / gate(tree)["log_evidence_se"].values
    assert np.abs(score).max() < limit(4)


# -- guides that are wrong ---------------------------------------------------------------------------------------------


def partly_narrow(observed, size):
    """Good for x ≤ 0; for x > 0, less than half as wide as the posterior."""
    with pyro.plate("data", size):
        x = observed["x"]
        pyro.sample("z", dist.Normal(0.8 * x + 0.1, torch.where(x > 0, 0.4 * SD, 1.2 * SD)))


@pytest.fixture(scope="module")
def mixed() -> xr.DataTree:
    """A reference without fitted proposals, so that some data get chains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(referencing, "_FITS", 0)
        return by_importance(conjugate, X, partly_narrow, groups=["log_likelihood"], **FAST)


def test_data_with_a_guide_that_is_too_narrow_get_chains(mixed):
    found = gate(mixed)
    assert treatments(mixed) == ["importance"] * 3 + ["NUTS"] * 2
    assert found["look"].values.tolist() == [0, 0, 0, 1, 1]
    assert found["is_reference"].all()
    assert (found["pareto_k"][3:] > 0.5).all()
    assert np.isfinite(found["log_evidence"].values).tolist() == [True] * 3 + [False] * 2
    assert_agrees({"z": mixed["posterior"]["z"].values}, {"z": from_scipy(stats.norm(MEAN, SD))})


def test_chains_and_importance_stand_in_the_order_of_the_data(mixed):
    assert mixed["posterior"]["data"].values.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(mixed["observed_data"]["x"], X["x"])
    np.testing.assert_allclose(mixed["posterior"]["double"], 2 * mixed["posterior"]["z"], rtol=1e-6)
    expected = stats.norm(mixed["posterior"]["z"].values, 0.5).logpdf(X["x"].numpy())
    np.testing.assert_allclose(mixed["log_likelihood"]["x"], expected, rtol=1e-4, atol=1e-4)
    assert np.isfinite(mixed["sample_stats"]["log_p"].values).all((0, 1)).tolist() == [True] * 3 + [False] * 2
    assert np.isfinite(mixed["sample_stats"]["lp"].values).all((0, 1)).tolist() == [False] * 3 + [True] * 2


def test_statistics_take_a_mixed_reference(mixed, tmp_path):
    post = cal.inference.posterior(conjugate, partly_narrow, X, draws=2000)
    compared = cal.evaluation.compare(post, mixed)
    assert compared.sizes["data"] == 5
    assert "evidence_gap" not in compared  # the evidence is an estimate, and that of some data is not known
    cal.store.save_tree(mixed, tmp_path / "reference.nc")
    assert cal.store.load_tree(tmp_path / "reference.nc").identical(mixed)


def folded(size):
    """|z| with noise: two modes, at −x and x, of equal mass."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.1))


def one_sided(observed, size):
    with pyro.plate("data", size):
        pyro.sample("z", dist.Normal(observed["x"] / 1.01, 0.12))


def test_a_mode_that_the_guide_misses_is_not_seen():
    """The known limit: between modes that lie apart there is no draw, so that nothing tells of the other one.

    Where they touch, draws between them have large weights, and the datum is refused.
    """
    data = {"x": torch.tensor([1.0, 1.5])}
    tree = by_importance(folded, data, one_sided)
    found = gate(tree)
    assert treatments(tree) == ["importance"] * 2
    assert found["is_reference"].all()
    assert (tree["posterior"]["z"].values > 0).all()
    z = np.linspace(-6, 6, 200_001)
    joint = stats.norm(0, 1).logpdf(z) + stats.norm(np.abs(z), 0.1).logpdf(data["x"].numpy()[:, None])
    evidence = np.logaddexp.reduce(joint, 1) + math.log(z[1] - z[0])
    score = (found["log_evidence"].values + math.log(2) - evidence) / found["log_evidence_se"].values
    assert np.abs(score).max() < limit(2)


class ChainsAreAskedFor(Exception):
    pass


def test_modes_that_touch_are_refused_without_a_fitted_proposal(monkeypatch):
    def reference_of(program: Any, data: cal.data.Data, *arguments: Any, **options: Any) -> None:
        raise ChainsAreAskedFor(data.labels().tolist())

    monkeypatch.setattr(referencing, "_FITS", 0)
    monkeypatch.setattr(referencing, "reference_of", reference_of)
    with pytest.raises(ChainsAreAskedFor, match=r"\[1\]"):
        by_importance(folded, {"x": torch.tensor([1.0, 0.2])}, one_sided)


@pytest.fixture
def chains(monkeypatch, mixed) -> Callable[[xr.Dataset, slice], None]:
    """Chains for the last two data that are there already: with another verdict, or for some of them."""

    def install(change: dict[str, Any], kept: slice) -> None:
        def reference_of(*arguments: Any, **options: Any) -> xr.DataTree:
            groups = {name: mixed[name].to_dataset().isel(data=slice(3, 5), missing_dims="ignore") for name in GROUPS}
            groups["convergence"] = groups["convergence"].assign({n: ("data", v) for n, v in change.items()})
            some = {f"/{name}": group.isel(data=kept, missing_dims="ignore") for name, group in groups.items()}
            return xr.DataTree.from_dict(some)

        monkeypatch.setattr(referencing, "_FITS", 0)
        monkeypatch.setattr(referencing, "reference_of", reference_of)

    return install


def test_chains_that_fail_say_both_reasons(chains):
    why = ["R-hat 1.20 of `z`"] * 2
    chains({"is_reference": [False] * 2, "reason": why, "treatment": ["", "4 times longer"]}, slice(None))
    found = gate(by_importance(conjugate, X, partly_narrow, **FAST))
    assert found["is_reference"].values.tolist() == [True] * 3 + [False] * 2
    assert found["treatment"].values.tolist() == ["importance"] * 3 + ["NUTS", "NUTS, 4 times longer"]
    assert found["reason"].values[0] == ""
    assert found["reason"].values[3].startswith("k-hat")
    assert found["reason"].values[3].endswith("by NUTS: R-hat 1.20 of `z`")


def test_what_was_finished_is_kept_after_an_interrupt(chains):
    chains({}, slice(1, 2))
    tree = by_importance(conjugate, X, partly_narrow, groups=["log_likelihood"], **FAST)
    for name in ("posterior", "convergence", "observed_data", "log_likelihood"):
        assert tree[name]["data"].values.tolist() == [0, 1, 2, 4], name


# -- fitted proposals --------------------------------------------------------------------------------------------------


def correlated(size):
    """log s and z are jointly Normal given x, with strong correlations."""
    with pyro.plate("data", size):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        sums = torch.stack([scale.log() + z[..., 0], z.sum(-1)], -1)
        pyro.sample("x", dist.Normal(sums, 0.2).to_event(1))


def independent(observed, size):
    """The posterior's means and sds, without its correlations."""
    mean, covariance = posterior_of_correlated(observed["x"].double())
    sd = covariance.diagonal().sqrt()
    with pyro.plate("data", size):
        pyro.sample("scale", dist.LogNormal(mean[:, 0], sd[0]))
        pyro.sample("z", dist.Normal(mean[:, 1:], sd[1:]).to_event(1))


def posterior_of_correlated(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means `(data, 3)` and covariance of log s and z."""
    loading = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    prior = torch.tensor([4.0, 1.0, 1.0], dtype=torch.float64).diag()
    covariance = torch.linalg.inv(prior + loading.T @ loading / 0.04)
    return x @ loading @ covariance / 0.04, covariance


PAIRS = {"x": torch.tensor([[0.5, -1.0], [1.5, 2.0], [-0.3, 0.1]])}


def test_a_fitted_proposal_is_right_where_the_guide_ignores_correlations():
    tree = by_importance(correlated, PAIRS, independent, seed=3)
    assert treatments(tree) == ["importance, fitted proposal"] * 3
    found, draws = gate(tree), tree["posterior"]
    mean, covariance = (part.numpy() for part in posterior_of_correlated(PAIRS["x"].double()))
    values = [np.log(draws["scale"].values), *np.moveaxis(draws["z"].values, -1, 0)]
    wanted = {str(i): known(mean[:, i], np.full(3, covariance[i, i] ** 0.5)) for i in range(3)}
    assert_agrees({str(i): value for i, value in enumerate(values)}, wanted)
    difference = {"d": values[0] + values[1]}  # narrow, where the marginals are wide: correlations decide it
    sd = (covariance[0, 0] + covariance[1, 1] + 2 * covariance[0, 1]) ** 0.5
    assert sd < 0.5 * covariance[1, 1] ** 0.5
    assert_agrees(difference, {"d": known(mean[:, 0] + mean[:, 1], np.full(3, sd))})
    loading = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    marginal = stats.multivariate_normal(cov=loading @ np.diag([0.25, 1.0, 1.0]) @ loading.T + 0.04 * np.eye(2))
    score = (found["log_evidence"].values - marginal.logpdf(PAIRS["x"].numpy())) / found["log_evidence_se"].values
    assert np.abs(score).max() < limit(3)


def test_without_it_and_without_chains_the_data_are_refused(monkeypatch):
    monkeypatch.setattr(referencing, "_FITS", 0)
    tree = reference(correlated, PAIRS, method="importance-only", init=independent)
    assert not gate(tree)["is_reference"].any()
    assert all(reason.startswith("k-hat") for reason in gate(tree)["reason"].values)


def test_the_density_of_a_fitted_proposal_is_that_of_one_t_over_all_latents():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(2, 300, 3, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[1.0, 0.8, 0.0], [0.0, 0.5, -0.4], [0.0, 0.0, 0.3]], dtype=torch.float64
    )
    supports = {"scale": dist.constraints.positive, "z": dist.constraints.real_vector}
    values = {"x": torch.tensor([[1.0], [2.0]])}
    fitted = FittedGuide(
        values,
        supports,
        {"scale": line[..., 0], "z": line[..., 1:]},
        torch.full((2, 300), 1 / 300, dtype=torch.float64),
    )
    swapped = {"x": torch.tensor([[2.0], [1.0], [2.0]])}
    with torch.no_grad():
        trace = pyro.poutine.trace(fitted).get_trace(swapped, 3)
    scale, z = trace.nodes["scale"]["value"], trace.nodes["z"]["value"]
    points = torch.cat([scale.log()[:, None], z], 1).numpy()
    log_q = trace.nodes["scale"]["fn"].log_prob(scale) + trace.nodes["z"]["fn"].log_prob(z)
    for row, datum in enumerate([1, 0, 1]):
        mean, covariance = line[datum].mean(0).numpy(), np.cov(line[datum].numpy().T, bias=True)
        t = stats.multivariate_t(mean, covariance, df=FREEDOM)
        assert float(log_q[row]) == pytest.approx(t.logpdf(points[row]) - float(scale[row].log()), abs=1e-5)


def test_modes_that_touch_are_right_with_a_fitted_proposal():
    data = {"x": torch.tensor([0.2])}
    tree = reference(folded, data, method="importance-only", init=one_sided, seed=1)
    assert treatments(tree) == ["importance, fitted proposal"]
    assert gate(tree)["is_reference"].all()
    z = np.linspace(-3, 3, 100_001)
    joint = stats.norm(0, 1).logpdf(z) + stats.norm(np.abs(z), 0.1).logpdf(0.2)
    weights = np.exp(joint - joint.max())[None]
    truth = from_grid(z, np.log(weights))
    assert_agrees({"z": tree["posterior"]["z"].values}, {"z": known(truth.mean, truth.sd)})


# -- the gate, blocks and refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("khat", "ess", "broken", "words"),
    [
        (0.49, 5000.0, False, ""),
        (0.51, 5000.0, False, "k-hat 0.51"),
        (math.inf, 5000.0, False, "k-hat inf"),
        (0.9, 9500.0, False, ""),  # weights that are nearly equal
        (0.1, 390.0, False, "ESS of the weights 390"),
        (0.1, 5000.0, True, "not finite"),
    ],
)
def test_the_gate_reads_the_weights(khat, ess, broken, words):
    draws = np.random.default_rng(0).normal(size=(4, 500, 1))
    posterior = xr.Dataset({"z": (("chain", "draw", "data"), draws)}, coords={"data": ["a"]})
    numbers = {"pareto_k": khat, "ess": ess, "log_evidence": -3.0, "log_evidence_se": 0.1}
    summary = xr.Dataset({n: ("data", [v]) for n, v in numbers.items()}, {"data": ["a"]}, {"pool": 10_000})
    found = importance_convergence(posterior, summary, np.array([broken]), {})
    assert bool(found["is_reference"][0]) == (not words)
    assert words in str(found["reason"].values[0])
    assert np.isfinite(found["log_evidence"].values[0]) == (not words)


def test_copies_of_few_draws_fail():
    draws = np.repeat(np.random.default_rng(0).normal(size=(4, 50, 1)), 10, 1)
    posterior = xr.Dataset({"z": (("chain", "draw", "data"), draws)}, coords={"data": [0]})
    numbers = {"pareto_k": 0.1, "ess": 5000.0, "log_evidence": -3.0, "log_evidence_se": 0.1}
    summary = xr.Dataset({n: ("data", [v]) for n, v in numbers.items()}, {"data": [0]}, {"pool": 10_000})
    found = importance_convergence(posterior, summary, np.array([False]), {})
    assert "bulk ESS" in str(found["reason"].values[0])


def test_few_data_at_a_time_have_the_same_posterior(monkeypatch):
    monkeypatch.setattr(referencing, "_ENTRIES", 60_000)  # two data: z, its double and a constant
    tree = by_importance(conjugate, X, guide, seed=1)
    assert treatments(tree) == ["importance"] * 5
    assert_agrees({"z": tree["posterior"]["z"].values}, {"z": from_scipy(stats.norm(MEAN, SD))})
    assert tree.identical(by_importance(conjugate, X, guide, seed=1))
    assert not tree.identical(by_importance(conjugate, X, guide, seed=2))


def test_draws_at_the_edge_of_the_support_are_refused(monkeypatch):
    """A Beta(0.1, 0.1) posterior: 1% of it lies between 1 and the number before it, where no draw is right."""

    def reference_of(program: Any, data: cal.data.Data, *arguments: Any, **options: Any) -> None:
        raise ChainsAreAskedFor(data.labels().tolist())

    def coin(size):
        with pyro.plate("data", size):
            p = pyro.sample("p", dist.Beta(0.1, 0.1))
            pyro.sample("x", dist.Bernoulli(0.5 + 0.0 * p))

    def exact(observed, size):
        with pyro.plate("data", size):
            pyro.sample("p", dist.Beta(0.1 * torch.ones(size), 0.1))

    monkeypatch.setattr(referencing, "reference_of", reference_of)
    with pytest.raises(ChainsAreAskedFor, match=r"\[0, 1\]"):
        by_importance(coin, {"x": torch.tensor([0.0, 1.0])}, exact)


def test_refusals():
    with pytest.raises(InferenceError, match="give one with init=guide"):
        reference(conjugate, X, method="importance")
    with pytest.raises(InferenceError, match="chains >= 4"):
        by_importance(conjugate, X, guide, chains=2)

    def shared(size):
        centre = pyro.sample("centre", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(centre, 1.0))

    def of_shared(observed, size):
        pyro.sample("centre", dist.Normal(0.0, 1.0))

    with pytest.raises(InferenceError, match=r"\['centre'\] are shared.*method='nuts'"):
        by_importance(shared, X, of_shared)
