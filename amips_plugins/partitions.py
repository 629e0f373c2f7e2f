"""Parts that a collection's keys lie in already, as its users have cut them.

A value of a stored field, a partition of Milvus or a shard key of Qdrant: nothing is laid out for
them and nothing is written, and a key's value is its user's own, so that it is never stale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from amips_plugins.errors import InvalidInput
from amips_plugins.vectors import IntArray

__all__ = ["NATIVE_PARTITIONS", "Partitions", "Value", "as_value", "column"]

Value = int | str

NATIVE_PARTITIONS = "native"
"""How a command names the parts that the database itself has."""


@dataclass(frozen=True)
class Partitions:
    """What tells the parts of a collection apart, and the parts that a router knows.

    Attributes
    ----------
    field
        Name of the stored field whose value says where a key belongs; None for the parts that the
        database itself has: partitions of Milvus, shard keys of Qdrant.
    values
        The parts that are known, each once, in the order of the cells that a plan counts. Keys of
        another value, or of none, are overflow.
    """

    field: str | None
    values: tuple[Value, ...] = ()

    @classmethod
    def named(cls, name: str, values: tuple[Value, ...] = ()) -> Partitions:
        """Return the partitions that a field tells apart; ``native`` are the database's own."""
        return cls(None if name in ("", NATIVE_PARTITIONS) else name, values)

    @cached_property
    def layout(self) -> str:
        """Identifies these parts as the cells of a plan."""
        digest = hashlib.sha256(repr((self.field, self.values)).encode())
        return f"given{digest.hexdigest()[:10]}"

    @property
    def key(self) -> str:
        """The field's name; empty for the database's own."""
        return self.field or ""

    @cached_property
    def _cells(self) -> Mapping[Value, int]:
        return {value: cell for cell, value in enumerate(self.values)}

    def cells_of(self, values: Iterable[Value | None]) -> IntArray:
        """Return ``(n,)`` int64: the cell of each value, -1 for those that are not known."""
        cells = self._cells
        return np.array(
            [-1 if value is None else cells.get(value, -1) for value in values], dtype=np.int64
        )

    def chosen(self, cells: Iterable[int]) -> list[Value]:
        """Return the values of some cells; -1 is none."""
        return [self.values[cell] for cell in cells if cell >= 0]

    def __str__(self) -> str:
        return "its own partitions" if self.field is None else f"the field {self.field!r}"


def as_value(found: Any) -> Value | None:
    """Return a stored value as one that can tell parts apart; None for everything else.

    That is a whole number or a text. A list of one of them, as Qdrant takes it, is that one; of a
    list of several the first counts.
    """
    if isinstance(found, Sequence) and not isinstance(found, str) and len(found):
        found = found[0]
    if isinstance(found, bool) or not isinstance(found, (int, str, np.integer)):
        return None
    return found if isinstance(found, str) else int(found)


def _look_up(record: Mapping[str, Any], name: str) -> Any:
    """Return what is under a name, also one such as ``metadata.topic``."""
    if name in record or "." not in name:
        return record.get(name)
    first, rest = name.split(".", 1)
    inner = record.get(first)
    return _look_up(inner, rest) if isinstance(inner, Mapping) else None


def column(name: str, records: Iterable[Mapping[str, Any] | None]) -> list[Value | None]:
    """Return the values that a field has in some records.

    Raises
    ------
    InvalidInput
        One is neither a whole number nor a text, and something all the same.
    """
    values = []
    for record in records:
        found = _look_up(record or {}, name)
        value = as_value(found)
        empty = found is None or (isinstance(found, Sequence) and not len(found))
        if value is None and not empty:
            raise InvalidInput(
                f"The field {name!r} holds {found!r}, and partitions are told apart by whole "
                f"numbers or texts; name another field."
            )
        values.append(value)
    return values
