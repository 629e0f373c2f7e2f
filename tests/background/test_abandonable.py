from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import TimeoutError as LateError
from functools import partial

import numpy as np
import pytest

from amips_plugins.background import abandonable
from amips_plugins.background.abandonable import run_abandonable


def test_results_and_errors_reach_the_caller() -> None:
    assert run_abandonable(lambda: 7).result(20) == 7

    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        run_abandonable(fail).result(20)


def test_a_job_that_hangs_is_left_behind_and_others_go_on() -> None:
    hold = threading.Event()
    hung = run_abandonable(hold.wait)
    try:
        with pytest.raises(LateError):
            hung.result(0.01)
        assert run_abandonable(lambda: 1).result(20) == 1
    finally:
        hold.set()
    assert hung.result(20)


def test_threads_are_used_again() -> None:
    def who() -> int:
        return threading.get_ident()

    first = run_abandonable(who).result(20)
    seen = set()
    for _ in range(50):  # the thread is idle a moment after its result is there
        seen.add(run_abandonable(who).result(20))
    assert first in seen
    assert len(seen) < 10


def test_an_idle_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(abandonable, "_IDLE", 0.05)
    thread = run_abandonable(threading.current_thread).result(20)
    assert thread.daemon
    thread.join(20)
    assert not thread.is_alive()
    assert run_abandonable(lambda: 2).result(20) == 2


@pytest.mark.slow
def test_an_idle_thread_keeps_nothing() -> None:
    array = np.zeros(3)
    gone = weakref.ref(array)
    future = run_abandonable(partial(np.sum, array))
    assert future.result(20) == 0
    del array, future
    run_abandonable(lambda: None).result(20)
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_child_of_a_fork_has_threads_of_its_own() -> None:
    run_abandonable(lambda: 1).result(20)
    script = (
        "import os, sys\n"
        "from amips_plugins.background.abandonable import run_abandonable\n"
        "run_abandonable(lambda: 1).result(20)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(run_abandonable(lambda: 7).result(20))\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-W", "ignore", "-c", script], env=environment, timeout=60, check=False
    )
    assert done.returncode == 7
