"""A router over the users' own partitions: what it searches, and what may go wrong meanwhile."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from amips_plugins import LearnedRouter, MemoryCollection, Registry
from amips_plugins.bundle.contents import PARTITIONS, load, write_files
from amips_plugins.bundle.registry import Registry as Published
from amips_plugins.cli import main
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import BundleCorrupt, BundleMismatch
from amips_plugins.evaluation import evaluate
from amips_plugins.export.train import Run
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.models.given import GivenCells
from amips_plugins.partitions import Partitions
from amips_plugins.report.data import read_report
from amips_plugins.report.timings import measure_timings
from amips_plugins.routing.serving import bundle_in
from amips_plugins.status import router_status
from tests.support import given_data

FRESH = given_data.queries(200, seed=9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return given_data.short_run(tmp_path_factory.mktemp("given"))


@pytest.fixture
def registry(run: Run, tmp_path: Path) -> Published:
    made = Registry(tmp_path / "registry")
    made.publish(run.bundle)
    return made


@pytest.mark.slow
def test_it_searches_the_partitions_that_hold_the_answer(registry: Published) -> None:
    collection = given_data.collection()
    router = LearnedRouter(collection, registry=registry, refresh=None)
    native, learned = evaluate(router, FRESH, 10, recalls=(0.9,))
    assert native.recall_at_k == 1.0
    assert learned.recall_at_k >= 0.9
    assert learned.n_probes is not None
    assert learned.n_probes < 4
    assert router.fallbacks == {}
    assert collection.layout() is None  # nothing was written
    hits = router.search(FRESH[0], k=5, explain=True)
    (exact,) = collection.search(SearchRequest(FRESH[:1], 5))
    assert set(hits.trace.cells or ()) <= set(range(given_data.PARTS))
    assert [hit.id for hit in hits] == [hit.id for hit in exact]


def test_what_came_later_is_found_whatever_is_chosen(registry: Published) -> None:
    router = LearnedRouter(given_data.collection(), registry=registry, refresh=None)
    router.upsert([5_000, 5_001], FRESH[:2], [{"part": "of tomorrow"}, {}])
    for row, key in enumerate((5_000, 5_001)):
        hits = router.search(FRESH[row], k=3, n_probes=1)
        assert hits[0].id == key
        assert hits.trace.mode == "route"
    share = (sum(value is None for value in given_data.values()) + 2) / (given_data.COUNT + 2)
    assert router.overflow_share() == pytest.approx(share)


def test_overflow_is_mended_by_training_again(
    registry: Published, caplog: pytest.LogCaptureFixture
) -> None:
    collection = given_data.collection()
    router = LearnedRouter(collection, registry=registry, refresh=None)
    count = 150
    router.upsert(range(5_000, 5_000 + count), FRESH[:count], [{"part": "new"}] * count)
    with caplog.at_level(logging.WARNING):
        router.overflow_share()
    assert "train again, on a new snapshot" in caplog.text
    found = router_status(collection, registry, FRESH[:20])
    assert "train again" in found.advice


def test_the_status_tells_of_values_that_grew_or_vanished(registry: Published) -> None:
    values = given_data.values()
    same = router_status(given_data.collection(), registry)
    assert same.partitions is not None
    assert (same.partitions.known, same.partitions.gone, same.partitions.grown) == (10, (), ())
    assert (same.sampled, same.misplaced, same.layout) == (0, None, load_layout(registry))
    moved = ["part 2" if value in ("part 3", "part 4") else value for value in values]
    renamed = ["part ten" if value == "part 1" else value for value in moved]
    changed = router_status(given_data.collection(renamed), registry)
    assert changed.partitions is not None
    assert changed.partitions.gone == ("part 1", "part 3", "part 4")
    assert changed.partitions.grown == ("part 2",)
    assert "train again" in changed.advice


def load_layout(registry: Published) -> str:
    opened = LearnedRouter(given_data.collection(), registry=registry, refresh=None)
    assert opened.manifest is not None
    return opened.manifest.layout


def test_another_collection_of_the_name_is_told_by_its_keys(
    run: Run, registry: Published, caplog: pytest.LogCaptureFixture
) -> None:
    fields = [{"part": "part 1"}] * given_data.COUNT
    other = MemoryCollection(given_data.keys()[::-1].copy() * -1, name="docs", fields=fields)
    router = LearnedRouter(other, registry=registry, refresh=None)
    assert router.search(FRESH[0], k=3).trace.mode == "native"
    assert "other keys" in caplog.text
    with pytest.raises(BundleMismatch, match="other keys"):
        LearnedRouter(other, bundle=run.bundle)


def test_a_field_that_is_gone_is_no_partition(run: Run, registry: Published) -> None:
    bare = MemoryCollection(given_data.keys(), name="docs")
    router = LearnedRouter(bare, registry=registry, refresh=None)
    assert router.search(FRESH[0], k=3).trace.mode == "native"
    with pytest.raises(BundleMismatch, match="none of the collection's"):
        LearnedRouter(bare, bundle=run.bundle)


def test_all_keys_of_one_value_are_searched_natively_at_no_loss(registry: Published) -> None:
    """A value that took all the others over: routing saves nothing, and loses nothing."""
    one = ["part 5"] * given_data.COUNT
    router = LearnedRouter(given_data.collection([*one]), registry=registry, refresh=None)
    (learned,) = evaluate(router, FRESH[:50], 10, recalls=(0.9,))[1:]
    assert learned.recall_at_k >= 0.6  # what the chosen cells hold, or all by the native search


def test_a_newer_bundle_of_other_values_takes_over(
    run: Run, registry: Published, tmp_path: Path
) -> None:
    collection = given_data.collection()
    router = LearnedRouter(collection, registry=registry, refresh=None)
    first = router.manifest
    bundle = bundle_in(run.path)
    given = load(bundle)[PARTITIONS]
    renamed = tuple(f"{value}!" for value in given.partitions.values)
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    other = GivenCells(Partitions("part", renamed), given.sizes, given.overflow)
    files[PARTITIONS] = other.to_bytes()
    about = msgspec.structs.asdict(bundle.manifest)
    for name in ("files", "layout", "n_cells", "version", "created", "format"):
        del about[name]

    (tmp_path / "newer").mkdir()
    write_files(tmp_path / "newer", files, **about)
    registry.publish(tmp_path / "newer")
    assert router.refresh()
    assert router.manifest != first
    assert router.collection.partitions == other.partitions
    hits = router.search(FRESH[0], k=3, n_probes=1)  # every key is of another value now
    (exact,) = collection.search(SearchRequest(FRESH[:1], 3))
    assert [hit.id for hit in hits] == [hit.id for hit in exact]
    registry.roll_back(bundle.manifest.collection)
    assert router.refresh()
    assert router.manifest == first


def test_a_damaged_list_of_values_is_refused(run: Run) -> None:
    data = load(bundle_in(run.path))[PARTITIONS].to_bytes()
    damages = (
        b"[]",
        data.replace(b'"part 1"', b'"part 2"'),
        data.replace(b'"part 1"', b"1"),
        data.replace(b'"overflow":', b'"overflow":-'),
        data.replace(b'"sizes":[', b'"sizes":[-'),
        data.replace(b'"sizes":[', b'"sizes":[1,'),
    )
    for damaged in damages:
        with pytest.raises(BundleCorrupt):
            GivenCells.from_bytes(damaged)


def test_live_queries_are_watched_as_everywhere(registry: Published) -> None:
    watch = HealthMonitor(share=1.0, at_most_every=0.0, at_most_busy=1.0)
    router = LearnedRouter(given_data.collection(), registry=registry, refresh=None, watch=watch)
    for query in FRESH[:30]:
        router.search(query, k=10)
        assert watch.idle(20)
    assert router.health is not None
    assert router.health.recall is not None
    assert router.health.recall.n >= 20
    assert router.health.state == "healthy"
    assert watch.failures == {}


@pytest.mark.slow
def test_a_report_shows_partitions_as_cells(run: Run, tmp_path: Path) -> None:
    data = read_report(run.path)
    assert data.cells is not None
    assert data.cells.sizes.sum() == sum(value is not None for value in given_data.values())
    timed = measure_timings(given_data.collection(), data.bundle, FRESH[:20])
    assert timed.routed_recall > 0.8
    assert timed.fallbacks == 0
    out = tmp_path / "report.html"
    main(["report", str(run.path), "-o", str(out)])
    assert f"{given_data.PARTS}, layout {run.manifest.layout}" in out.read_text()
