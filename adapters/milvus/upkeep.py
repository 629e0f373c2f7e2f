"""Cells of Milvus kept true: what lies in a wrong one, and what has none yet."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from amips_plugins.adapters.cell_groups import OVERFLOW
from amips_plugins.adapters.copies.row_changes import digest
from amips_plugins.adapters.milvus.cells import CELL_FIELD, SKETCH_FIELD, CellProperties
from amips_plugins.adapters.milvus.shared_rows import last_rows, mend_torn
from amips_plugins.adapters.milvus.table import Table
from amips_plugins.adapters.milvus.writing import write_rows
from amips_plugins.cell_layout import (
    AUDITED,
    AssignCells,
    LayoutAudit,
    check_assigned,
    find_stale,
    warn_of_stale,
)
from amips_plugins.collection import Id
from amips_plugins.progress import Progress
from amips_plugins.vectors import IntArray

__all__ = ["audit", "backfill"]

_BACKFILL = 500  # rows from reading to writing: the time in which another writer may be overtaken
_PAGE = 5_000
_READ_BYTES = 8 << 20
_REACH = 16_000  # rows that an offset of a server reaches
_NOTED = "amips.verified"  # property: how far a verification is
_NOTE_EVERY = 50_000  # rows
_FRESH = 86_400.0  # seconds after which one that was interrupted begins anew

_Page = tuple[list[dict[str, Any]], int | None]
"""Rows, and the cell that all of them lie in where no field says so."""


def audit(table: Table, sample: int, assign: AssignCells | None) -> LayoutAudit:
    """Judge a random sample of the keys with a cell.

    It takes a count of every cell and one small query of each that the sample touches.
    """
    judged, stale = 0, 0
    for page in _sampled(table, sample):
        some, wrong = _judged(table, page, assign)
        judged, stale = judged + some, stale + len(wrong)
    return LayoutAudit(judged, stale)


def backfill(table: Table, assign: AssignCells, progress: Progress, *, verify: bool) -> int:
    """Place the overflow; to verify, place anew before what is stale, else look at a sample."""
    moved = _mended(table, assign, progress) if verify else 0
    where, partitions = table.overflow_scope()
    with progress("backfill", table.overflow(), 0, "keys") as step:
        for page in table.pages(_BACKFILL, _READ_BYTES, ["*"], where=where, partitions=partitions):
            read = {row[table.key]: table.bare(row) for row in page if table.has_vector(row)}
            now = table.read_overflow(list(read))
            moved += _place(table, read, now, assign, moved=True)
            step.advance(len(page))
    if table.shares_keys:
        mend_torn(table, lambda rows: _given(table, rows, assign))
    if not verify:
        _take_away_sampled(table, assign)
    return moved


def _place(
    table: Table,
    read: dict[Id, dict[str, Any]],
    now: dict[Id, dict[str, Any]],
    assign: AssignCells | None,
    *,
    moved: bool,
) -> int:
    """Put rows into their cells, or none, but for those that changed since they were read."""
    ids, cells = list(read), _given(table, list(read.values()), assign)
    own = cells if cells.ndim == 1 else cells[:, 0]
    due = [
        place
        for place, key in enumerate(ids)
        if (own[place] != OVERFLOW or not moved)
        and key in now
        and digest(table.bare(now[key])) == digest(read[key])
    ]
    write_rows(table, [read[ids[place]] for place in due], cells[due], moved=moved)
    return int((own[due] != OVERFLOW).sum())


def _given(table: Table, rows: list[dict[str, Any]], assign: AssignCells | None) -> IntArray:
    """Return the cells of rows; none for those without a vector."""
    cells, ids = _cells(table), [row[table.key] for row in rows]
    if assign is None:
        return np.full(len(ids), OVERFLOW)
    chosen = assign(ids, table.vectors(rows))
    return check_assigned(chosen, len(ids), cells.n_cells, shared=cells.shared)


def _take_away_sampled(table: Table, assign: AssignCells) -> None:
    """Make the stale keys of a sample overflow, and tell of them."""
    found = [_judged(table, page, assign) for page in _sampled(table, AUDITED)]
    wrong = [key for _, some in found for key in some]
    warn_of_stale(table.name, LayoutAudit(sum(judged for judged, _ in found), len(wrong)))
    for start in range(0, len(wrong), _BACKFILL):
        _mend(table, wrong[start : start + _BACKFILL], None)


def _mended(table: Table, assign: AssignCells, progress: Progress) -> int:
    """Read every key with a cell, going on where a run was killed; what it mended stays mended."""
    moved, places = 0, _places(table)
    total = max(0, table.count() - table.overflow())
    first, behind, done = _noted(table)
    noted = done
    with progress("verify", total, done, "keys") as step:
        for place, (where, partitions, cell) in enumerate(places[first:], first):
            after = behind if place == first else None
            for rows in table.pages(_PAGE, _READ_BYTES, _fields(table), after, where, partitions):
                _, wrong = _judged(table, (rows, cell), assign)
                moved += _mend(table, wrong, assign)
                step.advance(len(rows))
                done += len(rows)
                if done - noted >= _NOTE_EVERY:
                    noted = done
                    _note(table, [place, rows[-1][table.key], done])
    if noted:
        _note(table, None)
    return moved


def _noted(table: Table) -> tuple[int, Any, int]:
    """Read where a verification was killed: the place, the last id, and the keys read so far."""
    raw = table.client.describe_collection(table.name)
    with contextlib.suppress(ValueError, TypeError, KeyError):  # nothing there, or nothing of ours
        note = json.loads((raw.get("properties") or {})[_NOTED])
        # Properties are copied along with a collection.
        if note["of"] == _names(table) and 0 <= time.time() - note["when"] < _FRESH:
            place, after, done = note["at"]
            return place, after, done
    return 0, None, 0


def _note(table: Table, at: list[Any] | None) -> None:
    """Write where a verification is, or that it is done.

    Milvus 2.3.5 forgets it when it restarts, and takes no property away.
    """
    note = {"of": _names(table), "when": time.time(), "at": at}
    with contextlib.suppress(Exception):  # such as a user who may not: then it begins anew
        table.client.alter_collection_properties(
            table.name, {_NOTED: "" if at is None else json.dumps(note)}
        )


def _names(table: Table) -> list[Any]:
    return [table.name, table.raw["collection_id"], _cells(table).layout]


def _mend(table: Table, ids: Sequence[Id], assign: AssignCells | None) -> int:
    if not ids:
        return 0
    look = partial(last_rows, table) if table.shares_keys else table.read
    read = {key: table.bare(row) for key, row in look(ids).items() if table.has_vector(row)}
    return _place(table, read, look(list(read)), assign, moved=False)


def _judged(table: Table, page: _Page, assign: AssignCells | None) -> tuple[int, list[Id]]:
    """Return how many rows could be judged, and the ids of those that are stale."""
    rows = [row for row in page[0] if table.has_vector(row)]
    if not rows:
        return 0, []
    ids = [row[table.key] for row in rows]
    found = [row[CELL_FIELD] if page[1] is None else page[1] for row in rows]
    cells: IntArray = np.array(found, dtype=np.int64)
    beside = [row.get(SKETCH_FIELD) for row in rows]
    judged, stale = find_stale(ids, table.vectors(rows), cells, beside, table.info.metric, assign)
    return int(judged.sum()), [ids[place] for place in np.flatnonzero(stale)]


def _places(table: Table) -> list[tuple[str, list[str] | None, int | None]]:
    """Return what to read for all keys with a cell: filter, partitions, and their cell."""
    cells = _cells(table)
    if cells.storage == "field":
        return [(f"{CELL_FIELD} >= 0", None, None)]
    return [("", [cells.partition(cell)], cell) for cell in range(cells.n_cells)]


def _sampled(table: Table, size: int) -> Iterator[_Page]:
    """Read about ``size`` keys with a cell: from each cell its share, from a place drawn there."""
    rng, cells = np.random.default_rng(), _cells(table)
    table.count()  # with which the server catches up: after it, reads need not be strong
    field = cells.storage == "field"
    scopes: list[tuple[str, list[str] | None]] = [
        (f"{CELL_FIELD} == {cell}", None) if field else (table.no_copies, [cells.partition(cell)])
        for cell in range(cells.n_cells)
    ]
    counts = np.array([table.count(*scope, "Bounded") for scope in scopes])
    size = min(size, int(counts.sum()))
    if not size:
        return
    for cell, share in enumerate(rng.multivariate_hypergeometric(counts, size).tolist()):
        if not share:
            continue
        (where, partitions), count = scopes[cell], int(counts[cell])
        parts = -(-count // _REACH)
        if parts > 1 and not (table.string_keys or table.is_lite):  # an offset reaches no further
            rest = int(rng.integers(parts))
            where = table.all_of(where, f"{table.key} % {parts} in [{rest}, {rest - parts}]")
            count //= parts
        reach = max(0, min(count, _REACH) - share)
        rows = table.client.query(
            table.name,
            filter=where or table.any_id,
            output_fields=_fields(table),
            limit=share,
            offset=int(rng.integers(reach + 1)),
            partition_names=partitions,
            consistency_level="Bounded",
        )
        yield list(rows), None if field else cell


def _fields(table: Table) -> list[str]:
    beside = [SKETCH_FIELD] if table.has_sketches or table.shares_keys else []
    cell = [] if table.in_partitions else [CELL_FIELD]
    return [table.key, table.info.field, *cell, *beside]


def _cells(table: Table) -> CellProperties:
    assert table.cells is not None  # noqa: S101 - for the type checker
    return table.cells
