"""Other images than the model's own (EA-VAE paper): wider posteriors, and less certain labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from calibrant.evaluation.reporting.score_plots import label_entropy_figure, score_figure
from calibrant.evaluation.reporting.style import data_uri
from calibrant.evaluation.uncertainty.corruptions import shuffled_across_images
from calibrant.evaluation.uncertainty.labels import ReadOutPlan, label_entropy_of
from calibrant.evaluation.uncertainty.outside import OutsidePlan, ood_of
from calibrant.inference.problem import Problem
from calibrant.reproductions.cards import Claim, Needs, Target
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.datasets import as_bytes, datasets_of
from calibrant.reproductions.found import Found, Picture, Summary
from calibrant.reproductions.papers.ea_vae import PAPER, SOURCES, of_both
from calibrant.reproductions.papers.ea_vae_models import (
    CLOSED,
    CLOSED_QUICK,
    DIGITS,
    EA_VAE,
    HOW_QUICK,
    HOW_SAMPLED,
    MNIST,
    MODELS,
    NATURAL,
    PATCHES,
    SAMPLED,
    SAMPLED_QUICK,
    VAE,
    images_of,
    sources_of,
    trained_problem,
)
from calibrant.reproductions.papers.ea_vae_van_hateren import DOMAIN, build
from calibrant.reproductions.papers.ea_vae_van_hateren import PATCHES as VAN_HATEREN
from calibrant.reproductions.registering import register_experiment

REFUSED, ENTROPY, ACCURACY = "refused", "label entropy", "label accuracy"
PERMUTED, WHITE = "permuted", "white noise"
MATCHED = "at matched contrast"
LEAST_ACCURACY = 0.5  # of a classifier whose entropies mean something
GREY: Mapping[str, Any] = {"quick": {"test": 1_000}, "most": {"train": 2, "validation": 2}}


def _auroc(of_set: str, matched: bool = False) -> str:
    return f"AUROC, {of_set}{f' {MATCHED}' if matched else ''}"


def _aurocs(sets: tuple[str, ...]) -> dict[str, str]:
    unit = "chance that an image of the set has the wider posterior"
    names = [_auroc(of_set, matched) for of_set in sets for matched in (False, True)]
    return of_both(dict.fromkeys(names, unit)) | {REFUSED: "largest share of images of a set without a reference"}


def _claims(sets: tuple[str, ...], by: Literal["paper", "ours"] = "paper") -> tuple[Claim, ...]:
    """Whether images of a set leave the EA-VAE less certain, more so than the VAE, and whether contrast explains it."""
    found = []
    for of_set in sets:
        images, shown = f"{of_set} images" if of_set == PERMUTED else of_set, _auroc(of_set)
        found += [
            Claim(f"the EA-VAE is less certain at {images} than at its own images", EA_VAE, shown, "above", 0.5, by=by),
            Claim(f"the EA-VAE tells {images} apart better than the VAE does", EA_VAE, shown, "above", 0.0, VAE, by),
            Claim(
                f"among images of equal contrast, the EA-VAE is less certain at {images}",
                EA_VAE,
                _auroc(of_set, True),
                "above",
                0.5,
                by="ours",
            ),
        ]
    return tuple(found)


def of_scores(scores: xr.Dataset) -> dict[str, Any]:
    """The AUROCs of an experiment with other sets, and all that its picture needs."""
    found: dict[str, Any] = {"scores": as_bytes(scores)}
    for of_set in scores["set"].values.tolist():
        for matching, matched in (("as shown", False), ("contrast", True)):
            at = scores.sel(set=of_set, matching=matching)
            for name, source in SOURCES.items():
                one = at.sel(source=source)
                width = float(
                    one["auroc_high"] - one["auroc_low"]
                )  # of the 95% interval, which is right near 0 and 1 too
                found[f"{_auroc(of_set, matched)}, {name}"] = Measured(float(one["auroc"]), width / 3.92)
    found[REFUSED] = float(scores["share_refused"].max())
    return found


def in_units_of(images: Tensor, patches: Tensor) -> Tensor:
    """Images of another set as patches are: each of mean zero, and all together with the patches' variance."""
    centred = images - images.flatten(1).mean(1).reshape(-1, 1, 1, 1)
    return centred * (patches.square().mean() / centred.square().mean()).sqrt()


def _tell(found: Found) -> Summary:
    results = datasets_of(found, "scores")
    if not results:
        return Summary()
    caption = (
        "Posterior widths of single images. A set lies above the model's own images (inside) where they leave the "
        "latents less certain; the dashed line is the prior. Numbers are AUROCs with 95% intervals. First seed."
    )
    matched = (
        "The same at matched contrast: images are rescaled, or, where they have bounds, the AUROC compares those in "
        "the same fifth of contrast. What is left of the difference is not due to how much contrast an image has."
    )
    pictures = [
        Picture("Posterior widths by set", caption, data_uri(score_figure(results))),
        Picture("Posterior widths at matched contrast", matched, data_uri(score_figure(results, "contrast"))),
    ]
    entropies = datasets_of(found, "entropies")
    if entropies:
        caption = (
            "Entropy of the labels that one classifier reads from draws of the latents. It is large where the draws "
            "disagree about the digit."
        )
        pictures.append(Picture("Label entropy by set", caption, data_uri(label_entropy_figure(entropies))))
    sentences = []
    for of_set in next(iter(results.values()))["set"].values.tolist():
        parts = [
            f"{row} {found.mean(row, f'{_auroc(of_set)}, exact')} exactly and "
            f"{found.mean(row, f'{_auroc(of_set)}, guide')} by the guide"
            for row in found.rows
        ]
        sentences.append(f"AUROC, {of_set} against the model's own images: {'; '.join(parts)}.")
    return Summary(sentences, pictures)


# -- natural images ----------------------------------------------------------------------------------------------------

CONTROLS, SETS = (PERMUTED, WHITE), ("MNIST", "Fashion-MNIST", "chest X-rays")


def _other_sets(size: int, small: int) -> tuple[Needs, ...]:
    """The sets of `SETS` at the size of the patches in a full and in a quick run."""
    options: Mapping[str, Any] = {"options": {"size": size}, "quick_options": {"size": small}, **GREY}
    return (
        Needs("mnist", key=SETS[0], **options),
        Needs("fashion-mnist", key=SETS[1], **options),
        Needs("chest-mnist", key=SETS[2], fallback=Needs("pneumonia-mnist", **options), **options),
    )


SETTINGS: Mapping[str, Any] = {"images": 256, **CLOSED}
QUICK: Mapping[str, Any] = {"images": 32, **CLOSED_QUICK}
REDUCED = (
    "The posterior is exact, by quadrature over the scale. That of the VAE has one width for all images, so that its "
    "exact AUROC shows nothing but the noise of draws."
)


def _of_natural(context: Context, row: str, sets: Mapping[str, Tensor]) -> dict[str, Any]:
    settings = context.settings
    problem = trained_problem(context, row, images_of(context)["test"])
    plan = OutsidePlan(settings["images"], sources=sources_of(settings))
    return of_scores(ood_of(problem, sets, plan, context.stream("outside"), context.progress))


@register_experiment(
    PAPER,
    "natural-controls",
    domain=NATURAL,
    uses="natural-models",
    answers="the out-of-distribution experiment: permuted pixels",
    shows="Whether images without natural structure leave the latents less certain: permuted pixels and white noise.",
    rows={row: {} for row in MODELS},
    numbers=_aurocs(CONTROLS),
    needs=(PATCHES,),
    settings=SETTINGS,
    quick=QUICK,
    reduced=REDUCED,
    reduced_quick=f"32 images of each set. {REDUCED}",
    minutes=(0.3, 3),
    seeds=(3, 3),
    claims=_claims(CONTROLS, "ours"),
    summarise=_tell,
)
def natural_controls(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Widths of the posteriors of patches, of patches with permuted pixels, and of white noise."""
    patches = images_of(context)["test"].tensors()[0]["x"]
    generator = torch.Generator().manual_seed(context.stream("white noise"))
    white = torch.randn(patches.shape, generator=generator)
    sets = {
        PERMUTED: shuffled_across_images(patches, context.stream("permuted")),
        WHITE: in_units_of(white, patches),
    }
    return _of_natural(context, row, sets)


@register_experiment(
    PAPER,
    "natural-other-sets",
    domain=NATURAL,
    uses="natural-models",
    answers="the out-of-distribution experiment: other sets of images",
    shows="Whether digits, clothes and X-rays leave a model of natural images less certain; in the paper they do not.",
    rows={row: {} for row in MODELS},
    numbers=_aurocs(SETS),
    needs=(
        PATCHES,
        *_other_sets(16, 12),
    ),
    settings=SETTINGS,
    quick=QUICK,
    reduced=REDUCED,
    reduced_quick=f"32 images of each set. {REDUCED}",
    minutes=(0.3, 3),
    seeds=(3, 3),
    claims=_claims(SETS, "ours"),
    summarise=_tell,
)
def natural_other_sets(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Widths of the posteriors of patches and of the images of other sets, which are not whitened, as in the paper."""
    patches = images_of(context)["test"].tensors()[0]["x"]
    return _of_natural(context, row, _others(context, patches))


def _others(context: Context, patches: Tensor) -> dict[str, Tensor]:
    """The other sets as patches: not whitened, as in the paper."""
    return {name: in_units_of(context.data[name]["test"].tensors()[0]["x"], patches) for name in SETS}


# -- van Hateren's images ----------------------------------------------------------------------------------------------

WIDTH = "median sd"
SHOWN = ("inside", PERMUTED, *SETS)
OWN_POWER = "each set has the patches' power here, and its own in the paper"
PRINTED = {  # medians that were read off the paper's figure
    "VAE": (0.46, 0.46, 0.42, 0.43, 0.42),
    "fixed shape": (0.61, 0.57, 0.48, 0.59, 0.95),
}


@register_experiment(
    PAPER,
    "van-hateren-other-sets",
    domain=DOMAIN,
    uses="van-hateren",
    answers="the out-of-distribution experiment on van Hateren's images",
    shows="Whether permuted patches, digits, clothes and X-rays leave a model of van Hateren's images less certain.",
    rows={row: {} for row in (*PRINTED, "collapsed")},
    numbers={
        **of_both({f"{WIDTH}, {of_set}": "prior sds" for of_set in SHOWN}),
        **_aurocs(SHOWN[1:]),
    },
    needs=(VAN_HATEREN, *_other_sets(40, 8)),
    settings={**SETTINGS, "images": 64, "draws": 250},
    quick=QUICK,
    reduced=REDUCED,
    reduced_quick=f"32 images of each set. {REDUCED}",
    minutes=(0.5, 10),
    seeds=(1, 3),
    targets=tuple(
        Target(row, f"{WIDTH}, {of_set}, guide", value, because=OWN_POWER)
        for row, values in PRINTED.items()
        for of_set, value in zip(SHOWN, values, strict=True)
    ),
    summarise=_tell,
)
def van_hateren_other_sets(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Widths of the posteriors of van Hateren's patches and of other sets."""
    model, guide = context.trained_by(row, build)
    problem = Problem.of(model, guide, images_of(context)["test"])
    patches = problem.data.tensors()[0]["x"]
    sets = {PERMUTED: shuffled_across_images(patches, context.stream("permuted")), **_others(context, patches)}
    plan = OutsidePlan(context.settings["images"], sources=sources_of(context.settings))
    scores = ood_of(problem, sets, plan, context.stream("outside"), context.progress)
    found = of_scores(scores)
    for of_set in SHOWN:
        for name, source in SOURCES.items():
            widths = scores["score"].sel(source=source, matching="as shown").values
            found[f"{WIDTH}, {of_set}, {name}"] = float(np.nanmedian(widths[scores["of_set"].values == of_set]))
    return found


# -- MNIST -------------------------------------------------------------------------------------------------------------

OTHERS = (PERMUTED, SETS[1])
X_RAYS = (SETS[2],)
READ = {"labelled": 10_000, "passes": 100}
BINARY_QUICK: Mapping[str, Any] = {"images": 10, "labelled": 1_500, "passes": 30, **SAMPLED_QUICK}


def _binary(name: str, label: str, fallback: Needs | None = None) -> Needs:
    options = {"size": 32, "values": "binarised"}
    return Needs(name, options, key=label, fallback=fallback, quick_options={"size": 16}, **GREY)


def _entropies(sets: tuple[str, ...]) -> dict[str, str]:
    unit = "nats (at most 2.303)"
    entropies = of_both({f"{ENTROPY}, {of_set}": unit for of_set in ("inside", *sets)})
    return {**entropies, ACCURACY: "of held-out digits, by the classifier's average over draws of the guide"}


def _entropy_claims(sets: tuple[str, ...]) -> tuple[Claim, ...]:
    return tuple(
        Claim(
            f"labels read from the EA-VAE are less certain than those from the VAE, at {of_set}",
            EA_VAE,
            f"{ENTROPY}, {of_set}",
            "above",
            0.0,
            VAE,
        )
        for of_set in sets
    )


def _of_digits(context: Context, row: str, sets: Mapping[str, Any]) -> dict[str, Any]:
    """AUROCs and label entropies of other sets of binary images."""
    settings, digits = context.settings, images_of(context)
    problem = trained_problem(context, row, digits["test"])
    sources = sources_of(settings)
    scores = ood_of(problem, sets, OutsidePlan(settings["images"], sources=sources), context.stream("outside"))
    train = context.splits["train"][: settings["labelled"]]
    read = label_entropy_of(
        problem.of_some(train.select(["x"])),
        train.tensors()[0]["y"].numpy(),
        digits["test"],
        sets,
        ReadOutPlan(settings["images"], settings["passes"], sources=sources),
        context.stream("labels"),
    )
    found = of_scores(scores) | {"entropies": as_bytes(read)}
    found[REFUSED] = max(found[REFUSED], float(read["entropy"].sel(source="exact").isnull().mean()))
    found[ACCURACY] = Measured(float(read["accuracy_of_mean"]), float(read["accuracy_of_mean_se"]))
    if found[ACCURACY].value < LEAST_ACCURACY:
        return found
    for of_set in read["set"].values.tolist():
        for name, source in SOURCES.items():
            one = read.sel(set=of_set, source=source)
            number = f"{ENTROPY}, {of_set}, {name}"
            found[number] = Measured(float(one["entropy_mean"]), float(one["entropy_mean_se"]))
    return found


@register_experiment(
    PAPER,
    "mnist-other-sets",
    domain=MNIST,
    uses="mnist-models",
    answers="the out-of-distribution experiment: permuted pixels and Fashion-MNIST",
    shows="Whether permuted digits and clothes leave the latents of a model of digits, and their labels, less certain.",
    rows={row: {} for row in MODELS},
    numbers={**_aurocs(OTHERS), **_entropies(OTHERS)},
    needs=(DIGITS, _binary("fashion-mnist", SETS[1])),
    settings={"images": 256, **SAMPLED, **READ},
    quick=BINARY_QUICK,
    reduced=HOW_SAMPLED,
    reduced_quick=f"10 images of each set. {HOW_QUICK}",
    minutes=(1, 60),
    seeds=(3, 3),
    targets=(
        Target(VAE, f"{ENTROPY}, {PERMUTED}, guide", 0.562),
        Target(EA_VAE, f"{ENTROPY}, {PERMUTED}, guide", 1.227),
    ),
    claims=(*_claims(OTHERS), *_entropy_claims(OTHERS)),
    summarise=_tell,
)
def mnist_other_sets(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Widths and label entropies of permuted digits and of clothes."""
    digits = images_of(context)["test"].tensors()[0]["x"]
    permuted = shuffled_across_images(digits, context.stream("permuted"))
    return _of_digits(context, row, {PERMUTED: permuted, SETS[1]: context.data[SETS[1]]["test"]})


@register_experiment(
    PAPER,
    "mnist-x-rays",
    domain=MNIST,
    uses="mnist-models",
    answers="the out-of-distribution experiment: chest X-rays",
    shows="Whether X-rays leave the latents of a model of digits, and the digit that they stand for, less certain.",
    rows={row: {} for row in MODELS},
    numbers={**_aurocs(X_RAYS), **_entropies(X_RAYS)},
    needs=(DIGITS, _binary("chest-mnist", SETS[2], _binary("pneumonia-mnist", SETS[2]))),
    settings={"images": 256, **SAMPLED, **READ},
    quick=BINARY_QUICK,
    reduced=HOW_SAMPLED,
    reduced_quick=f"10 images of each set. {HOW_QUICK}",
    minutes=(1, 60),
    seeds=(3, 3),
    targets=(
        Target(VAE, f"{ENTROPY}, {SETS[2]}, guide", 0.602),
        Target(EA_VAE, f"{ENTROPY}, {SETS[2]}, guide", 1.795),
    ),
    claims=(*_claims(X_RAYS), *_entropy_claims(X_RAYS)),
    summarise=_tell,
)
def mnist_x_rays(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Widths and label entropies of chest X-rays."""
    return _of_digits(context, row, {SETS[2]: context.data[SETS[2]]["test"]})
