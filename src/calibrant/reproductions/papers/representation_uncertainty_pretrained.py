"""Pretrained visual uncertainties (arXiv 2402.16569): why the uncertainty head must not reach into the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from calibrant.data.dataset import Data
from calibrant.data.people import human_labels
from calibrant.errors import DataError
from calibrant.evaluation.representations.conflicts import gradient_conflict
from calibrant.evaluation.representations.people import human_entropy
from calibrant.evaluation.statistics.separation import separation
from calibrant.representations.learners.loss_prediction import LossPrediction, order_loss
from calibrant.representations.small_networks import small_network
from calibrant.representations.trained import Trained, train_representation
from calibrant.reproductions.cards import Needs, Ordering, Target
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Summary
from calibrant.reproductions.papers.representation_uncertainty import PAPER
from calibrant.reproductions.papers.representation_uncertainty_features import measured
from calibrant.reproductions.registering import register_experiment

DOMAIN = "pretrained"
CIFAR = Needs("cifar10", keys=("x", "y"), quick={"train": 6_000, "validation": 600, "test": 2_000})
STOPPED, FREE = "with StopGrad", "without StopGrad"
ACCURACY, COSINE, CONFLICT = "accuracy", "gradient cosine", "conflicting batches"
PREDICTED, ENTROPY = "predicted loss", "class entropy"
WRONG, PEOPLE, WITHIN = "AUROC of errors", "people", "people within classes"
_BATCH = 128  # images for a gradient


def _of(number: str, score: str) -> str:
    return f"{number}, {score}"


_UNITS = {
    WRONG: "whether wrongly classified images are the less certain ones",
    PEOPLE: "Spearman's correlation with the entropy of human labels",
    WITHIN: "the same among images of one class",
}
NUMBERS = {
    ACCURACY: "of test images",
    **{
        _of(WRONG, score): "whether wrongly classified images are the less certain ones"
        for score in (PREDICTED, ENTROPY)
    },
    **{_of(PEOPLE, score): "Spearman's correlation with the entropy of human labels" for score in (PREDICTED, ENTROPY)},
    **{_of(WITHIN, score): "the same among images of one class" for score in (PREDICTED, ENTROPY)},
    COSINE: "of the gradients of both losses in the network",
    CONFLICT: "share of batches with a negative cosine",
}
BECAUSE = (
    "the paper has ImageNet, a ViT and the weights at the end of training, where here those with the best held-out "
    "loss are kept"
)
TARGETS = (
    Target(STOPPED, ACCURACY, 0.7959, because=BECAUSE),
    Target(FREE, ACCURACY, 0.768, because=BECAUSE),
    Target(STOPPED, _of(WRONG, PREDICTED), 0.8236, because=BECAUSE),
    Target(FREE, _of(WRONG, PREDICTED), 0.79, because=BECAUSE),
)


def _tell(found: Found) -> Summary:
    gain = found.difference(STOPPED, FREE, ACCURACY)
    return Summary(
        [
            f"To stop the gradient of the uncertainty changes the accuracy by {gain} and the AUROC of errors by "
            f"{found.difference(STOPPED, FREE, _of(WRONG, PREDICTED))}.",
            f"Without it, the two losses pull the network apart in {found.mean(FREE, CONFLICT)} of the batches.",
            f"Errors are told by the entropy of the classes with an AUROC of "
            f"{found.mean(STOPPED, _of(WRONG, ENTROPY))}, by the predicted loss with "
            f"{found.mean(STOPPED, _of(WRONG, PREDICTED))}. With the entropy of human labels they correlate by "
            f"{found.mean(STOPPED, _of(PEOPLE, ENTROPY))} and {found.mean(STOPPED, _of(PEOPLE, PREDICTED))}, within "
            f"classes by {found.mean(STOPPED, _of(WITHIN, ENTROPY))} and "
            f"{found.mean(STOPPED, _of(WITHIN, PREDICTED))}.",
        ]
    )


REDUCED = "A small convolutional network on CIFAR-10 in place of a vision transformer on ImageNet."


@register_experiment(
    PAPER,
    "stop-gradient",
    domain=DOMAIN,
    answers="gradient conflict, Figure 3 of arXiv 2402.16569",
    shows="What it costs the classifier if the uncertainty head trains the network too.",
    rows={STOPPED: {"stop_gradient": True}, FREE: {"stop_gradient": False}},
    numbers=NUMBERS,
    needs=(CIFAR,),
    settings={"start": 2_000, "steps": 4_000, "batch_size": 128, "lr": 1e-3, "batches": 40},
    quick={"start": 120, "steps": 160, "batches": 16},
    reduced=REDUCED,
    reduced_quick=f"{REDUCED} 6,000 images, 120 + 160 steps.",
    minutes=(1, 15),
    seeds=(2, 3),
    targets=TARGETS,
    orderings=(
        Ordering(
            ACCURACY,
            (FREE, STOPPED),
            "a stopped gradient leaves the classifier more accurate, with the best held-out weights of each",
        ),
    ),
    summarise=_tell,
)
def stop_gradient(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train a network, then the network and its uncertainty head together."""
    settings, train = context.settings, context.splits["train"]
    network = small_network(
        train, context.stream("network"), settings["start"], fine_tuned=True, progress=context.progress
    )
    trained = train_representation(
        "loss-prediction", train, seed=context.stream("head"), backbone=network, trunk="none",
        progress=context.progress, **{name: settings[name] for name in ("steps", "batch_size", "lr")},
        **context.arguments,
    )  # fmt: skip
    return {**_scores(trained, context.splits["test"]), **_conflict(context, trained)}


def _scores(trained: Trained, test: Data) -> dict[str, Any]:
    """Accuracy, and what both scores say of errors and of people."""
    observed, covariates = test.tensors()
    values = observed | covariates
    probabilities = trained.class_probabilities(values["x"])
    wrong = (probabilities.argmax(1) != values["y"]).numpy()
    scores = {
        PREDICTED: trained.uncertainty(values["x"]).numpy(),
        ENTROPY: torch.special.entr(probabilities).sum(1).numpy(),
    }
    found: dict[str, Any] = {ACCURACY: Measured.of(~wrong)}
    for name, score in scores.items():
        of_errors = separation(score[wrong], score[~wrong])
        found[_of(WRONG, name)] = Measured(of_errors.auroc, of_errors.se)
    with suppress(DataError):  # the human labels need not be there
        people = human_labels("cifar10").probabilities[test.labels()]
        for name, score in scores.items():
            agreed = human_entropy(score, people, values["y"].numpy())
            found[_of(PEOPLE, name)] = measured(agreed, "human_spearman")
            found[_of(WITHIN, name)] = measured(agreed, "human_spearman_within")
    return found


def _conflict(context: Context, trained: Trained) -> dict[str, Any]:
    """The gradients of both losses in the network, at training images."""
    learner = trained.learner
    assert isinstance(learner, LossPrediction)

    def each(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        embedding = learner.trunk(batch["x"])
        return embedding, functional.cross_entropy(learner.head(embedding), batch["y"], reduction="none")

    def of_head(batch: dict[str, Tensor]) -> Tensor:
        embedding, losses = each(batch)
        return order_loss(learner.losses(embedding.detach() if learner.stop_gradient else embedding), losses)

    losses = {"classes": lambda batch: each(batch)[1].mean(), "uncertainty": of_head}
    found = gradient_conflict(learner, losses, _batches(context), learner.trunk, seed=context.stream("conflict"))
    return {COSINE: measured(found, "cosine_mean"), CONFLICT: measured(found, "share_negative")}


def _batches(context: Context) -> Iterator[dict[str, Tensor]]:
    train = context.splits["train"]
    rng = np.random.default_rng(context.stream("batches"))
    for _ in range(context.settings["batches"]):
        observed, covariates = train.batch(rng.choice(len(train), _BATCH, replace=False))
        yield observed | {"y": (observed | covariates)["y"].long()}
