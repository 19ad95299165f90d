"""Papers reproduced: experiments by name, each a table of rows computed for several seeds, beside the paper's numbers.

>>> import calibrant as cal
>>> "sigma-vae" in [paper.name for paper in cal.reproductions.list_papers()]
True
"""

import calibrant.reproductions.papers  # noqa: F401  registers the papers
from calibrant.calls import own_calls
from calibrant.reproductions.cards import Claim, Experiment, Needs, Ordering, Paper, Target
from calibrant.reproductions.cells import Measured
from calibrant.reproductions.context import Context
from calibrant.reproductions.found import Estimate, Found, Picture, Summary
from calibrant.reproductions.registering import list_experiments, list_papers, register_experiment, register_paper
from calibrant.reproductions.results import Results, load_results
from calibrant.reproductions.running import run

__all__ = [
    "Claim",
    "Context",
    "Estimate",
    "Experiment",
    "Found",
    "Measured",
    "Needs",
    "Ordering",
    "Paper",
    "Picture",
    "Results",
    "Summary",
    "Target",
    "list_experiments",
    "list_papers",
    "load_results",
    "register_experiment",
    "register_paper",
    "run",
]

globals().update(own_calls(__name__, globals(), __all__))


def __dir__() -> list[str]:
    return sorted(__all__)
