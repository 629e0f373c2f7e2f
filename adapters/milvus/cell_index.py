"""The vector index that a copy in cells gets: exact, the source's own, or one of a kind."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from amips_plugins.cell_layout import CellIndex
from amips_plugins.vectors import Metric

__all__ = ["INDEXED_FROM", "index_arguments", "is_scanned", "unindexed_cells"]

INDEXED_FROM = 1_024
"""Rows below which a server builds no index over a segment, and scans it."""

_HNSW = {"M": 16, "efConstruction": 200}
_STATE = ("total_rows", "indexed_rows", "pending_index_rows", "state")
_KINDS = {"flat": "FLAT", "hnsw": "HNSW", "ivf_flat": "IVF_FLAT"}


def index_arguments(
    wanted: CellIndex,
    source: Mapping[str, Any] | None,
    field: str,
    metric: Metric,
    rows_per_cell: float,
    *,
    is_lite: bool,
) -> dict[str, Any]:
    """Return the arguments of pymilvus' ``add_index`` for the vectors of a copy.

    ``source`` describes the source's index of that field, None where there is none. A kind that the
    source has keeps the source's parameters.
    """
    kind = str((source or {}).get("index_type", "FLAT")).upper()
    if source is not None and wanted != "flat" and _KINDS.get(wanted, kind) == kind:
        return {name: value for name, value in source.items() if name not in _STATE}
    chosen = _KINDS.get(wanted, "FLAT")
    arguments: dict[str, Any] = {
        "field_name": field,
        "index_name": field,
        "index_type": chosen,
        "metric_type": metric.name,
    }
    if chosen == "HNSW":
        arguments["params"] = dict(_HNSW)
    if chosen == "IVF_FLAT":
        lists = {"nlist": max(1, round(math.sqrt(rows_per_cell)))}
        # Milvus Lite looks for the number one level deeper than pymilvus writes it.
        arguments["params"] = {"params": json.dumps(lists)} if is_lite else lists
    return arguments


def is_scanned(index: Mapping[str, Any]) -> bool:
    """Tell whether an index is none: nothing is built, and no segment says that it has it."""
    return str(index.get("index_type", "FLAT")).upper() in ("FLAT", "BRUTE_FORCE")


def unindexed_cells(sizes: Sequence[int], keys: int, n_cells: int) -> int:
    """Count the cells that are too small for an index, by the mean where sizes are not known."""
    if not sizes:
        return n_cells if keys / max(1, n_cells) < INDEXED_FROM else 0
    return sum(size < INDEXED_FROM for size in sizes)
