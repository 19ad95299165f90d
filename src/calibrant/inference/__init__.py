"""Inference: training, amortized posteriors, and reference posteriors with a convergence gate."""

from calibrant.calls import own_calls
from calibrant.inference.bounds.importance_bound import iwae_bound
from calibrant.inference.drawing import posterior
from calibrant.inference.fitting.loop import fit
from calibrant.inference.fitting.state import Fit
from calibrant.inference.groups import GROUPS
from calibrant.inference.references.sampling import METHODS, log_evidence
from calibrant.inference.referencing import reference
from calibrant.inference.reweighting import importance
from calibrant.inference.sampling_densities import sample
from calibrant.inference.speed.measuring import Bench, bench

__all__ = [
    "GROUPS",
    "METHODS",
    "Bench",
    "Fit",
    "bench",
    "fit",
    "importance",
    "iwae_bound",
    "log_evidence",
    "posterior",
    "reference",
    "sample",
]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
