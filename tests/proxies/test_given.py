"""Routed clients over given partitions answer as bare ones do, and write what they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, route
from amips_plugins.collection import Collection
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray
from tests.support import given_data, given_engines
from tests.support.known_filters import KnowsEveryFilter

PARTS = tuple(sorted({str(one) for one in given_data.values() if one is not None}))
FRESH = given_data.queries(12, seed=9)

Rows = list[tuple[Any, float, Any]]


class Chosen:
    """Chooses the same parts for every query."""

    def __init__(self, layout: str | None, cells: list[int]) -> None:
        self.layout, self.cells = layout, cells

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(cells=np.tile(self.cells, (len(queries), 1)), layout=self.layout)


@dataclass
class Client:
    """A database's client, and its own forms of a search, a filter and a write."""

    bare: Any
    seen: Collection
    search: Callable[[Any, FloatArray, str | None], list[Rows]]
    write: Callable[[Any, int, FloatArray, str], Any]
    read: Callable[[Any, int], Any]

    def routed(self, cells: list[int]) -> Any:
        hook = Chosen(self.seen.layout(), cells)
        return route(
            self.bare, LearnedRouter(self.seen, hook=hook, refresh=None, watch=KnowsEveryFilter())
        )


def milvus(folder: Path) -> Iterator[Client]:
    pytest.importorskip("milvus_lite")

    def search(client: Any, queries: FloatArray, part: str | None) -> list[Rows]:
        found = client.search(
            "docs",
            data=list(queries),
            anns_field="vector",
            limit=7,
            filter="" if part is None else f'part == "{part}"',
            output_fields=["part"],
        )
        return [[(hit["id"], hit["distance"], hit["entity"]) for hit in hits] for hits in found]

    def write(client: Any, key: int, vector: FloatArray, part: str) -> Any:
        return client.upsert("docs", [{"id": key, "vector": vector, "part": part, "weight": 1.0}])

    def read(client: Any, key: int) -> Any:
        return [dict(one) for one in client.get("docs", [key], output_fields=["part", "weight"])]

    with given_engines.on_milvus(folder, given_data.values()) as store:
        collection: Any = store.collection
        bare = collection.table().client
        yield Client(bare, collection.partitioned(Partitions("part", PARTS)), search, write, read)


def qdrant(folder: Path) -> Iterator[Client]:
    from qdrant_client import models

    def only(part: str | None) -> Any:
        if part is None:
            return None
        named = models.FieldCondition(key="part", match=models.MatchValue(value=part))
        return models.Filter(must=[named])

    def search(client: Any, queries: FloatArray, part: str | None) -> list[Rows]:
        if len(queries) == 1:
            answers = [
                client.query_points(
                    "docs", queries[0].tolist(), query_filter=only(part), limit=7, with_payload=True
                )
            ]
        else:
            answers = client.query_batch_points(
                "docs",
                [
                    models.QueryRequest(
                        query=one.tolist(), filter=only(part), limit=7, with_payload=True
                    )
                    for one in queries
                ],
            )
        return [[(one.id, one.score, one.payload) for one in found.points] for found in answers]

    def write(client: Any, key: int, vector: FloatArray, part: str) -> Any:
        point = models.PointStruct(id=key, vector=vector.tolist(), payload={"part": part})
        return client.upsert("docs", [point])

    def read(client: Any, key: int) -> Any:
        return client.retrieve("docs", [key])

    with given_engines.on_qdrant(folder, given_data.values()) as store:
        collection: Any = store.collection
        seen = collection.partitioned(Partitions("part", PARTS))
        yield Client(collection.client, seen, search, write, read)


@pytest.fixture(params=[milvus, qdrant], ids=["milvus-lite", "qdrant-local"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    yield from request.param(tmp_path)


@pytest.mark.slow
def test_all_parts_are_what_the_bare_client_searches(client: Client) -> None:
    routed = client.routed(list(range(len(PARTS))))
    modes: list[Any] = []
    routed.amips_router.observe(lambda one: modes.append(one.modes))
    for part in (None, "part 4"):
        for queries in (*FRESH[:, None], FRESH):  # a batch is the client's own
            ours = client.search(routed, queries, part)
            bare = client.search(client.bare, queries, part)
            for one, other in zip(ours, bare, strict=True):
                assert [(key, fields) for key, _, fields in one] == [
                    (key, fields) for key, _, fields in other
                ]
                assert [s for _, s, _ in one] == pytest.approx([s for _, s, _ in other], abs=1e-5)
    assert routed.amips_router.fallbacks == {}
    assert modes == [{"route": 1}] * 2 * len(FRESH)


@pytest.mark.slow
def test_one_part_is_all_that_is_searched_beside_keys_of_none(client: Client) -> None:
    routed = client.routed([PARTS.index("part 4")])
    for query in FRESH[:, None]:
        (hits,) = client.search(routed, query, None)
        assert {(fields or {}).get("part") for _, _, fields in hits} <= {"part 4", None}
    (bare,) = client.search(client.bare, FRESH[:1], "part 4")
    (ours,) = client.search(routed, FRESH[:1], "part 4")
    assert [key for key, _, _ in ours] == [key for key, _, _ in bare]


@pytest.mark.slow
def test_what_is_written_through_it_is_the_callers_own(client: Client) -> None:
    routed = client.routed([0])
    client.write(routed, 7_000, FRESH[0], "of tomorrow")
    client.write(client.bare, 7_001, FRESH[1], "of tomorrow")
    for key in (7_000, 7_001):
        assert str(client.read(routed, key)) == str(client.read(client.bare, key))
        assert "amips" not in str(client.read(client.bare, key))
        (hits,) = client.search(routed, FRESH[key - 7_000][None], None)
        assert hits[0][0] == key  # a value that came later is always searched
