"""Sentences about remedies: which of them help, and by how much."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from scipy.stats import t as student

from calibrant.evaluation.remedying.measuring import GUIDE, REFINED, RESAMPLED

FALSE_ALARM = 0.01  # probability that any remedy is said to help or harm by chance
LEAST = 0.01  # share of the gap below which a gain is not called a remedy, however small its error
_PHRASES = {
    REFINED: "refining every datum",
    RESAMPLED: "resampling by importance",
    "faithful": "a faithful structure",
    "full": "a full structure",
    "full, flow": "a full structure with flows",
    "collapsed": "a collapsed guide",
}


def remedy_sentences(result: xr.Dataset) -> list[str]:
    """Describe the result of `remedies` in plain language: the remedies that help, the best first, then the rest.

    A remedy helps, or harms, if its gain is at least 1% of the gap and differs significantly from zero. In 99% of all
    checks, no remedy does so by chance (Student's t over the data, Bonferroni over the remedies). "±" is one standard
    error.
    """
    guide, rows = _rows(result)
    tried, measured = _tried(rows), _measured(rows)
    limit, helps = _limit(result, len(measured)), _helping(result)
    harms = [name for name in measured if _differs(measured[name], guide, limit, -1)]
    rest = [name for name in measured if name not in (*helps, *harms)]
    found = [_help(result, guide, name, measured[name]) for name in helps]
    if measured and not helps:
        gap = f"{_nats(guide, 'gap')} nats{_to(result)}"
        others = ", ".join(f"{_phrase(result, name)} {_nats(measured[name], 'gain', '+')} nats" for name in measured)
        found.append(f"no remedy tried helps: the guide leaves a gap of {gap}; {others}")
    elif rest:
        others = ", ".join(f"{_phrase(result, name)} ({_nats(measured[name], 'gain', '+')} nats)" for name in rest)
        found.append(f"no gain beyond its error or 1% of the gap: {others}")
    for name in harms if helps else []:
        row = measured[name]
        found.append(f"{_phrase(result, name)} is worse than the guide: {_nats(row, 'gain', '+')} nats")
    found.extend(_unmeasured(result, guide, name, row) for name, row in tried.items() if name not in measured)
    reasons = {name: str(row["reason"].values) for name, row in rows.items() if name not in tried}
    for reason in dict.fromkeys(reasons.values()):
        names = ", ".join(_PHRASES[name] for name in reasons if reasons[name] == reason)
        found.append(f"could not be tried: {names}: {reason}")
    return found


def helpful(result: xr.Dataset | None) -> str | None:
    """The name of the remedy that helps most; None if none helps, or none was tried."""
    return next(iter(_helping(result)), None) if result is not None else None


def _helping(result: xr.Dataset) -> list[str]:
    """The names of the remedies that help, the best first."""
    guide, rows = _rows(result)
    measured = _measured(rows)
    limit = _limit(result, len(measured))
    helps = [name for name, row in measured.items() if _differs(row, guide, limit, 1)]
    return sorted(helps, key=lambda name: -_of(measured[name], "gain"))


def _rows(result: xr.Dataset) -> tuple[xr.Dataset, dict[str, xr.Dataset]]:
    """The row of the unchanged guide, and that of every remedy."""
    rows = {str(name): result.sel(remedy=name) for name in result["remedy"].values}
    return rows.pop(GUIDE), rows


def _tried(rows: dict[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    return {name: row for name, row in rows.items() if not str(row["reason"].values)}


def _measured(rows: dict[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """The remedies whose gain is known with its error."""
    return {name: row for name, row in _tried(rows).items() if math.isfinite(_of(row, "gain_se"))}


def _of(row: xr.Dataset, name: str) -> float:
    return float(row[name])


def _limit(result: xr.Dataset, count: int) -> float:
    freedom = int(result.attrs["data"]) - 1
    return float(student.ppf(1 - FALSE_ALARM / (2 * max(count, 1)), freedom)) if freedom > 0 else math.inf


def _differs(row: xr.Dataset, guide: xr.Dataset, limit: float, sign: int) -> bool:
    gain = sign * _of(row, "gain")
    return gain > limit * _of(row, "gain_se") and gain > LEAST * abs(_of(guide, "gap"))


def _help(result: xr.Dataset, guide: xr.Dataset, name: str, row: xr.Dataset) -> str:
    gain, gap, share = _of(row, "gain"), _of(guide, "gap"), _of(row, "recovered")
    digits = _digits(gap)
    least = "at least " if name == RESAMPLED else ""
    took = f"in {_duration(_of(row, 'seconds'))}"
    if gap > _limit(result, 1) * _of(guide, "gap_se"):
        se = 100 * _of(row, "recovered_se")
        places = 1 if 100 * abs(1 - share) < 1 or se < 0.5 else 0
        amount = f"{100 * share:.{places}f}% ± {se:.{places}f}%"
        size = f"{gain:.{digits}f} of {gap:.{digits}f} nats"
        head = f"{_phrase(result, name)} recovers {least}{amount} of the gap{_to(result)} ({size}) {took}"
    else:
        head = f"{_phrase(result, name)} gains {least}{_nats(row, 'gain')} nats {took}"
    return head + _khat(name, row) + _afterwards(result, guide, row) + _sds(guide, row, _limit(result, 1))


def _unmeasured(result: xr.Dataset, guide: xr.Dataset, name: str, row: xr.Dataset) -> str:
    why = "its gain is not known"
    if result.attrs["evidence"] == "bound" and name == RESAMPLED:
        why = "its gain is not known, since log p(x) is not"
    elif not math.isfinite(_of(guide, "elbo")):
        why = "its gain is not known, since the guide's ELBO is not finite"
    return f"{_phrase(result, name)}: {why}{_khat(name, row)}{_afterwards(result, guide, row)}"


def _phrase(result: xr.Dataset, name: str) -> str:
    phrase = _PHRASES[name]
    is_simulated = name not in (REFINED, RESAMPLED) and result.attrs["trained_on"] == "simulated"
    return f"{phrase}, made for data simulated from the model," if is_simulated else phrase


def _to(result: xr.Dataset) -> str:
    return " to the best bound of log p(x)" if result.attrs["evidence"] == "bound" else ""


def _khat(name: str, row: xr.Dataset) -> str:
    good = _of(row, "khat_good")
    if name != RESAMPLED or not good < 1:
        return ""
    return f", but k-hat is too large to rely on it for {max(1 - good, 0.01):.0%} of the data"


def _afterwards(result: xr.Dataset, guide: xr.Dataset, row: xr.Dataset) -> str:
    """The number of failed verdicts with a remedy, compared with that of the guide."""
    fails, unclear, before, checks = _of(row, "fails"), _of(row, "unclear"), _of(guide, "fails"), result.attrs["checks"]
    if not math.isfinite(fails):
        return ""
    against = "against the reference"
    if fails:
        verb = "fails" if fails == 1 else "fail"
        return f"; afterwards {fails:.0f} of {checks} checks {against} {verb} ({before:.0f} before)"
    if unclear:
        return (
            f"; afterwards no check {against} fails, but {unclear:.0f} of {checks} cannot tell ({before:.0f} failed "
            "before)"
        )
    return f"; afterwards every check {against} passes ({before:.0f} of {checks} failed before)"


def _sds(guide: xr.Dataset, row: xr.Dataset, limit: float) -> str:
    """A warning if the gap became smaller but the sds worse: the best guide in KL(q ‖ p) is often too narrow."""
    before, after = _of(guide, "sd_error"), _of(row, "sd_error")
    if not after - before > limit * math.hypot(_of(guide, "sd_error_se"), _of(row, "sd_error_se")):
        return ""
    return f"; but sds are further off, by {math.expm1(after):.0%} (root mean square), {math.expm1(before):.0%} before"


def _digits(value: float) -> int:
    return int(np.clip(1 - math.floor(math.log10(value)), 2, 4)) if math.isfinite(value) and value > 0 else 2


def _nats(row: xr.Dataset, name: str, sign: str = "") -> str:
    """Value ± standard error, with two to four decimals: as many as give the standard error one digit."""
    value, se = _of(row, name), _of(row, f"{name}_se")
    digits = int(np.clip(-math.floor(math.log10(se)), 2, 4)) if math.isfinite(se) and se > 0 else 2
    return f"{value:{sign}.{digits}f} ± {se:.{digits}f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
