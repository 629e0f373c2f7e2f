"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["held", "read_file", "replace_file"]


@contextmanager
def held(lock: Path, mode: int = 0o666, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock among the processes of this machine, and this one's threads; wait for it.

    It goes with its holder, however that ends. The same thread cannot hold it twice. Raises
    ``BlockingIOError`` where another holds it and nobody is to wait.
    """
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, mode)
    except PermissionError:
        handle = os.open(lock, os.O_RDONLY)  # another user's: enough for a lock, save on NFS
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def read_file(path: Path, limit: int) -> bytes:
    """Read a file, and no more than one byte past a limit of it.

    Raises ``OSError`` where it cannot be read, or is no plain file: a pipe would never end.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise IsADirectoryError(f"{path} is no file.")
    with path.open("rb") as file:
        return file.read(limit + 1)


def replace_file(path: Path, data: bytes) -> None:
    """Create or replace a file in one step, durably; its folder is created if need be."""
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
