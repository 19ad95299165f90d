"""From statistics with errors to verdicts: pass, fail or cannot tell, at error rates for all of them together.

A question (is the sd of `scale` right?) is asked of one or more statistics: an average over data, a root mean square,
each latent by itself. Each has an effect, a margin that it may reach, and a standard error.

- `fail`: some effect lies outside its margin. Every statistic gives a p-value of the hypothesis that it lies inside;
  those of a question are combined by Bonferroni, and the questions of a check by Holm's procedure, so that all of them
  together raise a false alarm in at most 5% of checks, even for a guide exactly at the margins. An exact guide is far
  inside.
- `pass`: every effect lies inside its margin. The simultaneous intervals of all statistics of a comparison have to, and
  those of k-hat and of the log joint; so a guide with any effect outside its margin passes all of them, and with that
  the check, in at most one check of 1,000.
- `cannot tell`: neither; more data or draws can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import ndtr, ndtri

Status = Literal["pass", "fail", "cannot tell"]
Direction = Literal["too narrow", "too wide", "off", ""]

FALSE_ALARM = 0.05
FALSE_PASS = 1e-3


@dataclass(frozen=True)
class Verdict:
    """What a check says about one quantity of one site.

    Attributes:
        site: latent site; `all latents` for what is of all together.
        quantity: "sd", "mean", "coverage", "correlation", "k-hat", "log joint" or "evidence gap"; those of the contrast
            experiment have names of their own.
        status: "pass" if the error lies inside the margin, "fail" if outside, else "cannot tell", at the error rates of
            `evaluation.judgements.decisions`.
        effect: the error that decided: sd ratio − 1, mean error in reference sd, coverage − level, or the
            root-mean-square of one of these; for the other quantities, the number in the sentence. NaN without data.
        se: its standard error.
        margin: the largest error that passes.
        sentence: the verdict in words; "±" is one standard error.
        primary: whether it decides the conclusion of a check; the others describe.
        direction: of the error in an sd: "too narrow" or "too wide" on average over the data, or "off", where it is a
            root mean square and may differ in sign from datum to datum; "" for other quantities.
        entry: the latent whose own error decided, as `z[3]`; "" where it was that of the whole site.
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


@dataclass(frozen=True)
class Statistic:
    """One effect with its standard error and its simultaneous interval, in the units of its margin.

    Attributes:
        label: the site or latent that the sentence names.
        note: what the sentence adds.
        effect, se, low, high: the estimate, its standard error, and the interval at the level of a pass.
        p_inside: p-value of the hypothesis that the effect lies inside the margin; NaN without data.
        margin: the largest effect that passes.
        signed: whether the effect has a direction.
        entry: the latent, where the statistic is that of one of many; else "".
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

    @property
    def is_inside(self) -> bool:
        """Whether the interval lies inside the margin; one with NaN (no data) does not."""
        return bool(-self.margin < self.low and self.high < self.margin)

    @property
    def reach(self) -> float:
        """The largest error in the interval, infinite where nothing is known."""
        reach = max(abs(self.low), abs(self.high))
        return reach if np.isfinite(reach) else np.inf


@dataclass(frozen=True)
class Question:
    """What is asked of one quantity of one site, and the statistics that answer it, the most telling first.

    Attributes:
        site, quantity: of the verdict.
        statistics: at least one.
        level: of the coverage, where it is about that.
    """

    site: str
    quantity: str
    statistics: Sequence[Statistic]
    level: float = np.nan

    @property
    def p_value(self) -> float:
        """Of the hypothesis that all effects lie inside their margins."""
        known = [s.p_inside for s in self.statistics if not np.isnan(s.p_inside)]
        return min(1.0, len(self.statistics) * min(known, default=1.0))


def decide(questions: Sequence[Question]) -> list[tuple[Status, Statistic]]:
    """Status of every question, with the statistic that decided it."""
    failed = holm([question.p_value for question in questions])
    return [
        ("fail", _telling(question, len(questions))) if outside else _not_outside(question)
        for question, outside in zip(questions, failed, strict=True)
    ]


def _telling(question: Question, questions: int) -> Statistic:
    """The first statistic that is outside by itself, whatever the others; else the one with the smallest p-value."""
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


def limit(statistics: int) -> float:
    """How many standard errors wide simultaneous intervals of so many statistics are on each side."""
    return float(-ndtri(FALSE_PASS / (2 * max(statistics, 1))))


def normal_statistic(label: str, note: str, effect: float, se: float, margin: float, width: float) -> Statistic:
    """A statistic with a direction and a Normal error; `width` is the `limit` of all that are asked about."""
    scale = max(se, 1e-300)
    p_value = float(ndtr(-(abs(effect) - margin) / scale) + ndtr(-(abs(effect) + margin) / scale))
    return Statistic(label, note, effect, se, effect - width * se, effect + width * se, p_value, margin)
