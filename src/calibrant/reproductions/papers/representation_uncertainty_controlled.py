"""The controlled experiment of MCInfoNCE (arXiv 2302.02865): are posteriors recovered where they are known?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from calibrant.data.dataset import Data
from calibrant.distributions.directional import VonMisesFisher
from calibrant.distributions.published import PublishedVonMisesFisher
from calibrant.evaluation.reporting.recovery_plots import recovery_figure
from calibrant.evaluation.reporting.style import data_uri
from calibrant.guides.from_prior import prior
from calibrant.models.parts.embeddings import RepresentationModel
from calibrant.program.environment import seeded
from calibrant.representations.generator import Generator
from calibrant.reproductions.cards import Claim
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Picture, Summary
from calibrant.reproductions.papers.representation_uncertainty import PAPER
from calibrant.reproductions.papers.representation_uncertainty_pairs import (
    IntegratedPair,
    data_of,
    model_of,
    train_concentration,
)
from calibrant.reproductions.recovery import Directions, directions, recovery_of
from calibrant.reproductions.registering import register_experiment

RANK, CAPS, OFF = "rank of κ", "caps", "caps off"
RANDOM, NEAR, DRAWS, WRONG = "random pairs", "near pairs", "near pairs, by draws", "known, published draws, m = 128"
NUMBERS = {
    RANK: "Spearman's correlation with the known κ",
    "ratio of κ": "median of estimated over known κ",
    "slope of κ": "of log estimated κ on log known κ",
    "angle": "degrees to the known direction, after the best rotation, mean",
    "cosines": "correlation with the known cosines of pairs of inputs",
    "cosines off": "root mean square difference of these cosines",
    CAPS: "share of known z in the 90% caps of the estimated posterior",
    OFF: "the same, less 0.9",
}
_NAMES = {"rank": RANK, "ratio": "ratio of κ", "slope": "slope of κ"}
_OF_KAPPA = ("rank", "ratio", "slope")
_NEAR: dict[str, Any] = {"near": 0.5}
_BY_DRAWS = {**_NEAR, "model": "pair"}
_SHORT = {"share": 0.1}  # of the steps of a full run, for ablations
ROWS: dict[str, dict[str, Any]] = {
    RANDOM: {},
    NEAR: _NEAR,
    DRAWS: _BY_DRAWS,
    WRONG: {"model": "known", "sampler": "published", "latents": 128, "features": 128},
    "known, published draws, m = 10": {"model": "known", "sampler": "published"},
    "random pairs, by draws": {"model": "pair"},
    "shuffled matches": {**_NEAR, **_SHORT, "shuffled": True},
    "pairs by rejection": {**_SHORT, "rejection": True},
    "tuples by rejection": {**_SHORT, "model": "mcinfonce"},
    **{f"by {draws} draws": {**_BY_DRAWS, **_SHORT, "particles": draws} for draws in (1, 4, 16, 64)},
    **{f"m = {m}": {**_NEAR, **_SHORT, "latents": m} for m in (2, 32)},
    "encoder of 32 dimensions": {**_NEAR, **_SHORT, "assumed latents": 32},
    **{f"k taken for {k}": {**_NEAR, **_SHORT, "assumed slope": float(k)} for k in (10, 40)},
    "κ from 64 to 128": {**_NEAR, **_SHORT, "concentrations": [64.0, 128.0]},
    "k and b learned": {**_BY_DRAWS, **_SHORT, "model": "hib"},
    "Normal posterior": {**_BY_DRAWS, **_SHORT, "posterior": "normal"},
    "published sampler": {**_BY_DRAWS, **_SHORT, "sampler": "published"},
    "m = 128": {**_BY_DRAWS, **_SHORT, "latents": 128, "features": 128},
    "m = 128, published sampler": {
        **_BY_DRAWS, **_SHORT, "latents": 128, "features": 128, "sampler": "published",
    },
}  # fmt: skip
QUICK = (RANDOM, DRAWS, WRONG, "known, published draws, m = 10")
_LEVELS = np.linspace(0.02, 0.98, 25)


def _tell(found: Found) -> Summary:
    told = "; ".join(
        f"{row}: {found.mean(row, f'{RANK}, guide')} and {found.mean(row, f'{CAPS}, guide')}" for row in found.rows
    )
    sentences = [
        f"Rank correlation of κ with the known one, and share of known latents in 90% caps: {told}.",
        "Both latents of a pair can be integrated out exactly, so that the likelihood needs no draws: a series of "
        "Gegenbauer polynomials in the cosine of both directions. A likelihood of y given both inputs is right however "
        "inputs are paired, as long as matches take no part: pairs of near inputs match more often and tell κ sooner.",
        "Rejection selects by matches, so that the known constant no longer holds; it is kept as an ablation.",
    ]
    names = ("known", "own", "curve")
    parts = {row: [found.array(row, name) for name in names] for row in found.rows[:4]}
    curves = {row: (k, o, c) for row, (k, o, c) in parts.items() if k is not None and o is not None and c is not None}
    caption = (
        "Left: the estimated κ of fresh inputs beside the known one. Right: share of the known latents in caps of the "
        "estimated posterior that hold a given share of it. A curve below the diagonal is too certain. First rows and "
        "seed."
    )
    pictures = [Picture("Recovered posteriors", caption, data_uri(recovery_figure(curves, _LEVELS)))] if curves else []
    return Summary(sentences, pictures)


@register_experiment(
    PAPER,
    "controlled",
    domain="controlled",
    answers="the controlled experiment of MCInfoNCE (arXiv 2302.02865)",
    shows="Whether a contrastive encoder recovers posteriors of its representation that are known.",
    rows=ROWS,
    numbers={f"{number}, guide": unit for number, unit in NUMBERS.items()} | {f"{CAPS}, exact": NUMBERS[CAPS]},
    needs=(),
    settings={
        "latents": 10, "features": 10, "concentrations": [16.0, 32.0], "slope": 20.0, "smoothing": 5000,
        "direction": {"name": "deep", "width": 10}, "concentration": {"name": "deep", "width": 1}, "start": 16.0,
        "steps": [50_000, 50_000], "batch": 512, "batch of draws": 512, "particles": 512, "negatives": 32, "lr": 1e-4,
        "validation": 2000, "inputs": 10_000, "draws": 199,
    },
    quick={
        "smoothing": 30, "direction": {"name": "mlp", "hidden": 128, "layers": 3},
        "concentration": {"name": "mlp", "hidden": 64, "layers": 2}, "steps": [1200, 700], "batch": 512,
        "batch of draws": 128, "particles": 16, "lr": 2e-3, "inputs": 3000,
    },
    full_only=tuple(row for row in ROWS if row not in QUICK),
    reduced="Ablations have a tenth of the steps. Concentrations start at 16 and are trained with the directions in "
    "the second half of the steps. Training data are simulated once, up to two million pairs.",
    reduced_quick="1,200 steps for directions and 700 for both, with 512 pairs each (128 by draws, 16 draws), a "
    "smaller encoder, and a generator that is smoothed in 30 steps in place of 5,000, which is easier to learn.",
    minutes=(3, 3000),
    seeds=(3, 3),
    claims=(
        *(
            Claim(f"the concentration is ranked as the known one: {row}", row, RANK, "above", 0.8)
            for row in (RANDOM, NEAR, DRAWS)
        ),
        *(
            Claim(f"90% caps hold 90% of the known latents, within 4%: {row}", row, OFF, "within", 0.04, by="ours")
            for row in (RANDOM, NEAR, DRAWS)
        ),
        Claim(
            "caps from draws of the published sampler are too wide in 128 dimensions", WRONG, OFF, "above", 0.04,
            by="ours",
        ),
    ),
    summarise=_tell,
)  # fmt: skip
def controlled(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train an encoder on matches of a known representation, and compare its posteriors with the known ones."""
    settings = {**context.settings, **context.arguments}
    generator = Generator(
        settings["latents"], settings["features"], tuple(settings["concentrations"]), settings["slope"],
        settings["smoothing"], context.stream("generator"),
    )  # fmt: skip
    model = None if settings.get("model") == "known" else _trained(context, settings, generator)
    x = generator.inputs(settings["inputs"], context.stream("fresh inputs"))
    with seeded(context.stream("draws")):
        known = _known(generator, x, settings["draws"])
        again = _known(generator, x, settings["draws"])
        if model is None:
            estimated = _known(generator, x, settings["draws"], published=True)
        else:
            estimated = _estimated(model, x, settings["draws"])
    numbers, levels = recovery_of(estimated, known, context.stream("levels"))
    numbers["caps off"] = numbers["caps"] + -0.9
    for name in _OF_KAPPA if settings.get("posterior") == "normal" or settings.get("assumed latents") else ():
        del numbers[name]  # the concentration of another family, or in another dimension, is another quantity
    return {f"{_NAMES.get(name, name)}, guide": value for name, value in numbers.items()} | {
        f"{CAPS}, exact": recovery_of(again, known, context.stream("levels"))[0]["caps"],
        "known": known.concentration.numpy()[:1000],
        "own": estimated.concentration.numpy()[:1000],
        "curve": (levels[:, None] <= _LEVELS).mean(0),
    }


def _trained(context: Context, settings: Mapping[str, Any], generator: Generator) -> RepresentationModel:
    """A model after both stages: directions under one concentration, then both."""
    with seeded(context.stream("weights")):
        model = model_of(settings)
    drawn = not isinstance(model, IntegratedPair)
    batch = settings["batch of draws" if drawn else "batch"]
    objective = {"objective": "iwae", "particles": settings["particles"]} if drawn else {}
    for stage, whole in zip(("directions", "both"), settings["steps"], strict=True):
        train_concentration(model, stage == "both")
        steps = round(whole * (1.0 if context.quick else settings.get("share", 1.0)))
        count = min(steps * batch, 2**21)
        splits: dict[str, Data] = {
            "train": data_of(settings, generator, count, context.stream(f"{stage}, training")),
            "validation": data_of(settings, generator, settings["validation"], context.stream("validation")),
        }
        epochs = max(1, steps * batch // count)
        context.fit(model, prior(model), splits, stage, epochs=epochs, batch_size=batch, lr=settings["lr"], **objective)
    return model


@torch.no_grad()
def _known(generator: Generator, x: torch.Tensor, draws: int, published: bool = False) -> Directions:
    mu, kappa = generator.direction(x), generator.concentration(x)
    family = PublishedVonMisesFisher if published else VonMisesFisher
    return directions(mu, kappa, family(mu, kappa, validate_args=False).sample((draws,)))


@torch.no_grad()
def _estimated(model: RepresentationModel, x: torch.Tensor, draws: int) -> Directions:
    embedding = model.cpu().embedding
    return directions(model.embed(x), 1 / model.uncertainty(x), embedding.distribution(x).sample((draws,)))
