"""Numbers with their errors, and counts, in words."""

import numpy as np


def number(value: float, se: float) -> str:
    """Value ± standard error, with two to four decimals: as many as give the standard error one digit.

    A standard error that four decimals cannot show is "less than 0.0001"; without an error, the value stands alone.
    """
    digits = _digits(se, 2, 4)
    return _minus(f"{value:.{digits}f}{_error(se, digits)}")


def percent(value: float, se: float) -> str:
    """Value ± standard error in percent, with up to two decimals: as many as give the standard error one digit."""
    digits = _digits(100.0 * se, 0, 2)
    return _minus(f"{100.0 * value:.{digits}f}%{_error(100.0 * se, digits, '%')}")


def _minus(text: str) -> str:
    """A text that starts with a number, with a proper minus sign; a rounded zero has none."""
    value = text.partition(" ")[0].rstrip("%")
    return text.removeprefix("-") if float(value) == 0 else text.replace("-", "−")


def _digits(se: float, least: int, most: int) -> int:
    return int(np.clip(-np.floor(np.log10(se)), least, most)) if 0 < se < np.inf else least


def _error(se: float, digits: int, unit: str = "") -> str:
    if not 0 < se < np.inf:
        return ""
    if se < 0.5 * 10.0**-digits:
        return f" ± less than {10.0**-digits:.{digits}f}{unit}"
    return f" ± {se:.{digits}f}{unit}"


def counted(count: int, one: str = "datum", many: str = "data") -> str:
    """A count with its noun: "1 datum", "1,000 data"."""
    return f"{count:,} {one if count == 1 else many}"


def ceil(value: float, digits: int) -> float:
    """Round up, so that an upper bound remains one."""
    return float(np.ceil(value * 10**digits) / 10**digits)
