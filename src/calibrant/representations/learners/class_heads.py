"""Classifiers on an embedding, and what they say of its uncertainty."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from calibrant.models.parts.classes import entropy
from calibrant.representations.learners.learner import Learner, Values
from calibrant.representations.learners.trunks import Inputs, Trunk


class ClassLearner(Learner):
    """A linear classifier on the trunk's output, trained by cross-entropy; uncertainty: class entropy in nats."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.trunk = Trunk(inputs)
        self.head = nn.Linear(self.trunk.features, inputs.classes)

    def logits(self, x: Tensor) -> Tensor:
        """Logits `(n, classes)`."""
        return self.head(self.trunk(x))

    def loss(self, values: Values) -> Tensor:
        return functional.cross_entropy(self.logits(values["x"]), values["y"])

    def class_probabilities(self, x: Tensor) -> Tensor:
        return self.logits(x).softmax(-1)

    def uncertainty(self, x: Tensor) -> Tensor:
        """Entropy of the class probabilities in nats, `(n,)`."""
        return entropy(self.class_probabilities(x))


def mutual_information(probabilities: Tensor) -> Tensor:
    """Generalised Jensen–Shannon divergence of K distributions `(n, K, classes)`, in nats: H(mean) − mean H.

    It is the mutual information between the class and the choice of one of the K.
    """
    return (entropy(probabilities.mean(1)) - entropy(probabilities).mean(1)).clamp(min=0)
