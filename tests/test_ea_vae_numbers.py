"""What the cells of the EA-VAE paper make of results: numbers with their errors, and images of other sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

from calibrant.reproductions.datasets import as_bytes, from_bytes
from calibrant.reproductions.papers.ea_vae_contrast import of_curves
from calibrant.reproductions.papers.ea_vae_corruption import of_corruption
from calibrant.reproductions.papers.ea_vae_outside import in_units_of, of_scores
from calibrant.reproductions.registering import list_experiments

SOURCES = {"source": ["exact", "amortized"]}
LEVELS = [0.1, 1.0, 10.0]


def test_datasets_survive_a_cell():
    variables = {"a": (("source", "x"), np.arange(6.0).reshape(2, 3)), "b": ("x", [True, False, True])}
    dataset = xr.Dataset(variables, SOURCES, {"latent": "z", "n": 3})
    assert from_bytes(as_bytes(dataset)).identical(dataset)


def curves(sds: np.ndarray) -> xr.Dataset:
    """Posterior sds `(source, contrast, image)` as a result of the contrast experiment, in units of half a prior sd."""
    variables = {"posterior_sd_by_image": (("source", "contrast", "image"), sds / 2)}
    attributes = {"prior_sd": 0.5, "share_reference": 0.75}
    return xr.Dataset(variables, {**SOURCES, "contrast": LEVELS}, attributes)


def test_slopes_are_those_of_single_images_in_prior_sds():
    steps = np.log10(LEVELS)
    slopes = np.array([[-0.2, -0.3, -0.4, -0.5], [0.0, 0.1, 0.2, 9.0]])
    sds = 0.9 + slopes[:, None] * steps[None, :, None]
    sds[0, 1, 3] = np.nan  # a refused reference takes its image away from both sources
    found = of_curves(curves(sds), steps)
    assert found["slope, exact"].value == pytest.approx(-0.3)
    assert found["slope, exact"].se == pytest.approx(0.1 / np.sqrt(3))
    assert found["slope, guide"].value == pytest.approx(0.1)
    assert found["sd at low contrast, exact"].value == pytest.approx(1.2)
    assert found["refused"] == 0.25


def test_a_change_under_corruption_is_that_of_the_same_images():
    sds = np.stack([np.array([[0.2, 0.5, 0.3], [0.3, 0.8, 0.9]]), np.array([[0.1, 0.1, 0.1], [0.1, 0.1, 5.0]])])
    sds[0, 0, 2] = np.nan
    dims = ("source", "corruption", "level", "image")
    variables = {
        "posterior_sd": (dims, sds[:, None]),
        "coverage": (dims[:3], np.array([[[0.9, 0.5]], [[0.9, 0.4]]])),
        "coverage_se": (dims[:3], np.full((2, 1, 2), 0.01)),
        "share_reference": (("corruption", "level"), np.array([[2 / 3, 1.0]])),
    }
    found = of_corruption(xr.Dataset(variables, {**SOURCES, "corruption": ["blur"]}))
    assert found["sd under blur, exact"].value == pytest.approx(0.2)  # .1 and .3
    assert found["sd under blur, guide"].value == pytest.approx(0.0)  # the third image has no reference
    assert found["coverage under blur, guide"].value == 0.4
    assert found["refused"] == pytest.approx(1 / 3)


def test_aurocs_are_named_by_set_and_source():
    dims = ("source", "matching", "set")
    values = np.arange(6.0).reshape(2, 3, 1) / 10
    variables = {
        "auroc": (dims, values),
        "auroc_low": (dims, values - 0.1),
        "auroc_high": (dims, values + 0.1),
        "share_refused": (dims[1:], np.full((3, 1), 0.2)),
    }
    coords = {**SOURCES, "matching": ["as shown", "contrast", "power"], "set": ["permuted"]}
    found = of_scores(xr.Dataset(variables, coords))
    assert found["AUROC, permuted, exact"].value == pytest.approx(0.0)
    assert found["AUROC, permuted, guide"].value == pytest.approx(0.3)
    assert found["AUROC, permuted at matched contrast, guide"].value == pytest.approx(0.4)
    assert found["AUROC, permuted at matched contrast, guide"].se == pytest.approx(0.1 / 1.96)
    assert found["refused"] == 0.2


def test_other_sets_get_the_mean_and_the_power_of_patches():
    generator = torch.Generator().manual_seed(0)
    patches = 3.0 * torch.randn(50, 1, 6, 6, generator=generator)
    images = torch.rand(40, 1, 6, 6, generator=generator)
    found = in_units_of(images, patches)
    assert found.mean((1, 2, 3)).abs().max() < 1e-5
    assert float(found.square().mean()) == pytest.approx(float(patches.square().mean()), rel=1e-4)
    ratio = found.flatten(1).std(1) / images.flatten(1).std(1)
    assert float(ratio.std()) < 1e-3 * float(ratio.mean())  # one factor for the whole set: contrasts keep their order


@pytest.mark.parametrize("card", list_experiments("ea-vae"), ids=lambda card: card.name)
def test_claims_of_both_sources_have_both_numbers(card):
    for claim in card.claims:
        assert {f"{claim.number}, exact", f"{claim.number}, guide"} & set(card.numbers)
        if f"{claim.number}, exact" in card.numbers and card.domain in ("mnist",):
            assert {"refused", f"{claim.number}, refused"} & set(card.numbers)
