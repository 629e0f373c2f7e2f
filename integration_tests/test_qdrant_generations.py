"""Layouts by copy on a Qdrant server: others notice nothing, and whoever dies loses nothing.

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

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.errors import AmipsError, InvalidInput
from amips_plugins.vectors import FloatArray
from integration_tests.qdrant_data import (
    DIM,
    KEY,
    LAYOUT,
    N_CELLS,
    Background,
    Reader,
    by_sign,
    check,
    create,
    error_of,
    fill,
    keys,
    until,
    wait_until_indexed,
)
from integration_tests.servers import QdrantServer

COUNT = 4000
KILLS = int(os.environ.get("AMIPS_KILLS", "1"))
ROOT = Path(__file__).parent.parent
AWAY = (ApiException, ResponseHandlingException, httpx.HTTPError, AmipsError)

BUILDER = """
import sys
from pathlib import Path
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from integration_tests.test_qdrant_generations import spec

print(flush=True)
QdrantCollection.connect(sys.argv[1], sys.argv[2]).layouts.build(spec(Path(sys.argv[3])))
"""


def spec(work: Path | None = None) -> LayoutSpec:
    return LayoutSpec(LAYOUT, N_CELLS, by_sign, "v1", work=work)


@pytest.fixture
def client(qdrant_to_break: QdrantServer) -> Iterator[QdrantClient]:
    client = qdrant_to_break.address.client()
    yield client
    for found in client.get_collections().collections:
        client.delete_collection(found.name)
    client.close()


def aliased(client: QdrantClient, vectors: FloatArray | None = None, **more: Any) -> str:
    """Make a collection with a graph and an alias, and return the alias."""
    name = create(client, threshold=10, **more)
    fill(client, name, keys(COUNT) if vectors is None else vectors)
    alias = f"{name}_live"
    made = models.CreateAlias(collection_name=name, alias_name=alias)
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=made)])
    return alias


def revive(server: QdrantServer, name: str) -> None:
    if not server.is_running():
        server.start()
    server.wait_until_ready(name)


def built(client: QdrantClient, alias: str, work: Path) -> QdrantCollection:
    """Run the build until it ends well, as an operator does after a crash."""
    found = QdrantCollection(client, alias)
    if found.layout() is None or found.layouts.status().unfinished:
        found.layouts.build(spec(work))
    else:  # the draining may be left
        error_of(lambda: found.layouts.build(spec(work)))
    return QdrantCollection(client, alias)


def test_with_a_graph_and_an_alias_it_is_copied(client: QdrantClient, tmp_path: Path) -> None:
    alias = aliased(client, distance=models.Distance.COSINE)
    name = alias.removesuffix("_live")
    client.create_payload_index(name, "row", models.PayloadSchemaType.INTEGER, wait=True)
    client.update_collection(
        name, strict_mode_config=models.StrictModeConfig(enabled=True, max_query_limit=5000)
    )
    before = client.get_collection(name)
    plan = QdrantCollection(client, alias).layouts.plan(spec(tmp_path))
    assert f"{name}__g2" in plan.steps[0]
    live = QdrantCollection(client, alias).layouts.build(spec(tmp_path))
    assert (live.layout(), live.count(), live.overflow()) == (LAYOUT, COUNT, 0)
    copy = client.get_collection(f"{name}__g2")
    assert (copy.indexed_vectors_count or 0) >= COUNT // 2
    assert set(copy.payload_schema) == {"row", KEY}
    assert copy.config.strict_mode_config == before.config.strict_mode_config
    assert client.get_collection(name).indexed_vectors_count == before.indexed_vectors_count
    check(client, alias, dict(enumerate(_unit(keys(COUNT)))))
    with pytest.raises(InvalidInput, match="already"):
        live.layouts.plan(spec(tmp_path))


def _unit(vectors: FloatArray) -> FloatArray:
    lengths: FloatArray = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths


def test_wide_vectors_are_equal_on_both_sides(client: QdrantClient, tmp_path: Path) -> None:
    """A server normalises what is off by 1e-6; no pass may find such vectors changed for ever."""
    vectors = np.random.default_rng(3).standard_normal((1500, 1536)).astype(np.float32)
    alias = aliased(client, 100 * vectors, size=1536, distance=models.Distance.COSINE)
    live = QdrantCollection(client, alias).layouts.build(spec(tmp_path))
    assert (live.count(), live.overflow()) == (1500, 0)


@pytest.mark.parametrize("seed", range(KILLS))
def test_two_writers_and_a_reader_notice_nothing(
    qdrant_to_break: QdrantServer, client: QdrantClient, tmp_path: Path, seed: int
) -> None:
    """Each writer has its own half of the ids; the reader's best key is always there."""
    alias = aliased(client)
    target = np.full(DIM, 30.0, dtype=np.float32)
    client.upsert(alias, [models.PointStruct(id=99_999, vector=target.tolist())], wait=True)
    expected: dict[Any, FloatArray] = {**dict(enumerate(keys(COUNT))), 99_999: target}
    rngs = [np.random.default_rng((seed, half)) for half in (0, 1)]

    def writer(half: int) -> Callable[[], None]:
        own, rng = qdrant_to_break.address.client(), rngs[half]
        gone: set[int] = set()

        def write() -> None:
            one = int(rng.integers(COUNT // 2)) * 2 + half
            if one in gone:
                return  # deleted for good: whatever brings it back is a fault
            if rng.random() < 0.2:
                own.delete(alias, models.PointIdsList(points=[one]))
                expected.pop(one, None)
                gone.add(one)
                return
            vector = rng.standard_normal(DIM).astype(np.float32)
            point = models.PointStruct(id=one, vector=vector.tolist(), payload={"row": one})
            own.upsert(alias, [point])
            expected[one] = vector

        return write

    read = Reader(QdrantCollection(qdrant_to_break.address.client(), alias), 99_999)

    with Background(writer(0)) as one, Background(writer(1)) as other, Background(read) as seen:
        live = QdrantCollection(client, alias).layouts.build(spec(tmp_path))
        until(lambda: min(one.times, other.times, seen.times) > 50)
    assert (one.wrong, other.wrong, seen.wrong) == ([], [], [])
    live.layouts.backfill(by_sign)
    assert live.overflow() == 0
    check(client, alias, expected)
    back = live.layouts.roll_back(anyway=True)
    assert back.layout() is None
    assert back.count() == len(expected)


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.timeout(3600)  # every wait in it ends by itself: the machine says when
def test_the_builder_dies_at_any_moment(
    qdrant_to_break: QdrantServer, client: QdrantClient, tmp_path: Path, seed: int
) -> None:
    alias = aliased(client)
    expected: dict[Any, FloatArray] = dict(enumerate(keys(COUNT)))
    chance = np.random.default_rng(400 + seed)
    for number in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", BUILDER, qdrant_to_break.address.url, alias, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=ROOT,
        ) as builder:
            assert builder.stdout is not None
            builder.stdout.readline()
            time.sleep(chance.uniform(0.0, 9.0))
            builder.kill()
        vector = chance.standard_normal((2, DIM)).astype(np.float32)
        QdrantCollection(client, alias).upsert([number, 50_000 + number], vector)
        QdrantCollection(client, alias).delete([1000 + number])
        expected |= {number: vector[0], 50_000 + number: vector[1]}
        expected.pop(1000 + number)
        check(client, alias, expected, overflow=COUNT + 10)
    live = built(client, alias, tmp_path)
    live.layouts.backfill(by_sign)
    check(client, alias, expected)
    status = live.layouts.status()
    assert (status.unfinished, status.older) == ((), (alias.removesuffix("_live"),))


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.timeout(3600)  # every wait in it ends by itself: the machine says when
def test_the_server_dies_at_any_moment(
    qdrant_to_break: QdrantServer, client: QdrantClient, tmp_path: Path, seed: int
) -> None:
    alias = aliased(client)

    def crash() -> None:
        qdrant_to_break.kill()
        qdrant_to_break.start()

    timer = threading.Timer(np.random.default_rng(500 + seed).uniform(0.0, 8.0), crash)
    timer.start()
    found = error_of(lambda: QdrantCollection(client, alias).layouts.build(spec(tmp_path)))
    timer.join()
    assert found is None or isinstance(found, AWAY), repr(found)
    revive(qdrant_to_break, alias)
    live = built(client, alias, tmp_path)
    assert live.overflow() == 0
    check(client, alias, dict(enumerate(keys(COUNT))))
    wait_until_indexed(client, alias, COUNT // 2)
