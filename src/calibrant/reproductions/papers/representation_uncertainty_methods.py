"""Eleven ways to an uncertainty of a representation (URL, arXiv 2307.03810), on features of Caltech-101."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from calibrant.evaluation.reporting.representation_plots import reject_figure
from calibrant.evaluation.reporting.style import data_uri
from calibrant.evaluation.representations.cropping import crop_test
from calibrant.evaluation.representations.inputs import Embedded
from calibrant.evaluation.representations.novelty import mixed_retrieval, ood_auroc
from calibrant.evaluation.representations.recall import retrieval
from calibrant.evaluation.representations.rejecting import reject_curve
from calibrant.representations.trained import Trained, train_representation
from calibrant.reproductions.cards import Ordering, Target
from calibrant.reproductions.context import Context
from calibrant.reproductions.datasets import as_bytes, datasets_of
from calibrant.reproductions.found import Found, Picture, Summary
from calibrant.reproductions.papers.representation_uncertainty import PAPER
from calibrant.reproductions.papers.representation_uncertainty_features import (
    CALTECH,
    CROP,
    DOMAIN,
    PACKAGES,
    R1,
    R_AUROC,
    WITHOUT,
    features_of,
    measured,
    part_of,
    shares_of,
)
from calibrant.reproductions.registering import register_experiment

CROP_RANK, OOD, MIXED, AREA = "crop Spearman", "OOD AUROC", "mixed R-AUROC", "reject area"
NOISE = 0.02  # the spread of three seeds in the paper
ROWS: Mapping[str, Mapping[str, Any]] = {
    "CE": {"method": "classifier"},
    "InfoNCE": {"method": "infonce"},
    "MCInfoNCE": {"method": "mcinfonce"},
    "ELK": {"method": "elk"},
    "nivMF": {"method": "nivmf"},
    "HIB": {"method": "hib"},
    "HET-XL": {"method": "het-xl"},
    "Losspred": {"method": "loss-prediction"},
    "MCDropout": {"method": "mc-dropout"},
    "Ensemble": {"method": "ensemble"},
    "SNGP": {"method": "sngp"},
}
LEARNED_QUICK = ("CE", "MCInfoNCE", "nivMF", "HIB", "Losspred")
NUMBERS = {
    R_AUROC: "whether wrongly retrieved images are the less certain ones",
    R1: "of all test images, whose classes no head has seen",
    CROP: "share of images whose crop is less certain",
    CROP_RANK: "rank correlation with the size of the crop",
    OOD: "images of test classes against held-out images of training classes",
    MIXED: "R-AUROC among both together",
    AREA: "share of the way from random rejection to the oracle",
}
# R-AUROC, R@1 and share of less certain crops of a ResNet-50 trained on ImageNet, over CUB, CARS and SOP
PUBLISHED: Mapping[str, tuple[float, float, float]] = {
    "MCInfoNCE": (0.569, 0.432, 0.660),
    "nivMF": (0.567, 0.431, 0.696),
    "ELK": (0.560, 0.391, 0.858),
    "Losspred": (0.550, 0.395, 0.875),
    "HIB": (0.539, 0.305, 0.613),
    "Ensemble": (0.523, 0.369, 0.753),
    "InfoNCE": (0.520, 0.374, 0.569),
    "MCDropout": (0.517, 0.314, 0.511),
    "HET-XL": (0.511, 0.292, 0.670),
    "SNGP": (0.510, 0.288, 0.694),
    "CE": (0.504, 0.407, 0.677),
}
BECAUSE = "the paper fine-tunes a ResNet-50 on ImageNet and averages over CUB, CARS and SOP"
TARGETS = tuple(
    Target(row, number, value, because=BECAUSE)
    for row, values in PUBLISHED.items()
    for number, value in zip((R_AUROC, R1, CROP), values, strict=True)
)
ORDERINGS = (
    Ordering(R_AUROC, ("CE", "Losspred"), "predicted losses tell wrong retrievals better than class entropy does"),
    Ordering(R_AUROC, ("CE", "MCInfoNCE"), "κ of MCInfoNCE tells wrong retrievals better than class entropy does"),
    Ordering(R_AUROC, ("CE", "nivMF"), "κ of nivMF tells wrong retrievals better than class entropy does"),
    Ordering(CROP, ("CE", "Losspred"), "predicted losses notice more crops than class entropy does"),
)


def method_of(context: Context, method: str, **changes: Any) -> Trained:
    """A method that is trained on the features of the training classes, with the settings of the card."""
    given = {"seed": context.stream("training"), **context.settings["training"], **changes}
    return train_representation(method, features_of(context, "train"), progress=context.progress, **given)


def _scores(trained: Trained, x: Tensor) -> tuple[Tensor, Tensor]:
    return trained.embed(x), trained.uncertainty(x)


def judged(context: Context, trained: Trained) -> dict[str, Any]:
    """All numbers of a trained method on the test classes."""
    inside, test, crops = (part_of(context, name) for name in ("validation", "test", "crops"))
    (known, known_u), (embedded, u), (_, crop_u) = (_scores(trained, part.x) for part in (inside, test, crops))
    seed = context.seed
    found = retrieval(embedded, test.y, u, cluster="class", seed=seed)
    curve = reject_curve(~found["correct"].values, u, test.y, cluster="class", seed=seed)
    test_of_crops = crop_test(u, crop_u, shares_of(len(test.y)), test.y, cluster="class", seed=seed)
    outside = ood_auroc(known_u, u, inside.y, test.y, cluster="class", seed=seed)
    mixed = mixed_retrieval(
        Embedded(known, inside.y, known_u), Embedded(embedded, test.y, u), cluster="class", seed=seed
    )
    return {
        R_AUROC: measured(found, "r_auroc"),
        R1: measured(found, "r_at_1"),
        CROP: measured(test_of_crops, "crop_less_certain"),
        CROP_RANK: measured(test_of_crops, "crop_spearman"),
        OOD: measured(outside, "ood_auroc"),
        MIXED: measured(mixed, "mixed_r_auroc"),
        AREA: measured(curve, "normalised_area"),
        "curve": as_bytes(curve),
        "uncertainty": np.asarray(u, np.float32),
    }


def _tell(found: Found) -> Summary:
    means = {row: found.mean(row, R_AUROC).value for row in found.rows}
    there = sorted((row for row in means if np.isfinite(means[row])), key=lambda row: -means[row])
    differences = [found.difference(one, two, R_AUROC) for one, two in combinations(there, 2)]
    apart = sum(abs(step.value) > step.limit(2) for step in differences if np.isfinite(step.se))
    noise = sum(abs(step.value) < NOISE for step in differences)
    order = ", ".join(f"{row} {found.mean(row, R_AUROC)}" for row in there)
    sentences = [
        f"R-AUROC, from the highest: {order}.",
        f"{apart} of {len(differences)} pairs of methods differ beyond chance, each tested at 5%; {noise} differ by "
        f"less than {NOISE}, what three seeds of the paper spread by.",
        "R-AUROCs of rows with different R@1 judge different errors.",
    ]
    curves = datasets_of(found, "curve")
    if not curves:
        return Summary(sentences)
    caption = "Share of wrong retrievals among the images that are kept when the least certain ones are rejected."
    return Summary(sentences, [Picture("Errors of the images that are kept", caption, data_uri(reject_figure(curves)))])


def _tell_frozen(found: Found) -> Summary:
    told = _tell(found)
    said = (
        "The published R-AUROC of a predicted loss on Caltech-101 is .758 (a ViT-B of ImageNet-21k, R@1 .837, images "
        f"of 224 pixels, all classes); here it is {found.mean('Losspred', R_AUROC)}, with smaller networks and images, "
        "and far fewer images to learn from, none of them of the test classes."
    )
    return Summary([*told.sentences, said], told.pictures)


REDUCED = (
    "Each method has the training length of its card, from 200 steps of 64 tuples to 1,000 of 128 images. Heads on "
    "frozen features in place of networks that are fine-tuned, and one set of photographs in place of three. "
    f"{WITHOUT}"
)


@register_experiment(
    PAPER,
    "caltech-methods",
    domain=DOMAIN,
    uses="caltech-backbone",
    answers="URL, Figures 1 to 4, and pretrained visual uncertainties on Caltech-101",
    shows="Which of eleven uncertainties know that a retrieval by the frozen backbone is wrong, among unseen classes.",
    rows=ROWS,
    numbers=NUMBERS,
    needs=(CALTECH,),
    settings={"training": {"trunk": "none"}},
    reduced=REDUCED,
    reduced_quick=f"Images of 96 pixels. {REDUCED}",
    minutes=(4, 8),
    seeds=(3, 3),
    targets=TARGETS,
    orderings=ORDERINGS,
    optional=PACKAGES,
    summarise=_tell_frozen,
)
def caltech_methods(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train one head on frozen features of the training classes; its uncertainty about retrieval of others by these."""
    return judged(context, method_of(context, context.arguments["method"]))


@register_experiment(
    PAPER,
    "caltech-learned",
    domain=DOMAIN,
    uses="caltech-backbone",
    answers="URL, Figures 1 to 4: embeddings that are trained with their uncertainty",
    shows="The same methods with an embedding of 16 dimensions of their own, as they are published.",
    rows=ROWS,
    numbers=NUMBERS,
    needs=(CALTECH,),
    settings={"training": {"trunk": "linear", "latents": 16}},
    reduced=REDUCED,
    full_only=tuple(row for row in ROWS if row not in LEARNED_QUICK),
    reduced_quick=f"Images of 96 pixels; one seed, five methods. {REDUCED}",
    minutes=(2, 8),
    seeds=(1, 3),
    optional=PACKAGES,
    summarise=_tell,
)
def caltech_learned(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train an embedding and its uncertainty on the training classes; both judged on the others."""
    return judged(context, method_of(context, context.arguments["method"]))
