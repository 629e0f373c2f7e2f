"""Keys in Parquet files: one schema, small row groups, a checksum on every page."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from amips_plugins.collection import Id
from amips_plugins.errors import SnapshotError, require
from amips_plugins.partitions import Value
from amips_plugins.vectors import FloatArray

__all__ = ["KeyFile", "ParquetKeys", "check_file", "column_of", "rows_a_file", "texts"]

ROW_GROUP = 16_384  # keys; a reader holds one or two of them
_FILE = 256 << 20  # bytes of vectors in one file, at most
_KEPT = 1  # row groups that a thread remembers, for reads that end inside of one


def rows_a_file(dim: int) -> int:
    """Return how many keys one file holds, at most."""
    return max(1, _FILE // (4 * dim * ROW_GROUP)) * ROW_GROUP


def _schema(dim: int) -> Any:
    pa = require("pyarrow", "scale")
    vectors = pa.list_(pa.field("item", pa.float32(), nullable=False), dim)
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),  # as JSON: ints stay ints
            pa.field("vector", vectors, nullable=False),
            pa.field("value", pa.string()),  # where the key belongs, as JSON
        ]
    )


class KeyFile:
    """A file of keys that is being written; nobody sees it before ``done``."""

    def __init__(self, path: Path, dim: int) -> None:
        parquet = require("pyarrow.parquet", "scale")
        self._path, self._dim, self._schema = path, dim, _schema(dim)
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._writer = parquet.ParquetWriter(
            self._temporary,
            self._schema,
            compression="none",  # numbers of vectors have nothing to gain
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )
        self._ids: list[str] = []
        self._values: list[str | None] = []
        self._vectors: list[FloatArray] = []
        self.count = 0

    def add(
        self, ids: Sequence[Id], vectors: FloatArray, values: Sequence[Value | None] | None
    ) -> None:
        """Append keys."""
        self._ids += [msgspec.json.encode(key).decode() for key in ids]
        self._values += [
            None if value is None else msgspec.json.encode(value).decode()
            for value in values or [None] * len(ids)
        ]
        self._vectors.append(vectors)
        self.count += len(ids)
        while len(self._ids) >= ROW_GROUP:
            self._flush(ROW_GROUP)

    def _flush(self, count: int) -> None:
        pa = require("pyarrow", "scale")
        vectors = np.concatenate(self._vectors)
        there = pa.array(np.ascontiguousarray(vectors[:count]).ravel())
        kind = self._schema.field("vector").type
        columns = [
            pa.array(self._ids[:count], pa.string()),
            pa.FixedSizeListArray.from_arrays(there, type=kind),
            pa.array(self._values[:count], pa.string()),
        ]
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=count)
        self._ids, self._values = self._ids[count:], self._values[count:]
        self._vectors = [vectors[count:]]

    def done(self) -> int:
        """Let the file appear; return its size in bytes."""
        if self._ids:
            self._flush(len(self._ids))
        self._writer.close()
        size = self._temporary.stat().st_size
        self._temporary.replace(self._path)
        return size

    def give_up(self) -> None:
        """Leave nothing behind."""
        self._writer.close()
        self._temporary.unlink(missing_ok=True)


def check_file(path: Path, dim: int, count: int) -> None:
    """Look at a file's footer, or raise ``SnapshotError``."""
    found = _opened(path)
    groups = [
        found.metadata.row_group(place).num_rows for place in range(found.metadata.num_row_groups)
    ]
    whole = [ROW_GROUP] * (count // ROW_GROUP) + [count % ROW_GROUP] * (count % ROW_GROUP > 0)
    if not found.schema_arrow.equals(_schema(dim)) or groups != whole:
        raise _damaged(path, "it is not the file that was written")
    found.close()


def _opened(path: Path) -> Any:
    parquet = require("pyarrow.parquet", "scale")
    try:
        return parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
    except OSError as exc:  # pyarrow's own errors are of these, or ValueErrors
        raise _damaged(path, exc) from exc
    except ValueError as exc:
        raise _damaged(path, exc) from exc


def _damaged(path: Path, why: object) -> SnapshotError:
    first = (str(why).splitlines() or [type(why).__name__])[0]
    return SnapshotError(
        f"{path} is damaged or missing ({first}); delete it, if it is there, and run the same "
        f"amips snapshot again: it reads those keys alone."
    )


@dataclass(frozen=True)
class ParquetKeys:
    """The vectors of files of keys, one behind the other.

    Attributes
    ----------
    files
        Their paths.
    starts
        The row that each begins with, and how many rows there are.
    dim
        Dimension.
    """

    files: tuple[Path, ...]
    starts: tuple[int, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return len(self), self.dim

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, rows: Any, /) -> FloatArray:
        """Read rows; every row group that holds some is read, once."""
        if isinstance(rows, slice):
            first, end, step = rows.indices(len(self))
            if step != 1:
                raise ValueError("rows are read one after the other")
            return self._read(np.arange(first, max(first, end)))
        wanted = np.asarray(rows)
        distinct, places = np.unique(wanted, return_inverse=True)
        return self._read(distinct)[places.ravel()]

    def _read(self, rows: Any) -> FloatArray:
        """Read distinct rows in order."""
        found = np.empty((len(rows), self.dim), dtype=np.float32)
        starts = np.asarray(self.starts)
        file = np.searchsorted(starts, rows, side="right") - 1
        group = (rows - starts[file]) // ROW_GROUP
        borders = np.flatnonzero(np.diff(file) | np.diff(group)) + 1
        for part in np.split(np.arange(len(rows)), borders):
            if len(part):
                which, where = int(file[part[0]]), int(group[part[0]])
                vectors = _group(self.files[which], where, self.dim)
                found[part] = vectors[rows[part] - starts[which] - where * ROW_GROUP]
        return found


class _Remembered(threading.local):
    def __init__(self) -> None:
        self.groups: OrderedDict[tuple[Path, int], FloatArray] = OrderedDict()


_REMEMBERED = _Remembered()


def _group(path: Path, group: int, dim: int) -> FloatArray:
    known = _REMEMBERED.groups
    if (path, group) not in known:
        while len(known) >= _KEPT:
            known.popitem(last=False)
        column = column_of(path, "vector", group)
        known[path, group] = column.values.to_numpy(zero_copy_only=False).reshape(-1, dim)
    known.move_to_end((path, group))
    return known[path, group]


def column_of(path: Path, name: str, group: int) -> Any:
    """Read one column of one row group as an Arrow array."""
    file = _opened(path)
    try:
        return file.read_row_group(group, columns=[name]).column(0).combine_chunks()
    except (OSError, ValueError) as exc:
        raise _damaged(path, exc) from exc
    finally:
        file.close()
        require("pyarrow", "scale").default_memory_pool().release_unused()


def texts(files: Sequence[Path], name: str) -> Iterator[str | None]:
    """Yield the entries of a column of texts, row group by row group."""
    for path in files:
        file = _opened(path)
        groups = file.metadata.num_row_groups
        file.close()
        for group in range(groups):
            yield from column_of(path, name, group).to_pylist()
