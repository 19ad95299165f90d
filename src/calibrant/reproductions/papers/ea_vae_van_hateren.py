"""The scale after the decoder, on van Hateren's images: what each part of a guide costs, and whether it changes Fig. 1.

By its published losses, the paper's EA-VAE of this domain ends 511 nats per patch below its own VAE, although it
contains it. Its guide gives the scale a Gamma of shape 2 whatever the image, independent of the latents. Here it is
improved step by step. Under Normal latents, evidence and posterior are exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from calibrant.evaluation.reporting.style import (
    COLOURS,
    LINES,
    MARKERS,
    REFERENCE,
    WIDTH,
    cycled,
    data_uri,
    new_figure,
    plain_axes,
)
from calibrant.evaluation.uncertainty.contrast import contrast_experiment
from calibrant.guides.amortizing import amortize
from calibrant.inference.references.sampling import log_evidence
from calibrant.models.registry import create
from calibrant.program.environment import seeded
from calibrant.reproductions.cards import Claim, Needs, Ordering
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Found, Picture, Summary, shown
from calibrant.reproductions.measures import sds_over_contrast
from calibrant.reproductions.papers.ea_vae import PAPER
from calibrant.reproductions.registering import register_experiment
from calibrant.reproductions.sigma_courses import sigma_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOUND, EVIDENCE, GAP, SLOPE = "negative ELBO", "negative log evidence", "gap", "sd slope"
DOMAIN = "van-hateren"
GUIDES: dict[str, dict[str, Any]] = {
    "fixed shape": {"structure": "mean-field", "family": {"scale": "gamma-fixed"}},
    "learned shape": {"structure": "mean-field", "family": {"scale": "gamma"}},
    "faithful": {"structure": "faithful", "family": {"scale": "gamma"}},
    "collapsed": {"structure": "collapsed", "family": {"scale": "gamma"}},
}
LEARNED_NOISE: dict[str, Any] = {"likelihood": {"name": "gaussian", "scale": "data"}}
JOINT: dict[str, dict[str, Any]] = {
    "VAE": {"model": "vae", "structure": "mean-field"},
    "VAE, exact guide": {"model": "vae", "structure": "collapsed"},
    **{row: {"model": "ea-vae", **guide} for row, guide in GUIDES.items()},
}
LAPLACE: dict[str, dict[str, Any]] = {
    f"Laplace, {row}": {**JOINT[row], "prior": "laplace"} for row in ("VAE", "fixed shape", "learned shape", "faithful")
}
NOISE: dict[str, dict[str, Any]] = {
    "VAE, learned σ": {**JOINT["VAE, exact guide"], **LEARNED_NOISE},
    "EA-VAE, learned σ": {**JOINT["collapsed"], **LEARNED_NOISE},
}
FLAT = 0.05  # prior sds per tenfold contrast: less is called flat
LEVELS = (0.1, 0.3, 1.0, 3.0, 10.0)  # contrasts in units of the noise
OF_MODEL = {BOUND: "nats per patch", EVIDENCE: "nats per patch, exact"}
OF_GUIDE = {
    GAP: "nats per patch, of log p(x) over the ELBO",
    f"{SLOPE}, exact": "prior sds per tenfold contrast",
    f"{SLOPE}, guide": "prior sds per tenfold contrast",
    "sd at low contrast": "guide over exact, at a tenth of the noise",
    "sd at high contrast": "guide over exact, at ten times the noise",
}
SETTINGS = {"epochs": 100, "batch_size": 256, "lr": 1e-3, "images": 32, "draws": 500, "elbo_draws": 16}
QUICK = {"epochs": 9, "batch_size": 128, "lr": 3e-3, "images": 12, "draws": 100, "elbo_draws": 4}
FEW = {"train": 8_000, "validation": 500, "test": 200}
SMALL = {"size": 8}
PATCHES = Needs(
    "van-hateren",
    {"size": 40},
    fallback=Needs("natural-patches", {"size": 40}, quick=FEW, quick_options=SMALL),
    quick=FEW,
    quick_options=SMALL,
)
REDUCED = "Normal latents, under which evidence and posterior are exact; the plain ELBO; columns of fixed norm."
REDUCED_QUICK = "8,000 patches of 8×8 pixels, 71 Normal latents (as many per pixel as in the paper), 9 epochs."


def build(context: Context) -> tuple[Any, Any]:
    """The model of a row, and its guide."""
    given = {"prior": "normal", **context.arguments}
    name, structure, family = given.pop("model"), given.pop("structure"), given.pop("family", "auto")
    if given["prior"] == "laplace":
        del given["prior"]  # that of the preset, with standard deviation 1
    with seeded(context.stream("model")):
        model = create(name, preset="van-hateren", shape=_shape(context), **given)
    return model, amortize(model, context.splits["train"], structure, family, seed=context.stream("guide"))


def _shape(context: Context) -> tuple[int, ...]:
    return tuple(context.splits["train"].batch([0])[0]["x"].shape[1:])


def _trained(context: Context, model: Any, guide: Any) -> dict[str, Any]:
    """Train what is not frozen of a model and its guide; bounds on test data."""
    settings = context.settings
    context.fit(model, guide, **{option: settings[option] for option in ("epochs", "batch_size", "lr")})
    bound = context.elbo(model, guide, draws=settings["elbo_draws"])
    if context.arguments.get("prior") == "laplace":
        return {BOUND: -bound}
    exact = log_evidence(model, context.splits["test"]).cpu().numpy()
    return {BOUND: -bound, EVIDENCE: -Measured.of(exact), GAP: Measured.of(exact - bound.values)}


def _over_contrast(context: Context, model: Any, guide: Any) -> dict[str, Any]:
    """How the sds of guide and exact posterior change with contrast, in sds of the prior."""
    chosen = {"images": context.settings["images"], "draws": context.settings["draws"]}
    test, of = context.splits["test"], context.stream("contrast")
    curves = contrast_experiment(model, guide, test, levels=LEVELS, seed=of, **chosen)
    exact, ours = sds_over_contrast(curves).values()
    return {
        f"{SLOPE}, exact": Measured.of(np.polyfit(np.log10(LEVELS), exact, 1)[0]),
        f"{SLOPE}, guide": Measured.of(np.polyfit(np.log10(LEVELS), ours, 1)[0]),
        "sd at low contrast": Measured.of(ours[0] / exact[0]),
        "sd at high contrast": Measured.of(ours[-1] / exact[-1]),
        "sds": np.stack([exact.mean(1), ours.mean(1)]),
    }


# -- model and guide together ------------------------------------------------------------------------------------------


def _by(row: str) -> Literal["paper", "ours"]:
    """Whose statement it is: the paper has a VAE, and an EA-VAE whose guide has a fixed shape."""
    return "paper" if row in ("VAE", "fixed shape") else "ours"


def _ladder(found: Found) -> Summary:
    worse = found.difference("fixed shape", "VAE", BOUND)
    better = found.difference("collapsed", "VAE, exact guide", BOUND)
    steps = "; ".join(
        f"{last} → {row}: {found.difference(last, row, BOUND)}"
        for last, row in zip(list(GUIDES)[:-1], list(GUIDES)[1:], strict=True)
    )
    slopes = "; ".join(
        f"{row}: {found.mean(row, f'{SLOPE}, guide')} (exact {found.mean(row, f'{SLOPE}, exact')})" for row in JOINT
    )
    scale = found.difference("VAE, exact guide", "collapsed", EVIDENCE)
    sentences = [
        f"The negative ELBO of the EA-VAE minus that of the VAE, in nats per patch: {worse} with the authors' guides, "
        "whose Gamma has the shape 2 for every image (about 511 by the authors' final losses, with larger patches and "
        f"other training), and {better} with exact conditionals in both and a learned distribution of the scale. Above "
        "zero, the model with a scale looks worse; below zero, the scale is worth having.",
        f"Nats that each step of the guide brings, trained with its model: {steps}.",
        f"Between the exact evidences of the best EA-VAE and the best VAE, the scale brings {scale} nats.",
        f"Change of the posterior sd with tenfold contrast, in prior sds: {slopes}. A slope below zero says that more "
        "contrast makes the latents more certain, which is the paper's conclusion; compare each guide with the exact "
        "posterior of its own model.",
    ]
    picture = Picture("Certainty and contrast, guide by guide", _CAPTION, data_uri(_figure(_curves(found, JOINT))))
    return Summary(sentences, [picture])


_CAPTION = (
    "Posterior standard deviation of the latents over that of the prior, for the same patches at many contrasts. Full "
    "lines are guides, dashed lines the exact posterior of the same model; the dotted line is the prior, which every "
    "posterior should approach on the left. Look for guides that leave their dashed line."
)


@register_experiment(
    PAPER,
    "van-hateren",
    answers="Figure 1 on van Hateren's images, and the final losses",
    shows="What each part of a guide of the scale is worth, trained with its model, and if contrast curves change.",
    rows={**JOINT, **LAPLACE},
    numbers={**OF_MODEL, **OF_GUIDE},
    needs=(PATCHES,),
    settings=SETTINGS,
    quick=QUICK,
    full_only=tuple(LAPLACE),
    reduced=REDUCED,
    reduced_quick=REDUCED_QUICK,
    minutes=(2.5, 600),
    seeds=(3, 3),
    orderings=(
        Ordering(BOUND, tuple(reversed(GUIDES)), "every step of the guide brings nats"),
        Ordering(BOUND, ("VAE", "fixed shape"), "the EA-VAE with the authors' guide is worse than its VAE"),
        Ordering(EVIDENCE, ("collapsed", "VAE, exact guide"), "the scale is worth nats where the guide is right"),
    ),
    claims=(
        *(
            Claim(f"the EA-VAE is more certain the higher the contrast ({row})", row, SLOPE, "below", by=_by(row))
            for row in GUIDES
        ),
        *(
            Claim(
                f"the VAE does not become more certain with contrast ({row})", row, SLOPE, "above", -0.05, by=_by(row)
            )
            for row in ("VAE", "VAE, exact guide")
        ),
    ),
    domain=DOMAIN,
    summarise=_ladder,
)
def ladder(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train a model with the guide of a row."""
    model, guide = build(context)
    found = _trained(context, model, guide)
    context.keep(model, guide)
    return found if row in LAPLACE else found | _over_contrast(context, model, guide)


# -- guides of one model -----------------------------------------------------------------------------------------------


def _frozen(found: Found) -> Summary:
    gaps = "; ".join(f"{row}: {found.mean(row, GAP)}" for row in found.rows)
    high = "; ".join(f"{row}: {found.mean(row, 'sd at high contrast')}" for row in found.rows)
    low = "; ".join(f"{row}: {found.mean(row, 'sd at low contrast')}" for row in found.rows)
    sentences = [
        f"Nats per patch by which each guide misses the evidence of one and the same EA-VAE: {gaps}.",
        f"Posterior sd of the guide over the exact one at ten times the noise: {high}; at a tenth of it: {low}. 1 is "
        "right; the model is the same, so that all of the difference is the guide's.",
        *_wider_than_the_prior(found),
    ]
    picture = Picture("Guides of one model", _CAPTION, data_uri(_figure(_curves(found, GUIDES), is_one_model=True)))
    return Summary(sentences, [picture])


def _wider_than_the_prior(found: Found) -> list[str]:
    """A sentence on the authors' guide far below the noise, where it is wider than the prior."""
    sds = _curves(found, GUIDES).get("fixed shape")
    if sds is None or not sds[1, 0] > 1.0 > sds[0, 0]:
        return []
    return [
        f"At a tenth of the noise the authors' guide is {shown(sds[1, 0])} times as wide as the prior, and the exact "
        f"posterior {shown(sds[0, 0])} times. In the paper too, blank images get a variance of 1.09 times the prior's, "
        "which no exact posterior of this model has."
    ]


@register_experiment(
    PAPER,
    "van-hateren-frozen",
    answers="beyond the paper: guides of one model",
    shows="What each guide loses on the same trained EA-VAE, and how wrong its sds are at low and high contrast.",
    rows=GUIDES,
    numbers={**OF_MODEL, **OF_GUIDE},
    needs=(PATCHES,),
    settings=SETTINGS,
    quick=QUICK,
    reduced=REDUCED,
    reduced_quick=REDUCED_QUICK,
    minutes=(0.7, 200),
    seeds=(1, 3),
    orderings=(Ordering(GAP, tuple(reversed(GUIDES)), "every step of the guide comes closer to the evidence"),),
    domain=DOMAIN,
    uses="van-hateren",
    summarise=_frozen,
)
def frozen(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train the guide of a row for the model that was trained with its collapsed guide."""
    model: Any = context.trained_by("collapsed", build)[0]
    model.requires_grad_(False)
    given = context.arguments
    guide = amortize(model, context.splits["train"], given["structure"], given["family"], seed=context.stream("guide"))
    return _trained(context, model, guide) | _over_contrast(context, model, guide)


# -- a learned noise scale beside the scale ----------------------------------------------------------------------------


def _noise(found: Found) -> Summary:
    without, beside = found.rows
    return Summary(
        [
            f"With σ learned in both, the scale still brings {found.difference(without, beside, EVIDENCE)} nats per "
            f"patch; σ ends at {found.mean(without, 'σ')} without it and at {found.mean(beside, 'σ')} beside it (the "
            "paper fixes it at 0.52). It is the same for all patches, which a scale is not.",
        ]
    )


@register_experiment(
    PAPER,
    "van-hateren-noise",
    answers="beyond the paper: σ learned beside the scale",
    shows="Whether a learned noise scale takes the place of the scale.",
    rows=NOISE,
    numbers={**OF_MODEL, GAP: OF_GUIDE[GAP], "σ": "of the sd of all pixels"},
    needs=(PATCHES,),
    settings=SETTINGS,
    quick=QUICK,
    reduced=REDUCED,
    reduced_quick=REDUCED_QUICK,
    minutes=(0.4, 120),
    seeds=(1, 3),
    orderings=(Ordering(EVIDENCE, tuple(reversed(NOISE)), "the scale brings nats beside a learned σ"),),
    domain=DOMAIN,
    summarise=_noise,
)
def noise(context: Context, row: str, seed: int) -> dict[str, Any]:
    """Train a model with a learned noise scale."""
    model, guide = build(context)
    return _trained(context, model, guide) | sigma_of(model)


# -- the picture -------------------------------------------------------------------------------------------------------


def _curves(found: Found, rows: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Row → sds of the exact posterior and of the guide over contrast, the mean of all seeds."""
    arrays = {row: [found.array(row, "sds", seed) for seed in found.seeds] for row in rows}
    there = {row: [array for array in each if array is not None] for row, each in arrays.items()}
    return {row: np.mean(each, axis=0) for row, each in there.items() if each}


def _figure(curves: Mapping[str, np.ndarray], is_one_model: bool = False) -> Figure:
    """Posterior sd against contrast: guides, their exact posteriors (one, if they are of one model), and the prior."""
    with new_figure(WIDTH, 4.2) as figure:
        axes = figure.subplots()
        for place, (row, (exact, guide)) in enumerate(curves.items()):
            colour, marker = cycled(COLOURS, place), cycled(MARKERS, place)
            axes.plot(LEVELS, guide, color=colour, marker=marker, label=plain_axes(row))
            if not is_one_model:
                axes.plot(LEVELS, exact, color=colour, ls=LINES[1])
            elif place == 0:
                axes.plot(LEVELS, exact, color=REFERENCE, ls=LINES[1], lw=2, label="exact posterior", zorder=5)
        axes.axhline(1.0, color=REFERENCE, ls=LINES[3], label="prior")
        axes.set(
            xscale="log", xlabel="contrast (in units of the noise)", ylabel="posterior sd / prior sd", ylim=(0, None)
        )
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
