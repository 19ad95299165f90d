"""The conclusion from the verdicts, for a reader who knows no statistics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import xarray as xr

from calibrant.evaluation.judgements.decisions import Status, Verdict
from calibrant.evaluation.judgements.on_averaging import AVERAGED
from calibrant.evaluation.judgements.on_misreading import MISREAD
from calibrant.evaluation.judgements.on_probabilities import FULL_DATA as PREDICTED_DATA
from calibrant.evaluation.judgements.on_probabilities import PRIOR, SCORE
from calibrant.evaluation.judgements.without_reference import LEAST_DATA
from calibrant.evaluation.judgements.wording import counted
from calibrant.shown import badge, card, following, paragraph

# A budget with which an exact guide passes (benchmarks/power.py).
FULL_DATA, FULL_DRAWS, FULL_SIMULATIONS, FULL_ESS = 128, 1000, 2000, 1000
SHARED_DRAWS, SHARED_ESS = 20_000, 8000
SINGLE_DRAWS = 4000  # with a quarter of them, a datum whose posterior has a light second mode often stays undecided


@dataclass(frozen=True)
class Conclusion:
    """The answer of a check.

    Attributes:
        status: "pass" if all verdicts that decide pass, "fail" if any of them fails, else "cannot tell".
        sentences: the answer, then its reasons, then what to do.
        remedy: the next thing to do, in a sentence that introduces `next_line`; "" where only verdicts are known.
        next_line: a line that does it, to be pasted into a shell (it starts with "calibrant") or into Python, after
            `import calibrant as cal`, with the names `model`, `guide`, `data` (that are checked) and `train`.
    """

    status: Status
    sentences: list[str]
    remedy: str = ""
    next_line: str = ""

    def __str__(self) -> str:
        return " ".join(self.sentences)

    def __repr__(self) -> str:
        return f"Conclusion({self.status}: {self.sentences[0]})"

    def _repr_html_(self) -> str:
        return card(badge(self.status), *map(paragraph, self.sentences), following(self.remedy, self.next_line))


def conclude(verdicts: Sequence[Verdict], comparison: xr.Dataset | None = None) -> Conclusion:
    """Draw the conclusion from the primary verdicts of a check.

    Verdicts on predicted probabilities (`probability_verdicts`) are concluded on by themselves. Of all others, nothing
    passes without a comparison, or if the comparison leaves out discrete latents, because the verdicts do not see every
    error.

    Args:
        verdicts: the verdicts, as `evaluation.verdicts` returns them.
        comparison: the comparison that was judged; if it holds the result of `c2st`, the conclusion says for how many
            data the guide is clearly wrong.
    """
    if any(verdict.quantity == SCORE for verdict in verdicts):
        return _on_predictions(verdicts)
    deciding = [verdict for verdict in verdicts if verdict.primary]
    failed = [verdict for verdict in deciding if verdict.status == "fail"]
    open_ = [verdict for verdict in deciding if verdict.status == "cannot tell"]
    if failed:
        return Conclusion("fail", [*_wrong(failed), *_mistake(verdicts), *_where(comparison)])
    if open_ or not deciding:
        return Conclusion("cannot tell", _unknown(open_, deciding, comparison))
    if unseen := _unseen(deciding, comparison):
        return Conclusion("cannot tell", [f"No question fails, but {unseen}."])
    assert comparison is not None
    return Conclusion("pass", [*_right(comparison), *_not_asked(deciding, comparison), *_single(comparison)])


def _on_predictions(verdicts: Sequence[Verdict]) -> Conclusion:
    """The conclusion from verdicts on predicted probabilities, which says that no posterior was judged."""
    deciding = [verdict for verdict in verdicts if verdict.primary]
    failed = [verdict for verdict in deciding if verdict.status == "fail"]
    open_ = [verdict for verdict in deciding if verdict.status == "cannot tell"]
    sites = ", ".join(dict.fromkeys(f"`{verdict.site}`" for verdict in deciding))
    if failed:
        said = ". ".join(_capital(verdict.sentence) for verdict in failed)
        answer = Conclusion("fail", [f"Do not trust the predicted probabilities of {sites} as they are. {said}."])
    elif open_:
        asked = ", ".join(f"{verdict.quantity} of `{verdict.site}`" for verdict in open_)
        advice = f"Use at least {PREDICTED_DATA:,} data. If you did, some error is close to its margin."
        answer = Conclusion(
            "cannot tell", [f"Cannot tell yet: no question fails, but {asked} cannot be decided. {advice}"]
        )
    elif deciding:
        right = "they reach the log probability that they claim, and values occur as often as predicted"
        answer = Conclusion("pass", [f"You can trust the predicted probabilities of {sites}: {right}."])
    else:
        answer = Conclusion(
            "cannot tell", ["Nothing was judged: no observed site has finitely many values, neither masked nor scaled."]
        )
    described = [f"{_capital(verdict.sentence)}." for verdict in verdicts if verdict.quantity in (SCORE, PRIOR)]
    return Conclusion(answer.status, [*answer.sentences, *described])


def _unseen(deciding: Sequence[Verdict], comparison: xr.Dataset | None) -> str:
    """The errors that no verdict can see; empty if there are none."""
    if comparison is None:
        return "without a reference posterior, errors that the guide's own draws do not show remain unseen"
    if discrete := comparison.attrs.get("discrete", ""):
        return (
            f"{discrete}, whose values are whole numbers, could not be compared by means and sds: compare the "
            "probabilities of the values yourself"
        )
    if comparison.sizes.get("latent", 0) and "half_mean_error" not in comparison:
        return "this comparison was stored by an earlier version, which asked less: compare again"
    if not any(verdict.quantity in _OF_SHAPE for verdict in deciding):
        return "no question about the shape of its distributions was asked"
    return ""


_OF_SHAPE = ("shape", "log joint")


def _right(comparison: xr.Dataset) -> list[str]:
    count, left_out = comparison.sizes["data"], int(comparison.attrs["n_left_out"])
    data = "the datum that was checked" if count == 1 else f"the {count:,} data that were checked"
    several = comparison.sizes.get("latent", 0) and count > 1
    over = ", on average over the data and for the worst of them" if several else ""
    found = [
        f"You can trust the guide's uncertainty on {data}: its means, sds, intervals, shapes and dependencies agree "
        f"with the reference posterior{over}."
    ]
    if left_out:
        have = "has" if left_out == 1 else "have"
        found.append(f"Nothing was compared for {left_out} more, which {have} no reference.")
    if comparison.attrs["cannot_tell"]:
        found.append("Simulated data, which need no reference, show no error in any latent.")
    expected = float(comparison.attrs.get("expected_wrong", 0.0))
    if expected >= 0.01:
        found.append(f"The reference itself may have missed a mode of some data (of {expected:.2g}, in expectation).")
    return found


def _not_asked(deciding: Sequence[Verdict], comparison: xr.Dataset) -> list[str]:
    """Name what was not asked, so that nobody takes it for checked."""
    asked = {verdict.quantity for verdict in deciding}
    parts = {
        "direction": "sums of latents",
        "k-hat": "importance weights",
        "log joint": "simulated data",
        "log likelihood": "the log likelihood on simulated data",
    }
    if comparison.sizes.get("latent", 0) < 2:
        del parts["direction"]
    absent = [words for quantity, words in parts.items() if quantity not in asked]
    return [f"Not checked: {' and '.join(absent)}."] if absent else []


def _single(comparison: xr.Dataset) -> list[str]:
    """Say that a classifier sees errors that are smaller than the margins."""
    flagged, count = _flagged(comparison)
    if not flagged:
        return []
    return [
        f"For {_some(flagged, count)} a classifier can still tell the guide from the reference: by errors smaller than "
        "the margins, or of a kind that was not asked about."
    ]


def _wrong(failed: Sequence[Verdict]) -> list[str]:
    """Say what is wrong with each site, in its plainest statement; name all else that fails, or say it if it is all."""
    lines: dict[str, list[str]] = {}
    for verdict in failed:
        lines.setdefault(verdict.site, []).append(_fault(verdict))
    joint = [verdict for verdict in failed if verdict.site == "all latents"]
    # Coverage and shape follow from mean and sd: they are mentioned only if nothing else is wrong.
    sites = {site: [f for f in found if f not in _FOLLOWS] or found[:1] for site, found in lines.items()}
    faults = [f"`{site}`: {' and '.join(dict.fromkeys(f))}" for site, f in sites.items() if site != "all latents"]
    if not faults:
        faults, joint = [_fault(verdict) for verdict in joint[:1]], joint[1:]
    if names := list(dict.fromkeys(_NAMES.get(verdict.quantity, verdict.quantity) for verdict in joint)):
        faults.append(f"also wrong: {_listed(names)}")
    return [f"Do not trust the guide's uncertainty as it is. {'. '.join(_capital(fault) for fault in faults)}."]


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def _mistake(verdicts: Sequence[Verdict]) -> list[str]:
    """The mistake that explains what is wrong, where it is known."""
    return [f"{_capital(verdict.sentence)}." for verdict in verdicts if verdict.quantity in (AVERAGED, MISREAD)]


# What the quantities of all latents together are called.
_NAMES = {
    "correlation": "correlations",
    "direction": "sums of latents",
    "evidence gap": "the ELBO",
    "k-hat": "the importance weights",
    "log joint": "the log joint on simulated data",
    "log likelihood": "the log likelihood on simulated data",
    "ranks": "ranks on simulated data",
}
_COVERAGE = "its intervals contain the truth less or more often than they say"
_SHAPE = "its distribution has the wrong shape"
_FOLLOWS = (_COVERAGE, _SHAPE)
_PLAIN = {
    "coverage": _COVERAGE,
    "shape": _SHAPE,
    "correlation": "it does not see how the latents depend on each other",
    "direction": "it is wrong about sums of latents, although single latents may look right",
    "evidence gap": "its ELBO is too far below the log evidence",
    "k-hat": "for many data it is too far from the posterior for reweighting its draws",
    "log joint": "on simulated data, its draws do not lie where the true latents do",
    "log likelihood": "on simulated data, its draws explain the data worse or better than the true latents do",
    "ranks": "on simulated data, the ranks of the true latents are wrong",
}


def _fault(verdict: Verdict) -> str:
    if verdict.quantity == "sd":
        by = f"by {abs(verdict.effect):.0%}{_entry(verdict)}"
        width = "the width of its posterior" if verdict.quantiles else "its posterior sd"
        return {
            "too narrow": f"{width} is too small {by}",
            "too wide": f"{width} is too large {by}",
        }.get(_direction(verdict), f"{width} is off {by}")
    if verdict.quantity == "mean":
        return f"its posterior {'median' if verdict.quantiles else 'mean'} is off{_entry(verdict)}"
    if verdict.quantity == "single data":
        return f"it is wrong for single data: {verdict.sentence}"
    return _PLAIN[verdict.quantity]


def _direction(verdict: Verdict) -> str:
    """The direction of an error of the sd; by its sign where the verdict does not say it."""
    return verdict.direction or ("too narrow" if verdict.effect < 0 else "too wide")


def _entry(verdict: Verdict) -> str:
    """A phrase for verdicts that one entry of many has decided."""
    return f" for `{verdict.entry}`" if verdict.entry else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _where(comparison: xr.Dataset | None) -> list[str]:
    """Say for how many data the guide's draws can be told from the reference's."""
    flagged, count = _flagged(comparison)
    if comparison is None or not flagged:
        return []
    if flagged == 1:
        rate = f"{comparison.attrs['c2st_fdr']:.0%}"
        return [f"For {_some(flagged, count)} the guide is clearly wrong (at most {rate} of such findings are wrong)."]
    alarms = math.ceil(round(comparison.attrs["c2st_fdr"] * flagged, 6))  # 0.1 × 70 is 7, whatever floats say
    false = "one of these to be a false alarm" if alarms == 1 else f"{alarms} of these to be false alarms"
    return [f"For {_some(flagged, count)} the guide is clearly wrong (expect at most {false})."]


def _flagged(comparison: xr.Dataset | None) -> tuple[int, int]:
    """The number of data that the classifier test flags, and the number of data that it tested."""
    if comparison is None or "c2st_flagged" not in comparison:
        return 0, 0
    known = comparison["c2st_p"].notnull()
    return int((comparison["c2st_flagged"].astype(bool) & known).sum()), int(known.sum())


def _some(flagged: int, count: int) -> str:
    if count == 1:
        return "the datum that was checked"
    return f"all {count} data" if flagged == count else f"{flagged} of {count} data"


def _unknown(open_: Sequence[Verdict], deciding: Sequence[Verdict], comparison: xr.Dataset | None) -> list[str]:
    if not deciding:
        return ["Nothing could be checked: there is neither a reference nor a diagnosis of the guide's own draws."]
    asked = [_NAMES.get(v.quantity, v.quantity) + (f" of `{v.site}`" * (v.site != "all latents")) for v in open_]
    shown = _listed([*asked[:3], *([f"{len(asked) - 3} more"] if len(asked) > 3 else [])])
    known = len(deciding) - len(open_)
    passed = f" {known} of {counted(len(deciding), 'question', 'questions')} pass." if known else ""
    if comparison is not None and comparison.attrs["cannot_tell"] and not _ranked(deciding):
        left_out = comparison.attrs["share_left_out"]
        return [
            f"Cannot tell yet: no question fails, but {left_out:.0%} of the data have no reference posterior, and may "
            f"be those where the guide errs.{passed} Sample the reference with more warmup and draws."
        ]
    return [f"Cannot tell yet: no question fails, but {shown} cannot be decided.{passed} {_advice(open_, comparison)}"]


def _ranked(deciding: Sequence[Verdict]) -> bool:
    return any(verdict.quantity == "ranks" for verdict in deciding)


def _advice(open_: Sequence[Verdict], comparison: xr.Dataset | None) -> str:
    """What decides the open questions."""
    if comparison is None:
        return "Use more data, draws and simulations."
    shared = set(comparison["shared_site"].values.tolist()) if "shared_site" in comparison.coords else set()
    advice = []
    if any(verdict.site in shared for verdict in open_):
        advice.append(
            f"Shared latents are one datum: use about {SHARED_DRAWS:,} draws of the guide and reference draws with an "
            f"ESS of {SHARED_ESS:,}."
        )
    weighed = any(verdict.quantity == "k-hat" for verdict in open_)
    if weighed and comparison.sizes["data"] < LEAST_DATA:
        advice.append(f"Use at least {LEAST_DATA} data: with fewer, all may have good weights by chance.")
    if [verdict.quantity for verdict in open_] == ["single data"]:
        advice.append(f"A single datum is judged by its own draws alone: use {SINGLE_DRAWS:,} guide draws for each.")
    if any(verdict.site not in shared for verdict in open_) and not advice:
        advice.append(
            f"Use at least {FULL_DATA} data, {FULL_DRAWS:,} guide draws and {FULL_SIMULATIONS:,} simulations, and "
            f"reference draws with an ESS of at least {FULL_ESS:,}. If you did, some error is close to its margin."
        )
    return " ".join(advice)
