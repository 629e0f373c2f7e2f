"""A process that ends while our threads are at work ends as if they were not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_runtime_faults import heavy
from tests.support.bundles import replace_model, write_bundle

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, time
from pathlib import Path
from amips_plugins import LearnedRouter, Registry
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.plan import QueryPlan
from tests.support.bundles import laid_out, memory, vectors, write_bundle

folder, how = Path(sys.argv[1]), sys.argv[2]
if how == "watch":
    watch = HealthMonitor(share=1.0, at_most_every=0.0, at_most_busy=1.0, drift_share=1.0)
    router = LearnedRouter(laid_out(folder), bundle=folder, watch=watch)
    for query in vectors(seed=1, count=int(sys.argv[3])):
        router.search(query, k=3)
elif how == "refresh":
    registry = Registry(folder.parent / "registry")
    registry.publish(folder)
    router = LearnedRouter(laid_out(folder), registry=registry, refresh=1e-4)
    for query in vectors(seed=1, count=int(sys.argv[3])):
        router.search(query, k=3)
elif how == "pool":
    from concurrent.futures import ThreadPoolExecutor
    from amips_plugins.adapters.memory import MemoryCollection

    pool = ThreadPoolExecutor(1)
    exact = MemoryCollection.exact

    def slow(self, request):
        time.sleep(0.2)
        return pool.submit(exact, self, request).result()

    MemoryCollection.exact = slow
    watch = HealthMonitor(share=1.0, at_most_every=0.0, at_most_busy=1.0)
    router = LearnedRouter(laid_out(folder), bundle=folder, watch=watch)
    for query in vectors(seed=1, count=int(sys.argv[3])):
        router.search(query, k=3)
elif how == "thread":
    import threading

    router = LearnedRouter(laid_out(folder), bundle=folder, refresh=1e-4)
    looked = []
    look = router._follower.look
    router._refresher._job = lambda: (looked.append(1), look())

    def serve():
        threading.main_thread().join()
        time.sleep(0.2)
        looked.clear()
        for query in vectors(seed=1, count=50):
            router.search(query, k=3)
            time.sleep(0.005)
        assert looked
        print("searched")

    threading.Thread(target=serve).start()
    sys.exit()
elif how == "model":
    router = LearnedRouter(laid_out(folder), bundle=folder, plan_timeout=1e-3)
    queries = vectors(seed=1, count=int(sys.argv[3]))
    # A quarter of 4 ms is waited for; whoever is put aside for longer may find the plan there.
    asked = (router.search(queries, k=3, timeout=4e-3)[0].trace.fallback for _ in range(20))
    assert "model: TimeoutError" in asked
else:
    class Hangs:
        def plan(self, queries, target):
            time.sleep(1000)

    router = LearnedRouter(memory(), hook=Hangs(), plan_timeout=0.01)
    assert router.search(vectors()[0], k=3).trace.fallback == "model: TimeoutError"
print("searched")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "made")


@pytest.mark.parametrize("count", [5, 520, 700])
@pytest.mark.parametrize("how", ["watch", "refresh"])
def test_threads_under_way_do_not_take_the_process_down(
    folder: Path, tmp_path: Path, how: str, count: int
) -> None:
    _run(folder, tmp_path, how, str(count))


def test_a_search_under_way_keeps_the_thread_pool_that_it_needs(
    folder: Path, tmp_path: Path
) -> None:
    """Milvus Lite answers from one; its traceback would be the last that the user reads."""
    assert _run(folder, tmp_path, "pool", "3") == ""


def test_threads_that_outlive_the_main_one_are_still_served(folder: Path, tmp_path: Path) -> None:
    assert _run(folder, tmp_path, "thread", "0") == ""


def test_a_model_that_runs_on_does_not_either(tmp_path: Path) -> None:
    """ONNX Runtime is at work for a while after the caller has gone on, and the process ended."""

    folder = write_bundle(tmp_path / "slow", change=replace_model(heavy(1024, 64)))
    for count in ("100", "150"):
        _run(folder, tmp_path, "model", count)


def test_a_model_that_hangs_keeps_no_process_from_ending(folder: Path, tmp_path: Path) -> None:
    _run(folder, tmp_path, "hang", "1")


def _run(folder: Path, tmp_path: Path, how: str, count: str) -> str:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, str(script), str(folder), how, count],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "searched\n"), done.stderr
    return done.stderr
