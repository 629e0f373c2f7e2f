"""Work off the caller's path, never two runs at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from amips_plugins.background.forks import ForkLock
from amips_plugins.background.process_end import in_flight, is_ending

__all__ = ["PeriodicJob", "SingleFlight"]

_SOONEST = 1.0  # seconds from one run to the next, however many searches fail


class SingleFlight:
    """Runs a job, which must not raise, on a daemon thread that ends with it; never two at a time.

    ``waits`` tells, when a run has ended, whether more has come meanwhile.
    """

    def __init__(
        self,
        job: Callable[[], object],
        name: str,
        waits: Callable[[], bool] = lambda: False,
    ) -> None:
        self._job = job
        self._name = name
        self._waits = waits
        self._busy = ForkLock()

    @property
    def busy(self) -> bool:
        """Whether it runs."""
        return self._busy.locked()

    def start(self) -> bool:
        """Start the job and do not wait; tell whether it was to be had."""
        if is_ending() or not self._busy.acquire(blocking=False):
            return False
        return self._begin()

    def _begin(self) -> bool:
        """Start the thread, with the lock held."""
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:  # no thread to be had, or the interpreter is ending: another time
            self._ended()
            self._busy.release()
            return False
        return True

    def _run(self) -> None:
        with in_flight():
            try:
                if not is_ending():
                    self._job()
            finally:
                self._ended()
                self._busy.release()
        if self._waits():  # it came between the end of the job and the release
            self.start()

    def _ended(self) -> None:
        """Note the end of a run, with the lock held."""


class PeriodicJob(SingleFlight):
    """A job that runs when somebody asks ``every`` seconds after its last end; None is never."""

    def __init__(self, job: Callable[[], object], every: float | None) -> None:
        super().__init__(job, "amips-refresh")
        self._every = every
        self._due = self._soonest = 0.0
        self._ended()

    def run_if_due(self) -> None:
        """Start the job if its time has come; takes no time of the caller's."""
        if time.monotonic() < self._due or is_ending() or not self._busy.acquire(blocking=False):
            return
        if time.monotonic() < self._due:  # another thread has seen to it meanwhile
            self._busy.release()
        else:
            self._begin()

    def run_soon(self) -> None:
        """Start the job now, or a second after it last ended: something was not as expected."""
        if self._every is not None:
            self._due = min(self._due, self._soonest)
            self.run_if_due()

    def _ended(self) -> None:
        now = time.monotonic()
        self._soonest = now + _SOONEST
        self._due = float("inf") if self._every is None else now + self._every
