"""A classifier of latents, trained on fresh draws, of which the best state is kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from calibrant.errors import DataError, InferenceError
from calibrant.evaluation.uncertainty.moments import mean_and_error
from calibrant.progress import Progress, silent
from calibrant.streams import stream

if TYPE_CHECKING:
    from sklearn.neural_network import MLPClassifier

_HELD_OUT = 5  # one image in so many chooses the state, and as many report its accuracy
_AT_ONCE = 10  # draws of an image that are made together
_HELD_OUT_DRAWS = 20  # of every held-out image
_HIDDEN = (50, 50)  # units of the classifier, as in arXiv 2404.15390
_BATCH, _RATE = 64, 3e-3  # of the classifier's training
_TINY = 1e-12  # smallest probability in a log loss

Array = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
Draw = Callable[[Labels, int, int], Array]  # positions of images, number of draws, seed → (image, draw, latent)


@dataclass(frozen=True)
class ReadOut:
    """A classifier of latents.

    Attributes:
        classifier: its best state.
        losses: log loss of the choosing images after every pass, in nats.
        right: whether single draws of images that took no part are classified right, `(image, draw)`.
        right_of_mean: whether their probabilities, averaged over draws, are right, `(image,)`.
    """

    classifier: MLPClassifier
    losses: Array
    right: npt.NDArray[np.bool_]
    right_of_mean: npt.NDArray[np.bool_]

    @property
    def classes(self) -> Labels:
        return np.asarray(self.classifier.classes_)

    def probabilities(self, latents: Array) -> Array:
        """Probabilities `(…, class)` for latents `(…, latent)`."""
        return _probabilities(self.classifier, latents)

    def results(self) -> dict[str, Any]:
        """Accuracies with their errors over images, and losses."""
        found: dict[str, Any] = {"held_out_loss": ("pass", self.losses)}
        for name, right in (("accuracy", self.right.mean(1)), ("accuracy_of_mean", self.right_of_mean)):
            found[name], found[f"{name}_se"] = (((), value) for value in mean_and_error(right.astype(float)))
        return found


def train_read_out(draw: Draw, labels: Labels, passes: int, seed: int, progress: Progress = silent) -> ReadOut:
    """Train a classifier on draws of labelled images, one fresh draw of every image a pass, and keep its best state.

    Args:
        draw: function that draws latents of some of the images.
        labels: classes of all images, `(image,)`.
        passes: number of passes.
        seed: random seed for the split of the images, the draws and the classifier.
        progress: called with (stage, done, total, text).

    Raises:
        DataError: for too few labelled images, or one class.
        InferenceError: for no passes.
    """
    from sklearn.neural_network import MLPClassifier

    if passes < 1:
        raise InferenceError(f"passes={passes}: give at least one pass over the labelled images")
    if len(np.unique(labels)) < 2:
        raise DataError("labels hold one class: two are needed")
    of = partial(stream, seed, "read-out")
    order, held_out = np.random.default_rng(of("split")).permutation(len(labels)), len(labels) // _HELD_OUT
    if held_out < 2:
        raise DataError(f"{len(labels)} labelled images are too few: a fifth of them chooses the classifier")
    choosing, reporting, training = np.split(order, [held_out, 2 * held_out])
    chosen_by = draw(choosing, _HELD_OUT_DRAWS, of("choosing"))
    steps = {"batch_size": min(_BATCH, len(training)), "learning_rate_init": _RATE}
    classifier = MLPClassifier(_HIDDEN, random_state=of("classifier") % 2**32, **steps)
    best, losses = classifier, []
    for done, latents in enumerate(_fresh(draw, training, passes, of)):
        classifier.partial_fit(latents, labels[training], classes=np.unique(labels))
        losses.append(_log_loss(classifier, chosen_by, labels[choosing]))
        if losses[-1] == min(losses):
            best = copy.deepcopy(classifier)
        progress("classifier", done + 1, passes)
    found = _probabilities(best, draw(reporting, _HELD_OUT_DRAWS, of("reporting")))
    right = best.classes_[found.argmax(-1)] == labels[reporting, None]
    right_of_mean = best.classes_[found.mean(1).argmax(-1)] == labels[reporting]
    return ReadOut(best, np.array(losses), right, right_of_mean)


def _fresh(draw: Draw, images: Labels, passes: int, of: Callable[..., int]) -> Iterator[Array]:
    """One draw of every image for each pass, `(image, latent)`, made some passes at a time."""
    for first in range(0, passes, _AT_ONCE):
        draws = draw(images, min(_AT_ONCE, passes - first), of("training", first))
        yield from np.moveaxis(draws, 1, 0)


def _probabilities(classifier: MLPClassifier, latents: Array) -> Array:
    found = np.asarray(classifier.predict_proba(latents.reshape(-1, latents.shape[-1])))
    return found.reshape(*latents.shape[:-1], -1)


def _log_loss(classifier: MLPClassifier, latents: Array, labels: Labels) -> float:
    """Log loss of single draws, in nats."""
    place = np.searchsorted(classifier.classes_, labels)
    found = np.take_along_axis(_probabilities(classifier, latents), place[:, None, None], -1)
    return float(-np.log(np.maximum(found, _TINY)).mean())
