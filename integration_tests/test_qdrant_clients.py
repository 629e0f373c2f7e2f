"""What callers of a routed Qdrant client may count on: pages, identity, and rights."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, QdrantCollection, route
from amips_plugins.errors import AmipsError
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray
from integration_tests.conftest import QDRANT_KEYS
from integration_tests.qdrant_data import (
    EveryCell,
    amips,
    create,
    error_of,
    fill,
    keys,
    queries,
    spec,
    wait_until_indexed,
)
from integration_tests.servers import QdrantAddress, QdrantServer
from tests.handmade import publish
from tests.support.known_filters import KnowsEveryFilter

COUNT = 1500


@pytest.fixture(scope="module")
def client(qdrant: QdrantAddress) -> Iterator[QdrantClient]:
    client = qdrant.client()
    yield client
    client.close()


@pytest.fixture(scope="module")
def name(client: QdrantClient) -> Iterator[str]:
    name = create(client, distance=models.Distance.COSINE)
    fill(client, name, keys(COUNT))
    yield name
    client.delete_collection(name)


@pytest.fixture(scope="module")
def registry(client: QdrantClient, name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle")
    publish(QdrantCollection(client, name), queries(600), folder, recall=0.9)
    wait_until_indexed(client, name, COUNT // 2)
    return folder / "registry"


@pytest.fixture
def router(client: QdrantClient, name: str, registry: Path) -> LearnedRouter:
    router = LearnedRouter(QdrantCollection(client, name), registry=registry, refresh=None)
    assert router.search(queries(1)[0]).trace.mode == "route"
    return router


def test_pages_by_offset_fit_together(
    client: QdrantClient, name: str, router: LearnedRouter
) -> None:
    routed, missed, asked = route(client, router), 0, queries(100, seed=7)
    for query in asked:
        pages = [
            point.id
            for offset in (0, 10, 20)
            for point in routed.query_points(name, query.tolist(), limit=10, offset=offset).points
        ]
        assert len(set(pages)) == len(pages) == 30
        best = {point.id for point in client.query_points(name, query.tolist(), limit=30).points}
        missed += len(best - set(pages))
    assert missed / (30 * len(asked)) < 0.15


@pytest.mark.usefixtures("registry")
def test_every_call_answers_as_the_bare_client_where_all_cells_are_searched(
    client: QdrantClient, name: str
) -> None:
    """Whatever narrows a search narrows a routed one."""
    collection = QdrantCollection(client, name)
    layout = collection.layout()
    assert layout is not None

    class All(EveryCell):
        def plan(self, asked: FloatArray, target: Target) -> QueryPlan:
            return QueryPlan(cells=np.tile(np.arange(8), (len(asked), 1)), layout=layout)

    knowing = KnowsEveryFilter()
    routed = route(client, LearnedRouter(collection, hook=All(), refresh=None, watch=knowing))
    few = models.Filter(must=[models.FieldCondition(key="row", range=models.Range(lt=300))])
    options: list[dict[str, Any]] = [
        {},
        {"limit": 3},
        {"offset": 4},
        {"query_filter": few},
        {"score_threshold": 0.8},
        {"with_payload": ["row"]},
        {"with_vectors": True},
        {"query_filter": few, "score_threshold": 0.5, "limit": 20, "with_payload": False},
        {"search_params": models.SearchParams(exact=True)},
        {"search_params": models.SearchParams(indexed_only=True)},
        {"timeout": 30},
        {"prefetch": [models.Prefetch(query=queries(1)[0].tolist(), limit=5)]},
    ]
    for more in options:
        for query in queries(3, seed=5):
            bare = client.query_points(name, query.tolist(), **more)
            found = routed.query_points(name, query.tolist(), **more)
            assert [one.id for one in found.points] == [one.id for one in bare.points], more
            for one, other in zip(found.points, bare.points, strict=True):
                ours = {k: v for k, v in (other.payload or {}).items() if k[:6] != "amips_"}
                assert (one.payload or {}) == ours, more
                assert one.score == pytest.approx(other.score, abs=1e-5), more


def jwt(**claims: Any) -> str:
    """A token of the server with keys, as its operator makes them."""

    def encoded(value: Any) -> str:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

    signed = f"{encoded({'alg': 'HS256', 'typ': 'JWT'})}.{encoded(claims)}"
    secret = QDRANT_KEYS["service__api_key"].encode()
    return f"{signed}.{encoded(hmac.new(secret, signed.encode(), hashlib.sha256).digest())}"


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection:UserWarning")
class TestReadOnly:
    @pytest.fixture(scope="class")
    @classmethod
    def owner(cls, qdrant_with_keys: QdrantServer) -> Iterator[QdrantClient]:
        client = qdrant_with_keys.address.client()
        yield client
        client.close()

    @pytest.fixture(scope="class")
    @classmethod
    def laid_out(cls, owner: QdrantClient) -> str:
        name = create(owner)
        fill(owner, name, keys(COUNT))
        QdrantCollection(owner, name).layouts.build(spec())
        wait_until_indexed(owner, name, COUNT // 2)
        return name

    @pytest.fixture(params=["key", "token", "token of the collection"])
    def token(self, request: pytest.FixtureRequest, laid_out: str) -> str:
        if request.param == "key":
            return QDRANT_KEYS["service__read_only_api_key"]
        if request.param == "token":
            return jwt(access="r")
        return jwt(access=[{"collection": laid_out, "access": "r"}])

    @pytest.mark.parametrize("grpc", [False, True], ids=["rest", "grpc"])
    def test_a_reader_is_routed(
        self, qdrant_with_keys: QdrantServer, laid_out: str, token: str, grpc: bool
    ) -> None:
        reader = qdrant_with_keys.address.client(api_key=token, prefer_grpc=grpc)
        router = LearnedRouter(QdrantCollection(reader, laid_out), hook=EveryCell(), refresh=None)
        found = router.search(queries(1)[0], k=5)
        assert (found.trace.mode, len(found)) == ("route", 5)
        assert router.refresh() in (True, False)
        assert route(reader, router).query_points(laid_out, queries(1)[0].tolist()).points
        reader.close()

    def test_a_reader_lays_nothing_out(
        self, qdrant_with_keys: QdrantServer, owner: QdrantClient, laid_out: str, token: str
    ) -> None:
        before = owner.get_collection(laid_out).config.metadata
        reader = qdrant_with_keys.address.client(api_key=token)
        collection = QdrantCollection(reader, laid_out)
        for attempt in (
            lambda: collection.layouts.roll_back(),
            lambda: collection.upsert([1], keys(1)),
        ):
            assert error_of(attempt) is not None
        assert owner.get_collection(laid_out).config.metadata == before

    def test_a_dry_run_fails_where_the_layout_would(
        self,
        qdrant_with_keys: QdrantServer,
        owner: QdrantClient,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        name = create(owner)
        fill(owner, name, keys(COUNT))
        publish(QdrantCollection(owner, name), queries(300), tmp_path)
        QdrantCollection(owner, name).layouts.roll_back().layouts.drop_old()
        monkeypatch.setenv("AMIPS_QDRANT_API_KEY", QDRANT_KEYS["service__read_only_api_key"])
        registry = ("--registry", tmp_path / "registry")
        code, said = amips("layout", qdrant_with_keys.address.uri(name), *registry, "--dry-run")
        owner.delete_collection(name)
        assert code != 0, said
        assert "Unexpected" not in said

    def test_an_expired_token_says_so(self, qdrant_with_keys: QdrantServer, laid_out: str) -> None:
        token = jwt(access="r", exp=int(time.time()) - 3600)
        address = qdrant_with_keys.address
        with pytest.raises(AmipsError, match=r"(?i)expired") as caught:
            QdrantCollection.connect(address.url, laid_out, token=token)
        assert token not in str(caught.value)

    def test_a_wrong_key_is_in_no_message(
        self, qdrant_with_keys: QdrantServer, laid_out: str
    ) -> None:
        with pytest.raises(AmipsError) as caught:
            QdrantCollection.connect(qdrant_with_keys.address.url, laid_out, token="not the key")
        assert "not the key" not in str(caught.value)
