"""Verdicts on a comparison with a reference, in words."""

from __future__ import annotations

import numpy as np

from calibrant.evaluation.judgements.decisions import Question, Statistic, Status
from calibrant.evaluation.judgements.on_marginals import (
    COVERAGE_MARGIN,
    MEAN_MARGIN,
    SD_MARGIN,
    SHAPE_MARGIN,
)
from calibrant.evaluation.judgements.wording import ceil, number, percent

_BY_QUANTILES = {"sd": "central width", "mean": "median"}


def compared_sentence(question: Question, status: Status, decisive: Statistic) -> str:
    """The sentence of a verdict."""
    words = {
        "coverage": _coverage,
        "shape": _shape,
        "correlation": _correlation,
        "direction": _direction,
        "single data": _single,
        "evidence gap": _gap,
    }.get(question.quantity, _marginal)
    return words(question, status, decisive)


def natural(quantity: str, found: Statistic) -> tuple[float, float]:
    """Effect and standard error in the units of `Verdict`, which for an sd are ratios in place of logs."""
    if quantity == "sd" or found.kind == "sd":
        return float(np.expm1(found.effect)), float(np.exp(found.effect) * found.se)
    return found.effect, found.se


def _error(kind: str, found: Statistic) -> str:
    """The size of an error of the sd or the mean, in words."""
    effect, se = natural("sd" if kind == "sd" else "", found)
    if kind == "mean":
        side = ("too low" if effect < 0 else "too high") if found.signed else "off"
        return f"{side} by {number(abs(effect), se)} posterior sd"
    if not found.signed:
        return f"off by {percent(abs(effect), se)}"
    return f"too {'small' if effect < 0 else 'large'} by {percent(abs(effect), se)}"


def _bound(kind: str, reach: float) -> str:
    if not np.isfinite(reach):
        return "any size"
    return f"{ceil(np.expm1(reach), 2):.0%}" if kind == "sd" else f"{ceil(reach, 2):.2f} posterior sd"


def _marginal(question: Question, status: Status, found: Statistic) -> str:
    kind = question.quantity
    name = _BY_QUANTILES[kind] if found.tails else kind
    if status == "pass":
        why = f" ({found.tails})" if found.tails else ""
        return f"posterior {name} of `{question.site}`: within {_bound(kind, found.reach)} of the reference{why}"
    margin = f"{SD_MARGIN:.0%}" if kind == "sd" else f"{MEAN_MARGIN} posterior sd"
    head = f"posterior {name} of {found.label}"
    why = f", {found.tails}" if found.tails else ""
    return _said(status, found, head, f"{_error(kind, found)}{found.note}{why}", margin)


def _coverage(question: Question, status: Status, found: Statistic) -> str:
    level = f"{question.level:.0%}"
    if status == "pass":
        points = ceil(100.0 * found.reach, 0)
        unit = "point" if points == 1 else "points"
        return f"{level} intervals of `{question.site}`: contain {level} of the reference within {points:.0f} {unit}"
    said = f"contain {percent(question.level + found.effect, found.se)} of the reference"
    return _said(status, found, f"{level} intervals of {found.label}", said, f"{100 * COVERAGE_MARGIN:.0f} points")


def _shape(question: Question, status: Status, found: Statistic) -> str:
    if status == "pass":
        reach = ceil(found.reach, 2)
        return f"distribution of `{question.site}`: within {reach:.2f} of the reference's distribution function"
    p = float(found.note)
    said = f"{percent(p + found.effect, found.se)} of the reference lie below the guide's {p:.0%} quantile"
    return _said(status, found, f"distribution of {found.label}", said, f"{100 * SHAPE_MARGIN:.0f} points")


def _correlation(question: Question, status: Status, found: Statistic) -> str:
    if status == "pass":
        return f"correlations of all latents: within {ceil(found.reach, 2):.2f} of the reference"
    head = "correlations of all latents" if found.label == "all latents" else f"correlation of {found.label}"
    return _said(status, found, head, f"off by {number(found.effect, found.se)}{found.note}", f"{found.margin}")


def _direction(question: Question, status: Status, found: Statistic) -> str:
    if status == "pass":
        return f"sums of latents: posterior {found.kind} within {_bound(found.kind, found.reach)} of the reference"
    return _said(status, found, f"posterior {found.kind} of {found.label}", _error(found.kind, found), _margin(found))


def _single(question: Question, status: Status, found: Statistic) -> str:
    if status == "pass":
        return "single data: the worst datum and the worst 5% of the data are within their margins"
    return _said(status, found, f"posterior {found.kind} of {found.label}", _error(found.kind, found), _margin(found))


def _margin(found: Statistic) -> str:
    return f"{np.expm1(found.margin):.0%}" if found.kind == "sd" else f"{found.margin} posterior sd"


def _gap(question: Question, status: Status, found: Statistic) -> str:
    if np.isposinf(found.effect):
        return "the ELBO is −∞: some draws of the guide lie outside the support of the model"
    where = "below" if found.effect >= 0 else "above"
    said = f"{number(abs(found.effect), found.se)} nats per datum {where} the log evidence"
    margin = f"{found.margin:.2g} nats"
    if abs(found.effect) + found.se < 5e-5:
        return "ELBO: equal to the log evidence, up to 0.0001 nats per datum"
    return f"ELBO: {said} (within {margin})" if status == "pass" else _said(status, found, "ELBO", said, margin)


def _said(status: Status, found: Statistic, head: str, said: str, margin: str) -> str:
    """The sentence of a verdict that does not pass."""
    if np.isnan(found.effect):
        return f"{head}: no datum has a reference posterior"
    return f"{head}: {said}" if status == "fail" else f"{head}: {said}; cannot tell whether that is within {margin}"
