"""What users give to methods: data, arguments, backbones and files; each refusal says what to do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from overlapping_classes import overlapping
from torch import nn

import calibrant as cal
from calibrant import representations
from calibrant.representations.learners.labelled import Labelled

TOY = overlapping(60)
TINY: dict[str, Any] = {"steps": 2, "latents": 3, "trunk": "linear"}


def train(method: str = "mc-dropout", data: cal.data.Data = TOY.data, **changes: Any) -> representations.Trained:
    return representations.train_representation(method, data, **{**TINY, **changes})


# -- arguments and data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("mc-dropuot", {}, "unknown method 'mc-dropuot'; did you mean mc-dropout"),
        ("mc-dropout", {"passess": 3}, "its own arguments are: rate, passes, score"),
        ("mc-dropout", {"rate": 1.0}, "rate=1.0: give a probability from 0, below 1"),
        ("mc-dropout", {"passes": 0}, "passes=0 is given, wanted a whole number above 0"),
        ("mc-dropout", {"score": "jds"}, "give one of 'jsd', 'entropy'"),
        ("ensemble", {"form": "wide"}, "give one of 'shallow', 'deep'"),
        ("ensemble", {"members": 0}, "members=0 is given, wanted a whole number above 0"),
        ("sngp", {"ridge": 0.0}, "give numbers above 0"),
        ("sngp", {"momentum": 1.0}, "give -1 for the exact precision"),
        ("loss-prediction", {"form": "rank"}, "give one of 'order', 'value'"),
        ("het-xl", {"score": "variance"}, "give one of 'entropy', 'covariance'"),
        ("hib", {"slop": 2.0}, "slop"),
        ("classifier", {"trunk": "conv"}, "give one of 'none', 'linear', 'mlp'"),
        ("classifier", {"latents": 1}, "give whole numbers, 2 latents or more"),
        ("classifier", {"steps": 0}, "steps=0: give a whole number above 0"),
        ("elk", {"weight_decay": 0.1}, "weight_decay"),
    ],
)
def test_wrong_arguments(method, arguments, message):
    with pytest.raises(cal.errors.ProgramError, match=message):
        train(method, **arguments)


def of(observed: dict[str, Any], covariates: dict[str, Any]) -> cal.data.Data:
    return cal.data.Data(observed, covariates)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (of({"label": TOY.y}, {"x": TOY.x}), r'the data have no y: .* Data.select\(\{"x": NAME, "y": NAME\}\)'),
        (of({"y": torch.zeros(60)}, {"x": TOY.x}), "two classes or more"),
        (of({"y": torch.rand(60)}, {"x": TOY.x}), "one whole number per image"),
        (of({"y": torch.ones(60, 2)}, {"x": TOY.x}), "one whole number per image"),
    ],
    ids=["no labels", "one class", "numbers", "several labels"],
)
def test_wrong_data(data, message):
    with pytest.raises(cal.errors.DataError, match=message):
        train(data=data)


def test_the_remedy_for_other_names_works():
    data = of({"label": TOY.y, "image": TOY.x}, {})
    assert train(data=data.select({"x": "image", "y": "label"})).embed(TOY.x).shape == (60, 3)


def test_inputs_and_labels_may_be_observations_or_covariates():
    made = [of({"x": TOY.x, "y": TOY.y}, {}), of({"x": TOY.x}, {"y": TOY.y}), of({"y": TOY.y}, {"x": TOY.x})]
    found = [train(data=data).uncertainty(TOY.x) for data in made]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_views_of_an_image_are_held_out_together():
    images = np.repeat(np.arange(30), 2)
    data = cal.data.Data({"y": TOY.y}, {"x": TOY.x}, {"image": images})
    kept, held = Labelled(data).split(seed=0)
    assert len(held) == 6
    assert not set(kept.data.coords["image"]) & set(held.data.coords["image"])
    apart = Labelled(TOY.data).split(seed=0)[1].data.labels()
    assert len(set(apart // 2)) > 3  # without the coordinate, some views are on both sides


def test_wrong_inputs():
    trained = train()
    with pytest.raises(cal.errors.DataError, match=r"x has shape \(3, 5\): this representation takes \(n, 6\)"):
        trained.embed(torch.zeros(3, 5))
    with pytest.raises(cal.errors.DataError, match="not finite"):
        trained.uncertainty(torch.full((3, 6), float("nan")))
    assert torch.equal(trained.embed(np.asarray(TOY.x)), trained.embed(TOY.x))


def test_a_loss_that_is_not_finite_restores_the_weights():
    with pytest.raises(cal.errors.NonFiniteLoss, match=r"the loss is not finite in step \d+: lower lr="):
        train(steps=40, lr=1e30)


# -- backbones ---------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A backbone for images, with batch norm, whose features depend on other images unless it is in `eval()`."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.network = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


IMAGES = torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PHOTOGRAPHS = of({"y": TOY.y}, {"x": IMAGES})


@pytest.mark.parametrize("method", ["classifier", "loss-prediction", "sngp", "hib"])
def test_heads_on_cached_features_are_those_behind_the_backbone(method):
    backbone = Small().requires_grad_(False).eval()
    with torch.no_grad():
        cached = backbone(IMAGES)
    arguments = {"steps": 20, "batch_size": 20, "trunk": "linear", **({"particles": 2} if method == "hib" else {})}
    behind = train(method, PHOTOGRAPHS, backbone=backbone, **arguments)
    on = train(method, of({"y": TOY.y}, {"x": cached}), **arguments)
    weights = on.learner.state_dict()
    assert set(behind.learner.state_dict()) == set(weights)
    for name, weight in behind.learner.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(behind.uncertainty(IMAGES), on.uncertainty(cached), rtol=1e-3, atol=1e-4)


def test_a_frozen_backbone_stays_as_it_is_and_out_of_the_file(tmp_path):
    backbone = Small().requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    trained = train(data=PHOTOGRAPHS, backbone=backbone)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    file = trained.save(tmp_path / "head.safetensors")
    assert sum(value.numel() for value in trained.learner.state_dict().values()) == 16 + 16 + 3 * 17 + 4 * 4 + 10 * 3
    kept = representations.load_representation(file, backbone=backbone)
    assert torch.equal(kept.uncertainty(IMAGES), trained.uncertainty(IMAGES))
    with pytest.raises(cal.errors.RunError, match="behind a backbone: give it"):
        representations.load_representation(file)
    with pytest.raises(cal.errors.RunError, match="with other weights"):
        representations.load_representation(file, backbone=Small().requires_grad_(False))
    with pytest.raises(cal.errors.RunError, match="was frozen: give it in the same state"):
        representations.load_representation(file, backbone=Small())


def test_a_backbone_may_be_trained_too(tmp_path):
    backbone = Small()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    trained = train(data=PHOTOGRAPHS, backbone=backbone, steps=5, trunk="none")
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())  # a copy is trained
    tuned: Any = trained.learner.trunk.tuned
    assert not torch.equal(tuned.network[0].weight, backbone.network[0].weight)
    kept = representations.load_representation(trained.save(tmp_path / "whole.safetensors"), backbone=Small())
    assert torch.equal(kept.embed(IMAGES), trained.embed(IMAGES))


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return train().save(tmp_path / "kept.safetensors")


def test_a_file_that_is_missing_damaged_or_something_else(file, tmp_path):
    with pytest.raises(cal.errors.RunError, match=r"there is no file .*Trained.save"):
        representations.load_representation(tmp_path / "other.safetensors")
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(cal.errors.RunError, match="damaged"):
        representations.load_representation(file)
    file.write_bytes(b"something else")
    with pytest.raises(cal.errors.RunError, match="cannot be read as safetensors"):
        representations.load_representation(file)


def test_a_frozen_backbone_is_not_asked_for_where_there_was_none(file):
    with pytest.raises(cal.errors.RunError, match="leave out backbone="):
        representations.load_representation(file, backbone=Small())


def test_arguments_that_no_file_can_hold(tmp_path):
    trained = train()
    trained.arguments["module"] = nn.Linear(1, 1)
    with pytest.raises(cal.errors.RunError, match="no JSON values"):
        trained.save(tmp_path / "kept.safetensors")


def test_half_precision_halves_the_file(tmp_path):
    trained = train("sngp", fourier=64)
    whole, half = (trained.save(tmp_path / f"{half}.safetensors", half=half) for half in (False, True))
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    kept = representations.load_representation(half)
    torch.testing.assert_close(kept.uncertainty(TOY.x), trained.uncertainty(TOY.x), rtol=0.02, atol=0.02)
    with torch.no_grad():
        trained.learner.frequencies[0, 0] = 1e6
    with pytest.raises(cal.errors.RunError, match="half=False"):
        trained.save(tmp_path / "wide.safetensors", half=True)
