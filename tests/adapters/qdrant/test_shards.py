"""Cells in shard keys: which way is chosen, what is asked, and that an id has no twin.

Over a simulated cluster of local collections; ``integration_tests/test_qdrant_shards.py`` asks a
server. What every layout promises stands in ``tests/adapters/contract/test_qdrant_shards.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant import copied_layouts, new_generation, new_shards
from amips_plugins.adapters.qdrant.cell_shards import CellShards, group_cells
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.sharded_points import TICKS, stamp_now
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from tests.support.qdrant_cluster import ClusterClient
from tests.support.qdrant_data import KEYS, by_row

pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning"),
]

COUNT = len(KEYS)
OVERFLOW = "amips_a1_overflow"
CELLS = [f"amips_a1_{cell}" for cell in range(4)]
ONE = np.ones((1, KEYS.shape[1]), dtype=np.float32)


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copied_layouts, "GRACE", 0.0)
    monkeypatch.setattr(new_generation, "_LOOK", 0.0)


@pytest.fixture
def client() -> Iterator[ClusterClient]:
    opened = ClusterClient(nodes=(11, 12, 13))
    fill(opened)
    yield opened
    opened.close()


def fill(client: ClusterClient, **more: Any) -> None:
    vectors = models.VectorParams(size=KEYS.shape[1], distance=models.Distance.DOT)
    client.create_collection("docs", vectors, **more)
    points = [
        models.PointStruct(id=row, vector=key.tolist(), payload={"row": row})
        for row, key in enumerate(KEYS)
    ]
    client.upsert("docs", points)
    made = models.CreateAlias(collection_name="docs", alias_name="live")
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=made)])


def opened(client: Any, name: str = "live") -> Any:
    collection = QdrantCollection(client, name)
    collection._local = False
    return collection


def spec(**more: Any) -> LayoutSpec:
    return replace(LayoutSpec("a1", 4, by_row, version="v1", storage="shards"), **more)


def places(client: ClusterClient, name: str = "docs__g2") -> dict[Any, list[Any]]:
    """The shard keys of every id."""
    found: dict[Any, list[Any]] = {}
    for key, child in client.shards[name].items():
        records, _ = client.local.scroll(child, limit=10_000)
        for record in records:
            found.setdefault(record.id, []).append(key)
    return found


def plan(*cells: int, effort: int | None = None) -> QueryPlan:
    return QueryPlan(cells=np.array([cells]), layout="a1", effort=effort)


# --- which cells share a shard key --------------------------------------------------------------


def test_few_cells_have_a_shard_each() -> None:
    assert group_cells(4, (), None) == (0, 1, 2, 3)


@pytest.mark.parametrize("known", [True, False])
def test_many_cells_share_shards_of_about_equal_size(known: bool) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(50, 150, 300)
    centroids = rng.standard_normal((300, 8)).astype(np.float32) if known else None
    found = np.array(group_cells(300, sizes.tolist(), centroids, most=16))
    keys = np.bincount(found, weights=sizes)
    assert len(keys) == 16
    assert keys.max() < 1.3 * keys.mean()
    assert keys.min() > 0.7 * keys.mean()


def test_neighbours_share_a_shard() -> None:
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((8, 16)) * 10
    centroids = np.repeat(groups, 8, axis=0) + rng.standard_normal((64, 16)) * 0.1
    found = group_cells(64, [1] * 64, centroids.astype(np.float32), most=8)
    for group in range(8):
        assert len({*found[8 * group : 8 * group + 8]}) == 1


# --- which way ----------------------------------------------------------------------------------


def test_a_layout_in_shard_keys(client: ClusterClient) -> None:
    live = opened(client).layouts.build(spec())
    assert {*client.shards["docs__g2"]} == {*CELLS, OVERFLOW}
    assert places(client) == {row: [CELLS[row % 4]] for row in range(COUNT)}
    status = live.layouts.status()
    assert (status.storage, status.count, status.overflow, status.notes) == ("shards", COUNT, 0, ())
    created = client.created["docs__g2"]
    assert created["sharding_method"] is models.ShardingMethod.CUSTOM
    assert created["wal_config"].wal_capacity_mb == 1


def test_neighbouring_cells_are_on_different_nodes(client: ClusterClient) -> None:
    opened(client).layouts.build(spec())
    nodes = [client.placed["docs__g2", key] for key in CELLS]
    assert nodes == [[11], [12], [13], [11]]


def test_no_cell_is_put_on_a_node_that_is_away(client: ClusterClient) -> None:
    client.away = {12}
    opened(client).layouts.build(spec())
    assert [client.placed["docs__g2", key] for key in CELLS] == [[11], [13], [11], [13]]


def test_a_plan_says_what_becomes_of_other_writers(client: ClusterClient) -> None:
    found = opened(client).layouts.plan(spec())
    assert "4 shard keys" in found.steps[0]
    assert any("writes that name no shard key" in note for note in found.notes)
    assert client.shards == {}


@pytest.mark.parametrize("storage", ["shards", None])
def test_without_cluster_mode_there_are_payload_cells(storage: Any) -> None:
    client = ClusterClient(nodes=())
    fill(client, shard_number=8)
    layouts = opened(client).layouts
    if storage == "shards":
        with pytest.raises(InvalidInput, match=r"cluster mode.*--storage copy"):
            layouts.plan(spec())
    else:
        built = layouts.build(spec(storage=None))
        assert (built.layout(), built.layouts.status().storage) == ("a1", "payload")


def test_shard_keys_of_users_stay_theirs(client: ClusterClient) -> None:
    vectors = models.VectorParams(size=KEYS.shape[1], distance=models.Distance.DOT)
    client.create_collection("theirs", vectors, sharding_method=models.ShardingMethod.CUSTOM)
    client.create_shard_key("theirs", "a")
    layouts = opened(client, "theirs").layouts
    with pytest.raises(InvalidInput, match=r"owner's.*--storage"):
        layouts.plan(spec(alias="other"))


@pytest.mark.parametrize(("shards", "storage"), [(1, "copy"), (7, "copy"), (8, "shards")])
def test_it_chooses_shards_where_a_search_asks_many(
    monkeypatch: pytest.MonkeyPatch, shards: int, storage: str
) -> None:
    monkeypatch.setattr(QdrantCollection, "is_built", lambda _: True)
    client = ClusterClient()
    fill(client, shard_number=shards)
    found = opened(client).layouts.plan(spec(storage=None))
    assert ("shard keys" in found.steps[0]) == (storage == "shards")
    assert any("8 shards or more" in note for note in found.notes) == (storage == "shards")


def test_cells_in_shards_are_laid_out_anew_by_a_copy(client: ClusterClient) -> None:
    live = opened(client).layouts.build(spec())
    with pytest.raises(InvalidInput, match="by a copy"):
        live.layouts.plan(spec(layout="b2", storage="payload"))
    second = live.layouts.build(spec(layout="b2", storage="shards"))
    assert second.layout() == "b2"
    assert places(client, "docs__g3")[0] == ["amips_b2_0"]
    back = second.layouts.roll_back()
    assert (back.layout(), back.count()) == ("a1", COUNT)
    first = back.layouts.roll_back()
    assert (first.layout(), first.count()) == (None, COUNT)


def test_graphs_are_as_small_as_cells(client: ClusterClient) -> None:
    found = client.get_collection("docs")
    found.points_count, found.config.optimizer_config.indexing_threshold = 64_000, 10_000
    record = LayoutRecord("a1", "v1", 64, places=tuple(range(64)))
    assert new_shards.graph_threshold(found, record, 256) == 250
    assert new_shards.graph_threshold(found, replace(record, places=()), 256) is None
    found.config.optimizer_config.indexing_threshold = 0
    assert new_shards.graph_threshold(found, record, 256) is None


# --- what is asked ------------------------------------------------------------------------------


def test_a_search_asks_the_shards_of_its_cells_and_the_overflow(client: ClusterClient) -> None:
    live = opened(client).layouts.build(spec())
    client.asked.clear()
    live.search(SearchRequest(ONE, 3), plan(2, 0, -1))
    assert client.asked == [[CELLS[0], CELLS[2], OVERFLOW]]


def test_the_effort_of_a_plan_is_that_of_the_graphs(client: ClusterClient) -> None:
    live = opened(client).layouts.build(spec())
    (query,) = live.queries(SearchRequest(ONE, 3), plan(1, effort=24))
    assert query.params is not None
    assert (query.params.hnsw_ef, bool(query.params.exact)) == (24, False)
    (query,) = live.queries(SearchRequest(ONE, 50), plan(1, effort=24))
    assert query.params is not None
    assert query.params.hnsw_ef == 50
    (query,) = live.queries(SearchRequest(ONE, 3), plan(1))
    assert query.params is not None
    assert query.params.exact


def test_a_batch_asks_the_shards_of_each_query(client: ClusterClient) -> None:
    live = opened(client).layouts.build(spec())
    client.asked.clear()
    cells = np.tile(np.array([[0, 1]]), (64, 1))
    cells[32:] = [1, 2]
    many = QueryPlan(cells=cells, layout="a1")
    found = live.search(SearchRequest(np.repeat(ONE, 64, axis=0), 5), many)
    first, last = [CELLS[0], CELLS[1], OVERFLOW], [CELLS[1], CELLS[2], OVERFLOW]
    assert client.asked == [first] * 32 + [last] * 32
    alone = live.search(SearchRequest(ONE, 5), plan(0, 1))
    assert [hit.id for hit in found[0]] == [hit.id for hit in alone[0]]


def test_a_foreign_shard_key_is_overflow_and_is_left_alone(client: ClusterClient) -> None:
    live = opened(client).layouts.build(spec())
    client.create_shard_key("docs__g2", "theirs")
    far = models.PointStruct(id=900, vector=[9.0] * KEYS.shape[1])
    client.upsert("docs__g2", [far], shard_key_selector="theirs")
    live = live.current()
    assert live.overflow() == 1
    assert [hit.id for hit in live.search(SearchRequest(ONE, 1), plan(3))[0]] == [900]
    assert "theirs" in live.layouts.status().notes[0]
    assert live.layouts.backfill(by_row) == 0
    assert places(client)[900] == ["theirs"]


def test_a_dropped_shard_key_is_told_and_made_again(client: ClusterClient) -> None:
    live = opened(client).layouts.build(spec())
    client.delete_shard_key("docs__g2", CELLS[1])
    client.delete_shard_key("docs__g2", OVERFLOW)
    live = live.current()
    (hits,) = live.search(SearchRequest(ONE, COUNT), plan(0, 1))
    assert {hit.id for hit in hits} == set(range(0, COUNT, 4))
    assert CELLS[1] in live.layouts.status().notes[0]
    live.layouts.backfill(by_row)
    live = live.current()
    assert live.layouts.status().notes == ()
    live.upsert([1], KEYS[1:2], cells=np.array([1]))
    assert places(client)[1] == [CELLS[1]]


# --- one place for an id ------------------------------------------------------------------------


def test_stamps_are_read_as_they_are_written() -> None:
    """A server reads ``x.0`` as ten times x divided by ten, which rounds above 53 bits."""
    in_ten_years = stamp_now() + 10 * 366 * 86_400 * TICKS
    assert 10 * in_ten_years < 2**53


def test_what_a_crash_left_of_a_move_is_mended(client: ClusterClient) -> None:
    """A writer that died between its two steps: the newer point is kept, by whom ever."""
    live = opened(client).layouts.build(spec())
    stamp = "amips_stamp_a1"
    (old,) = client.retrieve("docs__g2", [5], with_payload=True, with_vectors=True)
    newer = {**(old.payload or {}), stamp: (old.payload or {})[stamp] + 5, "amips_cell_a1": 2}
    point = models.PointStruct(id=5, vector=[7.0] * KEYS.shape[1], payload=newer)
    client.upsert("docs__g2", [point], shard_key_selector=CELLS[2])
    assert len(places(client)[5]) == 2
    (hits,) = live.search(SearchRequest(ONE, 2 * COUNT), plan(0, 1, 2, 3))
    assert sorted(hit.id for hit in hits) == list(range(COUNT))
    live.layouts.backfill(by_row, verify=True)
    assert len(places(client)[5]) == 1
    (found,) = client.retrieve("docs__g2", [5], with_vectors=True)
    assert found.vector == [7.0] * KEYS.shape[1]


def test_a_foreign_write_wins_over_what_it_leaves_behind(client: ClusterClient) -> None:
    live = opened(client).layouts.build(spec())
    point = models.PointStruct(id=6, vector=[8.0] * KEYS.shape[1], payload={})
    client.upsert("docs__g2", [point], shard_key_selector=OVERFLOW)
    assert live.layouts.backfill(by_row) == 1
    assert places(client)[6] == [CELLS[2]]
    (found,) = client.retrieve("docs__g2", [6], with_vectors=True)
    assert found.vector == [8.0] * KEYS.shape[1]


class Interrupting:
    """Does something else before the n-th call that reaches the database."""

    def __init__(self, client: ClusterClient, number: int, other: Callable[[], None]) -> None:
        self.client, self.left, self.other = client, number, other

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.client, name)
        if name not in ("scroll", "batch_update_points", "upsert", "delete", "count"):
            return found

        def call(*args: Any, **more: Any) -> Any:
            if self.left == 0:
                self.left = -1
                self.other()
            self.left -= 1
            return found(*args, **more)

        return call


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("first", ["upsert", "backfill", "displace"])
@pytest.mark.parametrize("second", ["upsert", "overflow", "delete", "foreign"])
def test_two_who_write_one_key_leave_one_point(
    client: ClusterClient, number: int, first: str, second: str
) -> None:
    """Whatever comes between whichever two calls of a write or a backfill."""
    live = opened(client).layouts.build(spec())
    start = models.PointStruct(id=700, vector=[1.0] * KEYS.shape[1], payload={})
    client.upsert("docs__g2", [start], shard_key_selector=OVERFLOW)
    mine, theirs = np.full_like(ONE, 2.0), np.full_like(ONE, 3.0)
    done = []

    def other() -> None:
        done.append(True)
        if second == "delete":
            live.delete([700])
        elif second == "foreign":
            point = models.PointStruct(id=700, vector=theirs[0].tolist(), payload={})
            client.upsert("docs__g2", [point], shard_key_selector=OVERFLOW)
        else:
            live.upsert([700], theirs, cells=np.array([1]) if second == "upsert" else None)

    watched = opened(Interrupting(client, number, other))
    _ = watched.info
    if first == "upsert":
        watched.upsert([700], mine, cells=np.array([2]))
    elif first == "displace":
        live.upsert([700], mine, cells=np.array([2]))
        watched.displace([700])
    else:
        watched.layouts.backfill(lambda ids, _: np.full(len(ids), 3))
    live.current().layouts.backfill(lambda ids, _: np.full(len(ids), 3))
    found = places(client).get(700, [])
    if second == "delete" and done and first != "upsert":
        assert found == []
    elif second != "delete":
        assert len(found) == 1
    (hits,) = live.search(SearchRequest(ONE, 1), plan(0, 1, 2, 3))
    if second in ("upsert", "overflow") and done and first != "upsert":
        assert hits[0].id == 700
        assert hits[0].score == pytest.approx(3.0 * KEYS.shape[1])
    assert places(client) | {700: []} == {row: [CELLS[row % 4]] for row in range(COUNT)} | {700: []}


@pytest.mark.parametrize("number", range(4, 14))
@pytest.mark.parametrize("moves", ["backfill", "displace"])
def test_what_changes_while_it_moves_is_not_lost(
    client: ClusterClient, number: int, moves: str
) -> None:
    """A change of payload that is told to every shard key, twice, whatever a move is at."""
    live = opened(client).layouts.build(spec())
    if moves == "backfill":
        live.upsert([0], KEYS[:1])  # into the overflow
    every: Any = [*CELLS, OVERFLOW]

    def change() -> None:
        one = models.Filter(must=[models.HasIdCondition(has_id=[0])])
        for _ in range(2):
            client.set_payload("docs__g2", {"new": 1}, one, shard_key_selector=every)

    watched = opened(Interrupting(client, number, change))
    _ = watched.info
    if moves == "displace":
        watched.displace([0])
        assert places(client)[0] == [OVERFLOW]
    else:
        watched.layouts.backfill(by_row)
        assert len(places(client)[0]) == 1
    live.layouts.backfill(by_row)
    assert places(client)[0] == [CELLS[0]]
    if watched._client.left < 0:
        (found,) = client.retrieve("docs__g2", [0])
        assert (found.payload or {})["new"] == 1


def test_a_new_layout_takes_the_last_write_of_an_id_in_two_shards(client: ClusterClient) -> None:
    """Somebody has written to the overflow, and not deleted what is in the cells."""
    live = opened(client).layouts.build(spec())
    points = [models.PointStruct(id=row, vector=[8.0] * KEYS.shape[1]) for row in range(8)]
    client.upsert("docs__g2", points, shard_key_selector=OVERFLOW)
    second = live.layouts.build(spec(layout="b2"))
    found = client.retrieve("docs__g3", list(range(8)), with_vectors=True)
    assert all(one.vector == [8.0] * KEYS.shape[1] for one in found)
    assert second.count() == COUNT


def test_two_whose_clocks_are_behind_take_two_stamps(client: ClusterClient) -> None:
    live = opened(client).layouts.build(spec())
    ahead = models.Filter(must=[models.HasIdCondition(has_id=[2])])
    later = stamp_now() + 100 * TICKS
    client.set_payload("docs__g2", {"amips_stamp_a1": later}, ahead, shard_key_selector=CELLS[2])
    found = {live.stamp_for([2]) for _ in range(20)}
    assert min(found) > later
    assert len(found) > 10


def test_counts_and_deletes_speak_of_keys(client: ClusterClient) -> None:
    def twice(ids: Any, _: Any) -> Any:
        own = np.array([one % 4 for one in ids])
        return np.stack([own, (own + 1) % 4], axis=1)

    live = opened(client).layouts.build(spec(assign=twice, shared=True))
    assert all(len(found) == 2 for found in places(client).values())
    assert (live.count(), live.overflow(), live.layouts.status().count) == (COUNT, 0, COUNT)
    (hits,) = live.search(SearchRequest(ONE, 2 * COUNT), plan(0, 1, 2, 3))
    assert sorted(hit.id for hit in hits) == list(range(COUNT))
    live.upsert([3], ONE, cells=np.array([[1, 1]]))
    assert places(client)[3] == [CELLS[1]]
    live.delete([3])
    assert 3 not in places(client)
    assert [key for batch in live.scan(10) for key in batch.ids] == [
        row for row in range(COUNT) if row != 3
    ]


def test_a_missing_cluster_is_no_client_of_ours() -> None:
    """Shards of a record are those that the database lists now."""
    record = LayoutRecord("a1", "v1", 2, places=(0, 1))
    shards = CellShards(record, ("amips_a1_0", OVERFLOW, "x", 7))
    assert shards.asked([0, 1]) == ["amips_a1_0", OVERFLOW, 7, "x"]
    assert (shards.missing, shards.strange) == (["amips_a1_1"], [7, "x"])
    assert new_shards.no_shards(QdrantClient(":memory:")) is not None


def test_a_twin_in_a_copy_is_found_before_it_serves(client: ClusterClient) -> None:
    """What a builder had on its way when it was killed may arrive behind the next one's write."""
    collection = opened(client)
    late: list[bool] = []

    def meddling(ids: Any, vectors: Any) -> Any:
        if not late:
            late.append(True)
            payload = {"row": 5, "amips_stamp_a1": 7, "amips_cell_a1": 3}
            point = models.PointStruct(id=5, vector=[7.0] * KEYS.shape[1], payload=payload)
            client.upsert("docs__g2", [point], shard_key_selector=CELLS[3])
        return by_row(ids, vectors)

    collection.layouts.build(spec(assign=meddling))
    assert places(client)[5] == [CELLS[1]]
