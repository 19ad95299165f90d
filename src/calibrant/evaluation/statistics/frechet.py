"""The Fréchet distance between features of two samples, beside that of two halves of one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from calibrant.errors import InferenceError
from calibrant.inference.scoring import Array
from calibrant.program.environment import defaults
from calibrant.streams import stream

PIXELS = "pixels"
_BATCH = 256  # images in one run of the features


def frechet_distance(
    first: Tensor | np.ndarray,
    second: Tensor | np.ndarray,
    features: str | Callable[[Tensor], Tensor] = PIXELS,
    name: str | None = None,
    *,
    splits: int = 4,
    seed: int = 0,
) -> xr.Dataset:
    """The Fréchet distance between features of two samples of equal size, such as real and generated images.

    With the means m and covariances C of the features,

        distance = |m₁ − m₂|² + tr(C₁ + C₂ − 2 (C₁ C₂)^½),

    the squared 2-Wasserstein distance of two Normals with these moments (with Inception features: FID, Heusel et al.
    2017, arXiv 1706.08500). Other features give other numbers, which have nothing in common with a FID but the formula.

    The estimate is too high, the more so the fewer the data and the wider the features: two samples of one distribution
    have a positive distance. So it stands beside a floor, the distance between two halves of `first`; as the bias
    depends on the sample size, it is compared with `distance_of_halves`, that between halves of both samples. Both are
    averages over random splits. Numbers of different sample sizes cannot be compared.

    Args:
        first: the real data, `(n, *event)`.
        second: the generated data, in the same shape.
        features: "pixels", the values themselves, or a function or module that maps `(batch, *event)` to
            `(batch, features)`. A module is run in the mode, on the device and in the dtype that it has.
        name: name of the features; None for the name of the class or function.
        splits: number of random splits into halves.
        seed: random seed for the splits.

    Returns:
        Numbers: `distance` of all data; `distance_of_halves` and `floor`, at half the sample size, each with `…_sd`
        over the splits, which share data. `features` is the number of features. Attributes: `name` of the features,
        `data` (n), and `singular`: 1 if n − 1 is less than the number of features, so that the covariances are singular
        and the bias is large.

    Raises:
        InferenceError: for samples of other shapes or sizes, fewer than 4 data, values or features that are not finite,
            features without a name, or a module in training mode.
    """
    _check(first, second, features, splits)
    called = _name(features, name)
    ours, theirs = (_features(sample, features, called) for sample in (first, second))
    size, width = ours.shape
    rows = [_halves(ours, theirs, np.random.default_rng(stream(seed, "halves", split))) for split in range(splits)]
    variables: dict[str, Any] = {"distance": _distance(_Moments.of(ours), _Moments.of(theirs)), "features": width}
    for key, values in zip(("distance_of_halves", "floor"), np.array(rows).T, strict=True):
        variables |= {key: values.mean(), f"{key}_sd": values.std(ddof=1) if splits > 1 else np.nan}
    attrs = {"name": called, "data": size, "singular": int(size - 1 < width), "splits": splits, "seed": seed}
    return xr.Dataset(variables, attrs=attrs)


def _check(first: Any, second: Any, features: Any, splits: int) -> None:
    shapes = tuple(first.shape), tuple(second.shape)
    if shapes[0] != shapes[1]:
        raise InferenceError(
            f"the samples have shapes {shapes[0]} and {shapes[1]}: give as many generated as real data, of one shape, "
            "since the distance depends on their number"
        )
    if len(first) < 4 or splits < 1:
        raise InferenceError(f"{len(first)} data and splits={splits}: give four data or more, and one split or more")
    if isinstance(features, nn.Module) and features.training:
        raise InferenceError("the module of the features is in training mode: call its eval() first")


def _name(features: str | Callable[[Tensor], Tensor], name: str | None) -> str:
    if isinstance(features, str) and features != PIXELS:
        raise InferenceError(f'features={features!r} is unknown: give "{PIXELS}", or a function or module')
    found = features if isinstance(features, str) else getattr(features, "__name__", type(features).__name__)
    if name is None and found == "<lambda>":
        raise InferenceError("the features have no name: give name=, which says what was compared")
    return found if name is None else name


@torch.no_grad()
def _features(sample: Tensor | np.ndarray, features: str | Callable[[Tensor], Tensor], name: str) -> Array:
    """Features of a sample, `(data, features)`."""
    values = torch.as_tensor(sample)
    if isinstance(features, str):
        found = values.reshape(len(values), -1)
    else:
        module = features if isinstance(features, nn.Module) else nn.Identity()
        with defaults(module, {}) as (device, dtype):
            parts = [features(part.to(device, dtype)).cpu() for part in values.split(_BATCH)]
        found = torch.cat(parts)
    if found.dim() != 2 or len(found) != len(values):
        raise InferenceError(
            f"features {name!r} give shape {tuple(found.shape)} for {len(values)} data, wanted ({len(values)}, "
            "features)"
        )
    if not found.isfinite().all():
        raise InferenceError(f"features {name!r} are not finite for some data: look at the data, or bound the features")
    return found.double().numpy()


def _halves(first: Array, second: Array, generator: np.random.Generator) -> tuple[float, float]:
    """The distance between halves of both samples, and that between two halves of the first."""
    half = len(first) // 2
    ours, theirs = (generator.permutation(len(side)) for side in (first, second))
    one, other = (_Moments.of(first[part]) for part in (ours[:half], ours[half : 2 * half]))
    generated = _Moments.of(second[theirs[:half]])
    return _distance(one, generated), _distance(one, other)


class _Moments(NamedTuple):
    mean: Array
    root: Array  # (rank, features), with rootᵀ root the covariance

    @classmethod
    def of(cls, values: Array) -> _Moments:
        """Moments of `(data, features)`."""
        mean = values.mean(0)
        centred = (values - mean) / np.sqrt(len(values) - 1)
        root = centred if len(centred) <= centred.shape[1] else np.linalg.qr(centred).R
        return cls(mean, root)


def _distance(first: _Moments, second: _Moments) -> float:
    """The distance of two Normals; tr (C₁ C₂)^½ is the sum of the singular values of R₁ R₂ᵀ, singular or not."""
    traces = float((first.root**2).sum() + (second.root**2).sum())
    common = float(np.linalg.svd(first.root @ second.root.T, compute_uv=False).sum())
    return float(((first.mean - second.mean) ** 2).sum()) + traces - 2.0 * common
