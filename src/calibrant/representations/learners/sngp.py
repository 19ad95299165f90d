"""SNGP: a Gaussian process in random Fourier features as the last layer, whose variance grows away from the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from calibrant.errors import ProgramError
from calibrant.models.parts.classes import entropy
from calibrant.progress import Progress, silent
from calibrant.representations.learners.labelled import Labelled
from calibrant.representations.learners.learner import History, Learner, Plan, Values
from calibrant.representations.learners.registry import register_method
from calibrant.representations.learners.trunks import Inputs, Trunk

MEAN_FIELD = math.pi / 8
SCORES = ("entropy", "variance")


@register_method(
    "sngp",
    paper="Liu et al. 2020, arXiv 2006.10108; as in Kirchhof et al. 2023 (URL), arXiv 2307.03810",
    about="a Gaussian process with random Fourier features on the embedding, by cross-entropy and Laplace's method",
    unit="class entropy in nats, or posterior variance of a logit",
)
class SNGP(Learner):
    """Random Fourier features φ of the embedding, a linear layer on them, and the posterior variance of its logits.

    With the precision Σ φφᵀ over the training data plus `ridge` times the identity, the variance of every logit is
    ridge · φᵀ (precision)⁻¹ φ: about 1 far from the data, as under the prior, and nearly 0 among them. One variance
    serves all classes, as in the published code, which leaves out the factor p (1 − p) of the softmax.

    Class probabilities are those of logits / √(1 + factor · variance), the mean field approximation of the expected
    softmax. The paper sets the factor to π/8. The published layers have 1 as default (and up to 25 in their
    experiments), and URL has 1.

    Args:
        inputs: what the network is built for.
        fourier: number of random Fourier features.
        length: length scale of the Gaussian kernel, in units of √m times the standard deviation of an entry of the
            embedding at first.
        ridge: precision of the prior of the linear layer's weights, in units of one training datum.
        momentum: −1 for the exact precision, from one pass over the training data after the last step; from 0 to 1 for
            a running mean of φφᵀ over minibatches, each with the weight 1 − momentum, times the number of data.
        factor: factor of the variance in the mean field approximation.
        spectral: largest spectral norm of the trunk's layers; None for no limit.
        score: "entropy" for class entropy, "variance" for the variance of a logit.
    """

    frequencies: Tensor
    phases: Tensor
    gram: Tensor
    covariance: Tensor

    def __init__(
        self,
        inputs: Inputs,
        fourier: int = 1024,
        length: float = 1.0,
        ridge: float = 1.0,
        momentum: float = -1.0,
        factor: float = MEAN_FIELD,
        spectral: float | None = None,
        score: str = "entropy",
    ) -> None:
        super().__init__(inputs)
        if not (ridge > 0 and length > 0):
            raise ProgramError(f"ridge={ridge}, length={length}: give numbers above 0")
        if momentum != -1 and not 0 <= momentum < 1:
            raise ProgramError(f"momentum={momentum}: give -1 for the exact precision, or a number from 0, below 1")
        if score not in SCORES:
            raise ProgramError(f"score={score!r}: give one of {', '.join(map(repr, SCORES))}")
        self.ridge, self.momentum, self.factor, self.score = ridge, momentum, factor, score
        self.trunk = Trunk(inputs)
        if spectral is not None:
            _limit(self.trunk, spectral)
        features = self.trunk.features
        self.register_buffer("frequencies", torch.randn(features, fourier) / (length * math.sqrt(features)))
        self.register_buffer("phases", 2 * math.pi * torch.rand(fourier))
        self.register_buffer("gram", torch.zeros(fourier, fourier))
        self.register_buffer("covariance", torch.eye(fourier))
        self.head = nn.Linear(fourier, inputs.classes)

    def fourier_features(self, x: Tensor) -> Tensor:
        """Random Fourier features `(n, fourier)`, whose squares add up to about 1."""
        angles = self.trunk(x) @ self.frequencies + self.phases
        return math.sqrt(2 / len(self.phases)) * angles.cos()

    def loss(self, values: Values) -> Tensor:
        features = self.fourier_features(values["x"])
        if self.training and self.momentum >= 0:
            self._run(features.detach())
        return functional.cross_entropy(self.head(features), values["y"])

    @torch.no_grad()
    def _run(self, features: Tensor) -> None:
        """Update the running mean of φφᵀ."""
        self.gram.lerp_(features.T @ features / len(features), 1 - self.momentum)

    def learn(self, data: Labelled, plan: Plan, seed: int, progress: Progress = silent) -> History:
        history = super().learn(data, plan, seed, progress)
        self.set_covariance(data)
        return history

    @torch.no_grad()
    def set_covariance(self, data: Labelled) -> None:
        """Store ridge · (ridge · 1 + Σ φφᵀ)⁻¹ over the data, or with their number times the running mean of φφᵀ."""
        if self.momentum < 0:
            self.gram.zero_()
            for block in data.blocks():
                features = self.fourier_features(data.batch(block)["x"])
                self.gram += features.T @ features / len(data)
        precision = len(data) * self.gram.double() + self.ridge * torch.eye(len(self.gram), dtype=torch.float64)
        self.covariance.copy_(self.ridge * torch.cholesky_inverse(torch.linalg.cholesky(precision)))

    def variance(self, x: Tensor) -> Tensor:
        """Posterior variance of a logit, `(n,)`, from about 0 among the training data to about 1 far from them."""
        features = self.fourier_features(x)
        return ((features @ self.covariance) * features).sum(-1).clamp(min=0)

    def class_probabilities(self, x: Tensor) -> Tensor:
        logits = self.head(self.fourier_features(x))
        return (logits / (1 + self.factor * self.variance(x)).sqrt()[:, None]).softmax(-1)

    def uncertainty(self, x: Tensor) -> Tensor:
        """Entropy of the class probabilities in nats, or posterior variance of a logit: `(n,)`."""
        return self.variance(x) if self.score == "variance" else entropy(self.class_probabilities(x))


def _limit(trunk: nn.Module, limit: float) -> None:
    """Keep the spectral norm of all linear layers of a trunk at most at a limit."""
    for part in list(trunk.modules()):
        if isinstance(part, nn.Linear):
            parametrize.register_parametrization(part, "weight", _Limited(limit))


class _Limited(nn.Module):
    """A weight matrix that is divided by its spectral norm, in units of a limit, where the norm is above the limit."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, weight: Tensor) -> Tensor:
        return weight / (torch.linalg.matrix_norm(weight, 2) / self.limit).clamp(min=1)
