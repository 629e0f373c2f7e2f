"""The end of the process, while daemon threads of ours are at work.

A daemon thread that is inside ONNX Runtime when the interpreter ends takes the process down with an
abort. So the end waits a moment for what is under way, and nothing new begins. What hangs is left
behind: that is what daemon threads are for.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - its own end, which takes the pools away, comes after ours
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["in_flight", "is_ending"]

_PATIENCE = 3.0  # seconds
_under_way: set[object] = set()
_ends = False


def is_ending() -> bool:
    """Tell whether the process ends, so that no more work should be begun."""
    return _ends


@contextmanager
def in_flight() -> Iterator[None]:
    """Have the end of the process wait a moment for this block."""
    token = object()
    _under_way.add(token)
    try:
        yield
    finally:
        _under_way.discard(token)


@atexit.register
def _wait() -> None:
    global _ends
    _ends = True
    deadline = time.monotonic() + _PATIENCE
    while _under_way and time.monotonic() < deadline:
        time.sleep(0.002)


def _wait_with_pools() -> None:
    """Wait before thread pools are shut down: a search under way may need one (Milvus Lite's does).

    Other threads may go on for hours after the main one, so this is not yet the end.
    """
    global _ends
    _wait()
    _ends = False


getattr(threading, "_register_atexit", lambda _: None)(_wait_with_pools)


def _in_child() -> None:
    """Wait for none of the parent's threads."""
    global _ends
    _ends = False
    _under_way.clear()


os.register_at_fork(after_in_child=_in_child)
