"""The summary of a result that the command line shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibrant.evaluation.checking import judged
from calibrant.evaluation.judgements.conclusion import conclude
from calibrant.evaluation.remedying.sentences import remedy_sentences
from calibrant.evaluation.results import RunResult


@dataclass(frozen=True)
class Summary:
    """The numbers of a model in nats per datum (NaN if they are not known), its conclusion, and a sentence for each
    verdict that is not a pass and for each remedy that was tried.

    `elbo` is the ELBO of the validation data; `evidence` and `gap` (log evidence − ELBO) are those of the checked data.
    """

    name: str
    elbo: float
    elbo_se: float
    evidence: float
    gap: float
    gap_se: float
    conclusion: str
    details: list[str]


def summarise(result: RunResult) -> Summary:
    """Summarise a result for the command line."""
    from calibrant.evaluation.reporting.tables import evidence_gap

    trained = result.config["fit"]
    evidence, bound, error = evidence_gap(result) or (np.nan,) * 3
    found = judged(result)
    tried = remedy_sentences(result.remedies) if result.remedies is not None else []
    details = [verdict.sentence for verdict in found if verdict.primary and verdict.status != "pass"]
    return Summary(
        name=result.name,
        elbo=trained["elbo"],
        elbo_se=trained["elbo_se"],
        evidence=evidence,
        gap=evidence - bound,
        gap_se=error,
        conclusion=str(conclude(found, result.comparison)),
        details=[*details, *tried],
    )
