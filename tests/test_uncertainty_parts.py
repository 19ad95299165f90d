"""What experiments on images share: supports, moments and their errors, entropies, and means with refused images."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from agreement import limit
from contrast_models import ExactGuide, images, model

import calibrant as cal
from calibrant.errors import InferenceError
from calibrant.evaluation import binned_moments, posterior_moments
from calibrant.evaluation.uncertainty.images import REAL, ImageSupport, support_of, uniforms_of
from calibrant.evaluation.uncertainty.latents import reconstruction_changes
from calibrant.evaluation.uncertainty.moments import Names, gaussian_entropy, moments_of
from calibrant.evaluation.uncertainty.refused import is_decided, with_refused
from calibrant.evaluation.uncertainty.sources import SourcePlan, source_moments, sources_of
from calibrant.inference.problem import Problem
from calibrant.inference.references.exact import solve
from calibrant.inference.references.sampling import exact_structure

SITES = Names("x", "z", "scale")

# -- supports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("likelihood", "expected"),
    [
        ("gaussian", REAL),
        ("student-t", REAL),
        ("bernoulli", ImageSupport("binary", 0.0, 1.0)),
        ("continuous-bernoulli", ImageSupport("interval", 0.0, 1.0)),
        ("discretised-gaussian", ImageSupport("grey", 0.0, 1.0)),
        ("categorical", ImageSupport("grey", 0.0, 1.0)),
    ],
)
def test_the_support_is_that_of_the_likelihood(likelihood, expected):
    target = model("vae", likelihood=likelihood)
    data = cal.data.Data({"x": (images()["x"] > 0).float()})
    assert support_of(target, data, "x") == expected


def test_counts_and_positive_numbers_have_bounds_too():
    def program(size):
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Poisson(z.exp()).to_event(1))
            pyro.sample("y", dist.LogNormal(z, 1.0).to_event(1))

    data = cal.data.Data({"x": torch.ones(3, 2), "y": torch.ones(3, 2)})
    target = cal.program.as_program(program)
    assert support_of(target, data, "x") == ImageSupport("whole", 0.0, math.inf)
    assert support_of(target, data, "y") == ImageSupport("interval", 0.0, math.inf)


@pytest.mark.parametrize("kind", ["real", "interval", "grey", "whole", "binary"])
def test_changed_images_stay_in_the_support(kind):
    values = 3 * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(0))
    low, high = (-math.inf, math.inf) if kind == "real" else (0.0, 4.0 if kind == "whole" else 1.0)
    support, uniforms = ImageSupport(kind, low, high), uniforms_of(values, 1)
    found = support.nearest(values, uniforms)
    if kind == "real":
        assert torch.equal(found, values)
    assert found.min() >= low
    assert found.max() <= high
    if kind in ("whole", "binary"):
        assert torch.equal(found, found.round())
    if kind == "grey":
        assert ((255 * found).round() / 255 == found).all()
    assert torch.equal(support.nearest(found, uniforms), found)  # images in the support stay as they are


def test_binary_images_share_their_random_numbers_over_levels():
    """A pixel that is on at a low value is on at a higher one, and the share of pixels that are on is the value."""
    uniforms = uniforms_of(torch.zeros(400, 100), 0)
    support = ImageSupport("binary", 0.0, 1.0)
    levels = [support.nearest(torch.full((400, 100), value), uniforms) for value in (0.2, 0.5, 0.9)]
    for low, high in pairwise(levels):
        assert (low <= high).all()
    for value, found in zip((0.2, 0.5, 0.9), levels, strict=True):
        assert abs(float(found.mean()) - value) < limit(3) * math.sqrt(value * (1 - value) / 40_000)


# -- moments -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem() -> Problem:
    target = model("ea-vae")
    return Problem.of(target, ExactGuide(target), images())


def test_moments_of_both_sources_are_those_of_the_exact_solution(problem):
    truth = solve(exact_structure(problem.program, images()), images()["x"].double())
    for tree in sources_of(problem, SourcePlan(1000, 2), 0).values():
        found = moments_of(tree, SITES, unit=2.0)
        score = (found.mean - truth.mean["z"].numpy() / 2) / np.sqrt(found.mean_error)
        assert np.abs(score).max() < limit(score.size)
        for value, se, wanted in (
            (found.posterior_sd, found.posterior_sd_se, truth.sd["z"].mean(1).numpy() / 2),
            (found.scale_mean, found.scale_mean_se, truth.mean["scale"].numpy()),
            (found.scale_cv, found.scale_cv_se, (truth.sd["scale"] / truth.mean["scale"]).numpy()),
        ):
            assert np.abs((value - wanted) / se).max() < limit(3 * len(wanted))
            assert (np.abs(1.15 * value - wanted) / se).max() > limit(3 * len(wanted))  # a planted defect


def test_blocks_of_images_change_nothing_but_the_draws(problem, monkeypatch):
    from calibrant.evaluation.uncertainty import sources

    monkeypatch.setattr(sources, "_ENTRIES", 6 * 500 * 2 * 5)  # five images
    found = source_moments(problem, SourcePlan(500, 2), SITES, np.arange(5) < 3)
    truth = solve(exact_structure(problem.program, images()), images()["x"].double()).mean["z"][:, :3].numpy()
    for moments in found.values():
        assert moments.mean.shape == (12, 3)
        assert np.abs((moments.mean - truth) / np.sqrt(moments.mean_error)).max() < limit(36)
    assert list(source_moments(problem, SourcePlan(50, reference=False), SITES)) == ["amortized"]


@pytest.mark.parametrize("copies", [1, 3])
def test_the_entropy_of_a_normal_whatever_the_number_of_draws(copies):
    """30 draws of 8 latents: without the correction it is too low by .7 nats; copies count once."""
    root = np.tril(np.random.default_rng(0).normal(size=(8, 8))) + 3 * np.eye(8)
    exact = 4 * np.log(2 * np.pi * np.e) + np.log(np.abs(np.diag(root))).sum()
    draws = np.random.default_rng(1).normal(size=(2000, 1, 30, 8)) @ root.T
    found = gaussian_entropy(np.repeat(draws, copies, 2), independent=copies == 1)
    error = found.std() / np.sqrt(len(found))
    if copies == 1:
        assert abs(found.mean() - exact) < limit(1) * error
        plain = 4 * np.log(2 * np.pi * np.e) + np.mean([np.linalg.slogdet(np.cov(d[0].T))[1] / 2 for d in draws])
        assert plain < exact - 0.5
    else:  # the effective number of draws is itself estimated
        assert abs(found.mean() - exact) < 0.3


def test_an_entropy_that_is_not_known():
    draws = np.random.default_rng(0).normal(size=(1, 1, 20, 3))
    draws[..., 2] = 1.0
    assert gaussian_entropy(draws, independent=True)[0] == -np.inf
    assert np.isnan(gaussian_entropy(draws[:, :, :2], independent=True)[0])


# -- informative latents -----------------------------------------------------------------------------------------------


def test_the_change_of_reconstructions_of_a_linear_model(problem):
    """Replacing one mean by its average changes a linear reconstruction by its column, times the variance of s z."""
    target = model("vae")
    own = Problem.of(target, ExactGuide(target), images(40))
    found = reconstruction_changes(own, Names("x", "z", ""), 400, 0)
    mean = solve(exact_structure(target, images(40)), images(40)["x"].double()).mean["z"].numpy()
    column = target.decoder.weight.detach().double().square().sum(0).numpy()
    np.testing.assert_allclose(found, mean.var(0) * column, rtol=0.1)


# -- refused references ------------------------------------------------------------------------------------------------


def test_bounds_of_a_mean_with_refused_images():
    exact = np.array([[1.0, 2.0, 3.0, np.nan], [2.0, 2.0, np.nan, np.nan]])
    guide = np.array([[1.0, 2.0, 4.0, 9.0], [1.0, 3.0, 5.0, 7.0]])
    passed = np.isfinite(exact)
    found = {name: values for name, (_, values) in with_refused("sd", ("level",), exact, guide, passed).items()}
    assert found["sd_guide_passed"] == pytest.approx([7 / 3, 2.0])
    assert found["sd_guide_refused"][1] == pytest.approx(6.0)
    assert np.isnan(found["sd_guide_refused"][0])  # a single image
    assert found["sd_low"] == pytest.approx([(6 + 1) / 4, (4 + 2) / 4])  # the smallest value of any image is 1
    assert found["sd_high"] == pytest.approx([(6 + 9) / 4, (4 + 18) / 4])
    given = with_refused("sd", ("level",), exact, guide, passed, (0.0, 10.0))
    assert given["sd_low"][1] == pytest.approx([6 / 4, 1.0])
    true = np.array([[1.0, 2.0, 3.0, 5.0], [2.0, 2.0, 8.0, 1.5]]).mean(1)
    assert ((found["sd_low"] <= true) & (true <= found["sd_high"])).all()


def test_no_verdict_above_a_tenth():
    assert is_decided(0.9)
    assert not is_decided(0.89)


# -- draws that are there already --------------------------------------------------------------------------------------


def test_trees_of_other_samplers(problem):
    """A tree with nothing but draws: every draw three times, whose errors are those of the different draws."""
    tree = cal.inference.posterior(problem.program, problem.guide, images(), draws=500)
    bare = tree["posterior"].dataset.isel(draw=np.repeat(np.arange(500), 3)).drop_vars("draw").drop_attrs()
    found, copied = (posterior_moments(t) for t in (tree, xr.DataTree.from_dict({"/posterior": bare})))
    np.testing.assert_allclose(copied["mean"], found["mean"], rtol=1e-6)
    assert float((copied["mean_se"] / found["mean_se"]).mean()) == pytest.approx(1.0, abs=0.1)
    np.testing.assert_allclose(copied["entropy"], found["entropy"], atol=0.05)
    assert found["passed"].all()
    assert (found.attrs["latent"], found.attrs["scale"]) == ("z", "scale")
    some = posterior_moments(tree, prior_sd=2.0, informative=[True, False, True, True, True])
    assert some.sizes["latent"] == 4
    np.testing.assert_allclose(some["sd"], found["sd"].values[:, [0, 2, 3, 4]] / 2)


def test_trees_that_cannot_be_binned(problem):
    tree = cal.inference.posterior(problem.program, problem.guide, images(), draws=50)
    other = cal.inference.posterior(problem.program, problem.guide, images(6), draws=50)
    for trees, options, message in (
        ({}, {}, "there is no tree"),
        ({"a": tree, "b": other}, {}, "different images"),
        ({"a": tree}, {"contrast": [1.0, 2.0]}, "12 images"),
        ({"a": tree}, {"contrast": np.ones(12)}, "same contrast"),
        ({"a": tree}, {"bins": 2}, "bins=2"),
        ({"a": tree}, {"latent": "y"}, "latent='y' is no vector"),
        ({"a": tree.filter(lambda node: node.name != "observed_data")}, {}, "give contrast="),
        ({"a": tree.filter(lambda node: node.name != "posterior")}, {}, "no group `posterior`"),
    ):
        with pytest.raises(InferenceError, match=message):
            binned_moments(trees, **options)
