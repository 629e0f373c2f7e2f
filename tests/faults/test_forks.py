"""A process that is forked, and routers in processes of a pool: in scripts, as a fork wants it.

Each child ends itself after some seconds, so that a lock which nobody will ever release is a
failure of the test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.bundles import vectors, write_bundle

HERE = Path(__file__).parents[2]


def run(folder: Path, code: str, *arguments: str) -> str:
    script = folder / "script.py"  # a file, because new processes import it again
    script.write_text(code)
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, str(script), str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


START = """
import faulthandler, os, sys, threading, time, traceback
from pathlib import Path
import numpy as np
from amips_plugins import LearnedRouter, Registry
from amips_plugins.plan import QueryPlan
from tests.support.bundles import laid_out, vectors
from tests.support.generations import World, generation

def in_child(work):
    child = os.fork()
    if not child:
        faulthandler.dump_traceback_later(20, exit=True)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0, status

folder = Path(sys.argv[1])
query = vectors(seed=5, count=1)[0]
"""

LOCKED = """
collection = laid_out(folder / "v1")
router = LearnedRouter(collection, bundle=folder / "v1", refresh=3600.0)
seen = []
router.observe(seen.append)

locks = [
    router._fallbacks._lock,
    router._observers._lock,
    router._writer._lock,
    router._follower._looking,
    router._refresher._busy,
    router._follower.serving.model_breaker._lock,
    router._follower.serving.search_breaker._lock,
]
for _ in range(4):
    router._follower.serving.model_breaker.fail()  # so that a success has to take the lock
held, done = threading.Event(), threading.Event()

def hold():
    for lock in locks:
        lock.acquire()
    held.set()
    done.wait(60)
    for lock in locks:
        lock.release()

thread = threading.Thread(target=hold, daemon=True)
thread.start()
assert held.wait(20)

def work():
    found = router.search(query, k=3, n_probes=2)
    assert found.trace.mode == "route", found.trace
    assert len(seen) == 1
    router.observe(seen.append)
    assert not router.refresh()
    router.upsert([1000], vectors(seed=9, count=1))
    assert router.search(vectors(seed=9, count=1)[0], k=1)[0].id == 1000
    router.enabled = False
    assert router.search(query, k=3).trace.fallback == "disabled"
    router._refresher._due = 0.0
    router.search(query, k=3)  # starts a refresh of its own
    while router.last_overflow_share is None or router._refresher._busy.locked():
        time.sleep(0.01)

in_child(work)
done.set()
thread.join()
assert router.search(query, k=3, n_probes=2).trace.mode == "route"
assert collection.count() == 48  # the child's writes are its own
"""


@pytest.mark.slow
def test_a_fork_while_threads_hold_every_lock(tmp_path: Path) -> None:
    write_bundle(tmp_path / "v1")
    run(tmp_path, START + LOCKED)


REFRESHING = """
registry = Registry(folder / "registry")
registry.publish(folder / "v1")
world = World(generation(1, folder / "v1"))
router = LearnedRouter(world.open(), registry=registry, refresh=0.001)
looking, go_on, parent = threading.Event(), threading.Event(), os.getpid()
read = registry._read

def slow(path):
    if os.getpid() == parent:
        looking.set()
        go_on.wait(60)
    return read(path)

registry._read = slow
time.sleep(0.01)
router.search(query, k=3)  # starts a refresh, which stays on its way
assert looking.wait(20)

def work():
    world.switch(generation(2, folder / "v1"))
    while router.collection.info.name != "docs__g2":
        assert router.search(query, k=3, n_probes=2).trace.mode == "route"
        time.sleep(0.002)
    router.refresh()

in_child(work)
go_on.set()
assert router.search(query, k=3, n_probes=2).trace.mode == "route"
assert router.collection.info.name == "docs"
while router._refresher._busy.locked():
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_fork_during_a_refresh(tmp_path: Path) -> None:
    write_bundle(tmp_path / "v1")
    run(tmp_path, START + REFRESHING)


PLANNING = """
inside, go_on, parent = threading.Event(), threading.Event(), os.getpid()
both = threading.Barrier(2)

class Hook:
    def plan(self, queries, target):
        if os.getpid() == parent:
            self.wait()
        return QueryPlan(rewritten=queries.copy(), rescore=10)

    def wait(self):
        both.wait(60)

    def stay(self):
        inside.set()
        go_on.wait(60)

hook = Hook()
router = LearnedRouter(laid_out(folder / "v1"), hook=hook, refresh=None, plan_timeout=60.0)
two = [threading.Thread(target=lambda: router.search(query, k=3), daemon=True) for _ in range(2)]
for thread in two:
    thread.start()
for thread in two:
    thread.join()
hook.wait = hook.stay
searching = threading.Thread(target=lambda: router.search(query, k=3), daemon=True)
searching.start()
assert inside.wait(20)  # one thread plans, another one is idle

def work():
    for _ in range(3):  # on threads of its own; the parent's are not here
        assert router.search(query, k=3).trace.mode == "rewrite"

in_child(work)
go_on.set()
searching.join()
assert router.search(query, k=3).trace.mode == "rewrite"
"""


@pytest.mark.slow
def test_a_fork_while_a_model_plans_on_a_thread(tmp_path: Path) -> None:
    write_bundle(tmp_path / "v1")
    run(tmp_path, START + PLANNING)


BUSY = """
import random
registry = Registry(folder / "registry")
registry.publish(folder / "v1")
router = LearnedRouter(laid_out(folder / "v1"), registry=registry, refresh=0.001)
stop = threading.Event()

def search():
    while not stop.is_set():
        router.search(query, k=3, n_probes=2)

threads = [threading.Thread(target=search, daemon=True) for _ in range(4)]
for thread in threads:
    thread.start()

def work():
    for _ in range(20):
        assert len(router.search(query, k=3, n_probes=2)) == 3
    router.refresh()
    assert router.search(query, k=3, n_probes=2).trace.mode == "route"

for _ in range(12):
    time.sleep(random.uniform(0.0, 0.02))
    in_child(work)
stop.set()
for thread in threads:
    thread.join()
"""


@pytest.mark.slow
def test_forks_at_any_moment(tmp_path: Path) -> None:
    write_bundle(tmp_path / "v1")
    run(tmp_path, START + BUSY)


POOL = """
import asyncio, multiprocessing, sys
from pathlib import Path
import numpy as np
from amips_plugins import AsyncLearnedRouter, LearnedRouter, MemoryCollection
from amips_plugins.bundle.package import Bundle
from amips_plugins.layout import lay_out

router = None

def start(folder):
    global router
    bundle = Bundle.in_folder(Path(folder, "v1"))
    collection = MemoryCollection(np.load(Path(folder, "keys.npy")), name="docs")
    lay_out(collection, bundle)
    router = LearnedRouter(collection, bundle=bundle, refresh=0.01)

def search(row):
    query = np.load(Path(sys.argv[1], "keys.npy"))[row]
    blocking = router.search(query, k=3, n_probes=2)
    awaited = asyncio.run(AsyncLearnedRouter(router, None).search(query, k=3, n_probes=2))
    assert blocking.trace.mode == awaited.trace.mode == "route"
    assert [hit.id for hit in blocking] == [hit.id for hit in awaited]
    return [hit.id for hit in blocking]

if __name__ == "__main__":
    folder, method = sys.argv[1:]
    start(folder)  # the parent has one of its own
    here = [search(row) for row in range(8)]
    context = multiprocessing.get_context(method)
    with context.Pool(2, initializer=start, initargs=(folder,)) as pool:
        assert pool.map_async(search, range(8)).get(90) == here
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_a_router_in_every_process_of_a_pool(tmp_path: Path, method: str) -> None:
    write_bundle(tmp_path / "v1")
    np.save(tmp_path / "keys.npy", vectors())
    run(tmp_path, POOL, method)


EDGE = """
import qdrant_edge as edge
from amips_plugins import QdrantEdgeCollection
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import CollectionError
from amips_plugins.models.hooks import NativeHook

(folder / "docs").mkdir()
config = edge.EdgeConfig(vectors=edge.EdgeVectorParams(size=4, distance=edge.Distance.Dot))
shard = edge.EdgeShard.create(str(folder / "docs"), config)
shard.update(edge.UpdateOperation.upsert_points([edge.Point(i, [float(i)] * 4) for i in range(9)]))
shard.close()
collection = QdrantEdgeCollection.connect(str(folder), "docs")
router = LearnedRouter(collection, hook=NativeHook(), refresh=None)

def work():
    uses = [
        lambda: router.search(query, k=2),
        lambda: collection.search(SearchRequest(query[None], k=2)),
        lambda: collection.upsert([1], query[None]),
        lambda: collection.delete([1]),
        collection.count,
        collection.optimize,
        collection.current,
        lambda: next(collection.scan(10)),
        collection.layouts.status,
    ]
    for use in uses:
        try:
            use()
        except CollectionError as exc:
            assert "forked" in str(exc)
        else:
            raise AssertionError("not refused")
    collection.close()
    collection.close()

in_child(work)
assert collection.count() == 9
collection.upsert([9], query[None])
collection.close()
again = QdrantEdgeCollection.connect(str(folder), "docs")
assert again.count() == 10

child = os.fork()
if not child:
    sys.exit(0)  # with everything still open: what Python tidies up is not ours here
assert os.waitpid(child, 0)[1] == 0
assert again.count() == 10
again.close()
"""


@pytest.mark.slow
def test_an_edge_shard_is_of_no_use_in_a_fork(tmp_path: Path) -> None:
    pytest.importorskip("qdrant_edge")
    run(tmp_path, START + EDGE)
