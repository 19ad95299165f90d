"""The report: one HTML file without external resources, verdicts first."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calibrant._version import __version__
from calibrant.errors import CalibrantError, RunError
from calibrant.evaluation.judgements.against_reference import COMPARED, verdicts
from calibrant.evaluation.judgements.conclusion import Conclusion, conclude
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.on_contrast import contrast_verdicts
from calibrant.evaluation.judgements.on_predictions import predictive_sentences
from calibrant.evaluation.judgements.on_probabilities import probability_verdicts
from calibrant.evaluation.reporting import check_plots, image_plots, predictive_plots, run_plots
from calibrant.evaluation.reporting.reliability_plots import reliability
from calibrant.evaluation.reporting.tables import (
    calibration_table,
    gap_table,
    gate_table,
    number_rows,
    remedy_table,
    setting_rows,
    site_names,
    site_row,
)
from calibrant.evaluation.reporting.templates import template
from calibrant.evaluation.results import RunResult
from calibrant.folders.files import new_file
from calibrant.models.registry import card

_LIBRARIES = ("torch", "pyro-ppl", "numpy", "xarray", "arviz-base", "arviz-stats", "arviz-plots")


def report(results: Sequence[RunResult], path: str | Path, command: str = "") -> Path:
    """Write results as one HTML file without external resources.

    Args:
        results: one result per model.
        path: path of the file; its folder is created if it does not exist.
        command: command line that writes the report again, which the report shows.

    Raises:
        RunError: without results, or if the file can't be written.
    """
    if not results:
        raise RunError("there is no result to report on")
    path = Path(path)
    page = template("report.html").render(
        models=[_section(result) for result in results],
        checked=_checked(results),
        captions=predictive_plots.CAPTIONS,
        training=run_plots.training_curves(results),
        contrast=run_plots.contrast_curves(results),
        command=command,
        versions=_versions(results),
        made=f"{datetime.now():%d %B %Y, %H:%M}",
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as new:
            new.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"the report can't be written: {error}") from error
    return path


def _checked(results: Sequence[RunResult]) -> str:
    """The ways in which the guides were checked, in words."""
    ways = {
        "against the reference posterior of the same data, datum by datum": "comparison",
        "by its importance weights": "weights",
        "on data that the model makes": "calibration",
        "by its predictions of the observations": "probabilities",
    }
    return ", ".join(words for words, field in ways.items() if any(getattr(r, field) is not None for r in results))


@dataclass(frozen=True)
class _Section:
    """The content of the page for one model."""

    name: str
    equations: str
    paper: str
    conclusion: Conclusion
    compared: list[Verdict]
    unaided: list[Verdict]
    contrast: list[Verdict]
    predicted: list[Verdict]
    numbers: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    sites: list[dict[str, str]]
    gap: dict[str, Any] | None
    gate: dict[str, Any] | None
    calibration: dict[str, Any] | None
    remedies: dict[str, Any] | None
    predictive: list[str]
    notes: list[str]
    pictures: dict[str, str | None]
    typical: str


def _section(result: RunResult) -> _Section:
    comparison = result.comparison
    predicted = probability_verdicts(result.probabilities) if result.probabilities is not None else []
    found = verdicts(comparison, result.weights, result.calibration)
    equations, paper = _card(result.name)
    pictures = {
        "dictionary": image_plots.dictionary(result),
        "samples": image_plots.samples(result),
        "agreement": run_plots.agreement(result),
        "gaps": run_plots.gaps(result),
        "worst": image_plots.worst_data(result),
        **_check_pictures(result),
        **run_plots.arviz_pictures(result),
    }
    return _Section(
        name=result.name,
        equations=equations,
        paper=paper,
        conclusion=conclude(predicted or found, comparison),
        compared=[verdict for verdict in found if _is_compared(verdict)],
        unaided=[verdict for verdict in found if not _is_compared(verdict)],
        contrast=contrast_verdicts(result.contrast) if result.contrast is not None else [],
        predicted=predicted,
        numbers=number_rows(result),
        settings=setting_rows(result.config),
        sites=[site_row(comparison, name, found) for name in site_names(comparison)] if comparison is not None else [],
        gap=gap_table(result),
        gate=gate_table(result),
        calibration=calibration_table(result),
        remedies=remedy_table(result),
        predictive=predictive_sentences(result.predictive) if result.predictive is not None else [],
        notes=[str(note) for note in result.config.get("notes", [])],
        pictures=pictures,
        typical=str(run_plots.typical_datum(comparison)) if comparison is not None and "dist" in pictures else "",
    )


def _is_compared(verdict: Verdict) -> bool:
    """Whether a verdict needs the reference; the evidence gap decides only where the reference knows the evidence."""
    return verdict.quantity in COMPARED or (verdict.quantity == "evidence gap" and verdict.primary)


def _check_pictures(result: RunResult) -> dict[str, str | None]:
    found = {
        "bands": check_plots.calibration_bands(result),
        "coverage": check_plots.coverage_curves(result),
        "recovery": check_plots.recovery(result),
        "importance": check_plots.importance(result),
        "classifier": check_plots.classifier(result),
        "pairs": check_plots.pairs(result),
        "reliability": reliability(result),
    }
    if result.predictive is None:
        return found
    return found | {name: getattr(predictive_plots, name)(result.predictive) for name in predictive_plots.CAPTIONS}


def _card(name: str) -> tuple[str, str]:
    try:
        known = card(name)
    except CalibrantError:  # the model is in a user's own file
        return "", ""
    return known.equations, known.paper


def _versions(results: Sequence[RunResult]) -> list[tuple[str, str]]:
    """The versions stored in the run, else those of this process."""
    here = {
        "calibrant": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }
    return list({**here, **(results[0].config.get("versions") or {})}.items())
