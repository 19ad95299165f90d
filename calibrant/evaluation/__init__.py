"""Evaluation: trees in; xarray, verdicts and a report out."""

from calibrant.evaluation.check import Check, check
from calibrant.evaluation.compare import compare
from calibrant.evaluation.contrast import contrast_experiment
from calibrant.evaluation.contrast_verdicts import contrast_verdicts
from calibrant.evaluation.gap import gap
from calibrant.evaluation.pit import pit
from calibrant.evaluation.remedies import remedies, remedy_sentences
from calibrant.evaluation.report import report
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.verdicts import Verdict, verdicts

__all__ = [
    "Check",
    "RunResult",
    "Verdict",
    "check",
    "compare",
    "contrast_experiment",
    "contrast_verdicts",
    "gap",
    "pit",
    "remedies",
    "remedy_sentences",
    "report",
    "verdicts",
]
