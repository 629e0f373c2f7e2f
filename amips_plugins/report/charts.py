"""The charts of a report. Each says in its title what it shows, and in a table the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter

from amips_plugins.bundle import Figure as Cost
from amips_plugins.curves import Curves, FlatMap
from amips_plugins.report.material import Live, Material
from amips_plugins.report.style import COLOURS, Chart, new_axes

__all__ = ["all_charts"]

_INK, _MUTED, _FAINT, _PAPER, _WASH = (
    COLOURS[name][0] for name in ("ink", "muted", "faint", "paper", "wash")
)
_BLUE, _ORANGE = COLOURS["linear"][0], COLOURS["supportnet"][0]
_NAMES = {
    "native": "nearest centroids",
    "linear": "linear router",
    "supportnet": "SupportNet",
    "keynet": "KeyNet",
}
_MARKS = {"native": "s", "linear": "o", "supportnet": "^", "keynet": "D"}
_DASHES = {"native": (4, 2), "linear": (), "supportnet": (7, 1.5), "keynet": (1, 1.2)}
_LABELLED = {"native": (0.74, "left"), "linear": (0.72, "right"), "supportnet": (0.62, "right")}
_LOWEST = 0.5  # recall: below, nobody wants to be
_MILLISECONDS = [step * 10.0**power for power in range(-3, 5) for step in (1, 2, 5)]
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def all_charts(material: Material) -> list[Chart]:
    """Draw what the material is enough for, in the order of the page."""
    charts = [recall_against_cost(material)]
    promised = promises(material)
    curves, live = material.curves, material.live
    charts += [] if promised is None else [promised]
    if curves is not None and curves.probes:
        charts.append(probes(material, curves))
    if live is not None and live.native_ms:
        charts.append(latency(live))
    if material.cells is not None:
        charts.append(cell_sizes(material))
    if curves is not None:
        charts.append(flat_map(curves.flat))
        if curves.epochs:
            charts.append(training(curves))
    return charts


def recall_against_cost(material: Material) -> Chart:
    """Recall against the share of the keys that it costs, a line a candidate."""
    manifest, curves = material.manifest, material.curves
    k, target = manifest.default_k, manifest.default_recall
    figure, (axes,) = new_axes(7.4, 4.3)
    costs = [cost for cost in manifest.figures if cost.k == k]
    names = list(dict.fromkeys(cost.candidate for cost in costs))
    least = 1.0
    for name in names:
        reached = [cost for cost in costs if cost.candidate == name and cost.total is not None]
        x, y = [float(cost.total or 1.0) for cost in reached], [cost.recall for cost in reached]
        marks = list(zip(x, y, strict=True))
        for line in curves.lines if curves is not None else ():
            if (line.candidate, line.k) == (name, k):
                x, y = line.total, line.recall
        shown = [(a, b) for a, b in zip(x, y, strict=True) if b >= _LOWEST]
        if not shown:
            continue
        least = min(least, shown[0][0])
        colour = COLOURS[name][0]
        axes.plot(*zip(*shown, strict=True), color=colour, dashes=_DASHES[name])
        axes.plot(
            [a for a, _ in marks],
            [b for _, b in marks],
            linestyle="none",
            marker=_MARKS[name],
            color=colour,
            markersize=6.5,
            markeredgecolor=_PAPER,
        )
        for cost in reached:
            if cost.low is not None and cost.high is not None:
                axes.plot([cost.low, cost.high], [cost.recall] * 2, color=colour, linewidth=1.1)
        _label_line(axes, shown, name, colour)
    axes.axhline(target, color=_INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.text(1.0, target, f"target {target:.2f}", ha="right", va="bottom", color=_INK, fontsize=9.5)
    _share_axis(axes, least)
    axes.set_ylim(_LOWEST, 1.005)
    axes.set_xlabel("cost of a query: keys scanned and the model itself, share of a full scan")
    axes.set_ylabel(f"recall@{k}")
    rows = tuple(
        (
            _NAMES[cost.candidate],
            f"{cost.recall:.2f}",
            _percent(cost.total),
            "-" if cost.low is None else f"{_percent(cost.low)} to {_percent(cost.high)}",
            _percent(cost.model),
            "-" if cost.n_probes is None else f"{cost.n_probes:.1f}",
        )
        for cost in costs
    )
    return Chart(
        "recall-against-cost",
        _cost_title(costs, manifest.choice, k, target),
        "Further left is cheaper, further up finds more. Marks are recalls .80, .90, .95 and .99 on "
        "test queries, which nothing was learned from or chosen on; the thin bars through them "
        "are 95 % bootstrap intervals over those queries."
        + ("" if curves is not None else " The run kept no curves, so that lines join the marks."),
        f"Line chart of recall@{k} against cost on a logarithmic axis, for "
        f"{_listed([_NAMES[name] for name in names])}. All rise towards the upper right, where every "
        f"key is scanned.",
        figure,
        ("search", "recall", "cost", "95 % interval", "of that the model", "cells"),
        rows,
    )


def _label_line(
    axes: Axes, shown: list[tuple[float, float]], name: str, colour: str
) -> None:
    height, side = _LABELLED.get(name, (0.8, "right"))
    at = int(np.argmin([abs(recall - height) for _, recall in shown]))
    right = side == "right"  # the text ends, or begins, at the line
    axes.annotate(
        _NAMES[name],
        shown[at],
        xytext=(-9 if right else 9, 5 if right else -5),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        color=colour,
        fontweight="bold",
    )


def _cost_title(costs: Sequence[Cost], choice: str, k: int, target: float) -> str:
    nearest = min((cost.recall for cost in costs), key=lambda recall: abs(recall - target))
    at = {cost.candidate: cost.total for cost in costs if cost.recall == nearest}
    native, best = at.get("native"), at.get(choice)
    wanted = f"recall@{k} {nearest:.2f}"
    if choice != "native" and best is not None and native is not None:
        return (
            f"The {_NAMES[choice]} reaches {wanted} at {_percent(best)} of a full scan; nearest "
            f"centroids take {_percent(native)}"
        )
    if choice != "native" and best is not None:
        return f"The {_NAMES[choice]} reaches {wanted} at {_percent(best)} of a full scan"
    if native is not None:
        return f"Nothing learned beats nearest centroids, which take {_percent(native)} for {wanted}"
    return f"Nothing short of a full scan reaches {wanted}"


def promises(material: Material) -> Chart | None:
    """Recall that was promised against recall that was found."""
    calibration = material.calibration
    if calibration is None:
        return None
    k = material.manifest.default_k
    kept = None if material.curves is None else material.curves.promises
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
    axes.plot([_LOWEST, 1], [_LOWEST, 1], color=_INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.fill_between(promised, promised, found, color=_WASH, linewidth=0)
    axes.plot(promised, found, color=_BLUE, marker="o", markersize=3.2, linewidth=1.4)
    axes.annotate(
        "promised = found",
        (0.62, 0.62),
        xytext=(6, -10),
        textcoords="offset points",
        color=_INK,
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
            color=_BLUE,
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
            (f"{promised[at]:.3f}", f"{found[at]:.3f}", _percent(float(scanned[at])))
            for at in steps
        ),
    )


def probes(material: Material, curves: Curves) -> Chart:
    """How many cells the test queries search at the default target."""
    manifest = material.manifest
    counts = np.array(curves.probes)
    figure, (axes,) = new_axes(7.4, 3.6)
    edges = np.unique(np.linspace(1, max(len(counts), 2), min(33, len(counts) + 1)).astype(int))
    heights = [int(counts[low:high].sum()) for low, high in pairwise(edges)]
    _bars(axes, edges.astype(np.float64), heights, _BLUE)
    values = np.repeat(np.arange(len(counts)), counts)
    middle, high = np.quantile(values, [0.5, 0.95])
    _mark(axes, float(middle) + 0.5, f"half: {middle:.0f} or fewer", "left")
    _mark(axes, float(high) + 0.5, f"95 %: {high:.0f} or fewer", "left", lower=True)
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


def latency(live: Live) -> Chart:
    """Milliseconds of single queries, native above routed."""
    figure, (axes,) = new_axes(7.4, 3.8)
    native, routed = np.array(live.native_ms), np.array(live.routed_ms)
    low = max(min(native.min(), routed.min()) * 0.9, 1e-3)
    high = max(float(np.quantile(np.concatenate([native, routed]), 0.995)), low * 2)
    edges = np.geomspace(low, high, 33)
    rows = []
    for name, values, sign, colour in (
        ("native", native, 1, COLOURS["native"][0]),
        ("routed", routed, -1, _BLUE),
    ):
        heights, _ = np.histogram(values.clip(low, high), edges)
        _bars(axes, edges, [sign * int(height) for height in heights], colour)
        middle, p95 = np.quantile(values, [0.5, 0.95])
        tallest = int(heights.max())
        axes.plot([middle, middle], [0, sign * tallest * 1.12], color=_INK, linewidth=1.1)
        axes.annotate(
            f"{name}, median {middle:.2f} ms",
            (middle, sign * tallest * 1.12),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
        )
        recall = live.native_recall if name == "native" else live.routed_recall
        rows.append(
            (name, f"{middle:.2f}", f"{p95:.2f}", f"{np.quantile(values, 0.99):.2f}", f"{recall:.3f}")
        )
    axes.axhline(0, color=_MUTED, linewidth=0.8)
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
    faster = f"{ratio:.1f} times as fast as" if ratio >= 1.05 else (
        f"{1 / ratio:.1f} times as slow as" if ratio <= 0.95 else "as fast as"
    )
    return Chart(
        "latency",
        f"Routed searches are {faster} native ones, at recall@{live.k} {live.routed_recall:.3f}",
        f"{len(native)} queries, each searched natively and routed in turn, on the machine that "
        f"made this report: read the times as a ratio. The native search found recall@{live.k} "
        f"{live.native_recall:.3f}; the router was asked for {live.target:.2f}."
        + (f" {live.fallbacks} fell back to the native search." if live.fallbacks else ""),
        "Two histograms of the time that a query takes, native above the axis and routed below.",
        figure,
        ("search", "median ms", "p95 ms", "p99 ms", f"recall@{live.k}"),
        tuple(rows),
    )


def cell_sizes(material: Material) -> Chart:
    """Keys in every cell, and where the answers lie."""
    assert material.cells is not None  # noqa: S101 - for the type checker
    sizes = np.sort(material.cells.sizes)[::-1]
    demand = None if material.curves is None else np.array(material.curves.demand)
    figure, (axes,) = new_axes(7.4, 3.8)
    _bars(axes, np.arange(len(sizes) + 1) + 0.5, [int(size) for size in sizes], _FAINT)
    even = float(sizes.mean())
    axes.axhline(even, color=_INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.annotate(
        f"mean {even:,.0f}",
        (len(sizes) + 0.5, even),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        color=_INK,
        fontsize=9.5,
    )
    title = (
        f"The largest of {len(sizes)} cells holds {sizes[0] / max(1, sizes.sum()):.1%} of the keys, "
        f"{sizes[0] / max(even, 1e-9):.1f} times the mean"
    )
    more = ""
    if demand is not None and len(demand) == len(sizes) and demand.sum():
        order = np.argsort(-material.cells.sizes, kind="stable")
        per_key = demand / demand.sum() * sizes.sum()
        axes.plot(
            np.arange(len(sizes)) + 1,
            per_key[order],
            linestyle="none",
            marker="D",
            markersize=4.2,
            color=_ORANGE,
        )
        at = int(per_key[order].argmax())
        axes.annotate(
            "top keys of test queries",
            (at + 1, per_key[order][at]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=_ORANGE,
            fontweight="bold",
        )
        busy = np.argsort(-(demand / material.cells.sizes.clip(1)), kind="stable")
        share = np.cumsum(demand[busy]) / demand.sum()
        held = np.cumsum(material.cells.sizes[busy]) / sizes.sum()
        half = int((share >= 0.5).argmax())
        title = f"Half of the answers lie in cells that hold {held[half]:.0%} of the keys"
        more = (
            " A diamond is where the bar would end if the keys were shared out as the answers of test "
            "queries are: above the bar a cell is asked for more than its size."
        )
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
    axes.scatter(*keys.T, s=5, color=_FAINT, linewidths=0, rasterized=True)
    centres, sizes = [], []
    for cell in np.unique(cells):
        inside = keys[cells == cell]
        centres.append(inside.mean(axis=0))
        sizes.append(len(inside))
    axes.scatter(
        *np.array(centres).T,
        s=np.array(sizes) / max(sizes) * 260,
        facecolors="none",
        edgecolors=_BLUE,
        linewidths=1.4,
    )
    axes.scatter(*queries.T, s=13, marker="x", color=_ORANGE, linewidths=1.0)
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    figure.legend(
        handles=[
            axes.scatter([], [], s=14, color=_FAINT, label=f"keys ({len(keys):,} of them)"),
            axes.scatter([], [], s=90, facecolors="none", edgecolors=_BLUE, label="cells, by size"),
            axes.scatter([], [], s=22, marker="x", color=_ORANGE, label="test queries"),
        ],
        loc="outside lower left",
        ncols=3,
        frameon=False,
        labelcolor=_INK,
        handletextpad=0.2,
    )
    apart = flat.shift >= 0.25
    return Chart(
        "map",
        "Queries lie apart from the keys, which is what routing learns"
        if apart
        else "Queries lie where the keys lie",
        f"The first two principal axes hold {flat.variance:.0%} of the variance: what is near here may "
        f"be far in truth. The means of queries and keys are {flat.shift:.2f} of the keys' spread "
        f"apart, in all dimensions.",
        "Scatter plot of keys as dots, cells as circles of their size, and test queries as crosses.",
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


def training(curves: Curves) -> Chart:
    """Loss and cost by epoch."""
    figure, (left, right) = new_axes(7.4, 3.5, columns=2)
    rows = []
    best = {}
    for epochs in curves.epochs:
        name, colour = epochs.candidate, COLOURS[epochs.candidate][0]
        x = np.arange(1, len(epochs.loss) + 1)
        for axes, values in ((left, epochs.loss), (right, epochs.cost)):
            axes.plot(
                x, values, color=colour, dashes=_DASHES[name], marker=_MARKS[name], markersize=5
            )
        best[name] = min(epochs.cost)
        pairs = zip(epochs.loss, epochs.cost, strict=True)
        rows += [
            (_NAMES[name], f"{at}", f"{loss:.4g}", _percent(cost))
            for at, (loss, cost) in enumerate(pairs, start=1)
        ]
        at = int(np.argmin(epochs.cost))
        right.plot(
            [at + 1], [epochs.cost[at]], "o", ms=12, fillstyle="none", color=colour, mew=1.2
        )
    _label_ends(right, curves)
    left.set_title("training loss", loc="left", fontsize=10.5, color=_INK)
    right.set_title("cost on validation queries", loc="left", fontsize=10.5, color=_INK)
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    winner = min(best, key=lambda name: best[name])
    return Chart(
        "training",
        f"The {_NAMES[winner]} came down to {_percent(best[winner])} of a full scan on validation "
        f"queries",
        "Losses of different nets are not comparable; costs are: the mean over recalls around the "
        "target, model included. The ringed epoch is the one that was kept.",
        f"Two line charts by epoch, of the training loss and of the cost, for "
        f"{_listed([_NAMES[name] for name in best])}.",
        figure,
        ("model", "epoch", "loss", "cost"),
        tuple(rows),
    )


def _label_ends(axes: Axes, curves: Curves) -> None:
    """Name the lines at their ends, the higher one above."""
    ends = sorted(curves.epochs, key=lambda epochs: -epochs.cost[-1])
    for place, epochs in enumerate(ends):
        axes.annotate(
            _NAMES[epochs.candidate],
            (len(epochs.cost), epochs.cost[-1]),
            xytext=(0, 10 if place == 0 and len(ends) > 1 else -16),
            textcoords="offset points",
            ha="right",
            color=COLOURS[epochs.candidate][0],
            fontweight="bold",
        )


def _bars(
    axes: Axes, edges: npt.NDArray[np.float64], heights: Sequence[int], colour: str
) -> None:
    axes.bar(
        edges[:-1],
        heights,
        width=np.diff(edges),
        align="edge",
        color=colour,
        edgecolor=_PAPER,
        linewidth=0.6,
    )


def _mark(axes: Axes, x: float, text: str, side: str, *, lower: bool = False) -> None:
    axes.axvline(x, color=_INK, linewidth=1.1, linestyle=(0, (1, 2)))
    axes.annotate(
        text,
        (x, 0.78 if lower else 0.95),
        xycoords=("data", "axes fraction"),
        xytext=(6 if side == "left" else -6, 0),
        textcoords="offset points",
        ha=side,
        va="top",
        color=_INK,
        fontsize=9.5,
    )


def _share_axis(axes: Axes, least: float) -> None:
    axes.set_xscale("log")
    ticks = [tick for tick in _TICKS if tick >= least / 2]
    axes.set_xticks(ticks)
    axes.set_xlim(least / 1.35, 1.06)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:g} %"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.3g} %"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _some(count: int, wanted: int) -> list[int]:
    """Return some places out of ``count``, evenly."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()
