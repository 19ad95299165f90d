"""The verdicts on a guide: all questions as one family, and what data without a reference change.

How statistics become verdicts is in `decisions.py`, how errors are pooled over data in `pooled.py`, the questions in
the files `on_….py` and in `without_reference.py`, and the words in `sentences.py`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import xarray as xr

from calibrant.evaluation.judgements import on_dependence, on_evidence, on_marginals, on_single_data, without_reference
from calibrant.evaluation.judgements.decisions import Direction, Question, Statistic, Status, Verdict, decide
from calibrant.evaluation.judgements.on_averaging import averaged_error
from calibrant.evaluation.judgements.on_misreading import misread_output
from calibrant.evaluation.judgements.pooled import Limits
from calibrant.evaluation.judgements.sentences import compared_sentence, natural

COMPARED = ("sd", "mean", "coverage", "shape", "correlation", "direction", "single data")  # these need the reference


def verdicts(
    result: xr.Dataset | None, weights: xr.Dataset | None = None, calibration: xr.DataTree | None = None
) -> list[Verdict]:
    """Judge a guide site by site, and as a whole.

    Margins. For every site: sd within 10% (a factor of 1.1 either way), mean within 0.1 reference sd, coverage within 3
    points, the distribution function within 0.04. For all local latents: correlations within 0.1 (of a latent with all
    others in root mean square, and of the worst pair); sd within a factor of 1.25 and mean within 0.25 sd along
    directions that the data share or that the likelihood informs; for the worst datum, sd within a factor of 1.5 and
    mean within 0.5 sd, for the worst 5% of the data 1.2 and 0.2. The evidence gap, where log p(x) is known: 0.1 nats
    and 0.002 more per latent. k-hat good for 90% of the data. On simulated data, log joint and log likelihood within
    0.15 √(d / 2) sd and 15% of where the guide has them, with d the number of latents, or of dimensions that the
    likelihood informs, two at least. Where tails are too heavy for sds, the median and the widths of the middle 50% and
    80% decide instead of mean and sd.

    If more than 5% of the data have no reference, the ranks of every local latent on simulated data are asked as well
    (within 0.15 sd and 15%); without them, no verdict on the comparison is "pass". A "fail" counts data without a
    reference as right.

    Args:
        result: the result of `compare`; None without a reference.
        weights: the result of `weights`, to judge the guide's importance weights as well; None to omit them.
        calibration: the result of `calibration`, to judge ranks on simulated data as well; None to omit it.

    Returns:
        For each latent site "sd", "mean", "coverage" and "shape", shared sites last; "correlation", "direction" and
        "single data"; "evidence gap"; "k-hat", "log joint" and "log likelihood", as far as they are known. If one of
        them fails, "averaged error" or, for an sd, "misread output" name these mistakes, if the guide bears their mark,
        and only describe. All verdicts that decide form one family: the error rates of `judgements.decisions` hold for
        all of them together.
    """
    compared = _compared(result) if result is not None else []
    sites = _undecided_sites(result, calibration)
    dimensions = result.attrs.get("informed_dimensions") if result is not None else None
    questions = [*compared, *without_reference.questions(weights, calibration, dimensions, sites)]
    found = [_verdict(q, *decided) for q, decided in zip(questions, decide(questions), strict=True)]
    if result is not None and result.attrs["cannot_tell"] and not sites:
        share = f"{result.attrs['share_left_out']:.0%} of the data have no reference posterior"
        found = [_withdrawn(v, share) if v.status == "pass" and v.quantity in COMPARED else v for v in found]
    failed = {verdict.quantity for verdict in found if verdict.status == "fail"}
    mistakes = [averaged_error(weights) if failed else None, misread_output(result) if "sd" in failed else None]
    known = any(question.quantity == "evidence gap" for question in questions)
    described = [] if known else without_reference.descriptions(weights)
    return [*found, *described, *(mistake for mistake in mistakes if mistake is not None)]


def _compared(result: xr.Dataset) -> list[Question]:
    """The questions that a comparison answers."""
    limits = Limits(1.0 - float(result.attrs["share_left_out"]))
    parts = (on_marginals, on_dependence, on_single_data, on_evidence)
    return [question for part in parts for question in part.questions(result, limits)]


def _undecided_sites(result: xr.Dataset | None, calibration: xr.DataTree | None) -> list[str]:
    """Local sites that simulated data have to decide, because too many data have no reference."""
    if result is None or calibration is None or not result.attrs["cannot_tell"]:
        return []
    ranked, sites = calibration["prior_sbc"].dataset, list(dict.fromkeys(result["site"].values.tolist()))
    return sites if all(site in ranked for site in sites) else []


def _verdict(question: Question, status: Status, decisive: Statistic) -> Verdict:
    """The verdict on a question, with its sentence."""
    if question.quantity not in (*COMPARED, "evidence gap"):
        return without_reference.verdict(question, status, decisive)
    effect, se = natural(question.quantity, decisive)
    return Verdict(
        question.site,
        question.quantity,
        status,
        effect,
        se,
        float(np.expm1(decisive.margin)) if question.quantity == "sd" else decisive.margin,
        compared_sentence(question, status, decisive),
        direction=_direction(decisive) if question.quantity == "sd" else "",
        entry=decisive.entry,
        datum=decisive.datum,
        quantiles=bool(decisive.tails),
    )


def _direction(of_sd: Statistic) -> Direction:
    if np.isnan(of_sd.effect):
        return ""
    if not of_sd.signed:
        return "off"
    return "too narrow" if of_sd.effect < 0 else "too wide"


def _withdrawn(verdict: Verdict, share: str) -> Verdict:
    return replace(verdict, status="cannot tell", sentence=f"{verdict.sentence} where both are known, but {share}")
