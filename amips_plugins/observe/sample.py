"""A sample of query vectors in a Parquet file; needs the extra ``query-log``.

One column ``query``, a fixed-size list of float32; what it is a sample of stands as JSON under
``amips`` in the metadata of the schema. Any tool that reads Parquet reads it.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from amips_plugins.collection import CollectionKey
from amips_plugins.errors import InvalidInput, require
from amips_plugins.vectors import FloatArray, Metric

__all__ = ["FORMAT", "Sample", "SampleHeader", "encode_sample", "read_sample"]

FORMAT = 1
_KEY = b"amips"
_COLUMN = "query"


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
    """Queries drawn uniformly from those seen.

    Attributes
    ----------
    header
        What they are.
    queries
        ``(n, dim)`` float32.
    """

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
    """Read a file.

    Raises
    ------
    InvalidInput
        It is no sample of queries, or of another format.
    MissingExtra
        pyarrow is not installed.
    """
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
