"""A copy, a restore or a moved alias in the middle of a layout or of serving.

Each ends in cells that are right, or in one sentence that says what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, QdrantCollection
from amips_plugins.errors import AmipsError
from integration_tests.qdrant_data import (
    DIM,
    LAYOUT,
    EveryCell,
    by_sign,
    check,
    create,
    error_of,
    fill,
    keys,
    queries,
    spec,
    until,
    wait_until_indexed,
)
from integration_tests.servers import QdrantAddress

COUNT = 1500


@pytest.fixture
def client(qdrant: QdrantAddress) -> Iterator[QdrantClient]:
    client = qdrant.client()
    here = {one.name for one in client.get_collections().collections}
    yield client
    for alias in client.get_aliases().aliases:
        operation = models.DeleteAlias(alias_name=alias.alias_name)
        if alias.collection_name not in here:
            client.update_collection_aliases([models.DeleteAliasOperation(delete_alias=operation)])
    for found in client.get_collections().collections:
        if found.name not in here:
            client.delete_collection(found.name)
    client.close()


@pytest.fixture
def name(client: QdrantClient) -> str:
    name = create(client)
    fill(client, name, keys(COUNT))
    return name


def half_built(client: QdrantClient, name: str) -> None:
    """A build that its process did not survive, with the first thousand placed."""

    def interrupted(ids: Any, vectors: Any) -> Any:
        if 1200 in ids:
            raise KeyboardInterrupt
        return by_sign(ids, vectors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amips_plugins.adapters.qdrant.store._WRITE_BATCH", 500)
        with pytest.raises(KeyboardInterrupt):
            QdrantCollection(client, name).layouts.build(spec(interrupted))


def restored(client: QdrantClient, qdrant: QdrantAddress, name: str) -> str:
    """A snapshot of the collection, metadata and all, under another name."""
    made = client.create_snapshot(name, wait=True)
    assert made is not None
    copy = f"{name}_restored"
    headers = {"api-key": qdrant.token} if qdrant.token else {}
    done = client.recover_snapshot(
        copy,
        location=f"{qdrant.url}/collections/{name}/snapshots/{made.name}",
        api_key=headers.get("api-key"),
        priority=models.SnapshotPriority.SNAPSHOT,
        wait=True,
    )
    assert done
    return copy


def payload_only(client: QdrantClient, name: str) -> str:
    """What a copying tool makes: vectors and payload, and none of the metadata."""
    copy = create(client)
    offset: Any = None
    while True:
        records, offset = client.scroll(name, limit=500, offset=offset, with_vectors=True)
        points: list[Any] = [
            models.PointStruct(id=one.id, vector=one.vector, payload=one.payload)  # type: ignore[arg-type]
            for one in records
        ]
        client.upsert(copy, points, wait=True)
        if offset is None:
            break
    wait_until_indexed(client, copy, COUNT // 2)
    return copy


def ends_well(client: QdrantClient, name: str) -> None:
    """Every cell is right in the end, or a sentence says what to do."""
    found = QdrantCollection(client, name)
    if found.layout() is None:
        said = error_of(lambda: found.layouts.build(spec()))
        if said is not None:
            assert isinstance(said, AmipsError), repr(said)
            assert found.current().layout() is None
            router = LearnedRouter(found, hook=EveryCell(), refresh=None)
            assert router.search(queries(1)[0], k=5).trace.mode == "native"
            return
        found = QdrantCollection(client, name)
    found.layouts.backfill(by_sign, verify=True)
    check(client, name, dict(enumerate(keys(COUNT))))


@pytest.mark.parametrize("when", ["half built", "laid out"])
@pytest.mark.parametrize("how", ["with its metadata", "payload only"])
def test_a_copy(
    client: QdrantClient, qdrant: QdrantAddress, name: str, when: str, how: str
) -> None:
    if when == "laid out":
        QdrantCollection(client, name).layouts.build(spec())
    else:
        half_built(client, name)
    copy = (
        restored(client, qdrant, name) if how == "with its metadata" else payload_only(client, name)
    )
    ends_well(client, copy)
    ends_well(client, name)


def test_a_restore_in_the_middle_of_serving(
    client: QdrantClient, qdrant: QdrantAddress, name: str
) -> None:
    """To a snapshot from before the layout: the router does not search cells that are gone."""
    made = client.create_snapshot(name, wait=True)
    assert made is not None
    QdrantCollection(client, name).layouts.build(spec())
    router = LearnedRouter(QdrantCollection(client, name), hook=EveryCell(), refresh=None)
    assert router.search(queries(1)[0]).trace.mode == "route"
    client.recover_snapshot(
        name,
        location=f"{qdrant.url}/collections/{name}/snapshots/{made.name}",
        api_key=qdrant.token,
        priority=models.SnapshotPriority.SNAPSHOT,
        wait=True,
    )
    for query in queries(5):
        bare = [one.id for one in client.query_points(name, query.tolist(), limit=5).points]
        assert [hit.id for hit in router.search(query, k=5)] == bare  # all of them are overflow
    router.refresh()
    for query in queries(5):
        bare = [one.id for one in client.query_points(name, query.tolist(), limit=5).points]
        assert [hit.id for hit in router.search(query, k=5)] == bare
    ends_well(client, name)


def test_an_alias_that_moves_under_a_router(client: QdrantClient, name: str) -> None:
    QdrantCollection(client, name).layouts.build(spec())
    other = create(client)
    fill(client, other, keys(COUNT, seed=4))
    alias = f"{name}_live"

    def point_to(target: str) -> None:
        create_alias = models.CreateAlias(collection_name=target, alias_name=alias)
        client.update_collection_aliases([models.CreateAliasOperation(create_alias=create_alias)])

    point_to(name)
    router = LearnedRouter(QdrantCollection(client, alias), hook=EveryCell(), refresh=None)
    assert router.search(queries(1)[0]).trace.mode == "route"
    point_to(other)
    for query in queries(5):
        bare = [one.id for one in client.query_points(alias, query.tolist(), limit=5).points]
        assert [hit.id for hit in router.search(query, k=5)] == bare
    router.refresh()
    assert router.search(queries(1)[0]).trace.mode == "native"
    QdrantCollection(client, other).layouts.build(spec())
    router.refresh()
    until(lambda: router.search(np.ones(DIM)).trace.mode == "route", patience=30)


def test_an_alias_that_moves_in_the_middle_of_a_layout(client: QdrantClient, name: str) -> None:
    other, alias = create(client), f"{name}_live"
    fill(client, other, keys(COUNT))
    moved: list[bool] = []

    def moving(ids: Any, vectors: Any) -> Any:
        if not moved:
            moved.append(True)
            create_alias = models.CreateAlias(collection_name=other, alias_name=alias)
            client.update_collection_aliases(
                [models.CreateAliasOperation(create_alias=create_alias)]
            )
        return by_sign(ids, vectors)

    create_alias = models.CreateAlias(collection_name=name, alias_name=alias)
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=create_alias)])
    said = error_of(lambda: QdrantCollection(client, alias).layouts.build(spec(moving)))
    assert said is None or isinstance(said, AmipsError), repr(said)
    for one in (name, other):
        ends_well(client, one)
        assert QdrantCollection(client, one).layout() == LAYOUT
