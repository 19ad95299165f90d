"""Directions of the latents of a datum along which a guide may err although every single latent looks right.

In many latents, an error along one direction is spread over all of them: a guide that returns the prior is right in
every latent of 200 but for half a percent, although it ignores all that the data say. So sums of latents are compared
like further latents. Whatever is chosen by looking is chosen on one half and judged on the other, both ways:

- *common* directions, for all data: those in which the guide is widest and narrowest in units of the reference, and the
  one along which its means err most, chosen on every second datum;
- the *informed* direction of a datum, about which its likelihood says most (`informed_directions`);
- a datum's *own* directions, those in which the guide is widest and narrowest relative to the reference, chosen on half
  of the draws of that datum, because nothing common may be wrong;
- the *pair* of latents whose correlation errs most, chosen on every second datum.

Draws are in units of the reference's mean and sd. Errors of the mean are asked only along common and informed
directions: along a datum's own worst direction they grow with the number of latents even where they don't matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from scipy.linalg.lapack import dpotrf, dpotrs

from calibrant.evaluation.statistics.draws import Draws
from calibrant.evaluation.statistics.marginals import log_sd_influence, mean_influence

Array = npt.NDArray[np.float64]

COMMON = ("widest 1", "widest 2", "narrowest 1", "narrowest 2", "mean")
OWN_WIDE = ("own, widest, first half", "own, widest, second half")
OWN_NARROW = ("own, narrowest, first half", "own, narrowest, second half")
OWN = (*OWN_WIDE, *OWN_NARROW)
INFORMED = "informed"
DIRECTIONS = (*COMMON, INFORMED, *OWN)

_RIDGE = 1e-6  # added to the reference's variances, so that its covariance can be inverted
_POWERS = 30  # power iterations
_SHRUNK_WIDE, _SHRUNK_NARROW = 0.9, 0.2  # share of the unit matrix in the covariances that choose an own direction


@dataclass
class HalfOfData:
    """Sums over one half of the data, from which the common directions and the pair are chosen.

    Attributes:
        count: number of data.
        guide, reference: covariances within data, `(latent, latent)`.
        shift: products of the errors of the means, without their noise, `(latent, latent)`.
        pairs: squared errors of correlations, without their noise, `(pair,)`.
    """

    count: int = 0
    guide: Array = field(default_factory=lambda: np.zeros(()))
    reference: Array = field(default_factory=lambda: np.zeros(()))
    shift: Array = field(default_factory=lambda: np.zeros(()))
    pairs: Array = field(default_factory=lambda: np.zeros(()))

    def add(self, covariances: tuple[Array, Array], errors: tuple[Array, Array], pairs: Array) -> None:
        """Add a datum: covariances of guide and reference, errors of the means ± se, and squared errors of pairs."""
        (guide, reference), (error, se) = covariances, errors
        sd = np.sqrt(np.diagonal(reference))
        noise = np.outer(se, se) * reference / np.outer(sd, sd)
        self.count += 1
        self.guide = self.guide + guide
        self.reference = self.reference + reference
        self.shift = self.shift + np.outer(error, error) - noise
        self.pairs = self.pairs + pairs


@dataclass(frozen=True)
class Choice:
    """What is judged on the data of the other half.

    Attributes:
        directions: `(latent, direction)` of `COMMON`; NaN for directions that do not exist.
        pair: positions of two latents.
    """

    directions: Array
    pair: npt.NDArray[np.intp]


def choose(half: HalfOfData) -> Choice:
    """The common directions and the pair of a half of the data."""
    latents = len(half.guide)
    reference = half.reference / half.count + _RIDGE * np.eye(latents)
    found = np.full((latents, len(COMMON)), np.nan)
    _, vectors = eigh(half.guide / half.count, reference)
    for number in range(min(2, latents // 2)):
        found[:, number] = vectors[:, -1 - number]
        found[:, 2 + number] = vectors[:, number]
    found[:, 4] = eigh(half.shift / half.count, reference, subset_by_index=[latents - 1, latents - 1])[1][:, 0]
    upper = np.triu_indices(latents, 1)
    worst = int(half.pairs.argmax())
    return Choice(found, np.array([upper[0][worst], upper[1][worst]]))


def halves_of_draws(a: Draws, r: Draws) -> list[tuple[Draws, Draws]]:
    """First and second half of the draws of both sides."""
    return [(a.half(number), r.half(number)) for number in (0, 1)]


def covariance(draws: Draws) -> Array:
    """Covariance of the latents, `(latent, latent)`."""
    centred = draws.rows - draws.rows.mean(1, keepdims=True)
    return centred @ centred.T / (draws.count - 1)


def own_direction(wide: Array, narrow: Array) -> Array:
    """The direction `(latent, 1)` in which one covariance is widest relative to another one.

    The wider side is shrunk more: what makes a direction stand out is that the other side is narrow there. The leading
    generalised eigenvector is found by power iterations, which are many times faster than a decomposition; where it
    does not stand out, any direction will do.
    """
    one = np.eye(len(wide))
    wide = (1.0 - _SHRUNK_WIDE) * wide + _SHRUNK_WIDE * one
    # LAPACK itself: around so few latents, `cho_solve` takes ten times as long as the arithmetic.
    factor, failed = dpotrf((1.0 - _SHRUNK_NARROW) * narrow + _SHRUNK_NARROW * one)
    if failed:
        raise np.linalg.LinAlgError("the covariance of the narrow side is not positive definite")
    direction = np.random.default_rng(0).normal(size=(len(wide), 1))
    for _ in range(_POWERS):
        direction, _ = dpotrs(factor, wide @ direction)
        direction /= np.linalg.norm(direction)
    return np.asarray(direction)


def along(a: Draws, r: Draws, directions: Array) -> tuple[Draws, Draws]:
    """Both sides projected on directions `(latent, direction)`, in units of the reference's mean and sd there."""
    ours, theirs = a.along(directions), r.along(directions)
    centre, scale = theirs.rows.mean(1), theirs.rows.std(1, ddof=1)
    return ours.mapped(centre, scale), theirs.mapped(centre, scale)


def own(halves: list[tuple[Draws, Draws]], covariances: list[tuple[Array, Array]]) -> dict[str, tuple[Draws, Draws]]:
    """Draws along a datum's own directions, chosen on either half of the draws and judged on the other half."""
    found = {}
    for judged, (wide, narrow) in enumerate(zip(OWN_WIDE, OWN_NARROW, strict=True)):
        guide, reference = covariances[1 - judged]
        found[wide] = along(*halves[judged], own_direction(guide, reference))
        found[narrow] = along(*halves[judged], own_direction(reference, guide))
    return found


def common(a: Draws, r: Draws, choice: Choice) -> dict[str, tuple[Draws, Draws]]:
    """Draws along each of the common directions that exist."""
    return {
        name: along(a, r, column[:, None])
        for name, column in zip(COMMON, choice.directions.T, strict=True)
        if np.isfinite(column).all()
    }


def influence_blocks(a: Draws, r: Draws) -> tuple[Array, Array]:
    """Block means of the influence of draws on the error of the mean and of the log sd, `(latent, block)` each."""
    mean = a.rows.mean(1)
    log_r = log_sd_influence(r)
    of_mean = a.blocks(mean_influence(a)) - r.blocks(mean_influence(r) + mean[:, None] * log_r)
    return of_mean, a.blocks(log_sd_influence(a)) - r.blocks(log_r)
