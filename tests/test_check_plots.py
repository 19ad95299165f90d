"""Pictures of a check: bands hold what they say, the worst is shown, and nothing that a result may hold breaks them."""

from __future__ import annotations

import base64
from itertools import product
from math import factorial

import numpy as np
import pytest
import xarray as xr
from agreement import limit
from matplotlib.figure import Figure
from pyro.nn import PyroModule
from scipy.stats import norm

from calibrant.evaluation import RunResult, compare, uniformity
from calibrant.evaluation.reporting import check_plots, ecdf_bands
from calibrant.evaluation.reporting.ecdf_bands import ecdf_band
from calibrant.evaluation.reporting.style import data_uri

RNG = np.random.default_rng


def drawn(figure: Figure | None) -> bool:
    assert figure is not None
    return base64.b64decode(data_uri(figure).partition(",")[2]).startswith(b"\x89PNG")


def leaves(values: np.ndarray, band: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Which rows of uniform values have a distribution function outside a band."""
    grid = np.arange(1, len(band[0]) + 1) / (len(band[0]) + 1)
    ecdf = np.stack([np.searchsorted(np.sort(row), grid, side="right") for row in values]) / values.shape[1]
    return ((ecdf < band[0] - 1e-9) | (ecdf > band[1] + 1e-9)).any(1)


# -- the band ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "level"), [(100, 0.95), (500, 0.95), (500, 0.99)])
def test_one_curve_of_uniform_values_in_twenty_leaves_the_band(count, level):
    outside = leaves(RNG(0).uniform(size=(4000, count)), ecdf_band(count, level)).mean()
    assert abs(outside - (1 - level)) < limit(3) * np.sqrt(level * (1 - level) / 4000)


def test_curves_that_are_not_uniform_leave_it():
    too_narrow = norm.cdf(1.25 * RNG(1).normal(size=(200, 2000)))
    assert leaves(too_narrow, ecdf_band(2000)).mean() > 0.99


def test_the_probability_of_staying_inside_is_that_of_all_ways_to_fall_into_the_bins():
    low, high = np.array([0, 1, 2]), np.array([2, 3, 4])
    ways = [bins for bins in product(range(6), repeat=4) if sum(bins) == 5]
    shares = [factorial(5) / np.prod([factorial(k) for k in bins]) / 4**5 for bins in ways]
    inside = [all((low <= np.cumsum(bins)[:3]) & (np.cumsum(bins)[:3] <= high)) for bins in ways]
    assert ecdf_bands._inside(5, low, high) == pytest.approx(np.dot(shares, inside), rel=1e-12)


# -- results -----------------------------------------------------------------------------------------------------------


def simulated(quantities: int = 1, sd: float = 1.0) -> xr.DataTree:
    """PIT values of 12 latents and of functions of them, all uniform but `z[7]` and the last quantity."""
    rng, names = RNG(2), ["log_likelihood", "log_joint", "hpd", "tarp", *(f"mine{i}" for i in range(quantities))]
    variables = {"z": (("chain", "draw", "z_dim_0"), rng.uniform(size=(1, 500, 12)))}
    variables |= {name: (("chain", "draw"), rng.uniform(size=(1, 500))) for name in names}
    variables["z"][1][..., 7] **= 2
    variables[names[-1]][1][:] **= 3
    z, latents = rng.normal(size=(500, 12)) / max(sd, 1e-300), [f"z[{i}]" for i in range(12)]
    recovery = xr.Dataset(
        {"z_score": (("draw", "latent"), z), "contraction": (("draw", "latent"), np.full((500, 12), 0.5))},
        {"latent": latents, "site": ("latent", ["z"] * 12)},
    )
    if sd == 0:
        recovery["z_score"][:], recovery["contraction"][:, :3] = np.inf, np.nan
    group = xr.Dataset(variables, attrs={"guide_draws": 100, "latents": 2})
    return xr.DataTree.from_dict({"/prior_sbc": group, "/recovery": recovery})


def posterior(seed: int, correlated: bool = False, sd: float = 1.0) -> xr.DataTree:
    """Four data with a vector latent, of which two entries may depend on each other."""
    draws = sd * RNG(seed).normal(size=(4, 500, 4, 4))
    if correlated:
        draws[..., 3] = 0.8 * draws[..., 1] + 0.6 * draws[..., 3]
    group = xr.Dataset({"z": (("chain", "draw", "data", "z_dim_0"), draws)}, {"data": list("abcd")})
    group.attrs = {"latents": '["z"]', "independent_draws": 1}
    observed = xr.Dataset({"x": ("data", np.zeros(4))}, {"data": list("abcd")})
    return xr.DataTree.from_dict({"/posterior": group, "/observed_data": observed})


def result(**parts: object) -> RunResult:
    ours, theirs = posterior(0, sd=0.5), posterior(1, correlated=True)
    return RunResult("m", PyroModule(), {}, ours, theirs, compare(ours, theirs), **parts)


def weighed(khat: list[float], gap: list[float]) -> xr.Dataset:
    columns = {"pareto_k": khat, "ess": np.full(len(khat), 500.0), "gap": gap, "gap_se": np.full(len(gap), 0.1)}
    variables = {name: ("data", np.array(value)) for name, value in columns.items()}
    return xr.Dataset(variables, attrs={"good_k": 0.67, "pool": 1000})


PICTURES = [check_plots.calibration_bands, check_plots.coverage_curves, check_plots.recovery, check_plots.importance]


@pytest.mark.parametrize("picture", [*PICTURES, check_plots.classifier, check_plots.pairs])
def test_without_what_it_shows_there_is_no_picture(picture):
    assert picture(RunResult("m", PyroModule(), {}, posterior(0))) is None


@pytest.mark.parametrize("picture", PICTURES[:3])
def test_a_calibration_is_drawn(picture):
    assert drawn(picture(result(calibration=simulated())))


def test_recovery_by_a_guide_without_spread_is_drawn():
    assert drawn(check_plots.recovery(result(calibration=simulated(sd=0.0))))


def test_without_continuous_latents_there_is_no_recovery():
    tree = xr.DataTree.from_dict({"/prior_sbc": simulated()["prior_sbc"].dataset, "/recovery": xr.Dataset()})
    assert check_plots.recovery(result(calibration=tree)) is None


def test_functions_and_the_worst_latents_are_shown():
    found = uniformity(simulated(5))
    shown = check_plots._quantities(found, 9)
    assert shown[:7] == ["log_joint", "log_likelihood", "hpd", "tarp", "mine0", "mine1", "mine2"]
    assert shown[7:] == ["mine4", "z[7]"]
    assert check_plots._is_latent(found).tolist() == [True] * 12 + [False] * 9
    assert set(check_plots.pit_columns(simulated(5))) == set(found["quantity"].values.tolist())


def test_the_joint_band_holds_all_quantities():
    rng, kept = RNG(3), 0
    band = check_plots.joint_band(uniformity(simulated(4)))
    for _ in range(400):
        kept += not leaves(rng.uniform(size=(20, 500)), band).any()
    assert kept / 400 > 0.95 - limit(1) * np.sqrt(0.05 * 0.95 / 400)


def test_coverage_of_the_reference_is_that_of_normals():
    level = np.arange(1, 100) / 100
    expected = 2 * norm.cdf(0.5 * norm.ppf((1 + level) / 2)) - 1
    # 16 guides of 2,000 draws each, judged by 500 draws each
    assert np.abs(check_plots._reference_coverage(result()) - expected).max() < 0.02


def test_sizes_of_z_scores_are_those_of_a_guide_half_as_wide():
    low, middle, high = check_plots._typical_z(simulated(sd=0.5)["recovery"].dataset)
    assert np.abs(np.log(middle / 2)).max() < 0.25
    assert ((low < 2) & (high > 2)).sum() >= 9  # of 12, 95% each
    assert check_plots._named(np.array([1.0, 5.0, 5.1, 0.2]), np.array([0.5, 0.5, 0.52, 0.9]), 2) == [2, 3]


@pytest.mark.parametrize("khat", [[0.1, 0.9, 0.5], [-np.inf, np.inf, np.nan], [-np.inf] * 3], ids=str)
def test_any_khat_and_gap_is_drawn(khat):
    assert drawn(check_plots.importance(result(weights=weighed(khat, [*[0.5] * (len(khat) - 1), np.inf]))))


@pytest.mark.parametrize("accuracy", [[0.5, 0.9, np.nan, 0.6], [1.0, 1.0, 1.0, 1.0], [0.2, np.nan, np.nan, np.nan]])
def test_the_classifier_is_drawn_for_data_that_were_tested(accuracy):
    known = np.isfinite(accuracy)
    columns = {
        "c2st": accuracy,
        "c2st_null": np.where(known, 0.5, np.nan),
        "c2st_null_sd": np.where(known, 0.02, np.nan),
    }
    found = result()
    found.comparison = found.comparison.assign(
        {name: ("data", np.array(value)) for name, value in columns.items()},
    )
    found.comparison["c2st_flagged"] = ("data", np.nan_to_num(accuracy) > 0.8)
    assert drawn(check_plots.classifier(found))
    found.comparison["c2st"][:] = np.nan
    assert check_plots.classifier(found) is None


def test_the_pair_with_the_wrong_correlation_is_shown():
    found = result()
    latents = found.comparison["latent"].values.tolist()
    ours, theirs = (check_plots.scalar_draws(tree, "b", latents) for tree in (found.amortized, found.reference))
    (pair, _), (largest, _) = check_plots._chosen_pairs(found.comparison, "b", ours, theirs)
    assert pair == ["z[1]", "z[3]"]
    assert len(largest) == 2
    assert drawn(check_plots.pairs(found))
    one = found.comparison.isel(data=[0])
    assert drawn(check_plots.pairs(RunResult("m", PyroModule(), {}, found.amortized, found.reference, one)))
