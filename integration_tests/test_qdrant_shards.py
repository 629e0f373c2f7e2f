"""Cells in shard keys on a Qdrant server in cluster mode: the contract, writers, and crashes.

``AMIPS_KILLS`` sets how often each test kills: 1 in a developer's run, more at night.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException

from amips_plugins import LearnedRouter, route
from amips_plugins.adapters.qdrant import copied_layouts, searched_points
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Collection, Id, SearchRequest
from amips_plugins.errors import AmipsError
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, Metric
from integration_tests.qdrant_data import (
    DIM,
    LAYOUT,
    N_CELLS,
    Background,
    EveryCell,
    Reader,
    by_sign,
    create,
    error_of,
    fill,
    keys,
    queries,
    until,
    wait_until_indexed,
)
from integration_tests.servers import QdrantAddress, QdrantProcess, ServerError
from integration_tests.test_qdrant_server import TestQdrantServer as OverRest
from tests.adapters.contract.collection_contract import COUNT, cells_of, found_in, vectors
from tests.adapters.contract.test_qdrant_shards import ShardsContract
from tests.support.event_loop import LoopThread

KEYS = 3000
KILLS = int(os.environ.get("AMIPS_KILLS", "1"))
ROOT = Path(__file__).parent.parent
AWAY = (ApiException, ResponseHandlingException, httpx.HTTPError, AmipsError)

BUILDER = """
import sys
from pathlib import Path
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from integration_tests.test_qdrant_shards import shard_spec

print(flush=True)
QdrantCollection.connect(sys.argv[1], sys.argv[2]).layouts.build(shard_spec(Path(sys.argv[3])))
"""


class ShardsOnServer(ShardsContract, OverRest):
    """Every collection is opened by an alias of its own, which a layout moves."""

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, qdrant_node: QdrantAddress) -> Iterator[None]:
        cls.address, cls.built, cls.made = qdrant_node, {}, []
        cls.client = qdrant_node.client(prefer_grpc=cls.grpc)
        cls.awaited = qdrant_node.async_client(prefer_grpc=cls.grpc)
        with LoopThread() as cls.loop, pytest.MonkeyPatch.context() as patch:
            patch.setattr(copied_layouts, "GRACE", 0.2)
            if cls.grpc:  # small batches, too, are messages of ours
                patch.setattr(searched_points, "_BATCH", 2)
            yield
            cls.loop.run(cls.awaited.close())
        for found in cls.client.get_collections().collections:
            if found.name.split("__g")[0] in cls.made:
                cls.client.delete_collection(found.name)
        cls.client.close()

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        name = OverRest.make(self, keys, ids, metric, groups).info.name
        alias = f"{name}_{secrets.token_hex(3)}"
        made = models.CreateAlias(collection_name=name, alias_name=alias)
        self.client.update_collection_aliases([models.CreateAliasOperation(create_alias=made)])
        return QdrantCollection(self.client, alias)

    def upsert(
        self, name: str, ids: Sequence[Id], keys: FloatArray, groups: Sequence[str] | None
    ) -> None:
        """Over gRPC an empty payload would keep the old one."""
        super().upsert(name, ids, keys, ["foreign"] * len(ids) if groups is None else groups)

    def indexed(self, name: str) -> None:
        """Wait until nothing is left to do: cells of so few keys have no graph."""
        wait_until_indexed(self.client, name)

    @pytest.mark.skip(reason="of cells in place")
    def test_a_cell_search_has_its_index(self) -> None: ...

    @pytest.mark.skip(reason="of cells in place")
    def test_a_build_goes_on_where_it_stopped(self, monkeypatch: pytest.MonkeyPatch) -> None: ...

    @pytest.mark.skip(reason="of a collection by its own name")
    def test_connect(self) -> None: ...

    def test_a_strict_server_that_leaves_room_is_laid_out(self) -> None:
        collection = self.strict(
            unindexed_filtering_retrieve=False,
            unindexed_filtering_update=False,
            filter_max_conditions=4,
            condition_max_size=100,
            max_query_limit=120,
            max_timeout=30,
            upsert_max_batchsize=25,
        )
        built = collection.layouts.build(self.spec())
        assert sorted(found_in(built, 0)) == [k for k in range(COUNT) if cells_of([k])[0] == 0]
        built.upsert(list(range(COUNT)), vectors())
        assert built.layouts.backfill(self.spec().assign) == COUNT
        assert built.overflow() == 0
        built.delete(list(range(COUNT // 2)))
        assert built.count() == COUNT // 2


class TestShardsOverRest(ShardsOnServer):
    grpc = False


class TestShardsOverGrpc(ShardsOnServer):
    grpc = True


# --- writers, and what dies -------------------------------------------------------------------


def shard_spec(work: Path | None = None) -> LayoutSpec:
    return LayoutSpec(LAYOUT, N_CELLS, by_sign, "v1", storage="shards", work=work)


@pytest.fixture(scope="module")
def node() -> Iterator[QdrantProcess]:
    """A node of one's own, to kill."""
    try:
        process = QdrantProcess(cluster=True)
    except ServerError as exc:
        pytest.skip(str(exc))
    with process:
        yield process


@pytest.fixture
def client(node: QdrantProcess) -> Iterator[QdrantClient]:
    client = node.address.client()
    yield client
    for found in client.get_collections().collections:
        client.delete_collection(found.name)
    client.close()


def aliased(client: QdrantClient) -> str:
    name = create(client, threshold=10)
    fill(client, name, keys(KEYS))
    made = models.CreateAlias(collection_name=name, alias_name=f"{name}_live")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=made)])
    return f"{name}_live"


def check_shards(client: QdrantClient, alias: str, expected: dict[Any, FloatArray]) -> None:
    """Every point once, as it was last written, in the shard key of its vector's cell."""
    found: dict[Any, Any] = {}
    for shard in client.list_shard_keys(alias).shard_keys or ():
        offset: Any = None
        while True:
            records, offset = client.scroll(
                alias, limit=2000, offset=offset, with_vectors=True, shard_key_selector=shard.key
            )
            for one in records:
                assert one.id not in found, f"{one.id} is in {found[one.id][0]} and {shard.key}"
                found[one.id] = shard.key, np.array(one.vector, dtype=np.float32)
            if offset is None:
                break
    lost, risen = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    assert (lost, risen) == ([], []), f"lost {lost}, risen {risen}"
    ids = list(found)
    cells = by_sign(ids, np.array([found[one][1] for one in ids])).tolist()
    for one, cell in zip(ids, cells, strict=True):
        assert np.allclose(found[one][1], expected[one], atol=1e-5), one
        assert found[one][0] == f"amips_{LAYOUT}_{cell}"


def built(client: QdrantClient, alias: str, work: Path) -> QdrantCollection:
    """Run the build until it ends well, as an operator does after a crash."""
    found = QdrantCollection(client, alias)
    if found.layout() is None or found.layouts.status().unfinished:
        found.layouts.build(shard_spec(work))
    else:  # the draining may be left
        error_of(lambda: found.layouts.build(shard_spec(work)))
    return QdrantCollection(client, alias)


def test_every_cell_has_a_graph_and_one_call_asks_few(client: QdrantClient) -> None:
    alias = aliased(client)
    live = QdrantCollection(client, alias).layouts.build(shard_spec())
    found = client.get_collection(alias)
    assert (found.indexed_vectors_count or 0) > KEYS // 2
    router = LearnedRouter(live, hook=EveryCell(), refresh=None)
    routed = route(client, router)
    for query in queries(5):
        exact = client.query_points(
            alias, query.tolist(), limit=5, search_params=models.SearchParams(exact=True)
        ).points
        plan = QueryPlan(cells=np.arange(N_CELLS)[None], layout=LAYOUT, effort=128)
        (hits,) = live.search(SearchRequest(query[None], 5), plan)
        assert len({hit.id for hit in hits} & {one.id for one in exact}) >= 4
        here = routed.query_points(alias, query.tolist(), limit=5).points
        assert [one.id for one in here] == [one.id for one in exact]
    assert live.layouts.drop_old() == [alias.removesuffix("_live")]


def test_writers_through_a_router_and_a_reader_notice_nothing(
    node: QdrantProcess, client: QdrantClient, tmp_path: Path
) -> None:
    """Each writer has its own half of the ids; the reader's best key is always there."""
    alias = aliased(client)
    target = np.full(DIM, 30.0, dtype=np.float32)
    client.upsert(alias, [models.PointStruct(id=99_999, vector=target.tolist())], wait=True)
    expected: dict[Any, FloatArray] = {**dict(enumerate(keys(KEYS))), 99_999: target}

    def writer(half: int) -> Callable[[], None]:
        rng, gone = np.random.default_rng(half), set[int]()
        own = QdrantCollection(node.address.client(), alias)
        router = LearnedRouter(own, hook=EveryCell(), refresh=None)

        def write() -> None:
            one = int(rng.integers(KEYS // 2)) * 2 + half
            if one in gone:
                return  # deleted for good: whatever brings it back is a fault
            if rng.random() < 0.2:
                router.delete([one])
                expected.pop(one, None)
                gone.add(one)
                return
            vector = rng.standard_normal(DIM).astype(np.float32)
            router.upsert([one], vector[None], [{"row": one}])
            expected[one] = vector

        return write

    read = Reader(QdrantCollection(node.address.client(), alias), 99_999)
    with Background(writer(0)) as one, Background(writer(1)) as other, Background(read) as seen:
        live = QdrantCollection(client, alias).layouts.build(shard_spec(tmp_path))
        before = min(one.times, other.times)
        until(lambda: min(one.times, other.times) > before + 20 and seen.times > 20)
        live.layouts.backfill(by_sign)
    assert (one.wrong, other.wrong, seen.wrong) == ([], [], [])
    live.layouts.backfill(by_sign)
    assert (live.overflow(), live.count()) == (0, len(expected))
    check_shards(client, alias, expected)
    back = live.layouts.roll_back(anyway=True)
    assert (back.layout(), back.count()) == (None, len(expected))


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.timeout(3600)  # every wait in it ends by itself: the machine says when
def test_the_builder_dies_at_any_moment(
    node: QdrantProcess, client: QdrantClient, tmp_path: Path, seed: int
) -> None:
    alias = aliased(client)
    expected: dict[Any, FloatArray] = dict(enumerate(keys(KEYS)))
    chance = np.random.default_rng(700 + seed)
    for number in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", BUILDER, node.address.url, alias, str(tmp_path)],
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
    live = built(client, alias, tmp_path)
    live.layouts.backfill(by_sign)
    check_shards(client, alias, expected)
    status = live.layouts.status()
    assert (status.unfinished, status.older) == ((), (alias.removesuffix("_live"),))


@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.timeout(3600)  # every wait in it ends by itself: the machine says when
def test_the_server_dies_at_any_moment(
    node: QdrantProcess, client: QdrantClient, tmp_path: Path, seed: int
) -> None:
    """Of a build, and of a backfill while a writer writes."""
    alias = aliased(client)
    expected: dict[Any, FloatArray] = dict(enumerate(keys(KEYS)))
    chance = np.random.default_rng(800 + seed)

    def crash() -> None:
        node.kill()
        node.start()

    def killed(work: Callable[[], object], within: float) -> None:
        timer = threading.Timer(chance.uniform(0.0, within), crash)
        timer.start()
        found = error_of(work)
        timer.join()
        assert found is None or isinstance(found, AWAY), repr(found)
        node.wait_until_ready(alias)

    killed(lambda: QdrantCollection(client, alias).layouts.build(shard_spec(tmp_path)), 8.0)
    live = built(client, alias, tmp_path)
    new = list(range(10_000, 10_400))
    vectors = chance.standard_normal((len(new), DIM)).astype(np.float32)
    live.upsert(new, vectors)
    expected |= dict(zip(new, vectors, strict=True))
    killed(lambda: QdrantCollection(client, alias).layouts.backfill(by_sign), 1.0)
    changed = list(range(200))
    vectors = chance.standard_normal((len(changed), DIM)).astype(np.float32)
    killed(lambda: live.upsert(changed, vectors, None, by_sign(changed, vectors)), 0.2)
    live.upsert(changed, vectors, None, by_sign(changed, vectors))
    expected |= dict(zip(changed, vectors, strict=True))
    QdrantCollection(client, alias).layouts.backfill(by_sign, verify=True)
    check_shards(client, alias, expected)
    assert live.count() == len(expected)
