"""Beyond the thesis: posteriors of VAEs as uncertainties, a second view, and two scalars in place of one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from calibrant.data.people import human_labels
from calibrant.errors import DataError
from calibrant.evaluation.representations.cropping import crop_shares, crop_test, cropped
from calibrant.evaluation.representations.distances import feature_distance
from calibrant.evaluation.representations.pairing import uncertainty_pair
from calibrant.evaluation.representations.people import human_entropy
from calibrant.evaluation.representations.recall import retrieval
from calibrant.evaluation.representations.third_views import second_view_experiment
from calibrant.evaluation.uncertainty.measuring import Instrument, some_images
from calibrant.evaluation.uncertainty.measuring import Measured as Posteriors
from calibrant.evaluation.uncertainty.sources import SourcePlan
from calibrant.guides.amortizing import amortize
from calibrant.inference.problem import Problem
from calibrant.models.registry import create
from calibrant.program.environment import seeded
from calibrant.representations.trained import Trained
from calibrant.reproductions.cards import Claim, Needs
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Summary
from calibrant.reproductions.papers.representation_uncertainty import PAPER
from calibrant.reproductions.papers.representation_uncertainty_features import (
    CALTECH,
    CROP,
    PACKAGES,
    R1,
    R_AUROC,
    WITHOUT,
    measured,
    part_of,
)
from calibrant.reproductions.papers.representation_uncertainty_methods import method_of
from calibrant.reproductions.registering import register_experiment

DOMAIN = "beyond"
SOURCES = {"exact": "exact", "guide": "amortized"}
PEOPLE, WITHIN, REFUSED = "people", "people within classes", "refused"

# -- posteriors of VAEs ------------------------------------------------------------------------------------------------

FASHION = Needs(
    "fashion-mnist",
    {"values": "binarised"},
    keys=("x", "y"),
    quick={"train": 10_000, "validation": 1_000, "test": 2_000},
    quick_options={"size": 16, "values": "unit"},
)
_UNITS = {
    R1: "of posterior means, by cosine",
    R_AUROC: "whether wrongly retrieved images have the larger posterior entropy",
    CROP: "share of images whose crop has the larger posterior entropy",
    PEOPLE: "Spearman's correlation of the posterior entropy with that of human labels",
    WITHIN: "the same among images of one class",
}
VAE_NUMBERS = {f"{number}, {source}": unit for number, unit in _UNITS.items() for source in SOURCES} | {
    REFUSED: "share of images without a reference of their own or of their crop"
}
VAES: Mapping[str, Mapping[str, Any]] = {"VAE": {"model": "vae"}, "EA-VAE": {"model": "ea-vae"}}
VAE_CLAIMS = tuple(
    claim
    for row in VAES
    for claim in (
        Claim(f"the posterior entropy of the {row} tells wrong retrievals", row, R_AUROC, "above", 0.5, by="ours"),
        Claim(f"crops leave the {row} less certain", row, CROP, "above", 0.5, by="ours"),
        Claim(f"within a class, the {row} is less certain where people disagree", row, WITHIN, "above", 0.0, by="ours"),
    )
)


def _tell_vaes(found: Found) -> Summary:
    def of(number: str, source: str) -> str:
        return ", ".join(f"{row} {found.mean(row, f'{number}, {source}')}" for row in found.rows)

    return Summary(
        [
            f"R-AUROC of the posterior entropy: {of(R_AUROC, 'exact')} exactly, {of(R_AUROC, 'guide')} by the guide.",
            f"Correlation with the entropy of human labels: {of(PEOPLE, 'exact')} exactly; within classes "
            f"{of(WITHIN, 'exact')}, by the guide {of(WITHIN, 'guide')}.",
        ]
    )


def _posterior_scores(
    context: Context, whole: Posteriors, crops: Posteriors, data: Any, there: np.ndarray
) -> dict[str, Any]:
    """What one source's posteriors say as representations with uncertainties, of the images that have a reference."""
    observed, covariates = data.tensors()
    y = (observed | covariates)["y"].numpy()[there]
    entropy = whole.entropy[there]
    how: dict[str, Any] = {"cluster": "class", "seed": context.seed}
    found = retrieval(whole.moments.mean[there], y, entropy, **how)
    scores: dict[str, Any] = {
        R1: measured(found, "r_at_1"),
        R_AUROC: measured(found, "r_auroc"),
        CROP: measured(crop_test(entropy, crops.entropy[there], labels=y, **how), "crop_less_certain"),
    }
    with suppress(DataError):  # the human labels need not be there
        people = human_labels("fashion-mnist").probabilities[data.labels()][there]
        agreed = human_entropy(entropy, people, y, **how)
        scores |= {PEOPLE: measured(agreed, "human_spearman"), WITHIN: measured(agreed, "human_spearman_within")}
    return scores


@register_experiment(
    PAPER,
    "vae-posteriors",
    domain=DOMAIN,
    answers="a question of ours: do posteriors of VAEs rank images as uncertain representations do?",
    shows="Whether the posterior entropy of a VAE, exact or of the guide, is a representation uncertainty.",
    rows=VAES,
    numbers=VAE_NUMBERS,
    needs=(FASHION,),
    settings={
        "latents": 16, "decoder": {"name": "mlp", "hidden": 512}, "likelihood": "bernoulli", "hidden": 512,
        "epochs": 60, "batch_size": 128, "lr": 1e-3, "images": 2_000,
        "posteriors": {"method": "importance", "draws": 500, "pool": 10_000, "chains": 4, "warmup": 1000},
    },
    quick={
        "decoder": "linear", "likelihood": "gaussian", "hidden": 64, "epochs": 8, "lr": 3e-3, "images": 600,
        "posteriors": {"method": "auto", "draws": 250, "chains": 4},
    },
    reduced="References by importance sampling, where a mode that the guide misses is not seen, and by NUTS elsewhere.",
    reduced_quick="10,000 images of 16×16, 8 epochs, 600 test images, and linear decoders with Gaussian noise, whose "
    "posteriors are exact. That of the VAE has one width for all images, so that it ranks nothing but noise of draws.",
    minutes=(1, 300),
    seeds=(3, 3),
    claims=VAE_CLAIMS,
    summarise=_tell_vaes,
)  # fmt: skip
def vae_posteriors(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train a VAE; means and entropies of its posteriors, exact and of the guide, as embeddings and uncertainties."""
    settings = context.settings
    images = {split: data.select(["x"]) for split, data in context.splits.items()}
    shape = tuple(images["train"].batch([0])[0]["x"].shape[1:])
    with seeded(context.stream("model")):
        model = create(
            context.arguments["model"], shape=shape, **{n: settings[n] for n in ("latents", "decoder", "likelihood")}
        )
    encoder = {"name": "mlp", "hidden": settings["hidden"]}
    guide = amortize(model, images["train"], encoder=encoder, seed=context.stream("guide"))
    context.fit(model, guide, images, **{name: settings[name] for name in ("epochs", "batch_size", "lr")})
    shown = some_images(context.splits["test"], settings["images"], context.stream("images"))
    problem = Problem.of(model, guide, shown.select(["x"]))
    instrument, whole = Instrument.of(
        problem, SourcePlan(**settings["posteriors"]), None, None, context.stream("posteriors")
    )
    x = problem.data.tensors()[0]["x"]
    crops = instrument.changed(problem.data, cropped(x, crop_shares(len(x))), context.stream("pixels"))
    [of_crops] = instrument([crops], context.stream("crops"), progress=context.progress)
    there = np.isfinite(whole["exact"].entropy) & np.isfinite(of_crops["exact"].entropy)
    found: dict[str, Any] = {REFUSED: 1 - float(there.mean())}
    for name, source in SOURCES.items():
        scores = _posterior_scores(context, whole[source], of_crops[source], shown, there)
        found |= {f"{number}, {name}": value for number, value in scores.items()}
    return found


# -- a second view -----------------------------------------------------------------------------------------------------

SAME, CLASS, COSINE = "same image", "same class", "cosine gained"
ESTIMATES = ("prior", "posterior", "product", "second view", "posterior, other image")
PRIOR, POSTERIOR, OTHER = ESTIMATES[0], ESTIMATES[1], ESTIMATES[-1]


def _by(number: str, estimate: str) -> str:
    return f"{number}, {estimate}"


def _tell_views(found: Found) -> Summary:
    sentences = []
    for row in found.rows:
        shown = "; ".join(f"{estimate} {found.mean(row, _by(SAME, estimate))}" for estimate in ESTIMATES)
        sentences += [
            f"{row}: share of images whose third view is found among all, by {shown}.",
            f"{row}: the second view moves the embedding by {found.mean(row, _by(COSINE, POSTERIOR))} towards the "
            f"third one, in cosine; that of another image by {found.mean(row, _by(COSINE, OTHER))}.",
        ]
    return Summary(sentences)


@register_experiment(
    PAPER,
    "second-view",
    domain=DOMAIN,
    uses="caltech-backbone",
    answers="a question of ours: is p(z | x, a second view) better than p(z | x)?",
    shows="Whether a second view of an image improves its representation, by the exact posterior of the pair model.",
    rows={"HIB": {"method": "hib"}, "MCInfoNCE": {"method": "mcinfonce"}},
    numbers={
        **{_by(SAME, one): "share of images whose nearest third view is their own" for one in ESTIMATES},
        **{_by(CLASS, one): "R@1 of the class among third views of other images" for one in ESTIMATES},
        **{_by(COSINE, one): "cosine to the third view, less that of the prior" for one in ESTIMATES[1:]},
    },
    needs=(CALTECH,),
    settings={"training": {"trunk": "linear", "latents": 16}},
    reduced=f"Embeddings of 16 dimensions on frozen features. {WITHOUT}",
    reduced_quick=f"Images of 96 pixels, one seed; embeddings of 16 dimensions on frozen features. {WITHOUT}",
    minutes=(1, 3),
    seeds=(1, 3),
    optional=PACKAGES,
    summarise=_tell_views,
)
def second_view(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train a model of pairs, and judge estimates of the embeddings of unseen images by a third view."""
    trained = method_of(context, context.arguments["method"])
    test = part_of(context, "test")
    views = part_of(context, "views").x.unflatten(0, (-1, 2)).unbind(1)
    first, second = ((trained.embed(x), 1 / trained.uncertainty(x)) for x in views)
    found = second_view_experiment(
        first, second, trained.embed(test.x), *_pair_constants(trained), labels=test.y, seed=context.seed
    )
    return {
        **{_by(SAME, one): measured(found, "instance", estimate=one) for one in ESTIMATES},
        **{_by(CLASS, one): measured(found, "recall", estimate=one) for one in ESTIMATES},
        **{_by(COSINE, one): measured(found, "cosine_gain", estimate=one) for one in ESTIMATES[1:]},
    }


def _pair_constants(trained: Trained) -> tuple[float, float | None]:
    """k and the bias of the pair likelihood that a method was trained with; None for the bias that k implies."""
    program: Any = trained.program
    if trained.method == "hib":
        return float(program.slope), float(program.offset)
    return float(program.k), None


# -- two scalars -------------------------------------------------------------------------------------------------------

UNKNOWN = (
    "Images of unseen classes of the same set are the unknown ones; half of these and of the known ones fit what is "
    "fitted. Errors are over images, and say nothing of other unknown classes."
)
ERRORS, OUTSIDE, WORST = "errors", "outside", "worst of both"
SCORES = {"one scalar": "aleatoric", "distance": "epistemic", "both": "sum of ranks", "both, fitted": "logistic"}


def _tell_pairs(found: Found) -> Summary:
    lines = []
    for row in found.rows:
        parts = "; ".join(
            f"{score} {found.mean(row, f'{ERRORS}, {score}')} and {found.mean(row, f'{OUTSIDE}, {score}')}"
            for score in SCORES
        )
        lines.append(f"{row}: AUROC of errors, and of images of unknown classes: {parts}.")
    gains = "; ".join(f"{row} {found.mean(row, f'{WORST}, gain')}" for row in found.rows)
    lines.append(
        f"The smaller one of both AUROCs, of the fitted pair less that of the better single scalar: {gains}. Above "
        "zero beyond its error, the pair wins where each alone fails."
    )
    return Summary(lines)


@register_experiment(
    PAPER,
    "two-scalars",
    domain=DOMAIN,
    uses="caltech-backbone",
    answers="a question of ours: does an aleatoric and an epistemic scalar win where each alone fails?",
    shows="Whether a predicted loss and a distance from the training data tell errors and unknown classes together.",
    rows={"predicted loss": {"method": "loss-prediction"}, "class entropy": {"method": "classifier"}},
    numbers={
        f"{task}, {score}": "AUROC" for score in SCORES for task in (ERRORS, OUTSIDE)
    } | {f"{WORST}, gain": "smaller one of both AUROCs, fitted pair less the better single scalar"},
    needs=(CALTECH,),
    settings={"training": {"trunk": "none"}},
    reduced=f"{UNKNOWN} {WITHOUT}",
    reduced_quick=f"Images of 96 pixels. {UNKNOWN} {WITHOUT}",
    minutes=(1, 2),
    seeds=(3, 3),
    optional=PACKAGES,
    summarise=_tell_pairs,
)  # fmt: skip
def two_scalars(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train a classifier of the training classes; its errors and images of other classes, told by two scalars."""
    trained = method_of(context, context.arguments["method"])
    train, inside, outside = (part_of(context, name) for name in ("train", "validation", "test"))
    correct = trained.classes[trained.class_probabilities(inside.x).argmax(1).numpy()] == inside.y
    scalars = [(trained.uncertainty(part.x), feature_distance(part.x, train.x)) for part in (inside, outside)]
    found = uncertainty_pair(*scalars[0], correct, scalars[1], seed=context.seed)
    numbers = {
        f"{task}, {name}": measured(found, "auroc", task=task, score=score)
        for task in (ERRORS, OUTSIDE)
        for name, score in SCORES.items()
    }
    return {**numbers, f"{WORST}, gain": measured(found, "worst_gain", pair="logistic")}
