"""Keys in a cell file, on a disk or in an object store.

Codes of a cell lie side by side and are one read; the vectors of the best candidates are scored
then. Memory holds the table of cells and what was written since; all else is read when it is
searched, so that the file may be many times as large as memory.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from amips_plugins.adapters.cell_file.key_ids import can_be_stored, ids_as_array, plain_id
from amips_plugins.adapters.cell_file.layouts import CellFileLayouts
from amips_plugins.adapters.cell_file.log import Entry, append, log_of, read_entries
from amips_plugins.adapters.cell_file.opened import OpenCellFile
from amips_plugins.adapters.cell_file.ranges import DiskFile, StoredFile
from amips_plugins.adapters.cell_file.recent import Recent
from amips_plugins.adapters.cell_file.search import CellFileSearch, check_params, deadline_of
from amips_plugins.adapters.cell_file.writing import lock_of
from amips_plugins.adapters.describe import with_cells
from amips_plugins.adapters.plain_ids import plain_ids
from amips_plugins.cell_layout import check_assigned
from amips_plugins.collection import (
    CollectionInfo,
    Cursor,
    Failure,
    Hit,
    Id,
    KeyBatch,
    SearchRequest,
    check_keys,
    check_layout,
)
from amips_plugins.collection.construction import Construction
from amips_plugins.errors import CollectionNotFound, DatabaseUnreachable, InvalidInput
from amips_plugins.files import held
from amips_plugins.partitions import Partitions
from amips_plugins.plan import NATIVE, QueryPlan, searches_everything
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["CellFileCollection"]

_THOROUGH = 4.0  # times as many candidates of a search that others are judged by


@dataclass(frozen=True)
class State:
    """One moment of a file: what it holds, and what was written since."""

    file: OpenCellFile
    recent: Recent


class CellFileCollection:
    """A cell file, written by ``amips cell-file``.

    Keys that are written go to a log beside it, which every search looks through in memory;
    ``amips backfill`` writes the file anew with them in their cells. A file in a store is only
    read.

    Parameters
    ----------
    location
        Path of the file, or an fsspec URL such as ``s3://bucket/docs.cells`` (whose protocol
        package has to be installed).
    timeout
        Seconds that a store may take for a search which names no ``timeout``; reads that fail are
        tried again till then.

    Raises
    ------
    CollectionNotFound
        There is no such file.
    CollectionError
        It is damaged, cut short, or of another byte order or format.
    DatabaseUnreachable
        The store does not answer in time.
    """

    break_even = 1.0
    exhaustive = True
    max_candidates = None
    partitions = None

    def __init__(self, location: str | Path, timeout: float = 30.0) -> None:
        self._location, self._timeout = str(location), timeout
        self._path = None if "://" in self._location else Path(location)
        self._lock = threading.Lock()
        self._open()

    def _open(self) -> None:
        """Take the file that lies there now."""
        ranges = (
            StoredFile(self._location, self._timeout)
            if self._path is None
            else DiskFile(self._path)
        )
        file = OpenCellFile(ranges)
        header = file.header
        with self._lock:
            self._state = State(file, Recent(header.dim))
        origin = header.collection
        self._info = CollectionInfo(
            "cell-file",
            origin.name,
            origin.field,
            header.metric,
            header.dim,
            origin=origin,
        )

    @classmethod
    def connect(
        cls, address: str, name: str | None = None, field: str | None = None
    ) -> CellFileCollection:
        """Open a file, if it is of the collection and the vector field named."""
        opened = cls(address)
        for what, wanted, there in (
            ("collection", name, opened.info.name),
            ("vector field", field, opened.info.field),
        ):
            if wanted is not None and wanted != there:
                raise CollectionNotFound(
                    f"{address} holds keys of the {what} {there!r}, not of {wanted!r}."
                )
        return opened

    @property
    def info(self) -> CollectionInfo:
        """What the collection is, and which one it is a copy of."""
        return self._info

    def _now(self) -> State:
        """Return the file and all that was logged until now."""
        with self._lock:
            state = self._state
            if self._path is not None:
                log = log_of(self._path, state.file.header.identity)
                entries, offset = read_entries(log, state.recent.offset)
                if entries:
                    recent = state.recent.after(entries, offset, state.file.find)
                    self._state = state = State(state.file, recent)
            return state

    def count(self) -> int:
        """Return the number of keys."""
        now = self._now()
        return now.file.header.count - len(now.recent.hidden) + len(now.recent.ids)

    def overflow(self) -> int:
        """Return the number of keys without a cell; 0 without a layout."""
        now = self._now()
        if not now.file.header.layout:
            return 0
        first = int(now.file.starts[now.file.header.n_cells])
        gone = int((now.recent.hidden >= first).sum())
        return now.file.header.count - first - gone + int((now.recent.cells < 0).sum())

    def layout(self) -> str | None:
        """Return the identifier of the cells, or None."""
        return self._state.file.header.layout or None

    def fetch(self, ids: Sequence[Id]) -> KeyBatch:
        """Read those of the keys that are there."""
        now, wanted = self._now(), list(dict.fromkeys(plain_ids(ids)))
        beside = [now.recent.ids.index(one) for one in wanted if one in now.recent.written]
        rows = np.setdiff1d(now.file.find(wanted), [-1, *now.recent.hidden.tolist()])
        read = now.file.read_rows(rows.astype(np.int64), deadline_of(self.timeout))
        found = [plain_id(one) for one in read["id"]] + [now.recent.ids[one] for one in beside]
        return KeyBatch(found, np.concatenate([read["vector"], now.recent.vectors[beside]]))

    def scan(self, batch_size: int, after: Cursor | None = None) -> Iterator[KeyBatch]:
        """Read every key once, in the order of the ids, behind the id ``after``.

        Every key is a read of its own: copy a file from a store to a disk first.
        """
        now = self._now()
        known, rows = now.file.index
        kept = ~np.isin(rows, now.recent.hidden)
        ids = [*(plain_id(one) for one in known[kept]), *now.recent.ids]
        places = [*rows[kept].tolist(), *(-1 - one for one in range(len(now.recent.ids)))]
        pairs = sorted(zip(ids, places, strict=True))
        if after is not None:
            # A file has ids of one kind, and so has its cursor.
            pairs = [pair for pair in pairs if pair[0] > after]  # type: ignore[operator]
        for low in range(0, len(pairs), batch_size):
            part = pairs[low : low + batch_size]
            at = np.array([place for _, place in part], dtype=np.int64)
            yield KeyBatch([one for one, _ in part], self._vectors(now, at), part[-1][0])

    def _vectors(self, now: State, places: IntArray) -> FloatArray:
        """Return vectors by row, or for those that are recent by -1 less their place."""
        vectors = np.empty((len(places), now.file.header.dim), dtype=np.float32)
        recent = places < 0
        vectors[recent] = now.recent.vectors[-1 - places[recent]]
        numbers, at = np.unique(places[~recent], return_inverse=True)
        vectors[~recent] = now.file.read_rows(numbers, deadline_of(self.timeout))["vector"][at]
        return vectors

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search the codes of the plan's cells, or all codes, and score the best by their vectors.

        The filter is a predicate on the id and the stored fields. Of ``params`` there is
        ``{"oversampling": 2.5}``: candidates scored by their vectors for every hit.

        Raises
        ------
        InvalidInput
            The filter is no predicate, or the oversampling no number from 1 to 1,000.
        DatabaseUnreachable
            The store does not answer in time.
        CollectionError
            What was read is damaged.
        """
        check_layout(plan, self.layout(), self.info.name)
        everything = searches_everything(plan, self.break_even)
        return self._search(request).by_codes(plan, everything)

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Compare with every vector, which reads all of the file."""
        return self._search(request).exactly()

    def thorough(self, request: SearchRequest) -> list[list[Hit]]:
        """Search all codes with many candidates, and leave none of it in the page cache."""
        nowhere = np.zeros(0, dtype=np.bool_)
        search = self._search(replace(request, params=None))
        return search.by_codes(NATIVE, nowhere, oversampling=_THOROUGH, once=True)

    def _search(self, request: SearchRequest) -> CellFileSearch:
        if request.filter is not None and not callable(request.filter):
            raise InvalidInput("A filter of a cell file is a predicate on the id and the fields.")
        check_params(request.params)
        now, timeout = self._now(), request.timeout
        deadline = deadline_of(self.timeout if timeout is None else timeout)
        return CellFileSearch(now.file, now.recent, request, deadline)

    @property
    def timeout(self) -> float | None:
        """Seconds that a store may take for a search; None on a disk."""
        return self._timeout if self._path is None else None

    def failure(self, exc: BaseException) -> Failure:
        """Say what an error of a search means."""
        return Failure.OUTAGE if isinstance(exc, DatabaseUnreachable) else Failure.OTHER

    def unroutable(self, request: SearchRequest, *, rewritten: bool) -> str | None:  # noqa: ARG002 - a plan changes no meaning here
        """Say why a plan would change what a request means, or None."""
        return None

    def describe(self) -> Construction:
        """Say how the file is built."""
        header = self._state.file.header
        facts = (
            ("storage", "cell file"),
            ("codes", f"{header.bits} bits, scored again by the vectors"),
            ("size", f"{header.size / 1e6:,.0f} MB"),
        )
        return with_cells(self, Construction(facts))

    def current(self) -> CellFileCollection:
        """Look whether another file lies there now."""
        if not self._state.file.ranges.changed():
            return self
        return CellFileCollection(self._location, self._timeout)

    def upsert(
        self,
        ids: Sequence[Id],
        vectors: FloatArray,
        fields: Sequence[Mapping[str, Any]] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        """Log keys beside the file, in place of those with the same ids.

        Raises
        ------
        InvalidInput
            As for every collection; or the file lies in a store.
        """
        now = self._now()
        header, stored_ids = now.file.header, now.file.index[0]
        known = [*map(plain_id, stored_ids[:1]), *map(plain_id, stored_ids[-1:]), *now.recent.ids]
        keys = plain_ids(ids, known)
        ids_as_array([*known, *keys])  # a file of all of them can be written
        check_keys(header.dim, self.layout(), keys, vectors, fields, cells)
        if not np.isfinite(vectors).all():
            raise InvalidInput("A vector holds a NaN or infinite number; pass finite numbers.")
        if cells is not None:
            check_assigned(cells, len(keys), header.n_cells)
        placed = b"" if cells is None else np.ascontiguousarray(cells, "<i8").tobytes()
        stored = None if fields is None else [_as_stored(one) for one in fields]
        if keys:
            self._log(Entry(keys, np.ascontiguousarray(vectors, "<f4").tobytes(), placed, stored))

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete keys; ids that are not there are none of its business."""
        keys = [one for one in plain_ids(ids) if can_be_stored(one)]
        if keys:
            self._log(Entry(keys))

    def _log(self, entry: Entry) -> None:
        if self._path is None:
            raise InvalidInput(
                f"{self._location} is only read; write to the file on a disk, run amips backfill, "
                f"and copy it to the store again."
            )
        with held(lock_of(self._path)):
            mine, there = self._state.file.header, OpenCellFile(DiskFile(self._path)).header
            offset = self._state.recent.offset
            if there.identity != mine.identity:  # written anew: this object's cells may be others
                offset = 0
                if there.layout != mine.layout:
                    entry = Entry(entry.ids, entry.vectors, b"", entry.fields)
            append(log_of(self._path, there.identity), entry, offset)

    def partitioned(self, partitions: Partitions | None) -> CellFileCollection:
        """Refuse any partitions but the file's own cells."""
        if partitions is None:
            return self
        raise InvalidInput(
            f"{self._location} has the cells that it was written with; name no field, or write a "
            f"file in other cells: amips cell-file."
        )

    @property
    def layouts(self) -> CellFileLayouts:
        """Builds, shows and mends the cells, by writing the file anew."""
        return CellFileLayouts(self)

    def close(self) -> None:
        """Do nothing: the file is closed when nothing searches it any more."""

    def __enter__(self) -> CellFileCollection:
        """Return the collection itself; leaving the block closes it."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Close it."""
        self.close()


def _as_stored(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as the file will give them back, or raise ``InvalidInput``."""
    try:
        data = msgspec.json.encode(dict(fields))
        found: dict[str, Any] = msgspec.json.decode(data, type=dict[str, Any])
        msgspec.msgpack.encode(found)  # as the log has them
    except (TypeError, ValueError, OverflowError, msgspec.MsgspecError) as exc:
        raise InvalidInput(f"Fields are stored as JSON, which these are not: {exc}.") from exc
    return found
