"""Calls that a caller can walk away from: a model may hang, a search must not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from amips_plugins.background.process_end import in_flight

__all__ = ["run_abandonable"]

_T = TypeVar("_T")
_Job = tuple["Future[Any]", Callable[[], Any]]
_IDLE = 10.0  # seconds after which a thread without work ends


class _Workers:
    """Daemon threads, so that one which hangs keeps no process from ending."""

    def __init__(self) -> None:
        self._idle: list[SimpleQueue[_Job]] = []

    def submit(self, job: Callable[[], _T]) -> Future[_T]:
        future: Future[_T] = Future()
        try:
            inbox = self._idle.pop()
        except IndexError:
            inbox = SimpleQueue()
            thread = threading.Thread(target=self._work, args=(inbox,), name="amips-plan")
            thread.daemon = True
            thread.start()
        inbox.put((future, job))
        return future

    def _work(self, inbox: SimpleQueue[_Job]) -> None:
        while True:
            try:
                future, job = inbox.get(timeout=_IDLE)
            except Empty:
                try:
                    self._idle.remove(inbox)
                except ValueError:
                    continue  # a job has just been promised to this thread
                return
            if future.set_running_or_notify_cancel():
                with in_flight():
                    try:
                        future.set_result(job())
                    except BaseException as exc:  # noqa: BLE001 - it is the waiting caller's
                        future.set_exception(exc)
            del future, job  # or an idle thread would keep the queries
            self._idle.append(inbox)


_workers = _Workers()


def run_abandonable(job: Callable[[], _T]) -> Future[_T]:
    """Start a job that may be abandoned on its own thread; without one raise ``RuntimeError``."""
    return _workers.submit(job)


def _in_child() -> None:
    """Forget the threads of the parent: a fork takes none of them along."""
    global _workers
    _workers = _Workers()


os.register_at_fork(after_in_child=_in_child)
