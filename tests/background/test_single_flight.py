from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from amips_plugins.background.single_flight import PeriodicJob


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Job:
    def __init__(self) -> None:
        self.begun = self.ended = self.at_once = self.most_at_once = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        self.begun += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.thread = threading.current_thread()
        self.go_on.wait(20)
        self.at_once -= 1
        self.ended += 1


def test_it_waits_for_its_time() -> None:
    job = Job()
    refresher = PeriodicJob(job, 60.0)
    for _ in range(100):
        refresher.run_if_due()
    assert job.begun == 0


def test_it_runs_on_a_thread_of_its_own_that_ends() -> None:
    job = Job()
    refresher = PeriodicJob(job, 0.01)
    time.sleep(0.02)
    refresher.run_if_due()
    wait_until(lambda: job.ended == 1)
    assert job.thread is not None
    assert job.thread is not threading.current_thread()
    assert job.thread.daemon
    job.thread.join(20)
    assert not job.thread.is_alive()
    assert job.begun == 1  # nobody has looked since


def test_never_two_at_a_time() -> None:
    job = Job()
    job.go_on.clear()
    refresher = PeriodicJob(job, 0.001)
    time.sleep(0.01)

    def look() -> None:
        for _ in range(200):
            refresher.run_if_due()
            time.sleep(0.0001)

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.02)
    job.go_on.set()
    for thread in threads:
        thread.join()
    wait_until(lambda: job.begun == job.ended)
    assert job.most_at_once == 1
    assert job.begun > 1


@pytest.mark.slow
def test_soon_is_once_a_second_and_not_without_a_time() -> None:
    job = Job()
    refresher, never = PeriodicJob(job, 60.0), PeriodicJob(job, None)
    for _ in range(100):
        refresher.run_soon()
        never.run_soon()
        never.run_if_due()
    assert job.begun == 0
    time.sleep(1.01)
    for _ in range(100):
        refresher.run_soon()
        never.run_soon()
    wait_until(lambda: job.ended == 1)
    refresher.run_if_due()
    assert job.begun == 1


def test_two_that_find_the_time_come_at_once_are_one_run() -> None:
    """The second one gets the lock when the first one's job is done."""

    class Slow:
        def acquire(self, blocking: bool) -> bool:
            refresher._due = time.monotonic() + 60
            return inner.acquire(blocking)

        def release(self) -> None:
            inner.release()

    job, inner = Job(), threading.Lock()
    refresher = PeriodicJob(job, 0.001)
    refresher._busy = Slow()  # type: ignore[assignment]
    time.sleep(0.005)
    refresher.run_if_due()
    assert not inner.locked()
    assert job.begun == 0


def test_a_job_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)

    def fail() -> None:
        raise OSError("out of reach")

    refresher = PeriodicJob(fail, 0.001)
    for failures in (1, 2):
        time.sleep(0.005)
        refresher.run_if_due()
        wait_until(lambda: len(seen) >= failures)  # noqa: B023 - called at once


def test_without_a_thread_to_be_had_the_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    job = Job()
    refresher = PeriodicJob(job, 0.001)
    time.sleep(0.005)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        refresher.run_if_due()
    time.sleep(0.005)
    refresher.run_if_due()
    wait_until(lambda: job.ended == 1)
