"""Training on batches of pairs, in which the candidates of an image are the other images of its batch."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from calibrant.errors import ProgramError
from calibrant.models.mcinfonce import MCInfoNCE
from calibrant.models.parts.embeddings import RepresentationModel
from calibrant.models.parts.matching import MatchLoss, of_tuple
from calibrant.models.parts.two_images import PairModel, mean_log


class SharedNegatives(PyroModule):
    """A training estimator: the loss of a model over whole batches, whose images are each other's negatives.

    A datum is a batch of B images `x` with their matches `other`, all of different classes, as
    `representations.batches` makes them. Each image is embedded M times. For `mcinfonce`, image i has the matches of
    the whole batch as candidates, its own as the first; for `pair` and `hib`, it matches its own and none of the
    rest, which count as their mean.

    The loss of a batch is −Σ_i log mean_m p_i(z_m), with the same draws z_m for all i: an estimate of −Σ_i log E p_i,
    too high by an amount that falls as 1/M. It is not −log E Π_i p_i, which a program of dependent images would have.
    So it is a training loss and no density: `fit` takes it with `guides.prior` and `objective="stl"`, and everything
    else refuses it. Its weights are those of the model, with which `posterior`, `reference` and `check` go on, on pairs
    or tuples of their own.

    Args:
        model: a model `mcinfonce`, `pair` or `hib`, whose weights are trained.
        draws: M.

    Raises:
        ProgramError: for another model, or fewer than one draw.
    """

    loss_kind = "none"

    def __init__(self, model: RepresentationModel, draws: int = 16) -> None:
        super().__init__()
        if not isinstance(model, MCInfoNCE | PairModel):
            raise ProgramError(
                f"SharedNegatives takes a model 'mcinfonce', 'pair' or 'hib', whose embeddings are drawn, not "
                f"{type(model).__name__}: train that one on representations.candidates(...) or on labels"
            )
        if draws < 1:
            raise ProgramError(f"draws={draws}: give 1 or more")
        self.shared = nn.ModuleList([model])  # Pyro would rename the sites of a module of its own
        self.draws = draws

    @property
    def model(self) -> RepresentationModel:
        """The model whose weights are trained."""
        model: Any = self.shared[0]
        return model

    def forward(self, size: int, x: Tensor, other: Tensor) -> Tensor:
        embedding = self.model.embedding
        with pyro.plate("data", size):
            z, z_other = (
                pyro.sample(name, embedding.distribution(images, self.draws).to_event(1))
                for name, images in (("z", x), ("z_other", other))
            )
            products = torch.einsum("nimf,njmf->nmij", z, z_other)
            return pyro.sample("y", SharedLoss(logits=self.of_images(products).sum(-1)))

    def of_images(self, products: Tensor) -> Tensor:
        """log mean_m p_i, `(size, B)`, from products `(size, M, B, B)` of all images with the matches of all."""
        own, rest, model = products.diagonal(dim1=-2, dim2=-1), _off_diagonal(products), self.model
        if isinstance(model, PairModel):
            apart = mean_log(logsigmoid(-model.log_odds(rest)), 1)
            return mean_log(logsigmoid(model.log_odds(own)), 1) + apart.mean(-1)
        assert isinstance(model, MCInfoNCE)
        is_softmax = model.form == "categorical"
        similarities = model.k * torch.cat([own[..., None], rest], -1)
        each = of_tuple("published" if is_softmax else model.form, similarities.flatten(0, -2), average=not is_softmax)
        return mean_log(each.log_prob(similarities.new_ones(())).reshape(own.shape), 1)


def _off_diagonal(products: Tensor) -> Tensor:
    """`(…, B, B)` without the diagonal, `(…, B, B − 1)`."""
    batch = products.shape[-1]
    skewed = products.flatten(-2)[..., 1:].unflatten(-1, (batch - 1, batch + 1))[..., :-1]
    return skewed.reshape(*products.shape[:-1], batch - 1)


class SharedLoss(MatchLoss):
    """The loss of a batch, whose images are each other's negatives."""

    instead = (
        "the images of a batch are each other's negatives, so that they are no data of their own. Take the model "
        "inside, SharedNegatives(model).model, with representations.pairs(...) or representations.candidates(...)"
    )
