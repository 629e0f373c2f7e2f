"""Several collections as one: on every engine, and with members that fail."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import MemoryCollection, SeveralCollections
from amips_plugins.adapters.several.fan_out import SourceRests
from amips_plugins.collection import (
    AsyncCollection,
    Collection,
    Failure,
    Id,
    Incomplete,
    SearchRequest,
)
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, Metric
from tests.support import several_data as data
from tests.support.several_data import Unreliable, found

DIM, EACH = 8, 30
NAMES = ("a", "b", "c", "d")


def vectors(count: int = len(NAMES) * EACH, seed: int = 0) -> FloatArray:
    array = np.random.default_rng(seed).standard_normal((count, DIM))
    return np.asarray(array, dtype=np.float32)


QUERIES = vectors(6, seed=1)


def parts() -> dict[str, FloatArray]:
    return dict(zip(NAMES, np.split(vectors(), len(NAMES)), strict=True))


def in_memory(metric: Metric = Metric.COSINE) -> dict[str, Collection]:
    return {name: MemoryCollection(keys, metric=metric) for name, keys in parts().items()}


@pytest.fixture(params=["memory", "milvus", "qdrant", "edge", "each"])
def members(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[dict[str, Collection]]:
    """The four of them, on one engine or each on another."""
    engines = ["memory", "milvus", "qdrant", "edge"]
    kinds = engines if request.param == "each" else [request.param] * len(NAMES)
    made: dict[str, Collection] = {}
    for kind, (name, keys) in zip(kinds, parts().items(), strict=True):
        if kind == "memory":
            made[name] = MemoryCollection(keys)
        elif kind == "milvus":
            made[name] = data.on_milvus(tmp_path, keys, name, Metric.COSINE)
        elif kind == "qdrant":
            made[name] = data.on_qdrant(keys, name, Metric.COSINE)
        else:
            made[name] = data.on_edge(tmp_path, keys, name, Metric.COSINE)
    yield made
    for one in made.values():
        one.close()
        client = getattr(one, "client", getattr(one, "_client", None))
        if client is not None:
            client.close()


def expected(k: int, names: tuple[str, ...] = NAMES) -> list[list[tuple[str, int | str]]]:
    """What one collection of all keys finds, said as the collections say it."""
    there = [n for n, name in enumerate(NAMES) if name in names]
    rows = np.concatenate([np.arange(n * EACH, (n + 1) * EACH) for n in there])
    whole = MemoryCollection(vectors()[rows])
    answers = whole.search(SearchRequest(QUERIES, k))
    ids = [[rows[int(hit.id)] for hit in hits] for hits in answers]
    return [[(NAMES[row // EACH], int(row % EACH)) for row in one] for one in ids]


@pytest.mark.slow
def test_they_answer_as_one_collection_of_all_keys(members: dict[str, Collection]) -> None:
    several = SeveralCollections(members)
    assert isinstance(several, AsyncCollection)
    assert several.count() == len(NAMES) * EACH
    request = SearchRequest(QUERIES, 7)
    wanted = expected(7)
    assert [found(hits) for hits in several.search(request)] == wanted
    assert [found(hits) for hits in several.exact(request)] == wanted
    awaited = asyncio.run(several.search_async(None, request))
    assert [found(hits) for hits in awaited] == wanted
    for hits in several.search(request):
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
    assert several.exhaustive == all(one.exhaustive for one in members.values())


@pytest.mark.slow
def test_a_plan_searches_the_collections_that_it_names(members: dict[str, Collection]) -> None:
    several = SeveralCollections(members)
    seen = several.partitioned(Partitions(None, NAMES))
    cells = np.array([[0, 2], [1, -1], [3, 0], [2, 1], [0, -1], [3, 2]])
    plan = QueryPlan(cells=cells, layout=seen.layout())
    answers = seen.search(SearchRequest(QUERIES, 5), plan)
    awaited = asyncio.run(seen.search_async(None, SearchRequest(QUERIES, 5), plan))
    for row, (hits, others) in enumerate(zip(answers, awaited, strict=True)):
        names = tuple(NAMES[cell] for cell in cells[row] if cell >= 0)
        assert found(hits) == expected(5, names)[row] == found(others)
    with pytest.raises(InvalidInput, match="layout"):
        several.search(SearchRequest(QUERIES, 5), plan)


@pytest.mark.slow
def test_what_a_router_does_not_know_is_always_searched(members: dict[str, Collection]) -> None:
    seen = SeveralCollections(members).partitioned(Partitions(None, ("c", "gone")))
    assert seen.overflow() == 3 * EACH
    assert seen.layouts.status().sizes == (EACH, 0)
    plan = QueryPlan(cells=np.full((6, 1), 1), layout=seen.layout())
    answers = seen.search(SearchRequest(QUERIES, 5), plan)
    assert [found(hits) for hits in answers] == expected(5, ("a", "b", "d"))


@pytest.mark.slow
def test_reading_tells_keys_of_one_id_apart(members: dict[str, Collection]) -> None:
    seen = SeveralCollections(members).partitioned(Partitions(None))
    batches = list(seen.scan(16))
    keys = [key for batch in batches for key in batch.ids]
    values = [value for batch in batches for value in batch.values or ()]
    assert len(set(keys)) == len(keys) == len(NAMES) * EACH
    assert values == [name for name in NAMES for _ in range(EACH)]
    behind = [key for batch in seen.scan(16, after=batches[2].cursor) for key in batch.ids]
    assert keys == [*(key for batch in batches[:3] for key in batch.ids), *behind]
    (hits,) = seen.search(SearchRequest(QUERIES[:1], 3))
    batch = seen.fetch([hits[0].key, keys[-1], "nonsense", 5, '["nowhere", 1]'])
    assert set(batch.ids) == {hits[0].key, keys[-1]}
    there = dict(zip(batch.ids, batch.vectors, strict=True))[hits[0].key]
    own = parts()[hits[0].collection][int(hits[0].id)]
    assert there @ own / np.linalg.norm(there) / np.linalg.norm(own) == pytest.approx(1.0)


def test_the_same_id_in_two_collections_is_two_hits() -> None:
    keys = vectors(5)
    several = SeveralCollections({"x": MemoryCollection(keys), "y": MemoryCollection(keys)})
    (hits,) = several.search(SearchRequest(keys[:1], 2))
    assert found(hits) == [("x", 0), ("y", 0)]
    assert hits[0].key != hits[1].key


def unreliable() -> dict[str, Unreliable]:
    return {name: Unreliable(keys, name=name) for name, keys in parts().items()}


def test_one_that_fails_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    members = unreliable()
    several = SeveralCollections(members)
    members["b"].error = ConnectionError("refused")
    with caplog.at_level(logging.WARNING):
        for answers in (
            several.search(SearchRequest(QUERIES, 5)),
            asyncio.run(several.search_async(None, SearchRequest(QUERIES, 5))),
            several.exact(SearchRequest(QUERIES, 5)),
        ):
            assert [found(hits) for hits in answers] == expected(5, ("a", "c", "d"))
            for hits in answers:
                assert isinstance(hits, Incomplete)
                assert hits.left_out == ("b",)
    assert several.left_out == {"b": 3 * len(QUERIES)}
    assert caplog.text.count("'b' is left out") == 1
    assert several.search(SearchRequest(QUERIES, 5))[0].left_out == ("b",)  # type: ignore[attr-defined]
    assert members["b"].asked == 3  # and is not asked a fourth time
    members["b"].error = None
    assert several.fetch(['["b", 3]']).ids == ['["b", 3]']


def test_one_that_is_slow_is_left_out_within_the_deadline() -> None:
    members = unreliable()
    members["c"].seconds = 5.0
    several = SeveralCollections(members, timeout=0.3)
    (hits, *_) = several.search(SearchRequest(QUERIES, 5))
    assert found(hits) == expected(5, ("a", "b", "d"))[0]
    assert hits.left_out == ("c",)  # type: ignore[attr-defined]
    (hits, *_) = several.search(SearchRequest(QUERIES, 5, timeout=0.2))
    assert hits.left_out == ("c",)  # type: ignore[attr-defined]


def test_only_queries_that_wanted_it_miss_it() -> None:
    members = unreliable()
    members["c"].error = OSError("down")
    seen = SeveralCollections(members).partitioned(Partitions(None, NAMES))
    plan = QueryPlan(cells=np.array([[0, 2], [1, 0]]), layout=seen.layout())
    missing, whole = seen.search(SearchRequest(QUERIES[:2], 5), plan)
    assert (type(missing), type(whole)) == (Incomplete, list)
    assert seen.left_out == {"c": 1}
    only = QueryPlan(cells=np.array([[2]]), layout=seen.layout())
    (nothing,) = seen.search(SearchRequest(QUERIES[:1], 5), only)
    assert (list(nothing), nothing.left_out) == ([], ("c",))  # type: ignore[attr-defined]


def test_strict_raises_and_so_does_a_search_that_nobody_answers() -> None:
    members = unreliable()
    members["b"].error = ConnectionError("refused")
    with pytest.raises(ConnectionError, match="refused"):
        SeveralCollections(members, strict=True).search(SearchRequest(QUERIES, 5))
    several = SeveralCollections(members)
    for one in members.values():
        one.error = ConnectionError("refused")
    with pytest.raises(ConnectionError):
        several.search(SearchRequest(QUERIES, 5))
    assert several.failure(ConnectionError("x")) is Failure.OUTAGE
    assert several.failure(TimeoutError("x")) is Failure.OUTAGE
    assert several.failure(KeyError("x")) is Failure.OTHER
    for _ in range(4):
        with pytest.raises((ConnectionError, SourceRests)):
            several.search(SearchRequest(QUERIES, 5))


def test_what_the_caller_asks_wrongly_is_the_callers(tmp_path: Path) -> None:
    members = dict(in_memory())
    members["m"] = data.on_milvus(tmp_path, vectors(10), "m", Metric.COSINE)
    several = SeveralCollections(members)
    with pytest.raises(InvalidInput, match="cannot be merged under params: offset"):
        several.search(SearchRequest(QUERIES, 3, params={"offset": 2}))
    assert several.left_out == {}
    assert several.unroutable(SearchRequest(QUERIES, 3), rewritten=True)
    assert several.unroutable(SearchRequest(QUERIES, 3), rewritten=False) is None


def test_filters_are_for_all_or_by_name() -> None:
    several = SeveralCollections(in_memory())
    request = SearchRequest(QUERIES[:1], 500, filter=lambda key, _: key < 2)
    (hits,) = several.search(request)
    assert sorted(found(hits)) == [(name, key) for name in NAMES for key in (0, 1)]
    by_name: Any = {"a": lambda key, _: key == 3, "b": lambda key, _: key == 4}
    (hits,) = several.search(SearchRequest(QUERIES[:1], 500, filter=by_name))
    assert len(hits) == 2 * EACH + 2
    assert {one for one in found(hits) if one[0] in "ab"} == {("a", 3), ("b", 4)}


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ([], "no collections"),
        (None, "NoneType is no list of collections"),
        ("qdrant://localhost:6333?collection=docs", "str is no list of collections"),
        (MemoryCollection(vectors(3)), "MemoryCollection is no list"),
        (["qdrant://localhost:6333?collection=docs"], "A str is no collection; pass connect"),
        ({"a": None}, "A NoneType is no collection"),
        ([MemoryCollection(vectors(3)), MemoryCollection(vectors(4))], "'memory/memory'; pass"),
        (
            {"a": MemoryCollection(vectors(3)), "b": MemoryCollection(vectors(3)[:, :4])},
            "'a' has the dimension 8, 'b' has 4; only collections of one model",
        ),
        (
            {"a": MemoryCollection(vectors(3), metric="ip"), "b": MemoryCollection(vectors(3))},
            "'a' has the metric ip, 'b' has cosine",
        ),
    ],
)
def test_what_cannot_be_searched_together_is_refused(members: Any, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        SeveralCollections(members)


def test_distances_and_their_squares_are_not_merged() -> None:
    qdrant = data.on_qdrant(vectors(3), "q", Metric.L2)
    with pytest.raises(InvalidInput, match="distances on Qdrant"):
        SeveralCollections([MemoryCollection(vectors(3), metric="l2"), qdrant])
    alone = SeveralCollections({"x": qdrant, "y": qdrant})
    assert alone.info.metric is Metric.L2
    (hits,) = alone.search(SearchRequest(QUERIES[:1], 6))
    assert [hit.score for hit in hits] == sorted(hit.score for hit in hits)


def test_arguments_that_make_no_sense_are_refused() -> None:
    with pytest.raises(InvalidInput, match="asks nobody"):
        SeveralCollections(in_memory(), at_once=0)
    with pytest.raises(InvalidInput, match="is no time"):
        SeveralCollections(in_memory(), timeout=0.0)
    several = SeveralCollections(in_memory())
    with pytest.raises(InvalidInput, match="which are its partitions"):
        several.partitioned(Partitions("field"))
    with pytest.raises(InvalidInput, match="mapping of their names"):
        asyncio.run(several.search_async(object(), SearchRequest(QUERIES, 3)))
    with pytest.raises(InvalidInput, match="write to the one that a key belongs to: a, b"):
        several.upsert([1], vectors(1))
    with pytest.raises(InvalidInput, match="write to the one"):
        several.delete([1])


class Moved(MemoryCollection):
    """An alias that names something else at the next look."""

    then: Collection | None = None

    def current(self) -> Any:
        return self.then or self


def test_a_member_that_moved_is_followed_and_one_that_cannot_be_seen_stays() -> None:
    members: dict[str, Any] = {name: Moved(keys) for name, keys in parts().items()}
    several = SeveralCollections(members)
    assert several.current() is several
    members["a"].then = MemoryCollection(vectors(50, seed=5))

    def fails() -> Any:
        raise OSError("down")

    members["b"].current = fails
    now = several.current()
    assert now.count() == 50 + 3 * EACH
    assert now.left_out is several.left_out
    members["a"].then = MemoryCollection(vectors(5)[:, :3])
    with pytest.raises(InvalidInput, match="dimension"):
        several.current()


def test_it_says_what_it_is_made_of_and_closes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    several = SeveralCollections(in_memory(), name="docs")
    facts = dict(several.describe().facts)
    assert facts["a"] == "memory, 30 keys"
    assert several.info.name == "docs"
    assert several.overflow() == 0
    assert several.layout() is None
    closed: list[int] = []
    monkeypatch.setattr(MemoryCollection, "close", lambda _: closed.append(1))
    with several as entered:
        assert entered is several
    assert len(closed) == len(NAMES)


def test_names_do_not_depend_on_the_others() -> None:
    qdrant = data.on_qdrant(vectors(3), "docs", Metric.COSINE)
    several = SeveralCollections([MemoryCollection(vectors(3), name="news"), qdrant])
    assert list(several.members) == ["memory/news", "qdrant/docs"]


def test_an_expression_that_milvus_cannot_read_is_the_callers_own(tmp_path: Path) -> None:
    """It is raised, and no collection is left out of later searches for it."""
    on_milvus = data.on_milvus(tmp_path, vectors(10), "m", Metric.COSINE)
    several = SeveralCollections({"m": on_milvus, "b": MemoryCollection(vectors(4))})
    for wrong in ("id >> !! 2", "(id > 2"):
        with pytest.raises(Exception, match="at column"):
            several.search(SearchRequest(QUERIES, 3, filter={"m": wrong}))
    assert several.left_out == {}
    assert len(several.search(SearchRequest(QUERIES, 14))[0]) == 14


def test_what_is_no_key_of_several_collections_is_not_there() -> None:
    several = SeveralCollections({"a": MemoryCollection(vectors(4))})
    odd: list[Id] = [5, "x", '["a"]', '["a", 1, 2]', "[1, 2]", "[[1], 2]", '{"a": 1}', '["b", 1]']
    batch = several.fetch([*odd, '["a", 1]'])
    assert batch.ids == ['["a", 1]']
