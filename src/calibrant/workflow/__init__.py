"""The work of the commands: fit a model, sample its posteriors, compare them, write a report.

A run folder holds one model; a run of several models has a subfolder for each and the report on top.
"""

from calibrant.calls import own_calls
from calibrant.workflow.benching import bench_run
from calibrant.workflow.running import Outcome, check_run, fit_run, report_run, run
from calibrant.workflow.summary import Summary, summarise

__all__ = ["Outcome", "Summary", "bench_run", "check_run", "fit_run", "report_run", "run", "summarise"]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
