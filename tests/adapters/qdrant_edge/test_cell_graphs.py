"""A graph in every cell of a Qdrant Edge shard: opened when asked, never believed, mended."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge as edge

from amips_plugins import LearnedRouter, QdrantEdgeCollection
from amips_plugins.adapters.qdrant.cells import LayoutRecord
from amips_plugins.adapters.qdrant_edge.cell_graphs import CellGraphs
from amips_plugins.adapters.qdrant_edge.shard import OpenShard
from amips_plugins.bundle.loading import load_hook
from amips_plugins.bundle.package import Bundle
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.errors import CollectionError, DatabaseUnreachable
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.layout import lay_out
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray, IntArray, normalise
from tests.adapters.qdrant_edge.test_collection import DIM, N_CELLS, create, vectors
from tests.support.training_data import clustered_keys, narrow_queries

COUNT = 80
SPEC = LayoutSpec(
    "abc", N_CELLS, lambda ids, _: np.array(ids) % N_CELLS, version="v1", storage="shards"
)


def two_cells(ids: Any, _: FloatArray) -> IntArray:
    """Every fifth key has a second cell."""
    own = np.array(ids) % N_CELLS
    return np.stack([own, np.where(np.array(ids) % 5 == 0, (own + 1) % N_CELLS, own)], axis=1)


SHARED = replace(SPEC, assign=two_cells, shared=True)


@pytest.fixture
def docs(tmp_path: Path) -> Iterator[QdrantEdgeCollection]:
    create(tmp_path / "docs", COUNT)
    collection = QdrantEdgeCollection.connect(str(tmp_path), "docs")
    yield collection
    collection.close()


def laid_out(collection: QdrantEdgeCollection, spec: LayoutSpec = SPEC) -> QdrantEdgeCollection:
    built = collection.layouts.build(spec)
    assert isinstance(built, QdrantEdgeCollection)
    return built


def reopened(folder: Path) -> QdrantEdgeCollection:
    return QdrantEdgeCollection.connect(str(folder), "docs")


def record_of(collection: QdrantEdgeCollection) -> LayoutRecord:
    record = collection._found.cells
    assert record is not None
    return record


def graphs_of(collection: QdrantEdgeCollection) -> CellGraphs:
    return collection.shard.graphs(record_of(collection), "")


def found(collection: Collection, *cells: int, k: int = 500) -> dict[int, float]:
    """What a search of some cells finds through their graphs, with its scores; never twice."""
    plan = QueryPlan(cells=np.array([cells]), layout="abc", effort=500)
    (hits,) = collection.search(SearchRequest(vectors(1, 1), k=k), plan)
    assert len({hit.id for hit in hits}) == len(hits)
    return {int(hit.id): hit.score for hit in hits}


def test_a_graph_is_followed_however_much_its_cell_holds(docs: QdrantEdgeCollection) -> None:
    built = laid_out(docs)
    graphs_of(built).remove([4], [record_of(built).home(0)])
    shares = np.array([0.9], dtype=np.float32)
    plan = QueryPlan(cells=np.array([[0]]), layout="abc", effort=500, shares=shares)
    asked = SearchRequest(10 * vectors(COUNT)[4:5], COUNT // N_CELLS - 1)
    ids = [
        {hit.id for hit in built.search(asked, one)[0]}
        for one in (plan, replace(plan, effort=None))
    ]
    assert 4 not in ids[0]  # which only a graph does not know
    assert 4 in ids[1]


def test_more_hits_than_the_graphs_have_are_found(docs: QdrantEdgeCollection) -> None:
    """A plan whose cells are worth a full scan is taken for one: nothing would complete it."""

    class OneCell:
        def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
            shares = np.full(len(queries), 0.9, dtype=np.float32)
            cells = np.zeros((len(queries), 1), dtype=np.int64)
            return QueryPlan(cells=cells, layout="abc", effort=500, shares=shares)

    router = LearnedRouter(laid_out(docs), hook=OneCell(), refresh=None)
    for k in (COUNT // N_CELLS, COUNT - 1, COUNT + 5):
        for hits in router.search(vectors(2, 1), k=k):
            assert len({hit.id for hit in hits}) == min(k, COUNT)


def holders(collection: QdrantEdgeCollection, key: int) -> list[str]:
    graphs = graphs_of(collection)
    return [name for name in graphs.names() if key in graphs.sketches(name)]


def test_a_cell_is_opened_when_it_is_asked(docs: QdrantEdgeCollection, tmp_path: Path) -> None:
    built = laid_out(docs)
    assert built.layouts.status().storage == "shards"
    built.close()
    again = reopened(tmp_path)
    graphs, record = graphs_of(again), record_of(again)
    assert graphs.opened == []
    keys = vectors(COUNT)
    (query,) = vectors(1, 1)
    assert set(found(again, 2)) == {row for row in range(COUNT) if row % N_CELLS == 2}
    assert graphs.opened == [record.home(2)]
    for key, score in found(again, 2).items():
        assert score == pytest.approx(float(keys[key] @ query), abs=1e-5)
    again.close()


def test_fields_filters_and_batches(docs: QdrantEdgeCollection) -> None:
    built = laid_out(docs)
    built.upsert([4, 8], vectors(2, 5), [{"title": "a"}, {"title": "b"}], np.array([0, 0]))
    plan = QueryPlan(cells=np.array([[0]]), layout="abc", effort=500)
    request = SearchRequest(vectors(1, 1), k=500, fields=("title",))
    (hits,) = built.search(request, plan)
    assert {hit.id: hit.fields.get("title") for hit in hits if hit.fields} == {4: "a", 8: "b"}
    only = edge.Filter(must=[edge.FieldCondition("title", match=edge.MatchValue("b"))])
    (hits,) = built.search(replace(request, filter=only), plan)
    assert [hit.id for hit in hits] == [8]
    queries = vectors(30, 7)
    cells = np.random.default_rng(2).integers(-1, N_CELLS, (30, 2))
    whole = QueryPlan(cells=cells, layout="abc", effort=500)
    together = built.search(SearchRequest(queries, k=5), whole)
    for row, answer in enumerate(together):
        one = replace(whole, cells=cells[row : row + 1])
        assert built.search(SearchRequest(queries[row : row + 1], k=5), one) == [answer]


def test_a_key_that_moves_leaves_no_twin(docs: QdrantEdgeCollection) -> None:
    built = laid_out(docs)
    home = record_of(built).home
    new = vectors(1, 9)
    built.upsert([4], new, cells=np.array([3]))
    assert holders(built, 4) == [home(3)]
    assert 4 not in found(built, 0)
    assert found(built, 3)[4] == pytest.approx(float(new[0] @ vectors(1, 1)[0]), abs=1e-5)
    built.upsert([4], new)  # without a cell
    assert holders(built, 4) == []
    assert all(4 in found(built, cell) for cell in range(N_CELLS))
    assert built.layouts.backfill(SPEC.assign) == 1
    assert holders(built, 4) == [home(0)]
    built.delete([4])
    assert holders(built, 4) == []
    assert built.count() == COUNT - 1


def test_keys_in_two_cells_are_counted_and_found_once(docs: QdrantEdgeCollection) -> None:
    built = laid_out(docs, SHARED)
    home = record_of(built).home
    assert built.count() == COUNT
    assert holders(built, 5) == sorted([home(1), home(2)])
    both = {row for row in range(COUNT) if {*two_cells([row], vectors(1))[0]} & {1, 2}}
    assert set(found(built, 1, 2)) == both
    built.upsert([5], vectors(1, 9), cells=np.array([3]))
    assert holders(built, 5) == [home(3)]
    built.delete([10])
    assert holders(built, 10) == []


def test_what_a_cell_still_has_is_not_believed(docs: QdrantEdgeCollection) -> None:
    """Another program writes and deletes points, and knows nothing of the cells' shards."""
    built = laid_out(docs)
    (query,) = vectors(1, 1)
    built.shard.engine.update(edge.UpdateOperation.delete_points([8]))
    other = (-100.0 * query).tolist()
    built.shard.engine.update(edge.UpdateOperation.clear_payload([12]))
    built.shard.engine.update(edge.UpdateOperation.upsert_points([edge.Point(12, other)]))
    here = found(built, 0)
    assert 8 not in here
    assert here[12] == pytest.approx(float(np.array(other) @ query), rel=1e-4)
    assert built.layouts.backfill(SPEC.assign) == 1
    assert found(built, 0)[12] == pytest.approx(float(np.array(other) @ query), rel=1e-4)


def test_lost_graphs_are_made_again(docs: QdrantEdgeCollection, tmp_path: Path) -> None:
    built = laid_out(docs)
    before = [found(built, cell) for cell in range(N_CELLS)]
    home = record_of(built).home
    graphs_of(built).remove([4, 8], [home(0)])  # as a power failure may leave it
    graphs_of(built).put([4], [[0.0] * DIM], [0], [[home(3)]])
    built.close()
    (folder,) = (tmp_path / "docs" / "amips_cells").iterdir()
    shutil.rmtree(folder / home(2))
    again = reopened(tmp_path)
    assert found(again, 2) == {}
    again.layouts.backfill(SPEC.assign, verify=True)
    assert [found(again, cell) for cell in range(N_CELLS)] == before
    assert holders(again, 4) == [home(0)]
    again.close()


def test_cells_that_share_graphs_are_told(docs: QdrantEdgeCollection) -> None:
    many = replace(SPEC, n_cells=100, graphs=True)
    assert "100 cells share 64 graphs" in docs.layouts.plan(many).notes[-1]
    for other in (replace(many, n_cells=64), replace(many, storage="payload")):
        assert not any("share" in note for note in docs.layouts.plan(other).notes)


def test_a_cell_that_cannot_be_opened_is_told(docs: QdrantEdgeCollection, tmp_path: Path) -> None:
    built = laid_out(docs)
    before, home = found(built, 2), record_of(built).home(2)
    built.close()
    (folder,) = (tmp_path / "docs" / "amips_cells").iterdir()
    shutil.rmtree(folder / home)
    (folder / home).mkdir()
    again = reopened(tmp_path)
    with pytest.raises(CollectionError, match="backfill --verify") as told:
        found(again, 2)
    assert str(folder / home) in str(told.value)
    shutil.rmtree(folder / home)
    again.layouts.backfill(SPEC.assign, verify=True)
    assert found(again, 2) == before
    again.close()


def test_cells_go_with_their_shards(docs: QdrantEdgeCollection, tmp_path: Path) -> None:
    built = laid_out(docs)
    spec = replace(SPEC, layout="def", storage=None)
    assert built.layouts.plan(replace(spec, storage="shards")).n_bytes > (
        built.layouts.plan(spec).n_bytes + COUNT * DIM * 4
    )
    built.layouts.build(spec)
    assert (tmp_path / "docs" / "amips_cells" / "abc").is_dir()
    assert docs.current().layouts.drop_old() == ["abc"]
    assert not (tmp_path / "docs" / "amips_cells" / "abc").exists()


def test_every_cell_has_its_own_effort(
    docs: QdrantEdgeCollection, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = laid_out(docs)
    home, asked = record_of(built).home, {}
    plain = CellGraphs.candidates

    def watched(self: CellGraphs, wanted: Any, *rest: Any) -> Any:
        asked.update(wanted)
        return plain(self, wanted, *rest)

    monkeypatch.setattr(CellGraphs, "candidates", watched)
    cells, efforts = np.array([[0, 2], [2, -1]]), np.array([[64, 16], [32, 64]])
    plan = QueryPlan(cells=cells, layout="abc", effort=64, efforts=efforts)
    request = SearchRequest(vectors(2, 1), k=20)
    built.search(request, plan)
    assert asked == {home(0): {0: 64}, home(2): {0: 20, 1: 32}}  # never less than k
    built.search(replace(request, params={"hnsw_ef": 40}), plan)
    assert asked == {home(0): {0: 64}, home(2): {0: 40, 1: 40}}
    built.search(request, replace(plan, efforts=None))
    assert asked == {home(0): {0: 64}, home(2): {0: 64, 1: 64}}


@pytest.mark.slow
def test_targets_hold_in_the_graphs_of_cells(tmp_path: Path) -> None:
    keys = normalise(clustered_keys(3_000, DIM, clusters=300))
    folder = tmp_path / "docs"
    params = edge.EdgeVectorParams(size=DIM, distance=edge.Distance.Cosine)
    edge.EdgeShard.create(str(folder), edge.EdgeConfig(vectors=params)).close()
    collection = reopened(tmp_path)
    collection.upsert(range(len(keys)), keys)
    options = TrainOptions(
        model="linear", n_cells=8, epochs=4, recall=0.9, k=10, spill=0.27, index="hnsw"
    )
    snapshot = take_snapshot(collection, tmp_path / "snap")
    run = train(snapshot, narrow_queries(6_000, DIM), tmp_path / "run", options)
    bundle = Bundle.in_folder(run.bundle)
    hook = load_hook(bundle)
    built = lay_out(collection, bundle, storage="shards")
    unseen = narrow_queries(300, DIM, seed=9)
    hits = np.argsort(-(normalise(unseen) @ keys.T), axis=1)
    for k, recall in ((1, 0.9), (10, 0.8), (10, 0.9)):
        plan = hook.plan(unseen, Target(k=k, recall=recall))
        assert plan.efforts is not None
        assert plan.efforts.max() == plan.effort
        answers = built.search(SearchRequest(unseen, k=k), plan)
        same = [
            len({hit.id for hit in answer} & {*true})
            for answer, true in zip(answers, hits[:, :k].tolist(), strict=True)
        ]
        assert np.mean(same) / k >= recall - 0.01
    collection.close()


def test_what_is_deleted_meanwhile_is_gone_after_a_rollback(docs: QdrantEdgeCollection) -> None:
    built = laid_out(docs)
    later = laid_out(built, replace(SPEC, layout="def", storage=None))
    later.delete([0, 8])
    later.upsert([4], vectors(1, 9), cells=np.array([3]))
    back = later.layouts.roll_back()
    assert isinstance(back, QdrantEdgeCollection)
    assert holders(back, 0) == holders(back, 8) == holders(back, 4) == []
    assert set(found(back, 0)) == {row for row in range(COUNT) if row % N_CELLS == 0} - {0, 8}


def test_two_objects_of_one_shard(docs: QdrantEdgeCollection, tmp_path: Path) -> None:
    laid_out(docs).close()
    shard = edge.EdgeShard.load(str(tmp_path / "docs"))
    one, other = (QdrantEdgeCollection(shard, tmp_path / "docs") for _ in range(2))
    assert found(one, 0) == found(other, 0)
    other.upsert([4], vectors(1, 9), cells=np.array([3]))
    assert found(one, 3) == found(other, 3)
    shard.close()
    again = edge.EdgeShard.load(str(tmp_path / "docs"))
    third = QdrantEdgeCollection(again, tmp_path / "docs")
    with pytest.raises(DatabaseUnreachable, match="is not closed; close it"):
        found(third, 0)
    one.close()
    assert 4 in found(third, 3)
    third.close()
    again.close()


def test_a_drop_that_is_killed_leaves_nothing_that_looks_like_a_shard(
    docs: QdrantEdgeCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = laid_out(docs)
    built.layouts.roll_back()
    remove = shutil.rmtree

    def half(folder: Path, **_: Any) -> None:
        if folder.is_dir():
            one = min(folder.iterdir())
            remove(one / "segments")
            (one / "edge_config.json").unlink()
            raise Killed

    monkeypatch.setattr(shutil, "rmtree", half)
    assert not attempt(built.layouts.drop_old)
    monkeypatch.undo()
    built.close()
    again = reopened(tmp_path)
    assert again.layouts.status().unfinished == ("abc",)
    assert set(found(laid_out(again), 0)) == {row for row in range(COUNT) if row % N_CELLS == 0}
    again.layouts.roll_back()
    assert again.current().layouts.drop_old() == ["abc"]
    assert list((tmp_path / "docs" / "amips_cells").iterdir()) == []
    again.close()


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Boundaries:
    """Dies once, before or behind the n-th write to a shard or to the metadata."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.behind = -1, False
        for owner, name in (
            (OpenShard, "update"),
            (OpenShard, "write_metadata"),
            (CellGraphs, "put"),
            (CellGraphs, "remove"),
            (CellGraphs, "_create"),
        ):
            monkeypatch.setattr(owner, name, self._guarded(getattr(owner, name)))

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.behind:
                raise Killed
            answer = method(*args, **kwargs)
            if self.left == 0:
                raise Killed
            return answer

        return call

    def each(self, step: int = 1) -> Iterator[None]:
        """Set every boundary in turn, until the work gets through."""
        for number in range(1, 2_000, step):
            for self.behind in (False, True):
                self.left = number
                yield
                if self.left > 0:
                    return
        raise AssertionError("the work never got through")


def attempt(work: Callable[[], object]) -> bool:
    try:
        work()
    except Killed:
        return False
    return True


def check_all(collection: Collection, keys: dict[int, FloatArray]) -> None:
    """Every key is found in its cell, or has none, with the score of its own vector."""
    (query,) = vectors(1, 1)
    assert collection.count() == len(keys)
    everywhere: dict[int, float] = {}
    for cell in range(N_CELLS):
        here = found(collection, cell)
        assert {key for key in here if everywhere.get(key, here[key]) != here[key]} == set()
        everywhere |= here
    assert set(everywhere) == set(keys)
    for key, score in everywhere.items():
        assert score == pytest.approx(float(keys[key] @ query), abs=1e-4)


@pytest.mark.slow
def test_graphs_that_were_never_built_are_built_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def indexed(collection: QdrantEdgeCollection) -> list[bool]:
        shards = [edge_shard(collection, name).info() for name in graphs_of(collection).names()]
        return [one.indexed_vectors_count == one.points_count for one in shards]

    def edge_shard(collection: QdrantEdgeCollection, name: str) -> edge.EdgeShard:
        shard = graphs_of(collection)._shard(name)
        assert shard is not None
        return shard

    def killed(_: CellGraphs) -> None:
        raise Killed

    create(tmp_path / "docs", 400 * N_CELLS)
    collection = reopened(tmp_path)
    monkeypatch.setattr(CellGraphs, "optimize", killed)
    assert not attempt(lambda: collection.layouts.build(SPEC))
    monkeypatch.undo()
    collection.close()
    collection = laid_out(reopened(tmp_path))
    assert indexed(collection) == [True] * N_CELLS
    new = list(range(10_000, 10_400))
    collection.upsert(new, vectors(400, 5), cells=np.zeros(400, dtype=np.int64))
    assert indexed(collection) == [False] + [True] * (N_CELLS - 1)
    collection.close()
    collection = reopened(tmp_path)
    collection.optimize()
    assert indexed(collection) == [True] * N_CELLS
    collection.close()


@pytest.mark.slow
def test_writes_that_are_killed_lose_nothing(
    docs: QdrantEdgeCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    laid_out(docs, SHARED).close()
    keys = dict(enumerate(vectors(COUNT)))
    boundaries = Boundaries(monkeypatch)
    new, gone = vectors(2, 11), COUNT
    for number, _ in enumerate(boundaries.each()):
        ids = [5, 6]
        written = new + np.float32(number)
        cells = np.array([[number % N_CELLS, (number + 1) % N_CELLS], [2, 2]])
        collection = reopened(tmp_path)
        done = attempt(lambda: collection.upsert(ids, written, cells=cells))  # noqa: B023 - used at once
        boundaries.left, left = -1, boundaries.left
        collection.close()
        collection = reopened(tmp_path)
        stored = collection.fetch(ids)
        for key, vector in zip(stored.ids, stored.vectors, strict=True):
            old, now = keys[int(key)], written[ids.index(int(key))]
            assert np.allclose(vector, now) or (np.allclose(vector, old) and not done)
            keys[int(key)] = vector
        check_all(collection, keys)
        collection.close()
        boundaries.left = left
    for _ in boundaries.each():
        gone -= 1
        collection = reopened(tmp_path)
        done = attempt(lambda: collection.delete([gone]))  # noqa: B023
        boundaries.left, left = -1, boundaries.left
        collection.close()
        collection = reopened(tmp_path)
        if done or not len(collection.fetch([gone]).ids):
            del keys[gone]
        check_all(collection, keys)
        collection.close()
        boundaries.left = left


@pytest.mark.slow
def test_a_build_that_is_killed_goes_on_and_finds_everything(
    docs: QdrantEdgeCollection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs.close()
    keys = dict(enumerate(vectors(COUNT)))
    boundaries = Boundaries(monkeypatch)
    original = tmp_path / "original"
    shutil.copytree(tmp_path / "docs", original)
    for _ in boundaries.each(step=9):
        shutil.rmtree(tmp_path / "docs")
        shutil.copytree(original, tmp_path / "docs")
        collection = reopened(tmp_path)
        attempt(lambda: collection.layouts.build(SHARED))  # noqa: B023
        boundaries.left, left = -1, boundaries.left
        collection.close()
        collection = reopened(tmp_path)
        if collection.layout() is None:
            assert collection.count() == COUNT
            collection = laid_out(collection, SHARED)
        check_all(collection, keys)
        status = collection.layouts.status()
        assert (status.layout, status.unfinished, status.overflow) == ("abc", (), 0)
        collection.close()
        boundaries.left = left
