"""Ensembles of classifiers: several last layers on one embedding, or several networks."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibrant.errors import ProgramError
from calibrant.models.parts.classes import entropy
from calibrant.progress import Progress, prefixed, silent
from calibrant.representations.learners.class_heads import mutual_information
from calibrant.representations.learners.class_programs import Classifier
from calibrant.representations.learners.labelled import Labelled
from calibrant.representations.learners.learner import History, Learner, Plan, Values
from calibrant.representations.learners.registry import register_method
from calibrant.representations.learners.trunks import Inputs, Trunk
from calibrant.streams import stream

FORMS, SCORES = ("shallow", "deep"), ("entropy", "jsd")


@register_method(
    "ensemble",
    paper="Lakshminarayanan et al. 2017, arXiv 1612.01474; shallow as in Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="several classifiers on one embedding (shallow), or several networks (deep), by cross-entropy of each",
    unit="entropy of the mean class probabilities, or Jensen–Shannon divergence of the members, in nats",
)
class Ensemble(Learner):
    """An ensemble of classifiers.

    Args:
        inputs: what the network is built for.
        form: "shallow" for several linear classifiers on one embedding, "deep" for networks with initial weights and
            minibatches of their own. The embedding of "deep" holds those of all members, as unit vectors that are
            scaled such that a cosine is the mean of the members' cosines.
        members: number of classifiers.
        score: "entropy" for the entropy of the mean probabilities, "jsd" for H(mean) − mean H.
    """

    def __init__(self, inputs: Inputs, form: str = "shallow", members: int = 10, score: str = "entropy") -> None:
        super().__init__(inputs)
        if form not in FORMS:
            raise ProgramError(f"form={form!r}: give one of {', '.join(map(repr, FORMS))}")
        if score not in SCORES:
            raise ProgramError(f"score={score!r}: give one of {', '.join(map(repr, SCORES))}")
        self.form, self.score, self.members = form, score, members
        if form == "shallow":
            self.trunk = Trunk(inputs)
            self.heads = nn.Linear(self.trunk.features, members * inputs.classes)
        else:
            self.networks = nn.ModuleList(Classifier(inputs) for _ in range(members))

    def learn(self, data: Labelled, plan: Plan, seed: int, progress: Progress = silent) -> History:
        if self.form == "shallow":
            return super().learn(data, plan, seed, progress)
        history: History = []
        for number, network in enumerate(self._learners()):
            own = seed if number == 0 else stream(seed, "ensemble", number)
            rows = network.learn(data, plan, own, prefixed(progress, f"member {number + 1}"))
            history += [{"member": number, **row} for row in rows]
        return history

    def _learners(self) -> list[Learner]:
        return [cast(Learner, network) for network in self.networks]

    def loss(self, values: Values) -> Tensor:
        logits = self._logits_of_heads(values["x"])
        return functional.cross_entropy(logits.flatten(0, 1), values["y"].repeat_interleave(self.members))

    def _logits_of_heads(self, x: Tensor) -> Tensor:
        return self.heads(self.trunk(x)).unflatten(-1, (self.members, -1))

    def of_members(self, x: Tensor) -> Tensor:
        """Class probabilities of every member, `(n, members, classes)`."""
        if self.form == "shallow":
            return self._logits_of_heads(x).softmax(-1)
        return torch.stack([network.class_probabilities(x) for network in self._learners()], 1)

    def embed(self, x: Tensor) -> Tensor:
        """Embeddings `(n, m)`, or for "deep" `(n, members · m)`; with `trunk="none"` the features that were given."""
        if self.form == "shallow":
            return super().embed(x)
        parts = [network.embed(x) for network in self._learners()]
        if self.inputs.trunk == "none":
            return parts[0]
        return torch.cat([functional.normalize(part, dim=-1) for part in parts], -1) / self.members**0.5

    def class_probabilities(self, x: Tensor) -> Tensor:
        return self.of_members(x).mean(1)

    def uncertainty(self, x: Tensor) -> Tensor:
        """Entropy of the mean probabilities, or Jensen–Shannon divergence of the members, in nats: `(n,)`."""
        each = self.of_members(x)
        return mutual_information(each) if self.score == "jsd" else entropy(each.mean(1))
