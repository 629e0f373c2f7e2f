"""What a search costs: recall, promises, cells searched, times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from amips_plugins.bundle.manifest import CandidateCost as Cost
from amips_plugins.report.data import ReportData, Timings
from amips_plugins.report.style import (
    BLUE,
    COLOURS,
    DASHES,
    INK,
    MARKS,
    MUTED,
    NAMES,
    PAPER,
    WASH,
    Chart,
    bars,
    listed,
    model_sign,
    new_axes,
    percent,
)
from amips_plugins.report.training_record import Curves

__all__ = ["latency", "probes", "promises", "recall_against_cost"]

_LOWEST = 0.5  # recall: below, nobody wants to be
_MILLISECONDS = [step * 10.0**power for power in range(-3, 5) for step in (1, 2, 5)]
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def recall_against_cost(data: ReportData) -> Chart | None:
    """Recall against the share of the keys that it costs, a line a candidate."""
    manifest, curves = data.manifest, data.curves
    k, target = manifest.default_k, manifest.default_recall
    costs = [cost for cost in manifest.figures if cost.k == k and cost.candidate in NAMES]
    if not costs:  # a bundle that another tool made
        return None
    figure, (axes,) = new_axes(7.4, 4.3)
    names = list(dict.fromkeys(cost.candidate for cost in costs))
    least = 1.0
    for name in names:
        reached = [cost for cost in costs if cost.candidate == name and cost.total is not None]
        x, y = [float(cost.total or 1.0) for cost in reached], [cost.recall for cost in reached]
        xy = (x, y)
        for line in curves.lines if curves is not None else ():
            if (line.candidate, line.k) == (name, k):
                x, y = line.total, line.recall
        shown = [(a, b) for a, b in zip(x, y, strict=True) if b >= _LOWEST]
        if not shown:
            continue
        least = min(least, shown[0][0])
        colour = COLOURS[name][0]
        axes.plot(*zip(*shown, strict=True), color=colour, dashes=DASHES[name])
        axes.plot(*xy, ls="none", marker=MARKS[name], color=colour, ms=6.5, mec=PAPER)
        for cost in reached:
            if cost.low is not None and cost.high is not None:
                axes.plot([cost.low, cost.high], [cost.recall] * 2, color=colour, linewidth=1.1)
    axes.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.text(1.0, target, f"target {target:.2f}", ha="right", va="bottom", color=INK, fontsize=9.5)
    _name_lines(axes, costs, target)
    _share_axis(axes, least)
    axes.set_ylim(_LOWEST, 1.005)
    axes.set_xlabel("cost of a query: keys scanned and the model itself, share of a full scan")
    axes.set_ylabel(f"recall@{k}")
    rows = tuple(
        (
            NAMES[cost.candidate],
            f"{cost.recall:.2f}",
            percent(cost.total),
            "-" if cost.low is None else f"{percent(cost.low)} to {percent(cost.high)}",
            percent(cost.model),
            "-" if cost.n_probes is None else f"{cost.n_probes:.1f}",
        )
        for cost in costs
    )
    return Chart(
        "recall-against-cost",
        _cost_title(costs, manifest.choice, k, target),
        "Further left is cheaper, further up finds more. Marks are recalls .80, .90, .95 and .99 "
        "on test queries, which nothing was learned from or chosen on; the thin bars through them "
        "are 95% bootstrap intervals over those queries."
        + _overtaken(costs, manifest.choice, target)
        + ("" if curves is not None else " The run kept no curves, so that lines join the marks."),
        f"Line chart of recall@{k} against cost on a logarithmic axis, for "
        f"{listed([NAMES[name] for name in names])}. All rise towards the upper right, where "
        f"every key is scanned.",
        figure,
        ("search", "recall", "cost", "95% interval", "of that the model", "cells"),
        rows,
    )


def _name_lines(axes: Axes, costs: Sequence[Cost], target: float) -> None:
    """Name the lines where no line is, the cheapest at the target first."""
    nearest = _nearest(costs, target)
    found = [(cost.total, cost.candidate) for cost in costs if cost.recall == nearest]
    ordered = sorted(found, key=lambda one: math.inf if one[0] is None else one[0])
    handles = [model_sign(name, f"{NAMES[name]}, {percent(total)}") for total, name in ordered]
    legend = axes.legend(
        handles=handles,
        loc="lower right",
        title=f"cost at recall {nearest:.2f}",
        frameon=False,
        alignment="left",
        handlelength=3.2,
        labelspacing=0.55,
        labelcolor="linecolor",
        borderaxespad=0.8,
    )
    legend.get_title().set_color(MUTED)


def _nearest(costs: Sequence[Cost], target: float) -> float:
    return min((cost.recall for cost in costs), key=lambda recall: abs(recall - target))


def _cost_title(costs: Sequence[Cost], choice: str, k: int, target: float) -> str:
    nearest = _nearest(costs, target)
    at = {cost.candidate: cost.total for cost in costs if cost.recall == nearest}
    native, best = at.get("native"), at.get(choice)
    wanted = f"recall@{k} {nearest:.2f}"
    if choice != "native" and best is not None and native is not None:
        return (
            f"The {NAMES[choice]} reaches {wanted} at {percent(best)} of a full scan; nearest "
            f"centroids take {percent(native)}"
        )
    if choice != "native" and best is not None:
        return f"The {NAMES[choice]} reaches {wanted} at {percent(best)} of a full scan"
    if native is not None:
        return f"Nothing learned beats nearest centroids, which take {percent(native)} for {wanted}"
    return f"Nothing short of a full scan reaches {wanted}"


def _overtaken(costs: Sequence[Cost], choice: str, target: float) -> str:
    """Explain why the choice is not the cheapest on the page."""
    nearest = _nearest(costs, target)
    at = {cost.candidate: cost.total for cost in costs if cost.recall == nearest}
    best = at.get(choice)
    if best is None or all(total is None or total >= best for total in at.values()):
        return ""
    return " The choice was made on validation queries; on these, another came out ahead."


def promises(data: ReportData) -> Chart | None:
    """Recall that was promised against recall that was found."""
    calibration = data.calibration
    if calibration is None:
        return None
    k = data.manifest.default_k
    kept = None if data.curves is None else data.curves.promises
    if kept is not None:
        promised, found = np.array(kept.promised), np.array(kept.measured)
        scanned, where = np.array(kept.scanned), "test"
    else:
        row = min(k, calibration.max_k) - 1
        promised, found = calibration.guaranteed[row], calibration.recall[row]
        scanned, where = calibration.scanned, "calibration"
    promised, found, scanned = promised[:-1], found[:-1], scanned[:-1]  # the last searches all
    inside = promised >= _LOWEST
    promised, found, scanned = promised[inside], found[inside], scanned[inside]
    figure, (axes,) = new_axes(7.4, 4.3)
    axes.plot([_LOWEST, 1], [_LOWEST, 1], color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.fill_between(promised, promised, found, color=WASH, linewidth=0)
    axes.plot(promised, found, color=BLUE)
    axes.annotate(
        "promised = found",
        (0.62, 0.62),
        xytext=(6, -10),
        textcoords="offset points",
        color=INK,
        fontsize=9.5,
        va="top",
    )
    if len(promised):
        at = len(promised) // 2
        axes.annotate(
            f"{where} queries",
            (promised[at], found[at]),
            xytext=(-8, 8),
            textcoords="offset points",
            ha="right",
            color=BLUE,
            fontweight="bold",
        )
    axes.set_xlim(_LOWEST, 1.0)
    axes.set_ylim(_LOWEST, 1.005)
    axes.set_xlabel(f"recall@{k} promised, with {calibration.confidence:.0%} confidence")
    axes.set_ylabel(f"recall@{k} found")
    short = float(np.max(promised - found, initial=0.0))
    title = "Every promised recall is kept on test queries"
    if kept is None:
        title = "Promises stay below what calibration queries found"
    elif short > 0:
        title = f"Promised recall is kept on test queries to within {short:.3f}"
    if not len(promised):
        title = f"No recall of {_LOWEST} or more can be promised"
    steps = _some(len(promised), 12)
    return Chart(
        "promised-recall",
        title,
        f"Above the dotted line more was found than promised. Thresholds were calibrated on other "
        f"queries; a promise holds with {calibration.confidence:.0%} confidence, for the mean of "
        f"fresh queries of the same kind.",
        f"Line chart of the recall found on {where} queries against the recall promised, beside "
        f"the diagonal on which both are equal.",
        figure,
        ("promised", "found", "keys scanned"),
        tuple(
            (f"{promised[at]:.3f}", f"{found[at]:.3f}", percent(float(scanned[at]))) for at in steps
        ),
    )


def probes(data: ReportData, curves: Curves) -> Chart:
    """How many cells the test queries search at the default target."""
    manifest = data.manifest
    counts = np.array(curves.probes)
    figure, (axes,) = new_axes(7.4, 3.6)
    edges = np.unique(np.linspace(1, max(len(counts), 2), min(33, len(counts) + 1)).astype(int))
    heights = [int(counts[low:high].sum()) for low, high in pairwise(edges)]
    bars(axes, edges.astype(np.float64), heights, BLUE)
    values = np.repeat(np.arange(len(counts)), counts)
    middle, high = np.quantile(values, [0.5, 0.95])
    _mark(axes, float(middle) + 0.5, f"half: {middle:.0f} or fewer", "left")
    _mark(axes, float(high) + 0.5, f"95%: {high:.0f} or fewer", "left", lower=True)
    axes.set_xlim(1, len(counts))
    axes.set_xlabel(f"cells searched, of {manifest.n_cells}")
    axes.set_ylabel("test queries")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return Chart(
        "cells-searched",
        f"Half of the queries search {middle:.0f} of {manifest.n_cells} cells or fewer, and one in "
        f"twenty more than {high:.0f}",
        f"One threshold for all queries lets an easy one stop early and a hard one go on; here the "
        f"one for recall@{manifest.default_k} {manifest.default_recall:.2f}.",
        f"Histogram of the number of cells that {len(values)} test queries search.",
        figure,
        ("cells searched", "test queries"),
        tuple(
            (f"{low}" if after - low == 1 else f"{low} to {after - 1}", f"{height}")
            for (low, after), height in zip(pairwise(edges), heights, strict=True)
            if height
        ),
    )


def latency(timings: Timings) -> Chart:
    """Milliseconds of single queries, native above routed."""
    figure, (axes,) = new_axes(7.4, 3.8)
    native, routed = np.array(timings.native_ms), np.array(timings.routed_ms)
    low = max(min(native.min(), routed.min()) * 0.9, 1e-3)
    high = max(float(np.quantile(np.concatenate([native, routed]), 0.995)), low * 2)
    edges = np.geomspace(low, high, 33)
    rows = []
    for name, values, sign, colour in (
        ("native", native, 1, COLOURS["native"][0]),
        ("routed", routed, -1, BLUE),
    ):
        heights, _ = np.histogram(values.clip(low, high), edges)
        bars(axes, edges, [sign * int(height) for height in heights], colour)
        middle, p95 = np.quantile(values, [0.5, 0.95])
        tallest = int(heights.max())
        axes.plot([middle, middle], [0, sign * tallest * 1.2], color=INK, linewidth=1.1)
        axes.annotate(
            f"{name}, median {middle:.2f} ms",
            (middle, sign * tallest * 1.2),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
        )
        recall = timings.native_recall if name == "native" else timings.routed_recall
        rows.append(
            (
                name,
                f"{middle:.2f}",
                f"{p95:.2f}",
                f"{np.quantile(values, 0.99):.2f}",
                f"{recall:.3f}",
            )
        )
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set_xscale("log")
    axes.margins(y=0.16)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks([tick for tick in _MILLISECONDS if low <= tick <= high])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):.0f}"))
    axes.set_xlabel("milliseconds of one query, model and client included")
    axes.set_ylabel("queries")
    ratio = float(np.median(native) / np.median(routed))
    faster = (
        f"{ratio:.1f} times as fast as"
        if ratio >= 1.05
        else (f"{1 / ratio:.1f} times as slow as" if ratio <= 0.95 else "as fast as")
    )
    return Chart(
        "latency",
        f"Routed searches are {faster} native ones, at recall@{timings.k} "
        f"{timings.routed_recall:.3f}",
        f"{len(native)} queries, each searched natively and routed in turn, on the machine that "
        f"made this report: read the times as a ratio. The native search found recall@{timings.k} "
        f"{timings.native_recall:.3f}; the router was asked for {timings.target:.2f}."
        + (f" {timings.fallbacks} fell back to the native search." if timings.fallbacks else "")
        + (f" These times will not last. {timings.caveat}" if timings.caveat else ""),
        "Two histograms of the time that a query takes, native above the axis and routed below.",
        figure,
        ("search", "median ms", "p95 ms", "p99 ms", f"recall@{timings.k}"),
        tuple(rows),
    )


def _mark(axes: Axes, x: float, text: str, side: str, *, lower: bool = False) -> None:
    axes.axvline(x, color=INK, linewidth=1.1)
    axes.annotate(
        text,
        (x, 0.78 if lower else 0.95),
        xycoords=("data", "axes fraction"),
        xytext=(6 if side == "left" else -6, 0),
        textcoords="offset points",
        ha=side,
        va="top",
        color=INK,
        fontsize=9.5,
    )


def _share_axis(axes: Axes, least: float) -> None:
    axes.set_xscale("log")
    ticks = [tick for tick in _TICKS if tick >= least / 2]
    axes.set_xticks(ticks)
    axes.set_xlim(least / 1.35, 1.06)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g}%"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _some(count: int, wanted: int) -> list[int]:
    """Return some places out of ``count``, evenly."""
    places = np.linspace(0, count - 1, min(wanted, count)).round().astype(int)
    return sorted(set(places.tolist()))
