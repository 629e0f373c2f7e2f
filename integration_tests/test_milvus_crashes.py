"""Servers and clients that die in the middle: nothing acknowledged is lost, doubled or invisible.

In containers where there is a Docker engine, else against the same server as a plain process.
``AMIPS_KILLS`` sets how often each test kills: 1 in a developer's run, more at night.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pymilvus
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray
from integration_tests.crashes import (
    COUNT,
    DIM,
    N_CELLS,
    Build,
    by_remainder,
    in_two_cells,
    make,
    spec,
    until_it_works,
)
from integration_tests.servers import MilvusServer
from tests.support.milvus_crashing import Killed, Watched, Writer, check, contents

KILLS = int(os.environ.get("AMIPS_KILLS", "1"))
SEEDS = range(KILLS)
STEPS = range(0, 48, max(1, 12 // KILLS))
"""Steps of a build at which the builder dies: some of them, and at night all."""
KINDS = pytest.mark.parametrize(
    "shared",
    [
        pytest.param(False, id="one cell"),
        pytest.param(True, id="more cells", marks=pytest.mark.nightly),
    ],
)


@pytest.fixture
def client(milvus_to_kill: MilvusServer) -> Iterator[Any]:
    client = pymilvus.MilvusClient(milvus_to_kill.uri)
    yield client
    for name in client.list_collections():
        for alias in client.list_aliases(name)["aliases"]:
            client.drop_alias(alias)
        client.drop_collection(name)
    client.close()


class Background:
    """Does something again and again in a thread, and keeps what went wrong."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.wrong: list[BaseException] = []
        self.times = 0
        self._work = work
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._work()
                self.times += 1
        except BaseException as exc:  # noqa: BLE001 - the test looks at it
            self.wrong.append(exc)

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


def crash(server: MilvusServer) -> None:
    server.kill()
    server.start()


def revive(server: MilvusServer, client: Any) -> None:
    if not server.is_running():
        server.start()
    server.wait_until_ready()
    server.wait_until_ready(*(n for n in client.list_collections() if "building" not in n))


def writer_of(client: Any, alias: str, shared: bool) -> Writer:
    return Writer(client, alias, N_CELLS, assign=in_two_cells if shared else None)


def checked(live: MilvusCollection, expected: dict[Id, FloatArray], shared: bool) -> None:
    check(live, expected, N_CELLS, in_two_cells if shared else None)


def ids_of(writer: Writer, count: int = 20) -> list[int]:
    return [int(key) for key in writer.rng.choice(COUNT + 500, count, replace=False)]


@KINDS
@pytest.mark.parametrize("seed", SEEDS)
def test_the_server_dies_at_a_step_of_a_build(
    milvus_to_kill: MilvusServer, client: Any, tmp_path: Path, seed: int, shared: bool
) -> None:
    alias = make(client)
    writer = writer_of(client, alias, shared)
    rng = np.random.default_rng(seed)
    # A build changes something about 30 times; each call is told before and after.
    deadly, told = int(rng.integers(0, 56)), [0]

    def die(_name: str, _done: bool) -> None:
        told[0] += 1
        if told[0] == deadly + 1:
            crash(milvus_to_kill)

    with suppress(pymilvus.MilvusException):  # or the client waits until the server is back
        MilvusCollection(Watched(client, die), alias).layouts.build(spec(tmp_path, shared=shared))
    revive(milvus_to_kill, client)
    writer.write(ids_of(writer))
    checked(until_it_works(client, alias, tmp_path, shared=shared), writer.expected, shared)


@pytest.mark.nightly
@pytest.mark.parametrize("step", STEPS)
def test_a_build_with_keys_in_two_cells_dies_at_every_step(
    milvus_uri: str, tmp_path: Path, step: int
) -> None:
    client = pymilvus.MilvusClient(milvus_uri)
    alias = make(client)
    writer = writer_of(client, alias, shared=True)
    told = [0]

    def die(_name: str, _done: bool) -> None:
        told[0] += 1
        if told[0] == step + 1:
            raise Killed

    try:
        MilvusCollection(Watched(client, die), alias).layouts.build(spec(tmp_path, shared=True))
    except Killed:
        died = True
    else:
        died = False
    for _ in range(3):
        writer.write(ids_of(writer, 4))
    live = MilvusCollection(client, alias)
    assert contents(live) == {key: one.tolist() for key, one in writer.expected.items()}
    if died:
        live = until_it_works(client, alias, tmp_path, shared=True)
    checked(live, writer.expected, shared=True)
    assert died or step >= 36  # a build changes something 20 times, told before and after
    for name in (live.info.name, live.layouts.status().older[-1]):
        for known in client.list_aliases(name)["aliases"]:
            client.drop_alias(known)
        client.drop_collection(name)
    client.close()


@pytest.mark.nightly
@KINDS
@pytest.mark.parametrize("seed", SEEDS)
def test_the_server_dies_at_any_moment_of_a_build_and_a_backfill(
    milvus_to_kill: MilvusServer, client: Any, tmp_path: Path, seed: int, shared: bool
) -> None:
    rng = np.random.default_rng(100 + seed)
    alias = make(client)
    writer = writer_of(client, alias, shared)

    for within, work in (
        (4.0, lambda: MilvusCollection(client, alias).layouts.build(spec(tmp_path, shared=shared))),
        (
            2.0,
            lambda: MilvusCollection(client, alias).layouts.backfill(
                in_two_cells if shared else by_remainder
            ),
        ),
    ):
        timer = threading.Timer(rng.uniform(0, within), lambda: crash(milvus_to_kill))
        timer.start()
        with suppress(pymilvus.MilvusException):
            work()
        timer.join()
        revive(milvus_to_kill, client)
        live = until_it_works(client, alias, tmp_path, shared=shared)
        new = list(range(10_000, 10_400))
        vectors = rng.standard_normal((len(new), DIM)).astype(np.float32)
        live.upsert(new, vectors)  # without cells, for the backfill
        writer.expected |= dict(zip(new, vectors, strict=True))
    live.layouts.backfill(in_two_cells if shared else by_remainder)
    checked(live, writer.expected, shared)


@KINDS
@pytest.mark.parametrize("seed", SEEDS)
def test_the_builder_dies_at_any_moment(
    milvus_to_kill: MilvusServer, client: Any, tmp_path: Path, seed: int, shared: bool
) -> None:
    alias = make(client)
    writer = writer_of(client, alias, shared)
    rng = np.random.default_rng(200 + seed)
    for _ in range(3):
        if not Build(milvus_to_kill.uri, alias, tmp_path, shared=shared).kill_after(
            rng.uniform(1.0, 7.0)
        ):
            break
        writer.write(ids_of(writer))
        live = MilvusCollection(client, alias)
        if live.layout() is None:
            assert set(contents(live)) == set(writer.expected)
        elif not live.layouts.status().unfinished:
            break
    checked(until_it_works(client, alias, tmp_path, shared=shared), writer.expected, shared)


@KINDS
@pytest.mark.parametrize("seed", SEEDS)
def test_the_server_dies_in_a_stream_of_upserts_and_searches(
    milvus_to_kill: MilvusServer, client: Any, tmp_path: Path, seed: int, shared: bool
) -> None:
    alias = make(client)
    live = MilvusCollection(client, alias).layouts.build(spec(tmp_path, shared=shared))
    writer = writer_of(client, alias, shared)
    router = LearnedRouter(MilvusCollection(client, alias), hook=AllCells())
    doubtful: list[int] = []

    def write() -> None:
        ids = ids_of(writer, 5)
        doubtful[:] = ids  # whether these came through, only an acknowledgement tells
        writer.write(ids)
        doubtful.clear()

    killer = threading.Timer(
        np.random.default_rng(300 + seed).uniform(0.5, 3.0), milvus_to_kill.kill
    )
    with Background(write) as writing, Background(lambda: router.search([0.0] * DIM)) as searching:
        killer.start()
        killer.join()
        milvus_to_kill.start()
        revive(milvus_to_kill, client)
        before = searching.times
        time.sleep(3.0)
    # What the database raised while it was away is its own error; it is never swallowed.
    for wrong in writing.wrong + searching.wrong:
        assert (
            isinstance(wrong, pymilvus.MilvusException) or type(wrong).__module__ == "grpc._channel"
        )
    assert searching.wrong or searching.times > before
    live = MilvusCollection(client, alias)
    if doubtful:
        live.delete(doubtful)
        for key in doubtful:
            writer.expected.pop(key, None)
    checked(live, writer.expected, shared)


class AllCells:
    """Routes every query to every cell, so that the answer is known."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(cells=np.tile(np.arange(N_CELLS), (len(queries), 1)), layout="crash1")


@pytest.mark.nightly
def test_searches_and_two_writers_during_a_build(
    milvus_to_kill: MilvusServer, client: Any, tmp_path: Path
) -> None:
    alias = make(client)
    router = LearnedRouter(MilvusCollection(client, alias), hook=AllCells(), refresh=0.5)
    routed = Writer(pymilvus.MilvusClient(milvus_to_kill.uri), alias, N_CELLS)
    foreign = pymilvus.MilvusClient(milvus_to_kill.uri)
    rng = np.random.default_rng(0)
    added: dict[Id, FloatArray] = {}
    modes: set[str] = set()
    target = 30.0 * np.ones(DIM, dtype=np.float32)
    routed.live.upsert([COUNT + 999], target[None])  # the best key of every search below
    routed.expected[COUNT + 999] = target
    deadline = time.monotonic() + 30
    while router.search(np.ones(DIM), k=1)[0].id != COUNT + 999:  # readers may be behind writers
        assert time.monotonic() < deadline

    def search() -> None:
        hits = router.search(np.ones(DIM), k=5)
        modes.add(hits.trace.mode)
        assert hits[0].id == COUNT + 999
        assert len({hit.id for hit in hits}) == 5
        native = MilvusCollection(foreign, alias).search(
            SearchRequest(np.ones((1, DIM), dtype=np.float32), k=5)
        )
        assert native[0][0].id == COUNT + 999

    def write_natively() -> None:
        key = 20_000 + len(added)
        vector = rng.standard_normal(DIM).astype(np.float32)
        foreign.insert(alias, [{"key": key, "v": vector}])
        added[key] = vector
        time.sleep(0.02)

    with (
        Background(search) as searching,
        Background(lambda: routed.write(ids_of(routed, 5))) as writing,
        Background(write_natively) as writing_natively,
    ):
        live = MilvusCollection(client, alias).layouts.build(spec(tmp_path))
        time.sleep(3.0)
    assert (searching.wrong, writing.wrong, writing_natively.wrong) == ([], [], [])
    assert modes == {"native", "route"}
    assert len(added) > 20
    live.layouts.backfill(by_remainder)
    check(live, {**routed.expected, **added}, N_CELLS)


def test_a_partition_dropped_under_the_router(client: Any, tmp_path: Path) -> None:
    alias = make(client)
    live = MilvusCollection(client, alias).layouts.build(spec(tmp_path))
    router = LearnedRouter(live, hook=AllCells())
    assert router.search(np.ones(DIM)).trace.mode == "route"
    client.release_partitions(live.info.name, ["cell_crash1_0001"])
    client.drop_partition(live.info.name, "cell_crash1_0001")
    hits = router.search(np.ones(DIM))
    assert (hits.trace.mode, len(hits)) == ("native", 10)
    assert hits.trace.fallback is not None
    assert hits.trace.fallback.startswith("search:")


def test_a_server_that_hangs_costs_no_more_than_the_deadline(
    milvus_to_pause: MilvusServer, tmp_path: Path
) -> None:
    client = pymilvus.MilvusClient(milvus_to_pause.uri)
    alias = make(client)
    live = MilvusCollection(client, alias).layouts.build(spec(tmp_path))
    router = LearnedRouter(live, hook=AllCells())
    milvus_to_pause.pause()
    started = time.monotonic()
    with pytest.raises(Exception, match=r"(?i)deadline|timeout"):
        router.search(np.ones(DIM), timeout=2.0)
    assert time.monotonic() - started < 8.0
    milvus_to_pause.unpause()
    deadline = time.monotonic() + 60
    while router.search(np.ones(DIM)).trace.mode != "route":
        assert time.monotonic() < deadline
    assert live.count() == COUNT
