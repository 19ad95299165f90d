"""The numbers of `compare` and its verdicts, on synthetic trees whose posteriors are known."""

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr
from agreement import limit
from scipy.stats import binom, norm, wasserstein_distance
from synthetic_trees import LATENTS, found, tree

from calibrant.evaluation.judgements.against_reference import verdicts
from calibrant.evaluation.judgements.decisions import FALSE_ALARM
from calibrant.evaluation.statistics.comparison import compare

# --- the numbers ------------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 3, draws=700, factor=0.8, shift=0.3), tree(rng, 3, draws=300, chains=4)
    result = compare(post, ref)
    assert result["latent"].values.tolist() == ["scale", "z[0]", "z[1]", "z[2]", "z[3]"]
    assert result["site"].values.tolist() == ["scale", "z", "z", "z", "z"]
    assert result["index"].values.tolist() == ["", "0", "1", "2", "3"]
    for row, column in itertools.product(range(3), range(LATENTS)):
        a, r = (
            (t["posterior"]["z"][..., row, column - 1] if column else t["posterior"]["scale"][..., row]).values.ravel()
            for t in (post, ref)
        )
        a, r = a.astype(float), r.astype(float)
        sd, cell = r.std(ddof=1), {"data": row, "latent": column}
        low, high = np.quantile(a, [0.05, 0.95], method="weibull")
        expected = {
            "mean_error": (a.mean() - r.mean()) / sd,
            "sd_ratio": a.std(ddof=1) / sd,
            "wasserstein": wasserstein_distance(a, r) / sd,
            "coverage": ((r >= low) & (r <= high)).mean(),
        }
        for name, value in expected.items():
            assert float(result[name].isel(cell)) == pytest.approx(value, rel=1e-9), name


def z_scores(result: xr.Dataset, shift: float, factor: float) -> dict[str, np.ndarray]:
    """Each statistic's deviation from the truth for normal posteriors, in its own standard errors."""
    x = np.linspace(-9.0, 9.0, 20_001)
    distance = np.trapezoid(np.abs(norm.cdf(x, shift, factor) - norm.cdf(x)), x)
    ends = shift + factor * norm.ppf([0.05, 0.95])
    equal = shift == 0.0 and factor == 1.0
    scores = {
        "mean": (result["mean_error"] - shift) / result["mean_error_se"],
        "sd": (np.log(result["sd_ratio"]) - np.log(factor)) / (result["sd_ratio_se"] / result["sd_ratio"]),
        "coverage": (result["coverage"] - np.diff(norm.cdf(ends))[0]) / result["coverage_se"],
        "coverage at level": (result["coverage"] - 0.9) / result["coverage_null_se"],
        "wasserstein": (result["wasserstein"] - result["wasserstein_null"]) / result["wasserstein_null_se"]
        if equal
        else (result["wasserstein"] - distance) / result["wasserstein_se"],
    }
    if not equal:
        del scores["coverage at level"]
    return {name: score.values for name, score in scores.items()}


# What the reference is, and how the guide differs from it.
CASES = {
    "equal, exact": ({"draws": 1000}, {}),
    "equal, exact, skewed": ({"draws": 1000, "skewed": True}, {"skewed": True}),
    "equal, AR(1)": ({"draws": 800, "chains": 4, "phi": 0.8}, {}),
    "equal, AR(1), skewed": ({"draws": 800, "chains": 4, "phi": 0.8, "skewed": True}, {"skewed": True}),
    "different, exact": ({"draws": 1000}, {"shift": 0.4, "factor": 0.8}),
    "different, AR(1)": ({"draws": 800, "chains": 4, "phi": 0.8}, {"shift": 0.4, "factor": 0.8}),
}


QUICK = ("equal, exact, skewed", "equal, AR(1)", "different, AR(1)")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.truth]) for c in CASES])
def test_standard_errors_are_calibrated(case: str) -> None:
    """Over independent posteriors the deviations from the truth, in standard errors, have mean 0 and sd 1.

    The sd of so many deviations is itself known to 0.05.
    """
    reference, guide = CASES[case]
    rng, n = np.random.default_rng(7), 60
    result = compare(tree(rng, n, latents=4, **guide), tree(rng, n, latents=4, **reference))
    for name, z in z_scores(result, guide.get("shift", 0.0), guide.get("factor", 1.0)).items():
        assert 0.8 < z.std() < 1.25, (name, z.std())
        # Second-order bias of a ratio and ESS that goes with the estimate are allowed a quarter of a standard error.
        assert abs(z.mean()) < 0.25 + limit(6 * len(CASES)) / np.sqrt(n), (name, z.mean())


@pytest.mark.parametrize(("phi", "rho"), [pytest.param(0.0, 0.4, marks=pytest.mark.truth), (0.6, 0.4), (0.6, 0.1)])
def test_standard_error_of_the_correlation_is_calibrated(phi: float, rho: float) -> None:
    """As above, with more data: one skewed number per datum, whose sd is known to 0.08."""
    rng, n = np.random.default_rng(7), 250
    reference = tree(rng, n, draws=500, chains=4, phi=phi, latents=4)
    reference["posterior"].attrs["independent_draws"] = 1  # saves the ESS, which the correlation does without
    result = compare(tree(rng, n, latents=4, rho=rho), reference)
    se = result["correlation_null_se"] if rho == 0.4 else result["correlation_mean_square_se"]
    z = ((result["correlation_mean_square"] - (rho - 0.4) ** 2) / se).values
    assert 0.8 < z.std() < 1.25
    assert abs(z.mean()) < 0.1 + limit(3) / np.sqrt(n)


def test_calibration_test_sees_standard_errors_without_autocorrelation() -> None:
    """The planted defect of the test above: an AR(1) reference that claims to be independent."""
    rng = np.random.default_rng(7)
    reference = tree(rng, 100, draws=800, chains=4, phi=0.8, latents=3)
    reference["posterior"].attrs["independent_draws"] = 1
    result = compare(tree(rng, 100, latents=3), reference)
    assert all(z.std() > 1.25 for name, z in z_scores(result, 0.0, 1.0).items() if name in ("mean", "wasserstein"))


def test_correlation_error_of_a_mean_field_guide() -> None:
    rng = np.random.default_rng(0)
    result = compare(tree(rng, 40, rho=0.0), tree(rng, 40, draws=2000, rho=0.5))
    z = (result["correlation_error"] - 0.5) / result["correlation_error_se"]
    assert abs(float(z.mean())) * np.sqrt(40) < limit(1)
    assert found(result, "all latents", "correlation").status == "fail"


def test_one_ignored_pair_of_many_latents_fails() -> None:
    """The exact posterior couples two of 16 latents with .95; the guide does not. The whole matrix hides it."""
    rng = np.random.default_rng(11)
    guide, reference = (tree(rng, 32, chains=4, rho=0.0, latents=16) for _ in range(2))
    values = reference["posterior"]["z"].values
    standard = (values - values.mean((0, 1))) / values.std((0, 1))
    coupled = 0.95 * standard[..., 3] + np.sqrt(1 - 0.95**2) * standard[..., 4]
    values[..., 4] = values.mean((0, 1))[..., 4] + values.std((0, 1))[..., 4] * coupled
    reference["posterior"]["z"].values = values
    verdict = found(compare(guide, reference), "all latents", "correlation")
    assert verdict.status == "fail", verdict
    assert "z[3]" in verdict.sentence or "z[4]" in verdict.sentence
    fair = compare(guide, tree(rng, 32, chains=4, rho=0.0, latents=16))
    assert found(fair, "all latents", "correlation").status == "pass"


def test_a_shared_draw_moves_all_data_together() -> None:
    """z_i = c + 0.1 e_i with one c a draw: a perfect guide with few draws must not be failed for z."""
    statuses = set()
    for seed in range(12):
        rng = np.random.default_rng(seed)
        trees = []
        for draws, chains in ((150, 1), (500, 4)):
            one = tree(rng, 50, draws, chains, rho=0.0, latents=2)
            shared = rng.normal(size=(chains, draws))
            local = shared[..., None] + 0.1 * rng.normal(size=(chains, draws, 50))
            posterior = xr.Dataset(
                {"c": (("chain", "draw"), shared), "z": (("chain", "draw", "data"), local)},
                coords={"data": one["posterior"]["data"]},
                attrs={**one["posterior"].attrs, "latents": json.dumps(["c", "z"])},
            )
            one["posterior"] = xr.DataTree(posterior)
            trees.append(one)
        statuses.add(found(compare(*trees), "z", "mean").status)
    assert "fail" not in statuses


def test_one_latent_has_no_correlation() -> None:
    rng = np.random.default_rng(0)
    trees = [tree(rng, 4), tree(rng, 4)]
    for each in trees:
        each["posterior"] = each["posterior"].to_dataset()[["scale"]].assign_attrs(latents='["scale"]')
    result = compare(*trees)
    assert result["correlation_error"].isnull().all()
    assert {v.quantity for v in verdicts(result)} == {"sd", "mean", "coverage", "shape", "single data"}


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comparisons", [8, pytest.param(30, marks=pytest.mark.truth)])
def test_exact_sampler_never_fails_and_nearly_always_passes(comparisons: int) -> None:
    """Independent comparisons, far inside the margins; 32 data are enough to pass."""
    rng = np.random.default_rng(0)
    parts = [compare(tree(rng, 32, latents=2), tree(rng, 32, draws=1500, latents=2)) for _ in range(comparisons)]
    statuses = [verdict.status for part in parts for verdict in verdicts(part)]
    assert "fail" not in statuses
    assert statuses.count("pass") >= 0.98 * len(statuses) - 1


def test_narrow_guide_fails_with_its_size() -> None:
    rng = np.random.default_rng(0)
    result = compare(tree(rng, factor=0.8), tree(rng, draws=2000))
    for site in ("scale", "z"):
        verdict = found(result, site, "sd")
        assert verdict.status == "fail"
        assert verdict.effect == pytest.approx(-0.2, abs=limit(2) * verdict.se)
        assert verdict.se < 0.01
        assert verdict.sentence.startswith(f"posterior sd of `{site}`: too small by ")
        assert found(result, site, "mean").status == "pass"
        expected = np.diff(norm.cdf(0.8 * norm.ppf([0.05, 0.95])))[0]
        coverage = found(result, site, "coverage")
        assert coverage.status == "fail"
        assert coverage.effect == pytest.approx(expected - 0.9, abs=limit(2) * coverage.se)
        assert coverage.sentence.startswith(f"90% intervals of `{site}`: contain 8")


def test_wide_guide_is_called_wide() -> None:
    rng = np.random.default_rng(0)
    verdict = found(compare(tree(rng, factor=1.25), tree(rng, draws=2000)), "z", "sd")
    assert verdict.effect == pytest.approx(0.25, abs=limit(1) * verdict.se)
    assert verdict.sentence.startswith("posterior sd of `z`: too large by 2")


@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_biased_guide_fails_with_its_sign(shift: float) -> None:
    rng = np.random.default_rng(0)
    result = compare(tree(rng, shift=shift), tree(rng, draws=2000))
    for site in ("scale", "z"):
        verdict = found(result, site, "mean")
        assert verdict.status == "fail"
        assert verdict.effect == pytest.approx(shift, abs=limit(4) * verdict.se)
        assert verdict.sentence.startswith(f"posterior mean of `{site}`: too {'low' if shift < 0 else 'high'} by 0.")
        assert verdict.sentence.endswith(" posterior sd")
        assert found(result, site, "sd").status == "pass"


@pytest.mark.parametrize(
    ("quantity", "defect", "size"),
    [
        ("sd", lambda sign: {"factor": np.where(sign > 0, 1.2, 1 / 1.2)}, 0.2),
        ("mean", lambda sign: {"shift": 0.3 * sign}, 0.3),
    ],
)
def test_guide_right_on_average_but_wrong_per_datum_fails(
    quantity: str, defect: Callable[[np.ndarray], dict[str, np.ndarray]], size: float
) -> None:
    rng = np.random.default_rng(0)
    sign = np.where(np.arange(32) % 2, 1.0, -1.0)[:, None]
    result = compare(tree(rng, **defect(sign)), tree(rng, draws=2000))
    for site in ("scale", "z"):
        verdict = found(result, site, quantity)
        assert verdict.status == "fail"
        assert verdict.effect == pytest.approx(size, abs=limit(4) * verdict.se)
        assert "root mean square" in verdict.sentence


@pytest.mark.parametrize("per_datum", [False, True])
def test_one_wrong_latent_of_sixteen_fails(per_datum: bool) -> None:
    """Averaged over sixteen latents the error is inside the margin, with one sign and (root mean square) with two."""
    rng = np.random.default_rng(0)
    factor = np.ones((32, 17))
    factor[:, 4] = np.where(np.arange(32) % 2, 0.75, 1 / 0.75) if per_datum else 0.7
    result = compare(tree(rng, factor=factor, rho=0.0, latents=17), tree(rng, draws=2000, rho=0.0, latents=17))
    z = np.log(result["sd_ratio"].isel(latent=result["site"] == "z"))
    assert abs(float(z.mean())) < np.log(1.1)
    assert float((z**2).mean()) < np.log(1.1) ** 2
    verdict = found(result, "z", "sd")
    assert verdict.status == "fail"
    said = "off by 3" if per_datum else "too small by "
    assert verdict.sentence.startswith(f"posterior sd of `z[3]`: {said}")
    assert "the worst of 16 latents" in verdict.sentence
    assert found(result, "scale", "sd").status == "pass"


def test_constant_guide_fails() -> None:
    """A point estimate has sd 0, of which the logarithm must not turn into a shrug."""
    rng = np.random.default_rng(0)
    result = compare(tree(rng, factor=0.0), tree(rng, draws=2000))
    verdict = found(result, "z", "sd")
    assert verdict.status == "fail"
    assert verdict.sentence.startswith("posterior sd of `z`: too small by 100")
    assert found(result, "z", "coverage").status == "fail"


def test_few_data_and_draws_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    result = compare(tree(rng, 100, draws=100), tree(rng, 100, draws=100))
    for start in range(0, 100, 20):
        judged = verdicts(result.isel(data=slice(start, start + 20)))
        assert "fail" not in {v.status for v in judged}
        assert all("cannot tell whether" in v.sentence for v in judged if v.status == "cannot tell")
        assert "cannot tell" in {v.status for v in judged}


@pytest.fixture(scope="module", params=[50, pytest.param(150, marks=pytest.mark.truth)])
def few_noisy_data(request: pytest.FixtureRequest) -> list[xr.Dataset]:
    """Comparisons of one datum with 40 independent latents each, the guide exact."""
    rng, count = np.random.default_rng(0), request.param
    post, ref = (tree(rng, count, draws=100, rho=0.0, latents=40) for _ in range(2))
    result = compare(post, ref)
    return [result.isel(data=[i]) for i in range(count)]


def false_alarms(parts: list[xr.Dataset]) -> int:
    return sum(any(v.status == "fail" for v in verdicts(part)) for part in parts)


def most(parts: list[xr.Dataset]) -> int:
    return int(binom.isf(1e-5, len(parts), FALSE_ALARM))


def test_few_noisy_data_do_not_fail_by_chance(few_noisy_data: list[xr.Dataset]) -> None:
    assert false_alarms(few_noisy_data) <= most(few_noisy_data)


def test_false_alarms_of_standard_errors_that_are_too_small_are_seen(few_noisy_data: list[xr.Dataset]) -> None:
    """The planted defect of the test above: half the noise is taken for error."""
    halved = [part.assign(mean_error_se=part["mean_error_se"] / 2) for part in few_noisy_data]
    assert false_alarms(halved) > most(halved)
