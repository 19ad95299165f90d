"""The style of the report's pictures, and their conversion to text for a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
REFERENCE, GUIDE, INK = "#333333", "#D55E00", "#222222"
REFERENCE_FILL = "#BDBDBD"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.labelsize": 11,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "text.color": INK,
    "axes.labelcolor": INK,
    "font.family": "sans-serif",
    "figure.facecolor": "white",
}
WIDTH = 7.2  # width of a picture, in inches
_DPI = 110


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A new figure, created without pyplot and its global state."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def cycled(options: Sequence[Any], i: int) -> Any:
    return options[i % len(options)]


def plain_axes(text: object) -> str:
    """Escape text for matplotlib, for which a dollar sign would start a formula."""
    return str(text).replace("$", r"\$")
