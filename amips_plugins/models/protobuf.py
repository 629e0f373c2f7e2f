"""A strict reader of protobuf messages: only what a schema names, in the one form it is written in.

Protobuf parsers disagree about odd input (a field twice, a number with leading zeros, an unknown
field), and what one skips another may act upon. Here all of that is refused, so that two readers
of the same bytes cannot see different messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Field", "Malformed", "Reader"]

_LONGEST_TEXT = 256
_VARINT, _BYTES = 0, 2  # wire types


class Malformed(ValueError):
    """The bytes are not such a message; the text says why, as half a sentence."""


@dataclass(frozen=True)
class Field:
    """A field of a message, by the name that the result or a refusal calls it.

    ``kind`` is ``int`` (64 bits with sign), ``text``, ``bytes`` (a view, not copied), ``refused``,
    or the fields of a message by number; if it is ``repeated``, the result is a list.
    """

    name: str
    kind: Literal["int", "text", "bytes", "refused"] | Mapping[int, Field]
    repeated: bool = False


class Reader:
    """Reads messages of no more than so many fields in all, which bounds time and memory."""

    def __init__(self, budget: int) -> None:
        self._left = budget

    def read(self, data: memoryview, schema: Mapping[int, Field]) -> dict[str, Any]:
        """Read one message: lists of repeated fields, and those single fields that are there."""
        result: dict[str, Any] = {f.name: [] for f in schema.values() if f.repeated}
        at = 0
        while at < len(data):
            self._left -= 1
            if self._left < 0:
                raise Malformed("it has too many fields")
            tag, at = _varint(data, at)
            field = schema.get(tag >> 3)
            if field is None:
                raise Malformed(f"it has the unknown field {tag >> 3}")
            if field.kind == "refused":
                raise Malformed(f"it has {field.name}")
            value, at = self._value(data, at, tag & 7, field)
            if field.repeated:
                result[field.name].append(value)
            elif field.name in result:
                raise Malformed(f"it has the field {field.name} twice")
            else:
                result[field.name] = value
        return result

    def _value(self, data: memoryview, at: int, wire: int, field: Field) -> tuple[Any, int]:
        if wire != (_VARINT if field.kind == "int" else _BYTES):
            raise Malformed(f"the field {field.name} has the wire type {wire}")
        number, at = _varint(data, at)
        if field.kind == "int":
            return number - (1 << 64) * (number >> 63), at
        end = at + number
        if end > len(data):
            raise Malformed("it ends too early")
        content = data[at:end]
        if field.kind == "bytes":
            return content, end
        if field.kind == "text":
            return _text(content), end
        assert not isinstance(field.kind, str)  # noqa: S101 - for the type checker
        return self.read(content, field.kind), end


def _text(content: memoryview) -> str:
    if len(content) > _LONGEST_TEXT:
        raise Malformed(f"it has a name of {len(content)} bytes")
    try:
        return bytes(content).decode()
    except UnicodeDecodeError as exc:
        raise Malformed("it has a name that is no text") from exc


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return the number at a place, and the place after it."""
    number = 0
    for place, byte in enumerate(data[at : at + 10]):
        number |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            if number >> 64 or (place and not byte):
                raise Malformed("it has a number of odd form")
            return number, at + place + 1
    raise Malformed("it ends too early" if len(data) - at < 10 else "it has a number of odd form")
