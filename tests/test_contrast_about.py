"""Contrast about black and about mid-grey: what is shown, and the curves of a Bernoulli model by quadrature."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from binary_images import Grid, GridGuide, binary_images, binary_model
from contrast_models import ExactGuide, images, model
from pyro.nn import PyroModule
from test_contrast_verdicts import FALLING, curves

from calibrant.data import Data
from calibrant.errors import InferenceError
from calibrant.evaluation import contrast_experiment, contrast_verdicts
from calibrant.evaluation.uncertainty import contrast
from calibrant.evaluation.uncertainty.contrast import ContrastPlan
from calibrant.evaluation.uncertainty.images import REAL, ImageSupport, uniforms_of
from calibrant.streams import stream

SHOWN = [0.2, 0.6, 1.0]


def shown(x: torch.Tensor, about: str, level: float, seed: int = 0) -> torch.Tensor:
    """Binary images at a share of their contrast, with the uniform numbers of the experiment."""
    grey = {"black": 0.0, "mid-grey": 0.5}[about]
    u = uniforms_of(x, stream(seed, "contrast", "uniforms"))
    return (u < grey + level * (x - grey)).to(x.dtype)


def of_binary(guide: PyroModule, about: str, **options: Any):
    plan = {"levels": SHOWN, "images": 5, "method": "importance", "draws": 1000, **options}
    return contrast_experiment(binary_model(), guide, binary_images(5), about=about, **plan)


# -- known truth -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("about", ["black", "mid-grey"])
def test_curves_of_a_bernoulli_model_are_those_of_quadrature(about):
    target, x = binary_model(), binary_images(5)["x"]
    result = of_binary(GridGuide(target), about)
    assert result.attrs["about"] == about
    assert math.isnan(result.attrs["noise"])
    assert result.attrs["reference_method"] == "importance"
    assert result.attrs["share_reference"] == 1.0
    fine, sizes = Grid(target, 81), len(SHOWN) * 5
    for level in SHOWN:
        _, sd = fine.moments(shown(x, about, level))
        wanted = {"posterior_sd": sd[:, :2].mean(1).numpy(), "scale_cv": fine.of_scale(shown(x, about, level))}
        for name, truth in wanted.items():
            at = result.sel(contrast=level, source="exact")
            score = (at[f"{name}_by_image"].values - truth) / at[f"{name}_by_image_se"].values
            assert np.abs(score).max() < limit(4 * sizes), (name, level)


def test_a_guide_that_is_too_wide_fails():
    verdict = contrast_verdicts(of_binary(GridGuide(binary_model(), 1.3), "mid-grey"))[1]
    assert (verdict.quantity, verdict.status) == ("posterior_sd", "fail")
    assert "too large by up to" in verdict.sentence
    assert verdict.sentence.endswith("of the contrast")


def test_a_curve_about_mid_grey_may_start_anywhere():
    """An image without contrast carries information there: the curve has to fall, and not to start at the prior."""
    lower = [0.6 * value for value in FALLING]
    statuses = {}
    for about in contrast.ABOUT:
        first, second = contrast_verdicts(curves(lower, lower).assign_attrs(about=about))
        statuses[about] = first.status
        assert second.status == "pass"
    assert statuses == {"mean": "fail", "black": "pass", "mid-grey": "pass"}
    flat = contrast_verdicts(curves([0.5] * 5, [0.5] * 5).assign_attrs(about="black"))[0]
    assert flat.status == "fail"


# -- what is shown -----------------------------------------------------------------------------------------------------


def patches(x: torch.Tensor, about: str, support: ImageSupport) -> Any:
    plan = ContrastPlan(images=len(x), about=about)
    return contrast._choose(Data({"x": x}), "x", plan, support, lambda name: stream(0, name))


@pytest.mark.parametrize("about", ["black", "mid-grey"])
def test_a_contrast_of_one_is_the_image_itself(about):
    grey = (torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    for x, support in (
        (binary_images(6)["x"], ImageSupport("binary", 0.0, 1.0)),
        (grey, ImageSupport("grey", 0.0, 1.0)),
        (grey, ImageSupport("interval", 0.0, 1.0)),
        (grey, REAL),
    ):
        made = patches(x, about, support)
        torch.testing.assert_close(made.shown(1.0).tensors()[0]["x"], x)
        assert torch.equal(made.unchanged().tensors()[0]["x"], x)
        low = made.shown(1e-4).tensors()[0]["x"]
        wanted = 0.0 if about == "black" else 0.5
        if support.kind == "binary":
            assert abs(float(low.mean()) - wanted) < limit(1) * 0.5 / math.sqrt(low.numel())
        else:
            torch.testing.assert_close(low, torch.full_like(low, wanted), rtol=0, atol=3e-3)


def test_natural_images_may_lose_contrast_about_black_too():
    target = model("ea-vae")
    result = contrast_experiment(target, ExactGuide(target), images(), about="black", draws=50)
    assert result["contrast"].values == pytest.approx(np.linspace(0.1, 1.0, 10))
    assert result.attrs["spearman_exact"] < -0.9


# -- refused references, and refusals ----------------------------------------------------------------------------------


def test_refused_references_are_bounded(monkeypatch):
    from calibrant.evaluation.uncertainty import sources
    from calibrant.inference.referencing import reference_for

    def reference(*arguments: Any, **options: Any):
        tree = reference_for(*arguments, **options)
        passed = np.arange(tree["posterior"].sizes["data"]) > 0
        tree["convergence"] = xr.DataTree(tree["convergence"].to_dataset().assign(is_reference=("data", passed)))
        return tree

    target = model("ea-vae")
    whole = contrast_experiment(target, ExactGuide(target), images(), levels=[0.1, 1.0, 10.0], chains=2, draws=200)
    assert "posterior_sd_low" not in whole
    monkeypatch.setattr(sources, "reference_for", reference)
    result = contrast_experiment(target, ExactGuide(target), images(), levels=[0.1, 1.0, 10.0], chains=2, draws=200)
    all_images = whole["posterior_sd"].sel(source="exact").values
    assert (result["posterior_sd_low"].values < all_images).all()
    assert (result["posterior_sd_high"].values > all_images).all()
    assert np.isfinite(result["posterior_sd_guide_passed"].values).all()
    assert np.isnan(result["posterior_sd_by_image"].isel(image=0).values).all()
    np.testing.assert_array_equal(
        result["posterior_sd_guide_passed"], result["posterior_sd"].sel(source="amortized").values
    )


class Anything(PyroModule):
    def forward(self, observed: dict[str, torch.Tensor], size: int) -> None:
        with pyro.plate("data", size):
            pyro.sample("scale", dist.LogNormal(torch.zeros(size), 1.0))
            pyro.sample("z", dist.Normal(torch.zeros(size, 2), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"about": "white"}, "about='white': give one of 'mean', 'black', 'mid-grey'"),
        ({"about": "mean"}, "give about='black' or about='mid-grey'"),
        ({"about": "black", "levels": [0.5, 1.0, 2.0]}, "at most 1"),
        ({"about": "black", "noise": 0.4}, "leave out noise="),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InferenceError, match=message):
        contrast_experiment(binary_model(), Anything(), binary_images(5), **options)
