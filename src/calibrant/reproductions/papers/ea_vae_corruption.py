"""Corrupted images (EA-VAE paper): how posteriors change under noise, blur, occlusion and permutation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from calibrant.evaluation.reporting.corruption_plots import corruption_figure
from calibrant.evaluation.reporting.style import data_uri
from calibrant.evaluation.uncertainty.corruption import CorruptionPlan, corruption_of
from calibrant.evaluation.uncertainty.corruptions import KINDS
from calibrant.reproductions.cards import Claim
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
    images_of,
    sources_of,
    trained_problem,
)
from calibrant.reproductions.registering import register_experiment


def _change(kind: str) -> str:
    return f"sd under {kind}"


def _coverage(kind: str) -> str:
    return f"coverage under {kind}"


PLAIN = "coverage without corruption"
COVERED = "of 90% intervals, for the true latents of simulated images"
NUMBERS = {
    **of_both({PLAIN: COVERED}),
    **of_both({_change(kind): "prior sds, strongest level less none" for kind in KINDS}),
    **of_both({_coverage(kind): COVERED for kind in KINDS}),
    "refused": "largest share of images without a reference, over kinds and levels",
}
WORDS = {
    "noise": "under strong noise",
    "blur": "that are blurred",
    "occlusion": "that are hidden for the most part",
    "contrast": "that lost their contrast",
    "permutation": "with exchanged pixels",
}
CLAIMS = tuple(
    Claim(
        f"the EA-VAE is less certain at images {words} than at the same images before",
        EA_VAE,
        _change(kind),
        "above",
        by="ours",
    )
    for kind, words in WORDS.items()
)


def of_corruption(result: xr.Dataset) -> dict[str, Any]:
    """Changes of the posterior sd from no corruption to the strongest, and the coverage of known latents there."""
    found: dict[str, Any] = {"corruption": as_bytes(result), "refused": 1.0 - float(result["share_reference"].min())}
    exact = result["posterior_sd"].sel(source="exact")
    passed = exact.notnull()
    for name, source in SOURCES.items():
        plain = result.sel(source=source).isel(corruption=0, level=0)
        found[f"{PLAIN}, {name}"] = Measured(float(plain["coverage"]), float(plain["coverage_se"]))
    for kind in result["corruption"].values.tolist():
        for name, source in SOURCES.items():
            at = result.sel(corruption=kind, source=source)
            sd = at["posterior_sd"].where(passed.sel(corruption=kind)).values
            change = sd[-1] - sd[0]
            found[f"{_change(kind)}, {name}"] = Measured.of(change[np.isfinite(change)])
            found[f"{_coverage(kind)}, {name}"] = Measured(float(at["coverage"][-1]), float(at["coverage_se"][-1]))
    return found


def _tell(found: Found) -> Summary:
    results = datasets_of(found, "corruption")
    if not results:
        return Summary()
    sentences = [
        f"Change of the posterior sd under the strongest {kind}, in prior sds: "
        + "; ".join(
            f"{row} {found.mean(row, f'{_change(kind)}, exact')} exactly, {found.mean(row, f'{_change(kind)}, guide')} "
            "by the guide"
            for row in found.rows
        )
        + "."
        for kind in KINDS
    ]
    covered = "; ".join(
        f"{row}, {kind} " + " and ".join(str(found.mean(row, f"{_coverage(kind)}, {source}")) for source in SOURCES)
        for row in found.rows
        for kind in KINDS
    )
    whole = "; ".join(
        f"{row} {found.mean(row, f'{PLAIN}, exact')} and {found.mean(row, f'{PLAIN}, guide')}" for row in found.rows
    )
    sentences.append(
        f"Without corruption, central 90% intervals of the exact posterior and of the guide hold {whole} of the true "
        "latents of simulated images. What the guide lacks there needs no corruption."
    )
    sentences.append(
        "Share of the true latents of simulated images in central 90% intervals under the strongest corruption, of the "
        f"exact posterior and of the guide: {covered}. A model that does not know of a corruption need not be "
        "calibrated there, even if its inference is exact."
    )
    pictures = [
        Picture(
            "Posterior widths under corruption",
            "The same images under five kinds of corruption, from none (left) to strong. The dashed line is the prior. "
            "Error bars are two standard errors over images. First seed.",
            data_uri(corruption_figure(results)),
        ),
        Picture(
            "Coverage of true latents under corruption",
            "Share of the true latents of simulated images in the central 90% intervals of their posteriors.",
            data_uri(corruption_figure(results, "coverage")),
        ),
    ]
    return Summary(sentences, pictures)


def _run(context: Context, row: str) -> dict[str, Any]:
    settings = context.settings
    problem = trained_problem(context, row, images_of(context)["test"])
    plan = CorruptionPlan(
        levels=settings["levels"],
        images=settings["images"],
        simulated=settings["simulated"],
        sources=sources_of(settings),
    )
    return of_corruption(corruption_of(problem, plan, context.stream("corruption"), context.progress))


SETTINGS: Mapping[str, Any] = {"levels": 5, "images": 128, "simulated": 128}
QUICK: Mapping[str, Any] = {"levels": 3, "images": 24, "simulated": 24}
OURS = "The paper promises corrupted images, and its code has none: kinds and levels are ours."


@register_experiment(
    PAPER,
    "natural-corruption",
    domain=NATURAL,
    uses="natural-models",
    answers="the abstract's image corruption",
    shows="How the posteriors of natural patches change under five kinds of corruption.",
    rows={row: {} for row in MODELS},
    numbers=NUMBERS,
    needs=(PATCHES,),
    settings={**SETTINGS, **CLOSED},
    quick={**QUICK, **CLOSED_QUICK},
    reduced=OURS,
    reduced_quick=f"{OURS} 24 images and three of the five levels.",
    minutes=(0.5, 5),
    seeds=(3, 3),
    claims=CLAIMS,
    summarise=_tell,
)
def natural_corruption(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Posteriors of natural patches under corruption."""
    return _run(context, row)


@register_experiment(
    PAPER,
    "mnist-corruption",
    domain=MNIST,
    uses="mnist-models",
    answers="the abstract's image corruption",
    shows="How the posteriors of digits change under five kinds of corruption.",
    rows={row: {} for row in MODELS},
    numbers=NUMBERS,
    needs=(DIGITS,),
    settings={**SETTINGS, **SAMPLED},
    quick={"levels": 2, "images": 4, "simulated": 4, **SAMPLED_QUICK},
    reduced=f"{OURS} Corrupted digits are binarised again. {HOW_SAMPLED}",
    reduced_quick=f"{OURS} Corrupted digits are binarised again. 4 images and two of the five levels. {HOW_QUICK}",
    minutes=(1, 60),
    seeds=(3, 3),
    claims=CLAIMS,
    summarise=_tell,
)
def mnist_corruption(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Posteriors of digits under corruption."""
    return _run(context, row)
