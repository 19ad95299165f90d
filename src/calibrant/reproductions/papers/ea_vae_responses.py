"""Responses of latents (EA-VAE paper): divisive normalisation, fields, and the aggregate posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from calibrant.evaluation.reporting.response_plots import bow_tie_figure, divisive_figure, fields_figure
from calibrant.evaluation.reporting.style import data_uri
from calibrant.evaluation.uncertainty.aggregates import aggregate_of
from calibrant.evaluation.uncertainty.bow_ties import bow_tie
from calibrant.evaluation.uncertainty.divisive import divisive_normalisation, filter_responses
from calibrant.evaluation.uncertainty.fields import white_noise_fields
from calibrant.evaluation.uncertainty.means import MeansPlan, means_of
from calibrant.evaluation.uncertainty.projections import projective_fields
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
    VAE,
    images_of,
    sources_of,
    trained_problem,
)
from calibrant.reproductions.registering import register_experiment

GAIN, DIVISIVE, FLARE, FILTERS, AGGREGATE = "gain", "divisive", "flare", "flare of filters", "aggregate variance"
MEANS = "Exact posterior means by quadrature over the scale; filters are the fields by white noise."
EXCESS = "aggregate variance less the prior's"
NO_GAIN = 0.01  # share of the variance: less is called no gain


def _tell(found: Found) -> Summary:
    gains = "; ".join(
        f"{row} {found.mean(row, f'{GAIN}, exact')} exactly, {found.mean(row, f'{GAIN}, guide')} by the guide"
        for row in found.rows
    )
    sentences = [
        f"Share of the variance of posterior means that division explains beyond a linear filter: {gains}.",
        "Without a scale, the exact posterior mean of a linear model with Normal latents is linear in the image: "
        "division finds nothing. With a scale, it is shrunk by the power that the dictionary explains.",
    ]
    pictures = []
    fits = _restored(found, "fit")
    if fits:
        caption = "Held-out explained variance of posterior means, by division and by linear filters alone. First seed."
        pictures.append(Picture("Divisive normalisation", caption, data_uri(divisive_figure(fits))))
    ties = _restored(found, "bow tie")
    if ties:
        caption = (
            "How widely one unit's response varies, given another's. Filters flare: where one responds strongly, so do "
            "others. Compare posterior means, which a division by a pool would make flare less."
        )
        pictures.append(Picture("Dependence between units", caption, data_uri(bow_tie_figure(ties))))
    pictures += _fields(found)
    return Summary(sentences, pictures)


def _fields(found: Found) -> list[Picture]:
    """Receptive fields of both sources beside projective ones, a picture for each model."""
    caption = (
        "Receptive fields by white noise (the slope of a latent's posterior mean in the pixels), exactly and by the "
        "guide, and projective fields (what a step of the latent adds to the mean image). Each has its own grey scale."
    )
    pictures, projected = [], _restored(found, "projective fields")
    for row, received in _restored(found, "fields").items():
        grids = {f"receptive, {name}": received["field"].sel(source=source) for name, source in SOURCES.items()}
        grids |= {"projective": projected[row]["field"]}
        pictures.append(Picture(f"Fields of the {row}", caption, data_uri(fields_figure(grids, 18))))
    return pictures


def _restored(found: Found, name: str) -> dict[str, xr.Dataset]:
    """The datasets whose array has a name that starts so, by row and the rest of the name."""
    ends = ("", *(f", {source}" for source in (*SOURCES, "filters")))
    pairs = ((row, end) for row in found.rows for end in ends)
    return {f"{row}{end}": one for row, end in pairs for one in datasets_of(found, f"{name}{end}", [row]).values()}


@register_experiment(
    PAPER,
    "natural-responses",
    domain=NATURAL,
    uses="natural-models",
    answers="divisive normalisation, fields (Figure 1 g), and the aggregate posterior",
    shows="Whether posterior means of latents are filters that are divided by the activity of others, in the exact "
    "posterior and in the guide.",
    rows={row: {} for row in MODELS},
    numbers={
        **of_both(
            {
                GAIN: "share of the variance, divisive less linear",
                DIVISIVE: "share of the variance",
                FLARE: "of posterior means, 0 without dependence",
                AGGREGATE: "of the prior variance",
            }
        ),
        FILTERS: "of linear filters",
    },
    needs=(PATCHES,),
    settings={"images": 3_000, "folds": 3, "epochs": 60, **CLOSED},
    quick={"images": 1_000, "folds": 2, "epochs": 30, **CLOSED_QUICK},
    reduced=MEANS,
    reduced_quick=f"1,000 patches. {MEANS}",
    minutes=(0.5, 10),
    seeds=(3, 3),
    claims=(
        Claim("division explains the EA-VAE's posterior means better than filters alone", EA_VAE, GAIN, "above"),
        Claim(
            "division explains more of the EA-VAE's posterior means than of the VAE's", EA_VAE, GAIN, "above", 0.0, VAE
        ),
        Claim("division explains nothing beyond linear filters in the VAE", VAE, GAIN, "within", NO_GAIN),
    ),
    summarise=_tell,
)
def natural_responses(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Divisive normalisation of filters fitted to posterior means; fields; variance of the aggregate posterior."""
    settings = context.settings
    test = images_of(context)["test"]
    problem = trained_problem(context, row, test[: settings["images"]])
    means = means_of(problem, MeansPlan(sources=sources_of(settings)), context.stream("means"))
    images = problem.data.tensors()[0]["x"].double().numpy()
    fields = white_noise_fields(
        problem.program, problem.guide, problem.data, noise=float(images.std()), seed=context.stream("fields")
    )
    projective = projective_fields(problem.program, problem.data)
    found: dict[str, Any] = {"fields": as_bytes(fields), "projective fields": as_bytes(projective)}
    found |= _aggregates(means)
    for name, source in SOURCES.items():
        drive = filter_responses(fields["field"].sel(source=source).values, images)
        mean, error = (means[part].sel(source=source).values for part in ("mean", "mean_error"))
        fit = divisive_normalisation(
            drive, mean, error, settings["folds"], epochs=settings["epochs"], seed=context.stream("division")
        )
        tie = bow_tie(mean)
        found |= {
            f"{GAIN}, {name}": Measured(float(fit["gain"]), float(fit["gain_se"])),
            f"{DIVISIVE}, {name}": _explained(fit, "divisive"),
            f"{FLARE}, {name}": Measured(float(tie["flare"]), float(tie["flare_se"])),
            f"fit, {name}": as_bytes(fit.drop_vars(["predicted", "weights"])),
            f"bow tie, {name}": as_bytes(tie),
        }
        if name == "exact":
            of_filters = bow_tie(drive)
            found[FILTERS] = Measured(float(of_filters["flare"]), float(of_filters["flare_se"]))
            found["bow tie, filters"] = as_bytes(of_filters)
    return found


def _explained(fit: xr.Dataset, model: str) -> Measured:
    at = fit.sel(model=model)
    return Measured(float(at["explained_variance"]), float(at["explained_variance_se"]))


def _aggregates(means: xr.Dataset) -> dict[str, Measured]:
    variance, error = (aggregate_of(means)[f"average_variance{end}"] for end in ("", "_se"))
    return {
        f"{AGGREGATE}, {name}": Measured(float(variance.sel(source=source)), float(error.sel(source=source)))
        for name, source in SOURCES.items()
    }


# -- MNIST -------------------------------------------------------------------------------------------------------------


@register_experiment(
    PAPER,
    "mnist-aggregate",
    domain=MNIST,
    uses="mnist-models",
    answers="the aggregate posterior",
    shows="Whether the average of all posteriors has the prior's variance, as for images that the model made itself.",
    rows={row: {} for row in MODELS},
    numbers={
        **of_both({AGGREGATE: "of the prior variance", EXCESS: "of the prior variance"}),
        "refused": "share of images without a reference",
    },
    needs=(DIGITS,),
    settings={"images": 1_000, **SAMPLED},
    quick={"images": 32, **SAMPLED_QUICK},
    reduced=HOW_SAMPLED,
    reduced_quick=f"32 images. {HOW_QUICK}",
    minutes=(0.3, 20),
    seeds=(3, 3),
    claims=(
        Claim(
            "the average of the EA-VAE's posteriors has the prior's variance, within a tenth",
            EA_VAE,
            EXCESS,
            "within",
            0.1,
        ),
    ),
)
def mnist_aggregate(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """The variance of latents under the average of all posteriors of test digits."""
    settings = context.settings
    problem = trained_problem(context, row, images_of(context)["test"][: settings["images"]])
    means = means_of(problem, MeansPlan(sources=sources_of(settings)), context.stream("means"))
    refused = 1.0 - float(np.isfinite(means["mean"].sel(source="exact").values).all(1).mean())
    found = _aggregates(means)
    excess = {f"{EXCESS}, {source}": found[f"{AGGREGATE}, {source}"] + -1.0 for source in SOURCES}
    return {**found, **excess, "refused": refused}
