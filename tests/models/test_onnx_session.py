from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from amips_plugins.bundle.contents import MODEL
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import FloatArray
from tests.support.bundles import DIM, N_CELLS, make_files

TASKS = Path("/proc/self/task")
ROOT = Path(__file__).resolve().parents[2]

# A process of its own: here other tests' threads come and go.
COUNT = """
import os, sys
import numpy as np
import onnxruntime  # which has a thread of its own
from amips_plugins.models.onnx_session import OnnxModel

tasks = lambda: len(os.listdir("/proc/self/task"))
data, threads = sys.stdin.buffer.read(), int(sys.argv[1])
before = tasks()
models = [OnnxModel(data, threads) for _ in range(2)]
for model in models:
    for count in (1, 256):
        model.run(["priority"], {"queries": np.ones((count, %d), np.float32)})
sys.stdout.write(str(tasks() - before))
"""


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads as Linux does")
@pytest.mark.parametrize(("threads", "more"), [(1, 0), (3, 4)])
def test_one_thread_is_the_callers_own(threads: int, more: int) -> None:
    """Two models of three threads each have two more of their own."""
    counted = subprocess.run(  # noqa: S603 - our own lines
        [sys.executable, "-c", COUNT % DIM, str(threads)],
        input=make_files()[MODEL],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert int(counted.stdout) == more


def test_a_model_says_what_a_query_costs() -> None:
    assert OnnxModel(make_files()[MODEL]).multiplications == DIM * N_CELLS


def test_threads_change_no_output() -> None:
    queries = np.random.default_rng(0).standard_normal((300, DIM)).astype(np.float32)
    one, two = (OnnxModel(make_files()[MODEL], threads) for threads in (1, 2))
    np.testing.assert_allclose(
        one.run(["priority"], {"queries": queries})[0],
        two.run(["priority"], {"queries": queries})[0],
        rtol=1e-5,
    )


def test_a_single_row_gives_what_a_batch_gives_on_every_thread() -> None:
    queries = np.random.default_rng(0).standard_normal((40, DIM)).astype(np.float32)
    model = OnnxModel(make_files()[MODEL])
    (wanted,) = model.run(["priority"], {"queries": queries})

    def rows(_: int) -> FloatArray:
        found = [model.run_row("priority", one[None, :]).copy() for one in queries]
        return np.concatenate(found)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(rows, range(8)):
            np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_a_single_row_is_read_before_the_call_returns() -> None:
    model, query = OnnxModel(make_files()[MODEL]), np.ones((1, DIM), dtype=np.float32)
    model.run_row("priority", query)
    wanted = model.run_row("priority", query).copy()
    found = model.run_row("priority", query)
    query[:] = -3.0
    np.testing.assert_array_equal(found, wanted)


FORKED = """
import gc, os, sys
import numpy as np
from amips_plugins.models.onnx_session import OnnxModel

model, query = OnnxModel(sys.stdin.buffer.read(), 2), np.ones((1, %d), np.float32)
wanted = model.run_row("priority", query)

def forked():
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return False
    assert np.allclose(model.run_row("priority", query), wanted)
    return True

if forked():
    if forked():  # a fork of a fork
        os._exit(0)
    os._exit(0)
if forked():
    del model  # as another bundle takes its place
    gc.collect()
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_waits_for_no_thread_of_its_parents_model() -> None:
    script = [sys.executable, "-c", FORKED % DIM]
    with subprocess.Popen(  # noqa: S603 - our own lines
        script, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True
    ) as process:
        try:
            process.communicate(make_files()[MODEL], timeout=60)
        finally:
            with suppress(ProcessLookupError):  # children that hang, too
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0
