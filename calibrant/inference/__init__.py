"""Inference: training, amortized and reference posteriors, exact solutions, the gate."""

from calibrant.inference.fit import Fit, fit
from calibrant.inference.importance import importance
from calibrant.inference.posterior import posterior
from calibrant.inference.predictive import GROUPS
from calibrant.inference.reference import METHODS, log_evidence, reference

__all__ = ["GROUPS", "METHODS", "Fit", "fit", "importance", "log_evidence", "posterior", "reference"]
