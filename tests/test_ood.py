"""The experiment on other sets of images: known AUROCs, matched sets, planted defects, refused references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from agreement import limit
from contrast_models import SHAPE, PlainGuide, flat, images, model
from torch import Tensor
from uncertainty_models import Digits, Watching, digits, guides, refusing, true_sd  # noqa: F401

import calibrant as cal
from calibrant.data import Data
from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import auroc_difference, ood_experiment
from calibrant.evaluation.statistics.separation import separation
from calibrant.evaluation.uncertainty.matching import rescaled

INSIDE = images(50)["x"]
OUTSIDE = {
    "white noise": 3 * torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(2)),
    "weak": 0.3 * images(40, 5)["x"],
}


def experiment(name: str, outside: dict[str, Tensor] = OUTSIDE, **options: object) -> xr.Dataset:
    target, guide = guides(name)
    return ood_experiment(target, guide, {"x": INSIDE}, outside, **{"draws": 120, **options})


@pytest.fixture(scope="module")
def found() -> dict[str, xr.Dataset]:
    return {name: experiment(name) for name in ("ea-vae", "vae", "blind", "fixed scale")}


def shown(result: xr.Dataset, of_set: str, matching: str) -> Tensor:
    """The images of a set in the order of the result, as they should be shown."""
    first = {"inside": INSIDE, **OUTSIDE}
    labels = result["label"].values[result["of_set"].values == of_set].astype(int)
    x = first[of_set][labels]
    if of_set == "inside" or matching == "as shown":
        return x
    return rescaled(x, shown(result, "inside", matching), matching)[0]


@pytest.mark.parametrize("name", ["ea-vae", "vae"])
def test_scores_and_aurocs_are_those_of_the_closed_form(found, name):
    result, target, rng = found[name], model(name), np.random.default_rng(0)
    for matching in result["matching"].values:
        one = result.sel(matching=matching, source="exact")
        truth = {s: true_sd(target, shown(result, s, matching)) for s in ("inside", *OUTSIDE)}
        error = np.abs(one["score"].values - np.concatenate(list(truth.values()))) / one["score_se"].values
        assert (error < limit(2 * 3 * 130)).all()
        spread = [one["score_se"].values[result["of_set"].values == s] for s in truth]
        for k, of_set in enumerate(OUTSIDE, 1):
            again = [
                separation(*(truth[s] + rng.normal(0, e) for s, e in ((of_set, spread[k]), ("inside", spread[0]))))
                for _ in range(200)
            ]
            aurocs = np.array([sample.auroc for sample in again])
            value = float(one["auroc"].sel(set=of_set))
            assert abs(value - aurocs.mean()) <= limit(12) * max(aurocs.std(), 0.005)


def test_a_linear_vae_cannot_tell_sets_apart_and_a_scale_mixture_can(found):
    """The exact posterior sd of a linear model with Normal prior is the same at all images: its AUROC is ½."""
    flat_scores = true_sd(model("vae"), INSIDE)
    assert np.ptp(flat_scores) < 1e-9
    vae, mixture = (found[name].sel(source="exact") for name in ("vae", "ea-vae"))
    assert (np.abs(vae["auroc"] - 0.5) < limit(6) * vae["auroc_se"]).all()
    assert float(mixture["auroc"].sel(set="weak", matching="as shown")) > 0.9
    assert float(mixture["auroc_low"].sel(set="weak", matching="as shown")) > 0.8


def test_white_noise_of_high_power_is_certain_and_only_its_power_makes_it_so(found):
    """Uncertainty follows the power that a scale mixture explains, and not whether an image is of another kind."""
    noise = found["ea-vae"].sel(set="white noise")
    for source in ("exact", "amortized"):
        assert float(noise["auroc_high"].sel(matching="as shown", source=source)) < 0.5
        assert float(noise["auroc_low"].sel(matching="power", source=source)) > 0.5
    weak = found["ea-vae"].sel(set="weak", source="exact")
    assert float(weak["auroc_low"].sel(matching="contrast")) < 0.5 < float(weak["auroc_high"].sel(matching="contrast"))


def test_it_is_so_in_the_gaussian_scale_mixture_at_images_of_its_own():
    torch.manual_seed(0)
    target = cal.models.create("gsm", shape=list(SHAPE), latents=5, noise=0.4).eval()
    inside = cal.program.sample_prior(target, 64, seed=1)["x"]
    strong = inside.square().mean().sqrt() * 5
    result = ood_experiment(
        target,
        cal.guides.amortize(target, {"x": inside}).eval(),
        {"x": inside},
        {"noise": strong * torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(3))},
        draws=100,
    ).sel(source="exact", set="noise")
    assert result.attrs["latent"] == "y"
    assert float(result["auroc_high"].sel(matching="as shown")) < 0.3
    assert float(result["auroc"].sel(matching="power")) > float(result["auroc_high"].sel(matching="as shown"))


@pytest.mark.parametrize("defect", ["blind", "fixed scale"])
def test_planted_defects_lose_what_the_exact_posterior_tells(found, defect):
    weak = found[defect].sel(set="weak", matching="as shown")
    assert float(weak["auroc_low"].sel(source="exact")) > 0.8
    assert float(weak["auroc_low"].sel(source="amortized")) < 0.5 < float(weak["auroc_high"].sel(source="amortized"))


def test_differences_are_paired_and_need_the_same_images(found):
    result = auroc_difference(found["ea-vae"], found["vae"]).sel(source="exact", matching="as shown", set="weak")
    aurocs = [float(found[name]["auroc"].sel(source="exact", matching="as shown", set="weak")) for name in found]
    assert float(result["difference"]) == pytest.approx(aurocs[0] - aurocs[1])
    assert 0.2 < float(result["difference_low"]) < float(result["difference"]) < float(result["difference_high"])
    alike = auroc_difference(found["ea-vae"], found["blind"]).sel(source="exact")
    assert (np.abs(alike["difference"]) < 0.05).all()
    assert (alike["difference_se"] < 0.6 * found["ea-vae"]["auroc_se"].sel(source="exact")).all()
    with pytest.raises(InferenceError, match="the two results are of different images: run both with the same sets"):
        auroc_difference(found["ea-vae"], experiment("vae", images=30))


def test_binary_images_are_compared_within_strata():
    """The guide's score falls with the share of pixels that are on, and nothing else."""
    guide, sets = Watching(), {"darker": digits(150, 0.25, seed=1)}
    result = ood_experiment(
        Digits().eval(), guide, {"x": digits(150, 0.4)}, sets, images=150, draws=100, reference=False, strata=10
    )
    assert guide.seen == {0.0, 1.0}
    assert result.attrs["matched_by"] == "strata"
    one = result.sel(source="amortized", set="darker")
    assert float(one["auroc_low"].sel(matching="as shown")) > 0.65
    assert abs(float(one["auroc"].sel(matching="power")) - 0.5) < 0.1
    assert (result["score"].sel(matching="power") == result["score"].sel(matching="as shown")).all()


def test_refused_references_are_left_out_and_bound_the_auroc(refusing):  # noqa: F811
    refusing(lambda call, image: image < (5 if call == 0 else 8))  # images of the inside set, then of the first one
    target = model("ea-vae")
    result = ood_experiment(target, PlainGuide(flat(0.5), True), {"x": INSIDE}, OUTSIDE, draws=100)
    noise, weak = (result.sel(set=name, matching="as shown") for name in OUTSIDE)
    assert float(noise["share_refused"]) == pytest.approx(13 / 90)
    assert float(weak["share_refused"]) == pytest.approx(5 / 90)
    assert [bool(one["decided"]) for one in (noise, weak)] == [False, True]
    exact = result["score"].sel(source="exact", matching="as shown").values
    groups = [exact[result["of_set"].values == name] for name in ("white noise", "inside")]
    assert [int(np.isnan(group).sum()) for group in groups] == [8, 5]
    high, low = (group[~np.isnan(group)] for group in groups)
    pairs = (high[:, None] > low).sum()
    for name, value in (("auroc", pairs / (32 * 45)), ("auroc_least", pairs / 2000)):
        assert float(noise[name].sel(source="exact")) == pytest.approx(value)
    assert float(noise["auroc_most"].sel(source="exact")) == pytest.approx((pairs + 8 * 50 + 5 * 32) / 2000)
    guide = noise.sel(source="amortized")
    assert float(guide["auroc_least"]) == float(guide["auroc_most"]) != float(guide["auroc"])


def test_blank_images_are_not_rescaled_and_sets_keep_their_labels():
    x = images(12, 7)["x"]
    x[4] = 0.5
    blanks = Data({"x": x}, coords={"data": np.array([f"patch {i}" for i in range(12)])})
    target = model("vae")
    before = torch.random.get_rng_state()
    first, second = (
        ood_experiment(target, PlainGuide(flat(0.5), False), {"x": INSIDE}, {"some": blanks}, draws=50) for _ in "12"
    )
    assert first.identical(second)
    assert torch.equal(before, torch.random.get_rng_state())
    blank = first["label"].values == "patch 4"
    scores = first["score"].values[:, :, blank][:, :, 0]
    assert np.isnan(scores[:, 1]).all()
    assert np.isfinite(scores[:, [0, 2]]).all()
    assert not first["refused"].any()
    assert first.sizes["image"] == 62


def test_refusals():
    target, guide = model("vae"), PlainGuide(flat(0.5), False)

    def outside(sets: dict[str, object]) -> None:
        ood_experiment(target, guide, {"x": INSIDE}, sets, draws=50)

    for sets in ({}, {"inside": INSIDE}):
        with pytest.raises(InferenceError, match="give one or more, none of them named 'inside'"):
            outside(sets)
    with pytest.raises(DataError, match=r"set 'large': 'x' has images of shape \(1, 5, 5\), wanted \(1, 4, 4\)"):
        outside({"large": torch.zeros(9, 1, 5, 5)})
    with pytest.raises(DataError, match="set 'digits': it holds the observations"):
        outside({"digits": {"x": INSIDE, "y": torch.zeros(50)}})
    with pytest.raises(DataError, match="set 'grey': "):
        ood_experiment(
            Digits(), Watching(), {"x": digits(9, 0.4)}, {"grey": digits(9, 0.4) / 2}, draws=50, reference=False
        )
    with pytest.raises(InferenceError, match="images=64, of 1 data: two are needed"):
        outside({"one": INSIDE[:1]})
