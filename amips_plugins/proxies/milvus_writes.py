"""Writes through a Milvus client, which leave no row in a stale cell, and counts of keys."""

from __future__ import annotations

from typing import Any

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.milvus.cells import CELL_FIELD
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.proxies.calls import Call, RoutedCollection
from amips_plugins.proxies.client import Method, Show, changing
from amips_plugins.proxies.records import of_others
from amips_plugins.routing.effects import Effects, InThread
from amips_plugins.routing.router import LearnedRouter

__all__ = ["writes"]


def writes(routed: RoutedCollection, show_rows: Show) -> dict[str, Method]:
    """Return the proxy's methods that write rows or count them."""

    def laid_out(name: Any) -> Effects[tuple[LearnedRouter, Table] | None]:
        """Return the router and the table in cells that a name means, or None."""
        router = yield from routed.of(str(name), look=routed.router is not None)
        collection = None if router is None else router.collection
        if router is None or not isinstance(collection, MilvusCollection):
            return None
        laid_out = collection.partitions is None and collection.layout()
        return (router, collection.table()) if laid_out else None

    def count(_: Any, __: Call, given: dict[str, Any]) -> Effects[dict[str, Any] | None]:
        """Count keys, of which one may have a row in each of several cells."""
        if given.get("output_fields") != ["count(*)"] or given.get("partition_names"):
            return None
        found = yield from laid_out(given["collection_name"])
        if found is None or not found[1].shares_keys:
            return None
        table, asked, ids = found[1], given.get("filter") or "", given.get("ids")
        if ids is not None and not asked:  # the client takes either, and [] for no condition
            ids = [ids] if isinstance(ids, int | str) else ids
            asked = table.where_ids(ids) if ids else ""
            given = {**given, "ids": None}
        return {**given, "filter": table.all_of(asked, table.no_copies)}

    def insert(_: Any, __: Call, given: dict[str, Any]) -> Effects[dict[str, Any]]:
        yield from ()
        return {**given, "data": _rows(given["data"], {})}

    def upsert(_: Any, __: Call, given: dict[str, Any]) -> Effects[dict[str, Any]]:
        """Say that the rows have no cell: an upsert may keep what it does not name."""
        found = yield from laid_out(given["collection_name"])
        in_field = found is not None and not _in_partitions(found[1])
        return {**given, "data": _rows(given["data"], {CELL_FIELD: OVERFLOW} if in_field else {})}

    def place(_: Call, given: dict[str, Any]) -> Effects[None]:
        """Have the router write the rows too: an upsert leaves copies in the cells' partitions."""
        found = yield from laid_out(given["collection_name"])
        if found is None or not _in_partitions(found[1]) or given.get("partial_update"):
            return
        router, table = found
        rows = _rows(given["data"], {})
        rows = [rows] if isinstance(rows, dict) else rows
        ids = [row.pop(table.key) for row in rows]
        vectors = [row.pop(table.info.field) for row in rows]
        yield InThread(lambda: router.upsert(ids, vectors, rows))

    return {
        "insert": changing(routed, insert),
        "upsert": changing(routed, upsert, place),
        "query": changing(routed, count, show=show_rows),
    }


def _in_partitions(table: Table) -> bool:
    return table.cells is not None and table.cells.storage == "partitions"


def _rows(data: Any, more: dict[str, int]) -> Any:
    if isinstance(data, dict):
        return {**of_others(data), **more}
    return [_rows(row, more) for row in data] if isinstance(data, list) else data
