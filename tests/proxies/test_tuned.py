"""Routed clients set the parameters that a tuned bundle names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, route
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.models.tuned import EffortParameter, TunedHook
from tests.support.milvus_collection import make, vectors
from tests.support.qdrant_data import fill
from tests.support.tuned import optimistic


def hook(name: str, *, rescored: bool = False) -> TunedHook:
    made = optimistic((16, 32))
    return TunedHook(EffortParameter(name, rescored), made, 0.9)  # type: ignore[arg-type]


def test_milvus_gets_the_parameter_beside_the_callers_other_ones(tmp_path: Path) -> None:
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")

    class Noting(pymilvus.MilvusClient):  # type: ignore[name-defined,misc]
        calls: list[Any]

        def search(self, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(kwargs.get("search_params"))
            return super().search(*args, **kwargs)

    client = Noting(str(tmp_path / "docs.db"))
    client.calls = []
    try:
        make(client)
        router = LearnedRouter(MilvusCollection(client, "docs"), hook=hook("ef"), refresh=None)
        routed, query = route(client, router, recall=0.9), [vectors()[0].tolist()]
        (hits,) = routed.search("docs", query, limit=3)
        assert client.calls == [{"params": {"ef": 16}}]
        assert len(hits) == 3
        params = {"metric_type": "IP", "ef": 4}
        routed.search("docs", query, limit=3, search_params={**params, "offset": 2})
        assert client.calls[-1] == {"metric_type": "IP", "offset": 2, "params": {"ef": 16}}
        for page in ({"search_params": {"offset": 20}}, {"offset": 20}):
            routed.search("docs", query, limit=3, **page)
            assert client.calls[-1]["params"] == {"ef": 23}  # a server refuses a shorter list
        plain = route(client, router)  # no target asked for: the caller's own parameter stands
        inner = {"metric_type": "IP", "params": {"ef": 5}}
        for own in (params, inner):
            plain.search("docs", query, limit=3, search_params=own)
            assert client.calls[-1] == own
    finally:
        client.close()


class Noted(QdrantClient):
    """Notes how it is asked; what local mode warns of is left out of the search itself."""

    calls: list[Any]

    def query_points(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(kwargs.get("search_params"))
        return super().query_points(*args, **{**kwargs, "search_params": None})


@pytest.fixture
def qdrant() -> Noted:
    client = Noted(":memory:")
    client.calls = []
    fill(client)
    return client


def test_qdrant_gets_the_parameters_and_keeps_what_else_is_asked(qdrant: Noted) -> None:
    collection = QdrantCollection(qdrant, "docs")
    _ = collection.info
    collection._local = False  # as if it were a server, whose answers are the same
    router = LearnedRouter(collection, hook=hook("hnsw_ef", rescored=True), refresh=None)
    routed = route(qdrant, router, recall=0.9)
    found = routed.query_points("docs", query=[1.0, 0.0, 0.0, 0.0], limit=4)
    assert len(found.points) == 4
    (params,) = qdrant.calls
    assert params.hnsw_ef == 16
    assert params.quantization == models.QuantizationSearchParams(rescore=True, oversampling=4.0)
    edge = (found.points[0].score + found.points[1].score) / 2
    above = routed.query_points("docs", query=[1.0, 0.0, 0.0, 0.0], limit=4, score_threshold=edge)
    assert len(above.points) == 1
    assert len(qdrant.calls) == 2  # what the threshold leaves out is not asked for again


def test_local_mode_gets_none_which_it_would_warn_of(qdrant: Noted) -> None:
    router = LearnedRouter(QdrantCollection(qdrant, "docs"), hook=hook("hnsw_ef"), refresh=None)
    assert len(router.search(vectors()[0], 3)) == 3
    route(qdrant, router).query_points("docs", query=[1.0, 0.0, 0.0, 0.0], limit=4)
    assert qdrant.calls[-1] is None
