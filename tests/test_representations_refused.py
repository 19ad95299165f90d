"""What the room of representations refuses, each in one sentence that says what to give; and images of 8 bits."""

import h5py
import numpy as np
import pytest
import torch
from torch import nn

import calibrant as cal
from calibrant import representations as room
from calibrant.data import Data
from calibrant.errors import CalibrantError

RNG = np.random.default_rng(0)
CLASSES = np.arange(60) % 3
BYTES = np.clip(RNG.normal(60 + 60 * CLASSES[:, None, None, None], 20, (60, 1, 4, 4)), 0, 255).astype(np.uint8)
UNIT = (BYTES / 255).astype(np.float32)
DATA = Data({"y": CLASSES}, {"x": UNIT})
QUICK = {"steps": 3, "batch_size": np.int64(8)}


def trained(method: str = "classifier", data: object = DATA, **arguments: object) -> room.Trained:
    return room.train_representation(method, data, **{**QUICK, **arguments})


@pytest.mark.parametrize("method", ["classifier", "loss-prediction", "hib"])
def test_images_of_8_bits_are_the_same_in_every_role(method):
    found = [
        trained(method, data, trunk="mlp", steps=20).uncertainty(BYTES)
        for data in (
            DATA,
            Data({"x": BYTES}, {"y": CLASSES}),
            Data({"x": BYTES, "y": CLASSES}),
            {"x": BYTES, "y": CLASSES},
        )
    ]
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-4, atol=1e-6)


def test_tuples_of_8_bits_keep_their_dtype_in_every_role():
    for data in (Data({"x": BYTES}, {"y": CLASSES}), {"x": BYTES, "y": CLASSES}):
        assert room.pairs(data, 4).tensors()[1]["x"].dtype == torch.uint8
        assert room.candidates(data, 4).tensors()[1]["candidates"].dtype == torch.uint8


def test_a_small_network_of_8_bits_is_that_of_the_same_images_in_unit_values():
    unit, whole = (
        room.small_network(Data({"x": x, "y": CLASSES}), steps=2, size=16, features=8) for x in (UNIT, BYTES)
    )
    assert unit.digest() == whole.digest()


def test_data_may_be_a_dict():
    data = {"x": UNIT, "y": CLASSES}
    assert len(room.batches(data, 2, size=3)) == 2
    assert len(room.matchable(data)) == 60


class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(48, 2))


def pair() -> nn.Module:
    return cal.models.create("pair", shape=[3], latents=2)


def saved(path, **arguments):
    return trained().save(path, **arguments)


REFUSED = {
    "small network, range": (
        lambda _: room.small_network(Data({"x": UNIT * 255, "y": CLASSES})),
        r"x has values from 0.* to 2\d\d: give images in \[0, 1\]",
    ),
    "small network, one class": (
        lambda _: room.small_network(Data({"x": UNIT, "y": 0 * CLASSES})),
        "all images have the class 0: small_network needs two classes or more",
    ),
    "file": (lambda path: room.read_features(path / "no.h5"), r"no.h5 is missing: features\(…, FILE\) writes one"),
    "folder": (lambda path: room.read_features(path), "is a folder: give the name of a file"),
    "backbone by name": (
        lambda _: trained(backbone="efficientnet-lite0"),
        r"backbone='efficientnet-lite0' is no module: give cal.representations.backbone\('efficientnet-lite0'\)",
    ),
    "load, backbone by name": (
        lambda path: room.load_representation(saved(path / "new" / "a.st"), backbone="efficientnet-lite0"),
        "backbone='efficientnet-lite0' is no module",
    ),
    "backbone None": (
        lambda _: room.backbone(None),
        "backbone got None: give one of 'efficientnet-lite0', or",
    ),
    "backbone class": (lambda _: room.backbone(Net), "backbone got the class Net: give one of"),
    "backbone function": (lambda _: room.backbone(lambda x: x), "backbone got a function: give one of"),
    "backbone keyword": (
        lambda _: room.backbone(nn.Flatten(), std=1.0),
        "backbone has no argument 'std': .* are mean, sd, classifier",
    ),
    "mean": (lambda _: room.backbone(nn.Flatten(), mean="a"), "mean='a' is given, wanted one number or 3"),
    "augment": (
        lambda _: room.features(room.backbone(nn.Flatten(), size=4), DATA, augment="crop"),
        r"augment='crop' is given, wanted Views\(\), or None",
    ),
    "area": (lambda _: room.Views(area=0.5), "area=0.5 is given, wanted two shares"),
    "flip": (lambda _: room.Views(flip="a"), "flip='a' is given, wanted a probability"),
    "save to a folder": (saved, "is a folder: give the name of a file, such as .*kept.safetensors"),
    "tuple": (lambda _: trained(data=(UNIT, CLASSES)), "observed is a tuple: give a dict from names to arrays"),
    "tuple for pairs": (lambda _: room.pairs((UNIT, CLASSES), 3), "observed is a tuple: give a dict"),
    "tuple for matchable": (lambda _: room.matchable((UNIT, CLASSES)), "observed is a tuple: give a dict"),
    "candidates": (lambda _: room.candidates(DATA, 3, candidates=2.5), "candidates=2.5: give 2 or more"),
    "size": (lambda _: room.batches(DATA, 3, size="a"), "size='a': the images of a batch"),
    "embed complex": (lambda _: trained().embed(UNIT.astype(complex)), "x has dtype torch.complex128"),
    "image": (lambda _: room.pairs(DATA, 3, image="foo"), "the data have no images 'foo', only y, x: name them with"),
    "embed Data": (
        lambda _: trained().embed(DATA),
        r"x is a Data: this representation takes .*\(n, 1, 4, 4\)",
    ),
    "embed dict": (lambda _: trained().embed({"x": UNIT}), "x is a dict: this representation takes"),
    "embed None": (lambda _: trained().embed(None), "x is a NoneType: this representation takes"),
    "embed str": (lambda _: trained().embed("x"), "x is a str: this representation takes"),
    "embed strings": (lambda _: trained().embed(np.array(["x"])), "x is a ndarray: this representation takes"),
    "model, shape": (lambda _: pair().embed(torch.zeros(2, 4)), r"x has shape \(2, 4\): this model takes \(n, 3\)"),
    "model, one row": (lambda _: pair().uncertainty(torch.zeros(3)), r"x has shape \(3,\): this model takes \(n, 3\)"),
    "model, NaN": (lambda _: pair().embed(torch.full((2, 3), float("nan"))), "x has values that are not finite"),
    "order of one": (
        lambda _: trained("loss-prediction", batch_size=1),
        "batch_size=1: pairs are put in order",
    ),
    "steps": (lambda _: trained(steps=2.5), "steps=2.5: give a whole number above 0"),
    "batch_size": (lambda _: trained(batch_size="8"), "batch_size='8': give a whole number above 0"),
    "lr": (lambda _: trained(lr="fast"), "lr='fast': give a number above 0"),
    "width": (lambda _: trained(width=2.5), "latents=16, width=2.5: give whole numbers"),
    "classes": (
        lambda _: trained("elk", classes=3),
        "elk takes no argument 'classes', which are those of the data; its own arguments are: start, widths",
    ),
    "encoder": (
        lambda _: trained("elk", encoder="mlp"),
        "elk takes no argument 'encoder', which is made of trunk= and backbone=; its own arguments are",
    ),
    "fractions": (lambda _: trained(data={"x": UNIT, "y": CLASSES + 0.5}), r"y has the label 0\.5: give one whole"),
    "encoder of one part": (
        lambda _: cal.models.create("pair", shape=[3], encoder={"direction": "mlp"}),
        r"\{'direction': network, 'concentration': network\} for two",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sentence_says_what_to_give(name, tmp_path):
    call, message = REFUSED[name]
    with pytest.raises(CalibrantError, match=message) as caught:
        call(tmp_path)
    assert str(caught.value).count(". ") == 0


def features(path, **arguments):
    return room.features(room.backbone(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), size=4), DATA, path, **arguments)


def test_a_damaged_file_of_features_is_replaced_if_asked(tmp_path):
    file = tmp_path / "f.h5"
    features(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CalibrantError, match=r"f\.h5 is damaged or no file of features"):
        features(file)
    written = features(file, overwrite=True)
    kept = room.read_features(file)
    assert torch.equal(kept.values("x"), written.values("x"))
    assert kept.values("y").tolist() == CLASSES.tolist()


def test_a_file_without_features_is_refused(tmp_path):
    features(tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5", "a") as file:
        del file["x"]
    with pytest.raises(CalibrantError, match=r"f\.h5 is damaged: it has no x; delete it"):
        room.read_features(tmp_path / "f.h5")
    assert features(tmp_path / "f.h5", overwrite=True).values("x").shape == (60, 2)


def test_a_batch_of_one_whose_loss_is_not_finite_names_its_datum():
    data = Data({"y": CLASSES}, {"x": UNIT, "loss": np.full(60, 1e30, np.float32)})
    with pytest.raises(cal.errors.NonFiniteLoss) as caught:
        trained("loss-prediction", data, form="value", batch_size=1)
    assert len(caught.value.batch) == 1
