"""The contrast experiment on models whose posterior is known, with guides that are exact, flat, or wrong on purpose."""

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
from agreement import limit
from contrast_models import (
    FEW,
    LATENTS,
    LEVELS,
    SHAPE,
    ExactGuide,
    PlainGuide,
    experiment,
    flat,
    images,
    model,
    shown,
    statuses,
)

import calibrant as cal
from calibrant.data import Data
from calibrant.errors import InferenceError
from calibrant.evaluation import contrast_experiment, contrast_verdicts
from calibrant.evaluation.statistics.noise import noise_equivalent_contrast
from calibrant.evaluation.uncertainty import sources
from calibrant.evaluation.uncertainty.latents import prior_sd_of
from calibrant.inference.references.exact import solve
from calibrant.inference.references.sampling import exact_structure
from calibrant.inference.referencing import reference_for

# -- known truth -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle() -> dict[str, xr.Dataset]:
    return {name: experiment(m := model(name), ExactGuide(m), levels=LEVELS, draws=1500) for name in ("vae", "ea-vae")}


def test_an_exact_guide_of_the_ea_vae_passes_with_its_model(oracle):
    assert statuses(oracle["ea-vae"]) == {
        ("model", "contrast"): "pass",
        ("guide", "posterior_sd"): "pass",
        ("guide", "scale_cv"): "pass",
    }
    first, second, _ = (v.sentence for v in contrast_verdicts(oracle["ea-vae"]))
    assert first.startswith("model: the exact posterior sd falls from 0.9")
    assert first.endswith("as it should")
    assert second.startswith("guide: its posterior sd follows the exact curve within ")
    assert oracle["ea-vae"].attrs["spearman_exact"] == pytest.approx(-1.0)
    assert oracle["ea-vae"].attrs["spearman_amortized"] == pytest.approx(-1.0)


def test_a_linear_vae_fails_by_itself_and_its_exact_guide_passes(oracle):
    assert statuses(oracle["vae"]) == {("model", "contrast"): "fail", ("guide", "posterior_sd"): "pass"}
    sentence = contrast_verdicts(oracle["vae"])[0].sentence
    assert "is flat" in sentence
    assert "does not depend on the image" in sentence


@pytest.mark.parametrize(
    ("name", "guide", "expected"),
    [
        ("ea-vae", PlainGuide(flat(0.5), scale=True), {"model": "pass", "guide": "fail"}),
        ("vae", PlainGuide(lambda strength: 1 / (1 + strength), scale=False), {"model": "fail", "guide": "fail"}),
    ],
    ids=["flat guide of the ea-vae", "falling guide of the vae"],
)
def test_a_wrong_guide_is_failed_whatever_its_model_does(name, guide, expected):
    result = experiment(model(name), guide)
    assert {site: status for (site, quantity), status in statuses(result).items() if quantity != "scale_cv"} == expected
    sentence = contrast_verdicts(result)[1].sentence
    assert sentence.startswith("guide: its posterior sd is too ")
    assert "at contrast" in sentence


@pytest.mark.parametrize(("widen", "status"), [(1.2, "fail"), (1.02, "pass")])
def test_the_margin_of_the_guide_is_a_tenth(widen, status):
    target = model("vae")
    result = experiment(target, ExactGuide(target, widen))
    verdict = contrast_verdicts(result)[1]
    assert verdict.status == status
    if status == "fail":
        assert abs(verdict.effect - (widen - 1)) < limit(len(FEW)) * verdict.se
        assert "too large by up to" in verdict.sentence


@pytest.mark.parametrize("name", ["vae", "ea-vae"])
def test_statistics_are_those_of_the_exact_solution(oracle, name):
    result, target = oracle[name], model(name)
    structure = exact_structure(target, images())
    for level in LEVELS:
        solution = solve(structure, shown(level * result.attrs["noise"]))
        wanted = {"posterior_sd": solution.sd["z"].mean(1).numpy()}
        if name == "ea-vae":
            wanted["scale_cv"] = (solution.sd["scale"] / solution.mean["scale"]).numpy()
        for statistic, truth in wanted.items():
            found, se = (result[f"{statistic}_by_image{end}"].sel(contrast=level).values for end in ("", "_se"))
            assert np.isfinite(found).all()
            assert (np.abs(found - truth) < limit(20 * len(LEVELS) * len(truth)) * se).all()
            assert result[statistic].sel(contrast=level).values == pytest.approx(found.mean(1))
        mean = solution.mean["z"].numpy()
        assert result["mean_norm"].sel(contrast=level).values == pytest.approx(
            np.linalg.norm(mean, axis=1).mean(), abs=0.05
        )


def test_the_errors_of_the_statistics_are_not_too_large_either(oracle):
    """With too large errors the test above would pass any result: their squares must be the variances."""
    result, target = oracle["ea-vae"], model("ea-vae")
    squares = []
    for level in LEVELS:
        truth = solve(exact_structure(target, images()), shown(level * result.attrs["noise"])).sd["z"].mean(1).numpy()
        found, se = (result[f"posterior_sd_by_image{end}"].sel(contrast=level).values for end in ("", "_se"))
        squares.append(((found - truth) / se) ** 2)
    mean, count = np.mean(squares), np.size(squares)
    assert abs(mean - 1) < limit(1) * math.sqrt(2 / count) * 1.5  # the draws of the scale have heavier tails


def test_signal_variance_is_free_of_monte_carlo_bias():
    """With few draws the posterior mean's own noise would add its variance to one that is zero."""
    target, data = model("vae"), images(32)
    options = {"levels": [0.001, 0.002, 1.0], "chains": 2, "draws": 25}
    result = contrast_experiment(target, ExactGuide(target), data, **options)
    covariance = solve(exact_structure(target, images()), data["x"]).covariance(0)
    draws = np.array([50, 25])[:, None]
    noise = covariance.trace().item() / LATENTS / draws
    error = math.sqrt(2 / 31) * covariance.square().sum().sqrt().item() / LATENTS / draws
    low = result["signal_variance"].isel(contrast=[0, 1]).values
    assert (np.abs(low) < limit(4) * error).all()
    assert (noise > 1.2 * limit(4) * error).all()  # so the biased statistic would be caught


# -- what is shown, and what is left out -------------------------------------------------------------------------------


def test_images_keep_their_labels_and_blank_ones_are_left_out():
    target, x = model("ea-vae"), images()["x"]
    x[3] = 0.25  # blank, whatever its mean
    data = Data({"x": x}, coords={"data": np.array([f"patch {i}" for i in range(len(x))])})
    result = contrast_experiment(target, ExactGuide(target), data, levels=FEW, chains=2, draws=50)
    assert "patch 3" not in result["image"].values
    assert result.sizes["image"] == len(x) - 1
    few = contrast_experiment(target, ExactGuide(target), data, levels=FEW, chains=2, draws=50, images=4)
    assert set(few["image"].values) < set(result["image"].values)
    assert few.sizes["image"] == 4


def test_the_same_seed_gives_the_same_result_and_leaves_the_random_state_alone():
    target = model("ea-vae")
    before = torch.random.get_rng_state()
    first, second = (experiment(target, ExactGuide(target), draws=50, seed=3) for _ in "12")
    assert first.identical(second)
    assert torch.equal(before, torch.random.get_rng_state())


def test_defaults_and_attributes(tmp_path):
    target = model("ea-vae")
    result = contrast_experiment(target, ExactGuide(target), images(), chains=1, draws=40)
    levels = result["contrast"].values
    assert len(levels) >= 10
    assert (levels[0], levels[-1]) == pytest.approx((0.1, 10.0))
    assert np.diff(np.log(levels)) == pytest.approx(np.diff(np.log(levels))[0])
    assert result.attrs["noise"] == pytest.approx(0.4)
    assert {k: result.attrs[k] for k in ("latent", "scale", "n_latents", "structure", "reference_method")} == {
        "latent": "z",
        "scale": "scale",
        "n_latents": LATENTS,
        "structure": "scaled linear-gaussian",
        "reference_method": "exact",
    }
    assert result.attrs["prior_sd"] == pytest.approx(1.0)
    assert result.attrs["share_reference"] == 1.0
    assert all(isinstance(value, str | int | float) for value in result.attrs.values())
    result.to_netcdf(tmp_path / "contrast.nc", engine="h5netcdf")
    xr.testing.assert_identical(xr.load_dataset(tmp_path / "contrast.nc", engine="h5netcdf"), result)


def test_noise_of_single_pixels_is_averaged_as_a_variance():
    torch.manual_seed(0)
    target = cal.models.create("ppca", shape=list(SHAPE), latents=LATENTS, noise="diagonal")
    with torch.no_grad():
        target.likelihood.log_scale[0, 0, 0] = math.log(2.0)
    wanted = math.sqrt((15 * 0.25 + 4.0) / 16)
    assert noise_equivalent_contrast(target) == pytest.approx(wanted)


def test_only_latents_that_respond_to_images_are_informative():
    target = model("vae")
    with torch.no_grad():
        target.decoder.directions[:, 1] = 1e-4
    result = experiment(target, ExactGuide(target), draws=100)
    assert (result.attrs["n_informative"], result.attrs["n_latents"]) == (LATENTS - 1, LATENTS)
    exact = solve(exact_structure(target, images()), shown(1.0)).sd["z"][:, [0, 2, 3, 4]].mean()
    assert result["posterior_sd"].sel(source="exact").values == pytest.approx(exact.item(), rel=0.03)


def test_a_model_without_informative_latents_is_flat_at_the_prior():
    target = model("vae")
    with torch.no_grad():
        target.decoder.directions.fill_(1e-5)
    result = experiment(target, ExactGuide(target))
    assert result.attrs["n_informative"] == 0
    assert statuses(result) == {("model", "contrast"): "fail", ("guide", "posterior_sd"): "pass"}
    assert "is flat, 1.00 of the prior" in contrast_verdicts(result)[0].sentence


def test_prior_sd_of_a_correlated_prior_and_of_one_that_must_be_simulated():
    covariance = [[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.25]]
    torch.manual_seed(0)
    target = cal.models.create("gsm", shape=list(SHAPE), latents=3, covariance=covariance)
    site = cal.program.sites(target, images(3))["y"]
    assert prior_sd_of(target, site, Data(images(8)), 0) == pytest.approx([2.0, 1.0, 0.5])

    def nested(size: int) -> None:
        with pyro.plate("data", size):
            width = pyro.sample("width", dist.LogNormal(0.0, 0.5))
            z = pyro.sample("z", dist.Normal(0.0, width[..., None]).expand([size, 2]).to_event(1))
            mean = z.sum(-1)[:, None, None, None].expand(size, *SHAPE)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(3))

    program = cal.program.as_program(nested)
    site = cal.program.sites(program, images(3))["z"]
    assert site.parents == ("width",)
    assert prior_sd_of(program, site, Data(images(8)), 0) == pytest.approx([math.exp(0.25)] * 2, rel=0.04)


# -- references that may fail ------------------------------------------------------------------------------------------


def test_errors_of_correlated_draws_use_their_effective_number(monkeypatch, oracle):
    """Every draw three times: the same curve, with errors √3 times those of independent draws."""

    def reference(*arguments: Any, **options: Any) -> xr.DataTree:
        tree = reference_for(*arguments, **options)
        draws = tree["posterior"].to_dataset().isel(draw=np.repeat(np.arange(500), 3))
        draws = draws.assign_coords(draw=np.arange(1500)).assign_attrs(independent_draws=0, method="pyro-nuts")
        return xr.DataTree.from_dict({"/posterior": draws, "/convergence": tree["convergence"].to_dataset()})

    monkeypatch.setattr(sources, "reference_for", reference)
    target = model("ea-vae")
    result = experiment(target, ExactGuide(target), levels=LEVELS)
    assert result.attrs["reference_method"] == "pyro-nuts"
    for name in ("posterior_sd_by_image_se", "scale_cv_by_image_se"):
        ratio = result[name].sel(source="exact") / oracle["ea-vae"][name].sel(source="exact")  # that of 1,500 draws
        assert float(ratio.median()) == pytest.approx(3**0.5, rel=0.15)
    assert contrast_verdicts(result)[0].sentence.startswith("model: the reference posterior sd falls from 0.9")


def test_a_reference_that_was_interrupted_ends_the_experiment(monkeypatch):
    def reference(*arguments: Any, **options: Any) -> xr.DataTree:
        return reference_for(*arguments, **options).isel(data=slice(5))

    monkeypatch.setattr(sources, "reference_for", reference)
    target = model("vae")
    with pytest.raises(KeyboardInterrupt):
        experiment(target, ExactGuide(target), draws=50)


@pytest.fixture
def failing(monkeypatch) -> Callable[[Callable[[int, int], bool]], None]:
    """References some of which fail the gate: `fails(call, image)`; call 0 is that of the unscaled images."""

    def install(fails: Callable[[int, int], bool]) -> None:
        calls = iter(range(1000))

        def reference(*arguments: Any, **options: Any) -> xr.DataTree:
            tree, call = reference_for(*arguments, **options), next(calls)
            passed = np.array([not fails(call, i) for i in range(tree["posterior"].sizes["data"])])
            gate = tree["convergence"].to_dataset().assign(is_reference=("data", passed))
            tree["convergence"] = xr.DataTree(gate)
            return tree

        monkeypatch.setattr(sources, "reference_for", reference)

    return install


def test_only_data_that_pass_the_gate_count_for_both_sources(failing):
    target = model("ea-vae")
    failing(lambda call, image: call == 2 and image < 6)
    result = experiment(target, ExactGuide(target), draws=200)
    assert result["images_passed"].values.tolist() == [12, 6, 12]
    assert np.isnan(result["posterior_sd_by_image"].isel(contrast=1, image=slice(6)).values).all()
    assert np.isfinite(result["posterior_sd_by_image"].isel(contrast=1, image=slice(6, None)).values).all()
    assert np.isfinite(result["posterior_sd"].values).all()
    assert result.attrs["share_reference"] == pytest.approx(30 / 36)
    assert set(statuses(result).values()) == {"cannot tell"}
    assert "17% of the images × contrasts have no reference posterior" in contrast_verdicts(result)[0].sentence


def test_a_contrast_without_reference_leaves_the_verdict_open(failing):
    target = model("ea-vae")
    failing(lambda call, image: call == 1 and image > 0)
    result = experiment(target, ExactGuide(target), draws=100)
    assert np.isnan(result["posterior_sd"].isel(contrast=0).values).all()
    assert set(statuses(result).values()) == {"cannot tell"}


def test_no_image_with_a_reference_is_an_error(failing):
    target = model("ea-vae")
    failing(lambda call, image: True)
    with pytest.raises(InferenceError, match="12 of 12 images fails the gate"):
        experiment(target, ExactGuide(target), draws=50)
