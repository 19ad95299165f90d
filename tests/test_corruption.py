"""The corruption experiment on models whose posterior is known, with guides that are exact or wrong on purpose."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from agreement import limit
from contrast_models import ExactGuide, PlainGuide, flat, images, model
from uncertainty_models import Digits, Watching, digits, guides, refusing, true_sd  # noqa: F401

from calibrant.data import Data
from calibrant.errors import InferenceError
from calibrant.evaluation import corrupted, corruption_experiment
from calibrant.evaluation.uncertainty.corruptions import KINDS
from calibrant.streams import stream

KIND = ("noise", "contrast", "permutation")


def experiment(name: str, **options: object) -> xr.Dataset:
    target, guide = guides(name)
    arguments = {"kinds": KIND, "levels": 3, "images": 16, "draws": 120, **options}
    return corruption_experiment(target, guide, images(16), **arguments)


@pytest.fixture(scope="module")
def oracle() -> dict[str, xr.Dataset]:
    return {name: experiment(name) for name in ("ea-vae", "vae", "blind", "fixed scale")}


@pytest.mark.parametrize("name", ["ea-vae", "vae"])
def test_curves_are_those_of_the_closed_form(oracle, name):
    result, target = oracle[name], model(name)
    seed = stream(0, "corruption", "shown")
    for kind in KIND:
        for level in result["level"].values:
            one = result.sel(corruption=kind, level=level)
            strength, x = float(one["strength"]), images(16)["x"]
            shown = x if level == 0 else corrupted(x, kind, strength, seed)
            truth = true_sd(target, shown)
            error, se = np.abs(one["posterior_sd"].values - truth), one["posterior_sd_se"].values
            assert (error < limit(24 * 32) * se).all(), (kind, level)
            off = np.abs(one["posterior_sd_mean"].values - truth.mean())
            assert (off < limit(24 * 2) * np.sqrt((se**2).sum(1)) / 16).all(), (kind, level)


def test_a_scale_mixture_follows_the_contrast_that_a_corruption_leaves(oracle):
    """Noise adds power, so that the posterior gets narrower; less contrast makes it wider. Both to be seen by rank."""
    result = oracle["ea-vae"].sel(statistic="posterior_sd")
    for source in ("exact", "amortized"):
        natural = result["posterior_sd"].sel(source=source, corruption="noise", level=0)
        one = result.sel(source=source)
        assert one["trend"].sel(corruption="contrast") > 0.9
        assert one["p_rises"].sel(corruption="contrast") < 1e-5
        change = result["posterior_sd"].sel(source=source, corruption="noise", level=5) - natural
        assert change.mean() < -0.05  # its Monte Carlo error is below .01
    assert (oracle["ea-vae"]["p_rises"].sel(statistic="shift") < 1e-3).all()
    assert oracle["ea-vae"]["decided"].all()


@pytest.mark.parametrize(("name", "source"), [("vae", "exact"), ("blind", "amortized"), ("fixed scale", "amortized")])
def test_a_model_without_scale_and_guides_with_defects_do_not(oracle, name, source):
    result = oracle[name].sel(source=source, statistic="posterior_sd")
    assert (result["p_rises"] > 1e-4).all()
    assert (result["p_falls"] > 1e-4).all()
    assert (np.abs(result["trend"]) < 0.6).all()


def test_shifts_are_free_of_monte_carlo_bias_and_entropies_relate_to_sds(oracle):
    result = oracle["ea-vae"]
    assert (result["shift"].sel(level=0) == 0).all()
    few = experiment("vae", kinds=("contrast",), draws=30)
    same = few["shift"].sel(corruption="contrast").mean("image")
    exact = oracle["vae"]["shift"].sel(corruption="contrast", source="exact").mean("image")
    assert np.abs(same.sel(source="amortized") - exact).max() < 0.1
    flat = oracle["vae"]["entropy"].sel(source="exact")
    assert float(flat.std()) < 0.1
    assert float(flat.mean()) < result.attrs["prior_entropy"] == pytest.approx(2.5 * math.log(2 * math.pi * math.e))


@pytest.mark.parametrize("name", ["ea-vae", "vae"])
def test_true_latents_of_simulated_images_are_covered_until_noise_is_added(name):
    """By the exact posterior, and by a guide that is exact; not by one whose sds are .7 of the right ones."""
    target = model(name)
    guide = ExactGuide(target, widen=0.7) if name == "vae" else PlainGuide(flat(0.5), scale=True)
    result = corruption_experiment(target, guide, images(16), ("noise",), 2, 16, simulated=200, draws=250)
    coverage, error = (result[n].sel(corruption="noise", source="exact").values for n in ("coverage", "coverage_se"))
    assert abs(coverage[0] - 0.9) < limit(4) * error[0]
    assert coverage[-1] < 0.9 - limit(4) * error[-1]
    assert error[0] < 0.02
    wrong, error = (float(result[n].sel(source="amortized")[0, 0]) for n in ("coverage", "coverage_se"))
    assert wrong < 0.9 - limit(4) * error


def test_binary_images_stay_binary_and_the_guide_alone_can_be_measured():
    guide = Watching()
    result = corruption_experiment(
        Digits().eval(), guide, {"x": digits(30, 0.4)}, levels=2, images=20, draws=50, reference=False
    )
    assert guide.seen == {0.0, 1.0}
    assert result["source"].values.tolist() == ["amortized"]
    assert result["corruption"].values.tolist() == list(KINDS)
    assert np.isfinite(result["posterior_sd"]).all()
    assert "posterior_sd_mean_low" not in result


def test_the_same_seed_gives_the_same_result_and_labels_are_kept():
    target, guide = guides("vae")
    data = Data(images(), coords={"data": np.array([f"patch {i}" for i in range(12)])})
    before = torch.random.get_rng_state()
    options = {"kinds": ("noise", "blur"), "levels": 2, "images": 5, "chains": 2, "draws": 50}
    first, second = (corruption_experiment(target, guide, data, **options, seed=3) for _ in "12")
    assert first.identical(second)
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(first["image"].values) < set(data.labels())
    assert first.sizes["image"] == 5
    assert first["strength"].values.tolist() == [[0, 0.125, 2.0], [0, 0.03, 0.25]]
    assert first["level"].values.tolist() == [0, 1, 5]


def test_refused_references_leave_both_sources_out_and_bound_the_mean(refusing):  # noqa: F811
    refusing(lambda call, image: call == 1 and image < 4)  # the first four images at the first level of noise
    result = experiment("ea-vae", kinds=("noise",), draws=200).sel(corruption="noise")
    at = result.sel(level=1)
    assert float(at["share_reference"]) == 0.75
    assert not bool(result["decided"])
    assert np.isnan(at["posterior_sd"].sel(source="exact").values[:4]).all()
    assert np.isfinite(at["posterior_sd"].sel(source="amortized").values).all()
    kept = at["posterior_sd"].values[:, 4:].mean(1)
    assert at["posterior_sd_mean"].values == pytest.approx(kept)
    assert at["posterior_sd_mean_guide_refused"] == pytest.approx(at["posterior_sd"].values[1, :4].mean())
    assert at["posterior_sd_mean_low"] < kept[0] < at["posterior_sd_mean_high"]


def test_refusals():
    with pytest.raises(InferenceError, match=r"kinds=\['noise', 'noise'\]: give one or more different corruptions"):
        experiment("vae", kinds=("noise", "noise"))
    with pytest.raises(InferenceError, match="unknown corruption 'fog'"):
        experiment("vae", kinds=("fog",))
    with pytest.raises(InferenceError, match="levels=1: give how many"):
        experiment("vae", levels=1)
    with pytest.raises(InferenceError, match="images=1, of 16 data: two are needed"):
        experiment("vae", images=1)
