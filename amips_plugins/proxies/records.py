"""Records without what is ours: no caller sees a key that begins with ``amips_``, or writes one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["RESERVED", "hide", "of_others", "of_ours"]

RESERVED = "amips_"
"""What every key of ours begins with in users' records."""


def of_others(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a record without what is ours."""
    ours = of_ours(record)
    return {key: value for key, value in record.items() if key not in ours}


def hide(record: dict[str, Any] | None) -> None:
    """Take what is ours out of a record that was made for the caller."""
    if record:
        for key in of_ours(record):
            del record[key]


def of_ours(names: Iterable[Any]) -> list[Any]:
    """Return those of the names that are ours."""
    return [name for name in names if isinstance(name, str) and name.startswith(RESERVED)]
