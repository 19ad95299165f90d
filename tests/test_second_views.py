"""Posteriors given a second view: quadrature on the sphere, draws, simulated truth, and planted defects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from agreement import limit

from calibrant.distributions import VonMisesFisher, cosine_nodes, log_normalizer, mean_cosine
from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import second_view_experiment, second_view_posterior

K = 20.0


def views(count: int, features: int, seed: int = 0) -> list[torch.Tensor]:
    """Directions and concentrations of two views whose directions are somewhat alike."""
    torch.manual_seed(seed)
    one = torch.nn.functional.normalize(torch.randn(count, features).double(), dim=-1)
    other = torch.nn.functional.normalize(one + torch.randn(count, features).double() / features**0.5, dim=-1)
    return [one, 1 + 30 * torch.rand(count).double(), other, 1 + 30 * torch.rand(count).double()]


def bias_of(features: int) -> float:
    return float(
        log_normalizer(features, torch.tensor(K).double()) - log_normalizer(features, torch.zeros(()).double())
    )


def sphere(rings: int = 48, steps: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Points on the unit sphere of ℝ³ and their areas."""
    heights, weights = np.polynomial.legendre.leggauss(rings)
    angles = 2 * np.pi * (np.arange(steps) + 0.5) / steps
    z, angle = (part.ravel() for part in np.meshgrid(heights, angles, indexing="ij"))
    side = np.sqrt(1 - z**2)
    points = np.stack([side * np.cos(angle), side * np.sin(angle), z], 1)
    return points, np.repeat(weights, steps) * 2 * np.pi / steps


def test_on_the_sphere_the_posterior_is_that_of_quadrature():
    given = views(4, 3)
    found = second_view_posterior(*given, K)
    points, areas = sphere()
    for place in range(4):
        mu, kappa, other, other_kappa = (part[place].numpy() for part in given)
        prior, prior_other = (
            areas * np.exp(c * (points @ m) - c) * c / (2 * np.pi * (1 - np.exp(-2 * c)))
            for m, c in ((mu, kappa), (other, other_kappa))
        )
        assert prior.sum() == pytest.approx(1, abs=1e-8)
        likely = (1 / (1 + np.exp(-K * points @ points.T - bias_of(3)))) @ prior_other
        match = prior @ likely
        posterior = prior * likely / match
        mean = posterior @ points
        one = found.isel(data=place)
        expected = {
            "match": match,
            "resultant": np.linalg.norm(mean),
            "information": posterior @ np.log(likely / match),
            "efficiency": match**2 / (prior @ likely**2),
        }
        for name, value in expected.items():
            assert float(one[name]) == pytest.approx(value, rel=1e-5, abs=1e-7), name
        assert one["direction"].values == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)
        length = mean_cosine(3, torch.tensor(float(one["concentration"])).double())
        assert float(length) == pytest.approx(np.linalg.norm(mean), rel=1e-6)


@pytest.mark.parametrize("features", [2, 8, 64])
def test_in_other_dimensions_it_is_that_of_weighted_draws(features):
    given = views(3, features)
    found = second_view_posterior(*given, K)
    torch.manual_seed(1)
    count = 20_000
    z, other = (VonMisesFisher(given[i], given[i + 1]).sample((count,)) for i in (0, 2))
    weights = torch.sigmoid(K * (z * other).sum(-1) + bias_of(features)).numpy()
    match = found["match"].values
    scores = [(weights.mean(0) - match) / weights.std(0) * math.sqrt(count)]
    along = np.einsum("sdf,df->sd", z.numpy(), found["direction"].values)
    for length, planted in ((found["resultant"].values, False), (1.1 * found["resultant"].values, True)):
        off = weights / match * (along - length)
        score = off.mean(0) / off.std(0) * math.sqrt(count)
        if planted:
            assert (np.abs(score) > limit(6)).any()
        else:
            scores.append(score)
    assert np.abs(scores).max() < limit(6)


def test_views_that_say_nothing_leave_the_prior():
    mu, kappa, other, _ = views(5, 6)
    found = second_view_posterior(mu, kappa, other, torch.zeros(5), K)
    assert found["information"].values == pytest.approx(np.zeros(5), abs=1e-6)
    assert found["concentration"].values == pytest.approx(kappa.numpy(), rel=1e-6)
    assert found["direction"].values == pytest.approx(mu.numpy(), abs=1e-6)
    assert found["match"].values == pytest.approx(found["match"].values[:1].repeat(5), rel=1e-6)
    same = second_view_posterior(mu, kappa, mu, kappa, K)  # no plane of its own
    assert same["direction"].values == pytest.approx(mu.numpy(), abs=1e-6)
    assert (same["concentration"] > kappa.numpy()).all()


def test_simulated_matches_are_where_the_posterior_says_and_not_where_the_prior_says():
    count, features = 30_000, 5
    mu, kappa, other, other_kappa = (part.repeat_interleave(count // 10, 0) for part in views(10, features, 2))
    torch.manual_seed(3)
    z, z_other = VonMisesFisher(mu, kappa).sample(), VonMisesFisher(other, other_kappa).sample()
    y = torch.rand(count).double() < torch.sigmoid(K * (z * z_other).sum(-1) + bias_of(features))
    found = second_view_posterior(*views(10, features, 2), K)
    rows = np.repeat(np.arange(10), count // 10)[y.numpy()]
    cosine = (z[y].numpy() * found["direction"].values[rows]).sum(1)

    def score(length: np.ndarray) -> float:
        off = cosine - length[rows]
        return float(off.mean() / off.std() * math.sqrt(len(off)))

    assert abs(score(found["resultant"].values)) < limit(1)
    prior = mean_cosine(features, views(10, features, 2)[1]).numpy()
    assert abs(score(prior)) > limit(1)  # planted: the second view is ignored


def test_nodes_of_the_cosine_give_its_moments():
    kappa = torch.tensor([0.0, 3.0, 500.0]).double()
    for features in (2, 3, 40):
        cosines, weights = cosine_nodes(features, kappa)
        assert (weights * cosines).sum(-1).numpy() == pytest.approx(mean_cosine(features, kappa).numpy(), abs=1e-12)
        second = 1 - (features - 1) * mean_cosine(features, kappa[1:]) / kappa[1:]
        assert (weights * cosines**2).sum(-1)[1:].numpy() == pytest.approx(second.numpy(), rel=1e-9)


# -- judged by a third view --------------------------------------------------------------------------------------------


def three_views(count: int = 240, features: int = 6) -> tuple[list[torch.Tensor], np.ndarray]:
    """Three views of objects, drawn by the program, and classes of objects."""
    torch.manual_seed(5)
    labels = np.arange(count) % 8
    centres = torch.nn.functional.normalize(torch.randn(8, features).double(), dim=-1)
    objects = VonMisesFisher(centres[labels], torch.tensor(30.0).double()).sample()
    kappas = [5 + 40 * torch.rand(count).double() for _ in range(3)]
    seen = [VonMisesFisher(objects, torch.tensor(K).double()).sample() for _ in range(3)]
    return [
        part for z, kappa in zip(seen, kappas, strict=True) for part in (VonMisesFisher(z, kappa).sample(), kappa)
    ], labels


def test_a_second_view_of_the_same_object_helps_and_one_of_another_object_does_not():
    (one, kappa, two, kappa_two, three, _), labels = three_views()
    found = second_view_experiment((one, kappa), (two, kappa_two), three, K, labels=labels)
    assert found["cosine"].sel(estimate="prior").item() == pytest.approx((one * three).sum(-1).mean().item())
    gain = found["cosine_gain_low"]
    assert (gain.sel(estimate=["posterior", "product"]) > 0).all()
    assert found["cosine_gain_high"].sel(estimate="posterior, other image").item() < 0  # planted: other images
    recall = found["recall"].sel(estimate="second view").item()
    cosines = (two @ three.T).numpy()
    assert found["instance"].sel(estimate="second view").item() == (cosines.argmax(1) == np.arange(240)).mean()
    np.fill_diagonal(cosines, -2)
    assert recall == (labels[cosines.argmax(1)] == labels).mean()
    few = slice(0, 10)
    without = second_view_experiment((one[few], kappa[few]), (two[few], kappa_two[few]), three[few], K)
    assert "recall" not in without


def test_refusals_say_what_to_do():
    mu, kappa, other, other_kappa = views(5, 4)
    with pytest.raises(InferenceError, match="above 0 and at most 100"):
        second_view_posterior(mu, kappa, other, other_kappa, 1000.0)
    with pytest.raises(InferenceError, match="between −500 and 500"):
        second_view_posterior(mu, kappa, other, other_kappa, K, bias=-1000.0)
    with pytest.raises(DataError, match="give pairs"):
        second_view_posterior(mu, kappa, other[:3], other_kappa[:3], K)
    with pytest.raises(DataError, match="none of them zero"):
        second_view_posterior(0 * mu, kappa, other, other_kappa, K)
    with pytest.raises(DataError, match="finite κ ≥ 0"):
        second_view_posterior(mu, -kappa, other, other_kappa, K)
    with pytest.raises(DataError, match="three of each image"):
        second_view_experiment((mu, kappa), (other, other_kappa), mu[:2], K)
