"""The conclusion from the verdicts, for a reader who knows no statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xarray as xr

from calibrant.evaluation.judgements.decisions import Status, Verdict
from calibrant.evaluation.judgements.without_reference import LEAST_DATA


@dataclass(frozen=True)
class Conclusion:
    """The answer of a check.

    Attributes:
        status: "pass" if all verdicts that decide pass, "fail" if any of them fails, else "cannot tell".
        sentences: the answer, then its reasons, then what to do.
    """

    status: Status
    sentences: list[str]

    def __str__(self) -> str:
        return " ".join(self.sentences)


def conclude(verdicts: Sequence[Verdict], comparison: xr.Dataset | None = None) -> Conclusion:
    """Draw the conclusion from the primary verdicts of a check.

    Without a comparison, or if the comparison leaves out discrete latents, nothing passes, because the verdicts do not
    see every error.

    Args:
        verdicts: the verdicts, as `evaluation.verdicts` returns them.
        comparison: the comparison that was judged; if it holds the result of `c2st`, the conclusion says for how many
            data the guide is visibly wrong.
    """
    deciding = [verdict for verdict in verdicts if verdict.primary]
    failed = [verdict for verdict in deciding if verdict.status == "fail"]
    open_ = [verdict for verdict in deciding if verdict.status == "cannot tell"]
    if failed:
        return Conclusion("fail", [*_wrong(failed), *_where(comparison)])
    if open_ or not deciding:
        return Conclusion("cannot tell", _unknown(open_, deciding, comparison))
    if unseen := _unseen(comparison):
        return Conclusion("cannot tell", [f"Nothing speaks against the guide, but {unseen}."])
    assert comparison is not None
    return Conclusion("pass", [*_right(comparison), *_not_asked(deciding), *_single(comparison)])


def _unseen(comparison: xr.Dataset | None) -> str:
    """The errors that no verdict can see; empty if there are none."""
    if comparison is None:
        return "without a reference, errors that its own draws don't show stay unseen"
    if discrete := comparison.attrs.get("discrete", ""):
        return f"{discrete}, whose values are whole numbers, could not be compared"
    return ""


def _right(comparison: xr.Dataset) -> list[str]:
    return [
        f"You can believe the guide's uncertainty about the {comparison.sizes['data']} data that were checked: on "
        "average over them, its best guesses, how sure it is of them, and its intervals agree with the reference "
        "posterior."
    ]


def _not_asked(deciding: Sequence[Verdict]) -> list[str]:
    asked = {verdict.quantity for verdict in deciding}
    parts = {"k-hat": "its importance weights", "log joint": "data that the model makes itself"}
    absent = [words for quantity, words in parts.items() if quantity not in asked]
    return [f"Not checked: {' and '.join(absent)} (the notes say why)."] if absent else []


def _single(comparison: xr.Dataset) -> list[str]:
    """Say that the guide may be wrong for single data although it is right on average."""
    flagged, count = _flagged(comparison)
    if not flagged:
        return []
    return [
        f"For {_count(flagged, count)} of the {count} data a classifier can still tell it from the reference: by "
        "errors that are small, or in these data alone."
    ]


def _wrong(failed: Sequence[Verdict]) -> list[str]:
    """Say what is wrong with each site, in its plainest statement."""
    lines: dict[str, list[str]] = {}
    for verdict in failed:
        lines.setdefault(verdict.site, []).append(_fault(verdict))
    # Coverage follows from mean and sd: it is mentioned only if nothing else is wrong.
    told = [fault for faults in lines.values() for fault in ([f for f in faults if f != _COVERAGE] or faults[:1])]
    faults: list[str] = []
    for site, found in lines.items():
        kept = dict.fromkeys(fault for fault in found if fault in told)
        faults += kept if site == "all latents" else [f"about `{site}`: {' and '.join(kept)}"]
    return [f"You can't believe the guide's uncertainty as it is. {'. '.join(_capital(fault) for fault in faults)}."]


_COVERAGE = "its intervals hold the truth less or more often than they say"


def _fault(verdict: Verdict) -> str:
    if verdict.quantity == "sd":
        by = f"by {abs(verdict.effect):.0%}{_entry(verdict)}"
        return {
            "too narrow": f"it is too sure of itself {by}",
            "too wide": f"it is less sure than it could be {by}",
        }.get(_direction(verdict), f"how sure it is of single data is wrong {by}")
    if verdict.quantity == "mean":
        return f"its best guesses are off{_entry(verdict)}"
    return {
        "coverage": _COVERAGE,
        "correlation": "it does not see how the latents depend on each other",
        "k-hat": "for many data it is so far from the posterior that weighing its draws can't mend it",
        "log joint": "on data that the model makes itself, its draws don't lie where the truth does",
    }[verdict.quantity]


def _direction(verdict: Verdict) -> str:
    """The direction of an error of the sd; by its sign where the verdict does not say it."""
    return verdict.direction or ("too narrow" if verdict.effect < 0 else "too wide")


def _entry(verdict: Verdict) -> str:
    """A phrase for verdicts that one entry of many has decided."""
    return " in one or more of its entries" if verdict.entry else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _where(comparison: xr.Dataset | None) -> list[str]:
    """Say for how many data the guide's draws can be told from the reference's."""
    flagged, count = _flagged(comparison)
    if comparison is None or not flagged:
        return []
    rate = comparison.attrs["c2st_fdr"]
    return [
        f"It is visibly wrong for {_count(flagged, count)} of the {count} data (of those named, at most {rate:.0%} "
        "wrongly, on average)."
    ]


def _flagged(comparison: xr.Dataset | None) -> tuple[int, int]:
    """The number of data that the classifier test flags, and the number of data that it tested."""
    if comparison is None or "c2st_flagged" not in comparison:
        return 0, 0
    known = comparison["c2st_p"].notnull()
    return int((comparison["c2st_flagged"].astype(bool) & known).sum()), int(known.sum())


def _count(flagged: int, count: int) -> str:
    return "all" if flagged == count else str(flagged)


def _unknown(open_: Sequence[Verdict], deciding: Sequence[Verdict], comparison: xr.Dataset | None) -> list[str]:
    if not deciding:
        return ["Nothing could be checked: there is neither a reference nor a diagnosis of the guide's own draws."]
    asked = [v.quantity if v.site == "all latents" else f"{v.quantity} of `{v.site}`" for v in open_]
    shown = ", ".join(asked[:3]) + (f" and {len(asked) - 3} more" if len(asked) > 3 else "")
    known = len(deciding) - len(open_)
    passed = f" {known} of {len(deciding)} questions are answered well." if known else ""
    if comparison is not None and comparison.attrs["cannot_tell"]:
        left_out = comparison.attrs["share_left_out"]
        return [
            f"Not known yet: nothing is plainly wrong, but {left_out:.0%} of the data have no reference posterior, and "
            f"might be those where the guide errs.{passed} Sample the reference with more warmup and draws."
        ]
    weighed = any(verdict.quantity == "k-hat" for verdict in deciding)
    few = weighed and comparison is not None and comparison.sizes["data"] < LEAST_DATA
    least = f" ({LEAST_DATA} at least)" if few else ""
    return [
        f"Not known yet: nothing is plainly wrong, but these data and draws can't settle {shown}.{passed} Check more "
        f"data{least}, with more draws and simulations."
    ]
