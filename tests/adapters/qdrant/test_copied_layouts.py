"""Cells in a copy: what is copied, who notices, what a kill leaves, and the way back.

With the calls that a server gets, answered by the client's local mode; what only a server does
(graphs, optimisers) stands in ``integration_tests/test_qdrant_generations.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant import copied_layouts, new_generation
from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.adapters.qdrant.generations import Generation, generation_of
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Id, SearchRequest, collection_key
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, IntArray
from tests.support.qdrant_data import DIM, KEYS, by_row, dense, fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning"),
]

COUNT = len(KEYS)


@pytest.fixture(autouse=True)
def _no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copied_layouts, "GRACE", 0.0)
    monkeypatch.setattr(new_generation, "_LOOK", 0.0)


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    opened = QdrantClient(":memory:")
    fill(opened)
    point_at(opened, "live", "docs")
    yield opened
    opened.close()


def point_at(client: QdrantClient, alias: str, name: str) -> None:
    made = models.CreateAlias(collection_name=name, alias_name=alias)
    client.update_collection_aliases([models.CreateAliasOperation(create_alias=made)])


def served(client: QdrantClient, name: str = "live") -> QdrantCollection:
    collection = QdrantCollection(client, name)
    collection._local = False
    return collection


def spec(work: Path | None = None, **more: Any) -> LayoutSpec:
    return LayoutSpec("a1", 4, by_row, version="v1", storage="copy", work=work, **more)


def payload_of(client: QdrantClient, name: str, key: Any) -> dict[str, Any]:
    (found,) = client.retrieve(name, [key])
    return found.payload or {}


def write(client: QdrantClient, name: str, key: int, **payload: Any) -> None:
    point = models.PointStruct(id=key, vector=[float(key), 1.0, 0.0, 0.0], payload=payload)
    client.upsert(name, [point])


def check(client: QdrantClient, name: str, ids: set[int]) -> None:
    """Every key is there, in its cell."""
    records, _ = client.scroll(name, limit=1000)
    assert {record.id for record in records} == ids
    assert all((r.payload or {})["amips_cell_a1"] == int(r.id) % 4 for r in records)


# --- what a copy is --------------------------------------------------------------------------


def test_the_alias_leads_to_a_copy_in_cells(client: QdrantClient) -> None:
    before = payload_of(client, "docs", 3)
    live = served(client).layouts.build(spec())
    assert (live.info.name, live.info.family, live.layout()) == ("live", "docs", "a1")
    assert client.get_aliases().aliases[0].collection_name == "docs__g2"
    check(client, "docs__g2", set(range(COUNT)))
    assert payload_of(client, "docs", 3) == before
    kept = {k: v for k, v in payload_of(client, "docs__g2", 3).items() if "amips" not in k}
    assert kept == before
    hits = live.search(SearchRequest(KEYS[:1], k=3))[0]
    assert [h.id for h in hits] == [
        h.id for h in served(client, "docs").search(SearchRequest(KEYS[:1], k=3))[0]
    ]


def test_a_copy_is_its_bundles_collection_as_the_first_one_was(client: QdrantClient) -> None:
    before = collection_key(served(client).info)
    assert collection_key(served(client).layouts.build(spec()).info) == before


def test_opened_by_its_own_name_it_takes_an_alias(client: QdrantClient) -> None:
    with pytest.raises(InvalidInput, match=r"own name.*--alias"):
        served(client, "docs").layouts.plan(spec())
    with pytest.raises(InvalidInput, match="is a collection"):
        served(client, "docs").layouts.build(spec(alias="docs"))
    live = served(client, "docs").layouts.build(spec(alias="new"))
    assert (live.info.name, live.layout()) == ("new", "a1")


def test_a_plan_changes_nothing_and_names_the_copy(client: QdrantClient) -> None:
    plan = served(client).layouts.plan(spec())
    assert "docs__g2" in plan.steps[0]
    assert (plan.keys, len(client.get_collections().collections)) == (COUNT, 1)


def test_without_a_graph_cells_are_written_in_place(client: QdrantClient) -> None:
    live = served(client).layouts.build(LayoutSpec("a1", 4, by_row, version="v1"))
    assert live.layout() == "a1"
    assert [c.name for c in client.get_collections().collections] == ["docs"]


def test_everything_of_a_point_comes_along(client: QdrantClient) -> None:
    vectors = {"a": dense(), "b": dense(models.Distance.COSINE)}
    sparse = {"words": models.SparseVectorParams()}
    client.create_collection("rich", vectors, sparse_vectors_config=sparse)
    points = [
        models.PointStruct(
            id=1,
            vector={"a": [1.0] * DIM, "words": models.SparseVector(indices=[7, 3], values=[1, 2])},
            payload={"nested": {"x": [1, None, "ä"]}},
        ),
        models.PointStruct(id="00000000-0000-0000-0000-00000000000a", vector={"b": [3.0] * DIM}),
    ]
    client.upsert("rich", points)
    point_at(client, "rich_live", "rich")
    collection = QdrantCollection(client, "rich_live", "a")
    collection._local = False
    made = LayoutSpec("a1", 4, lambda ids, _: np.zeros(len(ids), int), storage="copy")
    collection.layouts.build(made)
    (one, other), _ = client.scroll("rich__g2", with_vectors=True)
    (first, second), _ = client.scroll("rich", with_vectors=True)
    assert (one.vector, other.vector) == (first.vector, second.vector)
    assert (one.payload or {})["nested"] == {"x": [1, None, "ä"]}
    assert (one.payload or {})["amips_cell_a1"] == 0
    assert other.payload == {}  # no key of the vector that is laid out


def test_vectors_that_a_database_would_normalise_again_are_equal_on_both_sides(
    client: QdrantClient,
) -> None:
    """Else every pass would find them changed, and the last one never end."""
    client.create_collection("cos", dense(models.Distance.COSINE))
    odd = [0.9999990, 0.0, 0.0, 0.0]  # what rounding leaves of a long vector
    client.upsert("cos", [models.PointStruct(id=i, vector=odd) for i in range(9)])
    stored = client._client.collections["cos"].vectors[""]  # type: ignore[attr-defined]
    stored[:9] = np.array(odd, dtype=np.float32)
    point_at(client, "cos_live", "cos")
    live = served(client, "cos_live").layouts.build(spec())
    assert live.count() == 9


# --- others write meanwhile ------------------------------------------------------------------


class Meanwhile:
    """Does something once, when a method of the client is called for the n-th time."""

    def __init__(
        self, client: QdrantClient, monkeypatch: pytest.MonkeyPatch, method: str, nth: int = 1
    ) -> None:
        self.done = False
        self.left = nth
        self.work: Callable[[], object] = lambda: None
        original = getattr(client, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.work()
                self.done = True
            return original(*args, **kwargs)

        monkeypatch.setattr(client, method, call)


def test_what_others_write_during_the_copy_is_in_it(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile = Meanwhile(client, monkeypatch, "count", nth=2)  # of the second pass

    def work() -> None:
        write(client, "live", 100, new=1)
        write(client, "live", 3, changed=1)
        client.delete("live", [4])
        client.update_vectors("live", [models.PointVectors(id=5, vector=[9.0] * DIM)])

    meanwhile.work = work
    served(client).layouts.build(spec())
    assert meanwhile.done
    check(client, "docs__g2", {*range(COUNT), 100} - {4})
    assert payload_of(client, "docs__g2", 3)["changed"] == 1
    (five,) = client.retrieve("docs__g2", [5], with_vectors=True)
    assert five.vector == [9.0] * DIM


def test_what_was_written_just_before_the_switch_comes_after_it(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    meanwhile = Meanwhile(client, monkeypatch, "update_collection_aliases")

    def work() -> None:
        write(client, "live", 100, late=1)
        write(client, "live", 3, late=1)
        client.delete("live", [4])

    meanwhile.work = work
    served(client).layouts.build(spec())
    assert meanwhile.done
    check(client, "docs__g2", {*range(COUNT), 100} - {4})
    assert payload_of(client, "docs__g2", 3)["late"] == 1


def test_who_writes_after_the_switch_has_the_last_word(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source has older words on both keys, which the draining must not bring over."""
    switching = Meanwhile(client, monkeypatch, "update_collection_aliases")

    def before() -> None:
        for key in (3, 200, 201):
            write(client, "docs", key, word=1)

    switching.work = before

    def after(_: float) -> None:
        if not switching.done:
            return
        write(client, "live", 3, word=2)
        writer = served(client)
        writer.upsert([200], np.ones((1, DIM), dtype=np.float32), [{"word": 2}])
        writer.delete([201])

    monkeypatch.setattr("time.sleep", after)
    live = served(client).layouts.build(spec())
    assert payload_of(client, "docs__g2", 3)["word"] == 2
    assert payload_of(client, "docs__g2", 200)["word"] == 2
    assert client.retrieve("docs__g2", [201]) == []
    assert live.overflow() == 2  # both are keys that nobody gave a cell


def test_a_worse_copy_is_not_switched_to(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "amips_plugins.adapters.qdrant.copying.PointReplica._nearest",
        lambda _, name, __: {name: float("g2" not in name)},
    )
    with pytest.raises(CollectionError, match=r"only 0%.*nothing was switched"):
        served(client).layouts.build(spec())
    assert client.get_aliases().aliases[0].collection_name == "docs"


def test_an_alias_that_somebody_moved_stays_there(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create_collection("other", dense())
    waiting = Meanwhile(client, monkeypatch, "count", nth=3)
    waiting.work = lambda: point_at(client, "live", "other")
    with pytest.raises(CollectionError, match=r"moved the alias 'live' from 'docs' to 'other'"):
        served(client).layouts.build(spec())
    assert client.get_aliases().aliases[0].collection_name == "other"


# --- killed ----------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


WRITES = (
    "create_collection",
    "create_payload_index",
    "batch_update_points",
    "update_collection",
    "update_collection_aliases",
    "delete_collection",
)


def boundaries(client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Die before and behind every write in turn, until the work gets through."""
    left, behind = [-1], [False]

    def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and not behind[0]:
                raise Killed
            answer = method(*args, **kwargs)
            if left[0] == 0:
                raise Killed
            return answer

        return call

    for name in WRITES:
        monkeypatch.setattr(client, name, guarded(getattr(client, name)))
    for number in range(1, 40):
        for behind[0] in (False, True):
            left[0] = number
            yield
            if left[0] > 0:
                left[0] = -1
                return
    raise AssertionError("the work never got through")


@pytest.mark.parametrize("noted", [True, False], ids=["work", "no work"])
def test_a_build_killed_anywhere_goes_on(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, noted: bool
) -> None:
    monkeypatch.setattr("amips_plugins.adapters.qdrant.copying._PAGE", 16)
    built = spec(tmp_path if noted else None)
    for _ in boundaries(client, monkeypatch):
        live = served(client)
        assert live.count() == COUNT  # whatever serves
        # Killed behind the last write, the cells are there already.
        with suppress(Killed, InvalidInput):
            live.layouts.build(built)
    check(client, "docs__g2", set(range(COUNT)))
    status = served(client).layouts.status()
    assert (status.layout, status.older, status.unfinished) == ("a1", ("docs",), ())
    assert list(tmp_path.iterdir()) == []


def test_a_rollback_killed_anywhere_goes_on(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    served(client).layouts.build(spec())
    write(client, "live", 100, new=1)
    for _ in boundaries(client, monkeypatch):
        with suppress(Killed, InvalidInput):  # behind the last write there is nothing to roll back
            served(client).layouts.roll_back()
    assert served(client).layout() is None
    assert {hit.id for hit in client.scroll("live", limit=1000)[0]} == {*range(COUNT), 100}


def test_a_copy_that_was_begun_is_in_nobodys_way(
    client: QdrantClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened by its own name the collection is laid out in place, whatever waits beside it."""
    for done, _ in enumerate(boundaries(client, monkeypatch)):
        with suppress(Killed):
            served(client).layouts.build(spec())
        if done == 5:
            break
    monkeypatch.undo()
    assert served(client).layouts.status().unfinished == ("docs__g2",)
    plain = served(client, "docs").layouts.build(LayoutSpec("a1", 4, by_row, version="v1"))
    assert plain.layout() == "a1"
    assert served(client).layouts.drop_old() == ["docs__g2"]


# --- the way back ----------------------------------------------------------------------------


def test_rolled_back_the_old_one_has_what_was_written_since(client: QdrantClient) -> None:
    served(client).layouts.build(spec())
    served(client).upsert([100], np.ones((1, DIM), dtype=np.float32), [{"new": 1}])
    back = served(client).layouts.roll_back(anyway=True)
    assert (back.layout(), back.count()) == (None, COUNT + 1)
    assert payload_of(client, "docs", 100) == {"new": 1}
    again = served(client).layouts.build(spec())
    assert (again.layout(), again.count()) == ("a1", COUNT + 1)
    assert client.get_aliases().aliases[0].collection_name == "docs__g2"


def test_what_only_the_old_one_has_is_not_dropped_by_itself(client: QdrantClient) -> None:
    served(client).layouts.build(spec())
    write(client, "docs", 300)
    for change in (served(client).layouts.roll_back, served(client).layouts.drop_old):
        with pytest.raises(CollectionError, match=r"holds 1 ids.*300.*--anyway"):
            change()
    assert served(client).layouts.drop_old(anyway=True) == ["docs"]
    assert [c.name for c in client.get_collections().collections] == ["docs__g2"]


def test_cells_of_a_second_bundle_are_a_third_generation(client: QdrantClient) -> None:
    served(client).layouts.build(spec())
    other = LayoutSpec("b2", 2, lambda ids, _: by_row(ids, _) // 2, "v2", storage="copy")
    live = served(client).layouts.build(other)
    assert live.layout() == "b2"
    assert live.layouts.status().older == ("docs", "docs__g2")
    assert {k for k in payload_of(client, "live", 3) if "amips" in k} == {
        "amips_cell_b2",
        "amips_sketch_b2",
    }
    assert live.layouts.roll_back().layout() == "a1"


def test_the_metadata_of_a_renamed_copy_name_nobody() -> None:
    entry = Generation("docs", 2, "docs", "a1").entry()
    assert generation_of("docs__g2", entry).family == "docs"
    assert generation_of("restored", entry) == Generation("restored")


def test_keys_of_several_cells_are_one_point_of_the_copy(client: QdrantClient) -> None:
    def assign(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
        own = by_row(ids, vectors)
        return np.stack([own, np.where(own == 0, 2, own)], axis=1)

    shared = LayoutSpec("a1", 4, assign, version="v1", storage="copy", shared=True)
    live = served(client).layouts.build(shared)
    assert (live.count(), live.overflow()) == (COUNT, 0)
    assert payload_of(client, "docs__g2", 4)["amips_cell_a1"] == [0, 2]
    assert payload_of(client, "docs__g2", 5)["amips_cell_a1"] == 1
    queries = np.tile(KEYS, (2, 1))  # as many as are sent cell by cell
    plan = QueryPlan(cells=np.tile([[0, 2]], (len(queries), 1)), layout="a1")
    for hits in live.search(SearchRequest(queries, k=COUNT), plan):
        assert sorted(hit.id for hit in hits) == list(range(0, COUNT, 2))
    assert live.layouts.roll_back().layout() is None
