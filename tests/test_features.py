"""Cached features: what a file is of, what comes back, what interruption leaves; and the views of images."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from agreement import limit
from pyro.nn import PyroModule
from torch import Tensor, nn

import calibrant as cal
from calibrant.data import Data
from calibrant.errors import RepresentationError
from calibrant.representations import Backbone, Views, backbone, features


def network(channels: int = 5, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return backbone(nn.Sequential(nn.Conv2d(3, channels, 3, 2), nn.BatchNorm2d(channels), nn.ReLU()), mean=0.5)


def images(size: int = 20, seed: int = 0) -> Data:
    rng = np.random.default_rng(seed)
    x = rng.random((size, 3, 12, 12), dtype=np.float32)
    seen = np.arange(size) % 2 == 0
    return Data({"x": x, "y": np.arange(size) % 4}, {"seen": seen}, {"name": np.arange(size) * 10})


def x_of(data: Data) -> Tensor:
    return data.tensors()[0]["x"]


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_file", [False, True])
def test_features_stand_beside_labels_and_coordinates(tmp_path, in_file):
    made, data = network(), images().subset([3, 1, 7, 12, 18])
    found = features(made, data, tmp_path / "new/f.h5" if in_file else None, batch_size=2, dtype=torch.float32)
    assert (found.observed_names, found.covariate_names) == (("x", "y"), ("seen",))
    assert found.labels().tolist() == [3, 1, 7, 12, 18]
    assert found.coords["name"].tolist() == [30, 10, 70, 120, 180]
    with torch.no_grad():
        assert torch.allclose(x_of(found), made(x_of(data)), atol=1e-6)
    kept = found.split_keys(["x"], ["y", "seen"]).tensors()[1]
    assert kept["y"].tolist() == [3, 1, 3, 0, 2]
    assert (kept["y"].dtype, kept["seen"].dtype) == (torch.int64, torch.bool)


def test_half_precision_changes_a_feature_by_its_rounding_alone(tmp_path):
    exact, half = (features(network(), images(), dtype=dtype) for dtype in (torch.float32, torch.float16))
    error = (x_of(half) - x_of(exact)).abs()
    assert bool((error <= x_of(exact).abs() / 2048 + 2.0**-25).all())
    assert error.max() > 0


def test_views_of_an_image_follow_one_another(tmp_path):
    made, data, views = network(), images(6), Views()
    found = features(made, data, tmp_path / "f.h5", 3, views, seed=4, dtype=torch.float32, batch_size=4)
    assert len(found) == 18
    assert found.labels().tolist() == list(range(18))
    assert found.coords["image"].tolist() == np.repeat(np.arange(6), 3).tolist()
    assert found.coords["view"].tolist() == [0, 1, 2] * 6
    assert found.coords["name"].tolist() == np.repeat(10 * np.arange(6), 3).tolist()
    with torch.no_grad():
        second = made(views(x_of(data), data.labels(), 1, seed=4))
    assert torch.allclose(x_of(found)[1::3], second, atol=1e-6)
    assert torch.equal(found.tensors()[0]["y"], data.tensors()[0]["y"].repeat_interleave(3))


# -- one file ----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the images that it has seen."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return x.mean((2, 3))


def test_a_second_call_reads_the_file(tmp_path):
    made, data = backbone(Counting()), images()
    made.network.seen = 0
    first = features(made, data, tmp_path / "f.h5")
    assert made.network.seen == 20
    again = features(made, data, str(tmp_path / "f.h5"))
    assert made.network.seen == 20
    assert torch.equal(x_of(first), x_of(again))
    assert first.fingerprint() == again.fingerprint()
    assert isinstance(again._source["x"], np.memmap)  # on the disk, not in memory


def test_the_file_is_open_to_others(tmp_path):
    found = features(network(), images(), tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5") as file:
        assert (file["x"].dtype, file["x"].shape) == (np.float16, (20, 5))
        assert torch.equal(torch.from_numpy(file["x"][:]).float(), x_of(found))
        assert file["y"][:].tolist() == (np.arange(20) % 4).tolist()


def changed_transform() -> Data:
    data = images()
    data.transform = lambda batch: {**batch, "x": batch["x"] / 2}
    return data


OTHERS = {
    "weights": ({"backbone": lambda: network(seed=1)}, "the weights or the input transform of the backbone:"),
    "transform": ({"backbone": lambda: backbone(network().network)}, "the weights or the input transform of the"),
    "data": ({"data": lambda: images(seed=1)}, "features that differ in the data:"),
    "some data": ({"data": lambda: images()[:10]}, "features that differ in the data:"),
    "values": ({"data": changed_transform}, "features that differ in the data:"),
    "views": ({"views": 3}, r"the number of views \(2 in the file, 3 asked for\)"),
    "augmentation": ({"augment": Views(flip=0.1)}, r"the augmentation \(Views\(.*\) in the file, Views\(.*flip=0.1"),
    "seed": ({"seed": 1}, r"the seed \(0 in the file, 1 asked for\): give another file=, or overwrite=True"),
    "dtype": ({"dtype": torch.float32}, r"the dtype \(float16 in the file, float32 asked for\)"),
    "two": ({"dtype": torch.float32, "seed": 1}, r"the seed .* and the dtype .*: give another file"),
}


@pytest.mark.parametrize(("change", "message"), OTHERS.values(), ids=OTHERS)
def test_a_file_of_other_features_is_refused_and_replaced_on_request(tmp_path, change, message):
    file = tmp_path / "f.h5"
    asked = {"backbone": network(), "data": images(), "views": 2, "augment": Views()}
    features(**asked, file=file)
    before = file.read_bytes()
    asked |= {name: value() if name in ("backbone", "data") else value for name, value in change.items()}
    with pytest.raises(RepresentationError, match=message):
        features(**asked, file=file)
    assert file.read_bytes() == before
    replaced = features(**asked, file=file, overwrite=True)
    assert torch.equal(x_of(replaced), x_of(features(**asked)))
    assert torch.equal(x_of(features(**asked, file=file)), x_of(replaced))


def interrupt(stage: str, done: int, total: int, text: str = "") -> None:
    if done >= 10:
        raise KeyboardInterrupt


def test_interrupted_writing_is_continued_and_leaves_nothing_half(tmp_path):
    made, file = backbone(Counting()), tmp_path / "f.h5"
    asked = {"data": images(), "views": 2, "augment": Views(), "batch_size": 5}
    with pytest.raises(KeyboardInterrupt):
        features(made, **asked, file=file, progress=interrupt)
    assert os.listdir(tmp_path) == [".f.h5.part"]
    made.network.seen = 0
    found = features(made, **asked, file=file)
    assert made.network.seen == 20  # two views of the ten images that were left
    assert os.listdir(tmp_path) == ["f.h5"]
    assert torch.equal(x_of(found), x_of(features(made, **asked)))


def test_what_is_left_of_other_features_is_not_continued(tmp_path):
    file = tmp_path / "f.h5"
    features(network(), images(), file)
    before = file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        features(network(seed=1), images(), file, overwrite=True, batch_size=5, progress=interrupt)
    assert file.read_bytes() == before
    other = features(network(seed=2), images(), file, overwrite=True)
    assert torch.equal(x_of(other), x_of(features(network(seed=2), images())))
    (tmp_path / ".g.h5.part").write_bytes(b"damaged")
    assert torch.equal(x_of(features(network(), images(), tmp_path / "g.h5")), x_of(features(network(), images())))
    with pytest.raises(RepresentationError, match="cannot hold"):
        features(backbone(network().network, sd=1e-8), images(), tmp_path / "h.h5")
    assert sorted(os.listdir(tmp_path)) == ["f.h5", "g.h5"]


@pytest.mark.slow
def test_a_killed_process_leaves_what_can_be_continued(tmp_path):
    code = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from test_features import features, images, network
kill = lambda stage, done, total, text="": os._exit(9) if done >= 128 else None
features(network(), images(200), {str(tmp_path / "f.h5")!r}, batch_size=1, progress=kill)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert os.listdir(tmp_path) == [".f.h5.part"]
    seen: list[int] = []
    found = features(network(), images(200), tmp_path / "f.h5", batch_size=1, progress=lambda s, n, *_: seen.append(n))
    assert seen == list(range(129, 201))
    assert torch.allclose(x_of(found), x_of(features(network(), images(200))), atol=1e-3)


def test_two_processes_do_not_write_one_file(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with pytest.raises(KeyboardInterrupt):
        features(network(), images(), tmp_path / "f.h5", batch_size=5, progress=interrupt)
    with (tmp_path / ".f.h5.part").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does while a process writes
        with pytest.raises(RepresentationError, match=r"another process is writing .*part: wait until it has finished"):
            features(network(), images(), tmp_path / "f.h5")
    assert len(features(network(), images(), tmp_path / "f.h5")) == 20


def test_files_of_anything_else_are_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with h5py.File(tmp_path / "mine.h5", "w") as file:
        file["x"] = np.zeros(3)
    features(network(), images(), tmp_path / "cut.h5")
    (tmp_path / "cut.h5").write_bytes((tmp_path / "cut.h5").read_bytes()[:100])
    for name, said in (("notes.txt", "is damaged or no file"), ("mine.h5", "is no file"), ("cut.h5", "is damaged")):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(RepresentationError, match=f"{name} {said}"):
            features(network(), images(), tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_bytes() == before


REFUSED = {
    "no images": ({"data": Data({"z": np.zeros((3, 2))})}, "the data have no images x, only z: rename them with"),
    "splits": ({"data": {"train": images()}}, r"got a dict as its data: give a Data, such as one split, load\(NAME\)"),
    "a module": ({"backbone": nn.Flatten()}, "got a Flatten as its backbone: give cal.representations.backbone"),
    "equal views": ({"views": 2}, r"views=2 without augment= would be 2 equal views: add augment=Views\(\)"),
    "no view": ({"views": 0}, "views=0, batch_size=16: give a positive number"),
    "a dtype": ({"dtype": torch.int8}, "dtype=torch.int8 is given, wanted torch.float16 or torch.float32"),
    "values": ({"data": Data({"x": 255 * np.ones((3, 1, 8, 8))}, name="grey")}, "grey: x has values from 255 to 255"),
    "large features": ({"backbone": backbone(network().network, sd=1e-8)}, "which float16 cannot hold: use dtype="),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_to_do(change, message):
    with pytest.raises(RepresentationError, match=message):
        features(**{"backbone": network(), "data": images(), **change})


# -- heads -------------------------------------------------------------------------------------------------------------


class Classes(PyroModule):
    """z ~ Normal(a(features), 1), y ~ Categorical(b(z)); `encoder` makes the features."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encoder, self.loc, self.logits = encoder, nn.Linear(width, 2), nn.Linear(2, 4)

    def forward(self, size: int, x: Tensor) -> Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(self.loc(self.encoder(x)), 1.0).to_event(1))
            return pyro.sample("y", dist.Categorical(logits=self.logits(z)))


class Given(PyroModule):
    """q(z | y): a Normal for every class."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(4, 2))

    def forward(self, observed: dict[str, Tensor], size: int, x: Tensor) -> None:
        with pyro.plate("data", size):
            pyro.sample("z", dist.Normal(self.table[observed["y"].long()], 1.0).to_event(1))


def head(encoder: nn.Module, width: int, data: Data) -> Tensor:
    """All weights of a head after 40 steps."""
    model = Classes(encoder, width)
    own = [weight for part in (model.loc, model.logits) for weight in part.parameters()]
    cal.inference.fit(model, Given(), data.split_keys(["y"], ["x"]), epochs=10, batch_size=16, lr=0.03, seed=2)
    return torch.cat([weight.detach().flatten() for weight in own])


def test_heads_on_cached_features_are_heads_through_the_backbone():
    """To the rounding of float32, or of float16; features of another backbone give another head."""
    made, data = network(), images(64).select(["x", "y"])
    through = head(made, made.features, data)
    exact, half, planted = (
        (head(nn.Identity(), made.features, found) - through).abs().max()
        for found in (
            features(made, data, dtype=torch.float32),
            features(made, data, dtype=torch.float16),
            features(network(seed=1), data, dtype=torch.float32),
        )
    )
    assert exact < 1e-4
    assert half < 2e-3
    assert planted > 0.02


# -- views -------------------------------------------------------------------------------------------------------------


def test_a_view_follows_from_seed_image_and_number_alone():
    x = torch.rand(4, 3, 16, 16)
    labels = [5, 6, 7, 8]
    views = Views()
    found = views(x, labels, 2, seed=1)
    assert found.shape == x.shape
    assert bool(((found >= 0) & (found <= 1)).all())
    assert torch.equal(views(x[[2]], [7], 2, seed=1), found[[2]])
    same = x[:1].expand(4, -1, -1, -1)
    apart = [views(same, labels, 0), views(same, labels, 1), views(same, labels, 0, seed=1)]
    assert len({image.numpy().tobytes() for batch in apart for image in batch}) == 12


def test_without_changes_the_image_is_returned():
    x = torch.rand(3, 3, 9, 13)
    assert torch.equal(Views(area=(1, 1), flip=0, jitter=0)(x, [0, 1, 2], 0), x)
    assert torch.equal(Views(area=(1, 1), flip=1, jitter=0)(x, [0, 1, 2], 0), x.flip(3))


def test_crops_flips_and_colours_are_drawn_as_they_say():
    """Against moments that are known, each beside a planted one; crops of a ramp tell their own place and width."""
    n = 1500
    limit_of_z = limit(4)
    ramp = torch.linspace(0, 1, 64).expand(n, 3, 64, 64)
    flips = Views(area=(1, 1), flip=0.3, jitter=0)(ramp, range(n), 0)
    share = (flips[:, 0, 0, 0] > 0.5).double()
    assert abs(share.mean() - 0.3) / (0.21 / n) ** 0.5 < limit_of_z
    assert abs(share.mean() - 0.5) / (0.25 / n) ** 0.5 > limit_of_z

    crops = Views(area=(0.25, 0.25), flip=0, jitter=0)(ramp, range(n), 0)[:, 0, 0]
    width = (crops[:, -1] - crops[:, 0]).double() * 63 / 63.5 * 1.0
    log_ratio = 2 * (width / 0.5).log()  # of width and height, at a quarter of the area
    assert abs(log_ratio.mean()) < limit_of_z * log_ratio.std() / n**0.5 + 0.03  # widths are whole pixels of 32
    assert abs(log_ratio.std() - np.log(4 / 3) / 3**0.5) < 0.02

    grey = torch.full((n, 3, 4, 4), 0.5)
    bright = Views(area=(1, 1), flip=0, jitter=0.4)(grey, range(n), 0)[:, 0, 0, 0].double() / 0.5
    assert abs(bright.mean() - 1) / (0.4 / 3**0.5 / n**0.5) < limit_of_z
    assert abs(bright.std() / (0.4 / 3**0.5) - 1) < 0.06
    assert bright.min() > 0.6 - 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"area": (0.0, 1.0)}, "wanted two shares of the image"),
        ({"area": (0.5, 0.2)}, "wanted two shares of the image"),
        ({"flip": 2.0}, "wanted a probability"),
        ({"jitter": -0.1}, "wanted a number from 0 to 1"),
    ],
)
def test_impossible_views_are_refused(change, message):
    with pytest.raises(RepresentationError, match=message):
        Views(**change)
