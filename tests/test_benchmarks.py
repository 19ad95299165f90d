"""The tables: their statistics against known truth, planted guides against the real check, small rows made and kept."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import test_calibration as programs
import torch
import xarray as xr
from agreement import limit
from scipy.stats import binomtest

from benchmarks import cells, checking, peers, power, power_tables, retrieval, trained
from benchmarks.fooled import FOOLED, OneDirection
from benchmarks.planted import PLANTED, pair
from benchmarks.structure import Bench, Plan, line, mean_error, sd_ratio
from calibrant.evaluation import calibration, uniformity
from calibrant.inference import posterior

PLAN = Plan(size=8, train_data=600, model_epochs=2, guide_epochs=2, judged=60, compared=8, draws=500)


def comparison(count: int = 4000) -> xr.Dataset:
    """Sd ratios around 0.8, mean errors of variance 0.3² + 0.4², the latter Monte Carlo noise."""
    rng, shape = np.random.default_rng(0), (count, 3)
    variables = {
        "sd_ratio": np.exp(np.log(0.8) + 0.2 * rng.normal(size=shape)),
        "mean_error": 0.5 * rng.normal(size=shape),
        "mean_error_se": np.full(shape, 0.4),
    }
    sites = ("latent", ["scale", "z", "z"])
    return xr.Dataset({name: (("data", "latent"), value) for name, value in variables.items()}, {"site": sites})


@pytest.mark.parametrize("site", ["scale", "z"])
def test_statistics_of_a_site_have_the_right_values_and_errors(site):
    for (value, se), truth, wrong in zip(
        (sd_ratio(comparison(), site), mean_error(comparison(), site)), (0.8, 0.3), (0.82, 0.5), strict=True
    ):
        assert abs(value - truth) < 4.8 * se  # 1e-5 in all four
        assert abs(value - wrong) > 4.8 * se


def test_a_row_is_trained_judged_and_kept(tmp_path):
    bench = Bench(PLAN, tmp_path)
    model = bench.model("gsm", {"latents": 4})
    row = bench.row("gsm", "collapsed", model, "collapsed", {"scale": "gamma-fixed"})
    assert row.gap == pytest.approx(row.evidence - row.elbo)
    assert row.gap > -4.4 * row.gap_se
    assert set(row.sd_ratio) == {"scale", "y"}
    assert "| gsm | collapsed |" in line(row)
    again = Bench(PLAN, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert (
        again.row("gsm", "collapsed", again.model("gsm", {"latents": 4}), "collapsed", {"scale": "gamma-fixed"}) == row
    )
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    other = Bench(replace(PLAN, guide_epochs=3), tmp_path)
    assert other.folder("x") != bench.folder("x")
    assert other.folder("x", ["seed"]) == bench.folder("x", ["seed"])


EXACT = {
    **PLANTED,
    **FOOLED,
    "one direction": lambda: OneDirection(20, 0.7),
    "mean field": lambda: OneDirection(9, 0.4),
}


@pytest.mark.parametrize("name", EXACT)
def test_planted_exact_guides_are_the_posterior(name):
    """log p − log q is the same for all draws of a datum, and ranks among these are uniform."""
    problem, generator = EXACT[name](), torch.Generator().manual_seed(0)
    _, x = problem.simulate(50, generator)
    theta, log_q = problem.guides["exact"].draw(x, 30, generator)
    close = {"rtol": 1e-4, "atol": 2e-3} if theta.dtype == torch.float32 else {}
    torch.testing.assert_close(log_q, problem.guides["exact"].log_q(theta, x), **close)
    weights = problem.log_likelihood(theta, x) + problem.log_prior(theta) - log_q
    torch.testing.assert_close(weights, weights[:1].expand_as(weights), rtol=0, atol=2e-3 if close else 1e-8)
    table = uniformity(
        power.ranks(problem, problem.guides["exact"], cells.Budget(1, simulations=1000, ranked=100), generator)
    )
    assert float(table["p_value"].min()) * table.sizes["quantity"] > 1e-5


@pytest.mark.parametrize("name", EXACT)
def test_the_evidence_gap_of_planted_guides_is_their_divergence(name):
    """KL(q ‖ p) is zero for the exact guide and positive for all others: the densities of guides are comparable."""
    problem, generator = EXACT[name](), torch.Generator().manual_seed(0)
    _, x = problem.simulate(100, generator)
    elbo = {}
    for defect, guide in problem.guides.items():
        theta, log_q = guide.draw(x, 200, generator)
        elbo[defect] = float((problem.log_likelihood(theta, x) + problem.log_prior(theta) - log_q).mean())
    gaps = {defect: elbo["exact"] - value for defect, value in elbo.items() if defect != "exact"}
    assert all(gap > -0.02 for gap in gaps.values()), gaps
    if "prior as posterior" in gaps:
        assert gaps["prior as posterior"] > 0.3
    if "missing mode" in gaps:
        assert gaps["missing mode"] == pytest.approx(math.log(2), abs=0.02)
    if "sd × 1.25" in gaps:
        size = sum(entries or 1 for entries in problem.sites.values()) if name != "gsm" else 1
        assert gaps["sd × 1.25"] == pytest.approx(size * (0.5 * (1.25**2 - 1) - math.log(1.25)), rel=0.25)


@pytest.mark.parametrize(
    ("defect", "arguments"), [("sd × 0.8", {"sd": 0.8}), ("correlation ignored", {"correlated": False})]
)
def test_planted_ranks_are_those_of_calibration(defect, arguments):
    """Bias and spread of every quantity, of the same program and guide, through Pyro and without."""
    through = uniformity(calibration(programs.pair, programs.guide(**arguments), programs.X, 2000, 100))
    problem, generator = pair(), torch.Generator().manual_seed(0)
    without = uniformity(
        power.ranks(problem, problem.guides[defect], cells.Budget(1, simulations=2000, ranked=100), generator)
    )
    assert through["quantity"].values.tolist() == without["quantity"].values.tolist()
    for name in ("bias", "spread"):
        error = np.hypot(through[f"{name}_se"], without[f"{name}_se"])
        assert float(np.abs((through[name] - without[name]) / error).max()) < limit(24), name


CELL = cells.Cell("two modes", "missing mode", 2, cells.Budget(20, 100, 200, 200, 100))


def test_a_row_of_the_check_is_made_and_kept(tmp_path, capsys):
    row = power.made(CELL, tmp_path)
    assert row.rates["whole"] == 1.0
    assert row.rates["k-hat"] == 0.0
    assert row.passes["whole"] == 0.0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert power.made(CELL, tmp_path) == row
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    exact = power.made(replace(CELL, guide="exact"), tmp_path)
    power_tables.show([exact, row])
    assert "missed" not in capsys.readouterr().out
    assert power.made(replace(CELL, program="pair"), tmp_path, new=False) is None


@pytest.fixture(scope="module")
def trained_pca(tmp_path_factory):
    """Trained for a moment: what is planted is seen whatever the rest is."""
    return trained.Trained("ppca, trained", tmp_path_factory.mktemp("power"), epochs=1)


def planted_draws(trained_pca, name, seed):
    """20,000 draws for each of 8 data."""
    data = {"x": trained_pca.train[:8]}
    return posterior(trained_pca.model, trained_pca.planted(name), data, 20_000, seed=seed)


@pytest.fixture(scope="module")
def as_trained(trained_pca):
    return planted_draws(trained_pca, trained.AS_TRAINED, 0)


@pytest.mark.parametrize("defect", trained.TRAINED["ppca, trained"])
def test_defects_of_trained_guides_are_those_that_are_named(trained_pca, as_trained, defect):
    """Sd ratios and mean shifts of 20,000 draws a datum, and the density against that of the draws."""
    trees = [as_trained, planted_draws(trained_pca, defect, 1)]
    as_it_is, planted = (tree["posterior"]["z"].values[0] for tree in trees)
    sd = as_it_is.std(0)
    ratio, shift = planted.std(0) / sd, (planted.mean(0) - as_it_is.mean(0)) / sd
    wanted_ratio, wanted_shift = np.ones_like(sd), np.zeros_like(sd)
    number = re.search(r"\d+\.\d+", defect)
    if defect.startswith("sd"):
        wanted_ratio[:] = float(number.group())
    if defect.startswith("mean"):
        wanted_shift[:] = float(number.group())
    if defect.startswith("one latent"):
        wanted_ratio[:, 0] = 0.7
    if defect == "low contrast":
        low = trained_pca.train[:8].flatten(1).norm(dim=1) < trained_pca.train.flatten(1).norm(dim=1).quantile(0.3)
        wanted_ratio[low] = 0.7
        wanted_ratio[~low] = ratio[~low].mean()
        assert ratio[~low].mean() > 1.1
    if defect == "prior as posterior":
        assert np.abs(planted.mean(0)).max() < limit(32) / np.sqrt(20_000)
        assert np.abs(planted.std(0) - 1).max() < limit(32) * 0.005
        return
    if defect == "correlation ignored":
        found = [np.corrcoef(planted[:, datum].T)[0, 1] for datum in range(8)]
        assert np.abs(found).max() < limit(8) / np.sqrt(20_000)
    if defect == "tails lost":  # that of a uniform number, with kurtosis 1.8
        first = (planted[..., 0] - planted[..., 0].mean(0)) / planted[..., 0].std(0)
        assert np.abs(first).max() < 1.8
    entropy = [-tree["sample_stats"]["log_q"].values[0].mean(0) for tree in trees]
    if defect == "tails lost":
        wanted = trained.LATENTS * (math.log(12) - math.log(2 * math.pi * math.e)) / 2
        np.testing.assert_allclose(entropy[1] - entropy[0], wanted, atol=0.06)  # of 20,000 draws ± .01
    elif defect != "correlation ignored":
        np.testing.assert_allclose(entropy[1] - entropy[0], np.log(wanted_ratio).sum(-1), atol=0.12)
    # the sd of a sd of 20,000 draws is .005, for two of them .007
    assert np.abs(ratio / wanted_ratio - 1).max() < limit(64) * 0.0071
    assert np.abs(shift - wanted_shift).max() < limit(64) * 0.01 * max(1, wanted_ratio.max())


def test_intervals_are_clopper_and_pearsons():
    row = power_tables.Row("pair", "exact", 80, {}, {}, {"data": 128, "draws": 1000, "simulations": 2000})
    for count in (0, 3, 80):
        wanted = binomtest(count, 80).proportion_ci(method="exact")
        assert row.interval(count / 80) == pytest.approx((wanted.low, wanted.high))


def test_peers_are_compared_at_equal_false_alarms():
    """A Normal number that a defect moves by 2 sd: its power at 5% is Φ(2 − 1.645)."""
    rng = np.random.default_rng(0)
    numbers = {"exact": rng.normal(size=4000), "defect": 2 + rng.normal(size=4000)}
    outcomes = {guide: [{"ours: number": {"number": v}} for v in each] for guide, each in numbers.items()}
    (row,) = peers.rows(outcomes)
    assert row.nominal is None
    assert row.power["defect"] == pytest.approx(0.639, abs=0.05)
    found = peers.repetition(pair(), "sd × 0.9", 1)
    assert {name.split(":")[0] for name in found} >= {"calibrant", "ArviZ"}
    assert all(np.isfinite(each["number"]) for each in found.values())


def test_the_page_has_the_tables_of_the_stored_rows():
    """docs/checks.md is what `python -m benchmarks.power_tables --docs docs/checks.md` writes."""
    rows = [power_tables.Row(**row) for row in json.loads(power_tables.RESULTS.read_text())]
    page = (power_tables.RESULTS.parents[2] / "docs/checks.md").read_text()
    assert power_tables.with_tables(page, power_tables.all_tables(rows)) == page
    with pytest.raises(SystemExit, match="places for the table"):
        power_tables.with_tables("no place", {"conclusions": ""})


def test_what_must_hold_is_said_of_rows():
    budget = {"data": 128, "draws": 1000, "simulations": 2000, "reference": 1000, "ranked": 1000}
    seen, missed, harmless = (
        power_tables.Row("one pair", "one correlation ignored", 100, {"whole": 1.0}, {"whole": 0.0}, budget),
        power_tables.Row("one pair", "one correlation ignored", 100, {"whole": 0.5}, {"whole": 0.3}, budget),
        power_tables.Row("one direction", "sds 3% off", 100, {"whole": 0.0}, {"whole": 1.0}, budget),
    )
    assert {answer for _, answer in power_tables.requirements([seen])} == {"holds"}
    assert {answer for _, answer in power_tables.requirements([missed])} == {"missed"}
    assert {answer for _, answer in power_tables.requirements([harmless])} == {"holds"}
    exact = power_tables.Row("one pair", "exact", 100, {"whole": 0.0}, {"whole": 0.8}, budget)
    assert [answer for _, answer in power_tables.requirements([exact])] == ["holds", "missed"]


def test_rows_that_are_not_made_again_stay_in_the_file(tmp_path: Path) -> None:
    cell, file = cells.PARTS["pair"][0], tmp_path / "rows.json"
    row = power_tables.Row(cell.program, cell.guide, 50, {"whole": 1.0}, {"whole": 0.0}, asdict(cell.budget))
    gone = replace(row, program="no program of today")
    file.write_text(json.dumps([asdict(gone), asdict(row)]))
    exact = replace(row, guide="exact", repetitions=100)
    assert power.together([exact], str(file)) == [row, exact]
    assert power.together([replace(row, repetitions=60)], str(file)) == [replace(row, repetitions=60)]
    assert power.together([exact], None) == [exact]


@pytest.mark.slow
def test_100_000_images_are_searched_in_less_than_2_gib():
    row = retrieval.measure(100_000, 1000)
    assert row.gib_input == pytest.approx(0.48, abs=0.01)
    assert row.gib_beyond < 2.0


def test_the_search_of_a_few_images_is_measured():
    row = retrieval.measure(2000, 500, features=16)
    assert (row.images, row.queries, row.features) == (2000, 500, 16)
    assert row.gib_beyond < 0.5


def test_the_time_between_two_stages_belongs_to_the_one_that_begins(monkeypatch):
    moments = iter([0.0, 1.0, 3.0, 4.0, 9.0, 10.0])
    monkeypatch.setattr(checking.time, "process_time", lambda: next(moments))
    watch = checking.Watch("case")
    for stage, done in (("fit", 0), ("fit", 1), ("fit", 2), ("pictures", 1), ("pictures", 2)):
        watch(stage, done, 2)
    found = {row.stage: (row.seconds, row.silent, row.share) for row in watch.rows()}
    assert found == {"fit": (4.0, 2.0, 0.4), "pictures": (6.0, 5.0, 0.6)}
