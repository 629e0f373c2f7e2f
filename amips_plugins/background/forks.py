"""Objects with locks and threads, after a fork of the process."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType
from typing import Protocol

__all__ = ["STEADY", "ForkLock", "Renewable", "renew_after_fork"]


STEADY = threading.Lock()
"""Held for the moments in which something is half changed: a fork waits until nobody has it."""


class Renewable(Protocol):
    """Something that a forked child cannot go on with as its parent left it."""

    def after_fork(self) -> None:
        """Start over, in the child."""
        ...


_LIVE: weakref.WeakSet[Renewable] = weakref.WeakSet()


def renew_after_fork(one: Renewable) -> None:
    """Call its ``after_fork`` in every child of this process, for as long as it lives."""
    _LIVE.add(one)


class ForkLock:
    """A lock that is open in a forked child: the thread that held it is not there."""

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Let go of a lock that a thread of the parent process may have held."""
        self._lock = threading.Lock()

    def acquire(self, blocking: bool = True) -> bool:
        """Take it; tell whether it was to be had."""
        return self._lock.acquire(blocking)

    def release(self) -> None:
        """Let go of it."""
        self._lock.release()

    def locked(self) -> bool:
        """Tell whether somebody holds it."""
        return self._lock.locked()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.release()


def _in_child() -> None:
    STEADY.release()
    for one in list(_LIVE):
        one.after_fork()


os.register_at_fork(before=STEADY.acquire, after_in_parent=STEADY.release, after_in_child=_in_child)
