"""Training a representation by the name of its method, and the trained representation as a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.calls import parameters_in_modules
from calibrant.data.arrays import Array
from calibrant.data.dataset import Data, as_data
from calibrant.models.parts.networks import checked_inputs
from calibrant.progress import Progress, reporting
from calibrant.representations.keeping import read, write
from calibrant.representations.learners.labelled import Labelled, floating, rows_at_once
from calibrant.representations.learners.learner import History, Learner
from calibrant.representations.learners.registry import METHODS, build
from calibrant.representations.learners.trunks import Inputs
from calibrant.streams import stream


@dataclass
class Trained:
    """A trained representation.

    Attributes:
        method: name of the method.
        learner: the networks, in `eval()`; its `inputs` are the arguments that all methods have.
        classes: labels of the training data, in the order of the class probabilities.
        arguments: arguments of the method.
        history: losses during the training.
    """

    method: str
    learner: Learner
    classes: np.ndarray
    arguments: dict[str, Any]
    history: History

    @property
    def program(self) -> PyroModule | None:
        """The Pyro program that the method trains, or None; it counts classes from 0, in the order of `classes`."""
        return self.learner.program

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings `(n, m)` of inputs `(n, *shape)`; with `trunk="none"` the features that were given.

        Raises:
            DataError: for inputs of another shape, or values that are not finite.
        """
        return self._in_blocks(self.learner.embed, x)

    def uncertainty(self, x: Tensor) -> Tensor:
        """Uncertainty of each embedding, `(n,)`, in the unit that the card of the method says; larger is less certain.

        Raises:
            DataError: for inputs of another shape, or values that are not finite.
        """
        return self._in_blocks(self.learner.uncertainty, x)

    def class_probabilities(self, x: Tensor) -> Tensor:
        """Probabilities of the training classes `(n, classes)`, in the order of `classes`.

        Raises:
            ProgramError: for a method without classes.
            DataError: for inputs of another shape, or values that are not finite.
        """
        return self._in_blocks(self.learner.class_probabilities, x)

    def save(self, file: str | Path, half: bool = False) -> Path:
        """Write weights and arguments to one file (safetensors, with JSON in its header) for `load_representation`.

        The weights of a frozen backbone are not in it; their sha256 is.

        Args:
            file: the file; folders that are missing are made.
            half: whether to store weights as float16, with half the size and 1/2048 of a weight as largest error.

        Raises:
            RunError: for the name of a folder, arguments of the method that have no JSON form, or weights that float16
                cannot hold.
        """
        about = {name: getattr(self, name) for name in ("method", "arguments", "history")}
        return write(file, self.learner, {**about, "classes": self.classes.tolist()}, half)

    @torch.no_grad()
    def _in_blocks(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        shape = self.learner.inputs.shape
        rows = checked_inputs(x, shape, "this representation")
        self.learner.eval()
        dtype = next(self.learner.buffers()).dtype
        with parameters_in_modules():
            return torch.cat([function(floating(block).to(dtype)) for block in rows.split(rows_at_once(shape))])


def train_representation(
    method: str,
    data: Data | Mapping[str, Array],
    *,
    seed: int = 0,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    trunk: str = "none",
    latents: int = 16,
    width: int = 256,
    backbone: nn.Module | None = None,
    progress: Progress | bool = True,
    **arguments: Any,
) -> Trained:
    """Train a representation with an uncertainty on labelled data.

    All methods share one architecture: inputs (or the features of a backbone), standardised by mean and standard
    deviation of the training data, then a trunk. A tenth of the data is held out, and the weights with the best
    held-out loss are kept.

    Args:
        method: a name of `methods()`; `method_card(name)` says what it trains.
        data: inputs `x` `(n, *shape)`, features or images, and labels `y` `(n,)`, as observations or covariates; or a
            dict of both. Images of whole numbers, from 0 to 255, are divided by 255.
        seed: random seed for initial weights, the split, minibatches and draws.
        steps: number of steps; None for the number of the method's card.
        batch_size: number of data (or of tuples) per step; None for that of the card.
        lr: peak learning rate of Adam, which decays to zero; None for that of the card.
        weight_decay: decoupled weight decay; None for that of the card.
        trunk: "none" leaves the embedding as it is given, so that methods differ in their uncertainty alone; "linear"
            or "mlp" for an embedding that is learned, of `latents` dimensions.
        latents: dimension of the embedding that is learned.
        width: width of the hidden layer of "mlp".
        backbone: a module from inputs `(n, *shape)` to features `(n, features)` in front of the trunk, such as that of
            `backbone(…)`. It is frozen if all its weights are (`requires_grad=False`); else a copy of it is trained.
            A frozen one is not copied: it is set to `eval()`, and stays so.
        progress: whether bars are shown in a terminal or notebook, or a function (stage, done, total, text).
        arguments: arguments of the method, such as `passes` of "mc-dropout".

    Raises:
        ProgramError: for an unknown method or argument.
        DataError: for data without `x` and `y`, or fewer than two classes.
        NonFiniteLoss: for a loss that is not finite.
    """
    progress = reporting(progress)
    card = METHODS[method]
    given: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "lr": lr, "weight_decay": weight_decay}
    plan = replace(card.plan, **{name: value for name, value in given.items() if value is not None})
    labelled = Labelled(as_data(data))
    inputs = Inputs(labelled.shape, len(labelled.classes), trunk, latents, width, backbone)
    learner = build(card, inputs, arguments, stream(seed, "train_representation", "weights"))
    history = learner.learn(labelled, plan, seed, progress)
    return Trained(method, learner.eval(), labelled.classes, dict(arguments), history)


def load_representation(file: str | Path, backbone: nn.Module | None = None) -> Trained:
    """Load a representation that `Trained.save` wrote.

    Args:
        file: the file.
        backbone: the backbone that it was trained with: with the same weights if it was frozen, else the same network,
            whose weights are replaced by those of the file.

    Raises:
        RunError: for a file that is missing, damaged, of another version, or made with another backbone.
    """
    found = read(file, backbone)
    return Trained(**{**found, "classes": np.array(found["classes"])})
