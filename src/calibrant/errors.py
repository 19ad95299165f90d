"""Errors that tell a user what to do; the command line prints each as one line, without a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


def names_to_offer(name: str, known: Iterable[str]) -> str:
    """What to say after an unknown name: the nearest known ones, or all of them."""
    names = sorted(known)
    near = get_close_matches(name, names)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}."


class CalibrantError(Exception):
    """Base of every error that a user can mend."""


class ProgramError(CalibrantError, ValueError):
    """A model or guide breaks the contract of `calibrant.program`."""


class DataError(CalibrantError, ValueError):
    """Observations or covariates that a program cannot take."""


class RunError(CalibrantError):
    """A run folder that cannot be written, or that is damaged or foreign."""


class InferenceError(CalibrantError):
    """Inference that cannot give what was asked: no exact posterior, too few draws, trees that do not match."""


class NonFiniteLoss(CalibrantError, ArithmeticError):
    """Training met a loss that is not finite; the last good weights were restored.

    Attributes:
        batch: the labels of the minibatch's data.
    """

    def __init__(self, message: str, batch: list[object]) -> None:
        super().__init__(message)
        self.batch = batch
