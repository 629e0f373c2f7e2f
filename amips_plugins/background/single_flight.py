"""Looking at the world again now and then, off the caller's path."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from amips_plugins.background.process_end import at_work, is_ending

__all__ = ["Refresher"]

_SOONEST = 1.0  # seconds from one look to the next, however many searches fail


class Refresher:
    """Runs a job on a thread that lives no longer than the job; never two at a time.

    Parameters
    ----------
    job
        What to do; it must not raise.
    every
        Seconds from the end of one run to the next; None to never run it.
    """

    def __init__(self, job: Callable[[], object], every: float | None) -> None:
        self._job = job
        self._every = every
        self._due = self._soonest = 0.0
        self.after_fork()

    def after_fork(self) -> None:
        """Begin again; a thread of the parent process that was at it is not here."""
        self._busy = threading.Lock()
        self._rest()

    def look(self) -> None:
        """Start the job if its time has come; takes no time of the caller's."""
        if time.monotonic() < self._due or is_ending() or not self._busy.acquire(blocking=False):
            return
        if time.monotonic() < self._due:  # another thread has seen to it meanwhile
            self._busy.release()
            return
        try:
            threading.Thread(target=self._run, name="amips-refresh", daemon=True).start()
        except RuntimeError:  # no thread to be had, or the interpreter is ending: another time
            self._rest()
            self._busy.release()

    def hurry(self) -> None:
        """Start the job now, or a second after it last ended: something was not as expected."""
        if self._every is not None:
            self._due = min(self._due, self._soonest)
            self.look()

    def _run(self) -> None:
        with at_work():
            try:
                if not is_ending():
                    self._job()
            finally:
                self._rest()
                self._busy.release()

    def _rest(self) -> None:
        now = time.monotonic()
        self._soonest = now + _SOONEST
        self._due = float("inf") if self._every is None else now + self._every
