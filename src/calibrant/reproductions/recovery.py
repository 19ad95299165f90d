"""How near estimated posteriors of directions are to known ones: ranks, scale, rotation, and coverage of caps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from calibrant.program.environment import seeded
from calibrant.reproductions.cells import Measured


@dataclass(frozen=True)
class Directions:
    """Posteriors of directions for n inputs, each with rotational symmetry about its own direction.

    Attributes:
        direction: unit vectors `(n, m)`.
        concentration: `(n,)`; larger is more certain.
        draws: draws of each posterior `(draws, n, m)`, unit vectors.
    """

    direction: Tensor
    concentration: Tensor
    draws: Tensor

    def of_dimension(self, dimension: int) -> Directions:
        """The same in a larger space, with zeros in place of the entries that are not there."""
        more = (0, dimension - self.direction.shape[-1])
        return Directions(pad(self.direction, more), self.concentration, pad(self.draws, more))


def recovery_of(estimated: Directions, known: Directions, seed: int) -> tuple[dict[str, Measured], np.ndarray]:
    """Numbers that compare estimated posteriors with known ones, for the same n inputs.

    Representations are known up to a rotation of the whole sphere, so that estimated directions are first rotated to
    the known ones as well as one rotation (or reflection) can.

    Returns:
        `rank`: Spearman's correlation of both concentrations. `ratio`: median of estimated over known concentration.
        `slope` of the regression of one's logarithm on the other's. `angle`: mean angle between directions, degrees.
        `cosines`: correlation of the cosines of pairs of inputs, and `cosines off`: their root mean square difference.
        `caps`: share of draws of the known posteriors in the caps that hold 90% of the estimated ones. And the levels
        of these caps, see `cap_levels`.
    """
    dimension = max(estimated.direction.shape[-1], known.direction.shape[-1])
    estimated, known = (one.of_dimension(dimension) for one in (estimated, known))
    rotated = estimated.direction @ best_rotation(estimated.direction, known.direction)
    angle = (rotated * known.direction).sum(-1).clamp(-1, 1).arccos().rad2deg()
    logs = [one.concentration.log().double().numpy() for one in (known, estimated)]
    pairs = [(one.direction * one.direction.roll(1, 0)).sum(-1).numpy() for one in (known, estimated)]
    off = Measured.of((pairs[1] - pairs[0]) ** 2)
    levels = cap_levels(estimated, known, seed)
    numbers = {
        "rank": _correlation(_ranks(logs[0]), _ranks(logs[1])),
        "ratio": _median(np.exp(logs[1] - logs[0])),
        "slope": _slope(*logs),
        "angle": Measured.of(angle),
        "cosines": _correlation(*pairs),
        "cosines off": Measured(off.value**0.5, off.se / (2 * off.value**0.5) if off.value else 0.0),
        "caps": Measured.of(levels <= 0.9),
    }
    return numbers, levels


def best_rotation(start: Tensor, end: Tensor) -> Tensor:
    """The orthogonal matrix R `(m, m)` for which `start @ R` is nearest to `end`, both `(n, m)` (Schönemann 1966)."""
    left, _, right = torch.linalg.svd(start.T @ end)
    return left @ right


def cap_levels(estimated: Directions, known: Directions, seed: int) -> np.ndarray:
    """For each input, the share of the estimated posterior nearer to its direction than one draw of the known one.

    The known draw is rotated to the estimated directions. The share is uniform where the estimated posterior is the
    known one, for any number of draws, since ties of ranks are broken at random.
    """
    back = best_rotation(known.direction, estimated.direction)
    truth = (known.draws[0] @ back * estimated.direction).sum(-1)
    cosines = (estimated.draws * estimated.direction).sum(-1)
    with seeded(seed):
        rank = (cosines > truth).sum(0) + torch.rand(len(truth))
    return (rank / (len(cosines) + 1)).numpy()


def directions(direction: Tensor, concentration: Tensor, draws: Tensor) -> Directions:
    """Posteriors in float64, where directions and draws are unit vectors to rounding."""
    return Directions(normalize(direction.double(), dim=-1), concentration.double(), normalize(draws.double(), dim=-1))


def _ranks(values: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return np.asarray(rankdata(values))


def _correlation(one: np.ndarray, other: np.ndarray) -> Measured:
    """A correlation with the standard error of Bonett and Wright (2000), which is that of ranks."""
    if one.std() == 0 or other.std() == 0:
        return Measured(0.0, (len(one) - 3) ** -0.5)
    value = float(np.corrcoef(one, other)[0, 1])
    return Measured(value, float((1 - value**2) * np.sqrt((1 + value**2 / 2) / (len(one) - 3))))


def _slope(x: np.ndarray, y: np.ndarray) -> Measured:
    x, y = x - x.mean(), y - y.mean()
    slope = float(x @ y / (x @ x))
    return Measured(slope, float(np.sqrt(((y - slope * x) ** 2 * x**2).sum()) / (x @ x)))


def _median(values: np.ndarray) -> Measured:
    """The median, with half the width of its interval of order statistics that holds 68%."""
    ordered, half = np.sort(values), len(values) ** 0.5 / 2
    low, high = (ordered[int(np.clip(round(len(values) / 2 + side), 0, len(values) - 1))] for side in (-half, half))
    return Measured(float(np.median(values)), float(high - low) / 2)
