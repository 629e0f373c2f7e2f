"""The format of a cell file: one flat file, all numbers little-endian.

::

    0       8 bytes  AMIPSCEL
    8       uint32   0x01020304, which tells the byte order
    12      uint32   version of the format
    16      uint64   length of the header
    24      32 bytes sha256 of the header
    56               the header, JSON (``Header``); up to 4096
    4096    runs     for every run: first row, place of its codes, CRC-32 of these; one more entry
                     ends the table
            codes    for every run: mean, then the codes of its keys, then the length of each
                     key's steps, and with L2 what its half square adds
            rows     for every key: vector, id, place and length of its fields if there are any,
                     CRC-32 of all this
            index    the ids in their order, then the row of each
            fields   JSON objects

A run is a cell; behind the cells come runs of keys that have none, of up to 4,096 keys.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from amips_plugins.collection import CollectionKey
from amips_plugins.errors import CollectionError
from amips_plugins.vectors import Metric

__all__ = [
    "HEADER_BYTES",
    "LOOSE",
    "RUNS",
    "Bits",
    "Header",
    "Section",
    "check_runs",
    "header_bytes",
    "read_header",
    "row_type",
    "sections_of",
]

HEADER_BYTES = 4096
LOOSE = 4096
"""Keys in a run of those that have no cell."""

RUNS = np.dtype([("row", "<u8"), ("code", "<u8"), ("crc", "<u4")])

Bits = Literal[2, 4, 8]

_MAGIC = b"AMIPSCEL"
_FORMAT = 2
_ORDER = 0x01020304
_PREFIX = struct.Struct("<8sIIQ32s")
_ID = r"<i8|<u8|\|S[1-9][0-9]{0,3}"
_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 50)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a part of the file lies; its sha256 where it is read as a whole, else empty."""

    offset: _Size
    length: _Size
    sha256: str = ""


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a cell file says of itself.

    Attributes
    ----------
    identity
        Of this writing of the file, at random: what belongs to it, names it.
    collection, metric, dim, count
        What its keys are, and how many.
    bits
        Of a code, for each dimension.
    layout, version, n_cells
        Its cells and the bundle that they come from; empty and 0 without cells.
    n_runs
        Cells, and runs of keys without one.
    ids
        How an id is stored: whole numbers, or UTF-8 of a fixed length.
    has_fields
        Whether keys have stored fields.
    size
        Bytes of the whole file.
    sections
        Its parts by name.
    """

    identity: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    collection: CollectionKey
    metric: Metric
    dim: Annotated[int, msgspec.Meta(ge=1, lt=1 << 20)]
    count: _Size
    bits: Bits
    layout: str
    version: str
    n_cells: _Size
    n_runs: _Size
    ids: Annotated[str, msgspec.Meta(pattern=f"^({_ID})$")]
    has_fields: bool
    size: _Size
    sections: dict[str, Section]


def header_bytes(header: Header) -> bytes:
    """Return the first 4096 bytes of a file, or raise ``CollectionError`` if it does not fit."""
    data = msgspec.json.encode(header)
    if len(data) > HEADER_BYTES - _PREFIX.size:
        raise CollectionError("The names in the header of a cell file are too long for it.")
    digest = hashlib.sha256(data).digest()
    prefix = _PREFIX.pack(_MAGIC, _ORDER, _FORMAT, len(data), digest)
    return (prefix + data).ljust(HEADER_BYTES, b"\0")


def read_header(data: bytes, size: int, where: str) -> Header:
    """Read and check the first 4096 bytes of a file of this size, or raise ``CollectionError``."""
    if len(data) < HEADER_BYTES or not data.startswith(_MAGIC):
        raise CollectionError(f"{where} is no cell file, or cut short; write it again.")
    _, order, version, length, digest = _PREFIX.unpack_from(data)
    if order != _ORDER:
        raise CollectionError(
            f"{where} was written in another byte order, which this version does not read; write "
            f"it again: amips cell-file."
        )
    if version != _FORMAT:
        raise CollectionError(
            f"{where} has format {version}, and this version of amips-plugins reads {_FORMAT}; "
            f"write it again: amips cell-file."
        )
    content = data[_PREFIX.size : _PREFIX.size + min(length, HEADER_BYTES)]
    if hashlib.sha256(content).digest() != digest:
        raise damaged(where, "its header's checksum differs")
    try:
        header = msgspec.json.decode(content, type=Header)
    except msgspec.MsgspecError as exc:
        raise damaged(where, str(exc)) from exc
    if header.size != size:
        raise damaged(where, f"it has {size:,} bytes of {header.size:,}: it was cut short")
    lengths = {name: section.length for name, section in header.sections.items()}
    codes, fields = lengths.get("codes", 0), lengths.get("fields", 0)
    if header.sections.keys() != sections_of(header, codes, fields).keys() or any(
        (found.offset, found.length) != (wanted.offset, wanted.length)
        for found, wanted in zip(
            header.sections.values(), sections_of(header, codes, fields).values(), strict=True
        )
    ):
        raise damaged(where, "its parts do not fit its header")
    return header


def damaged(where: str, how: str) -> CollectionError:
    """Say that a file is not what was written."""
    return CollectionError(f"{where} is damaged ({how}); write it again: amips cell-file.")


def row_type(header: Header) -> np.dtype[Any]:
    """Return how a row is stored."""
    fields = [("at", "<u8"), ("length", "<u4")] if header.has_fields else []
    parts = [("vector", "<f4", (header.dim,)), ("id", header.ids), *fields, ("crc", "<u4")]
    return np.dtype(parts)


def sections_of(header: Header, codes: int, fields: int) -> dict[str, Section]:
    """Return where the parts lie, from their number of bytes, without their checksums."""
    id_bytes = np.dtype(header.ids).itemsize
    lengths = {
        "runs": (header.n_runs + 1) * RUNS.itemsize,
        "codes": codes,
        "rows": header.count * row_type(header).itemsize,
        "index": header.count * (id_bytes + 8),
        "fields": fields,
    }
    found, offset = {}, HEADER_BYTES
    for name, length in lengths.items():
        found[name] = Section(offset, length)
        offset += length
    return found


def check_runs(data: bytes, header: Header, where: str) -> npt.NDArray[Any]:
    """Read and check the table of runs, ``(n_runs + 1,)`` of ``RUNS``."""
    section = header.sections["runs"]
    if hashlib.sha256(data).hexdigest() != section.sha256:
        raise damaged(where, "its table of cells has another checksum")
    runs = np.frombuffer(data, RUNS)
    ends = (int(runs["row"][-1]), int(runs["code"][-1]))
    if (
        ends != (header.count, header.sections["codes"].length)
        or (np.diff(runs["row"].astype(np.int64)) < 0).any()
        or (np.diff(runs["code"].astype(np.int64)) < 0).any()
    ):
        raise damaged(where, "its table of cells makes no sense")
    return runs
