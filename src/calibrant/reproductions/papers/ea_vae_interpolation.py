"""Between digits (EA-VAE paper): uncertainty along morphs and blends, and at the average image."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
import torch
import xarray as xr

from calibrant.data.dataset import Data
from calibrant.evaluation.reporting.interpolation_plots import interpolation_figure
from calibrant.evaluation.reporting.style import data_uri
from calibrant.evaluation.uncertainty.average_image import AverageImagePlan, average_image_of
from calibrant.evaluation.uncertainty.class_means import class_mean_images, class_pairs
from calibrant.evaluation.uncertainty.interpolation import InterpolationPlan, interpolation_of
from calibrant.evaluation.uncertainty.reading import label_read_out_of
from calibrant.reproductions.cards import Claim, Target
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.datasets import as_bytes, datasets_of
from calibrant.reproductions.found import Found, Picture, Summary
from calibrant.reproductions.papers.ea_vae import PAPER, SOURCES, of_both
from calibrant.reproductions.papers.ea_vae_models import (
    DIGITS,
    EA_VAE,
    MNIST,
    MODELS,
    SAMPLED,
    SAMPLED_QUICK,
    VAE,
    images_of,
    sources_of,
    trained_problem,
)
from calibrant.reproductions.registering import register_experiment

MORPHS, BLENDS = "morphs", "blends"
BULGE, CONCAVE, CENTRAL = "bulge", "concave", "concave, vertex in the middle half"
AVERAGE, BETWEEN, AT_ENDS = "average image", "label entropy between", "label entropy at the ends"
REFUSED = "refused"


SETTINGS: Mapping[str, Any] = {
    "steps": 51,
    "reference_pairs": 45,
    "reference_steps": 11,
    "blends": 10,
    "reference_blends": 45,
    "labelled": 10_000,
    "passes": 100,
    "images": 128,
    "averaged": 10_000,
    **SAMPLED,
}
QUICK: Mapping[str, Any] = {
    "steps": 11,
    "reference_pairs": 5,
    "reference_steps": 5,
    "blends": 1,
    "reference_blends": 5,
    "labelled": 1_500,
    "passes": 30,
    "images": 8,
    "averaged": 600,
    **SAMPLED_QUICK,
}


def _of_curves(result: xr.Dataset, name: str) -> dict[str, Any]:
    """Bulges at the pairs and steps that both sources have, and the concavity of all that each has."""
    found: dict[str, Any] = {name: as_bytes(result), REFUSED: 1.0 - result.attrs["share_reference"]}
    for source, at in SOURCES.items():
        one = result.sel(source=at)
        found[f"{BULGE}, {source}"] = Measured(float(one["compared_mean_bulge"]), float(one["compared_mean_bulge_se"]))
        found[f"{CONCAVE}, {source}"] = float(one["share_concave_by_sign"].sel(threshold=0.5, method="nearest"))
        found[f"{CENTRAL}, {source}"] = float(one["share_concave_by_sign"].sel(threshold=0.25, method="nearest"))
    return found


def _tell(found: Found) -> Summary:
    name = MORPHS if f"{AVERAGE}, guide" in found.card.numbers else BLENDS
    results = datasets_of(found, name)
    if not results:
        return Summary()
    caption = (
        "Posterior width along the way from one digit (λ = 0) to another (λ = 1), averaged over pairs. A curve that is "
        "highest in the middle says that images between the digits leave the latents less certain. First seed."
    )
    bulges = "; ".join(
        f"{row} {found.mean(row, f'{BULGE}, exact')} exactly, {found.mean(row, f'{BULGE}, guide')} by the guide"
        for row in found.rows
    )
    return Summary(
        [f"Height of the middle above the line between both ends, in prior sds: {bulges}."],
        [Picture(f"Uncertainty along {name}", caption, data_uri(interpolation_figure(results)))],
    )


BULGES = {
    BULGE: "prior sds, of the middle above the line between the ends",
    CONCAVE: "share of pairs whose quadratic fit is concave with its vertex between the ends",
    CENTRAL: "share of pairs",
}


@register_experiment(
    PAPER,
    "mnist-morphs",
    domain=MNIST,
    uses="mnist-models",
    answers="the interpolation experiment: morphs between class means, and the average image",
    shows="Whether images between two digits, and the average of all digits, leave the latents less certain.",
    rows={row: {} for row in MODELS},
    numbers={
        **of_both(BULGES),
        **of_both({AVERAGE: "posterior sd of the average image over the mean of single ones"}),
        REFUSED: "share of the images without a reference",
    },
    needs=(DIGITS,),
    settings=SETTINGS,
    quick=QUICK,
    reduced="Morphs are drawn as binary images, with the same uniform number per pixel at all steps.",
    reduced_quick="Morphs are drawn as binary images: 45 pairs and 11 steps; 5 pairs have a reference, at 5 steps.",
    minutes=(0.5, 30),
    seeds=(3, 3),
    targets=(
        Target(VAE, f"{CONCAVE}, guide", 14 / 45),
        Target(EA_VAE, f"{CONCAVE}, guide", 44 / 45),
        Target(VAE, f"{CENTRAL}, guide", 10 / 45),
        Target(EA_VAE, f"{CENTRAL}, guide", 42 / 45),
        Target(VAE, f"{AVERAGE}, guide", 0.885),
        Target(EA_VAE, f"{AVERAGE}, guide", 2.24),
    ),
    claims=(
        Claim("the EA-VAE is less certain at morphs between two digits than at their ends", EA_VAE, BULGE, "above"),
        Claim("the EA-VAE's uncertainty rises more between digits than the VAE's", EA_VAE, BULGE, "above", 0.0, VAE),
        Claim(
            "the EA-VAE is less certain at the average of all digits than at single ones", EA_VAE, AVERAGE, "above", 1.0
        ),
        Claim("the VAE is not less certain at the average digit", VAE, AVERAGE, "below", 1.0),
    ),
    summarise=_tell,
)
def mnist_morphs(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Uncertainty along the 45 morphs between the decoded mean latents of the digits, and at the average digit."""
    settings, digits = context.settings, context.splits["test"]
    problem = trained_problem(context, row, images_of(context)["test"])
    shown = digits[: settings["averaged"]]
    means = class_mean_images(
        problem.program,
        problem.guide,
        shown.select(["x"]),
        shown.tensors()[0]["y"].numpy(),
        seed=context.stream("means"),
    )
    images = torch.as_tensor(means.values, dtype=torch.float32)
    first, second = np.array(list(combinations(range(len(images)), 2))).T
    plan = InterpolationPlan(
        settings["steps"], settings["reference_pairs"], settings["reference_steps"], sources=sources_of(settings)
    )
    morphs = interpolation_of(
        problem, Data({"x": images[first]}), Data({"x": images[second]}), plan, context.stream(MORPHS)
    )
    found = _of_curves(morphs, MORPHS)
    average = average_image_of(
        problem, AverageImagePlan(settings["images"], sources=sources_of(settings)), context.stream(AVERAGE)
    )
    found[REFUSED] = max(found[REFUSED], 1.0 - average.attrs["share_reference"])
    for source, at in SOURCES.items():
        one = average.sel(source=at)
        found[f"{AVERAGE}, {source}"] = Measured(float(one["ratio"]), float(one["ratio_se"]))
    return found


@register_experiment(
    PAPER,
    "mnist-blends",
    domain=MNIST,
    uses="mnist-models",
    answers="the interpolation experiment: blends of pairs of images",
    shows="Whether blends of two digits leave the latents, and the digit that they stand for, less certain.",
    rows={row: {} for row in MODELS},
    numbers={
        **of_both({BETWEEN: "nats, at λ = ½", AT_ENDS: "nats", **BULGES}),
        REFUSED: "share of the images without a reference",
    },
    needs=(DIGITS,),
    settings=SETTINGS,
    quick=QUICK,
    reduced="Blends are drawn as binary images, with the same uniform number per pixel at all steps.",
    reduced_quick="One blend for each pair of digits, drawn as binary images; 5 of them with a reference, at 5 steps.",
    minutes=(0.5, 40),
    seeds=(3, 3),
    targets=(
        Target(VAE, f"{BETWEEN}, guide", 0.73),
        Target(EA_VAE, f"{BETWEEN}, guide", 1.12),
        Target(VAE, f"{AT_ENDS}, guide", 0.24),
        Target(EA_VAE, f"{AT_ENDS}, guide", 0.31),
    ),
    claims=(
        Claim("the digit of a blend is less certain in the EA-VAE than in the VAE", EA_VAE, BETWEEN, "above", 0.0, VAE),
        Claim("the EA-VAE's latents are less certain at blends than at both images", EA_VAE, BULGE, "above"),
    ),
    summarise=_tell,
)
def mnist_blends(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Uncertainty of latents and labels along blends of two test images with different digits."""
    settings, train = context.settings, context.splits["train"][: context.settings["labelled"]]
    problem = trained_problem(context, row, images_of(context)["test"])
    labelled, labels = problem.of_some(train.select(["x"])), train.tensors()[0]["y"]
    read = label_read_out_of(labelled, labels, settings["passes"], seed=context.stream("labels"))
    images, digits = (context.splits["test"].tensors()[0][key] for key in ("x", "y"))
    first, second = class_pairs(digits, settings["blends"], context.stream("pairs"))
    starts, ends = Data({"x": images[first]}), Data({"x": images[second]})
    plan = InterpolationPlan(
        settings["steps"],
        settings["reference_blends"],
        settings["reference_steps"],
        read.probabilities,
        sources=sources_of(settings),
    )
    blends = interpolation_of(problem, starts, ends, plan, context.stream(BLENDS))
    found = _of_curves(blends, BLENDS)
    for source, at in SOURCES.items():
        entropy = blends["label_entropy"].sel(source=at)
        found[f"{BETWEEN}, {source}"] = _mean(entropy.sel(step=0.5, method="nearest").values)
        found[f"{AT_ENDS}, {source}"] = _mean(entropy.isel(step=[0, -1]).mean("step", skipna=False).values)
    return found


def _mean(values: np.ndarray) -> Measured:
    return Measured.of(values[np.isfinite(values)])
