"""Printing results: a table for people, JSON for scripts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
import msgspec

__all__ = ["duration", "echo_json", "share", "size", "table"]


def echo_json(value: Any) -> None:
    """Print a value as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def share(value: float | None) -> str:
    """Write a share as a percentage; ``-`` where it is unknown."""
    return "-" if value is None else f"{value:.1%}"


def size(n_bytes: float) -> str:
    """Write a number of bytes for people, in powers of 1,000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """Write a time for people, roughly."""
    if seconds < 1:
        return "less than a second"
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns: the first to the left, numbers to the right."""
    widths = [max(len(str(row[at])) for row in (header, *rows)) for at in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        first = f"{row[0]:<{widths[0]}}"
        rest = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)
