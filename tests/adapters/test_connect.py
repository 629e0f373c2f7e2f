from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from amips_plugins import MilvusCollection, QdrantCollection, QdrantEdgeCollection, connect
from amips_plugins.adapters.connect import read_filter
from amips_plugins.adapters.milvus.opening import open_client
from amips_plugins.collection import CollectionInfo
from amips_plugins.errors import CollectionNotFound, DatabaseUnreachable, InvalidInput
from amips_plugins.vectors import Metric
from tests.support.bundles import memory

Calls = list[tuple[str, str, str, str | None, str | None]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the adapters were asked to open: database, address, name, field and token."""
    noted: Calls = []

    def noting(database: str) -> Any:
        def connect(
            address: str,
            name: str,
            field: str | None = None,
            token: str | None = None,
            inside: str | None = None,
        ) -> Any:
            name = f"{inside}.{name}" if inside else name
            noted.append((database, address, name, field, token))
            return memory()

        return staticmethod(connect)

    monkeypatch.setattr(MilvusCollection, "connect", noting("milvus"))
    monkeypatch.setattr(QdrantCollection, "connect", noting("qdrant"))
    monkeypatch.setattr(QdrantEdgeCollection, "connect", noting("qdrant-edge"))
    monkeypatch.delenv("AMIPS_MILVUS_TOKEN", raising=False)
    monkeypatch.delenv("AMIPS_QDRANT_API_KEY", raising=False)
    return noted


@pytest.mark.parametrize("database", ["milvus", "qdrant"])
@pytest.mark.parametrize(
    ("rest", "address", "name", "field"),
    [
        (":///folder/docs.db?collection=docs", "/folder/docs.db", "docs", None),
        (":folder/docs.db?collection=docs", "folder/docs.db", "docs", None),
        (":///a%20b/docs.db?collection=docs", "/a b/docs.db", "docs", None),
        (":///me@home/docs.db?collection=docs", "/me@home/docs.db", "docs", None),
        (":///docs.db?collection=docs&field=title", "/docs.db", "docs", "title"),
        (":///docs.db?field=title&collection=docs", "/docs.db", "docs", "title"),
        (":///docs.db?collection=a%26b%20c", "/docs.db", "a&b c", None),
        ("://localhost:19530?collection=docs", "http://localhost:19530", "docs", None),
        ("://localhost:19530/?collection=docs", "http://localhost:19530", "docs", None),
        ("://[::1]:6333?collection=docs", "http://[::1]:6333", "docs", None),
        ("+http://host:6333?collection=docs", "http://host:6333", "docs", None),
        ("+https://host:443?collection=docs&field=v", "https://host:443", "docs", "v"),
    ],
)
def test_every_form(
    calls: Calls, database: str, rest: str, address: str, name: str, field: str | None
) -> None:
    connect(f"{database}{rest}")
    assert calls == [(database, address, name, field, None)]


def test_a_shard_key_of_qdrant(calls: Calls) -> None:
    connect("qdrant://localhost:6333?collection=docs&shard_key=tenant")
    assert calls == [("qdrant", "http://localhost:6333", "tenant.docs", None, None)]
    with pytest.raises(InvalidInput, match="'shard_key'"):
        connect("milvus://localhost:19530?collection=docs&shard_key=tenant")


def test_a_database_of_milvus(calls: Calls) -> None:
    connect("milvus://localhost:19530?collection=docs&db=tenant")
    assert calls == [("milvus", "http://localhost:19530", "tenant.docs", None, None)]


@pytest.mark.parametrize(
    ("uri", "address", "field"),
    [
        ("qdrant-edge:///folder?collection=docs", "/folder", None),
        ("qdrant-edge:folder/of%20mine?collection=docs&field=title", "folder/of mine", "title"),
    ],
)
def test_an_edge_shard_is_a_folder_in_a_folder(
    calls: Calls, uri: str, address: str, field: str | None
) -> None:
    connect(uri)
    assert calls == [("qdrant-edge", address, "docs", field, None)]


def test_an_edge_shard_has_no_host(calls: Calls) -> None:
    with pytest.raises(InvalidInput, match="has no host; write for example qdrant-edge:///folder"):
        connect("qdrant-edge://localhost:6333?collection=docs")
    assert calls == []


def test_credentials_come_from_the_environment(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMIPS_MILVUS_TOKEN", "user:password")
    monkeypatch.setenv("AMIPS_QDRANT_API_KEY", "key")
    connect("milvus://host?collection=docs")
    connect("qdrant://host?collection=docs")
    assert [call[-1] for call in calls] == ["user:password", "key"]


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "not a collection URI"),
        ("docs.db", "'docs.db' is not a collection URI"),
        ("/folder/docs.db", "not a collection URI"),
        ("http://localhost:19530?collection=docs", "not a collection URI"),
        ("postgres://host/docs", "not a collection URI"),
        ("milvus+ftp://host?collection=docs", "not a collection URI"),
        ("+https://host?collection=docs", "not a collection URI"),
        ("milvus:///docs.db", "names no collection"),
        ("milvus:///docs.db?collection=", "names no collection"),
        ("milvus:///docs.db?field=title", "names no collection"),
        ("milvus:///docs.db?colection=docs", "Unknown option 'colection'"),
        ("milvus:///docs.db?collection=docs&timeout=3", "Unknown option 'timeout'"),
        ("qdrant://localhost:6333?collection=docs&db=tenant", "Unknown option 'db'"),
        ("milvus://?collection=docs", "no host and no file"),
        ("milvus:///?collection=docs", "no host and no file"),
        ("milvus:?collection=docs", "no host and no file"),
        ("milvus+https:///docs.db?collection=docs", "no host and no file"),
        ("milvus://folder/docs.db?collection=docs", "both a host and the path '/docs.db'"),
        ("milvus://[::1?collection=docs", "names no host"),
        ("milvus://host:65536?collection=docs", "a number up to 65535"),
        ("milvus://host:port?collection=docs", "a number up to 65535"),
        ("qdrant-edge+https://localhost?collection=docs", "not a collection URI"),
        ("qdrant-edge:///?collection=docs", "no host and no file"),
        ("qdrant-edge:///folder", "names no collection"),
    ],
)
def test_bad_uris_get_one_sentence_with_an_example(calls: Calls, uri: str, says: str) -> None:
    for text in (uri, uri.replace("milvus", "qdrant")):
        with pytest.raises(InvalidInput, match=says) as caught:
            connect(text)
        assert "write for example milvus:///path/docs.db?collection=docs" in str(caught.value)
    assert calls == []


@pytest.mark.parametrize(
    "uri",
    [
        "milvus://user:SECRET@host:19530?collection=docs",
        "milvus://SECRET@host:19530?collection=docs",
        "milvus://:SECRET@host?collection=docs",
        "qdrant+https://user:SECRET@host?collection=docs",
        "postgres://user:SECRET@host/docs",
        "https://user:SECRET@host?collection=docs",
        "user:SECRET@host",
        "milvus://user:SEC?SECRET@host?collection=docs",
        "milvus://user:SEC#SECRET@host?collection=docs",
        "milvus://user:SEC/SECRET@host?collection=docs",
        "milvus://user:SECRET@ho℀st?collection=docs",
        "milvus://host?collection=docs&token=SECRET",
        "qdrant://host?collection=docs&api_key=SECRET",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(
    calls: Calls, uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InvalidInput) as caught:
        connect(uri)
    error: BaseException | None = caught.value
    while error is not None:
        assert "SEC" not in str(error)
        error = None if error.__suppress_context__ else error.__context__
    assert "SEC" not in caplog.text
    assert calls == []


def test_a_wrong_name_shows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nameless:
        @property
        def info(self) -> Any:
            raise CollectionNotFound("Milvus has no collection 'docs'.")

    monkeypatch.setattr(MilvusCollection, "connect", staticmethod(lambda *_: Nameless()))
    with pytest.raises(CollectionNotFound):
        connect("milvus:///docs.db?collection=docs")


@pytest.mark.parametrize("database", ["milvus", "qdrant", "qdrant-edge"])
def test_a_path_that_is_not_there_creates_nothing(database: str, tmp_path: Path) -> None:
    with pytest.raises(CollectionNotFound):
        connect(f"{database}://{tmp_path}/docs.db?collection=docs")
    assert list(tmp_path.iterdir()) == []


def test_a_filter_is_read_as_its_database_has_it() -> None:
    class Named:
        def __init__(self, database: str) -> None:
            self.info = CollectionInfo(database, "docs", "", Metric.COSINE, 4)

    def read(database: str, text: str) -> Any:
        return read_filter(Named(database), text)  # type: ignore[arg-type] # it asks for no more

    assert read("milvus", "year > 2020") == "year > 2020"
    (condition,) = read("qdrant", '{"must": [{"key": "year", "range": {"gte": 2020}}]}').must
    assert (condition.key, condition.range.gte) == ("year", 2020)
    with pytest.raises(InvalidInput, match="no filter of Qdrant"):
        read("qdrant", "year > 2020")
    with pytest.raises(InvalidInput, match="cannot be typed"):
        read("qdrant-edge", "{}")


def test_a_connection_that_the_engine_closed_while_nobody_called_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Milvus Lite does so after half a minute; a file that is locked stays so."""
    pymilvus = pytest.importorskip("pymilvus")
    pytest.importorskip("milvus_lite")
    (tmp_path / "docs.db").touch()
    refusals = [1, 2]
    tries = list[int]()

    def client(*_: Any, **__: Any) -> str:
        tries.append(1)
        if len(tries) <= refusals[0]:
            raise pymilvus.exceptions.MilvusException(message="Fail connecting: too many pings")
        return "a client"

    monkeypatch.setattr(pymilvus, "MilvusClient", client)
    assert open_client(str(tmp_path / "docs.db"), None, "") == "a client"
    assert len(tries) == 2
    tries.clear()
    refusals.pop(0)
    with pytest.raises(DatabaseUnreachable, match="close the other process"):
        open_client(str(tmp_path / "docs.db"), None, "")
    assert len(tries) == 2
