"""Simulation-based calibration: uniform for exact guides, and not for planted defects; each quantity sees its own."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from scipy.stats import binom, kstest, norm
from torch import Tensor

import calibrant as cal
from calibrant.data import Data
from calibrant.errors import InferenceError, ProgramError
from calibrant.evaluation import calibration, uniformity, verdicts, weights
from calibrant.evaluation.judgements.without_reference import RANK_MARGIN
from calibrant.evaluation.statistics.simulation_ranks import below, tarp_distance
from calibrant.guides.many_draws import encoded_once
from calibrant.inference import posterior

X = {"x": torch.zeros(4, 2)}
RHO = 0.8


def cholesky() -> Tensor:
    """In the dtype of the call."""
    return torch.tensor([[1.0, 0.0], [RHO, math.sqrt(1 - RHO**2)]])


def pair(size: int) -> None:
    """Two latents; the posterior is N(x/2, ½ C) where the prior is N(0, C) and the noise has covariance C too."""
    with pyro.plate("data", size):
        z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), scale_tril=cholesky()))
        pyro.sample("x", dist.MultivariateNormal(z, scale_tril=cholesky()))


def guide(mean: float = 0.0, sd: float = 1.0, correlated: bool = True, prior: bool = False, contrast: bool = False):
    """The exact posterior with a defect: a shift in sds, a factor, correlation ignored, the prior in its place, or too
    narrow for half of the data and too wide for the others."""

    def run(observed: dict[str, Tensor], size: int) -> None:
        x = observed["x"]
        scale = math.sqrt(0.5) * sd * torch.ones(len(x), 1)
        if contrast:
            scale = scale * torch.where(x.norm(dim=1, keepdim=True) < 1.8, 0.6, 1.25)
        loc = 0 * x if prior else x / 2 + mean * scale
        root = cholesky() if correlated else torch.eye(2)
        root = root if prior else scale[..., None] * root
        with pyro.plate("data", size):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=root))

    return run


def smallest_p(tree: xr.DataTree, quantities: list[str]) -> float:
    """The smallest p-value, times their number."""
    return float(uniformity(tree).sel(quantity=quantities)["p_value"].min()) * len(quantities)


LATENTS = ["z[0]", "z[1]"]
ALL = [*LATENTS, "log_likelihood", "log_joint", "hpd", "tarp"]


def test_exact_guide_is_uniform_and_passes():
    """A bias of .13 sd of any quantity would be seen with 95% power."""
    tree = calibration(pair, guide(), X, simulations=2000, draws=100)
    table = uniformity(tree)
    assert table["quantity"].values.tolist() == ALL
    assert smallest_p(tree, ALL) > 1e-5
    assert (np.abs(table["bias"] / table["bias_se"]) < limit(6)).all()
    assert (np.abs(np.log(table["spread"]) / (table["spread_se"] / table["spread"])) < limit(6)).all()
    (verdict,) = verdicts(None, calibration=tree)
    assert (verdict.quantity, verdict.status) == ("log joint", "pass")
    z = tree["recovery"]["z_score"]
    assert np.abs(z.mean("draw")).max() < limit(2) / math.sqrt(2000)
    np.testing.assert_allclose(tree["recovery"]["contraction"].mean("draw"), 0.5, atol=0.05)


@pytest.mark.parametrize(
    ("defect", "seen"),
    [
        ({"sd": 0.8}, ALL),
        ({"sd": 1.25}, ["z[0]", "log_joint", "hpd", "tarp"]),
        ({"mean": 0.3}, LATENTS),
        ({"correlated": False}, ["log_joint"]),
        ({"prior": True}, ["log_likelihood", "log_joint"]),
    ],
)
def test_planted_defects_are_seen_by_those_that_should(defect, seen):
    tree = calibration(pair, guide(**defect), X, simulations=2000, draws=100)
    for quantity in seen:
        assert smallest_p(tree, [quantity]) < 1e-5, quantity
    (verdict,) = verdicts(None, calibration=tree)
    assert verdict.status == ("fail" if "log_joint" in seen else "pass")


def test_what_ranks_are_blind_to():
    """The prior as posterior, and ignored correlations, leave the latents' own ranks uniform; the former those of
    distances from points of the prior as well."""
    for defect, unseen in (({"prior": True}, [*LATENTS, "tarp"]), ({"correlated": False}, LATENTS)):
        assert smallest_p(calibration(pair, guide(**defect), X, draws=100), unseen) > 1e-5


def test_a_quantity_of_the_users_sees_what_averages_away():
    """A guide that is too narrow at low contrast and too wide at high: the latent's distance from the guide's centre,
    with a sign that follows the contrast."""

    def signed(latents, observed):
        far = (latents["z"] - observed["x"] / 2).norm(dim=1)
        return torch.where(observed["x"].norm(dim=1) < 1.8, 1.0, -1.0) * far

    tree = calibration(pair, guide(contrast=True), X, draws=100, quantities={"signed": signed})
    assert smallest_p(tree, ["signed"]) < 1e-10
    exact = calibration(pair, guide(), X, draws=100, quantities={"signed": signed})
    assert smallest_p(exact, ["signed"]) > 1e-5


def test_the_size_of_an_error_is_told():
    """Where truth and draws are Normal, bias and spread are the error of the mean in sds and the ratio of sds."""
    table = uniformity(calibration(pair, guide(mean=-0.3, sd=0.8), X, simulations=1000, draws=1000))
    for quantity in LATENTS:
        row = table.sel(quantity=quantity)
        # Φ⁻¹ of a rank among 1,000 draws ends at ±3.3, which moves both by a hundredth.
        assert float(row["spread"]) == pytest.approx(1.25, abs=limit(4) * float(row["spread_se"]) + 0.01)
        # The guide's mean lies .3 of its sds too low.
        assert float(row["bias"]) == pytest.approx(0.3, abs=limit(4) * float(row["bias_se"]) + 0.01)


def test_discrete_latents_and_covariates():
    """Ties are broken at random: the ranks of a coin are uniform, and those of a wrong coin are not."""

    def coin(size: int, odds: Tensor) -> None:
        with pyro.plate("data", size):
            face = pyro.sample("face", dist.Bernoulli(logits=odds))
            pyro.sample("x", dist.Normal(face, 1.0))

    def answer(shift: float):
        def run(observed, size, odds):
            with pyro.plate("data", size):
                pyro.sample("face", dist.Bernoulli(logits=odds + observed["x"] - 0.5 + shift))

        return run

    data = Data({"x": torch.zeros(50)}, {"odds": torch.linspace(-2, 2, 50)})
    tree = calibration(coin, answer(0.0), data, draws=100)
    assert set(tree["prior_sbc"].data_vars) == {"face", "log_likelihood", "log_joint", "hpd"}
    assert smallest_p(tree, ["face", "log_likelihood", "log_joint", "hpd"]) > 1e-5
    assert smallest_p(calibration(coin, answer(1.0), data, draws=100), ["face"]) < 1e-5


def test_coverage_of_highest_density_regions():
    """P(rank of log q in the upper half) is the coverage of the 50% region: chi-square with 2 degrees, scaled."""
    tree = calibration(pair, guide(sd=0.8), X, simulations=4000, draws=201)
    inside = (tree["prior_sbc"]["hpd"].values > 0.5).mean()
    wanted = 1 - math.exp(-0.64 * math.log(2))  # P(χ²₂ < 0.64 · median)
    assert inside == pytest.approx(wanted, abs=limit(1) * math.sqrt(wanted * (1 - wanted) / 4000))


def uniformity_of(pit: np.ndarray) -> xr.Dataset:
    """Of PIT values `(simulation, quantity)`."""
    group = xr.Dataset({"z": (("chain", "draw", "z_dim_0"), pit[None])}, attrs={"guide_draws": 1000, "latents": 2})
    return uniformity(xr.DataTree.from_dict({"/prior_sbc": group}))


@pytest.mark.parametrize("quantities", [400, pytest.param(1000, marks=pytest.mark.truth)])
def test_p_values_keep_their_level_and_see_more_than_the_largest_distance(quantities):
    """Quantities of 500 simulations: exact ones, and a posterior too narrow by a tenth."""
    scores = np.random.default_rng(0).normal(size=(500, quantities))
    for level in (0.05, 0.01):
        found = int((uniformity_of(norm.cdf(scores))["p_value"] <= level).sum())
        assert found <= binom.isf(1e-5, quantities, level)
        assert found >= binom.ppf(1e-5, quantities, level / 3)
    narrow = uniformity_of(norm.cdf(scores / 0.9))
    by_distance = np.mean([kstest(column, "uniform").pvalue <= 0.05 for column in norm.cdf(scores / 0.9).T])
    assert float((narrow["p_value"] <= 0.05).mean()) > 3 * by_distance


def test_ranks_count_draws():
    truth, draws = torch.tensor([0.0, 1.0]), torch.tensor([[-1.0, 1.0], [0.0, 0.0], [2.0, 3.0]])
    less, equal = below(truth, draws)
    assert (less.tolist(), equal.tolist()) == ([1, 1], [1, 1])
    distance = tarp_distance(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([1.0, 2.0]))
    assert distance.item() == pytest.approx(math.hypot(3, 2))


@pytest.fixture(scope="module")
def ea_vae():
    torch.manual_seed(0)
    model = cal.models.create("ea-vae", shape=[1, 4, 4], latents=3).eval()
    data = {"x": torch.randn(50, 1, 4, 4)}
    return model, data


@pytest.mark.parametrize("structure", ["faithful", "full", "collapsed", "program"])
def test_encoding_once_gives_the_same_draws(ea_vae, structure):
    model, data = ea_vae
    guide = cal.guides.amortize(model, data, structure=structure).eval()
    rows = {"x": data["x"][:5].repeat_interleave(7, 0)}
    with torch.no_grad(), cal.program.seeded(3):
        plain = cal.program.guide_trace(guide, rows, 35, {})
    with torch.no_grad(), cal.program.seeded(3), encoded_once(guide, 7):
        once = cal.program.guide_trace(guide, rows, 35, {})
    for name in ("scale", "z"):
        torch.testing.assert_close(plain.nodes[name]["value"], once.nodes[name]["value"], rtol=1e-4, atol=1e-5)


def test_recorded_or_not_is_the_same(ea_vae, monkeypatch):
    """A graph, whose batches are filled up, gives what the program gives: one seed, equal up to rounding."""
    model, data = ea_vae
    guide = cal.guides.amortize(model, data).eval()
    module = calibration.__globals__
    trees = []
    for start in (1, 10**9):
        monkeypatch.setitem(module, "_RECORDED_FROM", start)
        monkeypatch.setitem(module, "_ROWS", 700)
        trees.append(calibration(model, guide, data, simulations=101, draws=100)["prior_sbc"])
    for name in trees[0].data_vars:
        assert trees[0][name].shape[1] == 101
        assert (np.abs(trees[0][name] - trees[1][name]) > 0.005).mean() < 0.01, name


def test_seed_and_names_of_dimensions(ea_vae):
    model, data = ea_vae
    guide = cal.guides.amortize(model, data).eval()
    first, again, other = (calibration(model, guide, data, 100, 60, seed=seed)["prior_sbc"] for seed in (1, 1, 2))
    assert first["z"].dims == ("chain", "draw", "feature")
    xr.testing.assert_identical(first["z"], again["z"])
    assert not np.allclose(first["z"], other["z"])
    assert (first["z"].values > 0).all()
    assert (first["z"].values < 1).all()


@pytest.mark.parametrize("checks", [50, pytest.param(200, marks=pytest.mark.truth)])
def test_false_alarms_of_the_log_joint(checks):
    """Checks of a guide with its log joint at the margin: `fail` as seldom as stated; without the margin, often."""
    simulations = 200 * checks
    tree = calibration(pair, guide(sd=0.918), X, simulations=simulations, draws=50)
    assert abs(float(uniformity(tree).sel(quantity="log_joint")["bias"])) == pytest.approx(
        RANK_MARGIN, abs=0.01 + limit(1) / math.sqrt(simulations)
    )
    parts = [tree["prior_sbc"].dataset.isel(draw=slice(at, at + 200)) for at in range(0, simulations, 200)]
    trees = [xr.DataTree.from_dict({"/prior_sbc": part}) for part in parts]
    most = binom.isf(1e-5, len(trees), 0.05)
    assert sum(verdicts(None, calibration=tree)[0].status == "fail" for tree in trees) <= most
    rows = [uniformity(tree).sel(quantity="log_joint") for tree in trees]
    assert sum(bool(abs(row["bias"]) > norm.isf(0.025) * row["bias_se"]) for row in rows) > most


@pytest.mark.parametrize(("latents", "status"), [(2, "fail"), (16, "pass")])
def test_the_log_joint_bears_the_same_error_of_all_sds_for_any_number_of_latents(latents, status):
    """A bias of 0.25 sd is an error of 12.5% in the sds of two latents, and of 4.4% in those of 16."""
    scores = np.random.default_rng(0).normal(0.25, 1.0, (1, 4000))
    group = xr.Dataset({"log_joint": (("chain", "draw"), norm.cdf(scores))}, attrs={"guide_draws": 1000})
    tree = xr.DataTree.from_dict({"/prior_sbc": group.assign_attrs(latents=latents)})
    (verdict,) = verdicts(None, calibration=tree)
    assert verdict.status == status
    assert verdict.margin == pytest.approx(0.15 * math.sqrt(latents / 2))


def test_refusals(ea_vae):
    model, data = ea_vae
    exact = guide()

    def shared(size):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", size):
            pyro.sample("x", dist.Normal(m, 1.0).expand([size, 2]).to_event(1))

    def improper(size):
        with pyro.plate("data", size):
            support = dist.constraints.real
            z = pyro.sample("z", dist.ImproperUniform(support, (size,), ()))
            pyro.sample("x", dist.Normal(z[:, None].expand(size, 2), 1.0).to_event(1))

    def flat(observed, size):
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))

    with pytest.raises(InferenceError, match="too few to tell"):
        calibration(pair, exact, X, simulations=20)
    with pytest.raises(InferenceError, match="shared"):
        calibration(shared, cal.guides.amortize(shared, X), X)
    with pytest.raises(ProgramError, match="improper prior"):
        calibration(improper, flat, X)
    with pytest.raises(InferenceError, match="these names are taken"):
        calibration(pair, exact, X, quantities={"z": lambda latents, observed: latents["z"][:, 0]})
    with pytest.raises(InferenceError, match=r"wanted one number per row"):
        calibration(pair, exact, X, quantities={"both": lambda latents, observed: latents["z"]})
    with pytest.raises(InferenceError, match="'root' is not a number for"):
        calibration(pair, exact, X, 100, 50, quantities={"root": lambda latents, observed: latents["z"][:, 0].sqrt()})
    with pytest.raises(ProgramError, match="the guide"):
        calibration(pair, cal.guides.amortize(model, data), X)


def test_weights_of_an_exact_and_a_shifted_guide():
    """KL of two Normals with the same covariance, half the squared distance in sds."""
    x = {"x": torch.randn(40, 2, generator=torch.Generator().manual_seed(0))}
    exact = weights(posterior(pair, guide(), x, draws=500))
    assert float(np.abs(exact["gap"]).max()) < 1e-6
    assert (exact["pareto_k"] == -np.inf).all()  # not the tail of what rounding leaves
    found = weights(posterior(pair, guide(mean=0.3), x, draws=4000))
    chol = cholesky().double().numpy()
    shift = 0.3 * np.linalg.solve(chol, np.ones(2))
    wanted = 0.5 * float(shift @ shift)
    score = (found["gap"].values - wanted) / found["gap_se"].values
    assert abs(score.mean()) * math.sqrt(40) < limit(2)
    assert score.std() == pytest.approx(1.0, abs=limit(2) / math.sqrt(80))
    np.testing.assert_allclose(found["gap"], found["log_evidence"] - found["elbo"])
    assert kstest(norm.cdf(score), "uniform").pvalue > 1e-5


@pytest.mark.parametrize(("large", "status"), [(0, "pass"), (8, "cannot tell"), (60, "fail")])
def test_verdict_on_k_hat(large, status):
    table = weights(posterior(pair, guide(), {"x": torch.zeros(128, 2)}, draws=200))
    table["pareto_k"] = ("data", np.where(np.arange(128) < large, 0.9, 0.1))
    table["ess"] = ("data", np.where(np.arange(128) < 100, 50.0, 199.0))
    found = {verdict.quantity: verdict for verdict in verdicts(None, table)}
    assert found["k-hat"].status == status
    unreliable = f"importance weights are unreliable for {large} of 128 data (k-hat above 0.57)"
    head = unreliable if large else "importance weights are reliable for all 128 data (k-hat at most 0.57)"
    assert found["k-hat"].sentence.startswith(head)
    assert found["evidence gap"].status == "describes"
    assert not found["evidence gap"].primary
    nearly_equal = verdicts(None, table.assign(ess=("data", np.full(128, 199.0))))[0]
    assert "reliable for all 128 data" in nearly_equal.sentence, "k-hat knows no scale"
