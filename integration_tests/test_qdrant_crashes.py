"""A Qdrant server and its builders that die in the middle: nothing is lost, doubled or hidden.

``AMIPS_KILLS`` sets how often each test kills: 1 in a developer's run, more at night.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException

from amips_plugins import LearnedRouter
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.errors import AmipsError
from amips_plugins.vectors import FloatArray
from integration_tests.qdrant_data import (
    DIM,
    Background,
    EveryCell,
    Reader,
    by_sign,
    check,
    create,
    error_of,
    fill,
    keys,
    spec,
    until,
)
from integration_tests.servers import QdrantServer

COUNT = 4000
KILLS = int(os.environ.get("AMIPS_KILLS", "1"))
SEEDS = range(KILLS)
ROOT = Path(__file__).parent.parent
AWAY = (ApiException, ResponseHandlingException, httpx.HTTPError, AmipsError)
"""What a client raises while its server is away."""

BUILDER = """
import sys
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from integration_tests.qdrant_data import by_sign, spec

def assign(ids, vectors):
    print(flush=True)  # what follows is the writing
    return by_sign(ids, vectors)

QdrantCollection.connect(sys.argv[1], sys.argv[2]).layouts.build(spec(assign))
"""


@pytest.fixture
def client(qdrant_to_break: QdrantServer) -> Iterator[QdrantClient]:
    client = qdrant_to_break.address.client()
    yield client
    for found in client.get_collections().collections:
        client.delete_collection(found.name)
    client.close()


class Writer:
    """Upserts and deletes whole points, and remembers what it was told is safe."""

    def __init__(self, client: QdrantClient, name: str, seed: int = 0) -> None:
        self._client, self._name = client, name
        self._rng = np.random.default_rng(seed)
        self.expected: dict[Any, FloatArray] = dict(enumerate(keys(COUNT)))
        self.doubtful: set[int] = set()
        """Of the last write of these, no acknowledgement tells whether it came through."""

    def write(self) -> None:
        ids = [int(one) for one in self._rng.choice(COUNT + 500, 5, replace=False)]
        vectors = self._rng.standard_normal((len(ids), DIM)).astype(np.float32)
        self.doubtful.update(ids)
        if self._rng.random() < 0.3:
            self._client.delete(self._name, models.PointIdsList(points=list(ids)), wait=True)
            for one in ids:
                self.expected.pop(one, None)
        else:
            points = [
                models.PointStruct(id=one, vector=vector.tolist(), payload={"row": one})
                for one, vector in zip(ids, vectors, strict=True)
            ]
            self._client.upsert(self._name, points, wait=True)
            self.expected |= dict(zip(ids, vectors, strict=True))
        self.doubtful.difference_update(ids)

    def forget_the_doubtful(self) -> None:
        if self.doubtful:
            self._client.delete(self._name, models.PointIdsList(points=list(self.doubtful)))
            for one in self.doubtful:
                self.expected.pop(one, None)


def filled(client: QdrantClient) -> str:
    name = create(client, threshold=10)
    fill(client, name, keys(COUNT))
    return name


def revive(server: QdrantServer, name: str) -> None:
    if not server.is_running():
        server.start()
    server.wait_until_ready(name)


def built(client: QdrantClient, name: str) -> QdrantCollection:
    """Run the build until it ends well, as an operator does after a crash."""
    found = QdrantCollection(client, name)
    if found.layout() is None or found.layouts.status().unfinished:
        found.layouts.build(spec())
    return QdrantCollection(client, name)


def kill_after(server: QdrantServer, seconds: float) -> threading.Timer:
    def crash() -> None:
        server.kill()
        server.start()

    timer = threading.Timer(seconds, crash)
    timer.start()
    return timer


@pytest.mark.parametrize("seed", SEEDS)
def test_the_server_dies_at_any_moment_of_a_build_and_a_backfill(
    qdrant_to_break: QdrantServer, client: QdrantClient, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    name = filled(client)
    expected: dict[Any, FloatArray] = dict(enumerate(keys(COUNT)))
    works: list[Callable[[], object]] = [
        lambda: QdrantCollection(client, name).layouts.build(spec()),
        lambda: QdrantCollection(client, name).layouts.backfill(by_sign),
    ]
    for number, work in enumerate(works):
        timer = kill_after(qdrant_to_break, rng.uniform(0.0, 0.8))
        found = error_of(work)
        timer.join()
        assert found is None or isinstance(found, AWAY), repr(found)
        revive(qdrant_to_break, name)
        live = built(client, name)
        new = [10_000 * (number + 1) + row for row in range(400)]
        vectors = rng.standard_normal((len(new), DIM)).astype(np.float32)
        live.upsert(new, vectors)  # without cells, for the backfill
        expected |= dict(zip(new, vectors, strict=True))
        check(client, name, expected, overflow=2 * len(new))
    QdrantCollection(client, name).layouts.backfill(by_sign)
    check(client, name, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_builder_dies_at_any_moment(
    qdrant_to_break: QdrantServer, client: QdrantClient, seed: int
) -> None:
    name = filled(client)
    writer = Writer(client, name)
    chance = np.random.default_rng(200 + seed)
    for _ in range(2):
        with subprocess.Popen(
            [sys.executable, "-c", BUILDER, qdrant_to_break.address.url, name],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        ) as builder:
            assert builder.stdout is not None
            builder.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.3))
            builder.kill()
        writer.write()
        check(client, name, writer.expected, overflow=COUNT + 500)
    live = built(client, name)
    live.layouts.backfill(by_sign)
    assert live.layouts.status().unfinished == ()
    check(client, name, writer.expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_server_dies_in_a_stream_of_upserts_and_searches(
    qdrant_to_break: QdrantServer, client: QdrantClient, seed: int
) -> None:
    name = filled(client)
    built(client, name)
    writer = Writer(qdrant_to_break.address.client(timeout=5), name, seed)
    hasty = qdrant_to_break.address.client(timeout=5)
    router = LearnedRouter(QdrantCollection(hasty, name), hook=EveryCell(), refresh=None)

    def search() -> None:
        assert len(router.search(np.ones(DIM), k=5)) == 5

    with Background(writer.write) as writing, Background(search) as searching:
        kill_after(qdrant_to_break, np.random.default_rng(300 + seed).uniform(0.3, 1.5)).join()
        qdrant_to_break.wait_until_ready(name)
        before = searching.times
        until(lambda: searching.times > before + 20)
        until(lambda: router.search(np.ones(DIM)).trace.mode == "route")
    for wrong in writing.wrong + searching.wrong:
        assert isinstance(wrong, AWAY), repr(wrong)
    writer.forget_the_doubtful()
    QdrantCollection(client, name).layouts.backfill(by_sign)
    check(client, name, writer.expected)


def test_two_writers_and_a_reader_during_a_build(
    qdrant_to_break: QdrantServer, client: QdrantClient
) -> None:
    """Each writer has its own half of the ids, so that the last write of each is known."""
    name = filled(client)
    target = np.full(DIM, 30.0, dtype=np.float32)  # the best key of every search below
    client.upsert(name, [models.PointStruct(id=99_999, vector=target.tolist())], wait=True)
    expected: dict[Any, FloatArray] = {**dict(enumerate(keys(COUNT))), 99_999: target}
    rngs = [np.random.default_rng(seed) for seed in (0, 1)]

    def writer(half: int) -> Callable[[], None]:
        own, rng = qdrant_to_break.address.client(), rngs[half]

        def write() -> None:
            one, gone = (int(rng.integers(COUNT // 2)) * 2 + half for _ in range(2))
            vector = rng.standard_normal(DIM).astype(np.float32)
            point = models.PointStruct(id=one, vector=vector.tolist(), payload={"row": one})
            own.upsert(name, [point])
            expected[one] = vector
            own.delete(name, models.PointIdsList(points=[gone]))
            expected.pop(gone, None)

        return write

    read = Reader(QdrantCollection(qdrant_to_break.address.client(), name), 99_999)

    with Background(writer(0)) as one, Background(writer(1)) as other, Background(read) as seen:
        live = QdrantCollection(client, name).layouts.build(spec())
        until(lambda: min(one.times, other.times, seen.times) > 50)
        live.layouts.backfill(by_sign)
    assert (one.wrong, other.wrong, seen.wrong) == ([], [], [])
    live.layouts.backfill(by_sign)
    assert live.overflow() == 0
    check(client, name, expected)
    assert live.count() == len(expected)
