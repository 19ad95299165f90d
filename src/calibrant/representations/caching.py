"""Features of images, and of augmented views of them, computed once and kept in one file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import RepresentationError
from calibrant.folders.files import digest, new_file
from calibrant.folders.tensors import bytes_of
from calibrant.progress import Progress, reporting
from calibrant.representations.backbones import Backbone
from calibrant.representations.views import Views

FORMAT = "calibrant-features/1"
FEATURES = "x"  # the key of images, and of features
_DONE = "rows"  # attribute: number of rows that are written
_FLUSHED = 64  # batches after which a killed process loses nothing
_HEADER = 2**16  # bytes at the start of a file, with its format among them
_LOOKED_AT = 16  # images whose values are part of what a file is of
_SAID = {
    "backbone": "the weights or the input transform of the backbone",
    "data": "the data",
    "views": "the number of views",
    "augment": "the augmentation",
    "seed": "the seed",
    "dtype": "the dtype",
}


def features(
    backbone: Backbone,
    data: Data,
    file: str | Path | None = None,
    views: int = 1,
    augment: Views | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 16,
    overwrite: bool = False,
    progress: Progress | bool = True,
) -> Data:
    """Features of images, or of augmented views of them: computed once, kept in one HDF5 file, and read from there.

    Args:
        backbone: network from images to features.
        data: images `x`, `(channels, height, width)` in [0, 1], beside labels or other keys, which are kept.
        file: HDF5 file, which is written if it is not there, and read if it holds the features of the same weights,
            input transform, data, augmentation, seed and dtype. What an interrupted call has computed is continued by
            the next one. None keeps the features in memory.
        views: number of views of every image.
        augment: how views are made, such as `Views()`; None for the images as they are (one view).
        seed: random seed for the views.
        dtype: in which features are stored, float16 or float32. The error of float16 is at most 1/2048 of a value.
        batch_size: number of images that are in the network at a time.
        overwrite: whether a file of other features, or a damaged one, is replaced; files of
            anything else are not.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        The features as `x`, `(features,)`, which stay on the disk and are read batch by batch, with all other keys and
        coordinates of the data. With several views, the views of an image follow one another: `coords["image"]` is its
        label in the data, `coords["view"]` the number of the view, and `coords["data"]` counts the rows.

    Raises:
        RepresentationError: for a file of other features (the message says what differs), for several views without
            `augment`, for images outside [0, 1], or for features that float16 cannot hold.
    """
    progress = reporting(progress)
    _check_inputs(backbone, data)
    _check_options(views, augment, dtype, batch_size)
    about = {
        "backbone": backbone.digest(),
        "data": _identity(data),
        "views": str(views),
        "augment": repr(augment),
        "seed": str(seed if augment is not None else 0),
        "dtype": str(dtype).removeprefix("torch."),
    }
    work = _Work(backbone, data, views, augment, seed, dtype, batch_size, progress)
    if file is None:
        return work.labelled(work.in_memory())
    path = Path(file).expanduser()
    if path.exists() and _is_of(path, about, overwrite):
        try:
            return work.labelled(_read(path, data.keys()))
        except RepresentationError:
            if not overwrite:
                raise
    path.parent.mkdir(parents=True, exist_ok=True)
    work.write(path, about)
    return work.labelled(_read(path, data.keys()))


def read_features(file: str | Path) -> Data:
    """The features of a file that `features` wrote, whatever they are of.

    Args:
        file: the HDF5 file.

    Returns:
        The features as `x`, which stay on the disk, and all other keys as covariates.

    Raises:
        RepresentationError: for a file that is missing, damaged, or of something else.
    """
    path = Path(file).expanduser()
    _about(path)
    arrays = _read(path, [FEATURES])
    return Data({FEATURES: arrays.pop(FEATURES)}, arrays, name=path.stem)


@dataclass(frozen=True)
class _Work:
    """The rows of features of some data: computed block by block, and put beside their labels."""

    backbone: Backbone
    data: Data
    views: int
    augment: Views | None
    seed: int
    dtype: torch.dtype
    batch_size: int
    progress: Progress

    @property
    def rows(self) -> int:
        return len(self.data) * self.views

    def blocks(self, first: int = 0) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Rows of the result from a row on, with features `x` and the other keys, a batch of images at a time."""
        names = {*self.data.observed_names, *self.data.covariate_names}
        data = self.data.split_keys([FEATURES], names - {FEATURES})  # as covariates, labels keep their dtype
        for start in range(first // self.views, len(data), self.batch_size):
            stop = min(start + self.batch_size, len(data))
            images, labels = data.batch(slice(start, stop))
            found = {FEATURES: self._features(images[FEATURES], start)}
            found |= {key: value.repeat_interleave(self.views, 0) for key, value in labels.items()}
            yield slice(start * self.views, stop * self.views), found
            self.progress("features", stop, len(data))

    @torch.inference_mode()
    def _features(self, images: Tensor, start: int) -> Tensor:
        """Features of all views of some images, `(images × views, features)`, in the dtype in which they are stored."""
        if bool((images.min() < 0) | (images.max() > 1)):
            raise RepresentationError(
                f"{self.data.name or 'the data'}: x has values from {float(images.min()):.3g} to "
                f"{float(images.max()):.3g}: give images in [0, 1], such as those of values='unit'"
            )
        labels = self.data.labels()[start : start + len(images)]
        images = images.to(self.backbone.mean)
        found = torch.stack(
            [
                self.backbone(images if self.augment is None else self.augment(images, labels, view, self.seed))
                for view in range(self.views)
            ],
            dim=1,
        )
        stored = found.flatten(0, 1).to(self.dtype).cpu()
        if not bool(stored.isfinite().all()):
            raise RepresentationError(
                f"the backbone {self.backbone.name!r} returns values up to {float(found.abs().max()):.3g}, which "
                f"{str(self.dtype).removeprefix('torch.')} cannot hold: use dtype=torch.float32"
            )
        return stored

    def in_memory(self) -> dict[str, Any]:
        parts = [values for _, values in self.blocks()]
        return {key: torch.cat([part[key] for part in parts]).numpy() for key in parts[0]}

    def write(self, path: Path, about: Mapping[str, str]) -> None:
        """Write all rows, after those that an interrupted call has left; the file has its name when it is whole.

        Each key is one contiguous array of the file, which can then be mapped.
        """
        part = path.with_name(f".{path.name}.part")
        with _part(part, about) as file:
            for rows, values in self.blocks(int(file.attrs[_DONE])):
                for key, value in values.items():
                    if key not in file:
                        file.create_dataset(key, (self.rows, *value.shape[1:]), value.numpy().dtype)
                    file[key][rows] = value.numpy()
                file.attrs[_DONE] = rows.stop
                if rows.stop // self.batch_size % _FLUSHED == 0:
                    file.flush()
        with new_file(path) as new:
            part.rename(new)

    def labelled(self, arrays: dict[str, Any]) -> Data:
        """Arrays of all rows as data, with the roles and coordinates of the images."""
        coords: dict[str, Any] = {k: np.repeat(v, self.views) for k, v in self.data.coords.items()}
        if self.views > 1:
            coords |= {"image": coords["data"], "data": np.arange(self.rows)}
            coords["view"] = np.tile(np.arange(self.views), len(self.data))
        observed = {name: arrays[name] for name in self.data.observed_names}
        covariates = {name: arrays[name] for name in self.data.covariate_names}
        return Data(observed, covariates, coords, name=f"{self.data.name} ({self.backbone.name})".strip())


@contextmanager
def _part(path: Path, about: Mapping[str, str]) -> Iterator[h5py.File]:
    """An unfinished file of features: the one that an interrupted call has left, if it is of the same features.

    It stays where the computation is interrupted, and is deleted where it fails.
    """
    try:
        if path.exists() and _unfinished(path) != about:
            path.unlink()
        file = h5py.File(path, "a")
    except BlockingIOError as error:
        raise RepresentationError(
            f"another process is writing {path}: wait until it has finished, or give another file="
        ) from error
    try:
        with file:
            if _DONE not in file.attrs:
                file.attrs[_DONE] = 0
                file.attrs["format"], file.attrs["about"] = FORMAT, json.dumps(dict(about))
            yield file
    except Exception:
        path.unlink()
        raise


def _unfinished(path: Path) -> dict[str, str]:
    """What an unfinished file is of; nothing if it cannot be read."""
    try:
        return _about(path)
    except RepresentationError as error:
        if isinstance(error.__cause__, BlockingIOError):
            raise error.__cause__ from error
        return {}


def _check_inputs(backbone: object, data: object) -> None:
    if not isinstance(backbone, Backbone):
        raise RepresentationError(
            f"features got a {type(backbone).__name__} as its backbone: give cal.representations.backbone(NAME), or "
            "backbone(MODULE)"
        )
    if not isinstance(data, Data):
        raise RepresentationError(
            f"features got a {type(data).__name__} as its data: give a Data, such as one split, load(NAME)['train']"
        )
    names = data.keys()
    if FEATURES not in names:
        raise RepresentationError(
            f"the data have no images x, only {', '.join(names)}: rename them with Data.select({{'x': NAME}})"
        )


def _check_options(views: int, augment: Views | None, dtype: torch.dtype, batch_size: int) -> None:
    if isinstance(views, bool) or not isinstance(views, int) or views < 1 or batch_size < 1:
        raise RepresentationError(f"views={views!r}, batch_size={batch_size!r}: give a positive number of each")
    if views > 1 and augment is None:
        raise RepresentationError(f"views={views} without augment= would be {views} equal views: add augment=Views()")
    if augment is not None and not isinstance(augment, Views):
        raise RepresentationError(f"augment={augment!r} is given, wanted Views(), or None for the images as they are")
    if dtype not in (torch.float16, torch.float32):
        raise RepresentationError(f"dtype={dtype} is given, wanted torch.float16 or torch.float32")


def _identity(data: Data) -> str:
    """A sha256 of the data: their fingerprint, and the values that some images have after their transform."""
    rows = np.unique(np.linspace(0, len(data) - 1, _LOOKED_AT).astype(int))
    observed, covariates = data.batch(rows, dtype=torch.float32)
    images = {**observed, **covariates}[FEATURES]
    return digest(data.fingerprint().encode() + repr(tuple(images.shape)).encode() + bytes(bytes_of(images)))


def _is_of(path: Path, about: Mapping[str, str], overwrite: bool) -> bool:
    """Whether a file holds these features; another file is refused unless it may be replaced."""
    try:
        known = _about(path)
    except RepresentationError:
        if overwrite and path.is_file() and FORMAT.encode() in path.read_bytes()[:_HEADER]:
            return False  # a file of features that is damaged
        raise
    differing = [key for key in about if known.get(key) != about[key]]
    if differing and not overwrite:
        said = " and ".join(_SAID[key] + _shown(key, known, about) for key in differing)
        raise RepresentationError(
            f"{path} holds features that differ in {said}: give another file=, or overwrite=True to replace it"
        )
    return not differing


def _shown(key: str, known: Mapping[str, str], about: Mapping[str, str]) -> str:
    """Both values where they can be read."""
    return "" if key in ("backbone", "data") else f" ({known.get(key)} in the file, {about[key]} asked for)"


def _about(path: Path) -> dict[str, str]:
    """What a file says that its features are of."""
    if not path.is_file():
        what = "is a folder: give the name of a file" if path.is_dir() else "is missing: features(…, FILE) writes one"
        raise RepresentationError(f"{path} {what}")
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") == FORMAT:
                return dict(json.loads(file.attrs["about"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RepresentationError(
            f"{path} is damaged or no file of features: delete it, or give another file="
        ) from error
    raise RepresentationError(f"{path} is no file of features: give another file=")


def _read(path: Path, wanted: Iterable[str]) -> dict[str, Any]:
    """The arrays of a file of features: the features stay on the disk, and are read when they are needed."""
    found: dict[str, Any] = {}
    try:
        with h5py.File(path, "r") as file:
            for key, stored in file.items():
                offset = stored.id.get_offset()
                found[key] = np.memmap(path, stored.dtype, "r", offset, stored.shape) if key == FEATURES else stored[()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise RepresentationError(f"{path} is damaged ({error}): delete it") from error
    if missing := [key for key in wanted if key not in found]:
        raise RepresentationError(f"{path} is damaged: it has no {' and no '.join(missing)}; delete it")
    return found
