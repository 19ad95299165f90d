"""Checkpoints: trainings go on as if they had not been interrupted, and what can't go on is refused."""

import json
import shutil
from importlib import import_module

import pytest
import safetensors.torch
import torch
from commands import interrupt_at
from stored_runs import cut, modules, rows, same

import calibrant as cal
from calibrant.errors import NonFiniteLoss, RunError
from calibrant.inference.fitting import checkpoints, lengths

EPOCHS = 3


def train(folder=None, resume=False, name="ea-vae", **options):
    model, guide = modules(name)
    options = {"epochs": EPOCHS, "batch_size": 32, "validation": {"x": rows(40, 2)["x"]}, "lr": 5e-3, **options}
    options["validation"] = cal.data.Data(options["validation"])
    fit = cal.inference.fit(model, guide, rows(200, 1), run_dir=folder, resume=resume, **options)
    return fit, {**model.state_dict(), **{f"guide.{n}": v for n, v in guide.state_dict().items()}}


@pytest.fixture(scope="module")
def uninterrupted():
    return train()


@pytest.mark.parametrize("step", [0, 6, 15])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, uninterrupted, step):
    whole, weights = uninterrupted
    with monkeypatch.context() as patched:
        interrupt_at(patched, step)
        part, _ = train(tmp_path)
    assert part.stopped == "interrupted"
    assert part.epochs == step // 6
    for _ in "12":  # the second time there is nothing left to do
        resumed, again = train(tmp_path, resume=True)
        assert resumed == whole
        assert resumed.stopped == "finished"
        assert same(weights, again)


@pytest.mark.parametrize("lost", ["moments", "counts"])
def test_the_test_of_resuming_notices_what_a_checkpoint_lost(tmp_path, monkeypatch, lost):
    _, weights = train()
    with monkeypatch.context() as patched:
        interrupt_at(patched, 9)
        train(tmp_path, clip=0.5)
    if lost == "moments":
        monkeypatch.setattr(checkpoints, "_moments", lambda adam, weights: {})
    else:
        original = checkpoints._read_checkpoint

        def without_counts(path):
            tensors, stored = original(path)
            return tensors, {**stored, "counts": {}}

        monkeypatch.setattr(checkpoints, "_read_checkpoint", without_counts)
    _, again = train(tmp_path, resume=True, clip=0.5)
    assert not same(weights, again)


def test_early_stopping_counts_on(tmp_path, monkeypatch):
    first = [weight.clone() for module in modules("ea-vae") for weight in module.parameters()]

    def worse_every_epoch(state, held, plan, total, draws=(1, 1), purpose="epoch"):
        now = state.modules.parameters()
        elbo = -sum(float((a - b).norm().detach()) for a, b in zip(now, first, strict=True))
        return elbo, 0.0, elbo

    monkeypatch.setattr(import_module("calibrant.inference.fitting.loop"), "held_out_elbo", worse_every_epoch)
    monkeypatch.setattr(lengths, "_PATIENT_STEPS", 1)
    options = {"lr": 0.01, "patience": 2, "epochs": 6}
    whole, weights = train(**options)
    assert (whole.stopped, whole.epochs) == ("early", 3)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 6 * (whole.epochs - 1) + 2)
        train(tmp_path, **options)
    resumed, again = train(tmp_path, resume=True, **options)
    assert resumed == whole
    assert same(weights, again)


def test_a_loss_that_is_not_finite_leaves_the_best_weights(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 12, NonFiniteLoss("not finite", []))
    model, guide = modules("ea-vae")
    with pytest.raises(NonFiniteLoss):
        cal.inference.fit(model, guide, rows(200, 1), epochs=EPOCHS, batch_size=32, run_dir=tmp_path)
    tensors, stored = checkpoints._read_checkpoint(tmp_path / "checkpoints" / "training.safetensors")
    assert stored["fit"]["epochs"] >= 2
    assert not model.training
    assert all(torch.equal(value, tensors[f"best.model.{name}"]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """The folder of a training of one epoch; tests copy it."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train(folder, epochs=1)
    return folder


def test_trainings_that_cannot_go_on_are_refused(tmp_path, one_epoch):
    with pytest.raises(RunError, match="no checkpoint"):
        train(tmp_path / "empty", resume=True)
    with pytest.raises(RunError, match="run_dir="):
        train(resume=True)
    shutil.copytree(one_epoch, tmp_path, dirs_exist_ok=True)
    with pytest.raises(RunError, match="resume=True"):
        train(tmp_path, epochs=1)
    with pytest.raises(RunError, match=r"epochs was 1, is 2; .*lr was 0.005, is 0.1"):
        train(tmp_path, resume=True, epochs=2, lr=0.1)
    with pytest.raises(RunError, match="held-out data was 40, is 30"):
        train(tmp_path, resume=True, epochs=1, validation=rows(30))
    with pytest.raises(RunError, match="does not fit"):
        train(tmp_path, resume=True, epochs=1, name="ppca")


def test_a_training_of_a_version_with_other_random_streams_is_refused(tmp_path, one_epoch):
    """It would be resumed with another split: data that it was trained on would be held out."""
    shutil.copytree(one_epoch, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "training.safetensors"
    tensors, training = checkpoints._read_checkpoint(path)
    del training["settings"]["random streams"]
    text = json.dumps(training)
    sha256 = checkpoints.digest_of_tensors(tensors, text)
    path.write_bytes(safetensors.torch.save(tensors, {"training": text, "sha256": sha256}))
    with pytest.raises(RunError, match="random streams was None, is named by purpose"):
        train(tmp_path, resume=True, epochs=1)


@pytest.mark.parametrize("damage", ["cut", "text", "no training"])
def test_a_damaged_checkpoint_is_refused(tmp_path, one_epoch, damage):
    shutil.copytree(one_epoch, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "training.safetensors"
    if damage == "cut":
        cut(path)
    elif damage == "text":
        path.write_text("no tensors")
    else:
        path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(RunError, match="damaged"):
        train(tmp_path, resume=True, epochs=1)


def test_labels_of_any_kind_survive_training():
    model, guide = modules()
    data = cal.data.Data(rows(40), coords={"data": [f"image {i}" for i in range(40)]})
    fit = cal.inference.fit(model, guide, data, epochs=1, batch_size=8)
    assert len(fit.held_out) == 4
    assert all(label.startswith("image ") for label in fit.held_out)
