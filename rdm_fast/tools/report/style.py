"""The look of every figure: colors that color-blind readers can tell apart, sizes, file format.

Nothing is shown by color alone: runs also differ in line style once colors repeat, branches in
line style, and classes are named on the map.
"""

import importlib.util
import io
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from rdm_fast.errors import Unavailable

RUNS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
"""Okabe and Ito's colors, without the yellow that is too pale for lines; grey for black."""
ONLINE, TARGET, PROJECTION = "#0072B2", "#D55E00", "#C4C4C4"
CLASSES = (
    *("#332288", "#CC6677", "#117733", "#DDCC77", "#88CCEE"),
    *("#882255", "#44AA99", "#999933", "#AA4499", "#8C8C8C"),
)
"""Paul Tol's muted scheme."""
BRANCHES = (
    ("online", "online branch", {"color": ONLINE}),
    ("target", "target branch", {"color": TARGET, "linestyle": (0, (5, 2))}),
    ("projection", "projections", {"color": PROJECTION, "linewidth": 5, "zorder": 1.5}),
)
"""The projections equal the branch without a filter, so they are a wide band under its line."""
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)))

WIDTH = 10.0
"""Inches of every figure, shown at the full width of the page."""
DPI = 144
PARAMETERS: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#555555",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A figure, or the sentence that takes its place."""

    name: str
    """Of its file, and of its place in the page."""
    title: str
    caption: str
    """What the figure shows, or why there is none; whole sentences."""
    alt: str = ""
    """What a reader who cannot see the figure should know."""
    png: bytes = b""


def require_matplotlib(command: str) -> None:
    """Check that figures can be drawn, before anything takes time.

    Raises:
        Unavailable: matplotlib or jinja2 is not installed.
    """
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(
            f"{command} needs {' and '.join(missing)}, which is not installed: "
            'pip install "rdm-fast[plot]"'
        )


def applied() -> AbstractContextManager[None]:
    """The context in which to draw figures; it restores matplotlib's own settings."""
    from matplotlib import rc_context

    return rc_context(PARAMETERS)


def canvas(rows: int, columns: int, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure and its axes in reading order. It changes nothing global and opens no window."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, [*figure.subplots(rows, columns, squeeze=False, **options).flat]


def panels(
    titles: Sequence[str], heights: Sequence[float], **options: Any
) -> tuple[Any, list[Any]]:
    """A figure with one titled panel for each run, up to five side by side.

    Args:
        titles: labels of the runs, cut to the width of a panel.
        heights: of a row, in inches: with one run, with two, ...; the last one is for any more.
        options: of matplotlib's subplots.
    """
    count = len(titles)
    rows = math.ceil(count / (5 if count > 8 else 4))
    height = rows * heights[min(count, len(heights)) - 1]
    figure, axes = canvas(rows, math.ceil(count / rows), height, **options)
    for spare in axes[count:]:
        spare.remove()
    width = 60 if count <= 2 else 110 // math.ceil(count / math.ceil(count / 5))
    for each, text in zip(axes, titles, strict=False):
        each.set_title(text if len(text) <= width else f"{text[: width - 1]}…")
    return figure, axes[:count]


def png(figure: Any) -> bytes:
    """The file's content; the same bytes every time."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})
    return file.getvalue()


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def line_style(number: int) -> dict[str, Any]:
    """Color and dashes of a run, by its number from 0."""
    dashes = DASHES[number // len(RUNS) % len(DASHES)]
    return {"color": RUNS[number % len(RUNS)], "linestyle": dashes}


def legend_above(figure: Any, axes: Sequence[Any], columns: int = 5) -> None:
    """One legend for all axes, above them."""
    handles: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        place = {"loc": "outside upper left", "ncols": columns, "handlelength": 2.2}
        figure.legend(handles.values(), handles, **place)


def label_left(all_axes: Sequence[Any], text: str) -> None:
    """Label the shared vertical axis once in each row of panels."""
    for axes in all_axes:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel(text)
