"""Evaluation: trees in; xarray, verdicts and a report out."""

from calibrant.evaluation.c2st import c2st
from calibrant.evaluation.calibration import calibration, uniformity
from calibrant.evaluation.check import Check, check
from calibrant.evaluation.compare import compare
from calibrant.evaluation.conclusion import Conclusion, conclude
from calibrant.evaluation.contrast import contrast_experiment
from calibrant.evaluation.contrast_verdicts import contrast_verdicts
from calibrant.evaluation.gap import gap
from calibrant.evaluation.judging import Verdict
from calibrant.evaluation.pit import pit
from calibrant.evaluation.predictive import predictive_check
from calibrant.evaluation.predictive_sentences import predictive_sentences
from calibrant.evaluation.remedies import remedies, remedy_sentences
from calibrant.evaluation.report import report
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.verdicts import verdicts
from calibrant.inference.importance import weights

__all__ = [
    "Check",
    "Conclusion",
    "RunResult",
    "Verdict",
    "c2st",
    "calibration",
    "check",
    "compare",
    "conclude",
    "contrast_experiment",
    "contrast_verdicts",
    "gap",
    "pit",
    "predictive_check",
    "predictive_sentences",
    "remedies",
    "remedy_sentences",
    "report",
    "uniformity",
    "verdicts",
    "weights",
]
