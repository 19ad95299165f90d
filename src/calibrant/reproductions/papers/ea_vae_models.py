"""The models of the EA-VAE paper (arXiv 2404.15390), trained: what each is worth as a model of its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calibrant.data.dataset import Data
from calibrant.evaluation.statistics.rates import rate_distortion_of
from calibrant.evaluation.uncertainty.sources import SourcePlan
from calibrant.guides.amortizing import amortize
from calibrant.inference.bounds.importance_bound import iwae_bound_of
from calibrant.inference.problem import Problem
from calibrant.inference.references.sampling import log_evidence_of
from calibrant.models.registry import create, training
from calibrant.program.contract import Program
from calibrant.program.environment import seeded
from calibrant.reproductions.cards import Needs, Ordering, Target
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Summary
from calibrant.reproductions.papers.ea_vae import PAPER
from calibrant.reproductions.registering import register_experiment

VAE, EA_VAE = "VAE", "EA-VAE"
MODELS = {VAE: "vae", EA_VAE: "ea-vae"}
BOUND, EVIDENCE, GAP = "negative ELBO", "negative log evidence", "gap"
NATURAL, MNIST = "natural", "mnist"

PATCHES = Needs(
    "natural-patches",
    {"size": 16},
    quick={"train": 8_000, "validation": 1_000, "test": 1_000},
    quick_options={"size": 12},
)
DIGITS = Needs(
    "mnist",
    {"size": 32, "values": "binarised"},
    keys=("x", "y"),
    quick={"train": 10_000, "validation": 1_000, "test": 2_000},
    quick_options={"size": 16},
)


def images_of(context: Context) -> dict[str, Data]:
    """The splits of the first data set without labels."""
    return {split: data.select(["x"]) for split, data in context.splits.items()}


def built(context: Context) -> tuple[Program, Program]:
    """The model of a row and its guide, before they are trained."""
    settings, given = context.settings, dict(context.arguments)
    train = images_of(context)["train"]
    shape = tuple(train.batch([0])[0]["x"].shape[1:])
    name = given.pop("model")
    sizes = {} if settings["latents"] is None else {"latents": settings["latents"] + (name == "vae")}
    with seeded(context.stream("model")):
        model: Any = create(name, shape=shape, **sizes, **settings["network"], **given)
    return model, amortize(model, train, seed=context.stream("guide"), **settings["guide"])


def trained(context: Context) -> Problem:
    """Train the model of a row with its guide, and keep both; the problem that they pose on the test images."""
    model, guide = built(context)
    splits = images_of(context)
    context.fit(model, guide, splits, **{name: context.settings[name] for name in ("epochs", "batch_size", "lr")})
    context.keep(model, guide)
    return Problem.of(model, guide, splits["test"])


def trained_problem(context: Context, row: str, images: Data) -> Problem:
    """The problem that a model and guide that another experiment has trained pose on images."""
    model, guide = context.trained_by(row, built)
    return Problem.of(model, guide, images)


def _worth(found: Found) -> Summary:
    gain = found.difference(VAE, EA_VAE, BOUND)
    return Summary(
        [f"The scale is worth {gain} nats per image at the same number of latents, by the ELBO on test images."]
    )


SHOWS = (
    "What the global scale is worth as part of a model of images, and how far the guide's ELBO is from the evidence."
)
ORDER = Ordering(BOUND, (EA_VAE, VAE), "the model with a global scale has the higher ELBO")

# -- posteriors --------------------------------------------------------------------------------------------------------

CLOSED: Mapping[str, Any] = {"method": "auto", "draws": 1000, "chains": 4, "warmup": 1000, "pool": 10_000}
CLOSED_QUICK: Mapping[str, Any] = {"draws": 250, "chains": 2}
SAMPLED: Mapping[str, Any] = {**CLOSED, "method": "importance"}
SAMPLED_QUICK: Mapping[str, Any] = {"method": "importance-only", "draws": 500, "pool": 4_000}
HOW_SAMPLED = (
    "References by importance sampling, where a mode that the guide misses is not seen, and by NUTS elsewhere."
)
HOW_QUICK = "References by importance sampling alone, where a mode that the guide misses is not seen."


def sources_of(settings: Mapping[str, Any]) -> SourcePlan:
    """How the settings of an experiment say that posteriors are drawn."""
    return SourcePlan(**{name: settings[name] for name in CLOSED})


# -- natural images ----------------------------------------------------------------------------------------------------

LINEAR: dict[str, dict[str, Any]] = {
    row: {"model": name, "preset": "natural-lognormal", "prior": "normal"} for row, name in MODELS.items()
}

LINEAR_SETTINGS: Mapping[str, Any] = {
    "latents": None, "network": {}, "guide": {}, "epochs": 60, "batch_size": 256, "lr": 2e-3,
}  # fmt: skip
LINEAR_QUICK: Mapping[str, Any] = {"latents": 36, "epochs": 10, "lr": 3e-3}


@register_experiment(
    PAPER,
    "natural-models",
    domain=NATURAL,
    answers="the models of natural images",
    shows=SHOWS,
    rows=LINEAR,
    numbers={BOUND: "nats per patch", EVIDENCE: "nats per patch", GAP: "nats per patch, of the guide's ELBO"},
    needs=(PATCHES,),
    settings=LINEAR_SETTINGS,
    quick=LINEAR_QUICK,
    reduced="Patches of 16×16 and Normal latents, for which posterior and evidence are exact.",
    reduced_quick="8,000 patches of 12×12, 36 Normal latents (posterior and evidence are exact) and 10 epochs.",
    minutes=(0.7, 30),
    seeds=(3, 3),
    orderings=(ORDER,),
    summarise=_worth,
)
def natural_models(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train a linear model on natural patches; its ELBO beside its exact evidence."""
    problem = trained(context)
    evidence = log_evidence_of(problem.program, problem.data).numpy()
    bound = context.elbo(problem.program, problem.guide, problem.data)
    return {BOUND: -bound, EVIDENCE: -Measured.of(evidence), GAP: Measured.of(evidence - bound.values)}


# -- MNIST -------------------------------------------------------------------------------------------------------------

BINARY: dict[str, dict[str, Any]] = {row: {"model": name, "preset": "mnist"} for row, name in MODELS.items()}
PERCEPTRON = {"decoder": {"name": "mlp", "hidden": 64}}


@register_experiment(
    PAPER,
    "mnist-models",
    domain=MNIST,
    answers="the models of MNIST",
    shows=SHOWS,
    rows=BINARY,
    numbers={BOUND: "nats per digit", "negative IWAE": "nats per digit"},
    needs=(DIGITS,),
    settings={
        "latents": None, "network": {}, "guide": {}, "epochs": 100, "batch_size": 128, "lr": 1e-3, "particles": 1000,
    },
    quick={
        "network": PERCEPTRON, "guide": {"encoder": {"name": "mlp", "hidden": 64}}, "epochs": 7, "lr": 3e-3,
        "particles": 100,
    },
    reduced="",
    reduced_quick="10,000 binarised digits of 16×16, perceptrons with 64 hidden units and 7 epochs.",
    minutes=(1, 600),
    seeds=(3, 3),
    orderings=(ORDER,),
    summarise=_worth,
)  # fmt: skip
def mnist_models(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train a model of binarised digits; its ELBO and a tighter bound."""
    problem = trained(context)
    tighter = iwae_bound_of(problem, context.settings["particles"], 2, context.stream("bound"))
    return {
        BOUND: -context.elbo(problem.program, problem.guide, problem.data),
        "negative IWAE": -Measured.of(tighter["bound"]),
    }


# -- the authors' training ---------------------------------------------------------------------------------------------

CROSS_ENTROPY, DIVERGENCE = "cross-entropy", "KL"


def _authors(found: Found) -> Summary:
    sums = "; ".join(f"{row} {found.mean(row, BOUND)}" for row in found.rows)
    return Summary(
        [
            "The cross-entropy of a grey image is minus the mean Bernoulli log probability of binarisations of it. "
            f"Without the weight of four on the divergence, the sum is a bound for binary images, {sums} nats per "
            "digit, for a guide that sees the grey image.",
        ]
    )


@register_experiment(
    PAPER,
    "mnist-final-losses",
    domain=MNIST,
    answers="the final losses on MNIST",
    shows="The authors' own training (cross-entropy of grey images, weight 4 on the divergence), and its true bound.",
    rows={row: {"model": name} for row, name in MODELS.items()},
    numbers={CROSS_ENTROPY: "nats per digit", DIVERGENCE: "nats per digit, without weights", BOUND: "nats per digit"},
    needs=(
        Needs(
            "mnist",
            {"size": 32},
            quick={"train": 10_000, "validation": 1_000, "test": 1_000},
            quick_options={"size": 16},
        ),
    ),
    settings={"width": 64, "epochs": 500, "draws": 16},
    quick={"width": 8, "epochs": 4, "draws": 8},
    reduced="One seed. Adam decays to zero, and the weights with the best held-out ELBO are kept.",
    reduced_quick="10,000 digits of 16×16, an eighth of the channels and 4 epochs of 500.",
    minutes=(0.7, 3_000),
    seeds=(1, 1),
    targets=(
        Target(VAE, CROSS_ENTROPY, 156.3, 5.0),
        Target(EA_VAE, CROSS_ENTROPY, 162.5, 5.0),
        Target(VAE, DIVERGENCE, 8.68, 1.0),
        Target(EA_VAE, DIVERGENCE, 9.42, 1.0),
        Target(VAE, BOUND, 164.9, 5.0),
        Target(EA_VAE, BOUND, 171.9, 5.0),
    ),
    summarise=_authors,
)
def mnist_final_losses(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train as the authors do, and split the unweighted bound into its parts."""
    splits, settings = context.splits, context.settings
    shape = tuple(splits["train"].batch([0])[0]["x"].shape[1:])
    network = {"name": "ea-vae-conv", "width": settings["width"]}
    how = training(context.arguments["model"], "mnist", "authors", shape=shape, decoder=network)
    with seeded(context.stream("model")):
        model: Any = create(how.model, **how.arguments)
    encoder = {**how.guide["encoder"], "width": settings["width"]}
    guide = amortize(model, splits["train"], seed=context.stream("guide"), **{**how.guide, "encoder": encoder})
    context.fit(model, guide, **{**how.fit, "epochs": settings["epochs"]})
    parts = rate_distortion_of(Problem(model, guide, splits["test"]), settings["draws"], context.stream("parts"))
    names = {CROSS_ENTROPY: "distortion", DIVERGENCE: "rate", BOUND: "elbo"}
    found = {number: Measured.of(parts[name]) for number, name in names.items()}
    return {**found, BOUND: -found[BOUND]}
