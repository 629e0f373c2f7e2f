"""Keys in cells that somebody has since written to the overflow, and searches without them.

A client that knows nothing of cells upserts into Milvus' default partition, and the rows in the
cells stay until a backfill. A server answers with the better of the two, be it the older one. So
where there is overflow, an answer's keys are looked up there, and what is found there is searched
there only.
"""

from __future__ import annotations

from collections.abc import Collection as SomeOf
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from amips_plugins.adapters.milvus.search import Call
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.collection import Id

__all__ = ["MOST_ROUNDS", "around", "overwritten", "without"]

MOST_ROUNDS = 4
"""Searches for one, at most: each may bring up more keys that were written since."""

_MAX_IDS = 5_000  # in one expression


def overwritten(
    table: Table,
    ids: Iterable[Id],
    searched: Iterable[Sequence[str] | None],
    there: Sequence[str],
    timeout: float | None,
) -> set[Id]:
    """Return those of the ids found that lie in the overflow and in a cell that was searched.

    ``searched`` holds the partitions of each call, None for all that are ``there``.
    """
    others = table.overflow_partitions(there)
    newer = _lying_in(table, others, set(ids), timeout)
    cells = sorted({name for named in searched for name in named or there} - {*others})
    return _lying_in(table, cells, newer, timeout) if newer and cells else set()


def _lying_in(
    table: Table, partitions: Sequence[str], ids: SomeOf[Id], timeout: float | None
) -> set[Id]:
    # The node that has just answered has seen whatever was in that answer: nothing waits here.
    some = list(ids)
    return {
        row[table.key]
        for start in range(0, len(some), _MAX_IDS)
        for row in table.client.query(
            table.name,
            filter=table.where_ids(some[start : start + _MAX_IDS]),
            output_fields=[table.key],
            partition_names=list(partitions),
            consistency_level="Eventually",
            timeout=timeout,
        )
    }


def without(
    arguments: dict[str, Any], ids: SomeOf[Id], table: Table, there: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the arguments of calls that find these ids in the overflow only."""
    others = table.overflow_partitions(there)
    named = arguments["partition_names"] or there
    cells = [name for name in named if name not in others]
    left_out = f"not ({table.where_ids(sorted(ids))})"
    condition = table.all_of(arguments.get("filter") or "", left_out)
    calls = [{**arguments, "filter": condition, "partition_names": cells}] if cells else []
    asked = [name for name in named if name in others]
    return calls + ([{**arguments, "partition_names": asked}] if asked else [])


def around(
    calls: Sequence[Call], ids: SomeOf[Id], table: Table, there: Sequence[str]
) -> list[Call]:
    """Return calls that find these ids in the overflow only."""
    return [
        replace(call, arguments=arguments)
        for call in calls
        for arguments in without(call.arguments, ids, table, there)
    ]
