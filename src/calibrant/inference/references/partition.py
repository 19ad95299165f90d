"""A soft partition of the space of the vectors among groups of chains.

Chains of one mode are kept in it: their target is p·π_k, where the shares π_k of the groups are positive and sum to
one. Therefore the targets of all groups together are p itself, wherever the boundaries lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from torch import Tensor

Array = npt.NDArray[np.float64]
_RIDGE = 1e-8  # so small that the shares of another group are below 1e-4 at all draws of a group that lies apart
_STEEPEST = 3.0  # slope of a group per sd within groups: chains diverge at a steeper boundary between modes that touch
_NAMES = ("partition slopes", "partition offsets", "partition own")  # no site has a name with a space
_DENSE = 200  # width up to which a covariance has correlations


@dataclass(frozen=True)
class Partition:
    """The group of every unit, and the shares of all groups: softmax of slopes · z + offsets.

    Attributes:
        slopes: `(unit, group, width)`.
        offsets: `(unit, group)`; very low for groups that a unit does not have.
        own: the unit's own group, `(unit,)`.
    """

    slopes: Tensor
    offsets: Tensor
    own: Tensor

    def __getitem__(self, units: Tensor) -> Partition:
        return Partition(self.slopes[units], self.offsets[units], self.own[units])

    def rows(self) -> dict[str, Tensor]:
        """The partition in the form of covariates, one row per unit."""
        return dict(zip(_NAMES, (self.slopes, self.offsets, self.own), strict=True))

    def log_shares(self, z: Tensor) -> Tensor:
        """log π of all groups at vectors `(unit, n, width)` of latents: `(unit, n, group)`."""
        return (z @ self.slopes.mT + self.offsets[:, None]).log_softmax(-1)


def log_own_share(z: Tensor, rows: dict[str, Tensor]) -> Tensor:
    """log π of its own group for every lane, `(lane,)`, from vectors `(lane, width)` and the rows of its partition."""
    slopes, offsets, own = (rows[name] for name in _NAMES)
    scores = (slopes @ z[..., None])[..., 0] + offsets
    return scores.log_softmax(-1).gather(-1, own[:, None])[:, 0]


@dataclass(frozen=True)
class Places:
    """Where the chains of all units start, and the partition that keeps them there.

    Attributes:
        starts: `(unit, chain, width)`, in the program's own coordinates (κ = 0).
        partition: the partition, or None.
    """

    starts: Tensor
    partition: Partition | None = None

    def __getitem__(self, units: Tensor) -> Places:
        return Places(self.starts[units], None if self.partition is None else self.partition[units])


def fitted(groups: list[Array]) -> tuple[Array, Array]:
    """Slopes `(group, width)` and offsets `(group,)` that tell groups of draws `(n, width)` apart.

    They are a logistic regression on the directions in which the means of the groups differ, measured by the
    covariance within groups. Every group has the same total weight, so that a boundary lies in the middle of the gap
    between two groups, not between their means; between groups that touch it is soft.
    """
    means = np.stack([group.mean(0) for group in groups])
    whiten = whitening(np.concatenate([group - mean for group, mean in zip(groups, means, strict=True)]))
    centre = means.mean(0)
    basis = np.linalg.svd((means - centre) @ whiten.T, full_matrices=False)[2][: len(groups) - 1]
    project = basis @ whiten
    features = np.concatenate([(group - centre) @ project.T for group in groups])
    label = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    size = features.std(0)
    slopes, offsets = _logistic(features / size, label, len(groups), _STEEPEST * size)
    slopes = slopes / size @ project
    return slopes, offsets - slopes @ centre


def whitening(centred: Array) -> Array:
    """A matrix that makes the covariance of draws `(n, width)` with mean zero the identity, approximately.

    Correlations are shrunk by width / (width + n / 10), since the draws depend on each other, and are zero for more
    than 200 entries.
    """
    count, width = centred.shape
    sd = np.maximum(centred.std(0), 1e-150)
    if width > _DENSE:
        return np.diag(1 / sd)
    scaled = centred / sd
    shrink = width / (width + count / 10) if width > 1 else 0.0
    correlation = (1 - shrink) * (scaled.T @ scaled / count) + shrink * np.eye(width)
    values, vectors = np.linalg.eigh(correlation)
    return (vectors / np.sqrt(np.maximum(values, 1e-8))) @ vectors.T / sd


def _logistic(features: Array, label: npt.NDArray[np.intp], groups: int, steepest: Array) -> tuple[Array, Array]:
    """Slopes (up to `steepest`) and offsets of a multinomial logistic regression with equal weights of the groups."""
    count = np.bincount(label, minlength=groups)
    weight = 1.0 / (groups * count[label])
    one_hot = np.eye(groups)[label]
    design = np.concatenate([features, np.ones((len(features), 1))], 1)

    def loss(flat: Array) -> tuple[float, Array]:
        table = flat.reshape(groups, -1)
        scores = design @ table.T
        value = weight @ (logsumexp(scores, axis=1) - scores[np.arange(len(label)), label])
        slope = ((softmax(scores, axis=1) - one_hot) * weight[:, None]).T @ design
        return float(value + _RIDGE / 2 * flat @ flat), (slope + _RIDGE * table).ravel()

    start: Any = np.zeros(groups * design.shape[1])
    upper = np.tile(np.append(steepest, np.inf), groups)
    options = {"maxiter": 500, "ftol": 1e-14, "gtol": 1e-10}
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=np.stack([-upper, upper], 1), options=options)
    table = found.x.reshape(groups, -1)
    return table[:, :-1], table[:, -1]


def stacked(tables: list[tuple[Array, Array]], own: list[int]) -> Partition:
    """One partition for units with different numbers of groups, from the slopes and offsets of every unit."""
    most, width = max(len(offsets) for _, offsets in tables), tables[0][0].shape[1]
    slopes, offsets = np.zeros((len(tables), most, width)), np.full((len(tables), most), -1e9)
    for row, (slope, offset) in enumerate(tables):
        slopes[row, : len(offset)], offsets[row, : len(offset)] = slope, offset
    return Partition(*(torch.as_tensor(part) for part in (slopes, offsets, np.array(own))))
