"""Simple and Effective VAE Training with Calibrated Decoders (Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202).

Its small convolutional VAE with every decoder of its tables. Densities are trained and compared on dequantised images
(k + u)/256, discrete decoders on the grey values k/255, and Bernoulli on binarised images.
"""

from __future__ import annotations

from math import log, prod
from typing import Any

import numpy as np

from calibrant.data.dataset import Data
from calibrant.evaluation.reporting.rate_plots import rate_distortion_figure
from calibrant.evaluation.reporting.style import data_uri
from calibrant.guides.amortizing import amortize
from calibrant.inference.problem import Problem
from calibrant.models.registry import create
from calibrant.program.environment import seeded
from calibrant.reproductions.cards import Needs, Ordering, Target
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Picture, Summary, estimated, shown
from calibrant.reproductions.measures import (
    information_in,
    likelihood_of,
    pixels_of,
    samples_of,
    units_in_use,
)
from calibrant.reproductions.registering import register_experiment, register_paper
from calibrant.reproductions.sigma_courses import course_figure, sigma_of

PAPER = register_paper(
    "sigma-vae",
    title="Simple and Effective VAE Training with Calibrated Decoders",
    arxiv="2006.13202",
    sentence="A Gaussian decoder whose noise scale is learned, and shared by all pixels, needs no weight on the KL.",
).name

LEVELS = 256
DEQUANTISED, GREY, BINARISED = "dequantised", "grey", "binarised"
SHARED: dict[str, Any] = {"name": "gaussian", "scale": "data"}
DECODERS: dict[str, dict[str, Any]] = {
    "Bernoulli": {"likelihood": "bernoulli", "data": BINARISED},
    "continuous Bernoulli": {"likelihood": "continuous-bernoulli"},
    "categorical": {"likelihood": {"name": "categorical", "head": "pixel"}, "data": GREY},
    "bitwise categorical": {"likelihood": "bitwise", "data": GREY},
    "discretised Gaussian": {"likelihood": "discretised-gaussian", "data": GREY},
    "discretised logistic": {"likelihood": "discretised-logistic", "data": GREY},
    "logistic mixture": {"likelihood": "logistic-mixture", "data": GREY},
    "Gaussian, σ = 1": {"likelihood": {"name": "gaussian", "scale": 1.0, "learn": False}},
    "shared σ": {"likelihood": SHARED},
    "shared σ, as in the paper": {"likelihood": {"name": "gaussian", "scale": 1.0}, "epochs": 10},
    "optimal σ": {"likelihood": "gaussian-optimal"},
    "optimal σ per image (a loss)": {"likelihood": "gaussian-optimal-per-image"},
    "Student-t, one radius per image": {"likelihood": "student-t-radius"},
    "σ per image, a latent": {"model": "sigma-image-vae"},
    "σ per pixel": {"likelihood": "gaussian-per-pixel"},
    "Student-t per pixel": {"likelihood": "student-t"},
}
LOSSES = ("optimal σ per image (a loss)",)
NETWORK = {"width": 32, "latents": 20, "epochs": 40, "batch_size": 128, "lr": 1e-3}
SMALL = {"width": 4, "epochs": 20, "batch_size": 32, "lr": 5e-3}
EVALUATION = {"draws": 32, "particles": 64, "points": 2000, "prior_draws": 20_000}
LITTLE = {"draws": 8, "particles": 16, "points": 200, "prior_draws": 2_000}
BOUND = "negative ELBO"
LIKELIHOOD = {
    BOUND: "nats per image",
    "negative IWAE": "nats per image",
    "rate": "nats per image",
    "distortion": "nats per image",
}
PIT = "distance from that of the model's own data, less what chance gives"
MIDDLE = "share in the middle 80% of their predictions, less that of the model's own data"
SQUARED = "squared, 16 principal components"
CANNOT = (
    "150 steps of .001 cannot bring the logarithm of σ from 0 to below −.15, and −50 nats take a σ of .37 or less in "
    "images of 28×28"
)
MEASURED = {
    "marginal KL at least": "nats",
    "active units": "of the latents",
    "80% of pixels": MIDDLE,
    "pixel PIT": PIT,
    "σ": "of the largest grey value, root mean square",
    "Fréchet": SQUARED,
    "Fréchet floor": "squared, between real images",
}
ON_GREY_VALUES = {
    **LIKELIHOOD,
    "of grey values": "nats per image, negative ELBO as a probability of the 256 grey values",
    **MEASURED,
}
REDUCED = (
    "One network and optimiser for all rows: Adam with cosine decay, the best of all epochs by the validation ELBO. "
    "Frey faces are resized to 28×28, which the paper's numbers fit; errors are those of the five parts of the video."
)
REDUCED_QUICK = "Images of 16×12 (digits: 8×8), an eighth of the channels, 20 epochs, one seed and few draws."


def digits(values: str, key: str = "") -> Needs:
    return Needs("digits", {"levels": LEVELS, "values": values}, key=key)


def _faces(values: str, key: str = "") -> Needs:
    options, small = {"values": values, "size": 28}, {"size": [16, 12]}
    return Needs("frey-face", options, fallback=digits(values, key), quick_options=small, blocks=5, key=key)


FACES = (_faces("dequantised", DEQUANTISED), _faces("unit", GREY), _faces("binarised", BINARISED))


# -- a trained decoder -------------------------------------------------------------------------------------------------


def trained(context: Context, splits: Any) -> tuple[Any, Any, Any]:
    """The model of a row with its guide, and its training: the paper's networks, or the MLP of the settings."""
    settings, given, train = context.settings, dict(context.arguments), splits["train"]
    shape = tuple(train.batch([0])[0]["x"].shape[1:])
    network = {"name": "mlp", "hidden": 64} if "width" not in settings else _convolutions(settings)
    arguments = {"likelihood": given["likelihood"]} if "likelihood" in given else {}
    name = given.get("model", "vae")
    with seeded(context.stream("model")):
        model: Any = create(name, shape=shape, latents=settings["latents"], decoder=network, **arguments)
    convolutional = "width" in settings
    guide = amortize(
        model,
        train,
        family={"z": "log-variance"} if convolutional else "auto",
        encoder=network if convolutional else {"name": "mlp", "hidden": 64},
        seed=context.stream("guide"),
    )
    epochs = min(given.get("epochs", settings["epochs"]), settings["epochs"])
    options = {name: settings[name] for name in ("batch_size", "lr")}
    fit = context.fit(model, guide, splits, epochs=epochs, objective="kl", **options)
    return model, guide, fit


def _convolutions(settings: Any) -> dict[str, Any]:
    return {"name": "sigma-vae", "width": settings["width"]}


def _measured(context: Context, model: Any, guide: Any, splits: Any, blocks: int | None) -> dict[str, Any]:
    """Likelihood, use of the latents, calibration of pixels, and samples of a trained model, on test data."""
    settings, problem = context.settings, Problem.of(model, guide, splits["test"])
    information = information_in(context, problem, settings["points"], settings["prior_draws"])
    return {
        **likelihood_of(context, problem, settings["draws"], settings["particles"], blocks),
        "marginal KL at least": information["marginal KL at least"],
        **units_in_use(context, problem),
        **pixels_of(context, problem, settings["draws"]),
        **samples_of(context, problem, splits["train"]),
        **sigma_of(model),
    }


def _on_grey_scale(bound: Measured, images: Data, data: str) -> dict[str, Measured]:
    """The bound as one of the 256 grey values: a density of dequantised images, in units of [0, 1], gets D·ln 256."""
    if data == BINARISED:
        return {}
    entries = prod(images.batch([0])[0]["x"].shape[1:])
    more = entries * log(LEVELS) if data == DEQUANTISED else 0.0
    return {"of grey values": bound + more}


# -- Table 3, Table 4 --------------------------------------------------------------------------------------------------


def _decoders(found: Found) -> Summary:
    gain = found.difference("Gaussian, σ = 1", "shared σ", BOUND)
    optimal = found.difference("optimal σ", "shared σ", BOUND)
    paper = found.mean("shared σ, as in the paper", "σ")
    sentences = [
        f"The noise scale 1 costs {gain} nats per test image against one learned scale, which ends at "
        f"{found.mean('shared σ', 'σ')} of the largest grey value. The optimal σ, which is computed and not learned, "
        f"differs from it by {optimal} nats.",
        *_best_of_grey_values(found),
        *_scales_of_pixels(found),
        f"With the paper's start (σ = 1) and 10 epochs, σ is still {paper}: its logarithm can move no further than "
        "learning rate times steps.",
        "The σ of each image at its best value is a training loss and no density, so that it has no likelihood; the "
        "Student-t with one radius per image and the σ that is a latent are its proper forms.",
    ]
    return Summary(sentences)


def _scales_of_pixels(found: Found) -> list[str]:
    """Why a scale for every pixel does not beat a shared one, where it does not."""
    one, many = "shared σ", "σ per pixel"
    if not found.difference(many, one, BOUND).value > 0:
        return []
    return [
        f"A scale for every pixel has a rate of {found.mean(many, 'rate')} nats, beside {found.mean(one, 'rate')} of "
        "the shared one. After so short a training the scales account for what the latents would have to explain; the "
        "paper's order needs latents that are in use."
    ]


def _best_of_grey_values(found: Found) -> list[str]:
    """A sentence about the best row and the next one; none without two rows that have the number."""
    number = "of grey values"
    values = {row: found.mean(row, number).value for row in found.rows}
    first, second, *_ = [*sorted((row for row in values if np.isfinite(values[row])), key=values.__getitem__), "", ""]
    if not second:
        return []
    return [
        f"As probabilities of the grey values, the best bound is that of {first}, {found.mean(first, number)} nats per "
        f"image, with {found.difference(second, first, number)} between it and the next one, {second}."
    ]


@register_experiment(
    PAPER,
    "decoders",
    answers="Tables 2, 3 and 4",
    shows="Which decoder gives the data the highest likelihood, at the same network and training.",
    rows=DECODERS,
    numbers=ON_GREY_VALUES,
    needs=FACES,
    settings={**NETWORK, **EVALUATION},
    quick={**SMALL, **LITTLE},
    reduced=REDUCED,
    reduced_quick=REDUCED_QUICK,
    minutes=(3, 720),
    seeds=(1, 3),
    targets=(
        Target("categorical", BOUND, 2454, 250),
        Target("bitwise categorical", BOUND, 3173, 300),
        Target("logistic mixture", BOUND, 2562, 250),
        Target("Gaussian, σ = 1", BOUND, 726.4, 15),
        Target("shared σ, as in the paper", BOUND, -49.78, because=CANNOT),
        Target("optimal σ", BOUND, -1622, 150),
    ),
    orderings=(
        Ordering(BOUND, ("shared σ", "Gaussian, σ = 1"), "a learned scale beats the scale 1"),
        Ordering(BOUND, ("optimal σ", "Gaussian, σ = 1"), "the optimal scale beats the scale 1"),
        Ordering(BOUND, ("σ per pixel", "shared σ"), "a scale for every pixel beats a shared one"),
        Ordering("Fréchet", ("shared σ", "σ per pixel"), "samples of a shared scale lie closer to the data"),
        Ordering(
            "of grey values", ("discretised Gaussian", "discretised logistic"), "Gaussian bins beat logistic ones"
        ),
    ),
    summarise=_decoders,
)
def decoders(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train the paper's network with the decoder of a row, and evaluate it on the test data."""
    kind = context.arguments.get("data", DEQUANTISED)
    splits = context.data[kind]
    model, guide, _ = trained(context, splits)
    if row in LOSSES:
        return {}
    found = _measured(context, model, guide, splits, context.blocks(kind))
    return found | _on_grey_scale(found[BOUND], splits["test"], kind)


# -- Table 1, Figure 3 -------------------------------------------------------------------------------------------------

BETAS = (0.001, 0.01, 0.1, 1.0, 10.0)
SWEEP: dict[str, dict[str, Any]] = {
    **{f"β = {beta:g}": {"likelihood": {"name": "beta", "beta": beta}} for beta in BETAS},
    "shared σ": {"likelihood": SHARED},
    "optimal σ": {"likelihood": "gaussian-optimal"},
}


def _sweep(found: Found) -> Summary:
    betas = [row for row in found.rows if row.startswith("β")]
    validation = {row: np.nan_to_num(found.values(row, "negative validation ELBO"), nan=np.inf) for row in betas}
    best = {seed: min(betas, key=lambda row: float(validation[row][place])) for place, seed in enumerate(found.seeds)}
    chosen = {
        number: {seed: found.values(row, number)[place] for place, (seed, row) in enumerate(best.items())}
        for number in (BOUND, "rate", "distortion", "Fréchet")
    }
    points = {row: (found.mean(row, "rate").value, found.mean(row, "distortion").value) for row in found.rows}
    figure = rate_distortion_figure(
        {row.removeprefix("β = "): points[row] for row in betas if np.isfinite(points[row]).all()},
        {row: points[row] for row in found.rows if row not in betas and np.isfinite(points[row]).all()},
    )
    caption = (
        "Distortion against rate for each β, and for the scales that are found without a search. Models on one "
        "diagonal have the same ELBO."
    )
    sigma = found.mean("shared σ", "σ").value
    excess = [found.difference(row, "shared σ", BOUND, seed) for seed, row in best.items()]
    sentences = [
        f"The learned σ is {shown(sigma)}, which stands for β = 2σ² = {shown(2 * sigma**2)}. A search over "
        f"{len(betas)} values of β finds {', '.join(sorted(set(best.values())))} best on validation data; its "
        f"negative ELBO on test data exceeds that of the learned σ by "
        f"{estimated([each.value for each in excess], [each.se for each in excess])} nats.",
        "Every β is evaluated as the Gaussian that its loss stands for, σ² = β/2 for the loss SSE + β·KL, so that "
        "ELBOs of different β can be compared. Losses that are scaled by β cannot.",
        _inflection(found, betas),
    ]
    return Summary(sentences, [Picture("Rate and distortion", caption, data_uri(figure))], {"best β": chosen})


def _inflection(found: Found, betas: list[str]) -> str:
    """What is known of mutual information and marginal KL along the sweep (Figure 3)."""
    done = [row for row in betas if np.isfinite(found.mean(row, "rate").value)]
    known = [row for row in done if np.isfinite(found.mean(row, "mutual information").value)]
    most = [_ceiling(found, done, name) for name in ("ceiling", "classifier ceiling")]
    lower = "; ".join(f"{row}: {found.mean(row, 'marginal KL at least')}" for row in (*betas, "shared σ"))
    others = (
        f"; the others have more information than so many data can show (log N{most[0]}), where the "
        "estimate must call the rest marginal KL, so that the paper's inflection cannot be told from this ceiling"
    )
    return (
        f"The rate can be split into mutual information and marginal KL for {len(known)} of {len(done)} values of "
        f"β{others if len(known) < len(done) else ''}. A classifier (its bound has a ceiling too{most[1]}) finds a "
        f"marginal KL of at least: {lower} nats. Lower bounds do not order the marginal KLs themselves."
    )


def _ceiling(found: Found, rows: list[str], name: str) -> str:
    ceiling = found.array(rows[0], name) if rows else None
    return "" if ceiling is None else f", {shown(float(ceiling[0]))} nats here"


@register_experiment(
    PAPER,
    "beta-sweep",
    answers="Table 1 and Figure 3",
    shows="Whether one learned noise scale replaces the search for β, and what β trades.",
    rows=SWEEP,
    numbers={
        **LIKELIHOOD,
        "negative validation ELBO": "nats per image",
        "mutual information": "nats",
        "marginal KL": "nats",
        "marginal KL at least": "nats",
        "σ": "of the largest grey value",
        "Fréchet": SQUARED,
        "Fréchet floor": "squared, between real images",
    },
    needs=(_faces("dequantised"),),
    settings={**NETWORK, **EVALUATION},
    quick={**SMALL, **LITTLE},
    reduced="Frey faces in place of SVHN, whose numbers stand in the paper. " + REDUCED,
    reduced_quick=REDUCED_QUICK,
    minutes=(1, 360),
    seeds=(1, 3),
    orderings=(
        Ordering(BOUND, ("shared σ", "β = 1", "β = 10"), "the learned σ beats β = 1, and β = 1 beats β = 10"),
        Ordering("rate", ("β = 10", "β = 1", "β = 0.1", "β = 0.01"), "a smaller β has a higher rate"),
    ),
    summarise=_sweep,
)
def beta_sweep(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train the paper's network with a fixed β or a learned scale; rate, distortion and their parts on test data."""
    model, guide, _ = trained(context, context.splits)
    settings, problem = context.settings, Problem.of(model, guide, context.splits["test"])
    found: dict[str, Any] = likelihood_of(context, problem, settings["draws"], settings["particles"], context.blocks())
    found["negative validation ELBO"] = -context.elbo(model, guide, context.splits["validation"])
    found |= information_in(context, problem, settings["points"], settings["prior_draws"])
    return found | samples_of(context, problem, context.splits["train"]) | sigma_of(model)


# -- Figure 4, and the question that the paper leaves open -------------------------------------------------------------

SHARING: dict[str, dict[str, Any]] = {
    "one σ": {"likelihood": SHARED},
    "σ per pixel": {"likelihood": {"name": "gaussian", "per": "entry", "scale": "data"}},
    "σ(z), one per image": {"likelihood": {"name": "gaussian-per-pixel", "per": "all"}},
    "σ(z) per pixel": {"likelihood": "gaussian-per-pixel"},
    "Student-t per pixel": {"likelihood": "student-t"},
    "σ per image, a latent": {"model": "sigma-image-vae"},
}


def _sharing(found: Found) -> Summary:
    one, many, mended = "one σ", "σ(z) per pixel", "Student-t per pixel"
    gains = "; ".join(f"{row}: {found.difference(one, row, BOUND)}" for row in found.rows if row != one)
    lower = "; ".join(f"{row}: {found.mean(row, 'marginal KL at least')}" for row in found.rows)
    samples = "; ".join(f"{row}: {found.mean(row, 'Fréchet')}" for row in found.rows)
    floor = found.mean(one, "Fréchet floor")
    return Summary(
        [
            f"Nats per image that each row gains over one σ for all pixels: {gains}.",
            f"Squared Fréchet distance of samples ({floor} between real images): {samples}.",
            f"Marginal KL of at least (nats): {lower}. From {one} to {many} the rate changes by "
            f"{found.difference(many, one, 'rate')} and the distortion by {found.difference(many, one, 'distortion')} "
            "nats. Samples come from the prior, so that they are lost where the rate is marginal KL.",
            f"A prior on every pixel's σ, integrated out (the Student-t), changes the distance of samples by "
            f"{found.difference(mended, many, 'Fréchet')} against σ(z) without a prior.",
        ]
    )


@register_experiment(
    PAPER,
    "sharing",
    answers="Figure 4, and the open question of per-pixel variances",
    shows="What more noise scales gain in likelihood and lose in samples, and whether a prior on them prevents that.",
    rows=SHARING,
    numbers={**LIKELIHOOD, **MEASURED},
    needs=(
        Needs(
            "mnist",
            {"values": "dequantised"},
            fallback=digits("dequantised"),
            most={"train": 20_000, "test": 2_000},
            quick={"train": 4_000, "validation": 500, "test": 400},
            quick_options={"size": 16},
        ),
    ),
    settings={**NETWORK, **EVALUATION, "epochs": 10},
    quick={**SMALL, **LITTLE, "epochs": 5},
    reduced=REDUCED,
    reduced_quick="4,000 images of 16×16 pixels, an eighth of the channels, 625 steps, one seed and few draws.",
    minutes=(1, 720),
    seeds=(1, 3),
    orderings=(
        Ordering(BOUND, ("σ(z) per pixel", "σ per pixel", "one σ"), "more scales give a higher likelihood"),
        Ordering(
            "marginal KL at least", ("one σ", "σ(z) per pixel"), "a classifier finds more marginal KL with more scales"
        ),
        Ordering("Fréchet", ("one σ", "σ(z) per pixel"), "more scales have worse samples"),
    ),
    summarise=_sharing,
)
def sharing(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train the paper's network with noise scales of a row; likelihood, rate and samples on test data."""
    model, guide, _ = trained(context, context.splits)
    return _measured(context, model, guide, context.splits, context.blocks())


# -- Figure 9 ----------------------------------------------------------------------------------------------------------

COURSES: dict[str, dict[str, Any]] = {
    "optimal σ": {"likelihood": "gaussian-optimal"},
    "shared σ, from the data's sd": {"likelihood": SHARED},
    "shared σ, from 1": {"likelihood": {"name": "gaussian", "scale": 1.0}},
}


def _courses(found: Found) -> Summary:
    final = "; ".join(f"{row}: {found.mean(row, 'σ')}" for row in found.rows)
    late = "; ".join(f"{row}: {found.mean(row, 'epochs to 5%')}" for row in found.rows)
    courses = {row: found.array(row, "course") for row in found.rows}
    figure = course_figure({row: course for row, course in courses.items() if course is not None})
    caption = "The noise scale at the end of every epoch. The optimal σ follows the decoder; a learned one must travel."
    return Summary(
        [
            f"Final σ: {final}.",
            f"Epochs until σ stayed within 5% of its last value: {late}. The learning rate ends at zero, so that a σ "
            "that comes too late stands still as well.",
        ],
        [Picture("σ over epochs", caption, data_uri(figure))],
    )


@register_experiment(
    PAPER,
    "sigma-over-steps",
    answers="Figure 9",
    shows="How fast a learned noise scale settles, from the paper's start and from the data's, beside a computed one.",
    rows=COURSES,
    numbers={"σ": "of the largest grey value", "epochs to 5%": "epochs", BOUND: "nats per image"},
    needs=(_faces("dequantised"),),
    settings={**NETWORK},
    quick={**SMALL},
    reduced=REDUCED,
    reduced_quick="Images of 16×12 (digits: 8×8), an eighth of the channels, 20 epochs and one seed.",
    minutes=(0.5, 150),
    seeds=(1, 3),
    orderings=(
        Ordering(
            "epochs to 5%",
            ("optimal σ", "shared σ, from 1"),
            "the optimal σ converges before the learned one of the paper",
        ),
    ),
    summarise=_courses,
)
def sigma_over_steps(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train with a scale that is learned or computed, and record it at the end of every epoch."""
    model, guide, fit = trained(context, context.splits)
    course = np.array([entry["noise"] for entry in fit.history])
    away = np.flatnonzero(np.abs(np.log(course / course[-1])) >= np.log(1.05))
    first = float(away[-1] + 2) if len(away) else 1.0
    bound = context.elbo(model, guide)
    return {**sigma_of(model), "epochs to 5%": first, BOUND: -bound, "course": course}
