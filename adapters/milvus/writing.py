"""Writing rows of one physical collection of Milvus where they belong, and nowhere else."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.milvus.cells import CELL_FIELD, SKETCH_FIELD
from amips_plugins.adapters.milvus.shared_rows import write_shared_rows
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.collection import Id
from amips_plugins.errors import CollectionError
from amips_plugins.sketch import sketch
from amips_plugins.vectors import IntArray

__all__ = ["write_rows"]

_ROWS = 5_000  # in one call
_WRITE_BYTES = 8 << 20  # the fields beside the vector come on top
_CONTESTS = 10  # times that one key is fought for with other writers
_TICK_SECONDS = 0.2  # in which a server answers two strongly consistent readers at once


def write_rows(
    table: Table,
    rows: Sequence[dict[str, Any]],
    cells: IntArray | None,
    *,
    new: bool = False,
    moved: bool = False,
) -> None:
    """Put rows into their cells, in place of rows with the same ids wherever they lie.

    A new row has been accepted before the old one goes, so what is refused changes nothing
    that was there, and a writer that dies in between loses nothing. ``new`` says that no such
    row is there, ``moved`` that the rows are in the overflow now. Where keys may lie in several
    cells, these are ``(n, width)``, and the rows are written as ``shared_rows`` says.
    """
    size = max(1, min(_ROWS, _WRITE_BYTES // (4 * table.info.dim + 256)))
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        chosen = np.full(len(some), OVERFLOW) if cells is None else cells[start : start + size]
        if table.shares_keys:
            write_shared_rows(table, some, chosen, new=new, moved=moved)
        elif new:
            _put(table, some, chosen, table.client.insert)
        elif table.is_lite:
            _write_lite(table, some, chosen)
        else:
            _write(table, some, chosen, moved=moved)


def _write(table: Table, rows: Sequence[dict[str, Any]], cells: IntArray, *, moved: bool) -> None:
    if not table.in_partitions:
        _put(table, rows, cells, table.client.upsert)
        return
    written: list[int] = []
    try:
        for places in _by_cell(cells):
            _put(table, [rows[place] for place in places], cells[places], table.client.upsert)
            written += places
    except Exception:
        with contextlib.suppress(Exception):  # the error that is told is the first one
            _tidy(table, [rows[place] for place in written], cells[written], moved=moved)
        raise
    _tidy(table, rows, cells, moved=moved)


def _tidy(table: Table, rows: Sequence[dict[str, Any]], cells: IntArray, *, moved: bool) -> None:
    """Take away what rows just written have left where they were before."""
    if moved and rows:
        ids = [row[table.key] for row in rows]
        # An older row in a cell goes before the one in the overflow, which tells that it is older.
        if table.count(table.where_ids(ids), table.cell_partitions()) > len(ids):
            _delete_elsewhere(table, ids, cells)
        else:
            for partition in table.overflow_partitions():
                table.delete_in(partition, ids)
    if rows:
        _keep_one(table, rows, cells)


def _write_lite(table: Table, rows: Sequence[dict[str, Any]], cells: IntArray) -> None:
    """Insert: Milvus Lite reads the newest row of an id, where an upsert keeps old fields.

    Only a search of single partitions would still find a row that lies in another one, and a
    delete takes all rows of an id. So they go after the new ones have been accepted, all by
    one call, and these are inserted again.
    """
    ids = [row[table.key] for row in rows]
    there = table.which(ids)
    if not there or len(table.partitions()) == 1:
        _put(table, rows, cells, table.client.insert)
        return
    again = list(range(len(rows)))
    if len(_by_cell(cells)) > 1:
        table.client.insert(table.name, list(rows))
    else:
        _put(table, rows, cells, table.client.insert)
        again = [place for place in again if ids[place] in there]
    table.delete([ids[place] for place in again])
    _put(table, [rows[place] for place in again], cells[again], table.client.insert)


def _put(
    table: Table, rows: Sequence[dict[str, Any]], cells: IntArray, put: Callable[..., Any]
) -> None:
    """Hand rows to a method of the client, by partition or with their cells."""
    if table.cells is None:
        put(table.name, list(rows))
    elif table.cells.storage == "field":
        put(table.name, _with_cells(table, rows, cells))
    else:
        for places in _by_cell(cells):
            partition = table.cells.partition(int(cells[places[0]]))
            put(table.name, [rows[place] for place in places], partition_name=partition)


def _with_cells(
    table: Table, rows: Sequence[dict[str, Any]], cells: IntArray
) -> list[dict[str, Any]]:
    found = [{**row, CELL_FIELD: cell} for row, cell in zip(rows, cells.tolist(), strict=True)]
    if table.has_sketches:
        placed = np.flatnonzero(cells != OVERFLOW).tolist()
        vectors = table.vectors([rows[place] for place in placed])
        for row in found:
            row[SKETCH_FIELD] = 0
        for place, beside in zip(placed, sketch(vectors, table.info.metric), strict=True):
            found[place][SKETCH_FIELD] = int(beside)
    return found


def _keep_one(table: Table, rows: Sequence[dict[str, Any]], cells: IntArray) -> None:
    """Delete the copies that rows just written have in other cells.

    Two writers who move one key at the same time take each the other's row for such a copy,
    and both rows are gone. So whoever has deleted looks again, and writes again if need be.
    """
    ids = [row[table.key] for row in rows]
    for attempt in range(_CONTESTS):
        if table.count(table.where_ids(ids)) <= len(ids):
            return
        _delete_elsewhere(table, ids, cells)
        if len(table.which(ids)) == len(ids):
            return
        time.sleep(random.uniform(0.0, _TICK_SECONDS * 2**attempt))  # noqa: S311 - to take turns
        there = table.which(ids)
        gone = [place for place, key in enumerate(ids) if key not in there]
        _put(table, [rows[place] for place in gone], cells[gone], table.client.upsert)
    raise CollectionError(
        f"Others write some of these keys of {table.name!r} all the time; write them again."
    )


def _delete_elsewhere(table: Table, ids: Sequence[Id], cells: IntArray) -> None:
    # Nothing says where a row lies, so every partition is told which ids are not its own.
    assert table.cells is not None  # noqa: S101 - for the type checker
    own = [table.cells.partition(cell) for cell in cells.tolist()]
    for partition in table.overflow_last():
        strange = [key for key, home in zip(ids, own, strict=True) if home != partition]
        table.delete_in(partition, strange)


def _by_cell(cells: IntArray) -> list[list[int]]:
    """Return the places of each cell's rows."""
    return [np.flatnonzero(cells == cell).tolist() for cell in np.unique(cells)]
