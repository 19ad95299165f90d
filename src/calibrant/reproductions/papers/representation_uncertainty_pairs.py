"""Programs of the controlled experiment: pairs with their latents integrated out, and with the published sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from calibrant.data.dataset import Data
from calibrant.distributions.matching import match_probability
from calibrant.distributions.published import PublishedVonMisesFisher
from calibrant.models.hib import HIB
from calibrant.models.mcinfonce import MCInfoNCE
from calibrant.models.pair import Pair
from calibrant.models.parts.embeddings import Embedding, RepresentationModel
from calibrant.representations.generator import Generator

LARGEST = 160.0  # concentration up to which the integrated likelihood is exact


class IntegratedPair(RepresentationModel):
    """Whether two inputs match, with both latents integrated out: y ~ Bernoulli(E σ(k z₁·z₂ + b)), without draws.

    Args:
        embedding: p(z|x), von Mises–Fisher.
        slope: k.
    """

    loss_kind = "exact"

    def __init__(self, embedding: Embedding, slope: float) -> None:
        super().__init__()
        self.embedding, self.slope = embedding, slope

    def forward(self, size: int, x: Tensor, other: Tensor) -> Tensor:
        (mu, kappa), (mu_other, kappa_other) = self.embedding(x), self.embedding(other)
        cosine = (mu * mu_other).sum(-1)
        match = match_probability(cosine, kappa, kappa_other, mu.shape[-1], self.slope, largest=LARGEST)
        with pyro.plate("data", size):
            return pyro.sample("y", dist.Bernoulli(probs=match))


class PublishedEmbedding(Embedding):
    """p(z|x) from which draws are taken by the sampler of the published code."""

    def distribution(self, x: Tensor, draws: int | None = None) -> Any:
        """p(z|x) of inputs `(…, *shape)`, for one draw."""
        return PublishedVonMisesFisher(*self(x))


def model_of(settings: Mapping[str, Any]) -> RepresentationModel:
    """The program that a row trains."""
    latents = settings.get("assumed latents", settings["latents"])
    encoder = {"direction": settings["direction"], "concentration": settings["concentration"]}
    if "width" in settings["direction"]:
        encoder["direction"] = {**settings["direction"], "width": latents}
    shape, slope = (settings["features"],), settings.get("assumed slope", settings["slope"])
    common = {"encoder": encoder, "posterior": settings.get("posterior", "vmf"), "start": settings["start"]}
    kind = settings.get("model", "integrated")
    if kind == "integrated":
        return IntegratedPair(Embedding(shape, latents, **common), slope)
    if kind == "hib":
        return HIB(shape, latents, slope=slope, **common)
    if kind == "mcinfonce":
        return MCInfoNCE(shape, latents, concentration=slope, **common)
    pair = Pair(shape, latents, concentration=slope, **common)
    if settings.get("sampler") == "published":
        pair.embedding = PublishedEmbedding(shape, latents, **common)
    return pair


def data_of(settings: Mapping[str, Any], generator: Generator, count: int, seed: int) -> Data:
    """Data of a row's scheme: random or near pairs, pairs by rejection, shuffled pairs, or tuples by rejection."""
    if settings.get("model") == "mcinfonce":
        return generator.tuples(count, seed, settings["negatives"])
    if settings.get("rejection"):
        return _of_tuples(generator.tuples(count // 2, seed, 1))
    data = generator.pairs(count, seed, settings.get("near", 0.0))
    if not settings.get("shuffled"):
        return data
    observed, covariates = data.tensors()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return Data({"y": observed["y"][order]}, covariates)


def _of_tuples(tuples: Data) -> Data:
    """A pair that matches and one that does not from each tuple."""
    _, covariates = tuples.tensors()
    x, candidates = covariates["x"], covariates["candidates"]
    y = torch.tensor([1.0, 0.0]).repeat(len(x))
    return Data({"y": y}, {"x": x.repeat_interleave(2, 0), "other": candidates.flatten(0, 1)})


def train_concentration(model: RepresentationModel, trained: bool) -> None:
    """Whether the network of κ is trained."""
    parts: tuple[nn.Module, ...] = (model.embedding.own_network, model.embedding.concentration)
    for part in parts:
        part.requires_grad_(trained)
