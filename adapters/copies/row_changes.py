"""Keeping a copy equal to its source while both may be written to.

One pass compares source and copy row by row, in the order of the ids, and says what to write to
the copy. On an empty copy that is the copying itself; after an interruption it goes on with what
is missing; again and again it catches up with other writers. Once the copy serves, and has writers
of its own, the state of the source after the last pass, its *base*, tells who wrote last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from amips_plugins.collection import Id
from amips_plugins.errors import InvalidInput
from amips_plugins.files import replace_file

__all__ = ["Change", "Row", "SourceBaseline", "diff_rows", "digest", "encoded"]

_encoder = msgspec.msgpack.Encoder(
    order="deterministic", enc_hook=lambda value: np.asarray(value).tolist()
)


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a collection; its digest is equal for equal values."""

    id: Id
    digest: int
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """What to do to the copy for one id: write ``row`` (None: delete), where ``old`` is now."""

    id: Id
    row: Row | None
    old: Row | None


@dataclass
class SourceBaseline:
    """The ids and digests of a source as one pass read it, in the order of the ids."""

    ids: list[Id] = field(default_factory=list)
    digests: list[int] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Note the next row."""
        self.ids.append(row.id)
        self.digests.append(row.digest)

    def rows(self) -> Iterator[Row]:
        """Return them as rows without values."""
        for key, found in zip(self.ids, self.digests, strict=True):
            yield Row(key, found, {})

    def save(self, path: Path) -> None:
        """Write to a file, in one step."""
        digests = np.array(self.digests, dtype=np.uint64).tobytes()
        replace_file(path, msgspec.msgpack.encode((self.ids, digests)))

    @classmethod
    def load(cls, path: Path) -> SourceBaseline | None:
        """Read what ``save`` wrote; None where there is no such file."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            ids, digests = msgspec.msgpack.decode(data, type=tuple[list[int | str], bytes])
            found = cls(ids, np.frombuffer(digests, dtype=np.uint64).tolist())
            whole = len(found.ids) == len(found.digests)
        except (msgspec.MsgspecError, ValueError):
            whole = False
        if not whole:
            raise InvalidInput(
                f"{path} is damaged, in which a layout noted what it had copied; delete it and "
                f"run the same command again, which then brings over only keys that are missing."
            )
        return found


def encoded(values: Mapping[str, Any]) -> bytes:
    """Return bytes that are equal for equal values."""
    return _encoder.encode({name: _plain(value) for name, value in values.items()})


def _plain(value: Any) -> Any:
    # A sparse vector has integers for keys, which have no order in msgpack.
    sparse = isinstance(value, dict) and not all(isinstance(key, str) for key in value)
    return sorted(value.items()) if sparse else value


def digest(values: Mapping[str, Any]) -> int:
    """Return 64 bits that are equal for equal values."""
    return int.from_bytes(hashlib.blake2b(encoded(values), digest_size=8).digest(), "little")


def _order(key: Id) -> tuple[bool, Id]:
    """Order ids as databases do: integers before strings."""
    return isinstance(key, str), key


def diff_rows(
    source: Iterable[Row], copy: Iterable[Row], base: SourceBaseline | None = None
) -> Iterator[Change]:
    """Compare a source with its copy, rows in the order of the ids, each id once.

    With ``base``, the source as the pass before read it, only what changed in the source since
    then is a change, and only where nobody has written to the copy.
    """
    sources, copies = iter(source), iter(copy)
    bases = iter(()) if base is None else zip(base.ids, base.digests, strict=True)
    left, right, before = next(sources, None), next(copies, None), next(bases, None)
    while left is not None or right is not None or before is not None:
        heads: list[Any] = [head.id for head in (left, right) if head is not None]
        key = min(heads + ([before[0]] if before is not None else []), key=_order)
        row, old, known = None, None, None
        if left is not None and left.id == key:
            row, left = left, next(sources, None)
        if right is not None and right.id == key:
            old, right = right, next(copies, None)
        if before is not None and before[0] == key:
            known, before = before[1], next(bases, None)
        wanted, there = row and row.digest, old and old.digest
        if wanted != there and (base is None or (wanted != known and there == known)):
            yield Change(key, row, old)
