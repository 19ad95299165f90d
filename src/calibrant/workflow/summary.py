"""The summary of a result that the command line shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibrant.evaluation.checking import judged
from calibrant.evaluation.remedying.next_steps import concluded
from calibrant.evaluation.remedying.sentences import remedy_sentences
from calibrant.evaluation.results import RunResult


@dataclass(frozen=True)
class Summary:
    """The numbers of a model in nats per datum (NaN if they are not known), its conclusion, and a sentence for each
    verdict that is not a pass and for each remedy that was tried.

    `remedy` and `next_line` are those of `Conclusion`. All numbers are
    of the checked data: `elbo`, `evidence` and `gap` (log evidence − ELBO).
    """

    name: str
    elbo: float
    elbo_se: float
    evidence: float
    gap: float
    gap_se: float
    conclusion: str
    remedy: str
    next_line: str
    details: list[str]


def summarise(result: RunResult) -> Summary:
    """Summarise a result for the command line."""
    from calibrant.evaluation.reporting.tables import checked_elbo, evidence_gap

    evidence, bound, error = evidence_gap(result) or (np.nan,) * 3
    elbo, elbo_se = checked_elbo(result) or (np.nan,) * 2
    found = judged(result)
    conclusion = concluded(result, found)
    tried = remedy_sentences(result.remedies) if result.remedies is not None else []
    details = [verdict.sentence for verdict in found if verdict.primary and verdict.status != "pass"]
    return Summary(
        name=result.name,
        elbo=elbo,
        elbo_se=elbo_se,
        evidence=evidence,
        gap=evidence - bound,
        gap_se=error,
        conclusion=str(conclusion),
        remedy=conclusion.remedy,
        next_line=conclusion.next_line,
        details=[*details, *tried],
    )
