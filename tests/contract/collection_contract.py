"""What every collection adapter promises. An adapter's test class brings one factory.

The reference is ``MemoryCollection``; scores are compared in the database's own convention.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.base import Collection, Id, SearchRequest
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, Metric, normalise

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


class CollectionContract:
    """Inherit, and override ``make`` and what the database does differently."""

    metrics: tuple[Metric, ...] = (Metric.IP, Metric.COSINE, Metric.L2)
    l2_scores_are_squared = True
    string_ids: tuple[str, ...] = tuple(f"doc-{row:03d}" for row in range(COUNT))
    """String ids this database accepts, sorted as the database sorts them."""

    def make(
        self, keys: FloatArray, ids: Sequence[Id], metric: Metric, groups: Sequence[str]
    ) -> Collection:
        """A collection of these keys with a stored text field ``group``."""
        raise NotImplementedError

    def group_filter(self, group: str) -> Any:
        """The database's own filter for ``group == ...``."""
        raise NotImplementedError

    def add_without_cell(self, collection: Collection, ids: Sequence[Id], keys: FloatArray) -> None:
        """Write keys as another client does, who knows nothing of cells."""
        raise NotImplementedError

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
        return self.build(metric).lay_out("abc123", 4, lambda ids, _: cells_of(ids))

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
        collection = self.laid_out()
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

    def test_close_twice(self) -> None:
        collection = self.build()
        collection.close()
        collection.close()
