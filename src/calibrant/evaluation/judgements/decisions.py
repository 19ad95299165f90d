"""From statistics with errors to verdicts: pass, fail or cannot tell, with error rates for all verdicts together.

A question (is the sd of `scale` right?) is answered by one or more statistics: an average over data, a root mean
square, each latent by itself. Each has an effect, a margin that the effect may reach, and a standard error.

- `fail`: some effect lies outside its margin. Every statistic gives a p-value of the hypothesis that it lies inside;
  those of a question are combined by Bonferroni, and the questions of a check by Holm's procedure, so that all of them
  together raise a false alarm in at most 5% of checks, even for a guide exactly at the margins. An exact guide is far
  inside them.
- `pass`: every effect lies inside its margin, with its interval, which misses the effect in 1 of 1,000 cases. A guide
  with any effect outside its margin passes only if the interval of that effect misses it, and so in at most one check
  of 1,000, however many questions are asked: the intervals need no correction for their number.
- `cannot tell`: neither; more data or draws can decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri

from calibrant.shown import badge, card, prose

Status = Literal["pass", "fail", "cannot tell", "describes"]
Direction = Literal["too narrow", "too wide", "off", ""]

FALSE_ALARM = 0.05
FALSE_PASS = 1e-3


@dataclass(frozen=True)
class Verdict:
    """The verdict on one quantity of one site.

    Attributes:
        site: latent site; `all latents` for joint quantities.
        quantity: "sd", "mean", "coverage" or "shape" of a site; "correlation", "direction", "single data", "evidence
            gap", "k-hat", "log joint", "log likelihood" or "averaged error" of all latents; "ranks" of a site on
            simulated data; "misread output" of a site. The quantities of the contrast experiment and of predicted
            probabilities have their own names.
        status: "pass" if the error lies inside the margin, "fail" if it lies outside, else "cannot tell", with the
            error rates of `evaluation.judgements.decisions`; "describes" for a quantity without a margin.
        effect: the error that decided: sd ratio − 1, mean error in reference sd, coverage − level, or the
            root mean square of one of these; for other quantities, the number in `sentence`. NaN without data.
        se: standard error of `effect`.
        margin: the largest error that passes.
        sentence: the verdict in words; "±" is one standard error.
        primary: whether the verdict decides the conclusion of a check, or only describes.
        direction: direction of an error in an sd: "too narrow" or "too wide" on average over the data, or "off" for a
            root mean square, whose sign may differ from datum to datum; "" for other quantities.
        entry: the latent whose own error decided, such as `z[3]`; "" if the error of the whole site decided.
        datum: the data whose own error decided, for "single data"; else "".
        quantiles: whether quantiles decided in place of mean and sd, because tails are heavy.
    """

    site: str
    quantity: str
    status: Status
    effect: float
    se: float
    margin: float
    sentence: str
    primary: bool = True
    direction: Direction = ""
    entry: str = ""
    datum: str = ""
    quantiles: bool = False

    def __repr__(self) -> str:
        return f"Verdict({self.answer}: {self.sentence})"

    def _repr_html_(self) -> str:
        return card(f"{badge(self.answer)} {prose(self.sentence)}")

    @property
    def answer(self) -> Status:
        """The status to show: that of a verdict that decides, else "describes"."""
        return self.status if self.primary else "describes"


@dataclass(frozen=True)
class Statistic:
    """One effect with its standard error and its interval, in the units of its margin.

    Attributes:
        label: site or latent, as the sentence names it.
        note: remark that the sentence adds.
        kind: "sd" or "mean", for a statistic of either in a question about both; else "".
        tails: remark on heavy tails, where quantiles decide in place of mean and sd; else "".
        effect, se, low, high: the estimate, its standard error, and the interval at the level of a pass.
        p_inside: p-value of the hypothesis that the effect lies inside the margin; NaN without data.
        margin: the largest effect that passes.
        signed: whether the effect has a direction.
        entry: the latent, if the statistic is about one of many; else "".
        datum: the data, if the statistic is about single data; else "".
    """

    label: str
    note: str
    effect: float
    se: float
    low: float
    high: float
    p_inside: float
    margin: float
    signed: bool = True
    entry: str = ""
    datum: str = ""
    kind: str = ""
    tails: str = ""

    @property
    def is_inside(self) -> bool:
        """Whether the interval lies inside the margin; an interval of NaN (no data) does not."""
        return bool(-self.margin < self.low and self.high < self.margin)

    @property
    def reach(self) -> float:
        """The largest error in the interval; infinite without data."""
        reach = max(abs(self.low), abs(self.high))
        return reach if np.isfinite(reach) else np.inf


@dataclass(frozen=True)
class Question:
    """A question about one quantity of one site, and the statistics that answer it, the most informative first.

    Attributes:
        site, quantity: site and quantity of the verdict.
        statistics: one or more statistics.
        level: nominal coverage, if the question is about coverage.
    """

    site: str
    quantity: str
    statistics: Sequence[Statistic]
    level: float = np.nan

    @property
    def p_value(self) -> float:
        """p-value of the hypothesis that all effects lie inside their margins."""
        known = [s.p_inside for s in self.statistics if not np.isnan(s.p_inside)]
        return min(1.0, len(self.statistics) * min(known, default=1.0))


def decide(questions: Sequence[Question]) -> list[tuple[Status, Statistic]]:
    """The status of every question, with the statistic that decided it."""
    failed = holm([question.p_value for question in questions])
    return [
        ("fail", _telling(question, len(questions))) if outside else _not_outside(question)
        for question, outside in zip(questions, failed, strict=True)
    ]


def _telling(question: Question, questions: int) -> Statistic:
    """The first statistic that is outside its margin by itself; else the one with the smallest p-value."""
    clear = FALSE_ALARM / (questions * len(question.statistics))
    alone = [statistic for statistic in question.statistics if statistic.p_inside <= clear]
    return alone[0] if alone else min(question.statistics, key=lambda s: np.nan_to_num(s.p_inside, nan=np.inf))


def _not_outside(question: Question) -> tuple[Status, Statistic]:
    widest = max(question.statistics, key=lambda s: s.reach / s.margin)
    passes = all(statistic.is_inside for statistic in question.statistics)
    return ("pass" if passes else "cannot tell"), widest


def holm(p_values: Sequence[float], level: float = FALSE_ALARM) -> list[bool]:
    """Which hypotheses Holm's step-down procedure rejects, with a family-wise error rate of `level` (Holm 1979)."""
    rejected = [False] * len(p_values)
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[place] > level / (len(p_values) - rank):
            break
        rejected[int(place)] = True
    return rejected


WIDTH = float(-ndtri(FALSE_PASS / 2))  # half width of the intervals, in standard errors


def normal_statistic(label: str, note: str, effect: float, se: float, margin: float) -> Statistic:
    """A statistic with a direction and a Normal error."""
    scale = max(se, 1e-300)
    p_value = float(ndtr(-(abs(effect) - margin) / scale) + ndtr(-(abs(effect) + margin) / scale))
    return Statistic(label, note, effect, se, effect - WIDTH * se, effect + WIDTH * se, p_value, margin)
