"""The style of the report's pictures, and their conversion to text for a page."""

from __future__ import annotations

import base64
import io
import sys
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
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.5,
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
WIDTH = 6.2  # width of a picture, in inches
_DPI = 130


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A new figure, created without pyplot and its global state."""
    import matplotlib
    from matplotlib.figure import Figure

    _show_in_notebooks(Figure)
    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _show_in_notebooks(kind: type[Figure]) -> None:
    """Let a notebook show figures as pictures, which it does by itself only after pyplot was imported."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None:
        return
    formatter = shell.display_formatter.formatters["image/png"]
    try:
        formatter.lookup_by_type(kind)
    except KeyError:
        formatter.for_type(kind, png)


def png(figure: Figure) -> bytes:
    """A figure as the content of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas, dpi, buffer = figure.canvas, figure.dpi, io.BytesIO()
    try:
        figure.set_dpi(_DPI)
        FigureCanvasAgg(figure).print_png(buffer)  # `savefig` would draw everything twice
    finally:
        figure.set_dpi(dpi)
        figure.set_canvas(canvas)
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode()


def cycled(options: Sequence[Any], i: int) -> Any:
    return options[i % len(options)]


def plain_axes(text: object) -> str:
    """Escape text for matplotlib, for which a dollar sign would start a formula."""
    return str(text).replace("$", r"\$")
