"""The tables of guides: their statistics against known truth, and a small row, trained, judged and kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from benchmarks.structure import Bench, Plan, line, mean_error, sd_ratio

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
