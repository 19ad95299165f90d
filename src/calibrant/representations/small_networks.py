"""A small network that is trained on the spot, for features without a network that others have trained."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibrant.data.dataset import Data
from calibrant.errors import RepresentationError
from calibrant.program.environment import seeded
from calibrant.progress import Progress, reporting
from calibrant.representations.backbones import CHANNELS, Backbone, resized
from calibrant.representations.learners.labelled import floating
from calibrant.representations.views import Views
from calibrant.streams import stream

NAME = "small network trained on the spot"
MOST = 20_000  # images that are used, chosen at random of larger data sets, so that they fit into the memory
_BLOCK = 256  # images that are read at a time
_MEAN, _SD = 0.5, 0.25  # of the input transform
_VIEWS = Views(area=(0.4, 1.0), jitter=0.2)


def small_network(
    data: Data,
    seed: int = 0,
    steps: int = 400,
    size: int = 32,
    features: int = 128,
    batch_size: int = 64,
    lr: float = 3e-3,
    fine_tuned: bool = False,
    progress: Progress | bool = True,
) -> Backbone:
    """A small convolutional network, trained now as a classifier of labelled images: a backbone without downloads.

    It is no match for a network that was trained on ImageNet: it knows the given images and their classes alone. Four
    convolutions of 3×3 with stride 2 and batch norm end in features that are averaged over places; a linear layer on
    them is trained by the cross-entropy with Adam, with cosine decay, on mirrored and cropped images. The result is
    called "small network trained on the spot".

    Args:
        data: images `x`, `(1 or 3, height, width)` in [0, 1], or whole numbers from 0 to 255, with their classes `y`,
            whole numbers from 0.
        seed: random seed for the initial weights, the minibatches and the views.
        steps: number of training steps. 400 steps take about 15 s of one core.
        size: side, in pixels, to which images are resized.
        features: number of features.
        batch_size: number of images in each step.
        lr: peak learning rate.
        fine_tuned: whether the weights are trained further with what is built on the features.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Raises:
        RepresentationError: for data without images `x` and classes `y`, images out of range, or a single class.
    """
    progress = reporting(progress)
    if features < 4:
        raise RepresentationError(f"features={features} is given, wanted 4 or more")
    if not {"x", "y"} <= set(data.keys()):
        raise RepresentationError(
            f"small_network needs images x and their classes y, and the data have {', '.join(data.keys())}: rename "
            "them with Data.select"
        )
    images, y = _read(data, seed, size)
    with seeded(stream(seed, "small_network", "weights")):
        network, classifier = _layers(features), nn.Linear(features, int(y.max()) + 1)
    optimizer = torch.optim.Adam([*network.parameters(), *classifier.parameters()], lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    rng = np.random.default_rng(stream(seed, "small_network", "minibatches"))
    for step in range(steps):
        rows = torch.from_numpy(rng.integers(len(y), size=batch_size))
        views = _VIEWS(images[rows].float() / 255, rows.tolist(), step, seed)
        loss = F.cross_entropy(classifier(network((views - _MEAN) / _SD)), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress("small network", step + 1, steps, f"cross-entropy {float(loss.detach()):.3f} nats")
    return Backbone(network, NAME, size, _MEAN, _SD, fine_tuned, classifier)


def _read(data: Data, seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Images of 8 bits in the size of the network, `(n, 3, size, size)`, and their classes `(n,)`."""
    rows = np.arange(len(data))
    if len(rows) > MOST:
        rows = np.random.default_rng(stream(seed, "small_network", "images")).choice(rows, MOST, replace=False)
    images, labels = [], []
    data = data.split_keys({"y"}, set(data.keys()) - {"y"})  # covariates keep their dtype
    for block in np.array_split(rows, -(-len(rows) // _BLOCK)):
        observed, covariates = data.batch(block)
        values = {**observed, **covariates}
        x = resized(_in_range(floating(values["x"])).expand(-1, CHANNELS, -1, -1), size)
        images.append((255 * x.clamp(0, 1)).round().to(torch.uint8))
        labels.append(values["y"])
    y = torch.cat(labels)
    if y.ndim != 1 or bool((y != y.round()).any()) or bool((y < 0).any()):
        raise RepresentationError("small_network needs one class for every image, y = 0, 1, …: make whole numbers of y")
    if len(y.unique()) < 2:
        raise RepresentationError(f"all images have the class {int(y[0])}: small_network needs two classes or more")
    return torch.cat(images), y.long()


def _in_range(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1] not in (1, CHANNELS):
        raise RepresentationError(f"x has shape {tuple(images.shape)}: give images (n, 1 or 3, height, width)")
    if bool((images.min() < 0) | (images.max() > 1)):
        raise RepresentationError(
            f"x has values from {float(images.min()):.3g} to {float(images.max()):.3g}: give images in [0, 1], such as "
            "those of values='unit'"
        )
    return images


def _layers(features: int) -> nn.Sequential:
    """Four convolutions, each with half the side of the one before, and the average over places."""
    widths = [CHANNELS, features // 4, features // 2, features, features]
    blocks = [
        layer
        for before, after in pairwise(widths)
        for layer in (nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
