"""Loss prediction: a head that learns how large the classifier's loss of each image is, or which of two is larger."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from calibrant.errors import ProgramError
from calibrant.progress import Progress, silent
from calibrant.representations.learners.class_heads import ClassLearner
from calibrant.representations.learners.labelled import Labelled
from calibrant.representations.learners.learner import History, Plan, Values
from calibrant.representations.learners.registry import register_method
from calibrant.representations.learners.trunks import Inputs

FORMS = ("order", "value")
_LEAST = 1e-6  # added to every uncertainty, as in the published code


class LossHead(nn.Sequential):
    """Two hidden layers with LeakyReLU, then softplus: features `(n, features)` → uncertainty `(n,)` above 1e-6."""

    def __init__(self, features: int, width: int = 512) -> None:
        super().__init__(
            *(nn.Linear(features, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU(), nn.Linear(width, 1)),
            nn.Softplus(),
        )

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).squeeze(-1) + _LEAST


def order_loss(uncertainty: Tensor, losses: Tensor, margin: float = 0.1) -> Tensor:
    """Mean hinge of the pairs (0, 1), (2, 3), … of a batch: max(0, margin − s (u_i − u_j)), where s is the sign of
    ℓ_i − ℓ_j.

    Pretrained visual uncertainties, Kirchhof et al. 2024, arXiv 2402.16569. A pair of equal losses counts as the
    margin: it says nothing about the order. The last datum of an odd batch has no partner, and is ignored; a single
    datum has the loss 0.

    Args:
        uncertainty: predictions u, `(n,)`.
        losses: the losses ℓ to be put in order, `(n,)`, which get no gradient.
        margin: the least difference that a pair in the right order must have.
    """
    pairs = len(losses) // 2 * 2
    first, second = (values.reshape(-1, 2).unbind(1) for values in (uncertainty[:pairs], losses.detach()[:pairs]))
    return (margin - (second[0] - second[1]).sign() * (first[0] - first[1])).clamp(min=0).sum() / max(1, pairs // 2)


@register_method(
    "loss-prediction",
    paper="Kirchhof et al. 2024, arXiv 2402.16569 (order); Yoo & Kweon 2019 and Kirchhof et al. 2023 (value)",
    about="a classifier, and a head that orders images by its loss (hinge of pairs) or predicts the loss (squares)",
    unit="no unit (order), or nats of cross-entropy (value)",
    plan=Plan(steps=600),
)
class LossPrediction(ClassLearner):
    """A classifier, and a head on its embedding that predicts its cross-entropy.

    Data with a key `loss` `(n,)` bring the losses that are learned; there is no classifier then.

    Args:
        inputs: what the network is built for.
        form: "order" for the order of the losses of pairs (a hinge), "value" for the losses themselves (squares).
        margin: margin of the hinge, in units of the uncertainty.
        weight: weight of the head's loss beside the cross-entropy.
        head: width of the head's two hidden layers.
        stop_gradient: whether the head's loss trains the head alone; if not, it also trains the trunk, where it
            conflicts with the cross-entropy.
    """

    def __init__(
        self,
        inputs: Inputs,
        form: str = "order",
        margin: float = 0.1,
        weight: float = 1.0,
        head: int = 512,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__(inputs)
        if form not in FORMS:
            raise ProgramError(f"form={form!r}: give one of {', '.join(map(repr, FORMS))}")
        self.form, self.margin, self.weight, self.stop_gradient = form, margin, weight, stop_gradient
        self.losses = LossHead(self.trunk.features, head)

    def learn(self, data: Labelled, plan: Plan, seed: int, progress: Progress = silent) -> History:
        if self.form == "order" and plan.batch_size < 2:
            raise ProgramError(f"batch_size={plan.batch_size}: pairs are put in order, give 2 or more, or form='value'")
        return super().learn(data, plan, seed, progress)

    def loss(self, values: Values) -> Tensor:
        embedding = self.trunk(values["x"])
        uncertainty = self.losses(embedding.detach() if self.stop_gradient else embedding)
        if "loss" in values:
            return self._of_head(uncertainty, values["loss"])
        each = functional.cross_entropy(self.head(embedding), values["y"], reduction="none")
        return each.mean() + self.weight * self._of_head(uncertainty, each.detach())

    def _of_head(self, uncertainty: Tensor, losses: Tensor) -> Tensor:
        if self.form == "order":
            return order_loss(uncertainty, losses, self.margin)
        return (uncertainty - losses).pow(2).mean()

    def uncertainty(self, x: Tensor) -> Tensor:
        """The head's prediction `(n,)`: without a unit for "order", nats of cross-entropy for "value"."""
        return self.losses(self.trunk(x))
