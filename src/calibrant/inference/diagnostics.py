"""Convergence diagnostics of many posteriors at once.

They equal those of ArviZ, scalar by scalar: rank-normalised split R-hat, bulk and tail effective sample size
(Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021, Bayesian Analysis 16(2)), with Geyer's (1992, Statistical Science
7(4)) initial monotone sequence, and E-BFMI (Betancourt 2016, arXiv 1604.00695).
"""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import fft
from scipy.special import ndtri

TAIL = (0.05, 0.95)

Array = npt.NDArray[np.float64]
Places = npt.NDArray[np.intp]

_CACHED_ELEMENTS = 2**18  # 2 MiB: numbers in a block of scalars, which stays in the processor's cache
_FIRST_LAGS = 16  # most chains that mix need no more; for these, products are cheaper than a Fourier transform
_CONSTANT = 1e-15  # a chain whose values differ by less is constant


def diagnose(draws: npt.ArrayLike, subchains: int = 1) -> dict[str, Array]:
    """R-hat, bulk ESS and tail ESS of every scalar.

    If a chain consists of sub-chains with a common start, R-hat is nested (Margossian, Hoffman, Sountsov, Riou-Durand,
    Vehtari & Gelman 2024, Bayesian Analysis): it compares the halves of chains, where the first half consists of the
    first halves of all sub-chains. So sub-chains which have not forgotten their start, or still drift together, raise
    it, while the noise of a single short sub-chain does not. ESS counts every sub-chain as a chain.

    Args:
        draws: `(chain, draw, …)`, finite, at least 4 draws per sub-chain.
        subchains: number of sub-chains, one after another and of equal length, of which every chain consists.

    Returns:
        `rhat`, the larger of the values for the draws and for the folded draws; `ess_bulk`; and `ess_tail`, the
        smaller of the values for the 5% and 95% quantiles (both in draws). Each has the trailing shape of the draws.
    """
    draws = np.asarray(draws, dtype=np.float64)
    draws = draws.reshape(len(draws) * subchains, -1, *draws.shape[2:])
    rhat, bulk, tail = _by_block(lambda x: _diagnose(x, subchains), draws, 3)
    return {"rhat": rhat, "ess_bulk": bulk, "ess_tail": tail}


def ess(draws: npt.ArrayLike) -> Array:
    """Effective sample size for the mean of every scalar, in draws.

    Args:
        draws: `(chain, draw, …)`, finite, at least 4 draws per chain.

    Returns:
        An array with the trailing shape of the draws.
    """
    return _by_block(lambda x: _ess(_split(x))[None], np.asarray(draws, dtype=np.float64), 1)[0]


def bfmi(energy: npt.ArrayLike, subchains: int = 1) -> Array:
    """Estimated Bayesian fraction of missing information of every chain.

    Args:
        energy: `(chain, draw, …)`.
        subchains: number of sub-chains, one after another and of equal length, of which every chain consists.

    Returns:
        `(chain, …)`.
    """
    energy = np.asarray(energy, dtype=np.float64)
    steps = np.diff(energy.reshape(len(energy), subchains, -1, *energy.shape[2:]), axis=2)
    return np.square(steps).mean((1, 2)) / energy.var(1, ddof=1)


def _by_block(statistics: Callable[[Array], Array], draws: Array, count: int) -> Array:
    """Apply a function from rows `(row, chain, draw)` to statistics `(count, row)` to all scalars, block by block."""
    chains, length, *shape = draws.shape
    columns = draws.reshape(chains, length, -1)
    found = np.empty((count, columns.shape[2]))
    step = max(1, _CACHED_ELEMENTS // (chains * length))
    for start in range(0, columns.shape[2], step):
        rows = np.ascontiguousarray(np.moveaxis(columns[:, :, start : start + step], 2, 0))
        found[:, start : start + step] = statistics(rows)
    return found.reshape(count, *shape)


def _diagnose(x: Array, subchains: int) -> Array:
    """R-hat, bulk and tail ESS `(3, row)` of draws `(row, sub-chain, draw)`, from one sort and one merge."""
    split = _split(x)
    places, ordered = _order(split.reshape(len(split), -1))
    bulk = _put(_normal_scores(ordered), places).reshape(split.shape)
    middle = ordered.shape[1] // 2
    median = ordered[:, middle - 1 : middle + 1].mean(1, keepdims=True)
    merged, distances = _order(np.abs(ordered - median), "stable")  # it merges the two sorted runs of a row
    folded = _put(_normal_scores(distances), places.ravel()[merged]).reshape(split.shape)
    with np.errstate(invalid="ignore", divide="ignore"):  # constant chains
        rhat = np.maximum(_rhat(_nested(bulk, subchains)), _rhat(_nested(folded, subchains)))
    return np.stack((rhat, _ess(bulk), _ess_tail(x, split, ordered)))


def _split(x: Array) -> Array:
    """Split every chain into halves; if the number of draws is odd, the middle draw is dropped."""
    half = x.shape[2] // 2
    return np.concatenate((x[:, :, :half], x[:, :, -half:]), axis=1)


def _nested(split: Array, subchains: int) -> Array:
    """Halves of chains `(row, half, draw)`, from halves of sub-chains, where those of a chain are adjacent."""
    return split.reshape(len(split), -1, subchains * split.shape[2])


def _order(rows: Array, kind: Literal["quicksort", "stable"] = "quicksort") -> tuple[Places, Array]:
    """Sort every row: positions of the sorted values in the flat array, and the sorted values."""
    places = np.argsort(rows, axis=1, kind=kind)
    places += rows.shape[1] * np.arange(len(rows))[:, None]
    return places, rows.ravel()[places]


def _put(values: Array, places: Places) -> Array:
    result = np.empty(values.size)
    result[places] = values
    return result


def _normal_scores(ordered: Array) -> Array:
    """Normal scores of the ranks of sorted rows; tied values get their mean rank."""
    count = ordered.shape[1]
    by_half_rank = ndtri((1.0 + 0.5 * np.arange(2 * count - 1) - 0.375) / (count + 0.25))
    scores = np.tile(by_half_rank[::2], (len(ordered), 1))
    tied = np.pad(ordered[:, 1:] == ordered[:, :-1], ((0, 0), (1, 1)))
    before, after = tied[:, :-1], tied[:, 1:]
    first, last = np.flatnonzero(after & ~before), np.flatnonzero(before & ~after)
    half_ranks = first % count + last % count
    scores.ravel()[np.flatnonzero(before | after)] = by_half_rank[np.repeat(half_ranks, last - first + 1)]
    return scores


def _rhat(x: Array) -> Array:
    """Potential scale reduction of `(row, chain, draw)`."""
    count = x.shape[2]
    between = count * x.mean(2).var(1, ddof=1)
    return np.sqrt((between / x.var(2, ddof=1).mean(1) + count - 1) / count)


def _ess_tail(x: Array, split: Array, ordered: Array) -> Array:
    if ordered.shape[1] < x[0].size:  # with an odd number of draws, the halves lack one per chain
        ordered = np.sort(x.reshape(len(x), -1), axis=1)
    found = []
    for probability in TAIL:
        below, part = divmod(probability * (ordered.shape[1] - 1), 1.0)
        quantile = np.quantile(ordered[:, int(below) : int(below) + 2], part, axis=1)
        found.append(_ess((split <= quantile[:, None, None]).astype(np.float64)))
    return np.minimum(*found)


def _ess(x: Array) -> Array:
    """Effective sample size of the mean of `(row, chain, draw)`."""
    count = x.shape[1] * x.shape[2]
    means = x.mean(2, keepdims=True)
    centred, between = x - means, means[:, :, 0].var(1, ddof=1)
    time, finished = _correlation_time(_by_products(centred, _FIRST_LAGS), between, x.shape[2])
    if not finished.all():
        time[~finished], _ = _correlation_time(_by_fourier(centred[~finished]), between[~finished], x.shape[2])
    result = count / np.maximum(time, 1.0 / np.log10(count))
    suspect = np.flatnonzero(centred[:, 0, 0] ** 2 + between < 1e-28)
    constant = suspect[np.ptp(x[suspect], axis=(1, 2)) < _CONSTANT]
    result[constant] = count
    return result


def _by_products(centred: Array, lags: int) -> Array:
    """Autocovariance `(row, lag)` of centred chains, averaged over chains, for the first lags."""
    count = centred.shape[2]
    products = (np.vecdot(centred[..., : count - lag], centred[..., lag:]) for lag in range(min(lags, count)))
    return np.stack([product.mean(1) for product in products], axis=1) / count


def _by_fourier(centred: Array) -> Array:
    """Autocovariance `(row, lag)` of centred chains, averaged over chains, for all lags."""
    count = centred.shape[2]
    padded = fft.next_fast_len(2 * count, real=True)
    spectrum = fft.rfft(centred, padded, axis=2)
    power = (spectrum.real**2 + spectrum.imag**2).mean(1)
    return fft.irfft(power, padded, axis=1)[:, :count] / count


def _correlation_time(covariance: Array, between: Array, count: int) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Integrated autocorrelation time by Geyer's initial monotone sequence, and whether the lags were enough.

    Args:
        covariance: autocovariance, averaged over chains, `(row, lag)`.
        between: variance of the means of the chains, `(row,)`.
        count: number of draws per chain.
    """
    within = covariance[:, :1] * count / (count - 1.0)
    with np.errstate(invalid="ignore", divide="ignore"):  # constant chains
        rho = 1.0 - (within - covariance) / (covariance[:, :1] + between[:, None])
    rho[:, 0] = 1.0
    all_pairs = max(1, (count - 1) // 2)
    pairs = (rho[:, :-1:2] + rho[:, 1::2])[:, :all_pairs]
    ended = pairs <= 0.0
    finished = ended.any(1) | (pairs.shape[1] == all_pairs)
    last = np.where(ended.any(1), ended.argmax(1), pairs.shape[1] - 1)
    before = np.arange(pairs.shape[1]) < last[:, None]
    total = np.where(before, np.minimum.accumulate(pairs, axis=1), 0.0).sum(1)
    rows = np.arange(len(rho))
    even, pair = rho[rows, 2 * last], pairs[rows, last]
    return 2.0 * total - 1.0 + np.where((even > 0.0) | (pair >= 0.0), even, 0.0), finished
