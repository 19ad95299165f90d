"""Classifier two-sample test: can draws of the guide be told from draws of the reference, datum by datum?

A classifier learns to tell the two apart and is judged on draws that it has not seen (Lopez-Paz & Oquab 2017, ICLR).
Its accuracy is 1/2 if the joint posteriors agree. The p-value comes from permuted labels, so that it is valid for any
classifier and any number of draws and latents.

The classifier is a ridge regression of the labels ±1 on features of all latents together, by kernels: its held-out
scores are A y with a matrix A that does not depend on the labels y, and permutations are further columns of y. Nothing
that is computed before the labels are used (ranks, whitening, bandwidth) depends on which side a draw is from. From the
kernel on, everything is computed in single precision, in half the time: the observed labels and their permutations go
through the same arithmetic, so that the p-value is exact in any precision.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.linalg import cho_factor, cho_solve, get_lapack_funcs
from scipy.special import ndtri
from scipy.stats import false_discovery_control, rankdata

from calibrant.errors import InferenceError
from calibrant.evaluation.statistics.joining import Side, check_same_problem, is_discrete, varying
from calibrant.inference.diagnostics import ess
from calibrant.inference.references.gate import passed_labels
from calibrant.inference.trees import Latent, data_labels, draw_blocks, latent_names, scalars
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

Array = npt.NDArray[np.float64]
Single = npt.NDArray[np.float32]

MAX_PERMUTATIONS = 2000  # largest number of permutations for a datum
FEW_REACH = 10  # if fewer permutations reach the observed statistic, more are made

_PENALTY = 10.0  # penalty of the ridge regression, for a kernel with a mean diagonal of 1
_CONSTANT = 1e-12


def c2st(
    post: xr.DataTree,
    ref: xr.DataTree,
    *,
    draws: int = 500,
    folds: int = 5,
    permutations: int = 200,
    fdr: float = 0.1,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Test for every datum whether draws of the guide can be told from draws of the reference.

    All local continuous latents of a datum are tested jointly, but for entries that the support fixes (the upper
    triangle of a Cholesky factor). The trees are joined on the coordinate `data`; data
    whose reference fails the convergence gate are left out. Both sides give equally many draws, evenly spaced. Draws
    that are not independent (attribute `independent_draws` 0: Markov chains, resampled draws) are thinned to their
    smallest effective sample size over the latents, their distances from the median and their principal axes. Folds
    are contiguous parts of the draws, so that the remaining correlation does not connect the draws that train a
    classifier with those that test it.

    Args:
        post: tree to be judged, usually of `posterior`.
        ref: tree to judge by, usually of `reference`.
        draws: largest number of draws of each side; the time grows with its third power.
        folds: number of parts of the draws; each is predicted by a classifier that has learned from all other parts.
        permutations: number of permutations of the labels, within folds. If fewer than 10 of them reach the observed
            statistic, more are made, up to data / fdr (at most 2,000), so that a single wrong datum can be flagged.
        fdr: rate of false discoveries among the flagged data (Benjamini & Hochberg 1995).
        seed: random seed for the permutations.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Dimension `data`: `c2st`, the cross-validated accuracy (1/2 if the two sides cannot be told apart; with more
        draws it grows towards the accuracy of the best classifier); `c2st_null` and `c2st_null_sd`, mean and standard
        deviation of the accuracy with permuted labels; `c2st_p`, (1 + permutations that reach the observed statistic) /
        (1 + permutations), where the statistic is the correlation of held-out scores and labels, which also measures
        how sure the classifier is; `c2st_draws`, the number of draws used from each side; `c2st_flagged`. A datum with
        fewer than `4 folds` draws after thinning is not tested: its values are NaN, and it is not flagged.

    Raises:
        InferenceError: for trees that `compare` refuses, without a local continuous latent, or for settings out of
            range.
    """
    progress = reporting(progress)
    _check_settings(draws, folds, permutations, fdr)
    check_same_problem(post, ref)
    names, labels = _local_latents(post, ref), _labels(post, ref)
    entries = varying(Side.read(post, "amortized"), Side.read(ref, "reference"), names)
    most = max(permutations, min(math.ceil(len(labels) / fdr), MAX_PERMUTATIONS))
    generators = np.random.default_rng(stream(seed, "c2st")).spawn(len(labels))
    found: dict[int, _Test] = {}
    progress("classifier test", 0, len(labels))
    sides = zip(_per_datum(post, names, labels), _per_datum(ref, names, labels), strict=True)
    for i, (ours, theirs) in enumerate(sides):
        _check_finite(ours, scalars(ref["posterior"].dataset, names), labels.tolist()[i])
        ours, theirs = ours[..., entries], theirs[..., entries]
        if _usable(theirs):
            samples = _alike(_nearly_independent(post, ours), _nearly_independent(ref, theirs), draws)
            found[i] = _test(*samples, folds, permutations, most, generators[i])
        progress("classifier test", i + 1, len(labels))
    columns = np.array(list(found.values()), dtype=np.float64).reshape(len(found), len(_Test._fields)).T
    result = xr.Dataset({f"c2st{name}": ("data", column) for name, column in zip(_SUFFIXES, columns, strict=True)})
    result = result.assign(
        c2st_draws=result["c2st_draws"].astype(int), c2st_flagged=("data", _flagged(columns[3], fdr))
    )
    attrs = {"c2st_folds": folds, "c2st_permutations": permutations, "c2st_fdr": fdr}
    return result.assign_coords(data=labels[list(found)]).assign_attrs(attrs)


class _Test(NamedTuple):
    accuracy: float
    null: float
    null_sd: float
    p: float
    draws: int


_SUFFIXES = ("", "_null", "_null_sd", "_p", "_draws")


def _check_settings(draws: int, folds: int, permutations: int, fdr: float) -> None:
    if folds < 2 or permutations < 20 or not 0.0 < fdr < 1.0 or draws < 4 * folds:
        raise InferenceError(
            f"draws={draws}, folds={folds}, permutations={permutations}, fdr={fdr}: give 2 folds and 20 permutations "
            "or more, four draws per fold or more, and a rate of false discoveries between 0 and 1"
        )


def _local_latents(post: xr.DataTree, ref: xr.DataTree) -> list[str]:
    ours, theirs = post["posterior"].dataset, ref["posterior"].dataset
    common = [name for name in latent_names(theirs) if name in ours]
    local = [name for name in common if "data" in theirs[name].dims]
    names = [name for name in local if not all(is_discrete(side[name]) for side in (ours, theirs))]
    if not names:
        raise InferenceError(
            f"of the latents {common} none is local and continuous: the classifier test needs such a latent"
        )
    return names


def _labels(post: xr.DataTree, ref: xr.DataTree) -> np.ndarray:
    """The labels of the joined data that pass the gate."""
    passed = passed_labels(ref) & set(data_labels(ref).tolist())
    labels = data_labels(post)
    return labels[[label in passed for label in labels.tolist()]]


def _per_datum(tree: xr.DataTree, names: list[str], labels: np.ndarray) -> Iterator[Array]:
    """The draws of every datum in turn, `(chain, draw, latent)`."""
    place = {label: i for i, label in enumerate(data_labels(tree).tolist())}
    for block in draw_blocks(tree["posterior"].dataset, names, [place[label] for label in labels.tolist()]):
        yield from block


def _check_finite(guide: Array, latents: list[Latent], label: Hashable) -> None:
    finite = np.isfinite(guide).all((0, 1))
    if not finite.all():
        latent = latents[int(finite.argmin())].label
        raise InferenceError(f"draws of the guide are not finite in `{latent}` for datum {label!r}")


def _usable(reference: Array) -> bool:
    """Whether reference draws are finite and vary; `compare` and this test leave out all other data."""
    return bool(np.isfinite(reference).all() and (reference.max((0, 1)) > reference.min((0, 1))).all())


def _nearly_independent(tree: xr.DataTree, draws: Array) -> Array:
    """Draws `(draw, latent)`, thinned if the draws of the tree may be correlated."""
    flat = draws.reshape(-1, draws.shape[2])
    return flat if tree["posterior"].attrs.get("independent_draws", 0) else _spaced(flat, _effective(draws))


def _effective(draws: Array) -> int:
    """Smallest effective sample size of a posterior's draws `(chain, draw, latent)`.

    Since a test of whole distributions also sees spread and direction, the sample size is the smallest over the
    latents, the distances from the median (in each latent and over all), and the principal axes.
    """
    centred = (draws - np.median(draws, axis=(0, 1))) / np.maximum(draws.std((0, 1)), _CONSTANT)
    axes = centred @ np.linalg.eigh(np.cov(centred.reshape(-1, draws.shape[2]).T).reshape(draws.shape[2], -1))[1]
    length = np.linalg.norm(centred, axis=2, keepdims=True)
    sizes = ess(np.concatenate((centred, np.abs(centred), axes, length), axis=2))
    return max(1, math.floor(min(sizes.min(), draws.shape[0] * draws.shape[1])))


def _alike(ours: Array, theirs: Array, most: int) -> tuple[Array, Array]:
    """Select equally many draws of both sides."""
    count = min(len(ours), len(theirs), most)
    return _spaced(ours, count), _spaced(theirs, count)


def _spaced(draws: Array, count: int) -> Array:
    return draws[np.linspace(0, len(draws) - 1, count).astype(int)]


# -- the test ----------------------------------------------------------------------------------------------------------


def _test(
    ours: Array, theirs: Array, folds: int, permutations: int, most: int, generator: np.random.Generator
) -> _Test:
    count = len(ours)
    if count < 4 * folds:
        return _Test(math.nan, math.nan, math.nan, math.nan, count)
    fold = np.tile(np.arange(count) * folds // count, 2)
    side = np.repeat(np.array([1.0, -1.0], dtype=np.float32), count)
    predict = held_out(kernel(np.concatenate((ours, theirs))), fold)
    labels = np.concatenate((side[:, None], _permuted(side, fold, permutations, generator)), 1)
    scores = predict @ labels
    (accuracy, *null), (observed, *reached) = _accuracy(scores, labels), _correlation(scores, labels)
    statistics = np.array(reached)
    if (statistics >= observed).sum() < FEW_REACH and most > permutations:
        labels = _permuted(side, fold, most - permutations, generator)
        statistics = np.concatenate((statistics, _correlation(predict @ labels, labels)))
    # The p-value is exact in two stages too: more permutations are made only if it is below FEW_REACH / (1 +
    # permutations), and they make it smaller no more often than if they were always made.
    p = (1.0 + (statistics >= observed).sum()) / (1.0 + len(statistics))
    return _Test(float(accuracy), float(np.mean(null)), float(np.std(null, ddof=1)), float(p), count)


def kernel(draws: Array) -> Single:
    """Similarity of draws `(draw, latent)` of both sides, `(draw, draw)`, centred, with a mean diagonal of 1.

    It is the mean of three parts, all computed from normal scores: Hermite polynomials up to degree 4 of each latent
    (location, spread, skewness, tails); after whitening, squares and products of all pairs; and a Gaussian kernel with
    the median distance as its width (modes, shapes).
    """
    scores = ndtri((rankdata(draws, axis=0) - 0.5) / len(draws))
    square = scores**2
    marginal = np.concatenate(
        (
            scores,
            (square - 1.0) / math.sqrt(2.0),
            (square - 3.0) * scores / math.sqrt(6.0),
            (square**2 - 6.0 * square + 3.0) / math.sqrt(24.0),
        ),
        axis=1,
    ).astype(np.float32)
    white = _whitened(scores).astype(np.float32)
    products = white @ white.T
    length = np.diagonal(products)
    distance = length[:, None] + length - 2.0 * products
    width = np.median(distance.take(_above_diagonal(len(draws))))
    distance /= -width
    result = _scaled(marginal @ marginal.T)
    result += _scaled(np.square(products, out=products))
    result += _scaled(np.exp(distance, out=distance))
    result -= result.mean(0)
    result -= result.mean(1, keepdims=True)
    return result / np.float32(3.0)


@lru_cache(maxsize=4)
def _above_diagonal(count: int) -> npt.NDArray[np.intp]:
    """The places above the diagonal in a flat square matrix."""
    return np.flatnonzero(np.triu(np.ones((count, count), dtype=bool), 1))


def _whitened(scores: Array) -> Array:
    """Whiten scores, so that errors along a narrow direction of the posterior become visible.

    The covariance is shrunk for few draws of many latents (Ledoit & Wolf 2004, Journal of Multivariate Analysis 88(2)).
    """
    from sklearn.covariance import ledoit_wolf

    values, vectors = np.linalg.eigh(ledoit_wolf(scores)[0])
    return scores @ vectors / np.sqrt(np.maximum(values, 1e-6 * values[-1]))


def _scaled(part: Single) -> Single:
    """A part of the kernel, scaled in place so that it has a mean diagonal of 1 once it is centred."""
    part /= max(part.diagonal().mean() - part.mean(), _CONSTANT)
    return part


def held_out(similarity: Single, fold: npt.NDArray[np.intp]) -> Single:
    """The matrix that maps labels to the scores of ridge regressions, each fitted without the fold that it scores.

    With G = (K + λ)⁻¹, the residual of a fold F that was left out is G_FF⁻¹ (G y)_F: one inverse serves all folds.
    """
    penalised = similarity.copy()
    penalised.flat[:: len(similarity) + 1] += _PENALTY
    potrf, potri = get_lapack_funcs(("potrf", "potri"), (penalised,))
    upper, _ = potri(potrf(penalised)[0])
    inverse = upper + np.triu(upper, 1).T
    result = np.zeros_like(similarity)
    for part in np.unique(fold):
        inside = np.flatnonzero(fold == part)
        rows, own = inverse[inside], inverse[np.ix_(inside, inside)]
        rows[:, inside] = 0.0
        result[inside] = -cho_solve(cho_factor(own), rows)
    return result


def _permuted(side: Single, fold: npt.NDArray[np.intp], permutations: int, generator: np.random.Generator) -> Single:
    """Labels `(draw, permutation)`, permuted within folds, so that every fold keeps half of its labels on each side.

    For all permutations together, each draw of a fold in turn gets one of the labels that are left, at random: many
    times as fast as permuting one column after the other.
    """
    labels = np.empty((len(side), permutations), dtype=np.float32)
    for part in np.unique(fold):
        inside = np.flatnonzero(fold == part)
        uniform = generator.random((len(inside), permutations), dtype=np.float32)
        positive = np.full(permutations, (side[inside] > 0.0).sum(), dtype=np.float32)  # of those that are left
        for place, draw in enumerate(inside):
            taken = uniform[place] * np.float32(len(inside) - place) < positive
            positive -= taken
            labels[draw] = taken
    labels *= 2.0
    labels -= 1.0
    return labels


def _accuracy(scores: Single, labels: Single) -> Array:
    """The share of draws whose score has the sign of their label, for every column `(draw, column)`."""
    return (scores * labels > 0.0).mean(0)


def _correlation(scores: Single, labels: Single) -> Single:
    """Correlation of scores and labels, around zero, for every column `(draw, column)`."""
    products, squares = (np.einsum("dc,dc->c", scores, other) for other in (labels, scores))
    return products / np.sqrt(np.float32(len(scores)) * squares)


def _flagged(p: Array, fdr: float) -> npt.NDArray[np.bool_]:
    flagged = np.zeros(len(p), dtype=bool)
    tested = np.isfinite(p)
    if tested.any():
        flagged[tested] = false_discovery_control(p[tested]) <= fdr
    return flagged
