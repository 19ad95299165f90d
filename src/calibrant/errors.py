"""Errors and warnings that tell users what to do; commands print each error as one line, without a traceback."""

import os
import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from types import FrameType

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line of the user: the one that called this package, whatever runs in between.

    Python 3.12 has `skip_file_prefixes` for this, but would stop at a library through which the package calls itself.
    """
    frame: FrameType | None = sys._getframe()
    depth = outermost = 0
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            outermost = depth
        frame, depth = frame.f_back, depth + 1
    warnings.warn(message, category, stacklevel=outermost + 2)


def names_to_offer(name: str, known: Iterable[str]) -> str:
    """Suggestion for the message about an unknown name: the most similar known names, or all known names."""
    names = sorted(known)
    near = get_close_matches(name, names)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}."


class CalibrantError(Exception):
    """Base class of all errors that a user can fix."""


class ProgramError(CalibrantError, ValueError):
    """A model or guide breaks the contract of `calibrant.program`."""


class DataError(CalibrantError, ValueError):
    """Observations or covariates that a program cannot take."""


class RunError(CalibrantError):
    """A run folder that cannot be written, is damaged, or was not written by calibrant."""


class InferenceError(CalibrantError):
    """A result that inference cannot compute: no exact posterior is known, too few draws, trees that do not match."""


class RepresentationError(CalibrantError, ValueError):
    """A backbone, a file of features or a representation that cannot be used as it is given."""


class NonFiniteLoss(CalibrantError, ArithmeticError):
    """A loss in training is not finite; the last good weights were restored.

    Attributes:
        batch: labels of the data in the minibatch.
    """

    def __init__(self, message: str, batch: list[object]) -> None:
        super().__init__(message)
        self.batch = batch
