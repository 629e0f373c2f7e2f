"""Recall against total cost, as PNG and SVG."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import TITLES
from benchmarks.rows import Row

__all__ = ["draw"]

_COLOURS = {
    "centroids-kmeans": "#999999",
    "centroids": "#333333",
    "centroids-threshold": "#777777",
    "linear": "#0072b2",
    "supportnet": "#d55e00",
    "ivf": "#333333",
    "keynet": "#009e73",
}
_PANEL = 4.6  # inches


def draw(rows: Iterable[Row], protocol: str, k: int, n_keys: int, dim: int, stem: Path) -> None:
    """Plot recall@k against the total cost in keys and in FLOPs, one panel per number of cells.

    Parameters
    ----------
    rows
        Rows of any protocol.
    protocol
        Which to draw.
    k
        Which recall@k.
    n_keys, dim
        Of the data.
    stem
        Path of the pictures, without their suffix.
    """
    panels: dict[int, dict[tuple[str, str], dict[float, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for row in rows:
        if row.protocol == protocol and row.k == k and row.total is not None:
            panels[row.cells][row.layout, row.router][row.recall].append(row.total * n_keys)
    if not panels:
        return
    mpl.rcParams["svg.hashsalt"] = "amips"  # the same rows give the same file
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(_PANEL * columns, _PANEL * lines), layout="constrained")
    for place, cells in enumerate(sorted(panels), start=1):
        axis = figure.add_subplot(lines, columns, place)
        _panel(axis, panels[cells], f"{cells} cells", dim)
        axis.set_ylabel("match rate" if k == 1 else f"recall@{k}")
    figure.suptitle(TITLES[protocol])
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{stem}.png", dpi=130)
    figure.savefig(f"{stem}.svg", metadata={"Date": None})


def _panel(
    axis: Axes, lines: dict[tuple[str, str], dict[float, list[float]]], title: str, dim: int
) -> None:
    for (layout, router), line in sorted(lines.items()):
        recalls = sorted(line)
        axis.plot(
            [float(np.mean(line[recall])) for recall in recalls],
            recalls,
            color=_COLOURS.get(router, "#cc79a7"),
            linestyle="-" if layout == "query-aware" else "--",
            marker=".",
            label=f"{router}, {layout}",
        )
    axis.set_xscale("log")
    axis.set_xlabel("keys scanned, the model included")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small", handlelength=3.0)
    per_key = 2.0 * dim
    flops = axis.secondary_xaxis(
        "top",
        functions=(
            lambda keys: np.asarray(keys, dtype=np.float64) * per_key,
            lambda flops: np.asarray(flops, dtype=np.float64) / per_key,
        ),
    )
    flops.set_xlabel("FLOPs a query")
