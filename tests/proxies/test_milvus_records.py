"""What goes in and out through a routed Milvus client carries nothing of ours."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amips_plugins import route
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.proxies.records import RESERVED
from amips_plugins.vectors import FloatArray
from tests.proxies.test_milvus import QUERY, Database, Watched, WatchedAsync
from tests.support.proxy_data import COUNT, Rewrite, keys

pytestmark = pytest.mark.slow

Ask = Callable[[Any, str], Any]


class Written(Database):
    """A database whose rows are put back before each test, and its routed client."""

    def routed(self, ask: Ask, hook: Any = None) -> Any:
        """Ask the routed client."""
        router = self.router(hook)
        if self.kind == "sync":
            client = Watched(str(self.path))
            client.calls, client.failures = self.calls, self.failures
            try:
                return ask(route(client, router), self.name)
            finally:
                client.close()

        async def one() -> Any:
            client = WatchedAsync(str(self.path))
            client.calls, client.failures = self.calls, self.failures
            async with route(client, router) as routed:
                return await ask(routed, self.name)

        return asyncio.run(one())

    def put_back(self) -> None:
        vectors = keys()
        ids: list[Any] = [f"k{row}" for row in range(COUNT)]
        fields = [{"group": row % 3, "more": f"row {row}"} for row in range(COUNT)]
        self.router().upsert(ids, vectors, fields)

    def rows(self) -> list[dict[str, Any]]:
        """All rows as a bare client reads them."""
        fields = ["*"]
        found = self.bare.query(self.name, "key != ''", output_fields=fields, limit=COUNT)
        return [dict(row) for row in found]


@pytest.fixture(
    scope="module",
    params=list(itertools.product(("sync", "async"), ("partitions", "field"))),
    ids="-".join,
)
def database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Written]:
    kind, storage = request.param
    path = tmp_path_factory.mktemp("milvus") / "docs.db"
    made = Written(tmp_path_factory.mktemp("bundle"), path, kind, storage, "COSINE")
    yield made
    made.bare.close()


@pytest.fixture(autouse=True)
def as_at_first(database: Written) -> None:
    database.put_back()


def ours(found: Any) -> bool:
    """Whether anything of ours is in an answer."""
    return RESERVED in str(
        [list(hits) if isinstance(hits, list) else hits for hits in found]
    ) or RESERVED in str(found)


READS: dict[str, Ask] = {
    "search": lambda c, name: c.search(name, [QUERY], output_fields=["*"]),
    "the cell itself": lambda c, name: c.search(
        name, [QUERY], output_fields=["group", "amips_cell"], filter="group == 1"
    ),
    "several searches": lambda c, name: c.search(name, [QUERY, QUERY], output_fields=["*"]),
    "query": lambda c, name: c.query(name, "group == 1", output_fields=["*"], limit=5),
    "get": lambda c, name: c.get(name, ["k1", "k2"]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_read_holds_nothing_of_ours(database: Written, read: Ask) -> None:
    if database.storage == "field":
        assert ours(read(database.bare, database.name))  # or there would be nothing to hide
    elif read is READS["the cell itself"]:
        pytest.skip("there is no such field")
    found = database.routed(read)
    assert len(found[0])
    assert not ours(found)
    assert "group" in str(list(found[0]) if isinstance(found[0], list) else found)


def test_iterators_hide_it_too(database: Written) -> None:
    if database.kind == "async":
        pytest.skip("the asynchronous client has none")

    def read(client: Any, name: str) -> list[Any]:
        pages = client.query_iterator(name, filter="group == 1", output_fields=["*"], batch_size=30)
        first = pages.next()
        pages.close()
        return list(first)

    found = database.routed(read)
    assert len(found) == 30
    assert not ours(found)
    assert database.storage == "partitions" or ours(read(database.bare, database.name))


WRITES: dict[str, Callable[[Any, str, list[dict[str, Any]]], Any]] = {
    "upsert": lambda c, name, rows: c.upsert(name, rows),
    "upsert a row": lambda c, name, rows: c.upsert(name, rows[0]),
    "delete and insert": lambda c, name, rows: _replaced(c, name, rows),
}


def _replaced(client: Any, name: str, rows: list[dict[str, Any]]) -> Any:
    gone = client.delete(name, ids=[row["key"] for row in rows])
    if not asyncio.iscoroutine(gone):
        return client.insert(name, rows)

    async def both() -> Any:
        await gone
        return await client.insert(name, rows)

    return both()


def each(client: Any, name: str, asked: list[dict[str, Any]]) -> Any:
    """Search for all of these, one after the other."""
    answers = [client.search(name, **one) for one in asked]
    return together(answers) if asyncio.iscoroutine(answers[0]) else answers


async def together(answers: list[Any]) -> list[Any]:
    return await asyncio.gather(*answers)


def misplaced(database: Written, changed: dict[str, Any]) -> list[str]:
    """The changed keys that a search of all cells does not find once, by their new vector."""
    asked = [
        {"data": [np.asarray(vector).tolist()], "limit": 3, "output_fields": ["vector"]}
        for vector in changed.values()
    ]
    answers = database.routed(lambda c, name: each(c, name, asked), database.every_cell())
    wrong = []
    for (key, vector), (hits,) in zip(changed.items(), answers, strict=True):
        found = [hit["entity"]["vector"] for hit in hits if hit["key"] == key]
        if len(found) != 1 or not np.allclose(found[0], vector):
            wrong.append(key)
    return wrong


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("reader", ["bare", "routed"])
def test_what_is_read_changed_and_written_is_found(
    database: Written, write: Callable[..., Any], reader: str
) -> None:
    def read(client: Any, name: str) -> Any:
        return client.query(name, "group == 1", output_fields=["*"], limit=12)

    rows = read(database.bare, database.name) if reader == "bare" else database.routed(read)
    changed = {}
    rows = [dict(row) for row in rows]
    if write is WRITES["upsert a row"]:
        rows = rows[:1]
    for row, vector in zip(rows, (keys()[100:112] * 1.5).tolist(), strict=False):
        row["vector"] = vector
        changed[row["key"]] = vector
    before = [dict(row) for row in rows]
    answer = database.routed(lambda c, name: write(c, name, rows))
    assert rows == before  # the caller's own are left alone
    assert "count" in str(answer)
    assert not misplaced(database, changed)
    after = {row["key"]: row for row in database.rows()}
    assert len(after) == COUNT
    for key, vector in changed.items():
        assert np.allclose(after[key]["vector"], vector)
        if database.storage == "field":
            assert after[key]["amips_cell"] == -1
        assert after[key]["more"] == f"row {key[1:]}"


@settings(
    deadline=None, max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["upsert", "delete and insert"]), st.integers(0, 200)),
        min_size=1,
        max_size=3,
    )
)
def test_no_sequence_of_writes_leaves_a_stale_cell(
    database: Written, steps: list[tuple[str, int]]
) -> None:
    database.put_back()
    held = sorted(database.rows(), key=lambda row: int(row["key"][1:]))  # read once
    changed: dict[str, Any] = {}
    for number, (name, start) in enumerate(steps):
        rows = [dict(row) for row in held[start : start + 8]]
        for row, vector in zip(
            rows, np.roll(keys(), 7 * number + 50, axis=0)[start:], strict=False
        ):
            row["vector"] = vector.tolist()
            changed[row["key"]] = row["vector"]
        database.routed(partial(lambda write, rows, c, to: write(c, to, rows), WRITES[name], rows))
    assert not misplaced(database, changed)


@pytest.mark.parametrize("bad", [None, 3, [3], {"key": "k1"}, [{"nothing": 1}]], ids=str)
def test_what_cannot_be_written_is_the_clients_to_refuse(database: Written, bad: Any) -> None:
    def error(ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except Exception as exc:  # noqa: BLE001 - whatever the client raises
            return type(exc)

    expected = error(lambda: database.bare.upsert(database.name, bad))
    found = error(lambda: database.routed(lambda c, name: c.upsert(name, bad)))
    if database.kind == "sync":
        assert found == expected
    assert isinstance(found, type) or found == expected
    assert len(database.rows()) == COUNT


class Few(Rewrite):
    """As many candidates as three pages take."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        return replace(super().plan(queries, target), rescore=30)


@pytest.mark.parametrize("hook", ["bundle", "rewrite"])
def test_pages_fit_together(database: Written, hook: str) -> None:
    chosen = Few() if hook == "rewrite" else None
    for query, condition in itertools.product((keys()[::80] + 0.1).tolist(), ("", "group == 1")):
        whole = database.bare.search(database.name, [query], condition, limit=COUNT)[0].ids
        asked = [
            {"data": [query], "filter": condition, "search_params": {"offset": o} if o else None}
            for o in range(0, len(whole) + 10, 10)
        ]
        pages = database.routed(partial(each, asked=asked), chosen)
        found = [key for page in pages for key in page[0].ids]
        assert len(set(found)) == len(found)
        assert set(found) == set(whole)  # to the last one
