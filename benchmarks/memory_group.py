"""A control group of Linux: it caps a process' memory, page cache included, and counts reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CannotCap", "MemoryGroup", "Reads"]

_ROOT = Path("/sys/fs/cgroup")
_NO_LIMIT = 1_000_000_000  # reads a second: the first version counts only what it limits


class CannotCap(Exception):
    """No group can be had on this machine, for the reason in the message."""


@dataclass(frozen=True)
class Reads:
    """What a group has read from its disks."""

    count: int
    n_bytes: int


class MemoryGroup:
    """A group of its own, of the first or the second version; a context manager removes it."""

    def __init__(self) -> None:
        name = f"amips-cold-{os.getpid()}"
        self._second = (_ROOT / "cgroup.controllers").exists()
        try:
            self._memory, self._io = self._second_version(name) if self._second else _first(name)
        except OSError as exc:
            raise CannotCap(f"no control group can be made: {exc}") from exc

    def _second_version(self, name: str) -> tuple[Path, Path]:
        folder = _ROOT / _own("")
        known = (folder / "cgroup.controllers").read_text().split()
        if not {"memory", "io"} <= set(known):
            raise CannotCap("the control group of this process has no memory and io controllers")
        (folder / "cgroup.subtree_control").write_text("+memory +io")
        (folder / name).mkdir()
        return folder / name, folder / name

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *exc: object) -> None:
        for folder in {self._memory, self._io}:
            folder.rmdir()

    def take(self, pid: int) -> None:
        """Move a process here; what it asks for from now on counts."""
        for folder in {self._memory, self._io}:
            (folder / "cgroup.procs").write_text(str(pid))

    def used(self) -> int:
        """Return the bytes of the processes, and of the kernel for them, without page cache."""
        lines = (self._memory / "memory.stat").read_text().splitlines()
        stat = {key: int(value) for key, _, value in (line.partition(" ") for line in lines)}
        if self._second:
            return stat["anon"] + stat["kernel"]
        kernel = int((self._memory / "memory.kmem.usage_in_bytes").read_text())
        return stat["rss"] + kernel

    def cap(self, n_bytes: int | None) -> bool:
        """Limit memory, or lift the limit; tell whether what is used could be brought below."""
        name = "memory.max" if self._second else "memory.limit_in_bytes"
        none = "max" if self._second else "-1"
        try:
            (self._memory / name).write_text(none if n_bytes is None else str(n_bytes))
        except OSError:
            return False
        return True

    def reads(self) -> Reads:
        """Return what was read from disks so far."""
        if self._second:
            lines = (self._io / "io.stat").read_text().splitlines()
            pairs = [dict(part.split("=") for part in line.split()[1:]) for line in lines]
            return Reads(
                sum(int(one["rios"]) for one in pairs), sum(int(one["rbytes"]) for one in pairs)
            )
        return Reads(
            _sum_of_reads(self._io / "blkio.throttle.io_serviced"),
            _sum_of_reads(self._io / "blkio.throttle.io_service_bytes"),
        )


def _own(controller: str) -> str:
    """Return this process' own group of a controller, below the root; "" is the second version."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            return path.lstrip("/")
    raise CannotCap(f"there is no controller {controller!r}")


def _first(name: str) -> tuple[Path, Path]:
    folders = []
    for controller in ("memory", "blkio"):
        root = _ROOT / controller
        inside = root / _own(controller)
        folder = (inside if inside.is_dir() else root) / name  # a container may see its own as root
        folder.mkdir()
        folders.append(folder)
    memory, io = folders
    for disk in Path("/sys/block").iterdir():
        number = (disk / "dev").read_text().strip()
        rule = io / "blkio.throttle.read_iops_device"
        try:
            rule.write_text(f"{number} {_NO_LIMIT}")
        except OSError:
            continue  # no disk that is read from
    return memory, io


def _sum_of_reads(file: Path) -> int:
    lines = [line.split() for line in file.read_text().splitlines()]
    return sum(int(parts[2]) for parts in lines if len(parts) == 3 and parts[1] == "Read")
