"""A routed client where cells have shard keys: what it reads and writes names them by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import models

from amips_plugins import LearnedRouter, route
from amips_plugins.adapters.qdrant import copied_layouts, new_generation
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray
from tests.support.qdrant_cluster import ClusterClient
from tests.support.qdrant_data import DIM, KEYS, by_row, dense

pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning"),
]

COUNT = len(KEYS)
OVERFLOW = "amips_a1_overflow"


class SecondCell:
    """Routes every query to cell 1."""

    def plan(self, asked: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(cells=np.ones((len(asked), 1), dtype=np.int64), layout="a1")


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterClient]:
    monkeypatch.setattr(copied_layouts, "GRACE", 0.0)
    monkeypatch.setattr(new_generation, "_LOOK", 0.0)
    opened = ClusterClient()
    opened.create_collection("docs", dense())
    points = [
        models.PointStruct(id=row, vector=key.tolist(), payload={"row": row})
        for row, key in enumerate(KEYS)
    ]
    opened.upsert("docs", points)
    made = models.CreateAlias(collection_name="docs", alias_name="live")
    opened.update_collection_aliases([models.CreateAliasOperation(create_alias=made)])
    collection = QdrantCollection(opened, "live")
    collection._local = False
    collection.layouts.build(LayoutSpec("a1", 4, by_row, "v1", storage="shards"))
    yield opened
    opened.close()


@pytest.fixture
def routed(client: ClusterClient) -> Any:
    collection = QdrantCollection(client, "live")
    collection._local = False
    return route(client, LearnedRouter(collection, hook=SecondCell(), refresh=None))


def where(client: ClusterClient, one: Any) -> list[Any]:
    """The shard keys that hold an id."""
    return [
        key
        for key, child in client.shards["docs__g2"].items()
        if client.local.retrieve(child, [one])
    ]


def test_a_query_asks_the_shards_of_its_cells(client: ClusterClient, routed: Any) -> None:
    client.asked.clear()
    found = routed.query_points("live", [1.0] * DIM, limit=COUNT)
    assert ["amips_a1_1", OVERFLOW] in client.asked
    assert {point.id % 4 for point in found.points} >= {1}
    assert not any(key.startswith("amips_") for p in found.points for key in p.payload or {})


def test_who_names_a_shard_key_asks_it(routed: Any) -> None:
    found = routed.query_points("live", [1.0] * DIM, limit=COUNT, shard_key_selector="amips_a1_2")
    assert {point.id for point in found.points} == set(range(2, COUNT, 4))


@pytest.mark.parametrize("form", ["points", "batch", "operation"])
def test_what_is_written_is_overflow_and_nowhere_else(
    client: ClusterClient, routed: Any, form: str
) -> None:
    point = models.PointStruct(id=6, vector=[9.0] * DIM, payload={"row": "new"})
    if form == "points":
        routed.upsert("live", [point])
    elif form == "batch":
        batch = models.Batch(ids=[6], vectors=[[9.0] * DIM], payloads=[{"row": "new"}])
        routed.upsert("live", batch)
    else:
        inner = models.PointsList(points=[point])
        routed.batch_update_points("live", [models.UpsertOperation(upsert=inner)])
    assert where(client, 6) == [OVERFLOW]
    (found,) = client.retrieve("live", [6])
    assert (found.payload or {})["row"] == "new"
    assert routed.query_points("live", [1.0] * DIM, limit=1).points[0].id == 6
    collection = QdrantCollection(client, "live")
    collection._local = False
    assert (collection.count(), collection.overflow()) == (COUNT, 1)
    assert collection.layouts.backfill(by_row) == 1
    assert where(client, 6) == ["amips_a1_2"]


def test_points_are_deleted_wherever_they_are(client: ClusterClient, routed: Any) -> None:
    routed.delete("live", [1, 2, 4711])
    routed.batch_update_points(
        "live", [models.DeleteOperation(delete=models.PointIdsList(points=[3]))]
    )
    assert [where(client, one) for one in (1, 2, 3)] == [[], [], []]
    assert client.count("live").count == COUNT - 3


def test_payload_is_changed_where_the_point_is(client: ClusterClient, routed: Any) -> None:
    routed.set_payload("live", {"row": "other"}, [5])
    (found,) = client.retrieve("live", [5])
    assert (found.payload or {})["row"] == "other"
    assert where(client, 5) == ["amips_a1_1"]


@pytest.mark.parametrize("form", ["method", "operation"])
def test_a_point_with_another_vector_is_in_no_cell(
    client: ClusterClient, routed: Any, form: str
) -> None:
    changed = [models.PointVectors(id=6, vector=[9.0] * DIM)]
    if form == "method":
        routed.update_vectors("live", changed)
    else:
        inner = models.UpdateVectors(points=changed)
        routed.batch_update_points("live", [models.UpdateVectorsOperation(update_vectors=inner)])
    assert where(client, 6) == [OVERFLOW]
    assert routed.query_points("live", [1.0] * DIM, limit=1).points[0].id == 6


def test_what_fails_before_a_write_leaves_the_callers_own_call_as_it_was(
    client: ClusterClient, routed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def fails(*_: Any) -> None:
        raise ConnectionError("the server is away")

    def note(**kwargs: Any) -> None:
        given.update(kwargs)

    monkeypatch.setattr(QdrantCollection, "displace", fails)
    monkeypatch.setattr(client, "upsert", note)
    point = models.PointStruct(id=6, vector=[9.0] * DIM)
    mode = models.UpdateMode.UPDATE_ONLY
    routed.upsert(collection_name="live", points=[point], update_mode=mode)
    assert given == {"collection_name": "live", "points": [point], "update_mode": mode}
