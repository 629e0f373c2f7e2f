"""What a snapshot says of itself, and how one is begun, resumed and completed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np

from amips_plugins.collection import Collection, CollectionKey, Id, collection_key
from amips_plugins.errors import SnapshotError
from amips_plugins.files import replace_file
from amips_plugins.vectors import FloatArray, Metric

__all__ = [
    "ShardEntry",
    "SnapshotManifest",
    "begin",
    "check_finite",
    "complete",
    "read_manifest",
    "write_manifest",
]

_FORMAT, _SHARDED = 1, 2
_MANIFEST = "snapshot.json"


class ShardEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A range of keys, and the file that holds them.

    Attributes
    ----------
    file
        Its name; empty while nobody has read the range to its end.
    count, bytes
        Keys in the file, and its size.
    fingerprint
        sha256 over its ids, vectors and values.
    after, until
        The ids between which the keys lie, the first one not among them; None for no border.
    source
        The foreign file that the keys come from, if they do.
    """

    file: str = ""
    count: int = 0
    bytes: int = 0
    fingerprint: str = ""
    after: Id | None = None
    until: Id | None = None
    source: str = ""


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
    shards
        The ranges of keys in their order, if they lie in shards (``sharded_snapshot``).
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
    shards: list[ShardEntry] | None = None

    @property
    def moved(self) -> bool:
        """Whether the collection changed its size while it was copied."""
        return not self.count_before == self.count == self.count_after


def complete(folder: Path, manifest: SnapshotManifest, count_after: int, fingerprint: str) -> None:
    """Write down that every key is there."""
    finished = msgspec.structs.replace(
        manifest,
        complete=True,
        count_after=count_after,
        finished=_now(),
        fingerprint=fingerprint,
    )
    write_manifest(folder, finished)


def begin(folder: Path, collection: Collection, *, sharded: bool = False) -> SnapshotManifest:
    """Return the manifest to go on from, with its files there; of shards that are gone none.

    Raises
    ------
    SnapshotError
        The folder holds something else, or the collection is empty.
    """
    info = collection.info
    key, seen = collection_key(info), collection.partitions
    parted_by = None if seen is None else seen.field or ""
    found = read_manifest(folder) if folder.exists() else None
    if found is not None:
        found = _without_lost(folder, found)
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
        if (found.shards is not None) != sharded:
            raise SnapshotError(
                f"{folder} holds an unfinished snapshot that lies in "
                f"{'one file' if sharded else 'shards'}; run its own command again, delete it, or "
                f"name another folder."
            )
        return found
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SnapshotError(f"{folder} is not empty and holds no snapshot; name another folder.")
    count = collection.count()
    if count == 0:
        raise SnapshotError(f"Collection {info.name!r} is empty; there is nothing to copy.")
    schema = dict(sorted(info.schema.items()))
    manifest = SnapshotManifest(
        format=_SHARDED if sharded else _FORMAT,
        shards=[] if sharded else None,
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
    write_manifest(folder, manifest)
    return manifest


def _without_lost(folder: Path, manifest: SnapshotManifest) -> SnapshotManifest:
    """Return the manifest as it is without the shards whose file is gone."""
    lost = [s for s in manifest.shards or () if s.file and not (folder / s.file).exists()]
    if not lost:
        return manifest
    again = {s.source for s in lost if s.source}
    shards: list[ShardEntry] = []
    for shard in manifest.shards or ():
        if shard.source in again:  # a foreign file is read as a whole
            if shard.source not in {s.source for s in shards}:
                shards.append(ShardEntry(source=shard.source))
        elif shard in lost:
            shards.append(ShardEntry(after=shard.after, until=shard.until))
        else:
            shards.append(shard)
    count = sum(s.count for s in shards)
    return msgspec.structs.replace(manifest, shards=shards, count=count, complete=False)


def check_finite(ids: Sequence[Id], vectors: FloatArray) -> None:
    """Refuse keys that hold something other than finite numbers, or raise ``SnapshotError``."""
    if not np.isfinite(vectors).all():
        row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
        raise SnapshotError(
            f"Key {ids[row]!r} holds a NaN or infinite number; mend or delete it, then run the "
            f"same command again."
        )


def read_manifest(folder: Path) -> SnapshotManifest | None:
    """Read a snapshot's manifest; None where there is none."""
    try:
        return msgspec.json.decode((folder / _MANIFEST).read_bytes(), type=SnapshotManifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except msgspec.MsgspecError as exc:
        raise SnapshotError(
            f"{folder / _MANIFEST} cannot be read ({exc}); take the snapshot again elsewhere."
        ) from exc


def write_manifest(folder: Path, manifest: SnapshotManifest) -> None:
    """Replace a snapshot's manifest."""
    replace_file(folder / _MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
