"""Verdicts on contrast curves of any shape, and what the experiment refuses."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from contrast_models import (
    SHAPE,
    PlainGuide,
    experiment,
    flat,
    images,
    model,
    statuses,
)
from pyro.nn import PyroModule
from torch import Tensor

import calibrant as cal
from calibrant.errors import CalibrantError, InferenceError
from calibrant.evaluation import contrast_experiment, contrast_verdicts


def curves(exact: list[float], ours: list[float], se: float = 1e-3, share: float = 1.0) -> xr.Dataset:
    """A result with these posterior sds, without a scale."""
    values = np.repeat(np.array([exact, ours])[:, :, None], 4, 2)
    dims = ("source", "contrast", "image")
    return xr.Dataset(
        {"posterior_sd_by_image": (dims, values), "posterior_sd_by_image_se": (dims, np.full_like(values, se))},
        coords={"source": ["exact", "amortized"], "contrast": np.geomspace(0.1, 10, len(exact))},
        attrs={
            "prior_sd": 1.0,
            "scale": "",
            "structure": "",
            "reference_method": "exact",
            "share_reference": share,
            "spearman_exact": float(np.corrcoef(np.argsort(np.argsort(exact)), range(len(exact)))[0, 1]),
        },
    )


FALLING = [0.99, 0.9, 0.6, 0.3, 0.1]


@pytest.mark.parametrize(
    ("exact", "ours", "expected", "words"),
    [
        (FALLING, FALLING, ("pass", "pass"), "falls from 0.99 to 0.10"),
        (FALLING, [0.95 * v for v in FALLING], ("pass", "pass"), "falls"),
        (FALLING, [0.8 * v for v in FALLING], ("pass", "fail"), "falls"),
        (FALLING, [0.99, 0.9, 0.6, 0.3, 0.3], ("pass", "fail"), "falls"),
        ([0.5, 0.5, 0.5, 0.5, 0.5], [0.5] * 5, ("fail", "pass"), "is flat, 0.50 of the prior"),
        ([0.50, 0.49, 0.48, 0.47, 0.46], [0.48] * 5, ("fail", "pass"), "is flat"),
        ([0.1, 0.3, 0.6, 0.9, 0.99], FALLING, ("fail", "fail"), "it should fall steadily"),
        ([0.5, 0.4, 0.3, 0.2, 0.1], [0.5, 0.4, 0.3, 0.2, 0.1], ("fail", "pass"), "it should start near the prior"),
    ],
)
def test_verdicts_of_known_curves(exact, ours, expected, words):
    first, second = contrast_verdicts(curves(exact, ours))
    assert (first.status, second.status) == expected
    assert words in first.sentence


def test_a_flat_curve_is_flat_however_its_noise_is_ranked():
    """Noise that happens to fall has rank correlation −1."""
    still = [0.556, 0.553, 0.55, 0.547, 0.544]
    assert contrast_verdicts(curves(still, still, se=0.005))[0].status == "fail"
    assert "is flat" in contrast_verdicts(curves(still, still, se=0.005))[0].sentence
    noisy = [0.60, 0.57, 0.55, 0.53, 0.50]
    assert "is flat" not in contrast_verdicts(curves(noisy, noisy, se=0.001))[0].sentence


def test_a_curve_that_is_not_known_is_not_called_flat():
    falling = [1.0, 0.9, 0.7, 0.5, 0.4]
    assert contrast_verdicts(curves(falling, falling, se=3.0))[0].status == "cannot tell"


def test_a_guide_at_the_margin_is_left_open():
    verdict = contrast_verdicts(curves(FALLING, [1.1 * v for v in FALLING], se=0.01))[1]
    assert verdict.status == "cannot tell"
    assert verdict.sentence.startswith("guide: cannot tell whether its posterior sd follows the exact curve within 10%")


def test_a_guide_is_failed_where_some_references_are_missing():
    first, second = contrast_verdicts(curves(FALLING, [0.5] * 5, share=0.91))
    assert (first.status, second.status) == ("cannot tell", "fail")


def test_there_is_no_verdict_if_more_than_a_tenth_of_the_references_are_missing():
    for exact in (FALLING, [0.5] * 5):
        found = contrast_verdicts(curves(exact, [0.8 * v for v in FALLING], share=0.89))
        assert [verdict.status for verdict in found] == ["cannot tell"] * 2
        assert all("11% of the images × contrasts have no reference" in verdict.sentence for verdict in found)


# -- refusals ----------------------------------------------------------------------------------------------------------


class Two(PyroModule):
    """Two vector latents, two scales, noise of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.likelihood = cal.models.Gaussian(0.5)

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            a, b = (pyro.sample(n, dist.LogNormal(0.0, 1.0)) for n in ("a", "b"))
            u, v = (pyro.sample(n, dist.Normal(0.0, 1.0).expand([2]).to_event(1)) for n in ("u", "v"))
            mean = (a * u.sum(-1) + b * v.sum(-1))[:, None, None, None].expand(size, *SHAPE)
            pyro.sample("x", self.likelihood(mean))


class Scalar(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.likelihood = cal.models.Gaussian(0.5)

    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", self.likelihood(z[:, None, None, None].expand(size, *SHAPE)))


class Pair(PyroModule):
    def forward(self, size: int) -> None:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1)[:, None, None, None].expand(size, *SHAPE), 1.0).to_event(3))
            pyro.sample("w", dist.Normal(z.sum(-1), 1.0))


class PriorGuide(PyroModule):
    """The program's own latents, whatever is observed."""

    def __init__(self, target: PyroModule) -> None:
        super().__init__()
        self.target = copy.deepcopy(target)

    def forward(self, observed: dict[str, Tensor], size: int) -> None:
        with pyro.poutine.block(hide=["x", "w"]):
            self.target(size)


def binary() -> dict[str, Tensor]:
    return {"x": (images()["x"] > 0).float()}


@pytest.mark.parametrize(
    ("target", "data", "options", "message"),
    [
        (model("vae", likelihood="bernoulli"), binary(), {}, "give about='black' or about='mid-grey'"),
        (model("vae", likelihood={"name": "student-t"}), images(), {}, "noise_sd.*Give noise="),
        (model("vae"), images(), {"noise": 0.0}, "noise=0.0"),
        (model("vae"), images(), {"noise": math.nan}, "noise=nan"),
        (model("vae"), images(), {"levels": [1.0, 2.0]}, "levels are"),
        (model("vae"), images(), {"levels": [0.0, 1.0, 2.0]}, "levels are"),
        (model("vae"), images(), {"levels": [1.0, 1.0, 2.0]}, "levels are"),
        (model("vae"), images(), {"images": 1}, "images=1"),
        (model("vae"), {"x": torch.ones(9, *SHAPE)}, {}, "of 9 data 0 have contrast"),
        (model("vae"), images(), {"latent": "y"}, r"latent='y' is no vector.*\['z'\]"),
        (model("vae"), images(), {"scale": "z"}, "scale='z' is no positive scalar"),
        (Scalar(), images(), {}, "need a local vector latent"),
        (Two(), images(), {}, r"vector latents \['u', 'v'\]: name one with latent="),
        (Two(), images(), {"latent": "u"}, r"positive scalar latents \['a', 'b'\]: name one with scale="),
        (Pair(), {**images(), "w": torch.zeros(12)}, {"noise": 1.0}, "experiments on images need exactly one"),
        (model("vae"), {"x": torch.zeros(9, 5)}, {}, "'x' has shape"),
    ],
)
def test_what_the_experiment_cannot_use_is_refused(target, data, options, message):
    with pytest.raises(CalibrantError, match=message):
        contrast_experiment(target, PriorGuide(target), data, **options)


def test_a_guide_without_any_spread_fails():
    target = model("vae")
    result = experiment(target, PlainGuide(flat(1e-30), scale=False), draws=50)
    assert statuses(result)["guide", "posterior_sd"] == "fail"
    assert "too small by up to 100.00%" in contrast_verdicts(result)[1].sentence


def test_a_guide_with_draws_that_are_not_finite_is_refused():
    target = model("vae")
    broken = PlainGuide(flat(math.inf), scale=False)
    with pyro.validation_enabled(False), pytest.raises(InferenceError, match="draws of 'z' are not finite"):
        experiment(target, broken, draws=50)
