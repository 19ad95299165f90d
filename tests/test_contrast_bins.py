"""Images at their own contrast, in bins: curves of models whose posterior is known, and guides that are wrong."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from contrast_models import LATENTS, ExactGuide, PlainGuide, flat, images, model
from pyro.nn import PyroModule

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation import binned_moments, contrast_bins
from calibrant.inference.references.exact import solve
from calibrant.inference.references.sampling import exact_structure

COUNT, BINS = 120, 7


def curves(target: PyroModule, guide: PyroModule, **options) -> xr.Dataset:
    return contrast_bins(target, guide, images(COUNT), images(40, 2), **{"bins": BINS, "draws": 200, **options})


@pytest.fixture(scope="module", params=["ea-vae", "vae", "ppca"])
def known(request) -> tuple[PyroModule, xr.Dataset]:
    if request.param == "ppca":
        torch.manual_seed(0)
        target = cal.models.create("ppca", shape=[1, 4, 4], latents=LATENTS).eval()
        blind = PlainGuide(flat(0.4), scale=False)  # its means are zero, so that all latents have to be asked for
        return target, curves(target, blind, threshold=-1.0)
    target = model(request.param)
    return target, curves(target, ExactGuide(target))


def test_curves_are_those_of_the_closed_form(known):
    target, result = known
    truth = solve(exact_structure(target, images(COUNT)), images(COUNT)["x"].double())
    x = images(COUNT)["x"].double().flatten(1)
    contrast = x.std(1, correction=0).numpy()
    np.testing.assert_allclose(result["contrast_by_image"], contrast, rtol=1e-5)
    centres = np.linspace(contrast.min(), contrast.max(), BINS)
    np.testing.assert_allclose(result["contrast"], centres, rtol=1e-5)
    place = np.abs(contrast[:, None] - centres).argmin(1)
    np.testing.assert_array_equal(result["images"], np.bincount(place, minlength=BINS))
    mean, sd = truth.mean["z"].numpy(), truth.sd["z"].numpy()
    exact = result.sel(source="exact")
    for k in np.flatnonzero(np.bincount(place, minlength=BINS) > 1):
        own = place == k
        wanted = {
            "signal_mean": np.linalg.norm(mean[own], axis=1).mean(),
            "signal_variance": mean[own].var(0, ddof=1).mean(),
            "noise_variance": (sd[own] ** 2).mean(),
        }
        if "scale" in truth.mean:
            wanted["scale_mean"] = truth.mean["scale"][torch.as_tensor(own)].mean().item()
        # of 800 draws: the error of a variance is √(2/800) of it, that of a mean sd/√800
        error = {"signal_mean": sd.max(), "signal_variance": 4 * sd.max(), "noise_variance": 4.0, "scale_mean": 2.0}
        for name, value in wanted.items():
            assert abs(float(exact[name][k]) - value) < limit(28) * error[name] / np.sqrt(800 * own.sum()), (name, k)


def test_the_scale_makes_the_difference(known):
    target, result = known
    has_scale = hasattr(target, "prior_of_scale")
    curve = result["noise_variance"].sel(source="exact").dropna("contrast").values
    assert (result.attrs["spearman_exact"] < -0.9) == has_scale
    if not has_scale:
        assert np.ptp(curve) < 0.1 * curve.mean()


def test_a_guide_that_is_blind_to_contrast_is_seen():
    target = model("ea-vae")
    result = curves(target, PlainGuide(flat(0.5), scale=True), threshold=0.0)
    assert result.attrs["spearman_exact"] < -0.9
    blind = result["noise_variance"].sel(source="amortized").dropna("contrast").values
    assert blind == pytest.approx(0.25, abs=0.02)


class FixedScale(PyroModule):
    """The exact posterior given the scale's prior mean: a planted defect."""

    def __init__(self, target: PyroModule) -> None:
        super().__init__()
        self.target = target

    def forward(self, observed, size):
        s = torch.full((size,), float(self.target.prior_of_scale().mean))
        loading, noise = self.target.decoder.weight, self.target.likelihood.scale
        gain = (loading.T @ loading)[None] * (s / noise)[:, None, None] ** 2
        covariance = torch.linalg.inv(torch.eye(loading.shape[1]) + gain)
        error = observed["x"].flatten(1) - self.target.decoder.bias
        mean = (s / noise**2)[:, None] * torch.einsum("nij,nj->ni", covariance, error @ loading)
        with pyro.plate("data", size):
            pyro.sample("scale", dist.LogNormal(s.log(), 1e-3))
            pyro.sample("z", dist.MultivariateNormal(mean, covariance))


def test_a_scale_that_is_fixed_at_its_prior_mean_is_seen():
    target = model("ea-vae")
    result = curves(target, FixedScale(target))
    fixed = result["noise_variance"].sel(source="amortized").dropna("contrast").values
    assert np.ptp(fixed) < 0.1 * fixed.mean()
    scale = result["scale_mean"].dropna("contrast")
    assert float(scale.sel(source="exact").max() / scale.sel(source="exact").min()) > 2
    assert float(scale.sel(source="amortized").max() / scale.sel(source="amortized").min()) < 1.05


def test_only_latents_that_reconstructions_need_are_used():
    target = model("vae")
    with torch.no_grad():
        target.decoder.directions[:, 1] = 1e-4
    result = curves(target, ExactGuide(target))
    assert result["informative"].values.tolist() == [True, False, True, True, True]
    assert (result.attrs["n_informative"], result.sizes["latent"]) == (4, LATENTS)
    with pytest.raises(InferenceError, match=r"largest change is .*give a smaller threshold"):
        curves(target, ExactGuide(target), threshold=1e6)


def test_the_guide_alone_and_trees():
    target = model("ea-vae")
    alone = curves(target, ExactGuide(target), reference=False)
    assert alone["source"].values.tolist() == ["amortized"]
    assert "spearman_exact" not in alone.attrs
    trees = {
        "exact": cal.inference.reference(target, images(COUNT), draws=200),
        "amortized": cal.inference.posterior(target, ExactGuide(target), images(COUNT), draws=200),
    }
    found = binned_moments(trees, bins=BINS)
    both = found["noise_variance"].dropna("contrast")
    np.testing.assert_allclose(both.sel(source="exact"), both.sel(source="amortized"), rtol=0.15)
    np.testing.assert_allclose(
        found["noise_variance"].sel(source="amortized"), alone["noise_variance"].sel(source="amortized"), rtol=0.15
    )
    by_scale = binned_moments(trees, trees["exact"]["posterior"]["scale"].mean(("chain", "draw")).values, bins=BINS)
    assert by_scale.attrs["spearman_exact"] < -0.9


def test_images_without_a_reference_are_left_out_and_bounded():
    target = model("ea-vae")
    trees = {
        "exact": cal.inference.reference(target, images(COUNT), draws=200),
        "amortized": cal.inference.posterior(target, ExactGuide(target), images(COUNT), draws=200),
    }
    gate = trees["exact"]["convergence"].to_dataset().assign(is_reference=("data", np.arange(COUNT) >= 9))
    trees["exact"]["convergence"] = xr.DataTree(gate)
    found = binned_moments(trees, bins=BINS)
    assert int(found["images"].sum()) == COUNT
    assert int(found["images_passed"].sum()) == COUNT - 9
    assert found.attrs["share_reference"] == pytest.approx(1 - 9 / COUNT)
    assert float(found["noise_variance_low"]) < float(found["noise_variance_high"])
    assert np.isfinite(found["noise_variance_guide_refused"])


def test_the_noise_of_draws_makes_no_latent_informative():
    """The means of a blind guide differ between images by the noise of draws alone, which has no sign in two halves."""
    with pytest.raises(InferenceError, match="no latent changes the reconstruction"):
        curves(model("vae"), PlainGuide(flat(1.0), scale=False), draws=250)
