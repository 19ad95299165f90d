"""Contrast (Figure 1 of the EA-VAE paper): how the width of the posterior follows the contrast of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import xarray as xr

from calibrant.evaluation.reporting.contrast_plots import bins_figure, contrast_figure
from calibrant.evaluation.reporting.style import data_uri
from calibrant.evaluation.uncertainty.bins import BinsPlan, contrast_bins_of
from calibrant.evaluation.uncertainty.contrast import ContrastPlan, contrast_of
from calibrant.inference.problem import Problem
from calibrant.reproductions.cards import Claim, Target
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.datasets import as_bytes, datasets_of
from calibrant.reproductions.found import Found, Picture, Summary
from calibrant.reproductions.measures import sds_over_contrast
from calibrant.reproductions.papers.ea_vae import PAPER, SOURCES, of_both
from calibrant.reproductions.papers.ea_vae_models import (
    CLOSED,
    CLOSED_QUICK,
    DIGITS,
    EA_VAE,
    HOW_QUICK,
    HOW_SAMPLED,
    LINEAR_QUICK,
    LINEAR_SETTINGS,
    MNIST,
    MODELS,
    NATURAL,
    PATCHES,
    SAMPLED,
    SAMPLED_QUICK,
    VAE,
    images_of,
    sources_of,
    trained,
    trained_problem,
)
from calibrant.reproductions.papers.ea_vae_van_hateren import DOMAIN, build
from calibrant.reproductions.papers.ea_vae_van_hateren import PATCHES as VAN_HATEREN
from calibrant.reproductions.registering import register_experiment

SLOPE, LOW, HIGH = "slope", "sd at low contrast", "sd at high contrast"
OFF = "sd at low contrast less the prior's"
RANKS, REFUSED = "rank correlation", "refused"
FLAT = 0.05  # prior sds per decade of contrast, or over the whole contrast: less is called flat


def _numbers(step: str) -> dict[str, str]:
    words = {SLOPE: f"prior sds per {step}", LOW: "prior sds", HIGH: "prior sds", OFF: "prior sds"}
    return of_both(words) | {REFUSED: "share of images without a reference at some contrast"}


def of_curves(curves: xr.Dataset, steps: np.ndarray) -> dict[str, Any]:
    """Slope of the posterior sd in units of the steps, its values at both ends, and the curves."""
    known = sds_over_contrast(curves)
    lost = 1.0 - known["exact"].shape[1] / curves.sizes["image"]
    found: dict[str, Any] = {REFUSED: lost, "curves": as_bytes(curves)}
    for name, sds in known.items():
        found[f"{SLOPE}, {name}"] = Measured.of(np.polyfit(steps, sds, 1)[0])
        found[f"{LOW}, {name}"], found[f"{HIGH}, {name}"] = Measured.of(sds[0]), Measured.of(sds[-1])
        found[f"{OFF}, {name}"] = Measured.of(sds[0] - 1.0)
    return found


def _plan(settings: Mapping[str, Any], about: str = "mean") -> ContrastPlan:
    drawing = {name: settings[name] for name in CLOSED}
    return ContrastPlan(settings["levels"], settings["images"], about=about, **drawing)


def _varying(bins: xr.Dataset) -> dict[str, str]:
    """The sources whose variance may vary: without a scale, the exact one is flat, and its ranks are noise."""
    return {name: source for name, source in SOURCES.items() if bins.attrs["scale"] or name != "exact"}


def _slopes(found: Found) -> list[str]:
    parts = [
        f"{row} {found.mean(row, f'{SLOPE}, exact')} exactly and {found.mean(row, f'{SLOPE}, guide')} by the guide"
        for row in found.rows
    ]
    return [f"Slope of the posterior sd over contrast: {'; '.join(parts)} ({found.card.numbers[f'{SLOPE}, exact']})."]


# -- natural images ----------------------------------------------------------------------------------------------------


def _natural(found: Found) -> Summary:
    sentences = [
        *_slopes(found),
        "Without a scale, the exact posterior of a linear model with Normal latents has one width for all images: that "
        "the VAE is flat is a theorem, not a failure of its guide.",
    ]
    pictures = []
    if curves := datasets_of(found, "curves", found.rows):
        caption = (
            "Each curve shows the same images at several contrasts. Where the image is weaker than the noise (left of "
            "the dotted line), the posterior of a model that knows of contrast is as wide as the prior (dashed)."
        )
        pictures.append(Picture("Posterior and contrast", caption, data_uri(contrast_figure(curves))))
    if bins := datasets_of(found, "bins", found.rows):
        caption = "The paper's form: test images at their own contrast, in bins. Means over images ± standard errors."
        pictures.append(Picture("Images at their own contrast", caption, data_uri(bins_figure(bins))))
    return Summary(sentences, pictures)


@register_experiment(
    PAPER,
    "natural-contrast",
    domain=NATURAL,
    uses="natural-models",
    answers="Figure 1",
    shows="Whether the latents are less certain where an image has little contrast, exactly and in the guide.",
    rows={row: {} for row in MODELS},
    numbers={
        **_numbers("decade of contrast"),
        **of_both({RANKS: "of posterior variance and contrast, over bins"}),
    },
    needs=(PATCHES,),
    settings={
        **CLOSED, "levels": [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0], "images": 64, "binned": 1_000, "bins": 101,
    },
    quick={**CLOSED_QUICK, "images": 24, "binned": 500, "bins": 21},
    reduced="Contrast is in units of the noise; the posterior is exact, by quadrature over the scale.",
    reduced_quick="Contrast is in units of the noise. 24 images at 7 contrasts, and 500 images in 21 bins.",
    minutes=(0.3, 2),
    seeds=(3, 3),
    claims=(
        Claim("the EA-VAE is more certain the higher the contrast", EA_VAE, SLOPE, "below"),
        Claim("the VAE does not become more certain with contrast", VAE, SLOPE, "above", -FLAT),
        Claim("far below the noise, the EA-VAE's posterior is the prior, within a tenth", EA_VAE, OFF, "within", 0.1),
    ),
    summarise=_natural,
)  # fmt: skip
def natural_contrast(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Posterior widths of the same natural patches at several contrasts, and of patches at their own."""
    settings, splits = context.settings, images_of(context)
    problem = trained_problem(context, row, splits["test"])
    plan = _plan(settings)
    found = of_curves(contrast_of(problem, plan, context.stream("contrast")), np.log10(settings["levels"]))
    bins = contrast_bins_of(
        problem.of_some(problem.data[: settings["binned"]]),
        splits["train"][: settings["binned"]],
        BinsPlan(settings["bins"], sources=sources_of(settings)),
        context.stream("bins"),
    )
    ranks = {f"{RANKS}, {name}": bins.attrs[f"spearman_{source}"] for name, source in _varying(bins).items()}
    return {**found, **ranks, "bins": as_bytes(bins)}


# -- the paper's own prior ---------------------------------------------------------------------------------------------


def _laplace(found: Found) -> Summary:
    curves = datasets_of(found, "curves", found.rows)
    caption = "Posterior and contrast under the paper's Laplace prior, with references by Markov chains."
    pictures = [Picture("Laplace latents", caption, data_uri(contrast_figure(curves)))] if curves else []
    return Summary(_slopes(found), pictures)


@register_experiment(
    PAPER,
    "natural-laplace",
    domain=NATURAL,
    answers="Figure 1, with the paper's Laplace prior",
    shows="Whether certainty follows contrast under the paper's Laplace prior, with sampled exact posteriors.",
    rows={row: {"model": name, "preset": "natural-lognormal"} for row, name in MODELS.items()},
    numbers=_numbers("decade of contrast"),
    needs=(PATCHES,),
    settings={
        **LINEAR_SETTINGS, **CLOSED, "levels": [0.1, 0.3, 1.0, 3.0, 10.0], "images": 32,
    },
    quick={**LINEAR_QUICK, "latents": 8, "levels": [0.1, 1.0, 10.0], "images": 2, "draws": 500, "warmup": 200},
    reduced="Patches of 16×16.",
    reduced_quick="8,000 patches of 12×12, 8 latents, 10 epochs, one seed; 2 images at 3 contrasts.",
    minutes=(1, 60),
    seeds=(1, 3),
    claims=(
        Claim("the EA-VAE is more certain the higher the contrast (Laplace prior)", EA_VAE, SLOPE, "below"),
        Claim("the VAE does not become more certain with contrast (Laplace prior)", VAE, SLOPE, "above", -FLAT),
    ),
    summarise=_laplace,
)  # fmt: skip
def natural_laplace(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train with Laplace latents, and follow the width of the posterior over contrast."""
    settings = context.settings
    problem = trained(context)
    plan = _plan(settings)
    return of_curves(contrast_of(problem, plan, context.stream("contrast")), np.log10(settings["levels"]))


# -- van Hateren's images, as the paper shows them ---------------------------------------------------------------------

FAINT, STRONG = "variance at low contrast", "variance at high contrast"
OF_BINS = {
    RANKS: "of posterior variance and contrast, over bins",
    FAINT: "of the prior's, in the lowest bin",
    STRONG: "of the prior's, in the highest bin (contrast 2.07 in the paper)",
}
AUTHORS = {"VAE": VAE, "fixed shape": EA_VAE}  # rows that are trained with the authors' kind of guide


def _van_hateren(found: Found) -> Summary:
    bins = datasets_of(found, "bins", found.rows)
    caption = "Patches at their own contrast, in bins. A posterior that knows of contrast starts at the prior (dashed)."
    pictures = [Picture("The paper's curves", caption, data_uri(bins_figure(bins)))] if bins else []
    ranks = "; ".join(
        f"{row} {found.mean(row, f'{RANKS}, exact')} exactly, {found.mean(row, f'{RANKS}, guide')} by the guide"
        for row in found.rows
    )
    return Summary([f"Rank correlation of posterior variance and contrast: {ranks}."], pictures)


@register_experiment(
    PAPER,
    "van-hateren-contrast",
    domain=DOMAIN,
    uses="van-hateren",
    answers="Figure 1, the curves over bins of contrast",
    shows="The paper's four curves over the contrast of patches, by the guide and exactly.",
    rows={row: {} for row in (*AUTHORS, "collapsed")},
    numbers=of_both(OF_BINS),
    needs=(VAN_HATEREN,),
    settings={**CLOSED, "draws": 250, "binned": 1_000, "bins": 101},
    quick={**CLOSED_QUICK, "binned": 400, "bins": 15},
    reduced="Normal latents, for which the posterior is exact.",
    reduced_quick="Normal latents, for which the posterior is exact; 400 patches in 15 bins, one seed.",
    minutes=(0.2, 20),
    seeds=(1, 3),
    targets=(
        Target("VAE", f"{RANKS}, guide", 0.998),
        Target("fixed shape", f"{RANKS}, guide", -0.991),
        Target("VAE", f"{FAINT}, guide", 0.171),
        Target("fixed shape", f"{FAINT}, guide", 1.087),
        Target("VAE", f"{STRONG}, guide", 0.244),
        Target("fixed shape", f"{STRONG}, guide", 0.114),
    ),
    summarise=_van_hateren,
)
def van_hateren_contrast(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Posterior variances in bins of contrast."""
    settings, splits = context.settings, images_of(context)
    model, guide = context.trained_by(row, build)
    bins = contrast_bins_of(
        Problem.of(model, guide, splits["test"][: settings["binned"]]),
        splits["train"][: settings["binned"]],
        BinsPlan(settings["bins"], sources=sources_of(settings)),
        context.stream("bins"),
    )
    found: dict[str, Any] = {"bins": as_bytes(bins)}
    for name, source in SOURCES.items():
        variance = bins["noise_variance"].sel(source=source).values
        known = variance[np.isfinite(variance)]
        found[f"{FAINT}, {name}"], found[f"{STRONG}, {name}"] = known[0], known[-1]
    found |= {f"{RANKS}, {name}": bins.attrs[f"spearman_{source}"] for name, source in _varying(bins).items()}
    return found


# -- MNIST -------------------------------------------------------------------------------------------------------------

ABOUT = ("black", "mid-grey")
BY: Literal["ours"] = "ours"  # the paper does not fade digits


def _row(model: str, about: str) -> str:
    return f"{model}, about {about}"


def _digits(found: Found) -> Summary:
    sentences = [
        *_slopes(found),
        "A digit that fades to black becomes an image of few bright pixels. One that fades to mid-grey becomes pixels "
        "that are on or off by chance, which is what a scale of zero makes. The two are different tests.",
    ]
    pictures = []
    for about in ABOUT:
        if curves := datasets_of(found, "curves", [_row(model, about) for model in MODELS]):
            caption = (
                f"The same digits at several shares of their contrast about {about}. The dashed line is the prior."
            )
            pictures.append(Picture(f"Digits that fade to {about}", caption, data_uri(contrast_figure(curves))))
    return Summary(sentences, pictures)


@register_experiment(
    PAPER,
    "mnist-contrast",
    domain=MNIST,
    uses="mnist-models",
    answers="Figure 1, asked of digits",
    shows="Whether the latents are less certain where a digit fades to black, or to mid-grey.",
    rows={_row(model, about): {"model": model, "about": about} for about in ABOUT for model in MODELS},
    numbers=_numbers("step from no contrast to full"),
    needs=(DIGITS,),
    settings={**SAMPLED, "levels": [0.05, 0.2, 0.4, 0.6, 0.8, 1.0], "images": 64},
    quick={**SAMPLED_QUICK, "levels": [0.1, 0.5, 1.0], "images": 8},
    reduced=f"Binary digits, drawn again at every contrast with the same uniform number per pixel. {HOW_SAMPLED}",
    reduced_quick=f"8 binary digits at 3 contrasts, with the same uniform number per pixel. {HOW_QUICK}",
    minutes=(1, 60),
    seeds=(3, 3),
    claims=tuple(
        claim
        for about in ABOUT
        for claim in (
            Claim(
                f"the EA-VAE is more certain the less a digit fades to {about}",
                _row(EA_VAE, about),
                SLOPE,
                "below",
                by="ours",
            ),
            Claim(
                f"the VAE is as certain after a digit has faded to {about}",
                _row(VAE, about),
                SLOPE,
                "within",
                FLAT,
                by="ours",
            ),
        )
    ),
    summarise=_digits,
)
def mnist_contrast(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Posterior widths of the same digits at several contrasts about black or mid-grey."""
    settings, given = context.settings, context.arguments
    problem = trained_problem(context, given["model"], images_of(context)["test"])
    plan = _plan(settings, given["about"])
    return of_curves(contrast_of(problem, plan, context.stream("contrast")), np.array(settings["levels"]))
