"""What each kind of failure means, and what helps. docs/failed-check.md has the same words, with examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.on_averaging import AVERAGED
from calibrant.evaluation.judgements.on_misreading import MISREAD


@dataclass(frozen=True)
class Failure:
    """A kind of failure, which is a quantity of `Verdict`.

    Attributes:
        name: what was asked about, in the reader's words.
        means: what is wrong if it fails.
        helps: what to do, one whole sentence.
    """

    name: str
    means: str
    helps: str


RICHER = (
    'Use a guide with a richer structure (`structure="full"` or `"collapsed"`): it can represent latents that depend '
    "on each other given the data."
)
LONGER = (
    "Train the guide longer or on more data, or give it a larger encoder: the distribution that it predicts lies in "
    "the wrong place."
)
FLOWS = (
    'Use a flow (`family="flow"`) or a collapsed guide: it can represent skewed posteriors, heavy tails and several '
    "modes."
)
REFINED = "Refine the guide (`guides.refine`) for the data that matter: each datum gets parameters of its own."
NO_WEIGHTS = (
    "Do not reweight the draws of this guide. Use a richer guide, or the reference (`inference.reference`) for the "
    "data with a large k-hat."
)
READ_RIGHT = (
    "Say what the encoder returns, cal.guides.from_encoder(encoder, OUTPUT): the verdict names the OUTPUT that fits."
)
SUMS = "Train with the sum of the errors over the entries, as `inference.fit` does, never with their mean."
PROBABILITIES = (
    "Train for fewer epochs if the predictions are too confident, and for more if they are too uncertain; then check "
    "on data that were never used."
)

FAILURES: dict[str, Failure] = {
    "sd": Failure(
        "posterior sds", "The posterior sd that the guide reports is more than 10% too small or too large.", RICHER
    ),
    "mean": Failure("posterior means", "The posterior mean is off by more than a tenth of the posterior's sd.", LONGER),
    "coverage": Failure(
        "intervals", "A 90% interval of the guide holds less than 87% or more than 93% of the posterior.", RICHER
    ),
    "shape": Failure(
        "shapes",
        "The distribution has the wrong shape: it is skewed, or has tails or modes, and the guide's has not.",
        FLOWS,
    ),
    "correlation": Failure(
        "correlations", "The guide misses how two latents depend on each other given the data.", RICHER
    ),
    "direction": Failure(
        "sums of latents",
        "A sum of latents is too certain, too uncertain or off, although each latent by itself may look right.",
        RICHER,
    ),
    "single data": Failure(
        "single data", "The guide is right on average and wrong for some data, which the sentence names.", REFINED
    ),
    "evidence gap": Failure(
        "ELBO", "The ELBO lies too far below the log evidence: the guide is not close to the posterior.", RICHER
    ),
    "k-hat": Failure(
        "importance weights",
        "The guide is so far from the posterior that importance weights cannot correct its draws (k-hat is large).",
        NO_WEIGHTS,
    ),
    "log joint": Failure(
        "log joint on simulated data",
        "On data simulated from the model, the true latents are more or less probable than the guide's draws.",
        RICHER,
    ),
    "log likelihood": Failure(
        "log likelihood on simulated data",
        "On data simulated from the model, the true latents explain the data better or worse than the guide's draws.",
        RICHER,
    ),
    "ranks": Failure(
        "ranks on simulated data",
        "On data simulated from the model, the true latents rank too low, too high or too far out among the guide's "
        "draws.",
        RICHER,
    ),
    AVERAGED: Failure(
        "averaged error",
        "The guide has the mark of a training whose error was averaged over the entries of an observation, so that "
        "the prior weighs too much.",
        SUMS,
    ),
    MISREAD: Failure(
        "misread output",
        "The guide's sds are a power of the right ones: the encoder returns a variance, an sd or a precision, and is "
        "read as another of these.",
        READ_RIGHT,
    ),
    "confidence": Failure(
        "confidence of predictions",
        "The predictions claim a larger or smaller log probability than they reach.",
        PROBABILITIES,
    ),
    "frequencies": Failure(
        "frequencies of values", "A value occurs more often or less often than predicted.", PROBABILITIES
    ),
    "reliability": Failure(
        "predicted probabilities",
        "Where a value is predicted with some probability, it does not occur that often.",
        PROBABILITIES,
    ),
}


def what_helps(verdicts: Sequence[Verdict]) -> list[str]:
    """A sentence for every remedy of the kinds that fail, with the kinds that it is for; empty if none fails."""
    found: dict[str, list[str]] = {}
    failed = [verdict for verdict in verdicts if verdict.primary and verdict.status == "fail"]
    named = [verdict for verdict in verdicts if verdict.quantity in (AVERAGED, MISREAD)]
    for verdict in [*named, *failed]:
        failure = FAILURES[verdict.quantity]
        names = found.setdefault(failure.helps, [])
        if failure.name not in names:
            names.append(failure.name)
    return [f"{helps} (For: {', '.join(names)}.)" for helps, names in found.items()]
