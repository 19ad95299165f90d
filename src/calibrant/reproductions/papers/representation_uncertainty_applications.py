"""What uncertain representations are good for (thesis, Chapter 6; URL; MCInfoNCE): five uses, on unseen classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from calibrant.evaluation.reporting.application_plots import credible_figure, learning_figure
from calibrant.evaluation.reporting.style import data_uri
from calibrant.evaluation.representations.acquiring import active_learning
from calibrant.evaluation.representations.credible import credible_retrieval
from calibrant.evaluation.representations.few_shots import few_shot
from calibrant.evaluation.representations.safe import safe_retrieval
from calibrant.reproductions.context import Context
from calibrant.reproductions.datasets import as_bytes, datasets_of
from calibrant.reproductions.found import Found, Picture, Summary
from calibrant.reproductions.papers.representation_uncertainty import PAPER
from calibrant.reproductions.papers.representation_uncertainty_features import (
    CALTECH,
    PACKAGES,
    WITHOUT,
    measured,
    part_of,
)
from calibrant.reproductions.papers.representation_uncertainty_methods import method_of
from calibrant.reproductions.registering import register_experiment

DOMAIN = "applications"
SHOTS = (1, 5)
LEVEL, KEPT = 0.9, 0.9  # of credible caps; share of images that are kept
CE, LOSS, MC = "CE", "Losspred", "MCInfoNCE"
ROWS: Mapping[str, Mapping[str, Any]] = {
    CE: {"method": "classifier", "trunk": "none"},
    LOSS: {"method": "loss-prediction", "trunk": "none"},
    MC: {"method": "mcinfonce", "trunk": "linear"},
}
SAFE, SELECTED, COVERED, SIZE = "safe retrieval", "queries left out", "caps", "images in caps"
LEARNED, CENTRES = "active learning", "active learning, k-centre"


def _shots(count: int, what: str) -> str:
    return f"{count}-shot {what}"


NUMBERS = {
    **{_shots(count, "accuracy"): "of class means" for count in SHOTS},
    **{_shots(count, "R-AUROC"): "whether wrongly classified images are the less certain ones" for count in SHOTS},
    SAFE: "R@1 of all queries if the least certain tenth leaves the database, less that without random images",
    SELECTED: "R@1 of the more certain nine tenths of the queries, less that of all",
    COVERED: f"share of the second views in {LEVEL:.0%} caps",
    SIZE: f"mean number of images in {LEVEL:.0%} caps",
    LEARNED: "accuracy over the learning curve, uncertainty less random",
    CENTRES: "accuracy over the learning curve, k-centre less random",
}


def _learning(context: Context, trained: Any) -> xr.Dataset:
    """Learning curves on the training classes: the pool are validation images, whose labels the method has not seen.

    Its training images judge the classifier.
    """
    pool, test = part_of(context, "validation"), part_of(context, "train")
    return active_learning(
        pool.x.numpy(), pool.y, trained.uncertainty(pool.x), test.x.numpy(), test.y, seed=context.stream("active"),
        start=60, batch=50, **context.settings["active"],
    )  # fmt: skip


def _caps(context: Context, trained: Any) -> xr.Dataset:
    """Credible caps of one view of each test image, in which the other view may lie."""
    views = part_of(context, "views").x.unflatten(0, (-1, 2))
    first, second = views.unbind(1)
    concentration = 1 / trained.uncertainty(first)
    own = np.arange(len(first))
    return credible_retrieval(trained.embed(first), concentration, trained.embed(second), match=own)


def _tell(found: Found) -> Summary:
    def of(number: str) -> str:
        return "; ".join(f"{row} {found.mean(row, number)}" for row in found.rows)

    sentences = [
        "To leave the least certain tenth out of the database changes R@1, beyond what random images do, by "
        f"{of(SAFE)}.",
        f"To leave out queries raises R@1 by {of(SELECTED)}; any uncertainty that knows of errors does this, and the "
        "queries go unanswered.",
        f"Caps that promise {LEVEL:.0%} hold the second view of an image in {found.mean(MC, COVERED)} of all cases, "
        f"with {found.mean(MC, SIZE)} images each. A second view is no draw of the posterior, so that both may differ; "
        "a share far below the level says that κ, which is learned from classes, is larger than views of one image are "
        "alike.",
        f"Asking for the labels of uncertain images changes the accuracy, against random ones, by {of(LEARNED)}; "
        f"of images that are far from all others, by {found.mean(CE, CENTRES)}.",
    ]
    pictures = []
    if curves := datasets_of(found, "learning"):
        pictures.append(
            Picture(
                "Learning curves",
                "Accuracy of a linear classifier that chooses the images to label.",
                data_uri(learning_figure(curves)),
            )
        )
    if caps := datasets_of(found, "caps of views", [MC]):
        pictures.append(
            Picture(
                "Credible caps",
                "How often the second view lies in the credible cap of the first one.",
                data_uri(credible_figure(caps)),
            )
        )
    return Summary(sentences, pictures)


REDUCED = f"The embedding of CE and Losspred is the frozen backbone's; MCInfoNCE has one of 16 dimensions. {WITHOUT}"


@register_experiment(
    PAPER,
    "applications",
    domain=DOMAIN,
    uses="caltech-backbone",
    answers="few-shot learning, safe retrieval, credible intervals, active learning",
    shows="What a user of a representation gains from its uncertainty.",
    rows=ROWS,
    numbers=NUMBERS,
    needs=(CALTECH,),
    settings={"training": {}, "repeats": 20, "active": {"repeats": 5, "rounds": 8}},
    quick={"repeats": 5, "active": {"repeats": 3, "rounds": 3}},
    reduced=REDUCED,
    reduced_quick=f"Images of 96 pixels, fewer repetitions. {REDUCED}",
    minutes=(2, 5),
    seeds=(3, 3),
    optional=PACKAGES,
    summarise=_tell,
)
def applications(context: Context, row: str, seed: int) -> Mapping[str, Any]:
    """Train one method, and use its uncertainty in every way."""
    given = dict(context.arguments)
    trained, test = method_of(context, given.pop("method"), **given), part_of(context, "test")
    embedded, u = trained.embed(test.x), trained.uncertainty(test.x)
    shots = few_shot(embedded, test.y, u, SHOTS, repeats=context.settings["repeats"], seed=context.stream("few shots"))
    safe = safe_retrieval(embedded, test.y, u, keep=[KEPT], seed=context.stream("safe")).isel(keep=0)
    learning = _learning(context, trained)
    found: dict[str, Any] = {
        **{_shots(count, "accuracy"): measured(shots, "accuracy", shots=count) for count in SHOTS},
        **{_shots(count, "R-AUROC"): measured(shots, "r_auroc", shots=count) for count in SHOTS},
        SAFE: measured(safe, "gain_over_random", dropped="database"),
        SELECTED: measured(safe, "selection", dropped="queries"),
        LEARNED: measured(learning, "gain", acquisition="uncertainty"),
        CENTRES: measured(learning, "gain", acquisition="k-centre"),
        "learning": as_bytes(learning),
    }
    if row == MC:
        caps = _caps(context, trained)
        found |= {COVERED: measured(caps, "coverage", level=LEVEL), SIZE: float(caps["size_mean"].sel(level=LEVEL))}
        found["caps of views"] = as_bytes(caps)
    return found
