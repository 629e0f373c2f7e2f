"""What the charts share: how the models are called and drawn, bars, legends, numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amips_plugins.report.style import COLOURS

__all__ = [
    "BLUE",
    "DASHES",
    "FAINT",
    "INK",
    "MARKS",
    "MUTED",
    "NAMES",
    "ORANGE",
    "PAPER",
    "WASH",
    "bars",
    "legend_below",
    "listed",
    "percent",
]

INK, MUTED, FAINT, PAPER, WASH = (
    COLOURS[name][0] for name in ("ink", "muted", "faint", "paper", "wash")
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


def legend_below(figure: Figure, handles: list[Artist]) -> None:
    """Explain the signs of a chart below it."""
    figure.legend(
        handles=handles,
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
