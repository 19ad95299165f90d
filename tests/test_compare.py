"""`compare` and `verdicts` on synthetic trees whose posteriors are known."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from agreement import limit
from scipy.signal import lfilter
from scipy.stats import binom, norm, wasserstein_distance

from calibrant.errors import InferenceError
from calibrant.evaluation.compare import compare
from calibrant.evaluation.judging import FALSE_ALARM, Verdict
from calibrant.evaluation.verdicts import verdicts
from calibrant.inference.gate import exact_convergence

LATENTS = 5  # `scale` and `z[0..3]`, in this order, in arrays over latents


def tree(
    rng: np.random.Generator,
    data: Sequence[Any] | int = 32,
    draws: int = 1000,
    chains: int = 1,
    *,
    phi: float = 0.0,
    rho: float = 0.4,
    skewed: bool = False,
    factor: Any = 1.0,
    shift: Any = 0.0,
    failing: Sequence[Any] | None = (),
    latents: int = LATENTS,
) -> xr.DataTree:
    """Draws of a correlated normal posterior for each datum, independent or (phi > 0) AR(1).

    `factor` and `shift` (in posterior sd) are defects, broadcast to `(data, latent)`. Posteriors and observations
    depend on the label alone. `failing` data fail the gate; None leaves the group `convergence` out.
    """
    labels = list(range(data)) if isinstance(data, int) else list(data)
    order = np.array([int(str(label).strip("d")) for label in labels], dtype=float)[:, None]
    x = rng.normal(size=(chains, draws, len(labels), latents))
    if phi:
        x[:, 1:] *= np.sqrt(1.0 - phi**2)
        x = lfilter([1.0], [1.0, -phi], x, axis=1)
    x = x @ np.linalg.cholesky((1.0 - rho) * np.eye(latents) + rho).T
    x = np.exp(0.5 * x) - np.exp(0.125) if skewed else x
    x = 10.0 * np.sin(order) + np.exp(np.cos(order)) * (shift + factor * x)
    dims = ("chain", "draw", "data")
    attrs = {
        "model_sha256": "ab" * 32,
        "method": "test",
        "independent_draws": int(not phi),
        "latents": '["scale", "z"]',
    }
    posterior = xr.Dataset(
        {"z": ((*dims, "z_dim_0"), x[..., 1:].astype("float32")), "scale": (dims, x[..., 0].astype("float32"))},
        coords={"data": labels},
        attrs=attrs,
    )
    observed = xr.Dataset({"x": (("data", "x_dim_0"), np.hstack([order, order + 1]))}, coords={"data": labels})
    groups = {"posterior": posterior, "observed_data": observed}
    if failing is not None:
        errors = [0.5 if label in failing else 0.0 for label in labels]
        groups["convergence"] = exact_convergence(errors, np.zeros(len(labels)), labels)
    return xr.DataTree.from_dict(groups)


def found(result: xr.Dataset, site: str, quantity: str) -> Verdict:
    (verdict,) = [v for v in verdicts(result) if (v.site, v.quantity) == (site, quantity)]
    return verdict


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
    assert {v.quantity for v in verdicts(result)} == {"sd", "mean", "coverage"}


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("comparisons", [8, pytest.param(30, marks=pytest.mark.truth)])
def test_exact_sampler_never_fails_and_nearly_always_passes(comparisons: int) -> None:
    """Independent comparisons, far inside the margins; 32 data are enough to pass."""
    rng, data = np.random.default_rng(0), comparisons * 32
    result = compare(tree(rng, data, latents=2), tree(rng, data, draws=1500, latents=2))
    parts = [result.isel(data=slice(32 * i, 32 * (i + 1))) for i in range(comparisons)]
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
        assert verdict.sentence.startswith(f"`{site}`: too narrow by ")
        assert found(result, site, "mean").status == "pass"
        expected = np.diff(norm.cdf(0.8 * norm.ppf([0.05, 0.95])))[0]
        coverage = found(result, site, "coverage")
        assert coverage.status == "fail"
        assert coverage.effect == pytest.approx(expected - 0.9, abs=limit(2) * coverage.se)
        assert coverage.sentence.startswith(f"`{site}`: 90% intervals hold 8")


def test_wide_guide_is_called_wide() -> None:
    rng = np.random.default_rng(0)
    verdict = found(compare(tree(rng, factor=1.25), tree(rng, draws=2000)), "z", "sd")
    assert verdict.effect == pytest.approx(0.25, abs=limit(1) * verdict.se)
    assert verdict.sentence.startswith("`z`: too wide by 2")


@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_biased_guide_fails_with_its_sign(shift: float) -> None:
    rng = np.random.default_rng(0)
    result = compare(tree(rng, shift=shift), tree(rng, draws=2000))
    for site in ("scale", "z"):
        verdict = found(result, site, "mean")
        assert verdict.status == "fail"
        assert verdict.effect == pytest.approx(shift, abs=limit(4) * verdict.se)
        assert verdict.sentence.startswith(f"`{site}`: mean off by {'-' if shift < 0 else ''}0.")
        assert verdict.sentence.endswith(" sd")
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
    assert verdict.sentence.startswith("`z[3]`: sd off by 3" if per_datum else "`z[3]`: too narrow by ")
    assert "the worst of 16 latents" in verdict.sentence
    assert found(result, "scale", "sd").status == "pass"


def test_constant_guide_fails() -> None:
    """A point estimate has sd 0, of which the logarithm must not turn into a shrug."""
    rng = np.random.default_rng(0)
    result = compare(tree(rng, factor=0.0), tree(rng, draws=2000))
    verdict = found(result, "z", "sd")
    assert verdict.status == "fail"
    assert verdict.sentence.startswith("`z`: too narrow by 100")
    assert found(result, "z", "coverage").status == "fail"


def test_few_data_and_draws_cannot_tell() -> None:
    rng = np.random.default_rng(0)
    result = compare(tree(rng, 100, draws=100), tree(rng, 100, draws=100))
    for start in range(0, 100, 20):
        judged = verdicts(result.isel(data=slice(start, start + 20)))
        assert {v.status for v in judged} == {"cannot tell"}
        assert all("cannot tell whether" in v.sentence for v in judged)


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


# --- what is compared with what ---------------------------------------------------------------------------------------


def test_trees_are_joined_on_labels_not_on_positions() -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, range(8)), tree(rng, [9, 5, 3, 2, 4, 11])
    result = compare(post, ref)
    assert result["data"].values.tolist() == [2, 3, 4, 5]
    assert result.attrs["n_joined"] == 4
    assert float(np.abs(result["mean_error"]).max()) < 0.5


def test_labels_may_be_text() -> None:
    rng = np.random.default_rng(0)
    result = compare(tree(rng, ["d1", "d2", "d3"]), tree(rng, ["d3", "d2"], failing=["d3"]))
    assert result["data"].values.tolist() == ["d2"]
    assert result["left_out"].values.tolist() == ["d3"]


def test_latents_may_be_matrices_and_dimensions_named_differently() -> None:
    rng = np.random.default_rng(0)
    trees = [tree(rng, 3), tree(rng, 3)]
    for each, names in zip(trees, (("a", "b"), ("row", "column")), strict=True):
        z = each["posterior"]["z"].values.reshape(*each["posterior"]["z"].shape[:3], 2, 2)
        group = each["posterior"].to_dataset().drop_vars("z")
        each["posterior"] = group.assign(z=(("chain", "draw", "data", *names), z))
    assert compare(*trees)["latent"].values.tolist() == ["scale", "z[0,0]", "z[0,1]", "z[1,0]", "z[1,1]"]


def test_memory_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 7, draws=200), tree(rng, 7, draws=300)
    whole = compare(post, ref)
    monkeypatch.setattr("calibrant.inference.gate._BLOCK_ELEMENTS", 2 * 300 * LATENTS)
    xr.testing.assert_identical(whole, compare(post, ref))


def test_foreign_trees_without_attributes_are_compared() -> None:
    """Variables in common are compared, draws taken as correlated, and the gate computed from the draws."""
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 4), tree(rng, 4, draws=600, chains=4, phi=0.3, failing=None)
    ref["posterior"]["z"][1, :, 2, 3] += 30.0
    for each in (post, ref):
        each["posterior"].attrs = {}
        del each["observed_data"]
    ref["posterior"]["size"] = ref["posterior"]["scale"] + 1.0
    result = compare(post, ref)
    assert result["latent"].values.tolist() == ["z[0]", "z[1]", "z[2]", "z[3]", "scale"]
    assert result["left_out"].values.tolist() == [2]
    assert "R-hat" in result["reason"].values[0]
    assert "`z[3]`" in result["reason"].values[0]
    assert result.attrs["amortized_method"] == "unknown"


def test_discrete_latents_are_named_and_not_compared() -> None:
    """A class that is nearly certain has no sd to measure errors by; one tree of whole numbers alone is no class."""
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 8), tree(rng, 8)
    for each in (post, ref):
        group = each["posterior"].to_dataset().assign(k=(("chain", "draw", "data"), rng.random((1, 1000, 8)).round()))
        each["posterior"] = xr.DataTree(group.assign_attrs(latents='["k", "scale", "z"]'))
    result = compare(post, ref)
    assert result.attrs["discrete"] == "k"
    assert set(result["site"].values.tolist()) == {"scale", "z"}
    post["posterior"]["scale"] = post["posterior"]["scale"].round()
    assert "scale" in compare(post, ref)["site"].values
    for each in (post, ref):
        each["posterior"] = xr.DataTree(each["posterior"].to_dataset()[["k"]].assign_attrs(latents='["k"]'))
    with pytest.raises(InferenceError, match="are all discrete"):
        compare(post, ref)


def shared_tree(rng: np.random.Generator, local: bool, shift: float = 0.0) -> xr.DataTree:
    each = tree(rng, 16, draws=500, chains=4)
    w = shift + rng.normal(size=(4, 500, 2)).astype("float32")
    group = each["posterior"].to_dataset().assign(w=(("chain", "draw", "k"), w))
    names = ["scale", "z", "w"] if local else ["w"]
    each["posterior"] = group[names].assign_attrs(latents=json.dumps(names))
    return each


def test_shared_latents_are_compared_once() -> None:
    rng = np.random.default_rng(0)
    post, ref = shared_tree(rng, local=True, shift=1.0), shared_tree(rng, local=True)
    result = compare(post, ref)
    assert result["shared_latent"].values.tolist() == ["w[0]", "w[1]"]
    assert result["latent"].values.tolist() == ["scale", "z[0]", "z[1]", "z[2]", "z[3]"]
    a, r = (t["posterior"]["w"].values.reshape(-1, 2).astype(float) for t in (post, ref))
    np.testing.assert_allclose(result["shared_mean_error"], (a.mean(0) - r.mean(0)) / r.std(0, ddof=1), rtol=1e-9)
    assert found(result, "w", "mean").status == "fail"
    assert found(result, "z", "mean").status != "fail"


def test_trees_of_shared_latents_only_are_compared() -> None:
    rng = np.random.default_rng(0)
    result = compare(shared_tree(rng, local=False), shared_tree(rng, local=False))
    assert result.sizes["latent"] == 0
    assert result.attrs["n_joined"] == 16
    assert {(v.site, v.quantity) for v in verdicts(result)} == {("w", "sd"), ("w", "mean"), ("w", "coverage")}
    assert "fail" not in {v.status for v in verdicts(result)}


# --- left out ---------------------------------------------------------------------------------------------------------


def test_few_failures_of_the_gate_are_left_out_and_shown() -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 40), tree(rng, 40, draws=2000, failing=[39])
    ref["posterior"]["z"][:, :, 39] += 1e3
    result = compare(post, ref)
    assert result["data"].values.tolist() == list(range(39))
    assert result["left_out"].values.tolist() == [39]
    assert "numerical error" in result["reason"].values[0]
    assert (result.attrs["n_joined"], result.attrs["n_left_out"], result.attrs["cannot_tell"]) == (40, 1, 0)
    assert result.attrs["share_left_out"] == pytest.approx(1 / 40)
    assert {v.status for v in verdicts(result)} == {"pass"}
    assert result["observed_site"].values.tolist() == ["x"]
    assert float(result["observed_rms_left_out"][0]) == pytest.approx(np.sqrt((39**2 + 40**2) / 2))
    assert float(result["observed_rms_kept"][0]) < 25


def test_beyond_five_percent_nothing_passes_but_failures_stay() -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 40, shift=[0.5, 0, 0, 0, 0]), tree(rng, 40, draws=2000, failing=[1, 2, 3])
    result = compare(post, ref)
    assert result.attrs["cannot_tell"] == 1
    assert found(result, "scale", "mean").status == "fail"
    verdict = found(result, "z", "mean")
    assert verdict.status == "cannot tell"
    assert "8% of the data have no reference posterior" in verdict.sentence
    assert "pass" not in {v.status for v in verdicts(result)}


def test_without_any_reference_no_verdict_is_possible() -> None:
    rng = np.random.default_rng(0)
    result = compare(tree(rng, 3), tree(rng, 3, failing=[0, 1, 2]))
    assert result.sizes["data"] == 0
    assert result["mean_error"].shape == (0, LATENTS)
    assert {v.status for v in verdicts(result)} == {"cannot tell"}
    assert all("no datum has a reference posterior" in v.sentence for v in verdicts(result))


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not finite in `z[1]`"), (3.0, "constant draws of `z[1]`")])
def test_unusable_reference_draws_are_left_out(value: float, reason: str) -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 4), tree(rng, 4)
    ref["posterior"]["z"][:, :, 2, 1] = value
    result = compare(post, ref)
    assert result["left_out"].values.tolist() == [2]
    assert reason in result["reason"].values[0]


def test_datum_without_entry_in_the_gate_is_left_out() -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 4), tree(rng, 4)
    ref["convergence"] = ref["convergence"].to_dataset().isel(data=[0, 1, 3])
    assert compare(post, ref)["left_out"].values.tolist() == [2]


# --- refusals ---------------------------------------------------------------------------------------------------------


def other_weights(each: xr.DataTree) -> None:
    each["posterior"].attrs["model_sha256"] = "cd" * 32


def other_observation(each: xr.DataTree) -> None:
    each["observed_data"]["x"][2, 0] += 0.5


def other_image_size(each: xr.DataTree) -> None:
    each["observed_data"] = each["observed_data"].to_dataset().isel(x_dim_0=[0])


def other_event_shape(each: xr.DataTree) -> None:
    each["posterior"] = each["posterior"].to_dataset().isel(z_dim_0=[0, 1])


def other_latents(each: xr.DataTree) -> None:
    each["posterior"].attrs["latents"] = '["scale"]'


def latent_without_draws(each: xr.DataTree) -> None:
    each["posterior"] = each["posterior"].to_dataset().drop_vars("z")


def other_data(each: xr.DataTree) -> None:
    for name in each.children:
        each[name] = each[name].to_dataset().assign_coords(data=np.arange(100, 104))


def repeated_datum(each: xr.DataTree) -> None:
    each["posterior"] = each["posterior"].to_dataset().assign_coords(data=[0, 1, 1, 3])


def hardly_any_draws(each: xr.DataTree) -> None:
    each["posterior"] = each["posterior"].to_dataset().isel(draw=slice(30))


def no_posterior(each: xr.DataTree) -> None:
    del each["posterior"]


REFUSALS = [
    (other_weights, "`model_sha256`"),
    (other_observation, r"`x` of the group `observed_data` for 1 of 4 joined data \(first: datum 2\)"),
    (other_image_size, r"shape \(4, 1\) \(amortized\) and \(4, 2\) \(reference\)"),
    (other_event_shape, r"event shape \(2,\) in the amortized tree and .* event shape \(4,\)"),
    (other_latents, "different latents"),
    (latent_without_draws, "latent `z` is missing from the amortized tree"),
    (other_data, "no datum in common"),
    (repeated_datum, "datum 1 more than once"),
    (hardly_any_draws, "30 draws per datum; at least 80"),
    (no_posterior, "no group `posterior`"),
]


@pytest.mark.parametrize(("change", "message"), REFUSALS, ids=[change.__name__ for change, _ in REFUSALS])
def test_trees_that_do_not_belong_together_are_refused(change: Callable[[xr.DataTree], None], message: str) -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 4), tree(rng, 4)
    compare(post, ref)
    change(post)
    with pytest.raises(InferenceError, match=message):
        compare(post, ref)


def test_covariates_must_agree() -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 4), tree(rng, 4)
    for each, value in ((post, 1.0), (ref, 2.0)):
        each["constant_data"] = xr.Dataset({"contrast": ("data", np.full(4, value))}, coords={"data": range(4)})
    with pytest.raises(InferenceError, match="`contrast` of the group `constant_data`"):
        compare(post, ref)


def test_amortized_draws_that_are_not_finite_are_the_guides_fault() -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 4), tree(rng, 4)
    post["posterior"]["z"][0, 5, 2, 1] = np.nan
    with pytest.raises(InferenceError, match=r"`z\[1\]` are not finite for datum 2"):
        compare(post, ref)


def test_level_must_be_a_probability() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InferenceError, match="`level`"):
        compare(tree(rng, 2), tree(rng, 2), level=90)


def test_observations_stored_in_float32_still_agree() -> None:
    rng = np.random.default_rng(0)
    post, ref = tree(rng, 4), tree(rng, 4)
    for each, dtype in ((post, "float32"), (ref, "float64")):
        each["observed_data"] = (each["observed_data"].to_dataset() / 3.0).astype(dtype)
    assert compare(post, ref).attrs["n_joined"] == 4


# --- storage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", [[], [1], [0, 1, 2]])
def test_result_survives_netcdf(tmp_path: Path, failing: list[int]) -> None:
    rng = np.random.default_rng(0)
    result = compare(tree(rng, 3), tree(rng, 3, failing=failing))
    result.to_netcdf(tmp_path / "comparison.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "comparison.nc", engine="h5netcdf") as stored:
        xr.testing.assert_allclose(result, stored)
        assert [v.sentence for v in verdicts(stored)] == [v.sentence for v in verdicts(result)]
        assert stored["reason"].values.tolist() == result["reason"].values.tolist()
    assert all(isinstance(value, str | int | float) for value in result.attrs.values())


def test_trees_read_from_files_are_compared(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trees = [tree(rng, 3), tree(rng, 3)]
    for i, each in enumerate(trees):
        each.to_netcdf(tmp_path / f"{i}.nc", engine="h5netcdf")
    stored = [xr.open_datatree(tmp_path / f"{i}.nc", engine="h5netcdf") for i in range(2)]
    try:
        xr.testing.assert_allclose(compare(*stored), compare(*trees))
    finally:
        for each in stored:
            each.close()
