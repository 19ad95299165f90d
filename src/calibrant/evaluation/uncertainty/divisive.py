"""Divisive normalisation: posterior means as filter responses that are divided by the power of a pool of filters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from scipy.stats import ks_2samp
from torch import Tensor

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.arrays import Given, numbers
from calibrant.evaluation.uncertainty.moments import Array
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

MODELS = ("linear", "divisive")
Places = npt.NDArray[np.intp]  # positions of images

_VALIDATION = 0.1  # share of the images of a fit that decide when it ends
_SMALLEST = 1e-3  # least slope from which a fit starts, in sds of the response per sd of the drive
_POOL = 0.1  # share of the pool in the denominator at which a fit starts
_FLAT = 1e-12  # variance below which a unit does not respond


def filter_responses(fields: Given, images: Given) -> Array:
    """The responses of linear filters to images, each filter's divided by its standard deviation over the images.

    Args:
        fields: filters `(unit, *event)`, such as the result of `receptive_fields`.
        images: images `(image, *event)`.

    Returns:
        Responses `(image, unit)`.

    Raises:
        InferenceError: for filters of another shape than the images, or filters that respond to no image.
    """
    filters, shown = (numbers(values) for values in (fields, images))
    if filters.ndim < 2 or filters.shape[1:] != shown.shape[1:]:
        raise InferenceError(
            f"filters have the shape {filters.shape[1:]} and images {shown.shape[1:]}: give filters (unit, *event) and "
            "images (image, *event) of one event shape"
        )
    found = shown.reshape(len(shown), -1) @ filters.reshape(len(filters), -1).T
    return found / _spread("filters", found)


def divisive_normalisation(
    drive: Given,
    response: Given,
    response_error: Given | None = None,
    folds: int = 3,
    repeats: int = 1,
    epochs: int = 30,
    batch: int = 64,
    learning_rate: float = 0.05,
    patience: int = 3,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Fit responses by divisive normalisation of linear drives, and compare it with a linear control, cross-validated.

        divisive: r_i = L_i / √(σ_i² + Σ_j w_ji L_j²)          linear: r_i = L_i / σ_i

    with w, σ² ≥ 0 (Schwartz & Simoncelli 2001; arXiv 2404.15390, section on divisive normalisation). Both models have a
    σ_i for every unit, so that the linear one is not handicapped. Drives and responses are divided by their standard
    deviations first: weights and σ are in units of these. The linear control is the least-squares fit. The divisive
    model starts near it and is fitted by Adam to the mean squared error; each unit keeps the weights with the least
    error on a tenth of the images of the fit, among which is the control (all its weights 0). Each image is predicted
    by fits that have not seen it.

    Args:
        drive: linear drives L, `(image, unit)`.
        response: the responses, `(image, unit)`: posterior means of a guide, or exact ones.
        response_error: Monte Carlo variance of each response, `(image, unit)`; it is subtracted from the squared
            errors and from the variance, so that draws do not lower the explained variance. None for exact responses.
        folds: number of folds.
        repeats: number of times that images are split into folds, and fits started, anew.
        epochs: number of passes over the images of a fit, at most.
        batch: number of images in a step.
        learning_rate: learning rate of Adam, which falls to zero over `epochs`.
        patience: number of passes in which no unit's error on the tenth falls, after which a fit ends.
        seed: random seed for folds and batches.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimensions `model` ("linear", "divisive"), `unit`, `pool` (units), `fit` (folds, then repeats), `image`.
        `explained_variance` (model), the mean over units of the held-out share of the variance, and `gain`, that of the
        divisive model less that of the linear one; `unit_explained_variance` (model, unit) and `unit_gain` (unit). Each
        has a standard error `…_se` over images, which is no smaller than that over folds. `fold_explained_variance`
        (model, fit); `weights` (fit, pool, unit), w_ji; `sigma` (fit, unit); `predicted` (model, image, unit), held-out
        predictions in units of the response; `passes` (fit).

    Raises:
        InferenceError: for arrays of other shapes, values that are not finite, units that do not respond, or settings
            that leave no images.
    """
    progress = reporting(progress)
    if min(repeats, epochs, batch, patience) < 1 or not learning_rate > 0:
        raise InferenceError(
            f"repeats={repeats}, epochs={epochs}, batch={batch}, patience={patience}, learning_rate={learning_rate}: "
            "give positive numbers"
        )
    cases = _Cases.of(drive, response, response_error, folds)
    settings = _Settings(epochs, batch, learning_rate, patience)
    fits, parts = list[_Fit](), list[Places]()
    predicted = np.empty((repeats, len(MODELS), *cases.response.shape))
    for repeat in range(repeats):
        order = np.random.default_rng(stream(seed, "folds", repeat)).permutation(len(cases.drive))
        for fold, held_out in enumerate(np.array_split(order, folds)):
            kept = np.setdiff1d(order, held_out, assume_unique=True)
            fits.append(_fitted(cases, kept, settings, stream(seed, "fit", repeat, fold)))
            predicted[repeat][:, held_out] = fits[-1].predictions(cases.drive[held_out])
            parts.append(held_out)
            progress("divisive normalisation", len(fits), folds * repeats)
    result = _explained(cases, predicted, parts, folds)
    result["weights"] = (("fit", "pool", "unit"), np.stack([fit.weights for fit in fits]))
    result["sigma"] = (("fit", "unit"), np.stack([np.sqrt(fit.variance) for fit in fits]))
    result["passes"] = ("fit", np.array([fit.passes for fit in fits]))
    result["predicted"] = (("model", "image", "unit"), predicted[0] * cases.unit)
    return result.assign_attrs(folds=folds, repeats=repeats, seed=seed, images=len(cases.drive))


def weights_distance(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """Compare the weights between different units of two fits of divisive normalisation, by their distributions.

    Args:
        first: result of `divisive_normalisation`.
        second: result of another one.

    Returns:
        `distance`, the Kolmogorov–Smirnov distance of the weights w_ji, j ≠ i, averaged over pairs of fits; `floor`,
        the same between fits of one result (NaN with a single fit each), with which it is compared; `p_value` of the
        test of the first fits that takes all weights as independent, as in the paper. They are not: n units have n²
        weights that share data, so that any two fits differ by this test.
    """
    sides = [[_between_units(weights) for weights in result["weights"].values] for result in (first, second)]
    across = [float(ks_2samp(one, other).statistic) for one in sides[0] for other in sides[1]]
    within = [float(ks_2samp(side[i], side[j]).statistic) for side in sides for i in range(len(side)) for j in range(i)]
    return xr.Dataset(
        {
            "distance": float(np.mean(across)),
            "floor": float(np.mean(within)) if within else np.nan,
            "p_value": float(ks_2samp(sides[0][0], sides[1][0]).pvalue),
        }
    )


def _between_units(weights: Array) -> Array:
    return weights[~np.eye(len(weights), dtype=bool)]


# -- what is fitted ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cases:
    """Drives and responses with unit standard deviation, the variance of the responses' error, `(image, unit)`."""

    drive: Array
    response: Array
    error: Array
    unit: Array  # (unit,): standard deviation of the responses as they were given

    @classmethod
    def of(cls, drive: Any, response: Any, error: Any, folds: int) -> _Cases:
        given = [drive, response, np.zeros(np.shape(response)) if error is None else error]
        linear, found, noise = (numbers(values) for values in given)
        if linear.ndim != 2 or not linear.shape == found.shape == noise.shape:
            raise InferenceError(
                f"drive has shape {linear.shape}, response {found.shape}, response_error {noise.shape}: give arrays "
                "(image, unit) of one shape"
            )
        if not all(np.isfinite(values).all() for values in (linear, found, noise)):
            raise InferenceError(
                "drive, response or response_error is not finite for some images: leave these images out of all three"
            )
        if not 2 <= folds <= len(linear) // 20:
            raise InferenceError(f"folds={folds} of {len(linear)} images: give two folds or more, of 20 images each")
        spread = _spread("responses", found)
        return cls(linear / _spread("drives", linear), found / spread, noise / spread**2, spread)


def _spread(name: str, values: Array) -> Array:
    """Standard deviation of every unit over images, `(unit,)`."""
    found = values.std(0)
    if flat := np.flatnonzero(found**2 < _FLAT).tolist():
        raise InferenceError(f"{name} of the units {flat} are the same for all images: leave these units out")
    return found


class _Settings(NamedTuple):
    epochs: int
    batch: int
    learning_rate: float
    patience: int


@dataclass(frozen=True)
class _Fit:
    """One fit: `slope` of the linear control `(unit,)`, `weights` `(pool, unit)` and `variance`, σ², `(unit,)`."""

    slope: Array
    weights: Array
    variance: Array
    passes: int

    def predictions(self, drive: Array) -> Array:
        """Predicted responses, `(model, image, unit)`."""
        return np.stack([drive * self.slope, drive / np.sqrt(self.variance + drive**2 @ self.weights)])


def _fitted(cases: _Cases, kept: Places, settings: _Settings, seed: int) -> _Fit:
    """Fit both models to the images `kept`; units have no parameter in common."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.as_tensor(kept)[torch.randperm(len(kept), generator=generator)]
    inputs, targets = (torch.as_tensor(values[order], dtype=torch.float32) for values in (cases.drive, cases.response))
    held = max(1, round(_VALIDATION * len(order)))
    slope = ((inputs * targets).sum(0) / inputs.square().sum(0)).clamp_min(_SMALLEST)
    start, units = slope.reciprocal().square(), len(slope)
    control = [start.log(), torch.full((units, units), -torch.inf)]
    near = [((1 - _POOL) * start).log(), (_POOL * start / units).log().repeat(units, 1)]

    def loss(weights: list[Tensor], rows: slice | Tensor) -> Tensor:
        """The mean squared error of every unit, `(unit,)`, with log σ² and the log weights of the pools."""
        variance, pool = weights
        power = variance.exp() + inputs[rows].square() @ pool.exp()
        return (inputs[rows] * power.rsqrt() - targets[rows]).square().mean(0)

    rows = torch.arange(held, len(order))
    (variance, pool), passes = _descend(loss, near, control, rows, slice(0, held), settings, generator)
    weights, squares = (values.double().numpy() for values in (pool.exp(), variance.exp()))
    return _Fit(slope.double().numpy(), weights, squares, passes)


def _descend(
    loss: Callable[[list[Tensor], slice | Tensor], Tensor],
    start: list[Tensor],
    control: list[Tensor],
    rows: Tensor,
    held_out: slice,
    settings: _Settings,
    generator: torch.Generator,
) -> tuple[list[Tensor], int]:
    """Minimise a loss by Adam; return each unit's weights with the least held-out loss, and the number of passes.

    The weights `control` and those after every pass are compared.
    """
    weights = [values.clone().requires_grad_() for values in start]
    adam = torch.optim.Adam(weights, settings.learning_rate)
    course = torch.optim.lr_scheduler.CosineAnnealingLR(adam, settings.epochs)
    best, least = control, loss(control, held_out)
    done = since = 0
    while done < settings.epochs and since < settings.patience:
        for part in rows[torch.randperm(len(rows), generator=generator)].split(settings.batch):
            adam.zero_grad()
            loss(weights, part).sum().backward()
            adam.step()
        course.step()
        with torch.no_grad():
            now = loss(weights, held_out)
            best = [torch.where(now < least, ours, theirs) for ours, theirs in zip(weights, best, strict=True)]
        done, since = done + 1, 0 if (now < least).any() else since + 1
        least = torch.minimum(now, least)
    return best, done


# -- what is explained -------------------------------------------------------------------------------------------------


def _explained(cases: _Cases, predicted: Array, parts: list[Places], folds: int) -> xr.Dataset:
    """Explained variances with their errors, from held-out predictions `(repeat, model, image, unit)`."""
    wrong = (predicted - cases.response) ** 2 - cases.error
    total = (cases.response - cases.response.mean(0)) ** 2 - cases.error
    by_fit = np.stack([_shares(wrong[i // folds][:, part], total[part]) for i, part in enumerate(parts)])
    shares = _shares(wrong.mean(0), total)
    by_image = np.moveaxis(_influence(wrong.mean(0), total), 1, 0)
    variables: dict[str, Any] = {"fold_explained_variance": (("model", "fit"), by_fit.mean(-1).T)}
    for name, (dims, of) in _QUANTITIES.items():
        over_folds = of(by_fit).std(0, ddof=1) / np.sqrt(folds)
        over_images = of(by_image).std(0, ddof=1) / np.sqrt(len(by_image))
        variables |= {name: (dims, of(shares)), f"{name}_se": (dims, np.maximum(over_images, over_folds))}
    return xr.Dataset(variables, {"model": list(MODELS)})


def _gain(values: Array) -> Array:
    """The divisive model less the linear one, of values `(…, model, unit)`."""
    return values[..., 1, :] - values[..., 0, :]


_QUANTITIES: dict[str, tuple[tuple[str, ...], Callable[[Array], Array]]] = {  # of values (…, model, unit)
    "unit_explained_variance": (("model", "unit"), lambda values: values),
    "explained_variance": (("model",), lambda values: values.mean(-1)),
    "unit_gain": (("unit",), _gain),
    "gain": ((), lambda values: _gain(values).mean(-1)),
}


def _shares(wrong: Array, total: Array) -> Array:
    return 1 - wrong.sum(-2) / total.sum(-2)


def _influence(wrong: Array, total: Array) -> Array:
    """What each image adds to the explained variance of every unit, `(model, image, unit)`."""
    ratio = wrong.sum(-2, keepdims=True) / total.sum(-2, keepdims=True)
    return -(wrong - ratio * total) / total.mean(-2, keepdims=True)
