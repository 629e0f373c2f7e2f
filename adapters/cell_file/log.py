"""Keys written and deleted since a cell file was: a log beside it, of whole calls.

::

    0   4 bytes  length of the entry          every entry; one that was cut short by a crash was
    4   uint32   its CRC-32                   never acknowledged, and is none
    8            the entry, MessagePack
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from amips_plugins.collection import Id
from amips_plugins.errors import CollectionError

__all__ = ["Entry", "append", "log_of", "packed", "read_entries"]

_PREFIX = struct.Struct("<II")


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call: keys with their vectors (float32) and cells (int64), or without any, deleted."""

    ids: list[Id]
    vectors: bytes = b""
    cells: bytes = b""
    fields: list[dict[str, Any]] | None = None


def log_of(path: Path, identity: str) -> Path:
    """Return the log of one writing of a cell file."""
    return path.with_name(f"{path.name}.{identity}.log")


def read_entries(path: Path, offset: int) -> tuple[list[Entry], int]:
    """Read what was logged behind an offset; return where to go on, too."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= offset:
                return [], offset
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    entries, at = [], 0
    decoder = msgspec.msgpack.Decoder(Entry)
    while len(data) - at >= _PREFIX.size:
        length, crc = _PREFIX.unpack_from(data, at)
        content = data[at + _PREFIX.size : at + _PREFIX.size + length]
        # A crash may leave zeros, which are the sum of nothing: no entry is that short.
        if not length or len(content) < length or zlib.crc32(content) != crc:
            break
        try:
            entries.append(decoder.decode(content))
        except msgspec.MsgspecError as exc:
            raise CollectionError(
                f"{path} holds what this version of amips-plugins cannot read ({exc}); take the "
                f"version that wrote it."
            ) from exc
        at += _PREFIX.size + length
    return entries, offset + at


def packed(entries: Sequence[Entry]) -> bytes:
    """Return entries as a log holds them."""
    parts = []
    for entry in entries:
        content = msgspec.msgpack.encode(entry)
        parts.append(_PREFIX.pack(len(content), zlib.crc32(content)) + content)
    return b"".join(parts)


def append(path: Path, entry: Entry, known: int) -> None:
    """Log an entry, durably, behind the last whole one; hold the file's lock.

    So far the caller has read it.
    """
    _, end = read_entries(path, known)
    with path.open("ab") as file:
        file.truncate(end)
        file.write(packed([entry]))
        file.flush()
        os.fsync(file.fileno())
