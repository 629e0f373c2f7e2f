"""Rows of keys that lie in several cells of Milvus: one in the partition of each, of one write.

A server takes equal ids in several partitions, and answers, reads and deletes them as one; only a
count tells them apart. No write reaches two partitions at once. So the rows of a key in several
cells carry the stamp of their write and the list of its cells: whoever has written looks whether
all of them are his, and writes again if not, and what a writer that was killed has left shows.
"""

from __future__ import annotations

import contextlib
import heapq
import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.milvus.cells import (
    CELLS_FIELD,
    COPY_FIELD,
    SKETCH_FIELD,
    STAMP_FIELD,
    CellProperties,
)
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.collection import Id
from amips_plugins.errors import CollectionError
from amips_plugins.sketch import sketch
from amips_plugins.vectors import IntArray

__all__ = ["last_rows", "mend_torn", "torn_keys", "write_shared_rows"]

_CONTESTS = 10  # times that one key is fought for with other writers
_TICK_SECONDS = 0.2  # in which a server answers two strongly consistent readers at once
_COUNTED = 2_000  # keys of which rows are counted at once
_MENDED = 500  # keys
_PAGE = 1_000  # rows of each of the cells, which are read side by side
_READ_BYTES = 1 << 30  # no vector is read

_Homes = Sequence[Sequence[int]]
"""The cells of every row, its own first, each once."""


def write_shared_rows(
    table: Table, rows: Sequence[dict[str, Any]], cells: IntArray, *, new: bool, moved: bool
) -> None:
    """Put rows into all of their cells (see ``writing.write_rows``).

    The rows in the keys' own cells go first: what is refused is refused there.
    """
    homes = [list(dict.fromkeys(row)) for row in cells.reshape(len(rows), -1).tolist()]
    put = table.client.insert if new else table.client.upsert
    marked = _marked(table, rows, homes)
    written: list[int] = []
    try:
        for cell, places in _by_cell([few[:1] for few in homes]):
            _put(table, put, cell, [marked[place] for place in places])
            written += places
    except Exception:
        if not new:
            with contextlib.suppress(Exception):  # the error that is told is the first one
                some = [marked[place] for place in written]
                _finish(table, some, [homes[place] for place in written], moved=moved)
        raise
    if new:
        _put_copies(table, put, marked, homes)
    else:
        _finish(table, marked, homes, moved=moved)


def _marked(table: Table, rows: Sequence[dict[str, Any]], homes: _Homes) -> list[dict[str, Any]]:
    """Return rows as they lie in their own cells."""
    found = [dict(row) for row in rows]
    placed = [place for place, few in enumerate(homes) if few[0] != OVERFLOW]
    sketches = sketch(table.vectors([rows[place] for place in placed]), table.info.metric)
    for place, beside in zip(placed, sketches.tolist(), strict=True):
        found[place][SKETCH_FIELD] = beside
    _stamp(found, homes)
    return found


def _stamp(rows: Sequence[dict[str, Any]], homes: _Homes) -> None:
    stamp = time.time_ns()
    for row, few in zip(rows, homes, strict=True):
        if len(few) > 1:
            row[STAMP_FIELD], row[CELLS_FIELD] = stamp, list(few)


def _put(table: Table, put: Callable[..., Any], cell: int, rows: Sequence[dict[str, Any]]) -> None:
    put(table.name, list(rows), partition_name=_cells(table).partition(cell))


def _put_copies(
    table: Table, put: Callable[..., Any], rows: Sequence[dict[str, Any]], homes: _Homes
) -> None:
    for cell, places in _by_cell([few[1:] for few in homes]):
        _put(table, put, cell, [{**rows[place], COPY_FIELD: 1} for place in places])


def _finish(table: Table, rows: Sequence[dict[str, Any]], homes: _Homes, *, moved: bool) -> None:
    """Put the copies of rows that are in their own cells, and leave no other row of their ids.

    Of two writers of one key each may see rows of the other; he who does writes again, so that
    the rows in the end are all of one of them.
    """
    ids = [row[table.key] for row in rows]
    _put_copies(table, table.client.upsert, rows, homes)
    wanted = sum(map(len, homes))
    if moved and ids:
        # An older row in a cell goes before the one in the overflow, which tells that it is older.
        if table.count(table.where_ids(ids), table.cell_partitions()) > wanted:
            _delete_elsewhere(table, ids, homes)
        else:
            for partition in table.overflow_partitions():
                table.delete_in(partition, ids)
    several = any(len(few) > 1 for few in homes)
    for attempt in range(_CONTESTS):
        if ids and table.count(table.where_ids(ids)) > wanted:
            _delete_elsewhere(table, ids, homes)
        elif not several:
            return
        due = _not_ours(table, rows, homes)
        if not due:
            return
        time.sleep(random.uniform(0.0, _TICK_SECONDS * 2**attempt))  # noqa: S311 - to take turns
        some, there = [rows[place] for place in due], [homes[place] for place in due]
        _stamp(some, there)
        for cell, places in _by_cell([few[:1] for few in there]):
            _put(table, table.client.upsert, cell, [some[place] for place in places])
        _put_copies(table, table.client.upsert, some, there)
    raise CollectionError(
        f"Others write some of these keys of {table.name!r} all the time; write them again."
    )


def _delete_elsewhere(table: Table, ids: Sequence[Id], homes: _Homes) -> None:
    named = [{_cells(table).partition(cell) for cell in few} for few in homes]
    for partition in table.overflow_last():
        table.delete_in(
            partition, [key for key, own in zip(ids, named, strict=True) if partition not in own]
        )


def _not_ours(table: Table, rows: Sequence[dict[str, Any]], homes: _Homes) -> list[int]:
    """Return the places of rows that are not in all of their cells as they were written."""
    wrong = set()
    for cell, places in _by_cell(homes):
        ids = [rows[place][table.key] for place in places]
        there = table.read_in(_cells(table).partition(cell), ids, [table.key, STAMP_FIELD])
        for place, key in zip(places, ids, strict=True):
            if key not in there or there[key].get(STAMP_FIELD) != rows[place].get(STAMP_FIELD):
                wrong.add(place)
    return sorted(wrong)


def torn_keys(table: Table) -> Iterator[Id]:
    """Find keys in several cells whose rows are not all there, of one write, and no others.

    Reads the ids and marks of such keys, cell by cell at once, in the order of the ids.
    """
    marked = [_stamped(table, cell) for cell in range(_cells(table).n_cells)]
    sound: dict[Id, int] = {}
    for key, found in groupby(heapq.merge(*marked, key=itemgetter(0)), key=itemgetter(0)):
        rows = list(found)
        homes = rows[0][3]
        lie = sorted((cell, copy) for _, cell, _, _, copy in rows)
        wanted = sorted((cell, place > 0) for place, cell in enumerate(homes))
        if len({row[2] for row in rows}) > 1 or lie != wanted:
            yield key
        else:
            sound[key] = len(homes)
        if len(sound) == _COUNTED:
            yield from _with_more_rows(table, sound)
            sound = {}
    yield from _with_more_rows(table, sound)


def _stamped(table: Table, cell: int) -> Iterator[tuple[Id, int, int, list[int], bool]]:
    """Read the rows with a stamp: id, cell, stamp, all cells of the key, whether it is a copy."""
    fields = [table.key, STAMP_FIELD, CELLS_FIELD, COPY_FIELD]
    where, partitions = f"exists {STAMP_FIELD}", [_cells(table).partition(cell)]
    for page in table.pages(_PAGE, _READ_BYTES, fields, where=where, partitions=partitions):
        for row in page:
            yield row[table.key], cell, row[STAMP_FIELD], row[CELLS_FIELD], COPY_FIELD in row


def _with_more_rows(table: Table, expected: dict[Id, int]) -> Iterator[Id]:
    """Return those of the keys that have more rows in cells than these."""
    ids = list(expected)
    if not ids or table.count(table.where_ids(ids)) == sum(expected.values()):
        return
    left = dict(expected)
    twice: set[Id] = set()
    for cell in range(_cells(table).n_cells):
        partition = _cells(table).partition(cell)
        there = table.read_in(partition, ids, [table.key])
        if there and table.count(table.where_ids(list(there)), [partition]) > len(there):
            twice |= set(there)  # inserted again, the answer having been lost
        for key in there:
            left[key] -= 1
    yield from (key for key in ids if left[key] < 0 or key in twice)


def mend_torn(table: Table, cells_of: Callable[[list[dict[str, Any]]], IntArray | None]) -> None:
    """Write the last row of every torn key anew, into the cells that it is given."""
    torn = torn_keys(table)
    while some := list(islice(torn, _MENDED)):
        rows = [table.bare(row) for row in last_rows(table, some).values()]
        cells = cells_of(rows)
        if cells is not None and rows:
            write_shared_rows(table, rows, cells, new=False, moved=False)


def last_rows(table: Table, ids: Sequence[Id]) -> dict[Id, dict[str, Any]]:
    """Read the rows of the last write of each id, wherever they lie.

    One in a cell without a stamp was written by somebody else, who knew nothing of the others; and
    so was one in the overflow.
    """
    found: dict[Id, dict[str, Any]] = {}
    for cell in range(_cells(table).n_cells):
        for key, row in table.read_in(_cells(table).partition(cell), ids, ["*"]).items():
            if key not in found or _written(row) > _written(found[key]):
                found[key] = row
    return found | table.read_overflow(ids)


def _written(row: dict[str, Any]) -> tuple[bool, int]:
    stamp = row.get(STAMP_FIELD)
    return stamp is None, stamp or 0


def _by_cell(homes: _Homes) -> list[tuple[int, list[int]]]:
    """Return cells, and the places of the rows that lie in each."""
    found: dict[int, list[int]] = {}
    for place, few in enumerate(homes):
        for cell in few:
            found.setdefault(cell, []).append(place)
    return sorted(found.items())


def _cells(table: Table) -> CellProperties:
    assert table.cells is not None  # noqa: S101 - for the type checker
    return table.cells
