"""Two scalars for two kinds of uncertainty: whether a pair finds errors and other data where each alone fails."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations.crossed import Variables
from calibrant.evaluation.representations.inputs import image_numbers
from calibrant.evaluation.statistics.arrays import Array, Given, numbers, plain
from calibrant.evaluation.statistics.counted import counted_auroc
from calibrant.evaluation.statistics.resampling import Estimate, Statistic, bootstrap
from calibrant.evaluation.statistics.settings import shares
from calibrant.streams import stream

SINGLES = ("aleatoric", "epistemic")
PAIRS = ("largest rank", "sum of ranks", "logistic")
TASKS = ("errors", "outside", "mixed")

Mask = npt.NDArray[np.bool_]


def uncertainty_pair(
    aleatoric: Given,
    epistemic: Given,
    correct: npt.ArrayLike,
    outside: tuple[Given, Given],
    outside_correct: npt.ArrayLike | None = None,
    *,
    held_out: float = 0.5,
    resamples: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """AUROCs of an aleatoric scalar, an epistemic one, and combinations of both, on errors, on other data, and on both.

    A part of the images is held out. Ranks are shares of the held-out inside images that have a smaller value. The
    logistic regression of failures on the two ranks is fitted to all held-out images, those from elsewhere too, so that
    it knows what the other combinations do not. The remaining images are judged.

    Args:
        aleatoric: such as 1/κ or a predicted loss, of inside images, `(n,)`; larger means less certain.
        epistemic: such as `feature_distance`, of the same images, `(n,)`.
        correct: whether each of these is retrieved or classified correctly, `(n,)`.
        outside: aleatoric and epistemic scalars of images from elsewhere, `(m,)` each.
        outside_correct: whether each of those is correct, `(m,)`; without it, none is.
        held_out: share of the images that ranks and regression are fitted to.
        resamples: number of bootstrap resamples of the judged images, inside and outside apart.
        seed: random seed for the choice of held-out images and for the bootstrap.

    Returns:
        With `…_se` and the ends of a 95% interval, `…_low` and `…_high`: `auroc` (task, score). Tasks: "errors", wrong
        against correct inside images (R-AUROC); "outside", images from elsewhere against inside images; "mixed", all
        that is wrong against all that is correct. Scores: "aleatoric", "epistemic", "largest rank", "sum of ranks",
        "logistic". `gain` (task, pair, single): the AUROC of the pair minus that of the single scalar on the same
        images; `gain_over_better` (task, pair): minus that of the better one. `worst` (score): the smaller one of the
        AUROCs for errors and outside; `worst_gain` (pair): the worst of the pair minus the better worst of both
        singles. Without an interval, 1 or 0: `wins` (task, pair) and `worst_wins` (pair), whether `gain_over_better`
        and `worst_gain` are above 0 beyond chance. NaN
        where no image is wrong, or none correct. `judged` (image) and `judged_outside` (outside_image): whether an
        image was judged, and not held out.

    Raises:
        DataError: for scalars that are not finite or differ in number.
        InferenceError: for a share that leaves too few images to fit or to judge.
    """
    if not isinstance(outside, tuple | list) or len(outside) != 2:
        raise DataError("outside: give two of them, (aleatoric, epistemic) of the images from elsewhere")
    given = (_Scalars.of(aleatoric, epistemic, correct), _Scalars.of(*outside, outside_correct))
    held_out = shares([held_out], "held_out")[0]
    smallest = min(len(side.wrong) for side in given) * min(held_out, 1 - held_out)
    if smallest < 2:
        raise InferenceError(f"held_out={held_out}: leave at least two images of both kinds to fit, and two to judge")
    fits = [_held_out(side, held_out, stream(seed, "uncertainty_pair", place)) for place, side in enumerate(given)]
    fitted, fitted_outside = (side.some(fit) for side, fit in zip(given, fits, strict=True))
    judged, judged_outside = (side.some(~fit) for side, fit in zip(given, fits, strict=True))
    scores = _scores((fitted, fitted_outside), (judged, judged_outside))
    sizes = (len(judged.wrong), len(judged_outside.wrong))
    wrong = np.concatenate([judged.wrong, judged_outside.wrong])
    found = bootstrap(_aurocs(scores, wrong, sizes[0]), [np.arange(size) for size in sizes], resamples, seed)
    variables = {**_named(found), "judged": (("image",), ~fits[0]), "judged_outside": (("outside_image",), ~fits[1])}
    coords = {"task": list(TASKS), "score": [*SINGLES, *PAIRS], "pair": list(PAIRS), "single": list(SINGLES)}
    return xr.Dataset(variables, coords, {"held_out": held_out, "seed": seed})


class _Scalars(NamedTuple):
    """Both scalars `(image, 2)`, and whether each image is wrong `(image,)`."""

    values: Array
    wrong: Mask

    @classmethod
    def of(cls, aleatoric: Given, epistemic: Given, correct: npt.ArrayLike | None) -> _Scalars:
        size = numbers(aleatoric, "aleatoric").size
        pair = zip((aleatoric, epistemic), SINGLES, strict=True)
        values = np.stack([image_numbers(values, size, name) for values, name in pair], 1)
        if correct is None:
            return cls(values, np.ones(size, dtype=bool))
        right = image_numbers(plain(correct, "correct"), size, "correct")
        if not np.isin(right, (0, 1)).all():
            raise DataError("correct: some are neither 0 nor 1; give whether each image is correct, no probabilities")
        return cls(values, right == 0)

    def some(self, chosen: Mask) -> _Scalars:
        return _Scalars(self.values[chosen], self.wrong[chosen])


def _held_out(side: _Scalars, share: float, seed: int) -> Mask:
    """A share of the images at random, `(image,)`."""
    size = len(side.wrong)
    return np.random.default_rng(seed).permutation(size) < round(share * size)


def _scores(fitted: tuple[_Scalars, _Scalars], judged: tuple[_Scalars, _Scalars]) -> Array:
    """All scores of the judged images, inside before outside, `(score, image)`."""
    inside = np.sort(fitted[0].values, axis=0)
    values = np.concatenate([side.values for side in judged])
    ranks = _ranks(values, inside)
    known = _ranks(np.concatenate([side.values for side in fitted]), inside)
    logistic = _logistic(known, np.concatenate([side.wrong for side in fitted]), ranks)
    return np.stack([*values.T, ranks.max(1), ranks.sum(1), logistic])


def _ranks(values: Array, inside: Array) -> Array:
    """Share of the sorted inside values below each value, a tie counting one half, `(image, 2)`."""
    columns = [
        (np.searchsorted(known, given) + np.searchsorted(known, given, side="right")) / (2 * len(known))
        for known, given in zip(inside.T, values.T, strict=True)
    ]
    return np.stack(columns, 1)


def _logistic(known: Array, wrong: Mask, ranks: Array) -> Array:
    """Log odds of a failure, from a regression on the known images; 0 if all or none of these fail."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(wrong)) < 2:
        return np.zeros(len(ranks))
    return np.asarray(LogisticRegression().fit(known, wrong).decision_function(ranks))


def _aurocs(scores: Array, wrong: Mask, inside: int) -> Statistic:
    """AUROCs of every task and score, and what follows from them, as a function of counts; see `_named`."""
    errors = [counted_auroc(score[:inside], wrong[:inside]) for score in scores]
    elsewhere = np.arange(len(wrong)) >= inside
    outside, mixed = ([counted_auroc(score, marked) for score in scores] for marked in (elsewhere, wrong))

    def aurocs(counts: Array) -> Array:
        of_errors = np.stack([auroc(counts[:, :inside]) for auroc in errors], 1)
        of_all = [np.stack([auroc(counts) for auroc in task], 1) for task in (outside, mixed)]
        found = np.stack([of_errors, *of_all], 1)  # (resample, task, score)
        gains = found[:, :, len(SINGLES) :, None] - found[:, :, None, : len(SINGLES)]
        over_better = gains.min(-1)
        worst = found[:, :2].min(1)
        worst_gain = worst[:, len(SINGLES) :] - worst[:, : len(SINGLES)].max(1, keepdims=True)
        parts = (found, gains, over_better, worst, worst_gain)
        return np.concatenate([part.reshape(len(counts), -1) for part in parts], 1)

    return aurocs


def _named(found: Estimate) -> Variables:
    """Variables of what `_aurocs` puts side by side."""
    shapes = {
        "auroc": {"task": len(TASKS), "score": len(SINGLES + PAIRS)},
        "gain": {"task": len(TASKS), "pair": len(PAIRS), "single": len(SINGLES)},
        "gain_over_better": {"task": len(TASKS), "pair": len(PAIRS)},
        "worst": {"score": len(SINGLES + PAIRS)},
        "worst_gain": {"pair": len(PAIRS)},
    }
    variables: Variables = {}
    start = 0
    for name, shape in shapes.items():
        sizes = tuple(shape.values())
        stop = start + int(np.prod(sizes))
        variables |= Estimate(*(part[start:stop].reshape(sizes) for part in found)).variables(name, tuple(shape))
        start = stop
    for name, of in (("wins", "gain_over_better"), ("worst_wins", "worst_gain")):
        dims, low = variables[f"{of}_low"]
        variables[name] = (dims, (low > 0).astype(int))
    return variables
