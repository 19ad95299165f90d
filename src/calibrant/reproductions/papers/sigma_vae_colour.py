"""The decoders of the paper on calibrated decoders, on colour images: CIFAR-10 at 28×28, as in its Tables 3 and 4."""

from __future__ import annotations

from math import log, pi
from typing import Any

from calibrant.reproductions.cards import Needs, Ordering, Target
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Summary
from calibrant.reproductions.papers.sigma_vae import (
    BOUND,
    DECODERS,
    DEQUANTISED,
    EVALUATION,
    GREY,
    LITTLE,
    NETWORK,
    ON_GREY_VALUES,
    PAPER,
    SMALL,
    decoders,
)
from calibrant.reproductions.registering import register_experiment

SIDE = 28
FLOOR = 3 * SIDE**2 / 2 * log(2 * pi)  # nats; the least −log p of a Gaussian with σ = 1
DISCRETE = ("categorical", "bitwise categorical", "logistic mixture", "discretised Gaussian", "discretised logistic")
ROWS = ("Gaussian, σ = 1", "shared σ", "optimal σ", "σ per pixel", "Student-t per pixel", *DISCRETE)


def _colour(found: Found) -> Summary:
    apart = found.difference("optimal σ", "shared σ", BOUND)
    costs = found.difference("Gaussian, σ = 1", "shared σ", BOUND)
    sentences = [f"Shared and optimal σ differ by {apart} nats per image; σ = 1 costs {costs} nats more than shared σ."]
    if not found.quick:
        sentences.append(f"With σ = 1, no model can have less than {FLOOR:.0f} nats; the paper's number does.")
    return Summary(sentences)


def _images(values: str, key: str) -> Needs:
    few = {"train": 6_000, "validation": 500, "test": 500}
    options, small = {"size": SIDE, "values": values}, {"size": 16}
    return Needs("cifar10", options, most={"test": 2_000}, quick=few, quick_options=small, key=key)


@register_experiment(
    PAPER,
    "cifar10",
    answers="Tables 3 and 4, CIFAR-10",
    shows="The decoders on colour images, where shared and optimal σ should agree.",
    rows={row: DECODERS[row] for row in ROWS},
    numbers=ON_GREY_VALUES,
    needs=(_images("dequantised", DEQUANTISED), _images("unit", GREY)),
    settings={**NETWORK, **EVALUATION, "epochs": 10},
    quick={**SMALL, **LITTLE, "epochs": 3},
    full_only=DISCRETE,
    reduced="The network and budget of the paper; 2,000 test images.",
    reduced_quick="16×16 pixels, 6,000 training and 500 test images, an eighth of the channels, 561 steps.",
    minutes=(1, 2400),
    seeds=(1, 3),
    targets=(
        Target("shared σ", BOUND, -1830, 55),
        Target("optimal σ", BOUND, -1832, 55),
        Target("Gaussian, σ = 1", BOUND, 1409, None, f"no Gaussian with σ = 1 can have less than {FLOOR:.0f} nats"),
        Target("categorical", BOUND, 10673),
        Target("bitwise categorical", BOUND, 11604),
        Target("logistic mixture", BOUND, 10648),
        Target("discretised Gaussian", BOUND, 11117),
        Target("discretised logistic", BOUND, 11103),
    ),
    orderings=(Ordering(BOUND, ("shared σ", "Gaussian, σ = 1"), "a learned scale beats the scale 1"),),
    summarise=_colour,
)
def cifar10(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train the paper's network with the decoder of a row on CIFAR-10, and evaluate it on test images."""
    return dict(decoders(context, row, seed))
