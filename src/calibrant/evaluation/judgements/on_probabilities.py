"""Verdicts on the probabilities that a program predicts for labels, held against the labels that are observed.

A function φ of a datum and a value of y has, under the predicted probabilities p, the mean Σ p φ; the observed y has
φ(y). Their mean difference over the data, S, is zero if the predictions are right, whatever φ is. With the variance v
of φ under the predictions, S/√v has the standard error 1/√n, and about ½ S²/v nats per datum are gained by a correction
of the predictions along φ (their exponential tilt). So the effects of all questions have one unit and one margin.

φ and bins are taken from one half of the draws of the latents, and p from the other half, both ways: φ and the noise of
p are then independent, and S has no bias.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xarray as xr

from calibrant.evaluation.judgements.decisions import Question, Statistic, Status, Verdict, decide, normal_statistic
from calibrant.evaluation.judgements.wording import number, percent

Array = npt.NDArray[np.float64]
PREDICTED = ("confidence", "frequencies", "reliability")  # quantities of predicted probabilities
PRIOR, SCORE = "prior guide", "log score"  # quantities that only describe
MARGIN = 0.15  # largest S/√v that passes: 0.011 nats per datum
FULL_DATA = 4000  # number of data of which right predictions pass

_BINS = 5  # parts of the data, by the predicted probability of the value that is asked about
_LEAST = 10.0  # expected number of data with a value, below which rare values are counted together
_SMALLEST = 1e-5  # predicted probabilities below are not told apart


def probability_verdicts(predicted: xr.Dataset) -> list[Verdict]:
    """Judge the predicted probabilities of every observed site with finitely many values.

    Args:
        predicted: result of `predicted_probabilities`.

    Returns:
        For each site "confidence" (do the predictions claim the log probability that they reach?), "frequencies" (does
        every value occur as often as predicted? left out if each is expected fewer than ten times) and "reliability"
        (is a probability right in each fifth of the data, from the least to the most probable?), each within 0.15 sd of
        one datum, which is 0.011 nats per datum; these verdicts form one family. Then "log score", which describes the
        mean log p(y | x) beside that of the label frequencies, and "prior guide", which says that no posterior was
        judged.
    """
    names = json.loads(predicted.attrs["sites"])
    asked = [question for name in names for question in _questions(name, predicted)]
    found = [_verdict(q, *decided) for q, decided in zip(asked, decide(asked), strict=True)]
    return [*found, *_scores(predicted, names), *_on_the_guide(predicted)]


def _questions(name: str, predicted: xr.Dataset) -> list[Question]:
    probabilities = predicted[f"{name}_probability"].values
    observed = predicted[f"{name}_observed"].values
    values = predicted[f"{name}_value"].values.tolist()
    asked = [
        Question(name, "confidence", [_confidence(probabilities, observed)]),
        Question(name, "frequencies", list(_frequencies(name, values, probabilities, observed))),
        Question(name, "reliability", list(_reliability(name, predicted))),
    ]
    return [question for question in asked if question.statistics]


def _confidence(probabilities: Array, observed: npt.NDArray[np.int64]) -> Statistic:
    """φ = log p: negative if the predictions claim a larger log probability than they reach."""
    logs = np.log(probabilities.clip(_SMALLEST))
    reached = logs[:, np.arange(len(observed)), observed].mean()
    terms, variance = _terms(logs, probabilities, observed)
    found, error = float(terms.mean()), float(terms.std() / np.sqrt(len(terms)))
    note = f"claim a mean log probability of {reached - found:.3f} nats and reach {number(reached, error)}"
    return _statistic("", note, terms, variance)


def _frequencies(
    name: str, values: list[str], probabilities: Array, observed: npt.NDArray[np.int64]
) -> Iterator[Statistic]:
    """φ = 1 for one value, or for all values that are too rare to be looked at alone; none if all values are rare."""
    rare = probabilities.mean(0).sum(0) < _LEAST
    if rare.all():
        return
    groups = [(f"`{name}` = {values[place]}", np.arange(len(values)) == place) for place in np.flatnonzero(~rare)]
    if rare.any():
        groups.append((f"one of the {int(rare.sum())} rarest values of `{name}`", rare))
    for label, members in groups[1:] if len(values) == 2 and not rare.any() else groups:
        chosen = np.broadcast_to(members.astype(float), probabilities.shape)
        terms, variance = _terms(chosen, probabilities, observed)
        predicted = float((chosen * probabilities).sum(2).mean())
        error = float(terms.std() / np.sqrt(len(terms)))
        note = f"predicted for {predicted:.1%} of the data and occurs in {percent(predicted + terms.mean(), error)}"
        yield _statistic(label, note, terms, variance)


@dataclass(frozen=True)
class Bin:
    """The data in one part of the predicted probabilities of a value: its mean probability, and how often it occurs.

    `terms` `(data,)` and `variance` are those of φ = 1 for the value of the data in the bin.
    """

    predicted: float
    found: float
    error: float
    terms: Array
    variance: float


def reliability_bins(predicted: xr.Dataset, name: str, count: int = _BINS) -> list[Bin]:
    """Parts of the data with equally many data each, from the least probable on.

    What is asked about is the second of two values, or the most probable one of several.

    Args:
        predicted: result of `predicted_probabilities`.
        name: a site.
        count: number of bins.
    """
    probabilities, observed = predicted[f"{name}_probability"].values, predicted[f"{name}_observed"].values
    values = probabilities.shape[2]
    one = np.arange(values) == (1 if values == 2 else probabilities.argmax(2)[..., None])
    one = np.broadcast_to(one, probabilities.shape)
    asked = (one * probabilities).sum(2)
    ranks = asked.argsort(1, kind="stable").argsort(1)
    found = []
    for place in range(count):
        inside = ranks * count // len(observed) == place
        terms, variance = _terms(one * inside[..., None], probabilities, observed)
        share = float(inside.mean())
        mean = float((((one * probabilities[::-1]).sum(2)) * inside).mean()) / share
        error = float(terms.std() / np.sqrt(len(terms))) / share
        found.append(Bin(mean, mean + float(terms.mean()) / share, error, terms, variance))
    return found


def _reliability(name: str, predicted: xr.Dataset) -> Iterator[Statistic]:
    values = predicted[f"{name}_value"].values.tolist()
    label = f"`{name}` = {values[1]}" if len(values) == 2 else f"the most probable `{name}`"
    for one in reliability_bins(predicted, name):
        held = percent(one.found, one.error)
        note = f"has {one.predicted:.1%} on average, it occurs in {held} of the data"
        yield _statistic(label, note, one.terms, one.variance)


def _terms(function: Array, probabilities: Array, observed: npt.NDArray[np.int64]) -> tuple[Array, float]:
    """φ(y) − Σ p φ of every datum, and the mean variance of φ under p.

    Args:
        function: φ, `(half, data, value)`.
        probabilities: p, `(half, data, value)`.
        observed: place of the observed value, `(data,)`.
    """
    other = probabilities[::-1]
    mean = (other * function).sum(2)
    at_observed = function[:, np.arange(len(observed)), observed]
    variance = (other * (function - mean[..., None]) ** 2).sum(2).mean()
    return (at_observed - mean).mean(0), float(variance)


def _statistic(label: str, note: str, terms: Array, variance: float) -> Statistic:
    """The effect S/√v. Its error is that of the terms, or that of right predictions where it is larger."""
    unit = np.sqrt(max(variance, 1e-9))
    error = np.sqrt(max(variance, float(terms.var())) / len(terms))
    return normal_statistic(label, note, float(terms.mean()) / unit, max(float(error), 1e-9) / unit, MARGIN)


def _verdict(question: Question, status: Status, found: Statistic) -> Verdict:
    """The verdict on a question, with its sentence."""
    doubt = "; cannot tell whether that is within the margin" if status == "cannot tell" else ""
    words = {"confidence": _confidence_words, "frequencies": _frequency_words, "reliability": _reliability_words}
    sentence = words[question.quantity](question.site, status, found)
    return Verdict(
        question.site, question.quantity, status, found.effect, found.se, MARGIN, sentence + doubt, entry=found.label
    )


def _confidence_words(site: str, status: Status, found: Statistic) -> str:
    if status != "fail":
        return f"predictions of `{site}` {found.note}"
    return f"predictions of `{site}` are too {'confident' if found.effect < 0 else 'uncertain'}: they {found.note}"


def _frequency_words(site: str, status: Status, found: Statistic) -> str:
    if status == "pass":
        return f"values of `{site}` occur as often as predicted ({found.label} differs most: it is {found.note})"
    return f"{found.label} is {found.note}"


def _reliability_words(site: str, status: Status, found: Statistic) -> str:
    where = f"where {found.label} {found.note}"
    return (
        f"probabilities of `{site}` are right from the lowest to the highest ({where})" if status == "pass" else where
    )


# -- what describes ----------------------------------------------------------------------------------------------------


def _scores(predicted: xr.Dataset, names: list[str]) -> Iterator[Verdict]:
    """The mean log p(y | x), beside that of the frequencies of the observed labels."""
    reached = predicted["log_p"].values
    mean = float(reached.mean())
    if impossible := int(np.isneginf(reached).sum()):
        sentence = f"{impossible} of {len(reached)} data have observations whose predicted probability is zero"
        yield Verdict(", ".join(names), SCORE, "describes", mean, np.nan, np.nan, sentence, primary=False)
        return
    se = float(reached.std() / np.sqrt(len(reached)))
    sentence = f"mean log p of the observations given the covariates: {number(mean, se)} nats per datum"
    if len(names) == predicted.attrs["observed_sites"]:
        counted = np.zeros(len(reached))
        for name in names:
            places = predicted[f"{name}_observed"].values
            counted += np.log(np.bincount(places)[places] / len(places))
        gain, error = float((reached - counted).mean()), float((reached - counted).std() / np.sqrt(len(reached)))
        than = "better" if gain > 0 else "worse"
        sentence += f", {number(abs(gain), error)} {than} than the frequencies of the labels alone"
    yield Verdict(", ".join(names) or "observations", SCORE, "describes", mean, se, np.nan, sentence, primary=False)


def _on_the_guide(predicted: xr.Dataset) -> Iterator[Verdict]:
    """That the draws of the guide are not judged, where there are any."""
    if latents := json.loads(predicted.attrs["latents"]):
        sentence = (
            f"the guide is the model's own prior of {', '.join(f'`{name}`' for name in latents)}, which was not judged "
            "as a posterior: inference.importance and inference.reference give the posterior given the observations"
        )
        yield Verdict("all latents", PRIOR, "describes", np.nan, np.nan, np.nan, sentence, primary=False)
