"""A Parquet dataset that holds a collection's keys already, taken as a snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import numpy as np

from amips_plugins.collection import Collection, KeyBatch
from amips_plugins.errors import SnapshotError, require
from amips_plugins.export.disk import says_when_full
from amips_plugins.export.sharded_snapshot import ShardedManifest, ShardWriter
from amips_plugins.export.snapshot import Snapshot
from amips_plugins.export.snapshot_manifest import ShardEntry, begin, complete
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray

__all__ = ["Columns", "import_parquet"]

_BUFFER = 1 << 20  # bytes of a column that are read ahead


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset hold the ids and the vectors."""

    id: str = "id"
    vector: str = "vector"


def import_parquet(
    collection: Collection,
    dataset: str,
    out: str | Path,
    columns: Columns | None = None,
    batch_size: int = 5_000,
    progress: Progress = no_progress,
) -> Snapshot:
    """Copy the keys of a Parquet dataset to a snapshot in shards.

    An interrupted copy is resumed by the same call, file by file.

    Parameters
    ----------
    collection
        The collection whose keys they are; asked for what it is, and how many keys it has.
    dataset
        A file, or a folder whose files are read in the order of their names; local, or an fsspec
        URL.
    out
        The folder; created if need be.
    columns
        Where ids and vectors are. Vectors are lists of one length, or of any, of float16, float32
        or float64.
    batch_size
        Keys read at once.
    progress
        Watches the work.

    Raises
    ------
    SnapshotError
        There is no such dataset, it does not hold what it should, or as ``take_snapshot``.
    """
    require("pyarrow", "scale")
    folder, wanted = Path(out), columns or Columns()
    with says_when_full(folder):
        source, names = _files(dataset)
        # Before anything is read: all of them have to fit. Those without a row are left aside.
        names = [one for one in names if _check(source, one, wanted, collection.info.dim)]
        manifest = begin(folder, collection, sharded=True)
        shards = manifest.shards or [ShardEntry(source=name) for name in names]
        if {shard.source for shard in shards} != set(names):
            raise SnapshotError(
                f"{folder} holds an unfinished snapshot of other files; delete it or name another "
                f"folder."
            )
        kept = ShardedManifest(folder, msgspec.structs.replace(manifest, shards=shards))
        with progress("snapshot", manifest.count_before, kept.count, "keys") as step:
            for entry in kept.unread():
                writer, done = ShardWriter(kept), list[ShardEntry]()
                try:
                    for batch in _batches(source, entry.source, wanted, kept.dim, batch_size):
                        if writer.add(batch):
                            done += writer.end(entry)
                        step.advance(len(batch.ids))
                    kept.replace(entry, [*done, *writer.end(entry)])
                finally:
                    writer.give_up()
        if kept.count == 0:
            raise SnapshotError(f"{dataset} holds no keys; there is nothing to copy.")
        complete(folder, kept.manifest(), collection.count(), kept.fingerprint())
    return Snapshot.open(folder)


def _files(dataset: str) -> tuple[Any, list[str]]:
    """Return the file system of a dataset, and its files by name."""
    try:
        source, path = fsspec.core.url_to_fs(dataset)
        if source.isdir(path):
            names = sorted(one for one in source.find(path) if one.endswith(".parquet"))
        else:
            names = [path] if source.exists(path) else []
    except (ImportError, ValueError, OSError) as exc:
        raise SnapshotError(f"{dataset} cannot be read ({exc}); look at the address.") from exc
    if not names:
        raise SnapshotError(f"There is no Parquet file at {dataset}; look at the path.")
    return source, names


def _opened(source: Any, name: str) -> Any:
    parquet = require("pyarrow.parquet", "scale")
    try:
        # Without these a whole row group is read at once, however large it is.
        return parquet.ParquetFile(source.open(name, "rb"), pre_buffer=False, buffer_size=_BUFFER)
    except (OSError, ValueError) as exc:
        raise _unreadable(name, exc) from exc


def _unreadable(name: str, why: object) -> SnapshotError:
    first = (str(why).splitlines() or [type(why).__name__])[0]
    return SnapshotError(
        f"{name} cannot be read as Parquet ({first}); write it again, then run the same command "
        f"again: files that are copied already are not read again."
    )


def _check(source: Any, name: str, columns: Columns, dim: int) -> int:
    """Refuse a file whose columns are of another kind, as no reader would; return its rows."""
    types = require("pyarrow.types", "scale")
    file = _opened(source, name)
    schema, rows = file.schema_arrow, int(file.metadata.num_rows)
    file.close()
    for column in (columns.id, columns.vector):
        if schema.get_field_index(column) < 0:
            raise SnapshotError(
                f"{name} has no column {column!r}, but {', '.join(map(repr, schema.names))}; name "
                f"it with --id-column or --vector-column."
            )
    ids, vectors = schema.field(columns.id).type, schema.field(columns.vector).type
    if not (types.is_integer(ids) or types.is_string(ids) or types.is_large_string(ids)):
        raise SnapshotError(
            f"The ids in {name} are {ids}, and ids are whole numbers or texts; name another column "
            f"with --id-column."
        )
    fixed = types.is_fixed_size_list(vectors)
    if not (fixed or types.is_list(vectors) or types.is_large_list(vectors)) or not (
        types.is_floating(vectors.value_type)
    ):
        raise SnapshotError(
            f"The vectors in {name} are {vectors}, and vectors are lists of floating numbers; name "
            f"another column with --vector-column."
        )
    if fixed and vectors.list_size != dim:
        raise SnapshotError(
            f"The vectors in {name} have dimension {vectors.list_size}, and the collection's have "
            f"{dim}; name the dataset of this collection."
        )
    return rows


def _batches(source: Any, name: str, columns: Columns, dim: int, size: int) -> Iterator[KeyBatch]:
    file = _opened(source, name)
    row = 0
    try:
        for batch in file.iter_batches(size, columns=[columns.id, columns.vector]):
            if batch.num_rows:
                ids: list[Any] = batch.column(columns.id).to_pylist()
                if None in ids:
                    raise SnapshotError(
                        f"Row {row + ids.index(None)} of {name} has no id; write the file without "
                        f"it."
                    )
                vectors = _vectors(batch.column(columns.vector), dim, name, row)
                yield KeyBatch(ids, vectors)
                row += batch.num_rows
    except (OSError, ValueError) as exc:
        raise _unreadable(name, exc) from exc
    finally:
        file.close()


def _vectors(column: Any, dim: int, name: str, row: int) -> FloatArray:
    """Return ``(n, dim)`` float32; lists of another length and missing ones are refused."""
    compute = require("pyarrow.compute", "scale")
    lengths = compute.fill_null(compute.list_value_length(column), -1).to_numpy(
        zero_copy_only=False
    )
    if (lengths != dim).any():
        at = int(np.flatnonzero(lengths != dim)[0])
        found = "no vector" if lengths[at] < 0 else f"a vector of dimension {lengths[at]}"
        raise SnapshotError(
            f"Row {row + at} of {name} has {found}, and the collection's have {dim}; write the "
            f"file without it."
        )
    numbers = column.flatten()
    if numbers.null_count:
        raise SnapshotError(
            f"A vector of {name} behind row {row} lacks a number; write the file without it."
        )
    with np.errstate(over="ignore"):  # too large is infinite, and refused later
        flat: FloatArray = numbers.to_numpy(zero_copy_only=False).astype(np.float32)
    return flat.reshape(-1, dim)
