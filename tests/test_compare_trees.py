"""Which trees `compare` takes, what it joins, leaves out and refuses, and how its result is stored."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from synthetic_trees import LATENTS, found, tree

from calibrant.errors import InferenceError
from calibrant.evaluation.judgements.against_reference import verdicts
from calibrant.evaluation.statistics.comparison import compare

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
    monkeypatch.setattr("calibrant.inference.trees._BLOCK_ELEMENTS", 2 * 300 * LATENTS)
    xr.testing.assert_allclose(whole, compare(post, ref), rtol=1e-8)


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
    result = compare(post, ref)
    assert (result.attrs["discrete"], result.sizes["latent"], result.sizes["data"]) == ("k", 0, 8)


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
    of_site = {("w", quantity) for quantity in ("sd", "mean", "coverage", "shape")}
    asked = of_site | {("all latents", "correlation"), ("all latents", "direction")}
    assert {(v.site, v.quantity) for v in verdicts(result)} == asked
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


# --- entries that a support fixes -------------------------------------------------------------------------------------


def test_entries_that_the_support_fixes_are_not_compared() -> None:
    """The upper triangle of a Cholesky factor is zero in all draws of both sides."""
    rng, trees = np.random.default_rng(0), []
    for _ in range(2):
        one = tree(rng, 12, latents=4)
        values = one["posterior"]["z"].values.copy()
        values[..., 1] = 0.0
        one["posterior"] = one["posterior"].to_dataset().assign(z=(one["posterior"]["z"].dims, values))
        trees.append(one)
    result = compare(*trees)
    assert result["latent"].values.tolist() == ["scale", "z[0]", "z[2]"]
    assert result.attrs["n_left_out"] == 0
    other = trees[0].copy()
    moved = other["posterior"]["z"].values + np.array([0.0, 1.0, 0.0])
    other["posterior"] = other["posterior"].to_dataset().assign(z=(other["posterior"]["z"].dims, moved))
    assert compare(other, trees[1]).attrs["n_left_out"] == 12, "a constant that differs is no support's"
