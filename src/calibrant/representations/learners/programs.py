"""Methods that are Pyro programs: trained by `inference.fit` with the model's own prior as its guide."""

from __future__ import annotations

from math import ceil
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor

from calibrant.data.dataset import Data
from calibrant.errors import DataError, ProgramError
from calibrant.guides.from_prior import prior
from calibrant.inference.fitting.loop import fit
from calibrant.models.registry import create
from calibrant.progress import Progress, silent
from calibrant.representations.learners.labelled import Labelled
from calibrant.representations.learners.learner import History, Learner, Plan
from calibrant.representations.learners.trunks import Inputs, Trunk
from calibrant.representations.tuples import matchable
from calibrant.streams import stream

HEAD = {"widths": (64, 64)}  # hidden layers of the head of κ, which every draw of a datum passes through
_EPOCHS = 4  # passes over the tuples that are drawn, each with an evaluation of the held-out tuples


class ProgramLearner(Learner):
    """A registered model behind the trunk's standardised features.

    The embedding is the model's own, of `latents` dimensions. With `trunk="none"`, the model still has it and trains
    its uncertainty with it, but `embed` returns the features that were given.

    Args:
        inputs: what the network is built for.
        model: name of the model.
        objective: objective of `inference.fit`.
        particles: number of draws per datum, for "iwae".
        arguments: arguments of the model.
    """

    def __init__(self, inputs: Inputs, model: str, objective: str, particles: int, **arguments: Any) -> None:
        super().__init__(inputs)
        self.objective, self.particles = objective, particles
        trunk = Trunk(inputs, embeds=False)
        object.__setattr__(self, "trunk", trunk)  # it is the model's: as a second name, it would be saved twice
        self.model: Any = create(model, shape=inputs.shape, encoder=trunk, **arguments)

    def training_data(self, data: Labelled, count: int, seed: int) -> Data:
        """The data of the program, made of labelled data: `count` tuples, or all data where no tuples are drawn."""
        raise NotImplementedError

    def learn(self, data: Labelled, plan: Plan, seed: int, progress: Progress = silent) -> History:
        if plan.weight_decay:
            raise ProgramError(f"weight_decay={plan.weight_decay}: this method is trained without: leave it out")
        self.trunk.standardise(data)
        train, held = data.split(seed)
        rows = self.training_data(train, ceil(plan.steps / _EPOCHS) * plan.batch_size, stream(seed, "tuples"))
        epochs = max(1, round(plan.steps / max(1, len(rows) // min(plan.batch_size, len(rows)))))
        shown = fit(
            self.model,
            prior(self.model),
            rows,
            validation=self._validation(held, plan, seed, rows),
            epochs=epochs,
            batch_size=plan.batch_size,
            lr=plan.lr,
            objective=self.objective,
            particles=self.particles,
            seed=seed,
            progress=progress,
        )
        score = "bound" if self.objective == "iwae" else "validation"
        return [{"epoch": row["epoch"], "train": -row["train"], "held out": -row[score]} for row in shown.history]

    def _validation(self, held: Labelled, plan: Plan, seed: int, rows: Data) -> Data:
        try:
            return self.training_data(held, max(len(held), 2 * plan.batch_size), stream(seed, "held-out tuples"))
        except DataError:  # so few images that no two held-out ones match
            return rows

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings `(n, m)` of the model, or with `trunk="none"` the features that were given."""
        return super().embed(x) if self.inputs.trunk == "none" else self.model.embed(x)

    def uncertainty(self, x: Tensor) -> Tensor:
        """Uncertainty of each embedding, `(n,)`, as the model has it."""
        return self.model.uncertainty(x)

    @property
    def program(self) -> PyroModule:
        return self.model


class ClassProgram(ProgramLearner):
    """A program whose observation is the class of an image."""

    def __init__(self, inputs: Inputs, model: str, objective: str, particles: int, **arguments: Any) -> None:
        super().__init__(inputs, model, objective, particles, classes=inputs.classes, **arguments)

    def training_data(self, data: Labelled, count: int, seed: int) -> Data:
        return data.as_classes()

    def class_probabilities(self, x: Tensor) -> Tensor:
        return self.model.class_probabilities(x)


class TupleProgram(ProgramLearner):
    """A program whose observation says which images match; classes of a single image are left out."""

    def drawn(self, data: Data, count: int, seed: int) -> Data:
        """Tuples of images of labelled data."""
        raise NotImplementedError

    def training_data(self, data: Labelled, count: int, seed: int) -> Data:
        return self.drawn(matchable(data.data), count, seed)
