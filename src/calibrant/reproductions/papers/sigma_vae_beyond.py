"""What the paper on calibrated decoders leaves open: the posterior of the latents, and contrast."""

from __future__ import annotations

from typing import Any

from calibrant.evaluation.uncertainty.contrast import contrast_experiment
from calibrant.guides.amortizing import amortize
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import ReferencePlan
from calibrant.models.registry import create
from calibrant.program.environment import seeded
from calibrant.reproductions.cards import Needs, Ordering
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Summary
from calibrant.reproductions.measures import check_of
from calibrant.reproductions.papers.sigma_vae import (
    BINARISED,
    BOUND,
    DECODERS,
    DEQUANTISED,
    GREY,
    LOSSES,
    PAPER,
    SHARED,
    digits,
    trained,
)
from calibrant.reproductions.registering import register_experiment
from calibrant.reproductions.sigma_courses import sigma_of
from calibrant.settings import Effort

# -- beyond the paper: the latents -------------------------------------------------------------------------------------

SLOW = ("categorical", "logistic mixture")  # a gradient of 256 levels, or of several components, for every pixel
LATENTS = {row: given for row, given in DECODERS.items() if row not in (*LOSSES, "shared σ, as in the paper")}


def _latents(found: Found) -> Summary:
    wide = "; ".join(f"{row}: {found.mean(row, 'sd ratio')}" for row in found.rows)
    inside = "; ".join(f"{row}: {found.mean(row, 'coverage')}" for row in found.rows)
    failed = "; ".join(f"{row}: {found.mean(row, 'fail, questions')}" for row in found.rows)
    left = [row for row in found.rows if found.mean(row, "passed the gate").value < 0.95]
    sentences = [
        f"Standard deviation of the guide's posterior over that of the reference, by decoder: {wide}.",
        f"Mass of the reference in the guide's central 90% intervals, which wrong means lower too: {inside}.",
        "The ratio is 1 and the mass .9 for a guide whose uncertainty is right: every guide is held against the "
        "posterior of its own model, whatever the noise of its decoder.",
        f"Deciding questions of the check that the guide fails: {failed}.",
    ]
    if left:
        sentences.append(
            f"References of more than 5% of the images did not converge for {', '.join(left)}: their rows describe the "
            "images that remain."
        )
    return Summary(sentences)


@register_experiment(
    PAPER,
    "latents",
    answers="beyond the paper: does a calibrated decoder calibrate the latent posterior?",
    shows="The check of every decoder's guide: its posterior beside the reference, and what the check answers.",
    rows=LATENTS,
    numbers={
        "sd ratio": "guide over reference",
        "coverage": "of the guide's 90% intervals, under the reference",
        "mean error": "reference standard deviations, root mean square",
        "passed the gate": "share of the images",
        "pass, questions": "of the check",
        "fail, questions": "of the check",
        "cannot tell, questions": "of the check",
        BOUND: "nats per image",
    },
    needs=(digits("dequantised", DEQUANTISED), digits("unit", GREY), digits("binarised", BINARISED)),
    settings={
        "latents": 4,
        "epochs": 100,
        "batch_size": 128,
        "lr": 2e-3,
        "images": 128,
        "few_images": 32,
        "warmup": 500,
        "draws": 1000,
        "simulations": 2000,
        "gap_data": 16,
    },
    quick={"epochs": 24, "images": 8, "few_images": 2, "warmup": 300, "draws": 500, "simulations": 200, "gap_data": 2},
    reduced="8×8 digits, a small MLP and 4 latents, so that every reference can be sampled.",
    reduced_quick="8×8 digits, a small MLP, 4 latents, 8 images (2 for the slowest decoders): too few to pass a check.",
    minutes=(2, 40),
    seeds=(1, 3),
    summarise=_latents,
)
def latents(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train a small VAE with the decoder of a row, and check its guide against the reference."""
    splits, settings = context.data[context.arguments.get("data", DEQUANTISED)], context.settings
    model, guide, _ = trained(context, splits)
    count = settings["few_images" if row in SLOW else "images"]
    problem = Problem.of(model, guide, splits["test"][:count])
    plan = ReferencePlan(warmup=settings["warmup"], draws=settings["draws"], init=guide)
    effort = Effort(draws=settings["draws"], simulations=settings["simulations"], gap_data=settings["gap_data"])
    return {**check_of(context, problem, plan, effort), BOUND: -context.elbo(model, guide, splits["test"])}


# -- beyond the paper: contrast ----------------------------------------------------------------------------------------

CONTRAST: dict[str, dict[str, Any]] = {
    "VAE, fixed σ": {"model": "vae", "likelihood": {"name": "gaussian", "scale": 0.4, "learn": False}},
    "VAE, learned σ": {"model": "vae", "likelihood": SHARED},
    "EA-VAE, fixed σ": {"model": "ea-vae", "likelihood": {"name": "gaussian", "scale": 0.4, "learn": False}},
    "EA-VAE, learned σ": {"model": "ea-vae", "likelihood": SHARED},
    "VAE, σ per image": {"model": "sigma-image-vae"},
}


def _contrast(found: Found) -> Summary:
    sds = "; ".join(f"{row}: {found.mean(row, 'sd at high contrast')}" for row in found.rows)
    scale = found.difference("VAE, learned σ", "EA-VAE, learned σ", BOUND)
    noise = found.difference("EA-VAE, fixed σ", "EA-VAE, learned σ", BOUND)
    own = found.difference("EA-VAE, learned σ", "VAE, σ per image", BOUND)
    return Summary(
        [
            f"With σ learned in both, the scale gains {scale} nats per patch; learning σ gains the EA-VAE {noise}. "
            f"Without that scale, a noise scale of its own for every image gains {own} against both together.",
            "Posterior standard deviation of the latents at ten times the noise's contrast over that at a tenth of it, "
            f"by the exact posterior: {sds}. One noise scale for all images cannot follow contrast, whether it is "
            "learned or not: in a linear model with Normal latents the posterior's width does not depend on the image.",
        ]
    )


@register_experiment(
    PAPER,
    "contrast",
    answers="beyond the paper: a learned σ beside a global scale",
    shows="Which of the two explains contrast: the noise scale, or the scale of the EA-VAE.",
    rows=CONTRAST,
    numbers={BOUND: "nats per patch", "σ": "of the patches' unit", "sd at high contrast": "over that at low contrast"},
    needs=(Needs("natural-patches", {"size": 12}, quick={"train": 8_000, "test": 400}),),
    settings={"latents": 36, "epochs": 30, "batch_size": 256, "lr": 3e-3, "images": 24},
    quick={"epochs": 10, "images": 8},
    reduced="Whitened 12×12 patches, 36 latents and a linear decoder, for which the posterior is exact.",
    reduced_quick="8,000 whitened 12×12 patches, 36 latents and a linear decoder, 10 epochs.",
    minutes=(0.5, 10),
    seeds=(1, 3),
    orderings=(
        Ordering(BOUND, ("EA-VAE, learned σ", "VAE, learned σ"), "the global scale is worth nats beside a learned σ"),
    ),
    summarise=_contrast,
)
def contrast(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train a linear model with or without a global scale, and follow its exact posterior over contrast."""
    settings, given, train = context.settings, dict(context.arguments), context.splits["train"]
    with seeded(context.stream("model")):
        model: Any = create(given.pop("model"), shape=(1, 12, 12), latents=settings["latents"], **given)
    guide = amortize(model, train, seed=context.stream("guide"))
    context.fit(model, guide, **{name: settings[name] for name in ("epochs", "batch_size", "lr")})
    found: dict[str, Any] = {BOUND: -context.elbo(model, guide), **sigma_of(model)}
    if "likelihood" not in given:
        return found
    test, chosen = context.splits["test"], {"images": settings["images"], "seed": context.stream("contrast")}
    curves = contrast_experiment(model, guide, test, levels=(0.1, 1.0, 10.0), **chosen)
    sd = curves["posterior_sd"].sel(source="exact")
    return {**found, "sd at high contrast": float(sd[-1] / sd[0])}
