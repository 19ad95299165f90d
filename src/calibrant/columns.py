"""The width of the terminal, and text that is wrapped to it; where there is none, a text is one line."""

from __future__ import annotations

import shutil
import sys
import textwrap
from typing import TextIO


def columns(file: TextIO | None = None) -> int | None:
    """The columns of the terminal that standard output, or another file, is; None if it is none."""
    file = file or sys.stdout
    is_terminal = file is not None and file.isatty()
    return max(shutil.get_terminal_size().columns, 20) if is_terminal else None


def wrapped(text: str, first: str = "", then: str | None = None, file: TextIO | None = None) -> str:
    """A text in lines that fit the terminal, broken at spaces; one line for a file.

    Args:
        text: the text, in one line.
        first: what the first line begins with.
        then: what the others begin with; as many spaces for None.
        file: where it is printed; None for standard output.
    """
    width = columns(file)
    if width is None:
        return f"{first}{text}"
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first) if then is None else then,
        break_long_words=False,
        break_on_hyphens=False,
    )
