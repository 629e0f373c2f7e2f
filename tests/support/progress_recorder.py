"""A progress that remembers what it was told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Recorder:
    """Counts; raises KeyboardInterrupt once ``stop_after`` units are done, as Ctrl-C would."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.totals: list[int] = []
        self.started_at: list[int] = []
        self.done = 0

    @contextmanager
    def __call__(self, title: str, total: int, done: int = 0, unit: str = "") -> Iterator[Recorder]:
        self.totals.append(total)
        self.started_at.append(done)
        self.done = done
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.done += amount
        if self.stop_after is not None and self.done >= self.stop_after:
            raise KeyboardInterrupt
