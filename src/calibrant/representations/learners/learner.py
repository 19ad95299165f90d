"""What every method is: a module with a loss, an embedding and an uncertainty, and the loop that trains it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from calibrant.errors import NonFiniteLoss, ProgramError
from calibrant.program.environment import seeded
from calibrant.progress import Progress, silent
from calibrant.representations.kinds import is_real, is_whole
from calibrant.representations.learners.labelled import Labelled
from calibrant.representations.learners.trunks import Inputs, Trunk
from calibrant.streams import stream

Values = dict[str, Tensor]
History = list[dict[str, float]]
_EVALUATIONS = 20  # evaluations of the held-out loss in a training


@dataclass(frozen=True)
class Plan:
    """How a method is trained: number of steps, data per step, peak learning rate of Adam, and weight decay."""

    steps: int = 1000
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if not is_whole(value) or value < 1:
                raise ProgramError(f"{name}={value!r}: give a whole number above 0")
            object.__setattr__(self, name, int(value))  # torch takes no whole numbers of numpy
        if not is_real(self.lr) or self.lr <= 0:
            raise ProgramError(f"lr={self.lr!r}: give a number above 0")
        if not is_real(self.weight_decay) or self.weight_decay < 0:
            raise ProgramError(f"weight_decay={self.weight_decay!r}: give a number of 0 or more")


class Learner(nn.Module):
    """Base of the methods.

    Args:
        inputs: what the network is built for.
    """

    trunk: Trunk

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs

    @property
    def program(self) -> PyroModule | None:
        """The Pyro program that the method trains; None where there is none."""
        return None

    def loss(self, values: Values) -> Tensor:
        """The loss of a minibatch `{"x": (n, *shape), "y": (n,) classes from 0, …}`, averaged over its data."""
        raise NotImplementedError

    def learn(self, data: Labelled, plan: Plan, seed: int, progress: Progress = silent) -> History:
        """Train in place on data; returns a row for each evaluation of the held-out loss."""
        self.trunk.standardise(data)
        return descend(self, data, plan, seed, progress)

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings `(n, m)`: the features that were given with `trunk="none"`, else the output of the trunk."""
        return self.trunk.given(x) if self.inputs.trunk == "none" else self.trunk(x)

    def uncertainty(self, x: Tensor) -> Tensor:
        """Uncertainty of each embedding, `(n,)`."""
        raise NotImplementedError

    def class_probabilities(self, x: Tensor) -> Tensor:
        """Probabilities of the classes `(n, classes)`.

        Raises:
            ProgramError: for a method without classes.
        """
        raise ProgramError("this method has no class probabilities: use one that classifies, such as 'classifier'")


def descend(learner: Learner, data: Labelled, plan: Plan, seed: int, progress: Progress = silent) -> History:
    """Minimise the loss of a learner by Adam with cosine decay, and keep the weights with the best held-out loss.

    A tenth of the data is held out. The loss there is computed in eval mode, 20 times.

    Raises:
        NonFiniteLoss: for a loss that is not finite; the best weights so far are restored.
    """
    train, held = data.split(seed)
    weights = [weight for weight in learner.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=plan.lr, weight_decay=plan.weight_decay)
    every, history = max(1, plan.steps // _EVALUATIONS), []
    best, kept = math.inf, copy.deepcopy(learner.state_dict())
    with seeded(stream(seed, "train_representation", "draws")):
        for step, index in enumerate(_minibatches(len(train), plan, seed), start=1):
            for group in optimiser.param_groups:
                group["lr"] = plan.lr * (1 + math.cos(math.pi * (step - 1) / plan.steps)) / 2
            loss = _step(learner, train, index, optimiser)
            if not math.isfinite(loss):
                learner.load_state_dict(kept)
                raise NonFiniteLoss(
                    f"the loss is not finite in step {step}: lower lr={plan.lr:g} (the best weights are restored)",
                    list(train.data.coords["data"][index.numpy()]),
                )
            if step % every == 0 or step == plan.steps:
                value = _held_out(learner, held)
                history.append({"step": step, "train": loss, "held out": value})
                progress("train", step, plan.steps, f"held-out loss {value:.3f}")
                if value < best:
                    best, kept = value, copy.deepcopy(learner.state_dict())
    learner.load_state_dict(kept)
    learner.eval()
    return history


def _minibatches(size: int, plan: Plan, seed: int) -> Iterator[Tensor]:
    """Positions of each minibatch: epochs in random order, whose last, smaller part is skipped."""
    shuffled = torch.Generator().manual_seed(stream(seed, "train_representation", "minibatches"))
    rows, step = min(plan.batch_size, size), 0
    while True:
        for index in torch.randperm(size, generator=shuffled).split(rows)[: size // rows]:
            if step == plan.steps:
                return
            step += 1
            yield index


def _step(learner: Learner, train: Labelled, index: Tensor, optimiser: torch.optim.Optimizer) -> float:
    learner.train()
    optimiser.zero_grad()
    loss = learner.loss(train.batch(index))
    loss.backward()
    optimiser.step()
    return float(loss.detach())


@torch.no_grad()
def _held_out(learner: Learner, held: Labelled) -> float:
    learner.eval()
    losses = [(len(block), float(learner.loss(held.batch(block)))) for block in held.blocks()]
    return sum(count * loss for count, loss in losses) / len(held)
