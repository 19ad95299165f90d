"""Gradient conflict: known cosines, stopped gradients, and modules that are as before."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from calibrant.errors import InferenceError
from calibrant.evaluation import gradient_conflict


class Two(nn.Module):
    """A backbone with a classifier and an uncertainty, with or without a stopped gradient."""

    def __init__(self, stopped: bool) -> None:
        super().__init__()
        self.stopped = stopped
        self.backbone = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.classifier, self.uncertainty = nn.Linear(6, 3), nn.Linear(6, 1)

    def losses(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.backbone(batch[0])
        loss = nn.functional.cross_entropy(self.classifier(features), batch[1], reduction="none")
        seen = features.detach() if self.stopped else features
        return loss.mean(), (self.uncertainty(seen)[:, 0] - loss.detach()).square().mean()


def batches(count: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(count)]


def of(model: Two, shared: nn.Module | None = None):
    losses = {"class": lambda batch: model.losses(batch)[0], "uncertainty": lambda batch: model.losses(batch)[1]}
    return gradient_conflict(model, losses, batches(), shared)


@pytest.mark.parametrize("angle", [0.0, 1.0, 2.0, math.pi])
def test_the_cosine_of_two_linear_losses_is_that_of_their_slopes(angle):
    weight = nn.Linear(2, 1, bias=False)
    slopes = torch.tensor([[2.0, 0.0], [3 * math.cos(angle), 3 * math.sin(angle)]])
    losses = {"a": lambda scale: scale * weight(slopes[0]).sum(), "b": lambda scale: scale * weight(slopes[1]).sum()}
    found = gradient_conflict(weight, losses, [1.0, 2.0, 5.0])
    assert found["cosine"].values == pytest.approx(math.cos(angle), abs=1e-6)
    assert found["norm"].values == pytest.approx(np.array([[2, 4, 10], [3, 6, 15]]))
    assert found["share_negative"].item() == (math.cos(angle) < 0)
    assert found["cosine_mean"].item() == pytest.approx(math.cos(angle), abs=1e-6)
    swapped = gradient_conflict(weight, {"a": losses["a"], "b": lambda scale: -losses["b"](scale)}, [1.0])
    assert swapped["cosine"].values == pytest.approx(-math.cos(angle), abs=1e-6)  # planted: a loss that is maximised


def test_cosines_are_those_of_backward():
    model = Two(False)
    found = of(model, model.backbone)
    for place, batch in enumerate(batches()):
        pair = []
        for number in (0, 1):
            model.zero_grad()
            model.losses(batch)[number].backward()
            pair.append(torch.cat([weight.grad.flatten() for weight in model.backbone.parameters()]))
        cosine = nn.functional.cosine_similarity(*pair, dim=0).item()
        assert found["cosine"].values[place] == pytest.approx(cosine, abs=1e-5)
    cosines = found["cosine"].values
    assert found["cosine_mean"].item() == pytest.approx(cosines.mean())
    assert found["share_negative"].item() == (cosines < 0).mean()
    assert found["share_negative_low"].item() <= (cosines < 0).mean() <= found["share_negative_high"].item()
    assert found["share_reached"].item() > 0


def test_nothing_conflicts_behind_a_stopped_gradient():
    model = Two(True)
    for shared in (None, model.backbone):
        found = of(model, shared)
        assert (found["cosine"] == 0).all()
        assert found["share_reached"].item() == 0
        assert found["share_negative"].item() == 0
    assert (of(model, model.backbone)["norm"].sel(loss="uncertainty") == 0).all()
    assert (of(Two(False)).cosine != 0).any()  # planted: the gradient is not stopped


def test_the_module_its_gradients_and_the_random_state_are_as_before():
    model = Two(False)
    model.losses(batches()[0])[0].backward()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [weight.grad.clone() if weight.grad is not None else None for weight in model.parameters()]
    data = batches()
    state = torch.get_rng_state()
    gradient_conflict(model, {str(i): lambda batch, i=i: model.losses(batch)[i] for i in (0, 1)}, data)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for weight, gradient in zip(model.parameters(), gradients, strict=True):
        assert (weight.grad is None) if gradient is None else torch.equal(weight.grad, gradient)


def test_both_losses_of_a_batch_see_the_same_draws():
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 1))
    losses = {name: lambda x: net(x).mean() for name in ("a", "b")}
    found = gradient_conflict(net, losses, [torch.randn(4, 8) for _ in range(5)])
    assert found["cosine"].values == pytest.approx(1.0)


def test_refusals_say_what_to_do():
    model = Two(False)
    good = {"class": lambda batch: model.losses(batch)[0]}
    bad = {
        "give two": good,
        "no finite number": {**good, "b": lambda batch: model.losses(batch)[1] * math.nan},
        "depends on no weight": {**good, "b": lambda batch: torch.tensor(1.0)},
        "return one number": {**good, "b": lambda batch: model.backbone(batch[0])},
    }
    for message, losses in bad.items():
        with pytest.raises(InferenceError, match=message):
            gradient_conflict(model, losses, batches(1))
    both = {**good, "b": lambda batch: model.losses(batch)[1]}
    with pytest.raises(InferenceError, match="give one batch or more"):
        gradient_conflict(model, both, [])
    with pytest.raises(InferenceError, match="part of the module"):
        gradient_conflict(model, both, batches(1), nn.Linear(2, 2))
