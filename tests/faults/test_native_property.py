"""For any arguments: exactly what the database's own client gives or raises.

Whenever the model has no say (it is switched off, it is broken, every cell is named), a
search through the router is the client's own call: the same ids, scores, fields and order, or the
same error. The client is called here directly, without any of our adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymilvus import DataType, MilvusClient
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, MemoryCollection, MilvusCollection, QdrantCollection
from amips_plugins.collection import Collection, collection_key
from amips_plugins.layout import lay_out
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, Metric, native_scores
from tests.support.bundles import COUNT, DIM, N_CELLS, open_bundle, vectors, write_bundle
from tests.support.routing_data import Hook

Answers = list[list[tuple[Any, float, dict[str, Any]]]]


@dataclass
class Engine:
    """A collection, its client's own search, and arguments to try on both."""

    collection: Collection
    call: Callable[..., Answers]
    filters: st.SearchStrategy[Any]
    fields: st.SearchStrategy[list[str]]
    params: st.SearchStrategy[Mapping[str, Any] | None]


def fields_of(row: int) -> dict[str, Any]:
    return {"group": row % 3, "title": f"title {row}"}


def memory(_: Path) -> Iterator[Engine]:
    keys = vectors()
    collection = MemoryCollection(
        keys, fields=[fields_of(row) for row in range(COUNT)], name="docs"
    )

    def call(_: str, queries: FloatArray, k: int, **more: Any) -> Answers:
        answers = []
        for query in queries:
            scores = native_scores(query, keys, Metric.COSINE)
            kept = [
                row
                for row in np.argsort(-scores, kind="stable").tolist()
                if more["filter"] is None or more["filter"](row, fields_of(row))
            ]
            answers.append(
                [
                    (row, float(scores[row]), {f: fields_of(row).get(f) for f in more["fields"]})
                    for row in kept[:k]
                ]
            )
        return answers

    def fails(key: Any, fields: Mapping[str, Any]) -> bool:
        raise LookupError(f"a {type(key).__name__} has no such field among {list(fields)}")

    filters = [None, lambda key, _: key % 2 == 0, lambda _, f: f["group"] == 1, fails]
    names = st.lists(st.sampled_from(["group", "title"]), unique=True)
    yield Engine(collection, call, st.sampled_from(filters), names, st.none())


def milvus(folder: Path) -> Iterator[Engine]:
    client = MilvusClient(str(folder / "docs.db"))
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=DIM)
    schema.add_field("group", DataType.INT64)
    schema.add_field("title", DataType.VARCHAR, max_length=100)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="COSINE")
    client.create_collection("docs", schema=schema, index_params=index)
    client.insert(
        "docs",
        [
            {"id": row, "vector": vector.tolist(), **fields_of(row)}
            for row, vector in enumerate(vectors())
        ],
    )

    def call(name: str, queries: FloatArray, k: int, **more: Any) -> Answers:
        found = client.search(
            name,
            data=queries,
            anns_field="vector",
            limit=k,
            filter=more["filter"] or "",
            output_fields=more["fields"] or ["id"],
            search_params={**(more["params"] or {}), "metric_type": "COSINE"},
        )
        return [
            [
                (
                    hit["id"],
                    hit["distance"],
                    {f: hit["entity"][f] for f in more["fields"] if f in hit["entity"]},
                )
                for hit in hits
            ]
            for hits in found
        ]

    filters = [None, "", "group == 1", "group in [0, 2] and id < 20", "group ==", "nowhere == 1"]
    yield Engine(
        MilvusCollection(client, "docs"),
        call,
        st.sampled_from(filters),
        st.lists(st.sampled_from(["group", "title", "nowhere"]), unique=True),
        st.sampled_from([None, {}, {"nprobe": 4}, {"params": {"radius": 0.5}}]),
    )
    client.close()


def qdrant(_: Path) -> Iterator[Engine]:
    client = QdrantClient(":memory:")
    shape = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=shape)
    points = [
        models.PointStruct(id=row, vector=vector.tolist(), payload=fields_of(row))
        for row, vector in enumerate(vectors())
    ]
    client.upsert("docs", points)

    def call(name: str, queries: FloatArray, k: int, **more: Any) -> Answers:
        found = [
            client.query_points(
                name,
                query.tolist(),
                limit=k,
                query_filter=more["filter"],
                with_payload=more["fields"] or False,
                search_params=models.SearchParams(**more["params"]) if more["params"] else None,
            ).points
            for query in queries
        ]
        return [[(p.id, p.score, p.payload or {}) for p in points] for points in found]

    def matching(**condition: Any) -> models.Filter:
        return models.Filter(must=[models.FieldCondition(key="group", **condition)])

    filters = [
        None,
        matching(match=models.MatchValue(value=1)),
        matching(range=models.Range(gte=1)),
        models.Filter(must_not=[models.HasIdCondition(has_id=list(range(0, COUNT, 2)))]),
    ]
    yield Engine(
        QdrantCollection(client, "docs"),
        call,
        st.sampled_from(filters),
        st.lists(st.sampled_from(["group", "title", "nowhere"]), unique=True),
        st.sampled_from([None, {}]),  # local mode warns of any other, once
    )
    client.close()


@pytest.fixture(
    scope="module", params=[memory, milvus, qdrant], ids=["memory", "milvus-lite", "qdrant-local"]
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    yield from request.param(tmp_path_factory.mktemp("engine"))


def outcome(call: Callable[[], Any]) -> Any:
    """What a call returned, or the kind and the words of its error."""
    try:
        return call()
    except Exception as exc:  # noqa: BLE001 - to be compared
        return type(exc), str(exc)


def search(router: LearnedRouter, queries: FloatArray, k: int, **more: Any) -> Answers:
    found = router.search(queries, k, **more)
    return [[(hit.id, hit.score, dict(hit.fields)) for hit in hits] for hits in found]


def rounded(said: Any) -> Any:
    """Answers with comparable scores: Qdrant's local mode does not give itself the same bits."""
    if not isinstance(said, list):
        return said
    return [[(key, pytest.approx(score, abs=1e-6), f) for key, score, f in hits] for hits in said]


def broken(_: FloatArray) -> QueryPlan:
    raise RuntimeError("no model")


def routers(engine: Engine, folder: Path) -> dict[str, tuple[LearnedRouter, dict[str, Any]]]:
    """Routers whose model has no say, and what they are asked in addition."""
    key = collection_key(engine.collection.info)
    bundle = open_bundle(write_bundle(folder, collection=key))
    off = LearnedRouter(engine.collection, bundle=bundle)
    off.enabled = False
    corrupt = write_bundle(folder.with_name("corrupt"), collection=key)
    (corrupt / "model.onnx").write_bytes(b"no model")
    registry = folder.with_name("registry")
    home = registry / key.database / key.name / (key.field or "%unnamed")
    home.mkdir(parents=True)
    corrupt.rename(home / "v1")
    (home / "latest.json").write_text('{"version": "v1"}')
    refused = LearnedRouter(engine.collection, registry=registry, refresh=None)
    assert not refused.learned
    laid_out = lay_out(engine.collection, bundle, work=folder.with_name("work"))
    all_cells = LearnedRouter(laid_out, bundle=bundle)
    return {
        "disabled": (off, {}),
        "no bundle": (LearnedRouter(engine.collection, registry=folder / "none"), {}),
        "corrupt bundle": (refused, {}),
        "broken model": (LearnedRouter(engine.collection, hook=Hook(broken)), {}),
        "all cells": (all_cells, {"n_probes": N_CELLS}),
    }


@pytest.fixture(scope="module")
def silenced(
    engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[LearnedRouter, dict[str, Any]]]:
    return routers(engine, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_the_client_itself(
    engine: Engine, silenced: dict[str, tuple[LearnedRouter, dict[str, Any]]], data: st.DataObject
) -> None:
    seed, count = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 4))
    queries = vectors(seed=seed, count=count)
    k = data.draw(st.integers(1, COUNT))
    given = {
        "filter": data.draw(engine.filters),
        "fields": data.draw(engine.fields),
        "params": data.draw(engine.params),
    }
    for name, (router, more) in silenced.items():
        own = router.collection.info.name  # a Milvus layout is a collection of another name
        expected = outcome(partial(engine.call, own, queries, k, **given))
        said = outcome(partial(search, router, queries, k, **given, **more))
        assert said == rounded(expected), name
