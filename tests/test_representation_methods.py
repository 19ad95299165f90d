"""Every registered method: a new method is tested by existing."""

from typing import Any

import numpy as np
import pytest
import torch
from overlapping_classes import overlapping

import calibrant as cal
from calibrant import representations

SMALL: dict[str, Any] = {"steps": 2, "batch_size": 16, "latents": 3, "width": 8, "trunk": "linear"}
TINY: dict[str, dict[str, Any]] = {  # arguments that make methods small
    "sngp": {"fourier": 16},
    "ensemble": {"members": 2},
    "loss-prediction": {"head": 8},
    "mcinfonce": {"candidates": 3, "particles": 2},
    "infonce": {"candidates": 3},
    "hib": {"particles": 2},
    "het-xl": {"particles": 2, "draws": 8},
    "nivmf": {"draws": 2},
}
TUPLES = ("hib", "infonce", "mcinfonce")  # methods that have no class probabilities
TOY = overlapping(80)


def train(method: str, seed: int = 0, **changes: Any) -> representations.Trained:
    return representations.train_representation(
        method, TOY.data, seed=seed, **{**SMALL, **TINY.get(method, {}), **changes}
    )


@pytest.fixture(scope="module", params=representations.methods())
def trained(request: pytest.FixtureRequest) -> representations.Trained:
    return train(request.param)


def test_the_eleven_are_there():
    assert len(representations.methods()) >= 11


def test_it_is_a_representation(trained):
    assert isinstance(trained, representations.Representation)
    embeddings, uncertainty = trained.embed(TOY.x), trained.uncertainty(TOY.x)
    assert embeddings.shape[0] == 80
    assert embeddings.shape[1] in (3, 6)
    assert uncertainty.shape == (80,)
    assert embeddings.isfinite().all()
    assert uncertainty.isfinite().all()
    assert not embeddings.requires_grad
    assert not uncertainty.requires_grad
    assert uncertainty.unique().numel() > 40


def test_results_do_not_depend_on_the_batch(trained):
    for function in (trained.embed, trained.uncertainty):
        together = function(TOY.x)
        order = torch.randperm(80)
        torch.testing.assert_close(function(TOY.x[order]), together[order], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(function(TOY.x[:1]), together[:1], rtol=1e-4, atol=1e-5)


def test_the_same_seed_gives_the_same_weights(trained):
    weights, others = trained.learner.state_dict(), train(trained.method).learner.state_dict()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    assert not torch.equal(trained.uncertainty(TOY.x), train(trained.method, seed=1).uncertainty(TOY.x))


def test_a_file_holds_it(trained, tmp_path):
    file = trained.save(tmp_path / "kept.safetensors")
    kept = representations.load_representation(file)
    assert (kept.method, kept.arguments) == (trained.method, trained.arguments)
    assert np.array_equal(kept.classes, [3, 13, 23, 33])
    assert torch.equal(kept.embed(TOY.x), trained.embed(TOY.x))
    assert torch.equal(kept.uncertainty(TOY.x), trained.uncertainty(TOY.x))
    assert kept.history == trained.history


def test_classes_have_probabilities(trained):
    if trained.method in TUPLES:
        with pytest.raises(cal.errors.ProgramError, match="no class probabilities"):
            trained.class_probabilities(TOY.x)
        return
    found = trained.class_probabilities(TOY.x)
    assert found.shape == (80, 4)
    torch.testing.assert_close(found.sum(-1), torch.ones(80))


@pytest.mark.parametrize("trunk", ["none", "mlp"])
@pytest.mark.parametrize("method", representations.methods())
def test_other_trunks(method, trunk):
    found = train(method, trunk=trunk)
    embeddings = found.embed(TOY.x)
    assert found.uncertainty(TOY.x).isfinite().all()
    if trunk == "none":  # the embedding is what was given
        assert torch.equal(embeddings, TOY.x)
    else:
        assert embeddings.shape[1] in (3, 6)
        assert embeddings.isfinite().all()


def test_cards_say_what_a_method_is():
    for name in representations.methods():
        card = representations.method_card(name)
        assert card.paper
        assert card.about
        assert card.unit
        assert card.cls.__doc__


def test_programs_are_programs():
    found = {name: train(name).program for name in ("mcinfonce", "sngp")}
    assert found["sngp"] is None
    assert type(found["mcinfonce"]).__name__ == "MCInfoNCE"
