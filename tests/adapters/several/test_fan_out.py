"""Asking sources together: at most so many at once, never past the deadline, never silently."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from amips_plugins.adapters.several.fan_out import Answers, FanOut, Refused, SourceRests

NAMES = [f"s{number}" for number in range(9)]
Ask = Callable[[FanOut, dict[str, Callable[[float], Any]], float], Answers]


def on_threads(fan_out: FanOut, jobs: dict[str, Callable[[float], Any]], seconds: float) -> Answers:
    return fan_out.ask(jobs, seconds)


def in_tasks(fan_out: FanOut, jobs: dict[str, Callable[[float], Any]], seconds: float) -> Answers:
    def awaited(job: Callable[[float], Any]) -> Callable[[float], Awaitable[Any]]:
        async def one(left: float) -> Any:
            return await asyncio.to_thread(job, left)

        return one

    return asyncio.run(
        fan_out.ask_async({name: awaited(job) for name, job in jobs.items()}, seconds)
    )


@pytest.fixture(params=[on_threads, in_tasks])
def ask(request: pytest.FixtureRequest) -> Ask:
    found: Ask = request.param
    return found


def raising(error: Exception) -> Callable[[float], Any]:
    def job(_: float) -> Any:
        raise error

    return job


def test_all_are_asked_and_so_many_at_once(ask: Ask) -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def job(left: float) -> float:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return left

    found, errors = ask(FanOut("all", NAMES, 3), dict.fromkeys(NAMES, job), 30.0)
    assert set(found) == set(NAMES)
    assert errors == {}
    assert most == 3
    assert all(29.0 < left <= 30.0 for left in found.values())


@pytest.mark.slow
def test_who_is_late_or_fails_is_named_and_the_others_answer(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    gone_on = threading.Event()
    jobs = {
        "s0": lambda _: "here",
        "s1": raising(OSError("no route")),
        "s2": lambda _: gone_on.wait(1.5),
    }
    started = time.monotonic()
    with caplog.at_level(logging.WARNING):
        if ask is on_threads:
            found, errors = ask(FanOut("all", NAMES, 8), jobs, 0.3)
            assert time.monotonic() - started < 1.2
        else:  # the loop's own end waits for its threads
            found, errors = ask(FanOut("all", NAMES, 8), jobs, 0.3)
    gone_on.set()
    assert found == {"s0": "here"}
    assert isinstance(errors["s1"], OSError)
    assert isinstance(errors["s2"], TimeoutError)
    assert "'s1' is left out of searches of 'all': OSError: no route" in caplog.text
    assert "'s2' is left out" in caplog.text


@pytest.mark.slow
def test_who_was_not_asked_in_time_is_late_but_not_to_blame(ask: Ask) -> None:
    release = threading.Event()
    fan_out = FanOut("all", NAMES, 1)
    for blocking in ("s0", "s2", "s0", "s2"):
        jobs = {blocking: lambda _: release.wait(1.0), "s1": lambda _: 1}
        found, errors = ask(fan_out, jobs, 0.05)
        assert found == {}
        assert set(errors) == {blocking, "s1"}
    release.set()
    assert ask(fan_out, {"s1": lambda _: 1}, 10.0) == ({"s1": 1}, {})


@pytest.mark.slow
def test_who_fails_time_and_again_is_left_alone_for_a_while(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    fan_out, calls = FanOut("all", NAMES, 8), []

    def failing(_: float) -> Any:
        calls.append(1)
        raise OSError("down")

    with caplog.at_level(logging.WARNING):
        for _ in range(6):
            found, errors = ask(fan_out, {"s0": failing, "s1": lambda _: 1}, 10.0)
            assert found == {"s1": 1}
    assert len(calls) == 3
    assert isinstance(errors["s0"], SourceRests)
    assert caplog.text.count("is left out") == 1
    time.sleep(1.1)  # the first rest
    with caplog.at_level(logging.WARNING):
        found, errors = ask(fan_out, {"s0": lambda _: 2}, 10.0)
    assert (found, errors) == ({"s0": 2}, {})
    assert "'s0' answers again" in caplog.text


def test_the_callers_own_fault_is_raised_and_nobodys_failure(ask: Ask) -> None:
    fan_out = FanOut("all", NAMES, 8)
    for _ in range(5):
        with pytest.raises(KeyError, match="field"):
            ask(fan_out, {"s0": raising(Refused(KeyError("field")))}, 10.0)
    assert ask(fan_out, {"s0": lambda _: 1}, 10.0) == ({"s0": 1}, {})


def test_nothing_is_asked_of_nobody(ask: Ask) -> None:
    assert ask(FanOut("all", NAMES, 8), {}, 10.0) == ({}, {})


def test_a_task_that_is_cancelled_leaves_nothing_behind() -> None:
    ended: list[str] = []

    async def one(_: float) -> None:
        try:
            await asyncio.sleep(30)
        finally:
            ended.append("s")

    async def cancelled() -> None:
        task = asyncio.ensure_future(
            FanOut("all", NAMES, 8).ask_async({"s0": one, "s1": one}, 30.0)
        )
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0)
        assert ended == ["s", "s"]

    asyncio.run(cancelled())
