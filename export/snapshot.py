"""Snapshots: a frozen copy of a collection's ids and vectors.

::

    snap/
        snapshot.json   the manifest; replaced after every batch, so that a killed run resumes
        vectors.f32     count x dim float32, row-major, little-endian; memory-mapped when read
        ids.jsonl       one id a line, as JSON: ints stay ints, strings stay strings
        values.jsonl    where each key belongs, in the same way, null for nowhere; of a collection
                        that was copied with its own partitions
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from amips_plugins.collection import Collection, Id, KeyBatch
from amips_plugins.errors import SnapshotError
from amips_plugins.export.disk import says_when_full
from amips_plugins.export.keys import Keys, MappedKeys
from amips_plugins.export.parquet_keys import ParquetKeys, check_file, texts
from amips_plugins.export.snapshot_manifest import (
    SnapshotManifest,
    begin,
    check_finite,
    complete,
    read_manifest,
    write_manifest,
)
from amips_plugins.partitions import Value
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray

__all__ = ["Snapshot", "SnapshotManifest", "finished", "take_snapshot"]

_VECTORS = "vectors.f32"
_IDS = "ids.jsonl"
_VALUES = "values.jsonl"


@dataclass(frozen=True)
class Snapshot:
    """A finished snapshot.

    Attributes
    ----------
    path
        Its folder.
    manifest
        What it says of itself.
    """

    path: Path
    manifest: SnapshotManifest

    @classmethod
    def open(cls, path: str | Path) -> Snapshot:
        """Open a finished snapshot.

        Raises
        ------
        SnapshotError
            There is none, it is not finished, or its files are damaged.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        if manifest is None:
            raise SnapshotError(f"There is no snapshot in {folder}; run: amips snapshot.")
        if not manifest.complete:
            raise SnapshotError(
                f"The snapshot in {folder} is not finished ({manifest.count:,} of "
                f"{manifest.count_before:,} keys); run the same amips snapshot again to resume it."
            )
        if manifest.shards is not None:
            for shard in manifest.shards:
                check_file(folder / shard.file, manifest.dim, shard.count)
            return cls(folder, manifest)
        expected = manifest.count * manifest.dim * 4
        wanted = {_VECTORS: expected, _IDS: manifest.ids_bytes}
        if manifest.partitions is not None:
            wanted[_VALUES] = manifest.values_bytes
        try:
            sizes = {name: (folder / name).stat().st_size for name in wanted}
        except FileNotFoundError as exc:
            raise SnapshotError(f"{exc.filename} is missing; take the snapshot again.") from exc
        if sizes != wanted:
            raise SnapshotError(f"The files in {folder} are damaged; take the snapshot again.")
        return cls(folder, manifest)

    def vectors(self) -> FloatArray:
        """Return the vectors as a read-only memory map, ``(count, dim)`` float32.

        Raises
        ------
        SnapshotError
            They lie in shards, which nothing can map as one.
        """
        if self.manifest.shards is not None:
            raise SnapshotError(
                f"The snapshot in {self.path} lies in shards; read some of it by keys()[rows]."
            )
        shape = (self.manifest.count, self.manifest.dim)
        return np.memmap(self.path / _VECTORS, dtype="<f4", mode="r", shape=shape)

    def keys(self) -> Keys:
        """Return the vectors as what reads some of them when asked."""
        if self.manifest.shards is None:
            return MappedKeys(self.path / _VECTORS, self.manifest.count, self.manifest.dim)
        starts = accumulate((shard.count for shard in self.manifest.shards), initial=0)
        return ParquetKeys(self._files(), tuple(starts), self.manifest.dim)

    def _files(self) -> tuple[Path, ...]:
        return tuple(self.path / shard.file for shard in self.manifest.shards or ())

    def ids(self) -> Iterator[Id]:
        """Yield the ids in the order of the vectors."""
        decoder = msgspec.json.Decoder(int | str)
        if self.manifest.shards is not None:
            for text in texts(self._files(), "id"):
                yield decoder.decode(text or "")
            return
        with (self.path / _IDS).open("rb") as file:
            for line in file:
                yield decoder.decode(line)

    def values(self) -> list[Value | None]:
        """Return where the keys belong, in the order of the vectors.

        Raises
        ------
        SnapshotError
            The snapshot does not say.
        """
        if self.manifest.partitions is None:
            raise SnapshotError(
                f"The snapshot in {self.path} does not say where its keys belong; take one with "
                f"amips snapshot --partitions FIELD."
            )
        decoder = msgspec.json.Decoder(int | str | None)
        if self.manifest.shards is not None:
            return [decoder.decode(text or "null") for text in texts(self._files(), "value")]
        with (self.path / _VALUES).open("rb") as file:
            return [decoder.decode(line) for line in file]

    def ids_bytes(self) -> bytes:
        """Return all ids, as JSON, each on a line of its own."""
        if self.manifest.shards is not None:
            return b"".join(f"{text}\n".encode() for text in texts(self._files(), "id"))
        return (self.path / _IDS).read_bytes()


def finished(path: str | Path) -> bool:
    """Return whether a folder holds a finished snapshot."""
    manifest = read_manifest(Path(path))
    return manifest is not None and manifest.complete


def take_snapshot(
    collection: Collection,
    out: str | Path,
    batch_size: int = 5_000,
    progress: Progress = no_progress,
) -> Snapshot:
    """Copy every id and vector of a collection to a folder, and its own partitions if it has them.

    Memory stays at a few batches. An interrupted copy is resumed by the same call.

    Parameters
    ----------
    collection
        What to copy.
    out
        The folder; created if need be.
    batch_size
        Keys read at once.
    progress
        Watches the work.

    Raises
    ------
    SnapshotError
        The folder holds a finished snapshot, one of another collection, or a damaged one, or the
        collection is empty.
    """
    folder = Path(out)
    with says_when_full(folder):
        return _copy(collection, folder, begin(folder, collection), batch_size, progress)


def _copy(
    collection: Collection,
    folder: Path,
    manifest: SnapshotManifest,
    batch_size: int,
    progress: Progress,
) -> Snapshot:
    with (
        (folder / _VECTORS).open("ab") as vectors,
        (folder / _IDS).open("ab") as ids,
        (folder / _VALUES).open("ab")
        if manifest.partitions is not None
        else nullcontext() as values,
        progress("snapshot", manifest.count_before, manifest.count, "keys") as step,
    ):
        _cut(vectors, manifest.count * manifest.dim * 4, folder)
        _cut(ids, manifest.ids_bytes, folder)
        if values is not None:
            _cut(values, manifest.values_bytes, folder)
        for batch in collection.scan(batch_size, after=manifest.cursor):
            manifest = _append(folder, manifest, batch, vectors, ids, values)
            step.advance(len(batch.ids))
    complete(folder, manifest, collection.count(), _fingerprint(folder))
    return Snapshot.open(folder)


def _cut(file: BinaryIO, size: int, folder: Path) -> None:
    """Cut off what was written after the manifest last counted."""
    if os.fstat(file.fileno()).st_size < size:
        raise SnapshotError(
            f"The files in {folder} are damaged; take the snapshot again in another folder."
        )
    file.truncate(size)


def _append(
    folder: Path,
    manifest: SnapshotManifest,
    batch: KeyBatch,
    vectors: BinaryIO,
    ids: BinaryIO,
    values: BinaryIO | None,
) -> SnapshotManifest:
    """Write a batch, make it durable, and only then count it."""
    data = np.ascontiguousarray(batch.vectors, dtype="<f4")
    check_finite(batch.ids, data)
    vectors.write(data.tobytes())
    lines = b"".join(msgspec.json.encode(key) + b"\n" for key in batch.ids)
    ids.write(lines)
    belongs = b""
    if values is not None:
        belongs = b"".join(msgspec.json.encode(value) + b"\n" for value in batch.values or ())
        values.write(belongs)
    for file in (vectors, ids, values):
        if file is not None:
            file.flush()
            os.fsync(file.fileno())
    manifest = msgspec.structs.replace(
        manifest,
        count=manifest.count + len(batch.ids),
        ids_bytes=manifest.ids_bytes + len(lines),
        values_bytes=manifest.values_bytes + len(belongs),
        cursor=batch.cursor,
    )
    write_manifest(folder, manifest)
    return manifest


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    parted = (_VALUES,) if (folder / _VALUES).exists() else ()
    for name in (_IDS, _VECTORS, *parted):
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
