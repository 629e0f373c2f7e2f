"""What a routed client and a router write where cells have shard keys, on a Qdrant server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, route
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.sharded_points import TICKS
from amips_plugins.errors import CollectionError
from integration_tests.qdrant_data import DIM, LAYOUT, EveryCell, by_sign, keys
from integration_tests.servers import QdrantAddress
from integration_tests.test_qdrant_shards import KEYS, aliased, shard_spec

ONES = [1.0] * DIM
NOBODY = models.Filter(must=[models.FieldCondition(key="row", match=models.MatchValue(value=-5))])
ROW_1 = models.Filter(must=[models.FieldCondition(key="row", match=models.MatchValue(value=1))])


def ways(client: Any, name: str, how: str, one: int, **condition: Any) -> None:
    """Write a point on a condition."""
    point = models.PointStruct(id=one, vector=ONES, payload={"new": 1})
    if how == "upsert":
        client.upsert(name, [point], **condition)
    elif how == "upload_points":
        client.upload_points(name, iter([point]), wait=True, **condition)
    elif how == "upload_collection":
        client.upload_collection(
            name, [ONES], payload=[{"new": 1}], ids=[one], wait=True, **condition
        )
    else:
        asked = models.PointsList(points=[point], **condition)
        client.batch_update_points(name, [models.UpsertOperation(upsert=asked)])


@pytest.fixture(scope="module")
def celled(qdrant_node: QdrantAddress) -> Iterator[tuple[QdrantClient, str]]:
    client = qdrant_node.client()
    alias = aliased(client)
    QdrantCollection(client, alias).layouts.build(shard_spec())
    yield client, alias
    for found in client.get_collections().collections:
        if found.name.startswith(alias.removesuffix("_live")):
            client.delete_collection(found.name)
    client.close()


@pytest.mark.parametrize("how", ["upsert", "upload_points", "upload_collection", "batch"])
@pytest.mark.parametrize(
    ("condition", "one", "written"),
    [
        ({"update_mode": models.UpdateMode.UPDATE_ONLY}, 1, True),
        ({"update_mode": models.UpdateMode.UPDATE_ONLY}, 90_000, None),
        ({"update_mode": models.UpdateMode.INSERT_ONLY}, 1, False),
        ({"update_mode": models.UpdateMode.INSERT_ONLY}, 90_000, True),
        ({"update_filter": ROW_1}, 1, True),
        ({"update_filter": NOBODY}, 1, False),
    ],
)
def test_a_write_on_a_condition_goes_by_the_point_that_is_there(
    celled: tuple[QdrantClient, str], how: str, condition: Any, one: int, written: bool | None
) -> None:
    client, alias = celled
    live = QdrantCollection(client, alias)
    first = keys(KEYS)[[1]]
    live.delete([90_000])
    live.upsert([1], first, [{"row": 1}], by_sign([1], first))
    routed = route(client, LearnedRouter(live, hook=EveryCell(), refresh=None))
    ways(routed, alias, how, one, **condition)
    found = [
        record
        for key in client.list_shard_keys(alias).shard_keys or ()
        for record in client.retrieve(alias, [one], shard_key_selector=key.key)
    ]
    assert [(record.payload or {}).get("new") for record in found] == (
        [] if written is None else [1 if written else None]
    )


def test_a_routed_write_is_the_last_whatever_the_clock_of_the_one_before(
    celled: tuple[QdrantClient, str],
) -> None:
    client, alias = celled
    live, ones = QdrantCollection(client, alias), np.ones((1, DIM), dtype=np.float32)
    live.upsert([2], ones, None, by_sign([2], ones))
    stamp = int((time.time() + 100) * TICKS)
    for key in client.list_shard_keys(alias).shard_keys or ():
        where = models.Filter(must=[models.HasIdCondition(has_id=[2])])
        payload = {f"amips_stamp_{LAYOUT}": stamp}
        client.set_payload(alias, payload, where, shard_key_selector=key.key)
    routed = route(client, LearnedRouter(live, hook=EveryCell(), refresh=None))
    routed.upsert(alias, [models.PointStruct(id=2, vector=ONES, payload={"new": 1})])
    (found,) = client.retrieve(alias, [2])
    assert (found.payload or {})["new"] == 1


def test_writes_where_strict_mode_was_set_later(celled: tuple[QdrantClient, str]) -> None:
    """Until it has the indexes that they take a write is refused; backfill makes these."""
    client, alias = celled
    strict = models.StrictModeConfig(enabled=True, unindexed_filtering_update=False)
    client.update_collection(alias, strict_mode_config=strict)
    live, ones = QdrantCollection(client, alias), np.ones((1, DIM), dtype=np.float32)
    with pytest.raises(CollectionError, match="Create an index"):
        live.upsert([3], ones)
    routed = route(client, LearnedRouter(live, hook=EveryCell(), refresh=None))
    routed.upsert(alias, [models.PointStruct(id=3, vector=ONES, payload={"new": 1})])
    live.layouts.backfill(by_sign)
    live.upsert([4], ones, None, by_sign([4], ones))
    client.update_collection(alias, strict_mode_config=models.StrictModeConfig(enabled=False))
    (found,) = client.retrieve(alias, [3])
    assert (found.payload or {})["new"] == 1
    for one in (3, 4):
        keys_of = [key.key for key in client.list_shard_keys(alias).shard_keys or ()]
        places = [key for key in keys_of if client.retrieve(alias, [one], shard_key_selector=key)]
        assert places == [f"amips_{LAYOUT}_3"]
