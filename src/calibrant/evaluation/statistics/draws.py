"""The draws of one posterior, with the effective number of draws and the Monte Carlo variance of what they estimate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from calibrant.inference.diagnostics import ess

Array = npt.NDArray[np.float64]

BLOCKS = 40  # number of contiguous parts of the draws; chains that pass the gate have 10 effective draws in each
_SHORT = 4  # fewest draws of a chain whose halves are used
TINY = 1e-12  # smallest sd (in reference sd), given to constant latents so that its log stays finite


@dataclass(frozen=True)
class Draws:
    """The draws of one posterior from one tree.

    Attributes:
        values: `(chain, draw, latent)`.
        independent: whether the draws are independent.
    """

    values: Array
    independent: bool

    @property
    def count(self) -> int:
        """The number of draws."""
        return self.values.shape[0] * self.values.shape[1]

    @cached_property
    def rows(self) -> Array:
        """The draws chain by chain, `(latent, chain · draw)`."""
        return np.ascontiguousarray(self.values.reshape(self.count, -1).T)

    @cached_property
    def ordered(self) -> Array:
        """The draws of every latent in ascending order, `(latent, chain · draw)`."""
        if self.independent:
            return np.sort(self.rows, axis=1)
        return np.take_along_axis(self.rows, self._order, axis=1)

    @cached_property
    def _order(self) -> npt.NDArray[np.intp]:
        return self.rows.argsort(axis=1)

    def mapped(self, centre: Array, scale: Array) -> Draws:
        """The draws in units of `scale` `(latent,)` around `centre` `(latent,)`."""
        return Draws((self.values - centre) / scale, self.independent)

    def latents(self, index: npt.NDArray[np.intp]) -> Draws:
        """The draws of some latents."""
        return Draws(self.values[..., index], self.independent)

    def half(self, number: int) -> Draws:
        """The first or the second half of every chain, or of the chains if these are too short."""
        values = self.values if self.values.shape[1] >= _SHORT else self.values.swapaxes(0, 1)
        middle = values.shape[1] // 2
        return Draws(values[:, middle:] if number else values[:, :middle], self.independent)

    def along(self, directions: Array) -> Draws:
        """The draws projected on directions `(latent, direction)`."""
        return Draws(self.values @ directions, self.independent)

    def size(self, series: Array) -> Array:
        """Effective number of draws for the mean of each row of a series `(latent, chain · draw)`."""
        if self.independent:
            return np.full(len(series), float(series.shape[1]))
        chains, length = self.values.shape[:2]
        return ess(series.T.reshape(chains, length, len(series)))

    def variance(self, influence: Array) -> Array:
        """Monte Carlo variance of the mean of each row of an influence series `(latent, chain · draw)`."""
        return influence.var(1, ddof=1) / self.size(influence)

    def variance_in_order(self, influence: Array) -> Array:
        """Like `variance`, for a series in the order of `ordered`."""
        if self.independent:
            return self.variance(influence)
        series = np.empty_like(influence)
        np.put_along_axis(series, self._order, influence, axis=1)
        return self.variance(series)

    def quantiles(self, probabilities: npt.ArrayLike) -> Array:
        """Quantiles `(probability, latent)`, at Weibull's plotting positions.

        With these positions, the expected mass between two quantiles of a sample is the difference of their
        probabilities.
        """
        last = self.count - 1
        place = np.clip((self.count + 1) * np.asarray(probabilities) - 1, 0, last)
        low = np.minimum(place.astype(np.intp), max(last - 1, 0))
        part = place - low
        below, above = self.ordered[:, low], self.ordered[:, np.minimum(low + 1, last)]
        return (below + part * (above - below)).T

    def below(self, cuts: Array, side: Literal["left", "right"] = "right") -> Array:
        """The share of the draws that are at most each cut (`side` "left": less than it), `(cut, latent)`."""
        found = [np.searchsorted(row, at, side=side) for row, at in zip(self.ordered, cuts.T, strict=True)]
        return np.array(found).T / self.count

    def blocks(self, series: Array) -> Array:
        """Means `(latent, block)` of contiguous parts of a series `(latent, chain · draw)`, without the remainder."""
        size = series.shape[1] // BLOCKS
        return series[:, : size * BLOCKS].reshape(len(series), BLOCKS, size).mean(2)


def cut_into_blocks(x: np.ndarray) -> np.ndarray:
    """Cut `(draw, latent)` into contiguous blocks `(block, draw, latent)`, dropping the remainder of the division."""
    size = len(x) // BLOCKS
    return x[: size * BLOCKS].reshape(BLOCKS, size, -1)
