"""A router over several collections: which it asks, what it misses and how it says so."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from amips_plugins import AsyncLearnedRouter, LearnedRouter, MemoryCollection, Registry
from amips_plugins import SeveralCollections as Several
from amips_plugins.bundle.registry import Registry as Published
from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.errors import BundleMismatch, InvalidInput
from amips_plugins.evaluation import evaluate
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.train import Run, TrainOptions, train
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.observe.metrics import RouterMetrics
from amips_plugins.partitions import Partitions
from amips_plugins.status import router_status
from tests.support import given_data, several_data
from tests.support.several_data import Unreliable, found

FRESH = given_data.queries(200, seed=9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("several")
    several = Several(several_data.collections()).partitioned(Partitions(None))
    taken = take_snapshot(several, folder / "snap")
    options = TrainOptions(epochs=3, recall=0.9)
    return train(taken, given_data.queries(), folder / "run", options)


@pytest.fixture
def registry(run: Run, tmp_path: Path) -> Published:
    made = Registry(tmp_path / "registry")
    made.publish(run.bundle)
    return made


def unreliable() -> dict[str, Unreliable]:
    keys = given_data.keys()
    return {
        name: Unreliable(keys[several_data.rows_of(part)], name=name)
        for part, name in enumerate(several_data.collections())
    }


@pytest.mark.slow
def test_it_asks_the_collections_that_hold_the_answer(registry: Published) -> None:
    members = several_data.collections()
    router = LearnedRouter.over(members, registry=registry, refresh=None)
    native, learned = evaluate(router, FRESH, 10, recalls=(0.9,))
    assert native.recall_at_k == 1.0
    assert learned.recall_at_k >= 0.9
    assert learned.n_probes is not None
    assert learned.n_probes < 4
    assert router.fallbacks == {}
    hits = router.search(FRESH[0], k=5, explain=True, fields=["part"])
    whole = MemoryCollection(given_data.keys()).search(SearchRequest(FRESH[:1], 5))[0]
    rows = {name: several_data.rows_of(part) for part, name in enumerate(members)}
    assert [rows[hit.collection][int(hit.id)] for hit in hits] == [hit.id for hit in whole]
    assert all(hit.collection == f"part-{hit.fields['part']}" for hit in hits)
    assert hits.trace.left_out == ()
    parts = router.collection.partitions
    assert parts is not None
    assert hits.trace.cells is not None
    assert {hit.collection for hit in hits} <= set(parts.chosen(hits.trace.cells))


def test_without_a_bundle_all_are_asked(tmp_path: Path) -> None:
    router = LearnedRouter.over(several_data.collections(), registry=tmp_path, refresh=None)
    hits = router.search(FRESH[0], k=5)
    assert (hits.trace.mode, hits.trace.fallback) == ("native", "bundle: BundleNotFound")
    whole = MemoryCollection(given_data.keys()).search(SearchRequest(FRESH[:1], 5))[0]
    assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in whole])


def test_one_that_came_after_training_is_always_asked(registry: Published) -> None:
    members: dict[str, Collection] = dict(several_data.collections())
    members["new"] = MemoryCollection(FRESH[:4], name="new")
    router = LearnedRouter.over(members, registry=registry, refresh=None)
    for row in range(4):
        hits = router.search(FRESH[row], k=3, n_probes=1)
        assert hits.trace.mode == "route"
        assert found(hits)[0] == ("new", row)
    assert router.overflow_share() == pytest.approx(4 / (given_data.COUNT + 4))


def test_one_that_was_taken_away_is_missed_by_nobody(registry: Published) -> None:
    members = several_data.collections()
    del members["part-3"]
    router = LearnedRouter.over(members, registry=registry, refresh=None)
    answers = router.search(FRESH[:50], k=5)
    assert {hits.trace.mode for hits in answers[:10]} >= {"route"}
    for hits in answers:  # natively where the model chose nothing that is there
        assert hits.trace.left_out == ()
        assert "part-3" not in {hit.collection for hit in hits}
        assert len(hits) == 5
    changes = router_status(router.collection, registry).partitions
    assert changes is not None
    assert changes.gone == ("part-3",)


def test_one_that_fails_is_named_in_the_trace_and_counted(
    registry: Published, caplog: pytest.LogCaptureFixture
) -> None:
    members = unreliable()
    router = LearnedRouter.over(members, registry=registry, refresh=None)
    counted = CollectorRegistry()
    RouterMetrics(router, registry=counted)
    members["part-2"].error = ConnectionError("refused")
    awaited = AsyncLearnedRouter(router, None)
    with caplog.at_level(logging.WARNING):
        traces = [hits.trace for hits in router.search(FRESH[:50], k=5, recall=0.9)]
        traces += [h.trace for h in asyncio.run(awaited.search(FRESH[:50], k=5, recall=0.9))]
    missed = sum(trace.left_out == ("part-2",) for trace in traces)
    assert 0 < missed < 100
    assert all(trace.left_out in ((), ("part-2",)) for trace in traces)
    assert isinstance(router.collection, Several)
    assert router.collection.left_out["part-2"] >= missed
    labels = {"database": "several", "collection": "all", "field": "", "source": "part-2"}
    assert counted.get_sample_value("amips_left_out_total", labels) == missed
    assert caplog.text.count("'part-2' is left out") == 1
    members["part-2"].error = None


def test_where_the_chosen_one_fails_the_others_are_asked(registry: Published) -> None:
    members = unreliable()
    router = LearnedRouter.over(members, registry=registry, refresh=None)
    first = router.search(FRESH[0], k=5, n_probes=1)
    (chosen,) = {hit.collection for hit in first}
    members[chosen].error = OSError("down")
    hits = router.search(FRESH[0], k=5, n_probes=1)
    assert len(hits) == 5
    assert chosen not in {hit.collection for hit in hits}
    assert hits.trace.left_out == (chosen,)
    assert hits.trace.mode == "native"


def test_strict_raises(registry: Published) -> None:
    members = unreliable()
    router = LearnedRouter.over(members, registry=registry, refresh=None, strict=True)
    members["part-1"].error = ConnectionError("refused")
    with pytest.raises(ConnectionError, match="refused"):
        router.search(FRESH, k=5, recall=1.0)


def test_what_is_missing_is_not_held_against_the_model(registry: Published) -> None:
    watch = HealthMonitor(share=1.0, at_most_every=0.0, at_most_busy=1.0)
    members = unreliable()
    router = LearnedRouter.over(members, registry=registry, refresh=None, watch=watch)
    members["part-2"].error = ConnectionError("refused")
    for query in FRESH[:40]:
        router.search(query, k=10)
        assert watch.idle(20)
    assert router.health is not None
    assert router.health.state == "healthy"
    assert router.health.recall is None  # an exact search misses what is missing, too
    members["part-2"].error = None


def test_another_set_of_collections_is_told_by_its_keys(run: Run) -> None:
    keys = given_data.queries(500, seed=4)
    others = {f"part-{n}": MemoryCollection(keys[n * 50 : n * 50 + 50]) for n in range(10)}
    with pytest.raises(BundleMismatch, match="other keys"):
        LearnedRouter.over(others, bundle=run.bundle)
    with pytest.raises(BundleMismatch, match="collection"):
        LearnedRouter.over(several_data.collections(), name="others", bundle=run.bundle)


def test_it_is_written_to_one_by_one(registry: Published) -> None:
    router = LearnedRouter.over(several_data.collections(), registry=registry, refresh=None)
    with pytest.raises(InvalidInput, match="write to the one"):
        router.upsert([1], FRESH[:1])
