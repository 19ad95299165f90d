"""Active learning: which images to label next, by uncertainty, class entropy, coverage or chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy.special import entr
from torch import Tensor

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.representations.crossed import Variables, crossed_difference, crossed_share, stacked
from calibrant.evaluation.representations.given import two_matrices
from calibrant.evaluation.representations.inputs import Labels, class_labels, image_numbers
from calibrant.evaluation.statistics.arrays import Array, Given, plain
from calibrant.evaluation.statistics.resampling import Groups
from calibrant.evaluation.statistics.settings import real, whole
from calibrant.progress import Progress, reporting
from calibrant.streams import stream

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

RANDOM = "random"
ACQUISITIONS = (RANDOM, "uncertainty", "least uncertainty", "entropy", "k-centre")

_STEPS = 1000  # of the classifier's optimiser, at most


class Oracle(Protocol):
    """Labels that are asked for at positions `(n,)`, such as an array, or an object that records what is asked."""

    def __getitem__(self, positions: Any, /) -> Any: ...


def active_learning(
    pool: Given,
    labels: Oracle,
    uncertainty: Given,
    test: Given,
    test_labels: Labels,
    acquisitions: Sequence[str] = (RANDOM, "uncertainty", "entropy", "k-centre"),
    *,
    start: int = 20,
    batch: int = 20,
    rounds: int = 10,
    repeats: int = 10,
    regularisation: float = 1.0,
    seed: int = 0,
    progress: Progress | bool = True,
) -> xr.Dataset:
    """Learning curves of a linear classifier that asks for the labels of some images of a pool.

    In every repetition all acquisitions start with the same random images. In every round they ask for the labels of
    the images that score highest, ties in random order, and a logistic regression on standardised features is fitted
    to all labels that are known. Labels of other images are never read.

    Args:
        pool: features of the images that can be labelled, `(image, feature)`.
        labels: their labels, which are read by `labels[positions]` when they are acquired, and not before.
        uncertainty: of the pool, larger for less certain images, `(image,)`.
        test: features of the images that judge the classifier, `(test, feature)`.
        test_labels: their labels, `(test,)`.
        acquisitions: "uncertainty": the largest ones; "least uncertainty": the smallest ones, a control; "entropy":
            largest entropy of the current classifier; "k-centre": the image that is farthest from all known ones, one
            after the other (Sener & Savarese 2018, arXiv 1708.00489). "random" is always among them, to be compared
            with.
        start: number of random images that are labelled at the start.
        batch: number of images labelled in each round.
        rounds: number of rounds.
        repeats: number of repetitions, with other starts and other random images.
        regularisation: inverse strength C of the classifier's penalty.
        seed: random seed for starts, random images and ties.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).

    Returns:
        Over `acquisition`, with `…_se` and the ends of a 95% interval, `…_low` and `…_high`, which count the chance of
        repetitions and of test images: `accuracy` (acquisition, labelled), where `labelled` is the number of known
        labels; `area`, the accuracy averaged over the curve; `gain`, the area minus that of "random", paired by
        repetition and test image. `accuracy_of_repeat` (acquisition, repeat, labelled), `area_of_repeat`, and `order`
        (acquisition, repeat, position): the images in the order in which they were labelled.

    Raises:
        DataError: for features, labels or uncertainties that cannot be used.
        InferenceError: for unknown acquisitions, or more labels than images.
    """
    progress = reporting(progress)
    named, seed = _named(acquisitions), whole(seed, "seed", 0)
    plan = _Plan(start, batch, rounds, regularisation)
    ours, theirs = _standardised(pool, test)
    course = _Course(plan, ours, theirs, class_labels(test_labels, len(theirs), "test_labels"))
    scores = image_numbers(uncertainty, len(course.pool), "uncertainty")
    plan.check(len(course.pool), repeats)
    labels = _oracle(labels, len(course.pool))
    of = partial(stream, seed, "active_learning")
    right = np.empty((len(named), repeats, rounds + 1, len(course.test)), dtype=bool)
    order = np.empty((len(named), repeats, start + batch * rounds), dtype=np.int64)
    for repeat in range(repeats):
        begin = np.random.default_rng(of("start", repeat)).permutation(len(course.pool))[:start]
        for i, name in enumerate(named):
            generator = np.random.default_rng(of(name, repeat))
            order[i, repeat], right[i, repeat] = course.run(name, begin, labels, scores, generator)
        progress("active learning", repeat + 1, repeats)
    return _curves(right, order, named, plan.counts)


def _named(acquisitions: Sequence[str]) -> list[str]:
    named = list(dict.fromkeys([RANDOM, *acquisitions]))
    if unknown := [name for name in named if name not in ACQUISITIONS]:
        raise InferenceError(f"acquisitions {unknown} are unknown: give some of {list(ACQUISITIONS)}")
    return named


def _oracle(labels: Any, images: int) -> Oracle:
    """Labels that can be read at several positions; lists become arrays, and other objects are not touched."""
    if isinstance(labels, list | tuple):
        labels = plain(labels, "labels")
    if isinstance(labels, np.ndarray | Tensor) and len(labels) != images:
        raise DataError(f"labels: {len(labels)} of them for {images} images of the pool; give one for each")
    if not hasattr(labels, "__getitem__"):
        raise DataError(f"labels: {type(labels).__name__}; give an array, or what is read by labels[positions]")
    return labels


def _asked(oracle: Oracle, positions: Groups) -> np.ndarray:
    """The labels at these positions."""
    return class_labels(oracle[positions], len(positions))


def _standardised(pool: Given, test: Given) -> tuple[Array, Array]:
    """Features of both in units of the pool's standard deviations, about the pool's means."""
    ours, theirs = (rows.astype(np.float64) for rows in two_matrices(pool, test, ("pool", "test")))
    mean, sd = ours.mean(0), ours.std(0)
    sd = np.where(sd > 0, sd, 1.0)
    return (ours - mean) / sd, (theirs - mean) / sd


@dataclass(frozen=True)
class _Plan:
    start: int
    batch: int
    rounds: int
    regularisation: float

    @property
    def counts(self) -> Groups:
        """Numbers of known labels."""
        return self.start + self.batch * np.arange(self.rounds + 1)

    def check(self, images: int, repeats: int) -> None:
        counts = {"start": self.start, "batch": self.batch, "rounds": self.rounds, "repeats": repeats}
        for name, count in counts.items():
            whole(count, name, 1)
        if not 0 < real(self.regularisation, "regularisation") < np.inf:
            raise InferenceError(f"regularisation={self.regularisation}: give a finite number above 0")
        if self.counts[-1] > images:
            raise InferenceError(
                f"start={self.start}, batch={self.batch}, rounds={self.rounds}: {self.counts[-1]} labels of a pool of "
                f"{images} images; ask for fewer"
            )


@dataclass(frozen=True)
class _Course:
    """The pool, the images that judge, and how a repetition goes."""

    plan: _Plan
    pool: Array
    test: Array
    test_labels: np.ndarray

    def run(
        self, name: str, begin: Groups, oracle: Oracle, scores: Array, generator: np.random.Generator
    ) -> tuple[Groups, npt.NDArray[np.bool_]]:
        """The images in the order of labelling, and which test images are right after each round, `(round, test)`."""
        known, right = begin, []
        labels = _asked(oracle, begin)
        if (labels.dtype.kind in "US") != (self.test_labels.dtype.kind in "US"):
            raise DataError("labels and test_labels: one holds names and the other numbers; give the same classes")
        for number in range(self.plan.rounds + 1):
            classifier = _fitted(self.pool[known], labels, self.plan.regularisation)
            right.append(_predicted(classifier, labels, self.test) == self.test_labels)
            if number == self.plan.rounds:
                break
            free = generator.permutation(np.setdiff1d(np.arange(len(self.pool)), known))  # ties in random order
            chosen = self._chosen(name, free, known, scores, classifier)
            known = np.concatenate([known, chosen])
            labels = np.concatenate([labels, _asked(oracle, chosen)])
        return known, np.array(right)

    def _chosen(
        self, name: str, free: Groups, known: Groups, scores: Array, classifier: LogisticRegression | None
    ) -> Groups:
        """The images to label next, of those that are free."""
        if name == "k-centre":
            return free[_farthest(self.pool[free], self.pool[known], self.plan.batch)]
        values = {
            RANDOM: lambda: np.zeros(len(free)),
            "uncertainty": lambda: scores[free],
            "least uncertainty": lambda: -scores[free],
            "entropy": lambda: _entropies(classifier, self.pool[free]),
        }[name]()
        return free[np.argsort(-values, kind="stable")[: self.plan.batch]]


def _fitted(features: Array, labels: np.ndarray, regularisation: float) -> LogisticRegression | None:
    """A logistic regression; None if all labels are of one class."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(labels)) < 2:
        return None
    return LogisticRegression(C=regularisation, max_iter=_STEPS).fit(features, labels)


def _predicted(classifier: LogisticRegression | None, labels: np.ndarray, features: Array) -> np.ndarray:
    return np.full(len(features), labels[0]) if classifier is None else np.asarray(classifier.predict(features))


def _entropies(classifier: LogisticRegression | None, features: Array) -> Array:
    """Entropy of the class probabilities in nats, `(image,)`."""
    if classifier is None:
        return np.zeros(len(features))
    return np.asarray(entr(classifier.predict_proba(features)).sum(1))


def _farthest(free: Array, known: Array, count: int) -> Groups:
    """Positions of rows that are farthest from all known ones and from those chosen before, one after the other."""
    nearest = np.full(len(free), np.inf)
    for one in known:
        nearest = np.minimum(nearest, ((free - one) ** 2).sum(1))
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((free - free[chosen[-1]]) ** 2).sum(1))
        nearest[chosen[-1]] = -np.inf
    return np.array(chosen)


def _curves(right: npt.NDArray[np.bool_], order: Groups, named: Sequence[str], counts: Groups) -> xr.Dataset:
    """Accuracies, areas and gains of `(acquisition, repeat, round, test)`."""
    weights = np.ones(right.shape[2])
    weights[[0, -1]] = 0.5  # trapezoids
    areas = np.einsum("arkt,k->art", right, weights / weights.sum())
    of_round = right.astype(np.float64).swapaxes(1, 2)
    accuracy = [[crossed_share(repeats) for repeats in rounds] for rounds in of_round]
    variables: Variables = stacked("accuracy", ("acquisition", "labelled"), accuracy)
    variables |= stacked("area", ("acquisition",), [crossed_share(area) for area in areas])
    gains = [crossed_difference(area - areas[named.index(RANDOM)]) for area in areas]
    variables |= stacked("gain", ("acquisition",), gains)
    variables["accuracy_of_repeat"] = (("acquisition", "repeat", "labelled"), right.mean(-1))
    variables["area_of_repeat"] = (("acquisition", "repeat"), areas.mean(-1))
    variables["order"] = (("acquisition", "repeat", "position"), order)
    return xr.Dataset(variables, coords={"acquisition": list(named), "labelled": counts})
