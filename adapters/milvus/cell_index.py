"""The vector index that a copy in cells gets, and how the cells are then searched through it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from amips_plugins.cell_layout import CellIndex
from amips_plugins.tuning import CODE_CANDIDATES, lists_in_cells
from amips_plugins.vectors import Metric

__all__ = [
    "INDEXED_FROM",
    "SCANNED",
    "IndexSearch",
    "index_arguments",
    "index_search",
    "is_scanned",
    "unindexed_cells",
]

INDEXED_FROM = 1_024
"""Rows below which a server builds no index over a segment, and scans it."""

_HNSW = {"M": 16, "efConstruction": 200}
_STATE = ("total_rows", "indexed_rows", "pending_index_rows", "state")
_KINDS = {"flat": "FLAT", "hnsw": "HNSW", "ivf_flat": "IVF_FLAT", "ivf_sq8": "IVF_SQ8"}
_MOST_LISTS = 65_536
_OTHER_CODES = 16.0  # candidates for every hit of the coarsest codes, and of codes not known here
_THOROUGH = 4.0  # times as many of a search that others are judged by


@dataclass(frozen=True, slots=True)
class IndexSearch:
    """How keys are searched through an index.

    Attributes
    ----------
    kind
        Whether every key is compared, or those of some lists, or those that a graph leads to.
    lists
        How many lists there are, at most.
    oversampling
        How many candidates are fetched for every hit, to be scored by their vectors; 1 where the
        index' own scores are the vectors'.
    reranks
        The parameter by which the server itself scores candidates again by their vectors, and how
        many of them for every hit; empty where it does not.
    """

    kind: Literal["scan", "lists", "graph"] = "scan"
    lists: int = _MOST_LISTS
    oversampling: float = 1.0
    reranks: tuple[str, float] | tuple[()] = ()

    def candidates(self, k: int) -> int:
        """Return how many keys to fetch for k hits."""
        return math.ceil(self.oversampling * k)

    def thorough(self) -> IndexSearch:
        """Return the search that others are judged by."""
        more = _THOROUGH if self.oversampling > 1.0 else 1.0
        return replace(self, oversampling=more * self.oversampling)


SCANNED = IndexSearch()
"""The search of what has no index."""


def index_search(index: Mapping[str, Any]) -> IndexSearch:
    """Say how keys are searched through an index that Milvus describes so."""
    kind = str(index.get("index_type", "FLAT")).upper()
    if is_scanned(index):
        return SCANNED
    if not kind.startswith(("HNSW", "IVF")) and kind != "SCANN":  # AUTOINDEX, DISKANN: their own
        return IndexSearch("graph")
    told = str(index.get("nlist", ""))
    lists = min(int(told), _MOST_LISTS) if told.isdigit() else _MOST_LISTS
    shape: Literal["lists", "graph"] = "graph" if kind.startswith("HNSW") else "lists"
    if kind in ("HNSW", "IVF_FLAT"):
        return IndexSearch(shape, lists)
    more = CODE_CANDIDATES.get(kind, _OTHER_CODES)
    if kind == "SCANN" and str(index.get("with_raw_data", True)).lower() != "false":
        return IndexSearch(shape, lists, reranks=("reorder_k", more))
    if str(index.get("refine", False)).lower() == "true":
        return IndexSearch(shape, lists, reranks=("refine_k", more))
    return IndexSearch(shape, lists, more)


def index_arguments(
    wanted: CellIndex,
    source: Mapping[str, Any] | None,
    field: str,
    metric: Metric,
    rows_per_cell: float,
    *,
    is_lite: bool,
    lists: int | None = None,
) -> dict[str, Any]:
    """Return the arguments of pymilvus' ``add_index`` for the vectors of a copy.

    ``source`` describes the source's index of that field, None where there is none. A kind that the
    source has keeps the source's parameters, unless the bundle's targets are for so many ``lists``.
    """
    kind = str((source or {}).get("index_type", "FLAT")).upper()
    own = wanted != "ivf_sq8" or lists is None
    if source is not None and wanted != "flat" and _KINDS.get(wanted, kind) == kind and own:
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
    if chosen in ("IVF_FLAT", "IVF_SQ8"):
        told = {"nlist": lists or lists_in_cells(rows_per_cell)}
        # Milvus Lite looks for the number one level deeper than pymilvus writes it.
        arguments["params"] = {"params": json.dumps(told)} if is_lite else told
    return arguments


def is_scanned(index: Mapping[str, Any]) -> bool:
    """Tell whether an index is none: nothing is built, and no segment says that it has it."""
    return str(index.get("index_type", "FLAT")).upper() in ("FLAT", "BRUTE_FORCE")


def unindexed_cells(sizes: Sequence[int], keys: int, n_cells: int) -> int:
    """Count the cells that are too small for an index, by the mean where sizes are not known."""
    if not sizes:
        return n_cells if keys / max(1, n_cells) < INDEXED_FROM else 0
    return sum(size < INDEXED_FROM for size in sizes)
