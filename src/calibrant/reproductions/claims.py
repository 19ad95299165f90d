"""Claims of a paper, judged over seeds: what the exact posterior says, and what the guide says."""

from __future__ import annotations

import math
from typing import Any

from calibrant.reproductions.cards import SOURCES, Claim
from calibrant.reproductions.found import Estimate, Found

REFUSED = "refused"  # the number that tells the share of images whose references were refused
_MOST = 0.1  # the largest share of refused references with which the exact posterior can answer
HOLDS, NOT, UNKNOWN = "holds", "does not hold", "cannot tell"


def claims_of(found: Found) -> list[dict[str, Any]]:
    """The claims of an experiment whose rows are in this run, with the answer of each source.

    Returns:
        One dict a claim: `experiment`, `domain`, the attributes of `Claim`, `unit`, and for each source a dict `answer`
        ("holds", "does not hold", "cannot tell", or "" where the card has no such number), `value`, `se`, `seeds`
        (seed → value) and `because`, which says why there is no answer, or on what its error rests.
    """
    return [_judged(found, claim) for claim in found.card.claims if set(claim.rows) <= set(found.rows)]


def _judged(found: Found, claim: Claim) -> dict[str, Any]:
    numbers = found.card.numbers
    names = {source: f"{claim.number}, {source}" for source in SOURCES}
    return {
        "experiment": found.card.name,
        "domain": found.card.domain,
        "says": claim.says + (" (our question)" if claim.by == "ours" else ""),
        "row": claim.row,
        "minus": claim.minus,
        "number": claim.number,
        "unit": next(numbers[name] for name in names.values() if name in numbers),
        "expects": claim.expects,
        "limit": claim.limit,
        **{source: _answer_of(found, claim, source) for source in SOURCES},
    }


def _answer_of(found: Found, claim: Claim, source: str) -> dict[str, Any]:
    name = f"{claim.number}, {source}"
    if name not in found.card.numbers:
        return _told("", Estimate(math.nan, math.nan, "", 0), {}, "")
    estimate = found.difference(claim.row, claim.minus, name) if claim.minus else found.mean(claim.row, name)
    each = {str(seed): found.one(claim.row, name, seed) for seed in found.seeds}
    if claim.minus:
        each = {seed: value - found.one(claim.minus, name, int(seed)) for seed, value in each.items()}
    because = _refused(found, claim) if source == "exact" else ""
    if not because and math.isnan(estimate.value):
        because = _failed(found, claim) or (
            "no reference was computed" if source == "exact" else "no number was computed"
        )
    if not because and math.isnan(estimate.se):
        because = "one seed has no error"
    return _told(UNKNOWN if because else answer(claim, estimate), estimate, each, because)


def _told(answer: str, estimate: Estimate, each: dict[str, float], because: str) -> dict[str, Any]:
    if answer in (HOLDS, NOT) and estimate.of == "test data" and estimate.se > 0:
        because = "one seed: the error is that of its test data"
    return {"answer": answer, "value": estimate.value, "se": estimate.se, "seeds": each, "because": because}


def answer(claim: Claim, estimate: Estimate) -> str:
    """Whether a value lies on the side of the limit that a claim states, beyond chance.

    "holds" and "does not hold" are each wrong in one run of 20 at most: one-sided Student's t limits, and two one-sided
    tests for "within" (Schuirmann 1987), which fails where a limit is exceeded at half the level.
    """
    low, high = estimate.value - estimate.limit(), estimate.value + estimate.limit()
    if claim.expects == "above":
        return HOLDS if low > claim.limit else NOT if high < claim.limit else UNKNOWN
    if claim.expects == "below":
        return HOLDS if high < claim.limit else NOT if low > claim.limit else UNKNOWN
    if -claim.limit < low and high < claim.limit:
        return HOLDS
    return NOT if abs(estimate.value) - estimate.limit(2) > claim.limit else UNKNOWN


def _refused(found: Found, claim: Claim) -> str:
    """Why the exact posterior cannot answer: the references of too many images were refused; empty if it can."""
    shares = [
        share
        for row in claim.rows
        for number in (f"{claim.number}, {REFUSED}", REFUSED)
        if not math.isnan(share := found.mean(row, number).value)
    ]
    worst = max(shares, default=0.0)
    return f"the reference was refused for {worst:.0%} of the images" if round(worst, 6) > _MOST else ""


def _failed(found: Found, claim: Claim) -> str:
    """Which of a claim's cells failed; empty if none did."""
    failed = [f"{row}, seed {seed}" for (row, seed), cell in found.cells.items() if row in claim.rows and cell.failed]
    return f"{'; '.join(failed)} failed" if failed else ""
