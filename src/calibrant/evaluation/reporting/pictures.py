"""Every picture of a report, by the name that it has on the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from calibrant.errors import InferenceError
from calibrant.evaluation.reporting import check_plots, image_plots, predictive_plots, run_plots
from calibrant.evaluation.reporting.reliability_plots import reliability
from calibrant.evaluation.results import RunResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _of_predictions(name: str, result: RunResult) -> Figure | None:
    return None if result.predictive is None else getattr(predictive_plots, name)(result.predictive)


# Pictures that show all models of a report together.
OF_ALL: Mapping[str, Callable[[Sequence[RunResult]], Figure | None]] = {
    "training": run_plots.training_curves,
    "contrast": run_plots.contrast_curves,
}
# Pictures of one model; None where it has no such picture.
OF_ONE: Mapping[str, Callable[[RunResult], Figure | None]] = {
    "samples": image_plots.samples,
    "dictionary": image_plots.dictionary,
    "reliability": reliability,
    **{name: partial(_of_predictions, name) for name in predictive_plots.CAPTIONS},
    "classifier": check_plots.classifier,
    "agreement": run_plots.agreement,
    "pairs": check_plots.pairs,
    "bands": check_plots.calibration_bands,
    "coverage": check_plots.coverage_curves,
    "recovery": check_plots.recovery,
    "importance": check_plots.importance,
    "gaps": run_plots.gaps,
    "worst": image_plots.worst_data,
}
NAMES = (*OF_ALL, *OF_ONE, *run_plots.ARVIZ)


def picture(result: RunResult, name: str) -> Figure | None:
    """A picture of the report on one result; None if the result has not what it shows.

    Args:
        result: what a check has found.
        name: one of `NAMES`.
    """
    if name in run_plots.ARVIZ:
        return run_plots.arviz_pictures(result, [name]).get(name)
    return OF_ALL[name]([result]) if name in OF_ALL else OF_ONE[name](result)


_REFERENCE = (
    "give as `guide` one that is meant to be the posterior, and as `reference` one that passes its gate for some data "
    "(or more `warmup` and `draws`)"
)
_SIMULATED = "give as `guide` one that is meant to be the posterior, and as `model` one that can be simulated"
# What the arguments of `check` have to be, so that there is a picture.
_NEEDS: Mapping[str, str] = {
    "training": "a check takes no history of a training; fit(...).plot() draws it",
    "contrast": (
        "give as `observed` images, and as `model` one with a known noise (`model.likelihood.noise_sd`), one vector "
        "latent and an exact posterior"
    ),
    "samples": "give as `observed` images, and as `model` one that can be simulated",
    "dictionary": "give as `observed` images, and as `model` one whose decoder is linear",
    "reliability": "give as `guide` the prior, `calibrant.guides.prior(model)`, and sites with finitely many values",
    "prior_statistics": _SIMULATED,
    "aggregate_posterior": _SIMULATED,
    "entry_coverage": f"{_SIMULATED}, with a likelihood whose entries are known",
    "bands": f"{_SIMULATED}, with local latents",
    "coverage": f"{_SIMULATED}, with local latents",
    "recovery": f"{_SIMULATED}, with local latents that are numbers",
    "importance": "give as `guide` one that is meant to be the posterior",
    "gaps": f"{_REFERENCE} and knows the log evidence",
    "pairs": f"{_REFERENCE}, of a `model` with two latents or more",
}


def drawn(result: RunResult, name: str) -> Figure:
    """A picture of the report on one result.

    Raises:
        InferenceError: for a result that has not what it shows; the message says which argument of `check` would give
            it.
    """
    figure = picture(result, name)
    if figure is None:
        raise InferenceError(f"this check has nothing for plot_{name}: {_NEEDS.get(name, _REFERENCE)}")
    return figure
