"""The Fréchet distance of Normals with known moments, its bias, its floor, and features that have a name."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

import calibrant as cal
from calibrant.errors import InferenceError

ROOT = np.array([[1.0, 0.0, 0.0], [0.5, 0.7, 0.0], [-0.3, 0.2, 0.4]])


def normal(size, mean=0.0, root=ROOT, seed=0):
    return mean + np.random.default_rng(seed).normal(size=(size, len(root))) @ root.T


def truth(mean, first, second):
    """By the definition, with a square root of a matrix."""
    ours, theirs = first @ first.T, second @ second.T
    return len(first) * mean**2 + np.trace(ours + theirs - 2.0 * np.real(sqrtm(ours @ theirs)))


def test_it_is_the_distance_of_the_moments_of_the_samples():
    first, second = normal(50), normal(50, 0.3, 1.5 * ROOT.T, seed=1)
    found = cal.evaluation.frechet_distance(first, second)
    roots = [np.linalg.cholesky(np.cov(side.T)) for side in (first, second)]
    wanted = truth(0.0, *roots) + ((first.mean(0) - second.mean(0)) ** 2).sum()
    assert float(found["distance"]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(("mean", "root"), [(0.4, ROOT), (0.0, 1.5 * ROOT.T)], ids=["mean", "covariance"])
def test_normals_have_their_distance_and_stand_out_of_the_floor(mean, root):
    size = 20_000
    found = cal.evaluation.frechet_distance(normal(size), normal(size, mean, root, seed=1))
    assert float(found["distance"]) == pytest.approx(truth(mean, ROOT, root), rel=0.1)
    assert float(found["distance_of_halves"]) > 20 * float(found["floor"])


def test_one_distribution_gives_the_floor_whose_bias_falls_with_the_number_of_data():
    roots = np.eye(40)
    floors = []
    for size in (100, 400):
        found = cal.evaluation.frechet_distance(normal(size, root=roots), normal(size, root=roots, seed=1))
        assert float(found["distance_of_halves"]) == pytest.approx(float(found["floor"]), rel=0.3)
        assert float(found["distance"]) < 0.75 * float(found["distance_of_halves"])  # the bias of twice the data
        floors.append(float(found["floor"]))
    assert floors[0] == pytest.approx(4 * floors[1], rel=0.4)


def test_a_covariance_that_is_singular_has_a_distance_and_is_named():
    wide = np.random.default_rng(0).normal(size=(2, 30, 1, 8, 8))
    found = cal.evaluation.frechet_distance(*wide)
    assert found.attrs["singular"] == 1
    assert np.isfinite(float(found["distance"]))
    again = cal.evaluation.frechet_distance(wide[0], wide[0])
    assert float(again["distance"]) == pytest.approx(0.0, abs=1e-9)


class Shape(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))

    def forward(self, x):
        return x @ self.weight


def test_features_have_the_name_of_what_computes_them():
    first, second = torch.as_tensor(normal(600)), torch.as_tensor(normal(600, 0.5, seed=1))
    module = Shape().eval()
    found = cal.evaluation.frechet_distance(first, second, module)
    assert (found.attrs["name"], int(found["features"])) == ("Shape", 2)
    flat = cal.evaluation.frechet_distance(first @ torch.ones(3, 2).double(), second @ torch.ones(3, 2).double())
    assert float(found["distance"]) == pytest.approx(float(flat["distance"]), rel=1e-4)
    assert cal.evaluation.frechet_distance(first, second).attrs["name"] == "pixels"
    assert cal.evaluation.frechet_distance(first, second, lambda x: x[:, :2], "first two").attrs["name"] == "first two"
    with pytest.raises(InferenceError, match="give name="):
        cal.evaluation.frechet_distance(first, second, lambda x: x)


def test_what_cannot_be_compared_is_refused():
    first = normal(20)
    refused = {
        "as many generated": (first, normal(21)),
        "four data": (first[:3], first[:3]),
        "unknown": (first, first, "inception"),
        r"wanted \(20, features\)": (first, first, lambda x: x.sum(1), "sums"),
        "not finite": (first, first * np.inf),
        "training mode": (first, first, Shape()),
    }
    for message, given in refused.items():
        with pytest.raises(InferenceError, match=message):
            cal.evaluation.frechet_distance(*given)
