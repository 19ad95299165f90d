"""Numbers with their errors, in words."""

import numpy as np


def number(value: float, se: float) -> str:
    """Value ± standard error, with two to four decimals: as many as give the standard error one digit."""
    digits = int(np.clip(-np.floor(np.log10(se)), 2, 4)) if se > 0 else 2
    return f"{value:.{digits}f} ± {se:.{digits}f}"


def percent(value: float, se: float) -> str:
    """Value ± standard error in percent, with up to two decimals: as many as give the standard error one digit."""
    digits = int(np.clip(-np.floor(np.log10(100.0 * se)), 0, 2)) if se > 0 else 0
    return f"{100.0 * value:.{digits}f}% ± {100.0 * se:.{digits}f}%"


def ceil(value: float, digits: int) -> float:
    """Round up, so that an upper bound remains one."""
    return float(np.ceil(value * 10**digits) / 10**digits)
