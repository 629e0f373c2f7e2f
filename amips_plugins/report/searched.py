"""What is searched: the cells and where they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter

from amips_plugins.report.data import ReportData
from amips_plugins.report.style import (
    BLUE,
    FAINT,
    INK,
    ORANGE,
    Chart,
    bars,
    legend_below,
    new_axes,
)
from amips_plugins.report.training_record import FlatMap

__all__ = ["cell_sizes", "flat_map"]

_RING: dict[str, Any] = {"color": BLUE, "marker": "o", "ms": 9, "ls": "none", "fillstyle": "none"}
_APART = 0.1  # of the keys' spread


def cell_sizes(data: ReportData) -> Chart:
    """Keys in every cell, and where the answers lie."""
    assert data.cells is not None  # noqa: S101 - for the type checker
    sizes = np.sort(data.cells.sizes)[::-1]
    demand = None if data.curves is None else np.array(data.curves.demand)
    figure, (axes,) = new_axes(7.4, 3.8)
    bars(axes, np.arange(0.5, len(sizes) + 1.0), [int(size) for size in sizes], FAINT)
    even = float(sizes.mean())
    axes.axhline(even, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    handles: list[Artist] = [
        Patch(color=FAINT, label="keys in the cell"),
        Line2D([], [], color=INK, lw=0.9, ls=(0, (1, 2)), label=f"mean, {even:,.0f} keys"),
    ]
    title = (
        f"The largest of {len(sizes)} cells holds {sizes[0] / max(1, sizes.sum()):.1%} of the "
        f"keys, {sizes[0] / max(even, 1e-9):.1f} times the mean"
    )
    more = ""
    if demand is not None and len(demand) == len(sizes) and demand.sum():
        order = np.argsort(-data.cells.sizes, kind="stable")
        per_key = demand / demand.sum() * sizes.sum()
        places = np.arange(len(sizes)) + 1
        axes.plot(places, per_key[order], ls="none", marker="D", ms=4.2, color=ORANGE)
        handles.append(
            Line2D([], [], color=ORANGE, marker="D", ms=4.5, ls="none", label="asked for")
        )
        busy = np.argsort(-(demand / data.cells.sizes.clip(1)), kind="stable")
        share = np.cumsum(demand[busy]) / demand.sum()
        held = np.cumsum(data.cells.sizes[busy]) / sizes.sum()
        half = int((share >= 0.5).argmax())
        title = f"Half of the answers lie in cells that hold {held[half]:.0%} of the keys"
        more = (
            " A diamond is where the bar would end if the keys were shared out as the answers of "
            "test queries are: above the bar a cell is asked for more than its size."
        )
    legend_below(figure, handles)
    axes.set_xlim(0.25, len(sizes) + 0.75)
    axes.set_xlabel("cells, largest first")
    axes.set_ylabel("keys")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(visible=False, axis="x")
    steps = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    return Chart(
        "cell-sizes",
        title,
        "A bar is one cell; a search of it scans its keys." + more,
        f"Bar chart of the keys in {len(sizes)} cells, falling from {sizes[0]:,} to {sizes[-1]:,}.",
        figure,
        ("of the cells", "hold at least, keys"),
        tuple(
            (
                "largest" if step == 0 else ("smallest" if step == 1 else f"{step:.0%}"),
                f"{int(sizes[round(step * (len(sizes) - 1))]):,}",
            )
            for step in steps
        ),
    )


def flat_map(flat: FlatMap) -> Chart:
    """Keys, cells and queries on two axes."""
    figure, (axes,) = new_axes(7.4, 5.6)
    keys, queries, cells = np.array(flat.keys), np.array(flat.queries), np.array(flat.cells)
    _dots(axes, keys)
    centres, sizes = [], []
    for cell in np.unique(cells):
        inside = keys[cells == cell]
        centres.append(inside.mean(axis=0))
        sizes.append(len(inside))
    x, y = np.array(centres).T
    area = np.array(sizes) / max(sizes) * 260
    axes.scatter(x, y, s=area, facecolors="none", edgecolors=BLUE, linewidths=1.4)
    axes.scatter(queries[:, 0], queries[:, 1], s=13, marker="x", color=ORANGE, linewidths=1.0)
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    legend_below(
        figure,
        [
            Line2D([], [], color=FAINT, marker="o", ms=4, ls="none", label=f"{len(keys):,} keys"),
            Line2D([], [], **_RING, label="cells, by size"),
            Line2D([], [], color=ORANGE, marker="x", ms=5, ls="none", label="test queries"),
        ],
    )
    apart = flat.shift >= _APART
    return Chart(
        "map",
        "Queries lie to one side of the keys" if apart else "Queries lie where the keys lie",
        f"The first two principal axes hold {flat.variance:.0%} of the variance: what is near here "
        f"may be far in truth. The means of queries and keys are {flat.shift:.2f} of the keys' "
        f"spread apart, in all dimensions.",
        "Scatter plot of keys as dots, cells as circles of their size, test queries as crosses.",
        figure,
        ("what", "mean x", "mean y", "spread"),
        tuple(
            (
                name,
                f"{points[:, 0].mean():.3f}",
                f"{points[:, 1].mean():.3f}",
                f"{np.sqrt(points.var(axis=0).sum()):.3f}",
            )
            for name, points in (("keys", keys), ("test queries", queries))
            if len(points)
        ),
    )


def _dots(axes: Axes, points: npt.NDArray[np.float64]) -> None:
    """Draw thousands of points as one path: lines too short to see, with round ends."""
    ends = np.repeat(points, 2, axis=0)
    ends[1::2, 0] += 1e-4 * max(float(np.ptp(points)), 1e-9)
    codes = np.tile(np.array([Path.MOVETO, Path.LINETO], dtype=np.uint8), len(points))
    axes.add_patch(
        PathPatch(Path(ends, codes), edgecolor=FAINT, linewidth=2.2, capstyle="round", fill=False)
    )
    axes.update_datalim(points)
    axes.autoscale_view()
