"""Photographs in folders by class: which are read, what is cut out of them, and how classes are split."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import SMALL, good
from PIL import Image

from calibrant.data import list_data, load
from calibrant.errors import DataError


def write_photographs(
    folder: Path, classes: dict[str, int], ending: str = "jpg", sides: tuple[int, int] = (40, 30)
) -> None:
    """Photographs of one colour, which tells their number, with white bars at the left and right of the middle."""
    for name, count in classes.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = Image.new("RGB", sides, (255, 255, 255))
            middle = min(sides)
            left, top = (sides[0] - middle) // 2, (sides[1] - middle) // 2
            image.paste((10 * number, 100, 200 - 10 * number), (left, top, left + middle, top + middle))
            image.save(folder / name / f"image_{number:04d}.{ending}", quality=95)


def rows(data):
    return data.split_keys(["x"], ["y"]).tensors()


# -- any folder --------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_its_path(tmp_path):
    write_photographs(tmp_path / "pets", {"cat": 10}, "png")
    write_photographs(tmp_path / "pets", {"dog": 10}, "JPEG", (30, 50))
    (tmp_path / "pets/cat/notes.txt").write_text("no image")
    (tmp_path / "pets/cat/._image_0001.png").write_text("no image")
    (tmp_path / "pets/read me.jpg").write_text("of no class")
    splits = load(tmp_path / "pets", size=6)
    assert {split: len(data) for split, data in splits.items()} == {"train": 16, "validation": 2, "test": 2}
    assert sorted(np.concatenate([data.labels() for data in splits.values()])) == list(range(20))
    for data in splits.values():
        observed, labels = rows(data)
        number = torch.tensor(data.labels() % 10).double()
        assert torch.allclose(255 * observed["x"][:, 0].double().mean((1, 2)), 10 * number, atol=4)  # no bars
        assert labels["y"].tolist() == (data.labels() // 10).tolist()
        assert data.coords["class"].tolist() == [["cat", "dog"][y] for y in labels["y"]]
    assert load(f"{tmp_path}/pets/", size=6, seed=0)["test"].labels().tolist() == splits["test"].labels().tolist()
    assert splits["test"].coords["file"][0] in {f"cat/image_{n:04d}.png" for n in range(10)}


def test_grey_and_transparent_pictures_have_three_channels(tmp_path):
    for n in range(10):
        (tmp_path / "p" / "a").mkdir(parents=True, exist_ok=True)
        Image.new(("L", "RGBA", "P", "1", "CMYK")[n % 5], (9, 9)).save(
            tmp_path / "p/a" / f"{n}.{'jpg' if n % 5 == 4 else 'png'}"
        )
    assert load(tmp_path / "p", size=4)["train"].tensors()[0]["x"].shape == (8, 3, 4, 4)


def test_test_classes_can_stand_apart(tmp_path):
    write_photographs(tmp_path, {"b": 10, "a": 12, "d": 4, "c": 5, "e": 10})
    splits = load(f"{tmp_path}/", size=4, classes="apart")
    assert {split: sorted(set(data.coords["class"])) for split, data in splits.items()} == {
        "train": ["a", "b", "c"],
        "validation": ["a", "b", "c"],
        "test": ["d", "e"],
    }
    assert {split: len(data) for split, data in splits.items()} == {"train": 22, "validation": 5, "test": 14}
    assert splits["validation"].coords["file"].tolist()[:2] == ["a/image_0002.jpg", "a/image_0007.jpg"]
    assert rows(splits["test"])[1]["y"].unique().tolist() == [3, 4]
    assert sorted(np.concatenate([data.labels() for data in splits.values()])) == list(range(41))
    for part, members in (("train", [0, 1, 2]), ("test", [3, 4])):
        found = load(f"{tmp_path}/", size=4, classes=part)
        assert all(set(rows(data)[1]["y"].tolist()) <= set(members) for data in found.values())
        assert sum(len(data) for data in found.values()) == (27 if part == "train" else 14)


def test_a_large_folder_takes_the_memory_of_one_batch(tmp_path):
    """400 photographs at 128 pixels are 79 MB as floats."""
    write_photographs(tmp_path, {"a": 200, "b": 200})
    load(f"{tmp_path}/", size=16)["train"].batch([0])  # imports
    tracemalloc.start()
    data = load(f"{tmp_path}/", size=128)["train"]
    for start in range(0, len(data), 16):
        data.batch(slice(start, start + 16))
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


REFUSED = {
    "absent": (lambda at: load(at / "nothing/"), "unknown data set"),
    "absent folder": (
        lambda at: load(f"{at}/nothing/"),
        "there is no folder .*nothing: give one that holds a folder of",
    ),
    "empty": (lambda at: load(f"{at}/empty/"), "empty holds no images: put them into one folder for each class"),
    "an option": (lambda at: load(at / "one", sise=3), "has no option 'sise': its options are size, values, classes"),
    "classes": (lambda at: load(at / "one", classes="some"), "classes='some' is given, wanted one of all, apart"),
    "one class": (lambda at: load(at / "one", classes="apart"), "classes='apart' needs two classes or more, and there"),
    "no size": (lambda at: load(at / "one", size=None), "size=None is given, but photographs differ in size"),
    "damaged": (lambda at: load(at / "bad"), r"bad/a/image_0000.jpg is missing or damaged: copy it again, or delete"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_to_do(tmp_path, call, message):
    (tmp_path / "empty").mkdir()
    write_photographs(tmp_path / "one", {"a": 12})
    write_photographs(tmp_path / "bad", {"a": 12})
    damaged = tmp_path / "bad/a/image_0000.jpg"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(DataError, match=message):
        call(tmp_path)


def test_a_registered_name_is_no_folder(tmp_path, monkeypatch):
    write_photographs(tmp_path / "digits", {"a": 12})
    monkeypatch.chdir(tmp_path)
    assert load("digits")["test"].name == "digits"
    assert len(load("digits/")["train"]) == 9


# -- Caltech-101 -------------------------------------------------------------------------------------------------------

NAMES = ["Faces", "accordion", "airplanes", "anchor"]


@pytest.mark.parametrize("folder", ["caltech101/101_ObjectCategories", "caltech-101-small"])
def test_caltech_101_of_both_layouts(tmp_path, folder):
    write_photographs(tmp_path / folder, dict.fromkeys([*NAMES, "BACKGROUND_Google"], 10))
    (card,) = list_data("caltech-101")
    assert card.state(tmp_path) == "ready"
    splits = load("caltech-101", root=tmp_path, size=8)
    assert {split: len(data) for split, data in splits.items()} == {"train": 16, "validation": 4, "test": 20}
    assert sorted(set(splits["test"].coords["class"])) == NAMES[2:]
    assert rows(splits["train"])[0]["x"].shape == (16, 3, 8, 8)
    assert rows(splits["test"])[1]["y"].unique().tolist() == [2, 3]
    assert {split: len(data) for split, data in load("caltech-101", root=tmp_path, classes="all").items()} == {
        "train": 32,
        "validation": 4,
        "test": 4,
    }


def test_the_download_of_caltech_101_is_torchvisions(tmp_path, monkeypatch):
    def download(self):
        write_photographs(Path(self.root) / "101_ObjectCategories", dict.fromkeys([*NAMES, "BACKGROUND_Google"], 10))

    monkeypatch.setattr("torchvision.datasets.Caltech101.download", download)
    monkeypatch.setattr("torchvision.datasets.Caltech101._check_integrity", lambda self: True)
    assert len(load("caltech-101", root=tmp_path, download=True)["test"]) == 20


# -- a sample of ImageNet ----------------------------------------------------------------------------------------------


def test_the_sample_of_imagenet_has_its_classes_in_its_file_names(tmp_path):
    folder = tmp_path / "imagenet-1000"
    folder.mkdir()
    image = Image.new("RGB", (4, 4))
    for n in range(1000):
        image.save(folder / f"n{n * 7 + 1440764:08d}_a_name.JPEG")
    splits = load("imagenet-1000", root=tmp_path, size=4)
    assert {split: len(data) for split, data in splits.items()} == {"train": 800, "validation": 100, "test": 100}
    assert all(torch.equal(rows(data)[1]["y"], torch.from_numpy(data.labels())) for data in splits.values())
    assert splits["train"].coords["class"][0] == "n01440764 a_name"
    (folder / f"n{1440764:08d}_a_name.JPEG").rename(folder / f"n{1440765:08d}.JPEG")
    with pytest.raises(DataError, match=r"holds 999 images nXXXXXXXX_name\.JPEG of 999 classes, wanted one for each"):
        load("imagenet-1000", root=tmp_path)


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_on_a_folder(tmp_path, monkeypatch, short_check):
    write_photographs(tmp_path / "pets", {"cat": 60, "dog": 60})
    monkeypatch.chdir(tmp_path)
    good("run", "ppca", "--data", "pets/", "--data-option", "size=2", "--set", "latents=2", *SMALL)
