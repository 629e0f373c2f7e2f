"""How charts look: colours for light and dark, names and marks, bars, and SVG for a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

__all__ = [
    "BLUE",
    "COLOURS",
    "DASHES",
    "FAINT",
    "INK",
    "MARKS",
    "MUTED",
    "NAMES",
    "ORANGE",
    "PAPER",
    "WASH",
    "Chart",
    "bars",
    "legend_below",
    "listed",
    "model_sign",
    "new_axes",
    "percent",
    "to_png",
    "to_svg",
]

COLOURS: dict[str, tuple[str, str]] = {
    # name: on white, on black; text in any of them has a contrast of 4.5 or more (WCAG 2.2, 1.4.3)
    "ink": ("#1a1f25", "#e6ebf0"),
    "muted": ("#57606b", "#a3adb8"),
    "rule": ("#d5dae0", "#343b44"),
    "faint": ("#aeb6bf", "#59636e"),
    "paper": ("#fefefe", "#12161b"),
    "native": ("#626b76", "#9aa5b1"),
    "linear": ("#0b63b0", "#62abff"),
    "supportnet": ("#b04a00", "#f59a4c"),
    "keynet": ("#0a7454", "#46c79a"),
    "wash": ("#cfe0f1", "#1d3a56"),
}
INK, MUTED, RULE, FAINT, PAPER, WASH = (
    COLOURS[name][0] for name in ("ink", "muted", "rule", "faint", "paper", "wash")
)
BLUE, ORANGE = COLOURS["linear"][0], COLOURS["supportnet"][0]
NAMES = {
    "native": "nearest centroids",
    "linear": "linear router",
    "supportnet": "SupportNet",
    "keynet": "KeyNet",
}
MARKS = {"native": "s", "linear": "o", "supportnet": "^", "keynet": "D"}
DASHES = {"native": (4, 2), "linear": (), "supportnet": (7, 1.5), "keynet": (1, 1.2)}
_RC: dict[Any, Any] = {  # its type names the settings of one version
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: small, sharp, and in the reader's own font
    "path.simplify": True,
}


@dataclass(frozen=True)
class Chart:
    """One picture, with all that is said of it."""

    name: str  # its identifier, and the name of its file
    title: str  # what it shows, as a finding
    caption: str  # how to read it
    description: str  # for those who cannot see it
    figure: Figure
    header: tuple[str, ...]  # the same in numbers
    rows: tuple[tuple[str, ...], ...]


def new_axes(
    width: float = 7.4, height: float = 4.0, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of this size in inches, with axes side by side."""
    with rc_context(_RC):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = [figure.add_subplot(1, columns, place + 1) for place in range(columns)]
    for one in axes:
        one.tick_params(length=0, pad=5)
    return figure, axes


def to_svg(chart: Chart) -> str:
    """Draw a chart as an ``<svg>`` element that takes its colours from the page.

    The same chart gives the same text, and identifiers begin with its name.
    """
    buffer = io.StringIO()
    with rc_context({**_RC, "svg.hashsalt": chart.name}):
        chart.figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    for name, (light, _) in COLOURS.items():
        drawn = drawn.replace(light, f"var(--{name})")
    drawn = re.sub(r'\bid="', f'id="{chart.name}-', drawn)
    drawn = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{chart.name}-", drawn)
    size = re.search(r'viewBox="[^"]*"', drawn)
    assert size is not None  # noqa: S101 - for the type checker: matplotlib writes one
    opening = (
        f'<svg role="img" aria-labelledby="{chart.name}-title {chart.name}-desc" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f"{size[0]}>"
    )
    return opening + drawn[drawn.index(">") + 1 :].strip()


def to_png(chart: Chart) -> bytes:
    """Draw a chart as a PNG on white, under its title."""
    buffer = io.BytesIO()
    with rc_context(_RC):
        heading = chart.figure.suptitle(
            chart.title, x=0.012, ha="left", fontsize=12.5, fontweight="bold", wrap=True
        )
        chart.figure.savefig(buffer, format="png", dpi=144)
        heading.remove()
    return buffer.getvalue()


def bars(axes: Axes, edges: npt.NDArray[np.float64], heights: Sequence[int], colour: str) -> None:
    """Draw bars between edges, which need not be evenly spaced."""
    axes.bar(
        edges[:-1],
        heights,
        width=np.diff(edges),
        align="edge",
        color=colour,
        edgecolor=PAPER,
        linewidth=0.6,
    )


def model_sign(name: str, label: str) -> Line2D:
    """Return the line and the mark of a model, for a legend."""
    drawn: dict[str, Any] = {"color": COLOURS[name][0], "dashes": DASHES[name]}
    return Line2D([], [], marker=MARKS[name], markersize=5.5, label=label, **drawn)


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """Explain the signs of a chart below it."""
    figure.legend(
        handles=list(handles),
        loc="outside lower left",
        ncols=len(handles),
        frameon=False,
        labelcolor=INK,
        handletextpad=0.5,
    )


def percent(value: float | None) -> str:
    """Write a share as people read it; ``-`` where it is unknown."""
    return "-" if value is None else f"{value:.1%}"


def listed(names: Sequence[str]) -> str:
    """Write names as a list in a sentence."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
