"""How a Milvus collection is built."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from amips_plugins.adapters.milvus.opening import describe_index
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.collection.construction import Construction
from amips_plugins.collection.sizing import Kept

__all__ = ["MANY_GRAPHS", "describe_milvus", "fan_out_notes"]

_SERVER_FROM = 100_000  # keys: below, a call costs more than what cells save
_LITE_FROM = 1_000
_LITE_LISTS = 128
_IDS = 200  # texts whose length is looked at
MANY_GRAPHS = 8  # below, a search of all of them is cheap enough (docs/performance.md)
_STATES = ("index_type", "metric_type", "field_name", "index_name")
_PROGRESS = ("total_rows", "indexed_rows", "pending_index_rows", "state")


def describe_milvus(table: Table) -> Construction:
    """Look at index, segments and partitions."""
    index = describe_index(table)
    built = _built(table, index)
    return built if table.is_lite else replace(built, kept=_kept(table, index))


def _kept(table: Table, index: Mapping[str, Any]) -> Kept:
    id_bytes = 8.0
    if table.string_keys:
        rows = next(table.pages(_IDS, 1 << 20, [table.key]), [])
        id_bytes = sum(len(row[table.key].encode()) for row in rows) / max(1, len(rows))
    mapped = {**(table.raw.get("properties") or {}), **index}.get("mmap.enabled")
    version = re.match(r"v?(\d+)\.(\d+)", str(table.client.get_server_version()))
    return Kept(
        str(index.get("index_type", "FLAT")).upper(),
        str(mapped).lower() == "true",
        id_bytes,
        version is not None and (int(version[1]), int(version[2])) >= (2, 5),
    )


def _built(table: Table, index: Mapping[str, Any]) -> Construction:
    kind = str(index.get("index_type", "none")).upper()
    facts = (
        ("server", "Milvus Lite" if table.is_lite else str(table.client.get_server_version())),
        ("index", _index(kind, index)),
        ("segments", _segments(table, index)),
        ("partitions", _partitions(table)),
    )
    if table.is_lite:
        return _lite(kind, facts)
    if kind == "FLAT":  # there is nothing to build, and no segment says that it has it
        return Construction(facts, worth_from=_SERVER_FROM)
    rows = table.count()
    unindexed = max(0, rows - _indexed(table))
    notes: tuple[str, ...] = ()
    if unindexed:
        notes = (
            f"{unindexed:,} of {rows:,} rows are in segments without an index, and every search "
            f"scans them: flush, and wait for the index.",
        )
    segments = sum(bool(part.index_name) for part in table.client.list_loaded_segments(table.name))
    if table.cells is None:
        notes += fan_out_notes(segments)
    if unindexed > rows / 2:
        return Construction(facts, worth_from=_SERVER_FROM, notes=notes)
    if kind.startswith(("IVF", "SCANN")):
        lists = str(index.get("nlist", ""))
        return Construction(
            facts, "lists", int(lists) if lists.isdigit() else None, _SERVER_FROM, "", notes
        )
    if kind == "DISKANN":
        return Construction(facts, "graph", worth_from=_SERVER_FROM, notes=notes, graphs=segments)
    which = "which beat cells in every comparison"
    if table.cells is None and segments >= MANY_GRAPHS:
        which = f"which beat cells that are scanned; for its {segments} segments see the note"
    obstacle = f"its index is a graph in memory, {which}"
    if kind == "AUTOINDEX":
        obstacle = f"AUTOINDEX is a graph in memory by default, {which}"
    return Construction(facts, "graph", None, _SERVER_FROM, obstacle, notes, graphs=segments)


def fan_out_notes(segments: int) -> tuple[str, ...]:
    """Say what a search of many indexed segments costs, and the cheaper cure first."""
    if segments < MANY_GRAPHS:
        return ()
    return (
        f"Every search asks all {segments} indexed segments, and costs that many times what one "
        f"takes: first let Milvus make larger ones (dataCoord.segment.maxSize, then compact); "
        f"cells with an index each (amips train --index hnsw) are for what is left.",
    )


def _lite(kind: str, facts: tuple[tuple[str, str], ...]) -> Construction:
    if kind.startswith("IVF"):  # it makes 128 lists whatever it was told, and says nothing of it
        return Construction(facts, "lists", _LITE_LISTS, _LITE_FROM)
    if kind in ("FLAT", "BRUTE_FORCE"):
        return Construction(facts, worth_from=_LITE_FROM)
    return Construction(facts, "graph", worth_from=_LITE_FROM, graphs=1)


def _index(kind: str, index: Mapping[str, Any]) -> str:
    left_out = (*_STATES, *_PROGRESS)
    found = ", ".join(
        f"{key} {value}" for key, value in sorted(index.items()) if key not in left_out
    )
    return f"{kind} ({found})" if found else kind


def _segments(table: Table, index: Mapping[str, Any]) -> str:
    if table.is_lite:  # it knows no segments
        pending = int(index.get("pending_index_rows", 0))
        return f"{pending:,} rows wait for the index" if pending else "every row is indexed"
    loaded = table.client.list_loaded_segments(table.name)
    indexed = sum(bool(part.index_name) for part in loaded)
    growing = sum(part.state_name == "Growing" for part in loaded)
    return f"{len(loaded)} loaded, {indexed} of them indexed, {growing} still growing"


def _indexed(table: Table) -> int:
    """Count the rows in indexed segments; one that still grows may not be listed at all."""
    loaded = table.client.list_loaded_segments(table.name)
    return sum(int(part.num_rows) for part in loaded if part.index_name)


def _partitions(table: Table) -> str:
    return ", ".join(_named(table)) or "one"


def _named(table: Table) -> Iterator[str]:
    if table.cells is not None and table.cells.storage == "partitions":
        yield f"{table.cells.n_cells} cells"
    if any(field.get("is_partition_key") for field in table.raw["fields"]):
        yield "by a partition key"
    own = table.own_partitions()
    if own:
        yield f"{len(own)} of its owner's"
