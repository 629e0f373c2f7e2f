"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

__all__ = ["read_file", "replace_file"]


def read_file(path: Path, limit: int) -> bytes:
    """Read a file, and no more than one byte past a limit of it.

    Raises
    ------
    OSError
        It cannot be read, or is no plain file: a pipe would never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise IsADirectoryError(f"{path} is no file.")
    with path.open("rb") as file:
        return file.read(limit + 1)


def replace_file(path: Path, data: bytes) -> None:
    """Create or replace a file in one step, durably; its folder is created if need be.

    Parameters
    ----------
    path
        The file.
    data
        Its new content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
