"""What long work says of the disk it writes to."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amips_plugins.errors import InvalidInput, TrainingError

__all__ = ["check_room", "says_when_full"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_room(folder: Path, needed: int) -> None:
    """Refuse work for whose files the disk has no room."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InvalidInput(
            f"{folder} needs about {needed / 1e9:.2g} GB more than its disk holds now "
            f"({free / 1e9:.2g} GB are free); make room or name a folder elsewhere, and run the "
            f"same command again."
        )


@contextmanager
def says_when_full(folder: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full; everything written so far is kept."""
    try:
        yield
    except OSError as exc:
        if exc.errno in _FULL:
            raise TrainingError(
                f"The disk of {folder} is full; make room and run the same command again: it goes "
                f"on where it stopped."
            ) from exc
        raise
