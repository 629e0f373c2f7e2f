"""Objects with locks and threads, after a fork of the process."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["Renewable", "renew_after_fork"]


class Renewable(Protocol):
    """Something whose locks a thread may hold, which a forked child does not have."""

    def after_fork(self) -> None:
        """Start over, in the child."""
        ...


_LIVE: weakref.WeakSet[Renewable] = weakref.WeakSet()


def renew_after_fork(one: Renewable) -> None:
    """Call its ``after_fork`` in every child of this process, for as long as it lives."""
    _LIVE.add(one)


def _in_child() -> None:
    for one in list(_LIVE):
        one.after_fork()


os.register_at_fork(after_in_child=_in_child)
