"""The report: one HTML file without external resources, verdicts first."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from calibrant._version import __version__
from calibrant.errors import CalibrantError, RunError
from calibrant.evaluation.judgements.against_reference import COMPARED, verdicts
from calibrant.evaluation.judgements.conclusion import Conclusion
from calibrant.evaluation.judgements.decisions import Verdict
from calibrant.evaluation.judgements.on_contrast import contrast_verdicts
from calibrant.evaluation.judgements.on_predictions import predictive_sentences
from calibrant.evaluation.judgements.on_probabilities import probability_verdicts
from calibrant.evaluation.remedying.failures import what_helps
from calibrant.evaluation.remedying.next_steps import concluded
from calibrant.evaluation.reporting import predictive_plots, run_plots
from calibrant.evaluation.reporting.first_screen import again, facts, terms_in
from calibrant.evaluation.reporting.pictures import OF_ALL, OF_ONE, picture
from calibrant.evaluation.reporting.style import data_uri
from calibrant.evaluation.reporting.tables import (
    calibration_table,
    gap_table,
    gate_table,
    number_rows,
    remedy_table,
    setting_rows,
    site_names,
    site_row,
    training_rows,
)
from calibrant.evaluation.reporting.templates import template
from calibrant.evaluation.results import RunResult
from calibrant.folders.files import new_file
from calibrant.models.registry import card
from calibrant.progress import Progress, silent
from calibrant.settings import model_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pictures: TypeAlias = dict[str, str | None]
_LIBRARIES = ("torch", "pyro-ppl", "numpy", "xarray", "arviz-base", "arviz-stats", "arviz-plots")


def report(
    results: Sequence[RunResult],
    path: str | Path,
    command: str = "",
    story: Sequence[str] = (),
    pictures: Sequence[Pictures] = (),
) -> Path:
    """Write results as one HTML file without external resources.

    Args:
        results: one result per model.
        path: path of the file; its folder is created if it does not exist.
        command: command line that writes the report again, which the report shows.
        story: sentences that say what all results show together; they come first. Names may stand in backticks.
        pictures: the pictures of each result, where another process has drawn them; by default they are drawn.

    Raises:
        RunError: without results, or if the file can't be written.
    """
    if not results:
        raise RunError("there is no result to report on")
    path = Path(path)
    page = template("report.html").render(
        story=list(story),
        models=[_section(*one) for one in zip(results, pictures or map(pictures_of, results), strict=True)],
        explain=partial(terms_in, explained=set()),
        captions=predictive_plots.CAPTIONS,
        training=_text(OF_ALL["training"](results)),
        trained=training_rows(results),
        contrast=_text(OF_ALL["contrast"](results)),
        again=[again(results[0], command)] if command or len(results) == 1 else [again(r, "") for r in results],
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


@dataclass(frozen=True)
class _Section:
    """The content of the page for one model."""

    name: str
    equations: str
    paper: str
    facts: list[tuple[str, str]]
    conclusion: Conclusion
    helps: list[str]
    verdicts: dict[str, list[Verdict]]
    contrast: list[Verdict]
    numbers: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    sites: list[dict[str, str]]
    gap: dict[str, Any] | None
    gate: dict[str, Any] | None
    calibration: dict[str, Any] | None
    remedies: dict[str, Any] | None
    predictive: list[str]
    notes: list[str]
    pictures: Pictures
    typical: str


def _section(result: RunResult, pictures: Pictures) -> _Section:
    comparison = result.comparison
    contrast = contrast_verdicts(result.contrast) if result.contrast is not None else []
    found = verdicts(comparison, result.weights, result.calibration)
    judged = probability_verdicts(result.probabilities) if result.probabilities is not None else found
    equations, paper = _card(model_of(result.name))
    return _Section(
        name=result.name,
        equations=equations,
        paper=paper,
        facts=facts(result),
        conclusion=concluded(result, judged),
        helps=what_helps(judged),
        verdicts=_parts(result, judged, contrast),
        contrast=contrast,
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
        typical=str(run_plots.typical_datum(comparison)) if comparison is not None and pictures["dist"] else "",
    )


def _parts(result: RunResult, judged: Sequence[Verdict], contrast: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """Heading → its verdicts."""
    if result.probabilities is not None:
        return {"The predicted probabilities, and the observations": list(judged)}
    parts = {
        "The guide against the reference posterior": [verdict for verdict in judged if _is_compared(verdict)],
        "The guide by itself, without a reference": [verdict for verdict in judged if not _is_compared(verdict)],
        "Contrast: what the model does, and whether its guide shows it": list(contrast),
    }
    return {heading: found for heading, found in parts.items() if found}


def _is_compared(verdict: Verdict) -> bool:
    """Whether a verdict needs the reference; the evidence gap decides only where the reference knows the evidence."""
    return verdict.quantity in COMPARED or (verdict.quantity == "evidence gap" and verdict.primary)


def pictures_of(result: RunResult, progress: Progress = silent) -> Pictures:
    """The pictures of one model: name → a picture as text, or None."""
    names, found = [*OF_ONE, *run_plots.ARVIZ], Pictures()
    for done, name in enumerate(names):
        progress("pictures", done, len(names))
        found[name] = _text(picture(result, name))
    progress("pictures", len(names), len(names))
    return found


def _text(figure: Figure | None) -> str | None:
    return None if figure is None else data_uri(figure)


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
