"""What happens to an embedded database under a router: parts lost, another shape, a full disk.

``integration_tests/test_milvus_faults.py`` has the same of a server; strict mode stands in
``tests/adapters/qdrant/test_strict_mode.py``.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymilvus import DataType, MilvusClient, MilvusException
from qdrant_client import QdrantClient, models

from amips_plugins import LearnedRouter, MilvusCollection, QdrantCollection
from amips_plugins.collection import Collection, collection_key
from amips_plugins.layout import lay_out
from amips_plugins.vectors import FloatArray
from tests.support.bundles import DIM, open_bundle, vectors, write_bundle
from tests.support.routing_data import QUERIES

WIDER = DIM + 1
ROOT = Path(__file__).parents[2]


@dataclass
class Database:
    """A collection behind its bare client.

    Attributes
    ----------
    collection
        Laid out in the cells of the bundle in ``folder``.
    bare
        The client's own search for one query: ids, best first.
    recreate
        Drops the collection and makes another one of the name, with wider vectors.
    """

    client: Any
    collection: Collection
    folder: Path
    bare: Callable[[FloatArray], list[Any]]
    recreate: Callable[[], None]

    def router(self) -> LearnedRouter:
        return LearnedRouter(self.collection, bundle=self.folder, refresh=None)


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package warns of; the clients say things of their own."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("amips_plugins") and record.levelno >= logging.WARNING
    ]


def made(collection: Collection, home: Path) -> tuple[Collection, Path]:
    folder = write_bundle(home / "bundle", collection=collection_key(collection.info))
    return lay_out(collection, open_bundle(folder), work=home), folder


def milvus(home: Path) -> Iterator[Database]:
    client = MilvusClient(str(home / "docs.db"))

    def create(name: str, keys: FloatArray) -> None:
        schema = client.create_schema()
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=keys.shape[1])
        index = client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="COSINE")
        client.create_collection(name, schema=schema, index_params=index)
        client.insert(name, [{"id": row, "vector": key} for row, key in enumerate(keys)])

    create("docs", vectors())
    client.create_alias("docs", "live")
    live, folder = made(MilvusCollection(client, "live"), home)
    name = live.info.name

    def bare(query: FloatArray) -> list[Any]:
        found = client.search(
            name, data=[query], anns_field="vector", limit=5, output_fields=["id"]
        )
        return [hit["id"] for hit in found[0]]

    def recreate() -> None:
        client.drop_alias("live")
        client.drop_collection(name)
        create(name, wide())
        client.create_alias(name, "live")

    yield Database(client, live, folder, bare, recreate)
    client.close()


def qdrant(home: Path) -> Iterator[Database]:
    client = QdrantClient(":memory:")

    def create(keys: FloatArray) -> None:
        shape = models.VectorParams(size=keys.shape[1], distance=models.Distance.COSINE)
        client.create_collection("docs", vectors_config=shape)
        points = [models.PointStruct(id=row, vector=key.tolist()) for row, key in enumerate(keys)]
        client.upsert("docs", points)

    create(vectors())
    live, folder = made(QdrantCollection(client, "docs"), home)

    def bare(query: FloatArray) -> list[Any]:
        found = client.query_points("docs", query.tolist(), limit=5)
        return [point.id for point in found.points]

    def recreate() -> None:
        client.delete_collection("docs")
        create(wide())

    yield Database(client, live, folder, bare, recreate)
    client.close()


def wide() -> FloatArray:
    return np.random.default_rng(3).standard_normal((60, WIDER)).astype(np.float32)


@pytest.fixture(params=[milvus, qdrant], ids=["milvus-lite", "qdrant-local"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    yield from request.param(tmp_path)


@pytest.mark.slow
def test_a_collection_made_again_with_another_dimension(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    router = database.router()
    assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"
    database.recreate()
    with pytest.raises(Exception) as bare:  # noqa: PT011 - compared with the router's
        database.bare(QUERIES[0])
    with pytest.raises(type(bare.value)) as raised:
        router.search(QUERIES[0], k=5)
    assert str(raised.value) == str(bare.value)
    assert router.refresh()
    assert router.collection.info.dim == WIDER
    for query in wide()[:3]:
        hits = router.search(query, k=5)
        assert (hits.trace.mode, hits.trace.fallback) == ("native", "bundle: BundleMismatch")
        assert [hit.id for hit in hits] == database.bare(query)
    assert len(ours(caplog)) == 1


@pytest.mark.parametrize("database", [milvus], indirect=True)
@pytest.mark.slow
def test_a_partition_dropped_on_milvus_lite(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Milvus Lite takes a partition that is gone for an empty one: the adapter must not."""
    router, client = database.router(), database.client
    name = database.collection.info.name
    cells = [part for part in client.list_partitions(name) if part.startswith("cell_")]
    for part in cells:
        client.drop_partition(name, part)
    for query in QUERIES:
        hits = router.search(query, k=5, n_probes=2)
        assert hits.trace.mode == "native"
        assert [hit.id for hit in hits] == database.bare(query)
    assert router.fallbacks == {"search: CollectionError": 5, "breaker: search": 1}
    first, rest, breaker = ours(caplog)
    assert "no partition" in first
    assert "Circuit breaker open" in rest
    assert "breaker: search" in breaker


@pytest.mark.parametrize("database", [qdrant], indirect=True)
def test_cells_that_another_client_wiped_on_qdrant(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Points without a cell are overflow: searched by every query, and told of by the next look."""
    router = database.router()
    everything = list(range(len(vectors())))
    database.client.clear_payload("docs", points_selector=everything)
    for query in QUERIES:
        hits = router.search(query, k=5, n_probes=1)
        assert (hits.trace.mode, hits.trace.fallback) == ("route", None)
        assert [hit.id for hit in hits] == database.bare(query)
    assert not router.refresh()
    assert router.last_overflow_share == 1.0
    backfill, gate = ours(caplog)
    assert "amips backfill" in backfill
    assert "is native; keys without a cell" in gate  # a routed search would look at every key


@pytest.mark.parametrize("database", [qdrant], indirect=True)
@pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning")
def test_an_index_of_cells_that_is_gone_on_qdrant(database: Database) -> None:
    """Slower on a server, and refused in strict mode (then natively); the answer is the same."""
    router = database.router()
    before = [[hit.id for hit in router.search(query, k=5, n_probes=2)] for query in QUERIES]
    layout = database.collection.layout()
    database.client.delete_payload_index("docs", f"amips_cell_{layout}")
    after = [[hit.id for hit in router.search(query, k=5, n_probes=2)] for query in QUERIES]
    assert after == before
    assert not router.fallbacks


# A full disk: the system lets the process write to no file any more.

PROGRAM = """
import json, resource, signal, sys, warnings
from pathlib import Path

from amips_plugins.observe.query_log import QueryLog
from tests.support.bundles import vectors
from tests.faults.test_database_faults import ON_DISK
from tests.support.routing_data import QUERIES

warnings.simplefilter("ignore")  # of local mode, about indexes
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
home, found = Path(sys.argv[2]), []
for database in ON_DISK[sys.argv[1]](home):
    log = QueryLog(home / "log", flush_every=0.01)
    router = database.router()
    router.observe(log)

    def step(when, name, call):
        try:
            answer = call()
        except Exception as exc:
            answer = f"{type(exc).__module__}.{type(exc).__name__}"
        found.append((when, name, answer))

    def routed():
        hits = router.search(QUERIES[0], k=5, n_probes=2)
        return hits.trace.mode, len(hits)

    moved = vectors(seed=9, count=1)
    for when, limit in (("full", 0), ("free", resource.RLIM_INFINITY)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        step(when, "search", routed)
        step(when, "refresh", router.refresh)
        step(when, "write", lambda: router.upsert([3], moved))
        step(when, "count", database.collection.count)
        step(when, "log", log.flush)
        step(when, "search again", routed)
    step("free", "best", lambda: database.bare(moved[0])[0])
print(json.dumps(found))
"""


def qdrant_on_disk(home: Path) -> Iterator[Database]:
    client = QdrantClient(path=str(home / "qdrant"))
    shape = models.VectorParams(size=DIM, distance=models.Distance.COSINE)
    client.create_collection("docs", vectors_config=shape)
    points = [models.PointStruct(id=row, vector=key.tolist()) for row, key in enumerate(vectors())]
    client.upsert("docs", points)
    live, folder = made(QdrantCollection(client, "docs"), home)

    def bare(query: FloatArray) -> list[Any]:
        found = client.query_points("docs", query.tolist(), limit=5)
        return [point.id for point in found.points]

    yield Database(client, live, folder, bare, lambda: None)
    client.close()


ON_DISK = {"milvus-lite": milvus, "qdrant-local": qdrant_on_disk}
OWN = {
    "milvus-lite": f"{MilvusException.__module__}.MilvusException",
    "qdrant-local": "sqlite3.OperationalError",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are a POSIX matter")
@pytest.mark.parametrize("kind", ON_DISK)
def test_a_disk_that_is_full(kind: str, tmp_path: Path) -> None:
    """Searches go on, a write raises the database's own error, and nothing is lost."""
    done = subprocess.run(  # noqa: S603 - our own program
        [sys.executable, "-c", PROGRAM, kind, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = {(when, name): answer for when, name, answer in json.loads(done.stdout)}
    count = len(vectors())
    for when, write, log in (
        ("full", OWN[kind], "builtins.OSError"),
        ("free", None, None),
    ):
        assert found[when, "search"] == found[when, "search again"] == ["route", 5]
        assert found[when, "refresh"] is False
        assert found[when, "write"] == write
        assert found[when, "count"] == count
        assert found[when, "log"] == log
    assert found["free", "best"] == 3
