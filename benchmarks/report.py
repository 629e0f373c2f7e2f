"""Tables of the benchmark, in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.rows import Row

__all__ = ["TITLES", "cost_table", "promise_table", "table"]

TITLES = {
    "unseen": "Queries never seen",
    "noise-split": "Noisy copies first, then split: FLATTERS every learned router",
    "zipf": "Repeated traffic (Zipf)",
}
_COLUMNS = ((1, 0.90), (1, 0.95), (10, 0.90), (10, 0.95), (10, 0.99))
_LAYOUTS = ("native", "query-aware")
_ROUTERS = ("centroids-kmeans", "centroids", "centroids-threshold", "linear", "supportnet")

Key = tuple[int, str, str]


def cost_table(rows: Iterable[Row], protocol: str) -> str:
    """Return total cost (scanned + model, share of the keys), mean and deviation over seeds."""
    found: dict[Key, dict[tuple[int, float], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.protocol == protocol:
            found[row.cells, row.layout, row.router][row.k, row.recall].append(row)
    heading = ["cells", "layout", "router", "seeds", "model", *map(_target, _COLUMNS)]
    lines = []
    for key in sorted(found, key=_order):
        cells = found[key]
        model = np.mean([row.model for row in cells[_COLUMNS[0]]])
        seeds = len(cells[_COLUMNS[0]])
        totals = [_mean([row.total for row in cells[column]]) for column in _COLUMNS]
        lines.append([str(key[0]), key[1], key[2], str(seeds), f"{model:.4f}", *totals])
    return table(heading, lines)


def promise_table(rows: Iterable[Row], protocol: str) -> str:
    """Return the recall on the test queries of thresholds chosen on calibration queries.

    Each entry is the recall where calibration reached the target, and, in brackets, recall and
    total cost where calibration guarantees it.
    """
    found: dict[Key, dict[tuple[int, float], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.protocol == protocol and row.calibrated is not None:
            found[row.cells, row.layout, row.router][row.k, row.recall].append(row)
    heading = ["cells", "layout", "router", *map(_target, _COLUMNS)]
    lines = []
    for key in sorted(found, key=_order):
        entries = [_promise(found[key][column]) for column in _COLUMNS]
        lines.append([str(key[0]), key[1], key[2], *entries])
    return table(heading, lines)


def _promise(rows: Sequence[Row]) -> str:
    calibrated, promised, total = (
        [value for value in values if value is not None]
        for values in zip(
            *((row.calibrated, row.promised, row.promised_total) for row in rows), strict=True
        )
    )
    text = f"{np.mean(calibrated):.3f}"
    if promised:
        text += f" ({np.mean(promised):.3f} at {np.mean(total):.4f})"
    return text


def _order(key: Key) -> tuple[int, int, int, str]:
    cells, layout, router = key
    place = _ROUTERS.index(router) if router in _ROUTERS else len(_ROUTERS)
    return cells, _LAYOUTS.index(layout), place, router


def _target(target: tuple[int, float]) -> str:
    k, recall = target
    return f"top-1 {recall:.2f}" if k == 1 else f"recall@{k} {recall:.2f}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{np.mean(known):.4f}"
    if len(known) > 1:
        text += f" ± {np.std(known, ddof=1):.4f}"
    return text + (f" ({len(known)} of {len(values)})" if len(known) < len(values) else "")


def table(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    widths = [max(len(line[at]) for line in (heading, *lines)) for at in range(len(heading))]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "| "
        + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True))
        + " |"
        for line in (heading, rule, *lines)
    )
