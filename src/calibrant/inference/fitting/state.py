"""The settings, the state and the result of a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.data.dataset import Data
from calibrant.errors import InferenceError
from calibrant.guides.many_draws import fixed
from calibrant.inference.fitting.curves import training_figure
from calibrant.inference.fitting.kl_weights import Schedules, last_weights, weights_at
from calibrant.inference.fitting.objectives import MULTI_SAMPLE, OBJECTIVES, ElboTerms, elbo_terms
from calibrant.inference.graphs.of_modules import Gradient, Recorded
from calibrant.program.contract import Values
from calibrant.program.modules import is_frozen, settled_parts
from calibrant.shown import Shown, counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RISE = 0.03  # share of all steps in which the learning rate rises
RECORDED_FROM = 500  # least number of steps, or of passes over the held-out data, for which a graph is recorded
_SAVED = 10  # steps between checkpoints; in longer epochs, one per epoch
_EVALUATED = 10  # steps between evaluations of the held-out ELBO; in longer epochs, one per epoch

WHY = {
    "finished": "all of them",
    "early": "stopped early, since the held-out ELBO rose no more",
    "interrupted": "interrupted",
    "still rising": "and the held-out ELBO was still rising: give more `epochs`",
}
HELD_OUT = {True: "held-out ELBO", False: "held-out value of a training loss, no ELBO:"}


@dataclass(repr=False)
class Fit(Shown):
    """The result of a training.

    Attributes:
        history: one row per epoch with `epoch`, `train` and `validation` ELBO (nats per datum), `lr`; under "iwae" and
            "dreg" also `bound`, the held-out value of the bound that they maximise. With `kl_weights`, `objective` is
            the held-out value of the weighted objective under the last of these weights, and `weight of NAME` the
            weight at the end of the epoch. Where the likelihood has a noise scale that is learned or measured, `noise`
            is its root mean square at the end of the epoch, in data units (`noise of PATH` for each of several). If an
            epoch has fewer than ten steps, held-out values are computed every few epochs, and repeated in between.
        elbo: held-out ELBO of the weights that were kept, nats per datum, from fresh draws. The held-out data were also
            used to choose these weights among the epochs; for a figure to publish, evaluate on other data.
        elbo_se: standard error of `elbo` over held-out data and draws.
        is_elbo: whether the values are those of an ELBO. If not, the likelihood is a training loss and no density:
            `elbo` and `history` then hold the negative loss, which is no bound on the evidence of these data (that of
            "cross-entropy" bounds the mean log probability of random binarisations of grey images).
        kl_weights: the weights of the divergences in what was maximised, latent → points (epoch, weight); empty where
            it was the ELBO. `elbo`, and `train` and `validation` of the history, are never weighted.
        epochs: number of epochs that were run.
        stopped: why training ended: "finished", "early" (`patience` ran out), "interrupted", or "still rising", if the
            held-out ELBO was far from its final value when the epochs were over: give `epochs` a larger number.
        held_out: labels of the held-out data; empty if they were given, or if none were held out.
    """

    history: list[dict[str, float]] = field(default_factory=list)
    elbo: float = -math.inf
    elbo_se: float = math.nan
    is_elbo: bool = True
    kl_weights: Schedules = field(default_factory=dict)
    epochs: int = 0
    stopped: str = "finished"
    held_out: list[Any] = field(default_factory=list)

    def facts(self) -> dict[str, str]:
        """The held-out ELBO, how the training went and why it ended."""
        error = "" if math.isnan(self.elbo_se) else f" ± {self.elbo_se:.2f}"
        found = {HELD_OUT[self.is_elbo].rstrip(":"): f"{self.elbo:.2f}{error} nats per datum"}
        found["epochs"] = f"{self.epochs}, {WHY.get(self.stopped, self.stopped)}"
        if self.history:
            ends = (self.history[0], self.history[-1])
            found |= {key: " → ".join(f"{row[key]:.2f}" for row in ends) for key in ("train", "validation")}
        if self.kl_weights:
            found["weights of the KL divergences"] = ", ".join(f"`{name}`" for name in self.kl_weights)
        if self.held_out:
            found["held out"] = counted(len(self.held_out), "datum", "data")
        return found

    def plot(self) -> Figure:
        """ELBO of training and held-out data over epochs, and the noise scale where one is learned or measured.

        Raises:
            InferenceError: for a training of fewer than two epochs.
        """
        from calibrant.evaluation.reporting.style import COLOURS

        if len(self.history) < 2:
            raise InferenceError(f"a training of {counted(len(self.history), 'epoch', 'epochs')} has no curve to draw")
        return training_figure([("", COLOURS[0], self.history)])

    def __str__(self) -> str:
        weighted = f", trained with weights of the KL divergences of {', '.join(self.kl_weights)}"
        return f"{HELD_OUT[self.is_elbo]} {self.elbo:.2f}{weighted if self.kl_weights else ''}"


class Modules(nn.Module):
    """Model and guide in one module, with one set of weights."""

    def __init__(self, model: PyroModule, guide: PyroModule) -> None:
        super().__init__()
        self.model, self.guide = model, guide

    @property
    def device(self) -> torch.device:
        return next((t.device for t in chain(self.parameters(), self.buffers())), torch.device("cpu"))

    @property
    def settled(self) -> dict[str, Any]:
        """The modules, by path, whose noise scale is the error of the training set; none in a frozen model."""
        return {} if is_frozen(self.model) else settled_parts(self.model)

    def train(self, mode: bool = True) -> Modules:
        super().train(mode)
        for part in settled_parts(self.model).values() if is_frozen(self.model) else ():
            part.eval()  # its density is that of the scale that it has
        return self


@dataclass(frozen=True)
class Plan:
    """The settings of a training."""

    objective: str
    particles: int
    epochs: int
    batch_size: int
    lr: float
    clip: float
    patience: int
    compile: bool | Literal["auto"]
    seed: int
    kl_weights: Schedules = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise InferenceError(f"particles={self.particles}: give the number of draws per datum, 1 or more")

    def steps(self, total: int, epochs: int | None = None) -> int:
        """Number of steps in these epochs, or in all."""
        return (self.epochs if epochs is None else epochs) * (total // self.batch_size)

    def is_due(self, steps: int, epoch: int, total: int) -> bool:
        """Whether something that happens every `steps` steps, or every epoch if epochs are longer, is due."""
        return epoch % max(1, steps // (total // self.batch_size)) == 0

    def saves(self, epochs: int, total: int) -> bool:
        """Whether a checkpoint is written after `epochs` epochs."""
        return epochs == self.epochs or self.is_due(_SAVED, epochs, total)

    def evaluates(self, epoch: int, total: int) -> bool:
        """Whether the held-out ELBO is computed in an epoch, counted from 0."""
        return epoch + 1 == self.epochs or self.is_due(_EVALUATED, epoch, total)

    def records(self, runs: int) -> bool:
        """Whether a graph is recorded for a function that runs `runs` times."""
        return runs >= RECORDED_FROM if self.compile == "auto" else self.compile

    @property
    def terms(self) -> Callable[..., ElboTerms]:
        """The objective, as a function of (model, guide, observed, size, covariates)."""
        function = OBJECTIVES[self.objective]
        return partial(function, particles=self.particles) if self.objective in MULTI_SAMPLE else function

    @property
    def score(self) -> str:
        """The column of the history with the value that is maximised; empty where that is the ELBO."""
        return "bound" if self.objective in MULTI_SAMPLE else "objective" if self.kl_weights else ""

    @property
    def evaluation(self) -> Callable[..., ElboTerms]:
        """The function that computes the terms of the held-out data."""
        if self.objective in MULTI_SAMPLE:
            return torch.no_grad()(self.terms)
        return partial(elbo_terms, kl_weights=last_weights(self.kl_weights))

    def kl_weights_at(self, epochs: float) -> dict[str, Tensor]:
        """The weights of the divergences after a number of epochs, as tensors, since graphs keep other numbers."""
        return {name: torch.tensor(weight) for name, weight in weights_at(self.kl_weights, epochs).items()}

    def learning_rate(self, progress: float) -> float:
        """Learning rate at a share of the training: a linear rise at first, with cosine decay to zero."""
        return self.lr * min(1.0, progress / _RISE) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass
class TrainingState:
    """Everything that changes during training, and the settings, which must not change.

    `settled` has the modules of the model, by path, whose noise scale is the error of the training set.
    """

    modules: Modules
    gradient: Gradient
    evaluation: Recorded
    optimizer: torch.optim.Adam
    best: dict[str, Tensor]
    settings: dict[str, Any]
    settled: dict[str, Any]
    score: float = -math.inf
    waited: int = 0
    gradient_norm: float = 0.0
    fit: Fit = field(default_factory=Fit)


def initial_state(modules: Modules, plan: Plan, train: Data, held: Data) -> TrainingState:
    gradient = Gradient(modules, partial(_objective, modules, plan, len(train)))
    if not gradient.weights:
        raise InferenceError("neither the model nor the guide has a weight that takes a gradient: nothing to train")
    settings = {
        **asdict(plan),
        "kl_weights": plan.kl_weights or None,  # checkpoints of earlier versions have none
        "random streams": "named by purpose",
        "training data": len(train),
        "held-out data": len(held),
    }
    evaluation = Recorded(modules, partial(_evaluation, modules, plan))
    adam, best = gradient.adam(plan.lr), copy_of_weights(modules)
    return TrainingState(modules, gradient, evaluation, adam, best, settings, modules.settled)


def _objective(
    modules: Modules, plan: Plan, total: int, observed: Values, covariates: Values, kl_weights: Values
) -> tuple[Tensor, Tensor]:
    """The objective, which is maximised, and the ELBO in nats per datum."""
    weighted = {"kl_weights": kl_weights} if kl_weights else {}
    with fixed(modules.guide):
        terms = plan.terms(modules.model, modules.guide, observed, plan.batch_size, covariates, **weighted)
    return terms.maximised(total), terms.per_datum(total)


def _evaluation(modules: Modules, plan: Plan, observed: Values, covariates: Values) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of held-out data: local terms, the shared term, and the local terms of the objective."""
    size = len(next(iter(observed.values())))
    with fixed(modules.guide):
        terms = plan.evaluation(modules.model, modules.guide, observed, size, covariates)
    return terms.local, terms.shared, terms.local if terms.bound is None else terms.bound


def copy_of_weights(modules: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in modules.state_dict().items()}
