"""The health of running processes, in files: one a process and collection, replaced as it moves."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import msgspec

from amips_plugins.errors import InvalidInput
from amips_plugins.files import read_file, replace_file
from amips_plugins.health.gate import Health

__all__ = ["RunningStatus", "StatusFile", "read_status"]

_FORMAT = 1
_LIMIT = 1 << 16  # bytes
_FORGOTTEN = 24 * 3600.0  # seconds after which a file that nobody writes goes
_PATTERN = "amips-*.json"


class RunningStatus(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a process said of one router.

    Attributes
    ----------
    format
        Version of this structure.
    collection
        What it searches.
    host, pid
        Which process.
    written
        UTC time, ISO 8601. What was written long ago may be of a process that is no more, or that
        nobody asks anything.
    health
        How it did then.
    """

    format: int
    collection: str
    host: str
    pid: int
    written: str
    health: Health

    @property
    def age(self) -> float:
        """Seconds since it was written, by this machine's clock."""
        then = datetime.fromisoformat(self.written)
        return max(0.0, (datetime.now(timezone.utc) - then).total_seconds())


class StatusFile:
    """Writes a router's health to a folder; give it to ``HealthMonitor`` as ``on_health``.

    Parameters
    ----------
    folder
        Where to, for any number of processes; created if need be.
    collection
        What is searched, for the reader.
    every
        Seconds from one writing to the next at the least; a change of state is written at once.

    Examples
    --------
    >>> from amips_plugins.health.monitor import HealthMonitor
    >>> watch = HealthMonitor(on_health=StatusFile("status", "docs"))
    """

    def __init__(self, folder: str | Path, collection: str, every: float = 10.0) -> None:
        if not every >= 0:
            raise InvalidInput(f"every={every!r} is no time; pass seconds of 0 or more.")
        self._folder = Path(folder)
        self._collection = collection
        self._every = every
        self._due = 0.0
        self._written: tuple[int, str] | None = None  # process and state

    def __call__(self, health: Health) -> None:
        """Write it, if its time has come, or raise ``OSError`` where the folder refuses."""
        now, pid, host = time.monotonic(), os.getpid(), socket.gethostname()
        if now < self._due and self._written == (pid, health.state):
            return
        if self._written is None:
            _forget(self._folder)
        status = RunningStatus(
            format=_FORMAT,
            collection=self._collection,
            host=host,
            pid=pid,
            written=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            health=health,
        )
        who = hashlib.sha256(f"{host}\0{self._collection}".encode()).hexdigest()[:12]
        replace_file(self._folder / f"amips-{who}-{pid}.json", msgspec.json.encode(status))
        self._due, self._written = now + self._every, (pid, health.state)


def read_status(folder: str | Path) -> list[RunningStatus]:
    """Read what a folder's processes said, the latest first, or raise ``InvalidInput``."""
    home = Path(folder)
    if not home.is_dir():
        raise InvalidInput(f"There is no folder {folder}; pass the one given to StatusFile.")
    found = []
    for path in sorted(home.glob(_PATTERN)):
        try:
            data = read_file(path, _LIMIT)
            status = msgspec.json.decode(data[:_LIMIT], type=RunningStatus)
            _ = status.age
        except FileNotFoundError:
            continue  # it has just gone
        except (OSError, msgspec.MsgspecError, ValueError, TypeError) as exc:
            raise InvalidInput(f"{path} is no status of a router ({exc}); remove it.") from exc
        found.append(status)
    return sorted(found, key=lambda status: status.written, reverse=True)


def _forget(folder: Path) -> None:
    """Remove what was written long ago."""
    for path in folder.glob(_PATTERN):
        with suppress(FileNotFoundError):  # another process was first
            if time.time() - path.stat().st_mtime > _FORGOTTEN:
                path.unlink()
