"""A uniform sample of query vectors, in memory and in a Parquet file (extra ``query-log``).

One column ``query``, a fixed-size list of float32; what it is a sample of stands as JSON under
``amips`` in the metadata of the schema. Any tool that reads Parquet reads it.
"""

from __future__ import annotations

import io
import math
import random
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from amips_plugins.collection import CollectionKey
from amips_plugins.errors import InvalidInput, require
from amips_plugins.vectors import FloatArray, Metric

__all__ = ["FORMAT", "Reservoir", "Sample", "SampleHeader", "encode_sample", "read_sample"]

FORMAT = 1
_KEY = b"amips"
_COLUMN = "query"
_START = 64


class Reservoir:
    """Keeps each row seen with the same probability (K.-H. Li 1994, algorithm L).

    Once it is full, most rows cost a comparison: the algorithm draws how many to skip.
    """

    def __init__(self, capacity: int, dim: int, rng: random.Random) -> None:
        self.seen = 0
        self._capacity = capacity
        self._rows: FloatArray = np.empty((min(_START, capacity), dim), dtype=np.float32)
        self._rng = rng
        self._weight = 1.0
        self._next = 0  # which row, counted from 0, replaces another; of use once it is full
        self._skip()
        self._next += capacity

    def __len__(self) -> int:
        return min(self.seen, self._capacity)

    def add(self, rows: FloatArray) -> None:
        """Show it rows, of which it copies what it keeps."""
        first, self.seen = self.seen, self.seen + len(rows)
        if first < self._capacity:
            fresh = rows[: self._capacity - first]
            self._grow(first + len(fresh))
            self._rows[first : first + len(fresh)] = fresh
        while self._next < self.seen:
            self._rows[self._rng.randrange(self._capacity)] = rows[self._next - first]
            self._next += 1
            self._skip()

    def rows(self) -> FloatArray:
        """Return a copy of the sample."""
        rows: FloatArray = self._rows[: len(self)].copy()
        return rows

    def _skip(self) -> None:
        """Draw how many rows to pass over before one is kept."""
        self._weight *= math.exp(-self._rng.expovariate(1.0) / self._capacity)
        kept = min(max(self._weight, 1e-300), 1.0 - 2.0**-53)
        self._next += int(-self._rng.expovariate(1.0) / math.log1p(-kept))

    def _grow(self, needed: int) -> None:
        if needed > len(self._rows):
            size = min(self._capacity, max(needed, 2 * len(self._rows)))
            self._rows = np.concatenate(
                [self._rows, np.empty((size - len(self._rows), self._rows.shape[1]), np.float32)]
            )


class SampleHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a file says of its queries.

    Attributes
    ----------
    format
        Version of this structure.
    collection, metric, dim
        What was searched.
    seen
        Queries that the sample stands for; each of them is in it with the same probability.
    started, ended
        UTC times of the first and the last of them, ISO 8601.
    """

    format: int
    collection: CollectionKey
    metric: Metric
    dim: int
    seen: int
    started: str
    ended: str


@dataclass(frozen=True)
class Sample:
    """Queries drawn uniformly from those seen, ``(n, dim)``, and what the file says of them."""

    header: SampleHeader
    queries: FloatArray


def encode_sample(sample: Sample) -> bytes:
    """Return the content of a file."""
    pyarrow = require("pyarrow", "query-log")
    parquet = require("pyarrow.parquet", "query-log")
    values = pyarrow.array(np.ascontiguousarray(sample.queries).reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(values, sample.header.dim)
    metadata = {_KEY: msgspec.json.encode(sample.header)}
    schema = pyarrow.schema([(_COLUMN, column.type)], metadata=metadata)
    out = io.BytesIO()
    parquet.write_table(
        pyarrow.Table.from_arrays([column], schema=schema),
        out,
        compression="zstd",
        use_dictionary=False,  # no two coordinates are alike
        write_statistics=False,
        write_page_checksum=True,
    )
    return out.getvalue()


def read_sample(path: Path) -> Sample:
    """Read a file, or raise ``InvalidInput`` where it is no sample of this format."""
    pyarrow = require("pyarrow", "query-log")
    parquet = require("pyarrow.parquet", "query-log")
    try:
        content = pyarrow.BufferReader(path.read_bytes())
        table = parquet.read_table(content, page_checksum_verification=True)
        header = _header((table.schema.metadata or {}).get(_KEY, b"{}"), path)
        column = table.column(_COLUMN).combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False)
        queries = flat.astype(np.float32, copy=False).reshape(-1, header.dim)
    except InvalidInput:
        raise
    except OSError as exc:
        raise InvalidInput(f"{path} cannot be read as a log of queries ({exc}).") from exc
    except (pyarrow.ArrowException, msgspec.MsgspecError, KeyError, ValueError) as exc:
        raise InvalidInput(
            f"{path} is no log of queries ({exc}); pass a file or folder that a QueryLog wrote."
        ) from exc
    if len(queries) != table.num_rows or not len(queries) <= header.seen:
        raise InvalidInput(f"{path} does not hold what its header says; leave the file out.")
    return Sample(header, queries)


def _header(data: bytes, path: Path) -> SampleHeader:
    version = msgspec.json.decode(data, type=_Peek).format
    if version != FORMAT:
        raise InvalidInput(
            f"{path} is a query log of format {version}, this version of amips-plugins reads "
            f"{FORMAT}; upgrade the package, or leave the file out."
        )
    return msgspec.json.decode(data, type=SampleHeader)


class _Peek(msgspec.Struct):
    """The one field that every format has."""

    format: int
