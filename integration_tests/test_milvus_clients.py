"""Asynchronous clients and routed clients on a real Milvus server."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from amips_plugins import AsyncLearnedRouter, LearnedRouter, MilvusCollection, route
from amips_plugins.collection import collection_key
from amips_plugins.layout import lay_out
from tests.support.bundles import COUNT, DIM, N_CELLS, open_bundle, vectors, write_bundle
from tests.support.known_filters import KnowsEveryFilter

pymilvus = pytest.importorskip("pymilvus")

TOKEN = os.environ.get("AMIPS_MILVUS_TOKEN", "")
QUERIES = vectors(seed=5, count=12)
N_PROBES = N_CELLS // 3


@dataclass
class Served:
    uri: str
    client: Any
    alias: str
    bundle: Path

    def router(self) -> LearnedRouter:
        collection = MilvusCollection(self.client, self.alias)
        return LearnedRouter(collection, bundle=self.bundle, watch=KnowsEveryFilter())


@pytest.fixture(scope="module")
def served(milvus_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A collection laid out in partitions, behind an alias."""
    client = pymilvus.MilvusClient(milvus_uri, token=TOKEN)
    name, alias = f"clients_{secrets.token_hex(4)}", f"alias_{secrets.token_hex(4)}"
    schema = client.create_schema()
    schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
    schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
    schema.add_field("title", pymilvus.DataType.VARCHAR, max_length=20)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")
    rows = [
        {"id": row, "vector": vector.tolist(), "title": f"title {row}"}
        for row, vector in enumerate(vectors())
    ]
    client.insert(name, rows)
    client.create_alias(name, alias)
    collection = MilvusCollection(client, alias)
    folder = tmp_path_factory.mktemp("clients")
    bundle = write_bundle(folder / "bundle", collection=collection_key(collection.info))
    lay_out(collection, open_bundle(bundle), work=folder / "work", alias=alias)
    yield Served(milvus_uri, client, alias, bundle)
    for left in (f"{name}__g2", name):
        for known in client.list_aliases(left)["aliases"]:
            client.drop_alias(known)
        client.drop_collection(left)
    client.close()


def plain(found: list[Any]) -> list[Any]:
    return [
        [(hit.id, pytest.approx(hit.score, abs=1e-6), dict(hit.fields)) for hit in hits]
        for hits in found
    ]


@pytest.mark.parametrize("alone", [False, True], ids=["two clients", "asynchronous client alone"])
def test_tasks_find_what_threads_find(served: Served, alone: bool) -> None:
    router = served.router()
    asked: dict[str, Any] = {"k": 5, "n_probes": N_PROBES, "fields": ["title"]}
    expected = [router.search(query, **asked) for query in QUERIES]
    assert {hits.trace.mode for hits in expected} == {"route"}

    async def main() -> tuple[list[Any], Any]:
        client = pymilvus.AsyncMilvusClient(served.uri, token=TOKEN)
        try:
            if alone:
                tasks = await AsyncLearnedRouter.open(client, served.alias, bundle=served.bundle)
            else:
                tasks = AsyncLearnedRouter(router, client)
            found = await asyncio.gather(*(tasks.search(query, **asked) for query in QUERIES))
            return list(found), await tasks.search(QUERIES, k=COUNT)
        finally:
            await client.close()

    found, whole = asyncio.run(main())
    assert [hits.trace for hits in found] == [hits.trace for hits in expected]
    assert plain(expected) == [[(h.id, h.score, dict(h.fields)) for h in hits] for hits in found]
    assert {len(hits) for hits in whole} == {COUNT}


def searched(hits: Any) -> list[Any]:
    return [
        (hit["id"], pytest.approx(hit["distance"], abs=1e-6), hit["entity"]["title"])
        for hit in hits
    ]


def test_a_routed_client_gives_the_clients_own_results(served: Served) -> None:
    router = served.router()
    routed = route(served.client, router)
    for query in QUERIES:
        asked: dict[str, Any] = {
            "collection_name": served.alias,
            "data": [query.tolist()],
            "anns_field": "vector",
            "limit": 5,
            "filter": "id < 40",
            "output_fields": ["title"],
        }
        bare, found = served.client.search(**asked), routed.search(**asked)
        assert type(found) is type(bare)
        assert type(found[0]) is type(bare[0])
        # Recall below 1 is the router's right; what it finds has the client's own scores.
        by_id = {hit[0]: hit for hit in searched(served.client.search(**{**asked, "limit": 40})[0])}
        hits = [(hit["id"], hit["distance"], hit["entity"]["title"]) for hit in found[0]]
        assert [by_id[key] for key, _, _ in hits] == hits
    counts = router.fallbacks
    assert not set(counts) - {"cells: fewer than k hits"}

    everything = route(served.client, served.router(), recall=1.0)
    bare = served.client.search(served.alias, [QUERIES[0].tolist()], limit=7)
    same = everything.search(served.alias, [QUERIES[0].tolist()], limit=7)
    assert [h["id"] for h in same[0]] == [h["id"] for h in bare[0]]


def test_a_routed_asynchronous_client(served: Served) -> None:
    router = served.router()

    async def main() -> None:
        client = pymilvus.AsyncMilvusClient(served.uri, token=TOKEN)
        try:
            routed = route(client, router)
            for query in QUERIES:
                asked = {"data": [query.tolist()], "limit": 5, "output_fields": ["title"]}
                found = await routed.search(served.alias, **asked)
                whole = await client.search(served.alias, **{**asked, "limit": COUNT})
                by_id = {hit[0]: hit for hit in searched(whole[0])}
                hits = [(h["id"], h["distance"], h["entity"]["title"]) for h in found[0]]
                assert [by_id[key] for key, _, _ in hits] == hits
                assert len(hits) == 5
        finally:
            await client.close()

    asyncio.run(main())
    assert not set(router.fallbacks) - {"cells: fewer than k hits"}
