"""Evaluation of guides: statistics of result trees, verdicts on them, remedies, and a report."""

from calibrant.calls import own_calls
from calibrant.evaluation.checking import Check, check
from calibrant.evaluation.judgements.against_reference import verdicts
from calibrant.evaluation.judgements.conclusion import Conclusion, conclude
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.on_contrast import contrast_verdicts
from calibrant.evaluation.judgements.on_predictions import predictive_sentences
from calibrant.evaluation.remedying.sentences import remedy_sentences
from calibrant.evaluation.remedying.trying import remedies
from calibrant.evaluation.reporting.page import report
from calibrant.evaluation.reporting.predictive_plots import coverage_figure
from calibrant.evaluation.reporting.rate_plots import rate_distortion_figure
from calibrant.evaluation.results import RunResult
from calibrant.evaluation.statistics.classifier import c2st
from calibrant.evaluation.statistics.comparison import compare
from calibrant.evaluation.statistics.contrast_curves import contrast_experiment
from calibrant.evaluation.statistics.entry_calibration import pixel_calibration
from calibrant.evaluation.statistics.frechet import frechet_distance
from calibrant.evaluation.statistics.gaps import gap
from calibrant.evaluation.statistics.informed import informed_directions
from calibrant.evaluation.statistics.mutual_information import information
from calibrant.evaluation.statistics.posterior_ranks import posterior_calibration
from calibrant.evaluation.statistics.predictive_tests import predictive_check
from calibrant.evaluation.statistics.ranks import pit
from calibrant.evaluation.statistics.rates import rate_distortion
from calibrant.evaluation.statistics.simulation_ranks import calibration, uniformity
from calibrant.evaluation.statistics.usage import active_units
from calibrant.inference.reweighting import weights

__all__ = [
    "Check",
    "Conclusion",
    "RunResult",
    "Verdict",
    "active_units",
    "c2st",
    "calibration",
    "check",
    "compare",
    "conclude",
    "contrast_experiment",
    "contrast_verdicts",
    "coverage_figure",
    "frechet_distance",
    "gap",
    "information",
    "informed_directions",
    "pit",
    "pixel_calibration",
    "posterior_calibration",
    "predictive_check",
    "predictive_sentences",
    "rate_distortion",
    "rate_distortion_figure",
    "remedies",
    "remedy_sentences",
    "report",
    "uniformity",
    "verdicts",
    "weights",
]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
