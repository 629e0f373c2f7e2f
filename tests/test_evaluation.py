from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins import LearnedRouter, MemoryCollection
from amips_plugins.collection import KeyBatch
from amips_plugins.errors import InvalidInput
from amips_plugins.evaluation import evaluate, exact_neighbours
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray, Metric, native_scores
from tests.support.bundles import COUNT, K, laid_out, memory, vectors, weaken, write_bundle
from tests.support.progress_recorder import Recorder
from tests.support.routing_data import only

QUERIES = vectors(seed=5, count=9)


class Small(MemoryCollection):
    """Reads in small batches, whatever is asked for."""

    def scan(self, batch_size: int, after=None):  # type: ignore[no-untyped-def]
        return super().scan(7, after)


def test_exact_neighbours_are_exact_far_from_the_origin() -> None:
    far = np.float32(4096.0)
    collection = MemoryCollection(vectors() + far, metric=Metric.L2)
    near = MemoryCollection((vectors() + far) - far, metric=Metric.L2)  # as rounded
    moved = (QUERIES + far) - far
    assert exact_neighbours(collection, QUERIES + far, 5) == exact_neighbours(near, moved, 5)


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("k", [1, 5, 20, COUNT])
def test_exact_neighbours_are_those_of_brute_force(metric: Metric, k: int) -> None:
    names = [f"doc-{row:02}" for row in range(COUNT)]
    recorder = Recorder()
    found = exact_neighbours(Small(vectors(), names, metric), QUERIES, k, recorder)
    for query, ids in zip(QUERIES, found, strict=True):
        scores = native_scores(query, vectors(), metric)
        order = np.argsort(-scores if metric.larger_is_better else scores)
        assert ids == [names[row] for row in order[:k]]
    assert (recorder.totals, recorder.done) == ([COUNT], COUNT)


def test_no_neighbour_twice_where_there_are_few_keys() -> None:
    found = exact_neighbours(Small(vectors(count=3)), QUERIES[:2], 10)
    assert [sorted(ids) for ids in found] == [[0, 1, 2]] * 2


def test_ties_go_to_the_first_key() -> None:
    keys = np.ones((20, 4), dtype=np.float32)
    (found,) = exact_neighbours(Small(keys, metric=Metric.IP), keys[:1], 5)
    assert found == [0, 1, 2, 3, 4]


class Opposite:
    """Asks for the opposite of each query, so that most answers are wrong."""

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(rewritten=-queries, rescore=target.k)


@pytest.mark.parametrize("metric", Metric)
def test_numbers_against_a_hand_computation(metric: Metric) -> None:
    collection, k = memory(metric), 8
    router = LearnedRouter(collection, hook=Opposite())
    native, learned = evaluate(router, QUERIES, k)
    truth = exact_neighbours(collection, QUERIES, k)
    found = [[hit.id for hit in hits] for hits in router.search(QUERIES, k)]
    at_1 = sum(ids[0] == true[0] for ids, true in zip(found, truth, strict=True))
    at_k = sum(len(set(ids) & set(true)) for ids, true in zip(found, truth, strict=True))
    assert learned.search == "learned"
    assert learned.recall_at_1 == pytest.approx(at_1 / len(QUERIES))
    assert learned.recall_at_k == pytest.approx(at_k / len(QUERIES) / k)
    assert learned.recall_at_k < 0.9
    assert (learned.n_probes, learned.scanned, learned.fallbacks) == (None, None, 0)
    assert (native.search, native.recall_at_1, native.recall_at_k) == ("native", 1.0, 1.0)
    assert (native.n_probes, native.scanned, native.fallbacks) == (None, None, 0)
    assert native.milliseconds > 0
    assert learned.milliseconds > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def test_a_route_is_measured_at_every_target(folder: Path) -> None:
    router, k, recorder = LearnedRouter(laid_out(folder), bundle=folder), 3, Recorder()
    rows = evaluate(router, QUERIES, k, recalls=(0.5, 0.8, 0.9), progress=recorder)
    assert [row.search for row in rows] == [
        "native",
        "learned, recall 0.50",
        "learned, recall 0.80",
        "learned, recall 0.90",
    ]
    for row, recall in zip(rows[1:], (0.5, 0.8, 0.9), strict=True):
        hits = router.search(QUERIES, k, recall=recall, explain=True)
        assert {answer.trace.mode for answer in hits} == {"route"}
        assert row.n_probes == pytest.approx(np.mean([h.trace.n_probes for h in hits]))
        assert row.scanned == pytest.approx(np.mean([h.trace.scanned for h in hits]))
        assert row.fallbacks == 0
    probes = [row.n_probes for row in rows[1:] if row.n_probes is not None]
    assert probes == sorted(probes)
    assert probes[0] < probes[-1]
    assert recorder.totals == [COUNT] + [len(QUERIES)] * 4


def test_a_target_that_cannot_be_promised_is_answered_natively_and_shown(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, change=weaken(0.85))
    router = LearnedRouter(laid_out(folder), bundle=folder)
    rows = evaluate(router, QUERIES, 5, recalls=(0.8, 0.9, 0.95))
    assert [row.fallbacks for row in rows[1:]] == [0, len(QUERIES), len(QUERIES)]
    assert [row.recall_at_k for row in rows[2:]] == [rows[0].recall_at_k] * 2
    assert evaluate(router, QUERIES, K + 1, (0.5,))[1].fallbacks == len(QUERIES)


def test_answers_completed_natively_count_as_fallbacks(folder: Path) -> None:
    router = LearnedRouter(laid_out(folder), bundle=folder)
    _, row = evaluate(router, QUERIES, K, recalls=(0.3,))
    hits = router.search(QUERIES, K, recall=0.3)
    completed = [answer for answer in hits if answer.trace.mode == "native"]
    assert 0 < len(completed) < len(QUERIES)
    assert row.fallbacks == len(completed)
    routed = router.search(QUERIES, K, recall=0.3, explain=True)
    assert row.scanned == pytest.approx(np.mean([answer.trace.scanned for answer in routed]))
    again = [answer.trace.scanned for answer in routed if answer.trace.mode == "native"]
    assert all(scanned is not None and scanned > 1.0 for scanned in again)


def test_a_number_of_cells_in_place_of_targets(folder: Path) -> None:
    router = LearnedRouter(laid_out(folder), bundle=folder)
    rows = evaluate(router, QUERIES, 3, probes=(2, 4))
    assert [row.search for row in rows] == ["native", "learned, 2 cells", "learned, 4 cells"]
    assert [row.n_probes for row in rows[1:]] == [2.0, 4.0]
    assert rows[1].recall_at_k <= rows[2].recall_at_k


@pytest.mark.parametrize("recall", [1.5, 0.0, -0.5, 90, float("nan"), "0.9", True])
def test_a_target_that_is_no_share_is_refused_before_any_work(folder: Path, recall: Any) -> None:
    recorder = Recorder()
    for router in (
        LearnedRouter(laid_out(folder), bundle=folder),
        LearnedRouter(memory(), hook=NativeHook()),
    ):
        with pytest.raises(InvalidInput, match=r"pass a number in \(0, 1\]"):
            evaluate(router, QUERIES, 5, recalls=(0.8, recall), progress=recorder)
    assert recorder.totals == []


def test_a_keynet_is_measured_once(tmp_path: Path) -> None:
    router = LearnedRouter(memory(), bundle=write_bundle(tmp_path, model="keynet"))
    rows = evaluate(router, QUERIES, 5)
    assert [row.search for row in rows] == ["native", "learned"]
    assert rows[1].recall_at_k == 1.0  # untrained and residual: the query's own direction


def test_without_a_model_only_the_native_search_is_measured(tmp_path: Path) -> None:
    router = LearnedRouter(memory(), registry=tmp_path)
    assert [row.search for row in evaluate(router, QUERIES, 5)] == ["native"]


def test_fallbacks_are_counted(folder: Path) -> None:
    router = LearnedRouter(memory(), bundle=folder)  # not laid out
    native, learned = evaluate(router, QUERIES, 5, recalls=(0.5,))
    assert native.fallbacks == 0
    assert learned.fallbacks == len(QUERIES)
    assert learned.recall_at_k == 1.0


def test_under_a_filter_the_exact_answers_are_the_databases(folder: Path) -> None:
    collection, seen = laid_out(folder), [0]

    def half(key: Any, _: Any) -> bool:
        seen[0] += 1
        return int(key) % 2 == 0

    known = HealthMonitor(share=0.0, drift_share=0.0, filters=[half])
    router = LearnedRouter(collection, bundle=folder, watch=known)
    native, learned = evaluate(router, QUERIES, 3, recalls=(0.5,), filter=half)
    assert seen[0] > 0
    assert (native.recall_at_1, native.recall_at_k, native.fallbacks) == (1.0, 1.0, 0)
    assert learned.n_probes is not None
    assert learned.recall_at_k <= 1.0
    assert native.passing == learned.passing == pytest.approx(0.5, abs=0.1)
    unknown = LearnedRouter(collection, bundle=folder)
    row = evaluate(unknown, QUERIES, 3, recalls=(0.5,), filter=half)[1]
    assert (row.recall_at_k, row.fallbacks) == (1.0, len(QUERIES))
    nothing = evaluate(unknown, QUERIES, 3, recalls=(0.5,), filter=only())[0]
    assert (nothing.recall_at_k, nothing.passing) == (1.0, 0.0)


@pytest.mark.parametrize("k", [0, -1, COUNT + 1])
def test_k_has_to_fit(k: int) -> None:
    with pytest.raises(InvalidInput, match=f"k={k} does not fit the {COUNT} keys of 'docs'"):
        evaluate(LearnedRouter(memory(), hook=NativeHook()), QUERIES, k)


def test_bad_queries() -> None:
    router = LearnedRouter(memory(), hook=NativeHook())
    with pytest.raises(InvalidInput, match="dimension 4"):
        evaluate(router, np.zeros((3, 5), dtype=np.float32))
    with pytest.raises(InvalidInput, match="empty"):
        evaluate(router, np.zeros((0, 4), dtype=np.float32))


@pytest.mark.parametrize("metric", Metric)
def test_an_exact_search_finds_all_of_equal_vectors(metric: Metric) -> None:
    """Which of five equal keys come first is chance; here it is the last ones."""

    class Backwards(MemoryCollection):
        def scan(self, batch_size: int, after=None):  # type: ignore[no-untyped-def]
            batches = list(super().scan(batch_size, after))
            return iter([KeyBatch(b.ids[::-1], b.vectors[::-1], b.cursor) for b in batches[::-1]])

    keys = np.repeat(vectors(count=12), 5, axis=0) + (50.0 if metric is Metric.L2 else 0.0)
    collection = Backwards(keys.astype(np.float32), metric=metric)
    truth = exact_neighbours(collection, QUERIES, 8)
    found = LearnedRouter(collection, hook=NativeHook()).search(QUERIES, 8)
    assert [[hit.id for hit in hits] for hits in found] != truth
    (row,) = evaluate(LearnedRouter(collection, hook=NativeHook()), QUERIES, 8)[:1]
    assert (row.recall_at_1, row.recall_at_k) == (1.0, 1.0)
