"""Image sets that are read from small files of the published formats: Frey faces, Omniglot, CelebA."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from calibrant.data import load
from calibrant.errors import DataError


def x_of(data, dtype=torch.float64):
    return data.tensors(dtype=dtype)[0]["x"].numpy()


# -- Frey faces --------------------------------------------------------------------------------------------------------


def write_faces(root: Path, frames: int = 1965, dtype: type = np.uint8) -> np.ndarray:
    """Frames of noise; the first two pixels of each tell its number."""
    folder = root / "frey-face"
    folder.mkdir(parents=True, exist_ok=True)
    faces = np.random.default_rng(0).integers(0, 256, (frames, 560))
    faces[:, 0], faces[:, 1] = np.divmod(np.arange(frames), 256)
    savemat(folder / "frey_rawface.mat", {"ff": faces.T.astype(dtype)})
    return faces.reshape(frames, 28, 20)


def test_frey_faces_are_upright_and_held_out_frames_are_blocks_of_the_video(tmp_path):
    faces = write_faces(tmp_path)
    splits = load("frey-face", root=tmp_path)
    assert {split: len(data) for split, data in splits.items()} == {"train": 1575, "validation": 195, "test": 195}
    assert sorted(np.concatenate([data.labels() for data in splits.values()])) == list(range(1965))
    for data in splits.values():
        assert np.allclose(255 * x_of(data)[:, 0], faces[data.labels()], atol=1e-4)
    for split in ("validation", "test"):
        jumps = np.diff(splits[split].labels())
        assert (jumps > 1).sum() == 4  # five blocks
        assert set(jumps) == {1, 393 - 38}
    assert np.array_equal(load("frey-face", root=tmp_path, seed=5)["test"].labels(), splits["test"].labels())


def test_a_file_that_holds_no_frey_faces_is_refused(tmp_path):
    with pytest.raises(DataError, match=f"there is no frey_rawface.mat in {tmp_path}/frey-face, and no automatic"):
        load("frey-face", root=tmp_path, download=True)
    for frames, dtype in ((12, np.uint8), (1965, np.float64)):
        write_faces(tmp_path, frames, dtype)
        with pytest.raises(DataError, match=r"frey_rawface\.mat holds an array .* copy it again"):
            load("frey-face", root=tmp_path)
    (tmp_path / "frey-face/frey_rawface.mat").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"frey_rawface\.mat cannot be read as the Frey faces: copy"):
        load("frey-face", root=tmp_path)


# -- Omniglot ----------------------------------------------------------------------------------------------------------


def write_drawings(folder: Path, alphabets: list[str], characters: int = 2, drawings: int = 10) -> None:
    """Black strokes on white, 105×105, of one bit, as published: a bar whose place tells the drawing."""
    for alphabet in alphabets:
        for character in range(1, characters + 1):
            at = folder / alphabet / f"character{character:02d}"
            at.mkdir(parents=True)
            for number in range(drawings):
                ink = np.ones((105, 105), bool)
                ink[10 * number : 10 * number + 5, 20 * character : 20 * character + 20] = False
                Image.fromarray(ink).save(at / f"{alphabet}{character:02d}_{number + 1:02d}.png")


def test_omniglot_of_every_layout(tmp_path):
    folder = tmp_path / "omniglot"
    write_drawings(folder / "omniglot-py/images_background", ["Greek", "Latin"])
    write_drawings(folder / "images_background_small1/images_background_small1", ["Greek"])  # the same drawings again
    run = folder / "all_runs/run01/training"
    run.mkdir(parents=True)
    Image.fromarray(np.zeros((105, 105), bool)).save(run / "class01.png")  # of no known character
    splits = load("omniglot", root=tmp_path)
    assert {split: len(data) for split, data in splits.items()} == {"train": 32, "validation": 4, "test": 4}
    for data in splits.values():
        observed = data.tensors()[0]
        assert np.bincount(observed["y"].int()).tolist() == [len(data) // 4] * 4
        assert observed["x"].shape == (len(data), 1, 28, 28)
    whole = load("omniglot", root=tmp_path, size=None)["train"].tensors()[0]
    assert whole["x"].shape == (32, 1, 105, 105)
    assert set(whole["x"].unique().tolist()) == {0, 1}
    assert (whole["x"].sum((1, 2, 3)) == 100).all()  # strokes are bright
    columns = whole["x"].amax((1, 2)).argmax(1)
    assert torch.equal(columns.float(), 20 + 20 * (whole["y"] % 2))


def test_alphabets_of_omniglot_can_be_held_out(tmp_path):
    alphabets = [f"Alphabet_{n}" for n in range(8)]
    write_drawings(tmp_path / "omniglot", alphabets, drawings=3)
    splits = load("omniglot", root=tmp_path, held_out="alphabets", seed=1)
    held = {split: set(data.coords["alphabet"]) for split, data in splits.items()}
    assert {split: len(names) for split, names in held.items()} == {"train": 5, "validation": 1, "test": 2}
    assert set.union(*held.values()) == set(alphabets)
    for data in splits.values():
        y = data.split_keys(["x"], ["y"]).tensors()[1]["y"]
        assert [alphabets[n // 2] for n in y] == data.coords["alphabet"].tolist()
        assert np.bincount(y)[y.unique()].tolist() == [3] * len(y.unique())
    again, other = (load("omniglot", root=tmp_path, held_out="alphabets", seed=seed)["test"] for seed in (1, 2))
    assert again.labels().tolist() == splits["test"].labels().tolist() != other.labels().tolist()
    with pytest.raises(DataError, match="held_out='letters' is given, wanted one of drawings, alphabets"):
        load("omniglot", root=tmp_path, held_out="letters")
    write_drawings(tmp_path / "few/omniglot", ["Greek", "Latin"])
    with pytest.raises(DataError, match="held_out='alphabets' needs 3 alphabets or more, and there are 2"):
        load("omniglot", root=tmp_path / "few", held_out="alphabets")


def test_omniglot_says_where_its_files_belong(tmp_path):
    (tmp_path / "omniglot").mkdir()
    with pytest.raises(DataError, match=f"omniglot: there is no ALPHABET/characterNN/NAME.png below {tmp_path}"):
        load("omniglot", root=tmp_path)
    write_drawings(tmp_path / "omniglot", ["Greek"])
    path = tmp_path / "omniglot/Greek/character01/Greek01_01.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"omniglot: .*Greek01_01\.png cannot be read: unpack it again"):
        load("omniglot", root=tmp_path)


def test_the_download_of_omniglot_has_both_parts(tmp_path, monkeypatch):
    asked = []

    def download(self):
        asked.append((str(self.root), self.background))
        write_drawings(Path(self.root) / self._get_target_folder(), ["Greek" if self.background else "Tengwar"])

    monkeypatch.setattr("torchvision.datasets.Omniglot.download", download)
    monkeypatch.setattr("torchvision.datasets.Omniglot._check_integrity", lambda self: True)
    splits = load("omniglot", root=tmp_path, download=True)
    assert asked == [(str(tmp_path / "omniglot/omniglot-py"), background) for background in (True, False)]
    assert sum(map(len, splits.values())) == 40


# -- CelebA ------------------------------------------------------------------------------------------------------------


def write_photographs(root: Path, sides: tuple[int, int] = (178, 218)) -> None:
    """Photographs of one colour with a dark frame, 10 for training, 3 for validation, 2 for the test."""
    folder = root / "celeba/img_align_celeba"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(15):
        image = Image.new("RGB", sides)
        image.paste((10 * number, 200 - 10 * number, 100), (15, 35, sides[0] - 15, sides[1] - 35))
        image.save(folder / f"{number + 1:06d}.jpg", quality=95)
        lines.append(f"{number + 1:06d}.jpg {0 if number < 10 else 1 if number < 13 else 2}\n")
    (root / "celeba/list_eval_partition.txt").write_text("".join(lines))


def test_celeba_reads_the_middle_of_each_photograph_when_it_is_needed(tmp_path):
    write_photographs(tmp_path)
    splits = load("celeba", root=tmp_path)
    assert {split: len(data) for split, data in splits.items()} == {"train": 10, "validation": 3, "test": 2}
    (tmp_path / "celeba/img_align_celeba/000012.jpg").unlink()
    observed, covariates = splits["validation"].batch([0, 2], dtype=torch.float64)
    assert not covariates
    assert observed["x"].shape == (2, 3, 64, 64)
    wanted = torch.tensor([[100, 100, 100], [120, 80, 100]]) / 255
    assert (observed["x"] - wanted[:, :, None, None]).abs().mean() < 0.01
    assert observed["x"].min() > 0.2  # nothing of the frame
    with pytest.raises(DataError, match=r"000012\.jpg is missing or damaged: copy it again"):
        splits["validation"].batch([1])


def test_the_crop_and_the_values_of_celeba(tmp_path):
    write_photographs(tmp_path)
    assert x_of(load("celeba", root=tmp_path, size=28, crop=148)["test"]).min() > 0.2
    framed = x_of(load("celeba", root=tmp_path, size=None, crop=178)["test"])
    assert framed.shape == (2, 3, 178, 178)
    assert framed[..., :10, :].max() < 0.05
    ones = x_of(load("celeba", root=tmp_path, size=28, values="binarised")["test"])
    assert set(np.unique(ones)) == {0, 1}
    for crop in (0, 179, "148"):
        with pytest.raises(DataError, match=r"celeba: crop=.* is given, wanted a number of pixels from 1 to 178"):
            load("celeba", root=tmp_path, crop=crop)


def test_celeba_says_which_files_are_wrong(tmp_path):
    with pytest.raises(DataError, match=f"celeba: no complete copy in {tmp_path}/celeba: pass download=True"):
        load("celeba", root=tmp_path)
    write_photographs(tmp_path, sides=(64, 64))
    with pytest.raises(DataError, match=r"000001\.jpg has \(64, 64\) pixels, not \(218, 178\)"):
        load("celeba", root=tmp_path)
    (tmp_path / "celeba/list_eval_partition.txt").write_text("000001.jpg\n")
    with pytest.raises(DataError, match=r"list_eval_partition\.txt does not hold lines such as"):
        load("celeba", root=tmp_path)


def test_a_failed_download_of_celeba_is_a_data_error(tmp_path, monkeypatch):
    def unreachable(self):
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.CelebA.download", unreachable)
    with pytest.raises(DataError, match=r"celeba: the download to .* failed: network is unreachable"):
        load("celeba", root=tmp_path, download=True)


# -- MedMNIST ----------------------------------------------------------------------------------------------------------


def write_med_mnist(path: Path, labels: int) -> dict[str, np.ndarray]:
    """A file as MedMNIST publishes it: 8-bit images and labels of three splits, the labels in columns."""
    arrays = {}
    for number, (part, count) in enumerate({"train": 12, "val": 3, "test": 5}.items()):
        arrays[f"{part}_images"] = np.full((count, 28, 28), 10 * number, np.uint8)
        arrays[f"{part}_labels"] = np.arange(count * labels, dtype=np.uint8).reshape(count, labels) % 2
    path.parent.mkdir()
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize(("name", "labels"), [("pneumonia-mnist", 1), ("chest-mnist", 14)])
def test_chest_x_rays_keep_the_published_splits(tmp_path, name, labels):
    arrays = write_med_mnist(tmp_path / name / "published.npz", labels)
    splits = load(name, root=tmp_path, size=14)
    for split, part in (("train", "train"), ("validation", "val"), ("test", "test")):
        observed = splits[split].tensors()[0]
        assert observed["x"].shape == (len(arrays[f"{part}_images"]), 1, 14, 14)
        assert observed["x"].unique().numpy() == pytest.approx(arrays[f"{part}_images"].flat[0] / 255)
        assert (observed["y"].numpy().reshape(-1, labels) == arrays[f"{part}_labels"]).all()


def test_chest_x_rays_say_which_file_is_wanted(tmp_path):
    (tmp_path / "chest-mnist").mkdir()
    with pytest.raises(DataError, match=r"holds 0 \.npz files, wanted the one that MedMNIST publishes"):
        load("chest-mnist", root=tmp_path)
    np.savez(tmp_path / "chest-mnist/other.npz", train_images=np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(DataError, match="lacks the array train_labels"):
        load("chest-mnist", root=tmp_path)
