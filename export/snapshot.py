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
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from amips_plugins.collection import Collection, CollectionKey, Id, KeyBatch, collection_key
from amips_plugins.errors import SnapshotError
from amips_plugins.export.disk import says_when_full
from amips_plugins.files import replace_file
from amips_plugins.partitions import Value
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, Metric

__all__ = ["Snapshot", "SnapshotManifest", "finished", "take_snapshot"]

_FORMAT = 1
_MANIFEST = "snapshot.json"
_VECTORS = "vectors.f32"
_IDS = "ids.jsonl"
_VALUES = "values.jsonl"


class SnapshotManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a snapshot says of itself.

    Attributes
    ----------
    format
        Version of this structure.
    complete
        Whether every key is there.
    collection, metric, dim, schema
        What was copied.
    count
        Keys copied so far.
    cursor
        Where to go on; None before the first batch.
    ids_bytes
        Length of the id file that belongs to ``count``.
    partitions
        The field that tells where keys belong, empty for the database's own partitions; None where
        the snapshot does not say.
    values_bytes
        Length of the file of values that belongs to ``count``.
    count_before, count_after
        Keys the collection held when the copy began and ended.
    started, finished
        UTC times, ISO 8601.
    schema_fingerprint, fingerprint
        sha256 over the schema, and over the ids and vectors in the order of the scan.
    tools
        Versions of what took it.
    """

    format: int
    complete: bool
    collection: CollectionKey
    metric: Metric
    dim: int
    schema: dict[str, str]
    count: int
    cursor: int | str | None
    ids_bytes: int
    count_before: int
    count_after: int
    started: str
    finished: str
    schema_fingerprint: str
    fingerprint: str
    tools: dict[str, str]
    partitions: str | None = None
    values_bytes: int = 0

    @property
    def moved(self) -> bool:
        """Whether the collection changed its size while it was copied."""
        return not self.count_before == self.count == self.count_after


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
        manifest = _read_manifest(folder)
        if manifest is None:
            raise SnapshotError(f"There is no snapshot in {folder}; run: amips snapshot.")
        if not manifest.complete:
            raise SnapshotError(
                f"The snapshot in {folder} is not finished ({manifest.count:,} of "
                f"{manifest.count_before:,} keys); run the same amips snapshot again to resume it."
            )
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
        """Return the vectors as a read-only memory map, ``(count, dim)`` float32."""
        shape = (self.manifest.count, self.manifest.dim)
        return np.memmap(self.path / _VECTORS, dtype="<f4", mode="r", shape=shape)

    def ids(self) -> Iterator[Id]:
        """Yield the ids in the order of the vectors."""
        decoder = msgspec.json.Decoder(int | str)
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
        with (self.path / _VALUES).open("rb") as file:
            return [decoder.decode(line) for line in file]

    def ids_bytes(self) -> bytes:
        """Return the id file as it is."""
        return (self.path / _IDS).read_bytes()


def finished(path: str | Path) -> bool:
    """Return whether a folder holds a finished snapshot."""
    manifest = _read_manifest(Path(path))
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
        return _copy(collection, folder, _resume(folder, collection), batch_size, progress)


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
    finished = msgspec.structs.replace(
        manifest,
        complete=True,
        count_after=collection.count(),
        finished=_now(),
        fingerprint=_fingerprint(folder),
    )
    _write_manifest(folder, finished)
    return Snapshot.open(folder)


def _resume(folder: Path, collection: Collection) -> SnapshotManifest:
    """Return the manifest to go on from, with its files there."""
    info = collection.info
    key, seen = collection_key(info), collection.partitions
    parted_by = None if seen is None else seen.field or ""
    found = _read_manifest(folder) if folder.exists() else None
    if found is not None:
        if found.complete:
            raise SnapshotError(
                f"{folder} already holds a finished snapshot; delete it or name another folder."
            )
        same = (found.collection, found.metric, found.dim) == (key, info.metric, info.dim)
        if not same or found.partitions != parted_by:
            raise SnapshotError(
                f"{folder} holds an unfinished snapshot of {found.collection.name!r}"
                f"{' with other partitions' if same else ''}; delete it or name another folder."
            )
        return found
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SnapshotError(f"{folder} is not empty and holds no snapshot; name another folder.")
    count = collection.count()
    if count == 0:
        raise SnapshotError(f"Collection {info.name!r} is empty; there is nothing to copy.")
    schema = dict(sorted(info.schema.items()))
    manifest = SnapshotManifest(
        format=_FORMAT,
        complete=False,
        collection=key,
        metric=info.metric,
        dim=info.dim,
        schema=schema,
        count=0,
        cursor=None,
        ids_bytes=0,
        count_before=count,
        count_after=0,
        started=_now(),
        finished="",
        schema_fingerprint=hashlib.sha256(msgspec.json.encode(schema)).hexdigest(),
        fingerprint="",
        tools={"amips-plugins": version("amips-plugins"), "numpy": np.__version__},
        partitions=parted_by,
    )
    _write_manifest(folder, manifest)
    return manifest


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
    if not np.isfinite(data).all():
        row = int(np.flatnonzero(~np.isfinite(data).all(axis=1))[0])
        raise SnapshotError(
            f"Key {batch.ids[row]!r} holds a NaN or infinite number; mend or delete it, then run "
            f"the same command again."
        )
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
    _write_manifest(folder, manifest)
    return manifest


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    parted = (_VALUES,) if (folder / _VALUES).exists() else ()
    for name in (_IDS, _VECTORS, *parted):
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> SnapshotManifest | None:
    try:
        return msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=SnapshotManifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.MsgspecError as exc:
        raise SnapshotError(
            f"{folder / _MANIFEST} cannot be read ({exc}); take the snapshot again elsewhere."
        ) from exc


def _write_manifest(folder: Path, manifest: SnapshotManifest) -> None:
    replace_file(folder / _MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
