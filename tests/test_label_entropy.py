"""Label entropy: the classifier that is kept, and what it makes of posteriors that are known."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
import xarray as xr
from agreement import limit
from contrast_models import SHAPE, ExactGuide, PlainGuide, flat, images, model
from uncertainty_models import refusing  # noqa: F401

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation import label_entropy
from calibrant.evaluation.uncertainty.read_out import train_read_out

Array = npt.NDArray[np.float64]


def test_the_best_state_is_kept_and_not_the_last():
    """Labels that are noise: after a while, more passes only make the held-out loss worse."""
    rng = np.random.default_rng(0)
    place, labels = rng.normal(size=(150, 4)), rng.integers(0, 2, 150)

    def draw(images: npt.NDArray[np.int64], count: int, seed: int) -> Array:
        noise = np.random.default_rng(seed).normal(0, 0.1, (len(images), count, 4))
        return place[images][:, None] + noise

    found = train_read_out(draw, labels, 300, seed=0)
    assert np.argmin(found.losses) < 150
    assert found.losses[-1] > found.losses.min() + 0.1
    assert found.losses.min() < 0.75
    some = draw(np.arange(150), 1, 7)[:, 0]
    certain = found.probabilities(some).max(-1).mean()
    assert certain < 0.75  # the last state is certain of labels that are noise
    assert found.losses.shape == (300,)


def test_a_classifier_of_separate_classes_is_right_and_reports_images_that_it_never_saw():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, 6, 200)
    used: list[set[int]] = []

    def draw(images: npt.NDArray[np.int64], count: int, seed: int) -> Array:
        used.append(set(images.tolist()))
        return labels[images][:, None, None] + np.random.default_rng(seed).normal(0, 0.1, (len(images), count, 2))

    found = train_read_out(draw, labels, 150, seed=0)
    assert found.classes.tolist() == [3, 4, 5]
    assert float(found.results()["accuracy"][1]) > 0.95
    assert found.results()["accuracy_of_mean"][1] >= found.results()["accuracy"][1]
    choosing, *training, reporting = used
    assert len(choosing) == len(reporting) == 40
    assert not choosing & reporting
    assert all(not part & (choosing | reporting) and len(part) == 120 for part in training)


@pytest.fixture(scope="module")
def found() -> dict[str, xr.Dataset]:
    """Classes are the signs of the first latent's part of the image; strong, weak and blank images."""
    x = images(360)["x"]
    labels = ((x.flatten(1) @ model("vae").decoder.weight.detach())[:, 0] > 0).long()
    sets = {"weak": 0.05 * x[300:], "permuted": torch.randn(60, *SHAPE, generator=torch.Generator().manual_seed(0))}
    result = {}
    for name in ("exact", "blind"):
        target = model("vae")
        guide = ExactGuide(target) if name == "exact" else PlainGuide(flat(0.5), scale=False)
        given = {"x": x[:300]}, labels[:300], {"x": x[300:]}, sets
        result[name] = label_entropy(target, guide, *given, images=40, passes=120, draws=250)
    return result


def test_guide_and_exact_draws_are_read_alike_and_weak_images_have_no_label(found):
    result = found["exact"]
    assert float(result["accuracy_of_mean"]) > 0.85
    exact, guide = (result["entropy"].sel(source=source) for source in ("exact", "amortized"))
    assert float(np.abs(exact - guide).max()) < 0.12  # both are draws of one posterior
    mean, se = (result[f"entropy_mean{end}"].sel(source="exact") for end in ("", "_se"))
    assert float(mean.sel(set="weak") - mean.sel(set="inside")) > limit(1) * float(se.sel(set="inside"))
    assert float(mean.sel(set="weak")) > 0.95 * math.log(2)
    assert float(result["entropy"].max()) <= math.log(2) + 1e-12
    inside = result["of_set"].values == "inside"
    assert float(mean.sel(set="inside")) == pytest.approx(exact.values[inside].mean())
    assert float(result["largest_mean"].sel(source="exact", set="weak")) < 0.7
    assert result.attrs["classes"] == 2
    assert result.attrs["best_pass"] == int(result["held_out_loss"].values.argmin()) + 1
    assert result["set"].values.tolist() == ["inside", "weak", "permuted"]


def test_a_guide_that_is_blind_teaches_nothing(found):
    """Its draws hold no label: entropies are those of ignorance, whatever is shown."""
    result = found["blind"]
    assert abs(float(result["accuracy"]) - 0.5) < 0.15
    assert (result["entropy"].sel(source="amortized") > 0.9 * math.log(2)).all()


def test_refused_references_bound_the_mean(refusing):  # noqa: F811
    refusing(lambda call, image: image < 4)
    x = images(60)["x"]
    labels = (x.flatten(1).sum(1) > 0).long()
    result = label_entropy(
        model("vae"), PlainGuide(flat(0.5), False), {"x": x[:30]}, labels[:30], {"x": x[30:]}, {"same": x[30:]},
        images=20, passes=2, draws=100,
    )  # fmt: skip
    assert np.isnan(result["entropy"].sel(source="exact").values).sum() == 4
    one = result.sel(set="inside")
    kept = result["entropy"].sel(source="exact").values[4:20].sum()
    assert float(one["entropy_low"]) == pytest.approx(kept / 20)
    assert float(one["entropy_high"]) == pytest.approx((kept + 4 * math.log(2)) / 20)
    assert float(one["entropy_mean"].sel(source="exact")) == pytest.approx(kept / 16)


def test_refusals():
    x = images(30)["x"]
    target, guide, one = model("vae"), PlainGuide(flat(0.5), False), {"same": x}

    def read(labels: object, **options: object) -> None:
        label_entropy(target, guide, {"x": x}, labels, {"x": x}, one, **options)

    with pytest.raises(DataError, match=r"labels have shape \(29,\) and dtype int64: give one whole number for each"):
        read(np.zeros(29, dtype=int))
    with pytest.raises(DataError, match="dtype float64: give one whole number"):
        read(np.full(30, 0.5))
    with pytest.raises(DataError, match="labels hold one class: two are needed"):
        read(np.zeros(30, dtype=int))
    with pytest.raises(InferenceError, match="passes=0: give at least one pass"):
        read(np.arange(30) % 2, passes=0)
    with pytest.raises(DataError, match="9 labelled images are too few"):
        train_read_out(lambda *_: np.zeros((1, 1, 1)), np.arange(9) % 2, 1, 0)
