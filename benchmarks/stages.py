"""What the stages of a training take: seconds, processor time and memory."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from amips_plugins.progress import Step

__all__ = ["Stage", "Stages", "anonymous_bytes", "descendants"]

_INTERVAL, _WITH_WORKERS = 0.02, 0.5  # seconds between two looks at the memory


@dataclass
class Stage:
    """One stage; what comes between two stages is one too.

    Attributes
    ----------
    name
        Its title, or ``after`` the title before.
    seconds, cpu_s
        Wall clock, and processor time of the process and of those it started.
    peak
        Largest anonymous memory of one process, in bytes: file pages that the system may drop at
        any time are not counted.
    """

    name: str
    seconds: float = 0.0
    cpu_s: float = 0.0
    peak: int = 0


@dataclass
class Stages:
    """Watches a training as its ``progress``; ``end`` returns the stages in their order.

    With ``workers`` the processes that this one starts are watched, too, and those of Ray counted
    that work at once. With ``verbose`` a stage is told of on stderr as soon as it ends.
    """

    workers: bool = False
    verbose: bool = False
    most_workers: int = 0
    _stages: dict[str, Stage] = field(default_factory=dict)
    _cpu_of: dict[int, float] = field(default_factory=dict)
    _done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._now = self._enter("start")
        self._since = time.perf_counter(), self._cpu()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @contextmanager
    def __call__(self, title: str, total: int, done: int = 0, unit: str = "") -> Iterator[Step]:  # noqa: ARG002 - the signature of Progress
        """Open a stage."""
        self._switch(title)
        try:
            yield _Silent()
        finally:
            self._switch(f"after {title}")

    def end(self) -> list[Stage]:
        """Stop watching."""
        self._switch("end")
        self._done.set()
        self._thread.join()
        return [stage for stage in self._stages.values() if stage.seconds > 0]

    def _enter(self, name: str) -> Stage:
        return self._stages.setdefault(name, Stage(name))

    def _switch(self, name: str) -> None:
        seconds, cpu = self._since
        now = time.perf_counter(), self._cpu()
        self._now.seconds += now[0] - seconds
        self._now.cpu_s += now[1] - cpu
        if self.verbose:
            ended = self._now
            told = f"{ended.seconds:.1f} s, {ended.cpu_s:.1f} cpu s, {ended.peak / 2**20:.0f} MB"
            print(f"{ended.name}: {told}", file=sys.stderr, flush=True)
        self._now, self._since = self._enter(name), now

    def _cpu(self) -> float:
        own = resource.getrusage(resource.RUSAGE_SELF)
        if self.workers:  # those that have ended have taken what they had when last seen
            self._cpu_of |= {one: _cpu_of(one) for one in descendants(os.getpid())}
        return own.ru_utime + own.ru_stime + sum(self._cpu_of.values())

    def _watch(self) -> None:
        while not self._done.wait(_WITH_WORKERS if self.workers else _INTERVAL):
            processes = [os.getpid()]
            if self.workers:
                below = descendants(os.getpid())
                busy = sum(_name(one).startswith("ray::_done") for one in below)
                self.most_workers = max(self.most_workers, busy)
                processes += below
            now = self._now
            now.peak = max(now.peak, *(anonymous_bytes(one) for one in processes))


class _Silent:
    def advance(self, amount: int = 1, note: str = "") -> None:
        """Report nothing."""


def anonymous_bytes(process: int) -> int:
    """Return the anonymous memory of a process now; 0 of one that is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    found = (line.split() for line in lines if line.startswith("RssAnon:"))
    return next((int(line[1]) * 1024 for line in found), 0)


def descendants(process: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    found, queue = [], [process]
    while queue:
        new = children.get(queue.pop(), [])
        found += new
        queue += new
    return found


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().partition("\0")[0]
    except OSError:
        return ""


def _cpu_of(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    ticks: float = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
