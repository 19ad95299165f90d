"""Programs of pairs of images that match or do not."""

from __future__ import annotations

from math import log
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor
from torch.nn.functional import logsigmoid

from calibrant.errors import ProgramError
from calibrant.models.parts.embeddings import Embedding, RepresentationModel


class PairModel(RepresentationModel):
    """y ~ Bernoulli(logits = log odds of zᵀz′), for embeddings z of `x` and z′ of `other`.

    With M > 1 draws, each image has M embeddings, and p(y | all of them) is the mean over all M² pairs, for less noise
    in training. p(y | x, x′) is the same for every M. The posterior is that of M embeddings, and with M = 1 that of
    one: `model.draws = 1` sets it after training.

    Attributes:
        draws: M.
    """

    def __init__(self, embedding: Embedding, draws: int) -> None:
        super().__init__()
        if draws < 1:
            raise ProgramError(f"draws={draws}: give 1 or more")
        self.embedding, self.draws = embedding, draws

    @property
    def dims(self) -> dict[str, list[str]]:
        """Names of the dimensions of the latents."""
        each = ["feature"] if self.draws == 1 else ["sample", "feature"]
        return {"z": each, "z_other": each}

    def forward(self, size: int, x: Tensor, other: Tensor) -> Tensor:
        with pyro.plate("data", size):
            z = pyro.sample("z", self._embedded(x))
            z_other = pyro.sample("z_other", self._embedded(other))
            if self.draws == 1:
                return pyro.sample("y", dist.Bernoulli(logits=self.log_odds((z * z_other).sum(-1))))
            odds = self.log_odds(z @ z_other.mT).flatten(1)
            return pyro.sample("y", dist.Bernoulli(logits=mean_log(logsigmoid(odds)) - mean_log(logsigmoid(-odds))))

    def log_odds(self, product: Tensor) -> Tensor:
        """The log odds of a match, for products zᵀz′ of any shape."""
        raise NotImplementedError

    def _embedded(self, x: Tensor) -> Any:
        return self.embedding.distribution(x, None if self.draws == 1 else self.draws)


def mean_log(logs: Tensor, dim: int = -1) -> Tensor:
    """The log of the mean of exp over a dimension."""
    return logs.logsumexp(dim) - log(logs.shape[dim])
