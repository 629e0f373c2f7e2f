"""Tables and the picture of the serving benchmark."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.report import table
from benchmarks.serving_rows import Served, cheaper, growth

__all__ = ["cost_table", "draw", "growth_table", "payback_table"]

_ENGINES = {"milvus": "Milvus", "edge": "Qdrant Edge"}
_COLOURS = {
    "full scan": "#999999",
    "IVF_FLAT": "#333333",
    "KeyNet on IVF_FLAT": "#009e73",
    "HNSW": "#cc79a7",
    "partitions": "#56b4e9",
    "cell field": "#0072b2",
    "IVF_SQ8": "#e69f00",
    "codes in partitions": "#d55e00",
    "few lists of codes in partitions": "#f0e442",
    "cells": "#0072b2",
}
_CODES = ("codes in partitions", "few lists of codes in partitions")
_COPIES = ("partitions", "cell field", *_CODES)
_HEADING = (
    "engine",
    "method",
    "setting",
    "recall@10",
    "scanned",
    "p50 ms",
    "p99 ms",
    "q/s 1",
    "q/s 4",
    "q/s 16",
    "q/s in 64s",
    "CPU s/1,000",
    "CPU in 64s",
    "client CPU",
    "build s",
    "build CPU s",
    "MB",
)


def cost_table(rows: Iterable[Served]) -> str:
    """Return every row, by number of keys, engine, target and method."""
    lines = [
        [
            f"{row.keys:,}",
            f"{row.target:.2f}",
            _ENGINES[row.engine],
            row.method,
            row.setting,
            f"{row.recall:.3f}",
            "" if row.scanned is None else f"{row.scanned:.3f}",
            f"{row.p50:.2f}",
            f"{row.p99:.2f}",
            f"{row.rate_1:.0f}",
            f"{row.rate_4:.0f}",
            f"{row.rate_16:.0f}",
            f"{row.rate_batch:.0f}",
            f"{row.cpu:.2f}",
            f"{row.cpu_batch:.2f}",
            "" if row.cpu_client is None else f"{row.cpu_client:.2f}",
            f"{row.build:.0f}",
            f"{row.build_cpu:.0f}",
            f"{row.memory:.0f}",
        ]
        for row in sorted(rows, key=_order)
    ]
    return table(["keys", "target", *_HEADING], lines)


def growth_table(rows: Iterable[Served]) -> str:
    """Return how CPU grows with the keys, and where each method meets HNSW and IVF_FLAT.

    The model is ``fixed + slope * n / 100,000`` CPU seconds for 1,000 queries.
    """
    series: dict[tuple[str, float, str], list[Served]] = defaultdict(list)
    for row in rows:
        series[row.engine, row.target, row.method].append(row)
    fits = {key: fit for key, found in series.items() if (fit := growth(found)) is not None}
    lines = []
    for engine, target, method in sorted(fits):
        fit = fits[engine, target, method]
        line = [_ENGINES[engine], f"{target:.2f}", method, f"{fit.fixed:.2f}", f"{fit.slope:.2f}"]
        for other in ("IVF_FLAT", "HNSW"):
            rival = None if other == method else fits.get((engine, target, other))
            line.append("" if rival is None else _where(cheaper(fit, rival)))
        lines.append(line)
    heading = [
        "engine",
        "target",
        "method",
        "fixed",
        "slope",
        "cheaper than IVF_FLAT",
        "cheaper than HNSW",
    ]
    return table(heading, lines)


def payback_table(rows: Sequence[Served]) -> str:
    """Return after how many queries the graph of HNSW has earned what building it took.

    More CPU seconds to build, divided by fewer CPU seconds a query. Cells of Milvus are copied from
    a collection with IVF_FLAT, whose building counts too.
    """
    found = {(row.keys, row.engine, row.target, row.method): row for row in rows}
    lines = []
    for (keys, engine, target, method), row in sorted(found.items()):
        graph = found.get((keys, engine, target, "HNSW"))
        if graph is None or graph is row:
            continue
        build = row.build_cpu
        if method in _COPIES and (source := found.get((keys, engine, target, "IVF_FLAT"))):
            build += source.build_cpu
        saved = (row.cpu - graph.cpu) / 1e3
        more = graph.build_cpu - build
        after = "never" if saved <= 0 else "at once" if more <= 0 else f"{more / saved:,.0f}"
        lines.append([f"{keys:,}", f"{target:.2f}", _ENGINES[engine], method, f"{more:.0f}", after])
    heading = ["keys", "target", "engine", "instead of", "more CPU s to build", "queries"]
    return table(heading, lines)


def _where(keys: tuple[float, float] | None) -> str:
    if keys is None:
        return "never"
    low, high = keys
    if math.isinf(high):
        return "always" if low < 1 else f"from {low:,.0f} keys"
    return f"up to {high:,.0f} keys"


def _order(row: Served) -> tuple[int, str, float, int]:
    return row.keys, row.engine, row.target, list(_COLOURS).index(row.method)


def draw(rows: Sequence[Served], stem: Path) -> None:
    """Plot CPU seconds for 1,000 queries against the number of keys, a panel per engine.

    Parameters
    ----------
    rows
        Any rows.
    stem
        Path of the pictures, without their suffix.
    """
    engines = [engine for engine in _ENGINES if any(row.engine == engine for row in rows)]
    if not engines:
        return
    mpl.rcParams["svg.hashsalt"] = "amips"  # the same rows give the same file
    figure = Figure(figsize=(5.2 * len(engines), 4.8), layout="constrained")
    for place, engine in enumerate(engines, start=1):
        axis = figure.add_subplot(1, len(engines), place)
        _panel(axis, [row for row in rows if row.engine == engine])
        axis.set_title(_ENGINES[engine])
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{stem}.png", dpi=130)
    figure.savefig(f"{stem}.svg", metadata={"Date": None})


def _panel(axis: Axes, rows: Sequence[Served]) -> None:
    lines: dict[tuple[str, float], dict[int, float]] = defaultdict(dict)
    for row in rows:
        lines[row.method, row.target][row.keys] = row.cpu
    styles: dict[float, Literal["-", "--", ":"]] = {0.9: "--", 0.95: "-", 1.0: ":"}
    for (method, target), costs in sorted(lines.items()):
        axis.plot(
            sorted(costs),
            [costs[keys] for keys in sorted(costs)],
            color=_COLOURS[method],
            linestyle=styles.get(target, "-"),
            marker="o",
            markersize=4,
        )
    methods = [method for method in _COLOURS if any(name == method for name, _ in lines)]
    handles = [Line2D([], [], color=_COLOURS[method], label=method) for method in methods]
    targets = sorted({target for _, target in lines})
    handles += [
        Line2D([], [], color="#333333", linestyle=styles.get(target, "-"), label=label)
        for target in targets
        if (label := "exact" if target == 1.0 else f"recall@10 {target:.2f}")
    ]
    sizes = sorted({row.keys for row in rows})
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.xaxis.set_minor_formatter(NullFormatter())
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.tick_params(labelsize="small", which="both")
    axis.set_xlabel("keys")
    axis.set_ylabel("CPU seconds of the server for 1,000 queries")
    axis.grid(alpha=0.3, which="both")
    axis.legend(
        handles=handles,
        fontsize="x-small",
        handlelength=3.0,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncol=4,
    )
