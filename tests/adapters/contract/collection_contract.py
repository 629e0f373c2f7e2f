"""What every collection adapter promises. An adapter's test class brings one factory.

The reference is ``MemoryCollection``; scores are compared in the database's own convention.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.cell_layout import AssignCells, CellIndex, LayoutSpec, Storage
from amips_plugins.collection import Collection, Hit, Id, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.partitions import Partitions
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, IntArray, Metric, normalise

DIM = 8
COUNT = 60


def vectors(seed: int = 0, count: int = COUNT) -> FloatArray:
    """Vectors of different lengths, so that IP, cosine and L2 rank differently."""
    rng = np.random.default_rng(seed)
    array = rng.standard_normal((count, DIM)) * rng.uniform(0.5, 2.0, (count, 1))
    return array.astype(np.float32)


def cells_of(ids: Sequence[Id]) -> np.typing.NDArray[np.int64]:
    """A made-up partition into four cells that depends on the id alone."""
    return np.array(
        [uuid.uuid5(uuid.NAMESPACE_OID, str(key)).int % 4 for key in ids], dtype=np.int64
    )


GROUPS = [{"group": "new"}] * 8


def found_in(collection: Collection, cell: int, layout: str = "abc123") -> dict[Id, float]:
    """Ids and scores (of one query) that a search of one cell finds, overflow included."""
    plan = QueryPlan(cells=np.array([[cell]]), layout=layout)
    (hits,) = collection.search(SearchRequest(vectors(1, 1), k=COUNT * 2), plan)
    assert len({hit.id for hit in hits}) == len(hits)
    return {hit.id: hit.score for hit in hits}


def everywhere(collection: Collection, layout: str = "abc123") -> list[Id]:
    """Ids as often as a cell finds them; for a collection without overflow."""
    return sorted(key for cell in range(4) for key in found_in(collection, cell, layout))


class CollectionContract:
    """Inherit, and override ``make`` and what the database does differently."""

    metrics: tuple[Metric, ...] = (Metric.IP, Metric.COSINE, Metric.L2)
    l2_scores_are_squared = True
    string_ids: tuple[str, ...] = tuple(f"doc-{row:03d}" for row in range(COUNT))
    """String ids this database accepts, sorted as the database sorts them."""

    storage: Storage | None = None
    index: CellIndex = "flat"
    """How the cells are stored, where the database has a choice."""

    shares_keys = True
    """Whether a key may lie in several cells."""

    brought_back = 1
    """Whether what was written since is in what a rollback returns; without an alias it is not."""

    shared_sketches: bool | None = None
    """Whether a sketch lies beside the cells of keys in several; None: where it does of others."""

    sketches = True
    """Whether a sketch of its vector lies beside a key's cell; else cells are computed again."""

    def spec(
        self, layout: str = "abc123", n_cells: int = 4, assign: AssignCells | None = None
    ) -> LayoutSpec:
        chosen = assign or (lambda ids, _: cells_of(ids) % n_cells)
        return LayoutSpec(
            layout, n_cells, chosen, version="v1", storage=self.storage, index=self.index
        )

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        """A collection of these keys with a stored text field ``group``."""
        raise NotImplementedError

    def group_filter(self, group: str) -> Any:
        """The database's own filter for ``group == ...``."""
        raise NotImplementedError

    def add_without_cell(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        """Upsert keys as another client does, who knows nothing of cells."""
        raise NotImplementedError

    def rewrite_in_place(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        """Change vectors as a client does who leaves everything else of the keys alone."""
        pytest.skip("No client of this database can do that.")

    def search_async(
        self, collection: Collection, request: SearchRequest, plan: QueryPlan
    ) -> list[list[Hit]]:
        """What ``collection.search_async`` answers through an asynchronous client."""
        pytest.skip("This database has no asynchronous client.")

    def build(self, metric: Metric = Metric.COSINE, ids: Sequence[Id] | None = None) -> Collection:
        chosen = list(range(COUNT)) if ids is None else ids
        return self.make(vectors(), chosen, metric, [f"g{row % 3}" for row in range(COUNT)])

    def reference(self, metric: Metric) -> MemoryCollection:
        return MemoryCollection(vectors(), list(range(COUNT)), metric)

    def scores(self, reference: Sequence[float], metric: Metric) -> list[float]:
        if metric is Metric.L2 and not self.l2_scores_are_squared:
            return [score**0.5 for score in reference]
        return list(reference)

    def test_info_names_metric_and_dimension(self) -> None:
        for metric in self.metrics:
            info = self.build(metric).info
            assert (info.metric, info.dim) == (metric, DIM)

    def test_count(self) -> None:
        assert self.build().count() == COUNT

    def test_fetch_reads_those_that_are_there(self) -> None:
        built = self.build()
        whole = {
            key: row for b in built.scan(100) for key, row in zip(b.ids, b.vectors, strict=True)
        }
        found = built.fetch([5, 10_000, 0])
        assert set(found.ids) == {5, 0}
        np.testing.assert_array_equal(found.vectors, [whole[key] for key in found.ids])
        nothing = built.fetch([10_000])
        assert (list(nothing.ids), nothing.vectors.shape) == ([], (0, DIM))
        named = self.build(ids=self.string_ids)
        assert list(named.fetch(self.string_ids[:1]).ids) == [self.string_ids[0]]

    def test_native_search_equals_the_reference(self) -> None:
        queries = vectors(seed=1, count=5)
        for metric in self.metrics:
            found = self.build(metric).search(SearchRequest(queries, k=7))
            expected = self.reference(metric).search(SearchRequest(queries, k=7))
            for hits, wanted in zip(found, expected, strict=True):
                assert [hit.id for hit in hits] == [hit.id for hit in wanted]
                np.testing.assert_allclose(
                    [hit.score for hit in hits],
                    self.scores([hit.score for hit in wanted], metric),
                    rtol=1e-4,
                    atol=1e-5,
                )

    def test_the_exact_search_looks_at_every_key(self) -> None:
        queries = vectors(seed=1, count=5)
        for metric in self.metrics:
            for collection in (self.build(metric), self.laid_out(metric)):
                found = collection.exact(SearchRequest(queries, k=7))
                by_codes = self.index == "ivf_sq8" and collection.layout() is not None
                assert collection.exhaustive != by_codes
                expected = self.reference(metric).search(SearchRequest(queries, k=7))
                for hits, wanted in zip(found, expected, strict=True):
                    assert [hit.id for hit in hits] == [hit.id for hit in wanted]
                    np.testing.assert_allclose(
                        [hit.score for hit in hits],
                        self.scores([hit.score for hit in wanted], metric),
                        rtol=1e-4,
                        atol=1e-5,
                    )

    def test_the_exact_search_leaves_parameters_aside(self) -> None:
        collection = self.build()
        odd = SearchRequest(vectors(1, 2), k=5, params={"no such parameter": 1})
        fields = SearchRequest(
            vectors(1, 2), k=5, filter=self.group_filter("g1"), fields=("group",)
        )
        assert [[h.id for h in hits] for hits in collection.exact(odd)] == [
            [h.id for h in hits] for hits in collection.search(SearchRequest(vectors(1, 2), k=5))
        ]
        for hits in collection.exact(fields):
            assert {hit.fields["group"] for hit in hits} == {"g1"}

    def test_k_over_the_count_returns_every_key(self) -> None:
        hits = self.build().search(SearchRequest(vectors(1, 1), k=COUNT + 5))[0]
        assert sorted(hit.id for hit in hits) == list(range(COUNT))

    def test_filter_and_fields(self) -> None:
        request = SearchRequest(
            vectors(1, 2), k=5, filter=self.group_filter("g1"), fields=("group",)
        )
        for hits in self.build().search(request):
            assert len(hits) == 5
            assert {hit.fields["group"] for hit in hits} == {"g1"}
            assert all(int(hit.id) % 3 == 1 for hit in hits)

    def test_fields_hold_only_what_was_asked_for(self) -> None:
        hit = self.build().search(SearchRequest(vectors(1, 1), k=1))[0][0]
        assert dict(hit.fields) == {}

    def test_scan_reads_every_key_once(self) -> None:
        for metric in self.metrics:
            batches = list(self.build(metric).scan(batch_size=16))
            ids = [key for batch in batches for key in batch.ids]
            read = np.concatenate([batch.vectors for batch in batches])
            assert ids == list(range(COUNT))
            assert max(len(batch.ids) for batch in batches) <= 16
            if metric is Metric.COSINE:  # some databases store unit vectors
                np.testing.assert_allclose(normalise(read), normalise(vectors()), atol=1e-6)
            else:
                np.testing.assert_allclose(read, vectors(), atol=1e-6)

    def test_scan_goes_on_behind_a_cursor(self) -> None:
        collection = self.build()
        first = next(iter(collection.scan(batch_size=16)))
        rest = [key for batch in collection.scan(16, after=first.cursor) for key in batch.ids]
        assert [*first.ids, *rest] == list(range(COUNT))

    def test_fetch_reads_the_keys_that_are_there(self) -> None:
        collection = self.build(Metric.IP)
        found = collection.fetch([7, 4711, 3])
        assert sorted(found.ids) == [3, 7]
        rows = dict(zip(found.ids, found.vectors, strict=True))
        np.testing.assert_allclose([rows[3], rows[7]], vectors()[[3, 7]], atol=1e-6)
        none = collection.fetch([4711])
        assert (list(none.ids), none.vectors.shape) == ([], (0, DIM))

    def test_string_ids(self) -> None:
        collection = self.build(ids=self.string_ids)
        scanned = [key for batch in collection.scan(batch_size=16) for key in batch.ids]
        assert scanned == list(self.string_ids)
        hits = collection.search(SearchRequest(vectors(), k=1))
        assert [found[0].id for found in hits] == list(self.string_ids)

    def test_cursor_of_string_ids(self) -> None:
        collection = self.build(ids=self.string_ids)
        first = next(iter(collection.scan(batch_size=16)))
        rest = [key for batch in collection.scan(16, after=first.cursor) for key in batch.ids]
        assert [*first.ids, *rest] == list(self.string_ids)

    def test_rewritten_queries_choose_and_original_queries_score(self) -> None:
        queries, rewritten = vectors(1, 3), vectors(2, 3)
        plan = QueryPlan(rewritten=rewritten, rescore=9)
        for metric in self.metrics:
            found = self.build(metric).search(SearchRequest(queries, k=4, fields=("group",)), plan)
            expected = self.reference(metric).search(SearchRequest(queries, k=4), plan)
            for hits, wanted in zip(found, expected, strict=True):
                assert [hit.id for hit in hits] == [hit.id for hit in wanted]
                np.testing.assert_allclose(
                    [hit.score for hit in hits],
                    self.scores([hit.score for hit in wanted], metric),
                    rtol=1e-4,
                    atol=1e-5,
                )
                assert [dict(hit.fields) for hit in hits] == [
                    {"group": f"g{int(hit.id) % 3}"} for hit in hits
                ]

    def test_a_rewritten_search_respects_the_filter(self) -> None:
        plan = QueryPlan(rewritten=vectors(2, 3), rescore=9)
        request = SearchRequest(vectors(1, 3), k=4, filter=self.group_filter("g2"))
        for hits in self.build().search(request, plan):
            assert len(hits) == 4
            assert all(int(hit.id) % 3 == 2 for hit in hits)

    def laid_out(self, metric: Metric = Metric.COSINE) -> Collection:
        return self.build(metric).layouts.build(self.spec())

    def fresh(self, metric: Metric = Metric.COSINE) -> Collection:
        """What ``build`` makes, for a test that writes to it."""
        return self.build(metric)

    def fresh_laid_out(self, metric: Metric = Metric.COSINE) -> Collection:
        return self.fresh(metric).layouts.build(self.spec())

    def test_without_cells_there_is_no_layout(self) -> None:
        assert self.build().layout() is None

    def test_laying_out_keeps_every_key(self) -> None:
        collection = self.laid_out()
        assert collection.layout() == "abc123"
        assert collection.count() == COUNT
        hits = collection.search(SearchRequest(vectors(), k=1, fields=("group",)))
        assert [found[0].id for found in hits] == list(range(COUNT))
        assert [found[0].fields["group"] for found in hits] == [f"g{r % 3}" for r in range(COUNT)]

    def test_a_search_finds_the_keys_of_its_cells_only(self) -> None:
        queries = vectors(1, 4)
        cells = np.array([[0, 2], [1, -1], [3, 0], [2, 0]], dtype=np.int64)
        plan = QueryPlan(cells=cells, layout="abc123")
        for metric in self.metrics:
            found = self.laid_out(metric).search(SearchRequest(queries, k=COUNT), plan)
            expected = self.reference(metric).search(SearchRequest(queries, k=COUNT))
            for row, (hits, everything) in enumerate(zip(found, expected, strict=True)):
                wanted = [hit.id for hit in everything if cells_of([hit.id])[0] in cells[row]]
                assert [hit.id for hit in hits] == wanted

    def test_all_cells_are_the_native_search(self) -> None:
        collection = self.laid_out()
        request = SearchRequest(vectors(1, 3), k=10)
        plan = QueryPlan(cells=np.tile(np.arange(4), (3, 1)), layout="abc123")
        assert [[h.id for h in hits] for hits in collection.search(request, plan)] == [
            [h.id for h in hits] for hits in collection.search(request)
        ]

    def test_cells_are_anded_with_the_filter(self) -> None:
        request = SearchRequest(vectors(1, 1), k=COUNT, filter=self.group_filter("g0"))
        plan = QueryPlan(cells=np.array([[1, 3]]), layout="abc123")
        ids = [hit.id for hit in self.laid_out().search(request, plan)[0]]
        assert sorted(ids) == [r for r in range(0, COUNT, 3) if cells_of([r])[0] in (1, 3)]

    def test_keys_without_a_cell_are_always_found(self) -> None:
        collection = self.fresh_laid_out()
        new = vectors(seed=3, count=2)
        self.add_without_cell(collection, [1000, 1001], new)
        for cell in range(4):
            plan = QueryPlan(cells=np.full((2, 1), cell), layout="abc123")
            hits = collection.search(SearchRequest(new, k=1), plan)
            assert [found[0].id for found in hits] == [1000, 1001]
        assert collection.count() == COUNT + 2

    def test_cells_of_another_layout_are_refused(self) -> None:
        plan = QueryPlan(cells=np.array([[0]]), layout="other")
        for collection in (self.build(), self.laid_out()):
            with pytest.raises(InvalidInput, match="layout"):
                collection.search(SearchRequest(vectors(1, 1), k=1), plan)

    def test_a_batch_of_different_cells_is_the_sum_of_its_queries(self) -> None:
        collection = self.laid_out()
        rng = np.random.default_rng(4)
        for count in (3, 12):
            queries = vectors(1, count)
            cells = np.where(rng.random((count, 4)) < 0.5, np.arange(4), -1)
            together = collection.search(
                SearchRequest(queries, k=20), QueryPlan(cells=cells, layout="abc123")
            )
            for row, hits in enumerate(together):
                plan = QueryPlan(cells=cells[row : row + 1], layout="abc123")
                (alone,) = collection.search(SearchRequest(queries[row : row + 1], k=20), plan)
                assert [hit.id for hit in hits] == [hit.id for hit in alone]

    def test_cells_that_hold_most_keys_are_not_worth_a_filter(self) -> None:
        collection = self.laid_out()
        shares = np.array([collection.break_even + 0.1, 0.0], dtype=np.float32)
        plan = QueryPlan(cells=np.array([[0], [0]]), layout="abc123", shares=shares)
        everything, cell = collection.search(SearchRequest(vectors(1, 2), k=COUNT), plan)
        assert len(everything) == COUNT
        assert {hit.id for hit in cell} == {r for r in range(COUNT) if cells_of([r])[0] == 0}

    def searches(self, collection: Collection) -> list[tuple[SearchRequest, QueryPlan]]:
        """Everything that a request and a plan can say, for a collection laid out."""
        queries, rewritten = vectors(1, 3), vectors(2, 3)
        one, filtered = queries[:1], self.group_filter("g1")
        cells = np.array([[0, 2], [1, -1], [3, 0]], dtype=np.int64)
        shares = np.array([collection.break_even + 0.1, 0.0, 0.1], dtype=np.float32)
        layout = "abc123"
        plans = [
            QueryPlan(),
            QueryPlan(rewritten=rewritten, rescore=9),
            QueryPlan(cells=cells, layout=layout),
            QueryPlan(cells=cells, layout=layout, shares=shares),
            QueryPlan(cells=cells, layout=layout, rewritten=rewritten, rescore=9),
        ]
        asked = [
            (SearchRequest(queries, 5, condition, fields, timeout=timeout), plan)
            for condition, fields, timeout in ((None, (), None), (filtered, ("group",), 30.0))
            for plan in plans
        ]
        single = QueryPlan(cells=cells[:1], layout=layout)
        return [
            *asked,
            (SearchRequest(one, COUNT + 5), QueryPlan()),
            (SearchRequest(one, 7), single),
        ]

    def test_an_awaited_search_equals_a_blocking_one(self) -> None:
        for metric in self.metrics:
            collection = self.laid_out(metric)
            for request, plan in self.searches(collection):
                found = collection.search(request, plan)
                awaited = self.search_async(collection, request, plan)
                assert len(found) == len(awaited) == len(request.queries)
                assert any(found)
                for hits, others in zip(found, awaited, strict=True):
                    assert [(hit.id, hit.fields) for hit in hits] == [
                        (hit.id, hit.fields) for hit in others
                    ]
                    scores = [hit.score for hit in others]  # sums of floats in another order
                    assert [hit.score for hit in hits] == pytest.approx(scores, rel=1e-5)

    def test_an_awaited_search_refuses_what_a_blocking_one_does(self) -> None:
        collection, one = self.laid_out(), vectors(1, 1)
        other = QueryPlan(cells=np.array([[0]]), layout="other")
        with pytest.raises(InvalidInput, match="layout"):
            self.search_async(collection, SearchRequest(one, k=1), other)

    def test_writing_to_a_collection_without_cells(self) -> None:
        collection = self.fresh(Metric.IP)
        collection.upsert([1000], vectors(3, 1), [{"group": "new"}])
        collection.upsert([7], vectors(3, 2)[1:], [{"group": "changed"}])
        assert collection.count() == COUNT + 1
        hits = collection.search(SearchRequest(vectors(3, 2), k=COUNT + 1, fields=("group",)))
        groups = {hit.id: hit.fields["group"] for hit in hits[0]}
        assert (groups[1000], groups[7], groups[8]) == ("new", "changed", "g2")
        collection.delete([1000, 8, 4711])
        assert collection.count() == COUNT - 1
        assert collection.overflow() == 0
        with pytest.raises(InvalidInput, match="no cells"):
            collection.upsert([1], vectors(3, 1), cells=np.array([0]))
        with pytest.raises(InvalidInput, match="no cells"):
            collection.layouts.backfill(self.spec().assign)

    def test_writing_keys_that_cannot_be(self) -> None:
        collection = self.fresh_laid_out()
        one = vectors(3, 1)
        bad: list[tuple[list[Id], FloatArray, Any, Any, str]] = [
            ([1, 1], vectors(3, 2), None, None, "twice"),
            ([1], vectors(3, 2), None, None, "shape"),
            ([1], one[:, :-1], None, None, "shape"),
            ([1], one, [{}, {}], None, "fields"),
            ([1], one, None, np.array([1, 2]), "cells"),
        ]
        for ids, keys, fields, cells, reason in bad:
            with pytest.raises(InvalidInput, match=reason):
                collection.upsert(ids, keys, fields, cells)
        assert everywhere(collection) == list(range(COUNT))

    def test_a_key_written_with_a_cell_is_there_and_nowhere_else(self) -> None:
        collection = self.fresh_laid_out()
        collection.upsert([1000, 1001], vectors(3, 2), GROUPS[:2], np.array([2, 0]))
        assert collection.count() == COUNT + 2
        assert collection.overflow() == 0
        assert everywhere(collection) == [*range(COUNT), 1000, 1001]
        assert 1000 in found_in(collection, 2)
        assert 1001 in found_in(collection, 0)

    def test_a_key_that_moves_leaves_no_copy_behind(self) -> None:
        collection = self.fresh_laid_out(Metric.IP)
        moved = list(range(8))
        cells = (cells_of(moved) + np.array([0, 1, 2, 3] * 2)) % 4
        collection.upsert(moved, vectors(3, 8), GROUPS, cells)
        assert collection.count() == COUNT
        assert everywhere(collection) == list(range(COUNT))
        scores = vectors(3, 8) @ vectors(1, 1)[0]
        for key, cell, score in zip(moved, cells, scores, strict=True):
            assert found_in(collection, cell)[key] == pytest.approx(score, rel=1e-4)

    def test_a_key_may_lose_its_cell_and_a_deleted_key_is_in_none(self) -> None:
        collection = self.fresh_laid_out()
        collection.upsert([3], vectors(3, 1), GROUPS[:1])
        assert collection.overflow() == 1
        assert all(3 in found_in(collection, cell) for cell in range(4))
        collection.delete([3, 4])
        assert collection.overflow() == 0
        assert collection.count() == COUNT - 2
        assert everywhere(collection) == [key for key in range(COUNT) if key not in (3, 4)]

    def test_backfill_gives_the_overflow_its_cells(self) -> None:
        collection = self.fresh_laid_out(Metric.IP)
        assert collection.layouts.backfill(self.spec().assign) == 0
        others = [5, 6, 1000, 1001, 1002]  # two of them are there already
        new = vectors(3, len(others))
        self.add_without_cell(collection, others, new)
        assert collection.overflow() == len(others)
        assert collection.layouts.status().overflow == len(others)
        assert collection.layouts.backfill(self.spec().assign) == len(others)
        assert collection.overflow() == 0
        assert collection.count() == COUNT + 3
        assert everywhere(collection) == [*range(COUNT), 1000, 1001, 1002]
        for key, score in zip(others, new @ vectors(1, 1)[0], strict=True):
            assert found_in(collection, cells_of([key])[0])[key] == pytest.approx(score, rel=1e-4)

    def shared_spec(self) -> LayoutSpec:
        """Keys whose id is a multiple of three lie in two cells."""

        def assign(ids: Sequence[Id], _: FloatArray) -> IntArray:
            own, number = cells_of(ids), np.array([int(key) for key in ids])
            return np.stack([own, np.where(number % 3 == 0, (own + 1) % 4, own)], axis=1)

        return replace(self.spec(assign=assign), shared=True)

    def check_shared(self, collection: Collection, keys: Sequence[int]) -> None:
        """Every key lies in its cells, and is one key everywhere."""
        assert collection.count() == len(keys)
        assert collection.overflow() == collection.layouts.status().overflow == 0
        members = dict(zip(keys, self.shared_spec().assign(keys, vectors()), strict=True))
        for cell in range(4):
            wanted = [key for key, own in members.items() if cell in own]
            assert sorted(found_in(collection, cell)) == sorted(wanted)
        plan = QueryPlan(cells=np.array([[0, 1, -1], [1, 2, 3], [3, -1, -1]]), layout="abc123")
        answers = collection.search(SearchRequest(vectors(1, 3), k=2 * COUNT), plan)
        for hits, chosen in zip(answers, plan.cells if plan.cells is not None else (), strict=True):
            wanted = [key for key, own in members.items() if set(own) & set(chosen)]
            assert sorted(hit.id for hit in hits) == sorted(wanted)  # none of them twice

    def test_keys_may_lie_in_more_than_one_cell(self) -> None:
        collection = self.fresh(Metric.IP)
        if not self.shares_keys:
            for work in (collection.layouts.plan, collection.layouts.build):
                with pytest.raises(InvalidInput, match="--spill 0"):
                    work(self.shared_spec())
            assert collection.layout() is None
            return
        collection = collection.layouts.build(self.shared_spec())
        self.check_shared(collection, range(COUNT))
        everything = QueryPlan(cells=np.arange(4)[None, :], layout="abc123")
        request = SearchRequest(vectors(1, 1), k=10)
        assert collection.search(request, everything) == collection.search(request)
        audit = collection.layouts.audit(COUNT)
        assert (audit.sampled, audit.stale) == (COUNT, 0)
        again = self.shared_spec()
        assert collection.layouts.backfill(again.assign, verify=True) == 0
        self.check_shared(collection, range(COUNT))

    def test_keys_in_several_cells_are_written_and_deleted_as_one(self) -> None:
        if not self.shares_keys:
            pytest.skip("No key lies in several cells here.")
        spec = self.shared_spec()
        collection = self.fresh(Metric.IP).layouts.build(spec)
        new = [0, 6, 1, 99, 100]  # some are there already, in one cell or in two
        keys = vectors(3, len(new))
        collection.upsert(new, keys, GROUPS[: len(new)], spec.assign(new, keys))
        self.check_shared(collection, [*range(COUNT), 99, 100])
        scores = keys @ vectors(1, 1)[0]
        for key, own, score in zip(new, spec.assign(new, keys), scores, strict=True):
            for cell in own:
                assert found_in(collection, cell)[key] == pytest.approx(score, rel=1e-4)
        collection.upsert([100], keys[:1], GROUPS[:1], np.array([2]))  # one cell is enough
        assert all((100 in found_in(collection, cell)) == (cell == 2) for cell in range(4))
        collection.delete([0, 1, 99, 100])
        self.check_shared(collection, [key for key in range(COUNT) if key not in (0, 1)])

    def test_overflow_beside_keys_in_several_cells_gets_all_its_cells(self) -> None:
        if not self.shares_keys:
            pytest.skip("No key lies in several cells here.")
        spec = self.shared_spec()
        collection = self.fresh(Metric.IP).layouts.build(spec)
        others = [6, 7, 300]
        self.add_without_cell(collection, others, vectors(3, len(others)))
        assert collection.overflow() == 3
        for cell in range(4):
            assert set(others) <= set(found_in(collection, cell))
        assert collection.layouts.backfill(spec.assign) == 3
        self.check_shared(collection, [*range(COUNT), 300])
        if self.sketches if self.shared_sketches is None else self.shared_sketches:
            self.rewrite_in_place(collection, [9, 10], vectors(4, 2))
            assert collection.layouts.audit(COUNT + 1).stale == 2
            assert collection.layouts.backfill(spec.assign, verify=True) == 2
            self.check_shared(collection, [*range(COUNT), 300])
        rolled = collection.layouts.roll_back()
        assert (rolled.layout(), rolled.count()) == (None, COUNT + self.brought_back)

    def by_sign(self) -> LayoutSpec:
        """Two cells that depend on the vector alone."""
        return LayoutSpec(
            "abc123",
            2,
            lambda _, keys: (keys[:, 0] > 0).astype(np.int64),
            version="v1",
            storage=self.storage,
        )

    def test_an_audit_of_sound_cells_finds_none_stale(self) -> None:
        for metric in self.metrics:
            collection = self.fresh(metric).layouts.build(self.by_sign())
            audit = collection.layouts.audit(COUNT, self.by_sign().assign)
            assert (audit.sampled, audit.stale) == (COUNT, 0)
            assert 0 < audit.share_at_most < 0.06
            judge = None if self.sketches else self.by_sign().assign
            assert collection.layouts.audit(7, judge).sampled == 7
            assert collection.layouts.backfill(self.by_sign().assign, verify=True) == 0

    def test_an_audit_of_no_cells_is_refused(self) -> None:
        with pytest.raises(InvalidInput, match="no cells"):
            self.build().layouts.audit(10)

    def test_a_vector_that_changed_under_its_cell_is_found_and_mended(self) -> None:
        spec = self.by_sign()
        judge = None if self.sketches else spec.assign
        for verify in (False, True):
            collection = self.fresh(Metric.IP).layouts.build(spec)
            changed = list(range(0, COUNT, 3))
            new = vectors(3, len(changed))
            self.rewrite_in_place(collection, changed, new)
            audit = collection.layouts.audit(COUNT, judge)
            if self.sketches:
                stale = len(changed)
            else:  # as many as have another cell now
                stale = int(((vectors()[changed] > 0) != (new > 0))[:, 0].sum())
            assert (audit.sampled, audit.stale) == (COUNT, stale)
            given = collection.layouts.backfill(spec.assign, verify=verify)
            assert given + collection.overflow() == stale  # placed again, or found by every search
            assert given == stale or not verify
            assert collection.layouts.audit(COUNT, judge).stale == 0
            plan = QueryPlan(cells=(new[:, :1] > 0).astype(np.int64), layout="abc123")
            found = collection.search(SearchRequest(new, COUNT), plan)
            assert all(
                key in {hit.id for hit in hits} for key, hits in zip(changed, found, strict=True)
            )

    def test_a_plan_of_a_layout_changes_nothing(self) -> None:
        collection = self.fresh()
        plan = collection.layouts.plan(self.spec())
        assert plan.keys == COUNT
        assert plan.n_bytes > 0
        assert plan.steps
        assert collection.current().layout() is None
        status = collection.layouts.status()
        assert (status.layout, status.count, status.unfinished) == (None, COUNT, ())
        self.check_finished(self.laid_out())
        for bad in (self.spec("No good"), replace(self.spec(), n_cells=0)):
            with pytest.raises(InvalidInput):
                collection.layouts.plan(bad)

    def check_finished(self, collection: Collection) -> None:
        """What a plan says of cells that are there already."""
        with pytest.raises(InvalidInput, match="already"):
            collection.layouts.plan(self.spec())

    def test_status_names_the_cells_and_the_bundle(self) -> None:
        status = self.laid_out().layouts.status()
        assert (status.layout, status.version) == ("abc123", "v1")
        assert (status.count, status.overflow) == (COUNT, 0)
        assert status.storage

    def test_new_cells_roll_back_to_the_old_ones(self) -> None:
        first = self.fresh_laid_out()
        second = first.layouts.build(self.spec("def456", 2))
        assert second.layout() == "def456"
        assert second.count() == COUNT
        assert len(found_in(second, 0, "def456")) + len(found_in(second, 1, "def456")) == COUNT
        assert second.layouts.status().older
        back = second.layouts.roll_back()
        assert back.layout() == "abc123"
        assert everywhere(back) == list(range(COUNT))

    def test_what_is_old_can_be_dropped(self) -> None:
        second = self.fresh_laid_out().layouts.build(
            LayoutSpec("def456", 2, lambda i, _: cells_of(i) % 2)
        )
        assert second.layouts.drop_old()
        assert second.layouts.status().older == ()
        assert second.count() == COUNT
        with pytest.raises(InvalidInput, match="roll back"):
            second.layouts.roll_back()

    def test_a_build_goes_on_after_an_interruption(self) -> None:
        collection = self.fresh()
        seen: list[int] = []

        def interrupted(ids: Sequence[Id], _: FloatArray) -> np.typing.NDArray[np.int64]:
            seen.append(len(ids))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            collection.layouts.build(self.spec(assign=interrupted))
        assert collection.current().layout() is None
        assert collection.count() == COUNT
        built = collection.layouts.build(self.spec())
        assert everywhere(built) == list(range(COUNT))
        assert built.layouts.status().unfinished == ()

    def test_what_others_write_during_a_build_is_in_it(self) -> None:
        collection = self.fresh(Metric.IP)
        new = vectors(3, 3)
        done: list[bool] = []

        def meddled(ids: Sequence[Id], _: FloatArray) -> np.typing.NDArray[np.int64]:
            if not done:
                done.append(True)
                self.add_without_cell(collection, [1000, 2, 57], new)
                collection.delete([3, 56])
            return cells_of(ids)

        built = collection.layouts.build(self.spec(assign=meddled))
        kept = [key for key in range(COUNT) if key not in (3, 56)]
        (hits,) = built.search(SearchRequest(vectors(1, 1), k=COUNT * 2))
        scores = {hit.id: hit.score for hit in hits}
        assert sorted(scores) == [*kept, 1000]
        for key, score in zip([1000, 2, 57], new @ vectors(1, 1)[0], strict=True):
            assert scores[key] == pytest.approx(score, rel=1e-4)
        cells = [found_in(built, cell) for cell in range(4)]
        assert {key for found in cells for key in found} == {*kept, 1000}

    def test_looking_again_finds_nothing_new(self) -> None:
        for collection in (self.build(), self.laid_out()):
            again = collection.current()
            assert (again.layout(), again.info) == (collection.layout(), collection.info)

    def test_close_twice(self) -> None:
        collection = self.build()
        collection.close()
        collection.close()

    def test_leaving_a_block_closes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        collection = self.build()
        closed: list[bool] = []
        monkeypatch.setattr(type(collection), "close", lambda _: closed.append(True))
        with collection as entered:
            assert entered is collection
            assert not closed
        assert closed == [True]

    def in_groups(self, collection: Collection, *groups: str) -> Collection:
        """The same collection in the values of its field ``group``, of which these are known."""
        return collection.partitioned(Partitions("group", groups or ("g0", "g1", "g2")))

    def test_the_values_of_a_field_are_cells(self) -> None:
        for metric in self.metrics:
            built = self.build(metric)
            seen = self.in_groups(built)
            layout = seen.layout()
            assert (built.layout(), built.partitions) == (None, None)
            assert layout is not None
            assert seen.overflow() == 0
            for cell in range(3):
                found = found_in(seen, cell, layout)
                assert sorted(found) == list(range(cell, COUNT, 3))
                (everything,) = built.search(SearchRequest(vectors(1, 1), k=COUNT))
                scores = {hit.id: hit.score for hit in everything}
                for key, score in found.items():
                    assert score == pytest.approx(scores[key], rel=1e-4, abs=1e-5)

    def test_keys_of_other_values_are_always_found(self) -> None:
        seen = self.in_groups(self.build(), "g2", "g0")
        layout = seen.layout()
        assert layout is not None
        assert seen.overflow() == COUNT // 3
        others = set(range(1, COUNT, 3))
        assert set(found_in(seen, 0, layout)) == others | set(range(2, COUNT, 3))
        assert set(found_in(seen, 1, layout)) == others | set(range(0, COUNT, 3))

    def test_keys_that_came_later_are_always_found(self) -> None:
        collection = self.fresh()
        seen = self.in_groups(collection)
        layout = seen.layout()
        assert layout is not None
        self.add_without_cell(collection, [100, 0], vectors(9, 2))
        assert seen.current() is seen
        assert seen.overflow() == 2
        assert set(found_in(seen, 1, layout)) == {100, 0, *range(1, COUNT, 3)}
        sizes = seen.layouts.status().sizes
        assert sizes == (COUNT // 3 - 1, COUNT // 3, COUNT // 3)

    def test_a_filter_of_the_same_field_is_an_intersection(self) -> None:
        seen = self.in_groups(self.build())
        layout = seen.layout()
        plan = QueryPlan(cells=np.array([[0, 1], [2, -1]]), layout=layout)
        request = SearchRequest(vectors(1, 2), COUNT, filter=self.group_filter("g1"))
        one, other = seen.search(request, plan)
        assert sorted(hit.id for hit in one) == list(range(1, COUNT, 3))
        assert other == []

    def test_a_batch_searches_the_values_of_each_query(self) -> None:
        seen = self.in_groups(self.build())
        rng = np.random.default_rng(0)
        cells = np.stack([rng.permutation(3)[:2] for _ in range(20)])
        cells[::3, 1] = -1
        plan = QueryPlan(cells=cells, layout=seen.layout())
        found = seen.search(SearchRequest(vectors(1, 20), COUNT), plan)
        for hits, row in zip(found, cells.tolist(), strict=True):
            assert {int(hit.id) % 3 for hit in hits} == {cell for cell in row if cell >= 0}

    def test_reading_says_where_each_key_belongs(self) -> None:
        for ids in (list(range(COUNT)), list(self.string_ids)):
            seen = self.in_groups(self.build(ids=ids))
            batches = list(seen.scan(7))
            belongs = {
                key: value
                for batch in batches
                for key, value in zip(batch.ids, batch.values or (), strict=True)
            }
            assert belongs == {key: f"g{row % 3}" for row, key in enumerate(ids)}
            after = [b.ids for b in seen.scan(7, after=batches[1].cursor)]
            assert after[0][0] == batches[2].ids[0]
            plain = next(iter(self.build(ids=ids).scan(7)))
            assert plain.values is None

    def test_given_partitions_are_nothing_to_lay_out(self) -> None:
        built = self.build()
        seen = self.in_groups(built)
        assert seen.layouts.audit(10).sampled == 0
        assert seen.layouts.drop_old() == []
        for refused in (
            lambda: seen.layouts.build(self.spec()),
            lambda: seen.layouts.plan(self.spec()),
            lambda: seen.layouts.backfill(lambda ids, _: cells_of(ids)),
            seen.layouts.roll_back,
        ):
            with pytest.raises(InvalidInput, match="nothing to lay out"):
                refused()
        assert seen.partitioned(None).layout() == built.layout()
        plan = QueryPlan(cells=np.array([[0]]), layout="x")
        with pytest.raises(InvalidInput, match="layout"):
            seen.search(SearchRequest(vectors(1, 1), 3), plan)

    def test_there_is_nothing_to_tell_apart_without_a_name(self) -> None:
        with pytest.raises(InvalidInput, match="name"):
            self.build().partitioned(Partitions(None, ("a",)))

    def test_values_are_searched_through_an_asynchronous_client(self) -> None:
        seen = self.in_groups(self.build())
        plan = QueryPlan(cells=np.array([[0, 2]]), layout=seen.layout())
        request = SearchRequest(vectors(1, 1), COUNT)
        (found,) = self.search_async(seen, request, plan)
        wanted = seen.search(request, plan)[0]
        assert [hit.id for hit in found] == [hit.id for hit in wanted]
        assert {int(hit.id) % 3 for hit in found} == {0, 2}
