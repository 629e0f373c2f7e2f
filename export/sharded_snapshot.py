"""Snapshots in shards: Parquet files under one manifest, taken by several readers at once.

::

    snap/
        snapshot.json        the manifest, replaced after every file
        keys-00000.parquet   id as JSON, vector, value; some 256 MB of vectors, in row groups of
                             16,384 keys whose pages have checksums

A reader reads a range of ids. Ranges stand in the manifest in their order, each either as the file
that holds its keys or as one that nobody has read to its end: a killed run reads these, and a file
that is gone is read again.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from amips_plugins.adapters.several.members import part_key
from amips_plugins.collection import Collection, Id, KeyBatch
from amips_plugins.errors import require
from amips_plugins.export.disk import says_when_full
from amips_plugins.export.parquet_keys import KeyFile, rows_a_file
from amips_plugins.export.snapshot import Snapshot
from amips_plugins.export.snapshot_manifest import (
    ShardEntry,
    SnapshotManifest,
    begin,
    check_finite,
    complete,
    write_manifest,
)
from amips_plugins.progress import Progress, Step, no_progress

__all__ = ["ShardWriter", "ShardedManifest", "id_bounds", "take_sharded_snapshot"]

_PROBES = 12  # refinements of the largest id
_UUIDS = 1 << 128
_INTEGERS = 1 << 63


def take_sharded_snapshot(
    collection: Collection,
    out: str | Path,
    n_shards: int,
    batch_size: int = 5_000,
    progress: Progress = no_progress,
) -> Snapshot:
    """Copy a collection as ``take_snapshot`` does, by several readers into Parquet files.

    Parameters
    ----------
    collection
        What to copy; its client is used by several threads at once.
    out
        The folder; created if need be.
    n_shards
        Readers, each of a range of ids: whole numbers and UUIDs are cut into ranges, other ids are
        read by one. A shard becomes several files where it is large.
    batch_size
        Keys read at once by one reader.
    progress
        Watches the work.

    Raises
    ------
    SnapshotError
        As ``take_snapshot``.
    """
    require("pyarrow", "scale")
    folder = Path(out)
    with says_when_full(folder):
        manifest = begin(folder, collection, sharded=True)
        if not manifest.shards:
            edges: list[Id | None] = [None, *id_bounds(collection, n_shards), None]
            ranges = [ShardEntry(after=low, until=high) for low, high in pairwise(edges)]
            manifest = msgspec.structs.replace(manifest, shards=ranges)
        kept = ShardedManifest(folder, manifest)
        with progress("snapshot", manifest.count_before, kept.count, "keys") as step:
            _read_all(kept, collection, n_shards, batch_size, step)
        complete(folder, kept.manifest(), collection.count(), kept.fingerprint())
    return Snapshot.open(folder)


class ShardedManifest:
    """The manifest of a snapshot that several threads write the files of."""

    def __init__(self, folder: Path, manifest: SnapshotManifest) -> None:
        self.folder, self._manifest = folder, manifest
        self._shards = list(manifest.shards or ())
        self._lock = threading.Lock()
        self._number = max(
            (int(shard.file[5:10]) + 1 for shard in self._shards if shard.file), default=0
        )

    @property
    def dim(self) -> int:
        """Dimension of the keys."""
        return self._manifest.dim

    @property
    def count(self) -> int:
        """Keys in the files."""
        return sum(shard.count for shard in self._shards)

    def fingerprint(self) -> str:
        """Return a fingerprint of all keys in the order of the shards."""
        digests = (bytes.fromhex(shard.fingerprint) for shard in self._shards)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def unread(self) -> list[ShardEntry]:
        """Return the ranges that have no file yet."""
        return [shard for shard in self._shards if not shard.file]

    def manifest(self) -> SnapshotManifest:
        """Return the manifest as it is now."""
        return msgspec.structs.replace(self._manifest, shards=self._shards, count=self.count)

    def new_file(self) -> Path:
        """Return the path of a file that is not there yet."""
        with self._lock:
            path = self.folder / f"keys-{self._number:05}.parquet"
            self._number += 1
        return path

    def replace(self, before: ShardEntry, after: Sequence[ShardEntry]) -> None:
        """Write down what has become of a range."""
        with self._lock:
            at = next(n for n, shard in enumerate(self._shards) if shard is before)
            self._shards[at : at + 1] = after
            write_manifest(self.folder, self.manifest())


class ShardWriter:
    """Writes keys to one file after the other."""

    def __init__(self, manifest: ShardedManifest) -> None:
        self._manifest = manifest
        self._most = rows_a_file(manifest.dim)
        self._file: KeyFile | None = None
        self._digest = hashlib.sha256()
        self._path = Path()

    def add(self, batch: KeyBatch) -> bool:
        """Append keys; return whether the file is full."""
        if self._file is None:
            self._path, self._digest = self._manifest.new_file(), hashlib.sha256()
            self._file = KeyFile(self._path, self._manifest.dim)
        vectors = np.ascontiguousarray(batch.vectors, dtype="<f4")
        check_finite(batch.ids, vectors)
        self._digest.update(msgspec.json.encode(list(batch.ids)))
        self._digest.update(vectors.tobytes())
        self._digest.update(msgspec.json.encode(batch.values))
        self._file.add(batch.ids, vectors, batch.values)
        return self._file.count >= self._most

    def end(self, entry: ShardEntry) -> list[ShardEntry]:
        """Let the file appear; return its entry, or none if there are no keys."""
        if self._file is None:
            return []
        count, size, self._file = self._file.count, self._file.done(), None
        about = {"file": self._path.name, "count": count, "bytes": size}
        return [msgspec.structs.replace(entry, **about, fingerprint=self._digest.hexdigest())]

    def give_up(self) -> None:
        """Leave nothing of a file that was begun."""
        if self._file is not None:
            self._file.give_up()


@dataclass(frozen=True)
class _Reading:
    manifest: ShardedManifest
    scan: Callable[[Id | None], Iterator[KeyBatch]]
    told: Callable[[int], None]
    stop: threading.Event
    order: Callable[[Id], Any]

    def read(self, entry: ShardEntry) -> None:
        """Read a range to its end, file by file."""
        writer = ShardWriter(self.manifest)
        try:
            for batch in self.scan(entry.after):
                if self.stop.is_set():
                    return
                here = _up_to(batch, entry.until, self.order)
                if len(here.ids) and writer.add(here):
                    rest = msgspec.structs.replace(entry, after=batch.cursor)
                    done = writer.end(msgspec.structs.replace(entry, until=batch.cursor))
                    self.manifest.replace(entry, [*done, rest])
                    entry = rest
                self.told(len(here.ids))
                if len(here.ids) < len(batch.ids):
                    break
            self.manifest.replace(entry, writer.end(entry))
        except BaseException:
            self.stop.set()
            raise
        finally:
            writer.give_up()


def _read_all(
    manifest: ShardedManifest, collection: Collection, readers: int, batch_size: int, step: Step
) -> None:
    lock = threading.Lock()

    def told(count: int) -> None:
        with lock:
            step.advance(count)

    reading = _Reading(
        manifest,
        lambda after: collection.scan(batch_size, after),
        told,
        threading.Event(),
        _order_together if collection.info.database == "several" else _order,
    )
    with ThreadPoolExecutor(readers) as pool:
        running = [pool.submit(reading.read, entry) for entry in manifest.unread()]
        try:
            for future in running:
                future.result()
        finally:
            reading.stop.set()  # done, or one of them has failed: so do the others


def _up_to(batch: KeyBatch, until: Id | None, order: Callable[[Id], Any]) -> KeyBatch:
    """Return the keys of a batch that belong to a range with this end."""
    if until is None or not len(batch.ids) or order(batch.ids[-1]) <= order(until):
        return batch
    count = sum(order(key) <= order(until) for key in batch.ids)
    values = None if batch.values is None else batch.values[:count]
    return KeyBatch(batch.ids[:count], batch.vectors[:count], batch.cursor, values)


def _order(key: Id) -> tuple[bool, Id]:
    return isinstance(key, str), key  # databases that hold both have numbers first


def _order_together(key: Id) -> tuple[str, tuple[bool, Id]]:
    """Say where several collections, which are read one after the other, have a key."""
    name, own = part_key(key)
    return name, _order(own)


def id_bounds(collection: Collection, count: int) -> list[Id]:
    """Return ids that cut those of a collection into ranges of about the same width.

    Ids that are neither whole numbers nor UUIDs are not cut. Of UUIDs behind numbers none are.
    """
    first = _next_id(collection, None)
    number = None if first is None else _number(first)
    if count == 1 or first is None or number is None:
        return []
    last = _last_number(collection, first, number)
    if last - number < count:
        return []
    numbers = [number + (last - number) * part // count for part in range(1, count)]
    return [_id_of(one, first) for one in numbers]


def _last_number(collection: Collection, like: Id, number: int) -> int:
    """Return about the largest id, as a number, that is written as the first one is."""
    end = _UUIDS if isinstance(like, str) else _INTEGERS
    low, step, high = number, 1, end
    while low + step < end:  # in growing steps, until nothing lies behind
        found = _next_id(collection, _id_of(low + step, like))
        behind = None if type(found) is not type(like) or found is None else _number(found)
        if behind is None:
            high = low + step
            break
        low, step = behind, 2 * step
    for _ in range(_PROBES):
        middle = (low + high) // 2
        if middle <= low:
            break
        found = _next_id(collection, _id_of(middle, like))
        behind = None if type(found) is not type(like) or found is None else _number(found)
        low, high = (low, middle) if behind is None else (behind, max(high, behind))
    return low


def _next_id(collection: Collection, after: Id | None) -> Id | None:
    batch = next(iter(collection.scan(1, after)), None)
    return None if batch is None or not len(batch.ids) else batch.ids[0]


def _number(key: Id) -> int | None:
    if isinstance(key, int):
        return key
    try:
        found = uuid.UUID(key)
    except ValueError:
        return None
    return found.int if str(found) == key else None


def _id_of(number: int, like: Id) -> Id:
    return number if isinstance(like, int) else str(uuid.UUID(int=number))
