from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins import Hits, LearnedRouter, MemoryCollection, Registry
from amips_plugins.adapters.base import Hit, Id, SearchRequest
from amips_plugins.bundle import CALIBRATION, CELLS, MANIFEST, MODEL, CollectionKey
from amips_plugins.cells import Cells
from amips_plugins.errors import BundleCorrupt, BundleMismatch, BundleNotFound, InvalidInput
from amips_plugins.hooks import NativeHook
from amips_plugins.plan import NATIVE, QueryPlan, Target
from amips_plugins.registry import collection_key
from amips_plugins.router import Trace
from amips_plugins.vectors import FloatArray, IntArray, Metric
from tests.bundles import (
    COUNT,
    DIM,
    N_CELLS,
    K,
    laid_out,
    make_files,
    memory,
    open_bundle,
    vectors,
    weaken,
    write_bundle,
)

QUERIES = vectors(seed=5, count=6)


class Spy(MemoryCollection):
    """Notes every search; ``failures`` are raised first, one a search."""

    def __init__(self, inner: MemoryCollection, failures: Sequence[Exception] = ()) -> None:
        self.__dict__ = inner.__dict__
        self.asked: list[tuple[SearchRequest, QueryPlan]] = []
        self.counted = 0
        self.layouts = 0
        self.failures: Iterator[Exception] = iter(failures)

    def count(self) -> int:
        self.counted += 1
        return super().count()

    def layout(self) -> str | None:
        self.layouts += 1
        return super().layout()

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        self.asked.append((request, plan))
        for failure in self.failures:
            raise failure
        return super().search(request, plan)


class Hook:
    """A user's own hook that gives whatever it was told to."""

    def __init__(self, give: Callable[[FloatArray], Any]) -> None:
        self.give = give

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        plan: QueryPlan = self.give(queries)
        return plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def keynet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("keynet"), model="keynet")


@pytest.fixture
def router(folder: Path) -> LearnedRouter:
    return LearnedRouter(laid_out(folder), bundle=folder)


def pairs(hits: Sequence[Hit]) -> list[tuple[Id, float]]:
    return [(hit.id, hit.score) for hit in hits]


def native(collection: MemoryCollection, k: int = 5, **more: Any) -> list[list[tuple[Id, float]]]:
    found = MemoryCollection.search(collection, SearchRequest(QUERIES, k, **more))
    return [pairs(hits) for hits in found]


TOO_FEW = "cells: fewer than k hits"


def assert_native(router: LearnedRouter, reason: str | None) -> list[Hits]:
    """The hits are those of the native search, and the trace says why."""
    collection = router.collection
    assert isinstance(collection, MemoryCollection)
    before = router.fallbacks.total()
    found: list[Hits] = router.search(QUERIES, k=5)
    assert [pairs(hits) for hits in found] == native(collection)
    for hits in found:
        assert hits.trace.mode == "native"
        assert hits.trace.n_probes is None
        if reason is None:
            assert hits.trace.fallback is None
        else:
            assert hits.trace.fallback is not None
            assert hits.trace.fallback.startswith(reason)
            assert router.fallbacks[hits.trace.fallback] >= 1
    assert router.fallbacks.total() == before + (reason is not None)
    return found


# Forms of input and output


def test_one_vector_gives_hits_and_a_matrix_a_list(router: LearnedRouter) -> None:
    one = router.search(QUERIES[0], k=3)
    many = router.search(QUERIES[:1], k=3)
    assert isinstance(one, Hits)
    assert isinstance(many, list)
    assert pairs(one) == pairs(many[0])
    assert len(router.search(QUERIES, k=3)) == len(QUERIES)
    assert pairs(router.search(QUERIES[0].tolist(), k=3)) == pairs(one)


def test_hits_are_a_sequence() -> None:
    found = [Hit(1, 0.5), Hit("b", 0.4), Hit(3, 0.3)]
    hits = Hits(found, Trace("native"))
    assert isinstance(hits, Sequence)
    assert len(hits) == 3
    assert list(hits) == found
    assert hits[0] is found[0]
    assert hits[-1] is found[2]
    assert hits[1:] == tuple(found[1:])
    assert found[1] in hits
    assert hits.index(found[2]) == 2
    assert list(reversed(hits)) == found[::-1]
    assert "trace=Trace(mode='native'" in repr(hits)
    with pytest.raises(IndexError):
        hits[3]
    assert not Hits([], Trace("native"))


def test_a_batch_answers_as_its_queries(router: LearnedRouter) -> None:
    batch = router.search(QUERIES, k=4, n_probes=2)
    alone = [router.search(query, k=4, n_probes=2) for query in QUERIES]
    assert [pairs(hits) for hits in batch] == [pairs(hits) for hits in alone]
    assert [hits.trace for hits in batch] == [hits.trace for hits in alone]


def test_a_batch_answers_as_its_queries_at_a_target(router: LearnedRouter) -> None:
    """Each query has its own number of cells, in a batch as alone."""
    batch = router.search(QUERIES, k=3, recall=0.9)
    alone = [router.search(query, k=3, recall=0.9) for query in QUERIES]
    assert [pairs(hits) for hits in batch] == [pairs(hits) for hits in alone]
    assert [hits.trace for hits in batch] == [hits.trace for hits in alone]
    assert {hits.trace.mode for hits in batch} == {"route"}
    assert len({hits.trace.n_probes for hits in batch}) > 1


@pytest.mark.parametrize("metric", Metric)
def test_higher_targets_search_more_and_find_what_they_promise(
    folders: Mapping[Metric, Path], metric: Metric
) -> None:
    """The whole line: thresholds of a calibration, kept for queries nobody has seen."""
    collection, k = laid_out(folders[metric], metric), 3
    router = LearnedRouter(collection, bundle=folders[metric])
    unseen = vectors(seed=77, count=600)
    exact = MemoryCollection.search(collection, SearchRequest(unseen, k))
    before: list[set[int]] = [set() for _ in unseen]
    probes = []
    for recall in (0.8, 0.9, 0.95):
        found = router.search(unseen, k, recall=recall, explain=True)
        shares = [
            len({hit.id for hit in hits} & {hit.id for hit in true}) / k
            for hits, true in zip(found, exact, strict=True)
        ]
        assert np.mean(shares) >= recall
        routed = [hits.trace for hits in found if hits.trace.mode == "route"]
        assert len(routed) > 0.9 * len(unseen)
        assert len({trace.n_probes for trace in routed}) > 1, "easy queries search fewer cells"
        probes.append(np.mean([trace.n_probes for trace in routed]))
        for row, hits in enumerate(found):
            if hits.trace.cells is not None:
                assert before[row] <= set(hits.trace.cells)
                before[row] = set(hits.trace.cells)
    assert probes[0] < probes[1] < probes[2] < N_CELLS - 1
    assert set(router.fallbacks) <= {TOO_FEW}


def test_the_trace_of_a_route(router: LearnedRouter) -> None:
    short = router.search(QUERIES[0], k=4, n_probes=2).trace
    assert short == Trace("route", n_probes=2, version="v1")
    full = router.search(QUERIES[0], k=4, n_probes=2, explain=True).trace
    assert full.cells is not None
    assert len(full.cells) == 2
    sizes = Cells.from_bytes(make_files()[CELLS]).sizes
    expected = (sizes[list(full.cells)].sum() + N_CELLS) / COUNT  # the model costs its cells
    assert full.scanned == pytest.approx(expected)
    assert full.plan_us is not None
    assert full.plan_us > 0
    assert full.search_ms is not None
    assert full.search_ms > 0
    assert replace(full, cells=None, scanned=None, plan_us=None, search_ms=None) == short


def test_the_trace_of_a_rewrite_and_of_a_native_search(keynet: Path) -> None:
    router = LearnedRouter(memory(), bundle=keynet)
    assert router.search(QUERIES[0]).trace == Trace("rewrite", version="v1")
    trace = router.search(QUERIES[0], explain=True).trace
    assert (trace.mode, trace.cells, trace.scanned) == ("rewrite", None, None)
    assert trace.plan_us is not None
    trace = LearnedRouter(memory(), hook=NativeHook()).search(QUERIES[0], explain=True).trace
    assert (trace.mode, trace.cells, trace.version) == ("native", None, None)
    assert trace.search_ms is not None


def test_the_trace_of_a_users_own_route(folder: Path) -> None:
    collection = laid_out(folder)
    plan = QueryPlan(cells=np.array([[3, -1, 1]]), layout=collection.layout())
    router = LearnedRouter(collection, hook=Hook(lambda _: plan))
    trace = router.search(QUERIES[0], k=2, explain=True).trace
    assert (trace.mode, trace.n_probes, trace.cells, trace.version) == ("route", 2, (3, 1), None)
    assert trace.scanned is None  # nobody knows the sizes of their cells


def test_a_route_searches_its_cells_and_the_overflow(router: LearnedRouter, folder: Path) -> None:
    collection = router.collection
    assert isinstance(collection, MemoryCollection)
    collection.insert([1000], QUERIES[:1])
    (cell,) = router.search(QUERIES[0], k=1, n_probes=1, explain=True).trace.cells
    known = np.load(folder / "known_cells.npy")
    members = set(np.flatnonzero(known == cell).tolist())
    hits = router.search(QUERIES[0], k=len(members) + 1, n_probes=1)
    assert hits.trace.mode == "route"
    assert hits[0].id == 1000
    assert {hit.id for hit in hits[1:]} == members


def test_fields_filter_and_everything_else_reach_the_database(folder: Path) -> None:
    spy = Spy(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)

    def keep(_: Id, fields: Mapping[str, Any]) -> bool:
        return bool(fields["group"] == 1)

    hits = router.search(
        QUERIES[0], k=3, filter=keep, fields=["group"], params={"ef": 3}, timeout=7.0
    )
    assert [dict(hit.fields) for hit in hits] == [{"group": 1}] * 3
    request, _ = spy.asked[0]
    assert (request.k, request.filter, request.fields) == (3, keep, ("group",))
    assert (request.params, request.timeout) == ({"ef": 3}, 7.0)
    np.testing.assert_array_equal(request.queries, QUERIES[:1])


@pytest.mark.parametrize("n_probes", [1, 3, N_CELLS, None])
def test_planning_is_pure_and_the_search_is_one_call(folder: Path, n_probes: int | None) -> None:
    spy = Spy(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    assert spy.asked == []
    counted = spy.counted
    router.search(QUERIES, k=3, n_probes=n_probes)
    assert len(spy.asked) == 1
    assert spy.counted == counted
    assert spy.layouts == 0  # Qdrant asks the server for it


def test_one_call_for_a_rewrite_and_for_native(keynet: Path) -> None:
    sources: list[dict[str, Any]] = [{"bundle": keynet}, {"hook": NativeHook()}]
    for source in sources:
        spy = Spy(memory())
        LearnedRouter(spy, **source).search(QUERIES, k=5)
        assert len(spy.asked) == 1


@pytest.mark.parametrize("n_probes", [N_CELLS, N_CELLS + 3])
def test_all_cells_are_the_native_search(router: LearnedRouter, n_probes: int) -> None:
    for hits, expected in zip(
        router.search(QUERIES, k=5, n_probes=n_probes), native(memory()), strict=True
    ):
        assert hits.trace == Trace("native", version="v1")
        assert pairs(hits) == expected
    assert not router.fallbacks


@pytest.mark.parametrize("metric", Metric)
@given(
    k=st.integers(1, COUNT),
    n=st.integers(1, 4),
    seed=st.integers(0, 2**16),
    groups=st.none() | st.sets(st.integers(0, 2)),
    new=st.integers(0, 3),
)
@settings(deadline=None, max_examples=40)
def test_routed_through_all_cells_equals_native(
    folders: Mapping[Metric, Path],
    metric: Metric,
    k: int,
    n: int,
    seed: int,
    groups: set[int] | None,
    new: int,
) -> None:
    """As a plan that names every cell, and as a target that takes every cell."""
    folder = folders[metric]
    collection = laid_out(folder, metric)
    collection.insert(range(1000, 1000 + new), vectors(seed + 1, max(new, 1))[:new]) if new else 0
    queries = vectors(seed, n)
    chosen = (lambda _, fields: fields.get("group") in groups) if groups is not None else None
    layout = collection.layout()

    def every_cell(rows: FloatArray) -> QueryPlan:
        order = np.random.default_rng(seed).permutation(N_CELLS)
        return QueryPlan(cells=np.tile(order, (len(rows), 1)), layout=layout)

    expected = collection.search(SearchRequest(queries, k, chosen))
    for router, probes in (
        (LearnedRouter(collection, hook=Hook(every_cell)), None),
        (LearnedRouter(collection, bundle=folder), N_CELLS),
    ):
        found = router.search(queries, k, filter=chosen, n_probes=probes)
        assert [pairs(hits) for hits in found] == [pairs(hits) for hits in expected]
        # Where no search finds k hits the router has looked twice, and says so.
        looked_twice = probes is None and any(len(hits) < k for hits in expected)
        assert router.fallbacks == ({TOO_FEW: 1} if looked_twice else {})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[Metric, Path]:
    return {
        metric: write_bundle(tmp_path_factory.mktemp(metric.value), metric) for metric in Metric
    }


# What the caller did wrong surfaces


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"k": 0}, "k=0 asks for nothing"),
        ({"k": -3}, "k=-3"),
        ({"k": True}, "k=True"),
        ({"k": 2.0}, "k=2.0"),
        ({"k": "3"}, "k='3'"),
        ({"k": None}, "k=None"),
        ({"k": COUNT + 1}, f"k={COUNT + 1} is more than the {COUNT} keys of 'docs'"),
        ({"recall": 0.0}, "recall=0.0 is no share"),
        ({"recall": 1.01}, "recall=1.01"),
        ({"recall": -1}, "recall=-1"),
        ({"recall": float("nan")}, "recall=nan"),
        ({"recall": "0.9"}, "recall='0.9'"),
        ({"recall": True}, "recall=True"),
        ({"n_probes": 0}, "n_probes=0 searches nothing"),
        ({"n_probes": -1}, "n_probes=-1"),
        ({"n_probes": 2.5}, "n_probes=2.5"),
        ({"n_probes": "2"}, "n_probes='2'"),
        ({"n_probes": True}, "n_probes=True"),
        ({"queries": [float("nan")] * DIM}, "NaN"),
        ({"queries": [[0.0] * DIM, [float("inf")] * DIM]}, "Query 1"),
        ({"queries": [1.0] * (DIM + 1)}, f"dimension {DIM}"),
        ({"queries": np.zeros((0, DIM))}, "empty"),
        ({"queries": "text"}, "numbers"),
        ({"fields": "group"}, "fields='group' is one name"),
    ],
)
def test_bad_input_is_the_callers(
    folder: Path, learned: bool, arguments: dict[str, Any], says: str
) -> None:
    spy = Spy(laid_out(folder))
    source: dict[str, Any] = {"bundle": folder} if learned else {"hook": NativeHook()}
    router = LearnedRouter(spy, **source)
    with pytest.raises(InvalidInput) as caught:
        router.search(**({"queries": QUERIES[0], "k": 3} | arguments))
    assert says in str(caught.value)
    assert spy.asked == []
    assert not router.fallbacks


def test_numpy_integers_are_whole_numbers(folder: Path) -> None:
    spy = Spy(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    assert len(router.search(QUERIES[0], k=np.int64(3), n_probes=np.int32(N_CELLS - 1))) == 3
    assert type(spy.asked[0][0].k) is int
    router.search(QUERIES[0], k=3, recall=np.float32(0.5))
    assert not router.fallbacks


def test_an_unreachable_recall_names_the_best_one(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path, change=weaken(0.9, confidence=0.9))
    router = LearnedRouter(laid_out(folder), bundle=folder)
    with pytest.raises(InvalidInput, match=r"90% confidence.*best target is 0\.899"):
        router.search(QUERIES[0], k=3, recall=0.95)
    with pytest.raises(InvalidInput, match=f"up to k={K}"):
        router.search(QUERIES[0], k=K + 1, recall=0.5)
    assert router.search(QUERIES[0], k=K + 1).trace == Trace("native", version="v1")
    assert not router.fallbacks


def test_a_rewrite_refuses_recall_targets(keynet: Path) -> None:
    router = LearnedRouter(memory(), bundle=keynet)
    for target in ({"recall": 0.9}, {"n_probes": 3}):
        with pytest.raises(InvalidInput, match="params="):
            router.search(QUERIES[0], k=3, **target)


def test_the_count_is_read_again_when_k_exceeds_it() -> None:
    spy = Spy(memory())
    router = LearnedRouter(spy, hook=NativeHook())
    assert spy.counted == 1
    spy.insert([1000, 1001], QUERIES[:2])
    assert len(router.search(QUERIES[0], k=COUNT)) == COUNT
    assert spy.counted == 1
    assert len(router.search(QUERIES[0], k=COUNT + 2)) == COUNT + 2
    assert spy.counted == 2
    with pytest.raises(InvalidInput, match=f"more than the {COUNT + 2} keys"):
        router.search(QUERIES[0], k=COUNT + 3)


def test_only_one_source_of_plans(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="one of registry, bundle and hook"):
        LearnedRouter(memory(), registry=tmp_path, bundle=folder)
    with pytest.raises(InvalidInput, match="one of registry, bundle and hook"):
        LearnedRouter(memory(), hook=NativeHook(), bundle=folder)


# Where the bundle comes from


def test_a_bundle_by_folder_run_or_object(folder: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "run" / "bundle")
    for bundle in (folder, str(folder), open_bundle(folder), tmp_path / "run"):
        router = LearnedRouter(laid_out(folder), bundle=bundle)
        assert router.learned
        assert router.manifest is not None
        assert router.manifest.version == "v1"
        assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"


def test_the_latest_bundle_of_the_registry(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Registry(tmp_path / "registry").publish(folder)
    monkeypatch.setenv("AMIPS_REGISTRY", str(tmp_path / "registry"))
    for registry in (None, tmp_path / "registry", Registry()):
        router = LearnedRouter(laid_out(folder), registry=registry)
        assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"
        assert not router.fallbacks


MISMATCHES: list[dict[str, Any]] = [
    {"collection": CollectionKey(database="milvus", name="docs", field="vector")},
    {"collection": CollectionKey(database="memory", name="other", field="vector")},
    {"collection": CollectionKey(database="memory", name="docs", field="title")},
    {"metric": Metric.L2},
    {"dim": DIM + 1},
]


@pytest.mark.parametrize("changes", MISMATCHES)
def test_an_explicit_bundle_that_mismatches_is_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(BundleMismatch, match="was made for"):
        LearnedRouter(memory(), bundle=write_bundle(tmp_path, **changes))


def test_an_explicit_bundle_that_is_damaged_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    (folder / MODEL).write_bytes(b"other")
    with pytest.raises(BundleCorrupt):
        LearnedRouter(memory(), bundle=folder)
    with pytest.raises(BundleNotFound):
        LearnedRouter(memory(), bundle=tmp_path / "nowhere")


def test_cells_that_do_not_fit_the_manifest_are_refused(tmp_path: Path) -> None:
    def fewer(files: dict[str, bytes]) -> None:
        cells = Cells.from_bytes(files[CELLS])
        fewer_cells = Cells(cells.centroids[:-1], cells.offsets[:-1], cells.sizes[:-1])
        files[CELLS] = fewer_cells.to_bytes()

    with pytest.raises(BundleCorrupt, match="do not fit"):
        LearnedRouter(memory(), bundle=write_bundle(tmp_path, change=fewer))


# The native search answers where the model cannot


def publish(tmp_path: Path, **changes: Any) -> Registry:
    """Publish a bundle, and put it where the collection ``docs`` looks for its own."""
    registry = Registry(tmp_path / "registry")
    registry.publish(write_bundle(tmp_path / "made", **changes))
    (made,) = (tmp_path / "registry").glob("*/*/*")
    home = Path(registry._home(collection_key(memory().info)))
    if made != home:
        home.parent.mkdir(parents=True, exist_ok=True)
        made.rename(home)
    return registry


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_without_a_bundle(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    router = LearnedRouter(memory(), registry=tmp_path / "nowhere")
    assert not router.learned
    assert router.manifest is None
    assert_native(router, "bundle: BundleNotFound")
    assert_native(router, "bundle: BundleNotFound")
    assert router.fallbacks == {"bundle: BundleNotFound": 2}
    assert len(logged(caplog)) == 1
    assert "No bundle serves 'docs'" in logged(caplog)[0]


@pytest.mark.parametrize("changes", MISMATCHES)
def test_a_registry_with_the_bundle_of_another(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    router = LearnedRouter(memory(), registry=publish(tmp_path, **changes))
    assert_native(router, "bundle: BundleMismatch")
    assert_native(router, "bundle: BundleMismatch")
    assert len(logged(caplog)) == 1


@pytest.mark.parametrize("name", [*make_files(), MANIFEST, "latest.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "flipped"])
def test_a_registry_with_a_damaged_bundle(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    registry = publish(tmp_path)
    (path,) = (tmp_path / "registry").rglob(name)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "empty" else bytes([data[0] ^ 1]) + data[1:])
    router = LearnedRouter(memory(), registry=registry)
    if name in (MODEL, CELLS, CALIBRATION, MANIFEST, "latest.json"):
        assert_native(router, "bundle: Bundle")
        assert len(logged(caplog)) == 1
    else:  # only laying out reads the others
        assert router.learned


class StorageError(Exception):
    """As the clients of object stores have them: no OSError."""


@pytest.mark.parametrize("failure", [PermissionError(13, "not yours"), StorageError("no access")])
def test_a_registry_that_cannot_be_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: Exception,
) -> None:
    registry = publish(tmp_path)

    def refuse(_: str) -> bytes:
        raise failure

    monkeypatch.setattr(registry, "_read", refuse)
    router = LearnedRouter(memory(), registry=registry)
    assert_native(router, f"bundle: {type(failure).__name__}")
    assert len(logged(caplog)) == 1


def test_a_collection_that_is_not_laid_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    router = LearnedRouter(memory(), bundle=folder)
    assert_native(router, "search: InvalidInput")
    assert_native(router, "search: InvalidInput")
    assert len(logged(caplog)) == 1
    assert "lay it out with the bundle that made the plan" in logged(caplog)[0]
    assert router.fallbacks.total() == 2


def fail(_: FloatArray) -> QueryPlan:
    raise RuntimeError("out of memory")


def nan(queries: FloatArray) -> QueryPlan:
    return QueryPlan(rewritten=np.full_like(queries, np.nan), rescore=30)


def one_nan(queries: FloatArray) -> QueryPlan:
    rewritten = queries.copy()
    rewritten[-1, 0] = np.inf
    return QueryPlan(rewritten=rewritten, rescore=30)


def cells(array: IntArray, layout: str | None = "here") -> Callable[[FloatArray], QueryPlan]:
    return lambda _: QueryPlan(cells=array, layout=layout)


N = len(QUERIES)


@pytest.mark.parametrize(
    "give",
    [
        fail,
        nan,
        one_nan,
        lambda q: QueryPlan(rewritten=q[:-1], rescore=30),
        lambda q: QueryPlan(rewritten=np.vstack([q, q]), rescore=30),
        lambda q: QueryPlan(rewritten=q[:, :-1].copy(), rescore=30),
        lambda q: QueryPlan(rewritten=np.hstack([q, q]), rescore=30),
        lambda q: QueryPlan(rewritten=q[0], rescore=30),
        lambda _: None,
        lambda q: q,
        cells(np.zeros((N - 1, 2), dtype=np.int64)),
        cells(np.zeros((N + 1, 2), dtype=np.int64)),
        cells(np.zeros(N, dtype=np.int64)),
        cells(np.zeros((N, 2), dtype=np.int64), "there"),
        cells(np.zeros((N, 2), dtype=np.int64), None),
    ],
)
def test_a_hook_that_fails(
    give: Callable[[FloatArray], Any], caplog: pytest.LogCaptureFixture
) -> None:
    collection = memory().lay_out("here", 2, lambda ids, _: np.zeros(len(ids), dtype=np.int64))
    router = LearnedRouter(collection, hook=Hook(give))
    for _ in range(3):
        assert_native(router, "")
    assert len(router.fallbacks) == 1
    assert router.fallbacks.total() == 3
    assert len(logged(caplog)) == 1
    assert "The native search answers for 'docs'" in logged(caplog)[0]


def test_a_users_hook_may_refuse_its_caller() -> None:
    def refuse(_: FloatArray) -> QueryPlan:
        raise InvalidInput("Not today.")

    router = LearnedRouter(memory(), hook=Hook(refuse))
    with pytest.raises(InvalidInput, match="Not today"):
        router.search(QUERIES)
    assert not router.fallbacks


def test_an_interrupt_is_not_a_fallback() -> None:
    def interrupt(_: FloatArray) -> QueryPlan:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        LearnedRouter(memory(), hook=Hook(interrupt)).search(QUERIES)


def test_each_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    answers = iter([fail, nan, fail, nan])
    router = LearnedRouter(memory(), hook=Hook(lambda queries: next(answers)(queries)))
    for _ in range(4):
        assert_native(router, "model: ")
    assert router.fallbacks == {"model: RuntimeError": 2, "model: ModelFault": 2}
    assert len(logged(caplog)) == 2


# The database's own errors


def test_a_routed_search_that_fails_is_searched_natively(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spy = Spy(laid_out(folder), [ConnectionError("partition gone")])
    router = LearnedRouter(spy, bundle=folder)
    assert_native(router, "search: ConnectionError")
    (routed, plan), (request, after) = spy.asked
    assert plan.cells is not None
    assert after is NATIVE
    assert request == routed
    assert "partition gone" in logged(caplog)[0]
    assert router.search(QUERIES[0], k=5, n_probes=2).trace.mode == "route"  # it may be back


class DatabaseError(Exception):
    pass


@pytest.mark.parametrize("route", [True, False])
def test_errors_of_the_database_surface(folder: Path, route: bool) -> None:
    spy = Spy(laid_out(folder), [DatabaseError("first"), DatabaseError("second")])
    source: dict[str, Any] = {"bundle": folder} if route else {"hook": NativeHook()}
    router = LearnedRouter(spy, **source)
    with pytest.raises(DatabaseError, match="second" if route else "first"):
        router.search(QUERIES, k=5, n_probes=2)
    assert not router.fallbacks  # nothing answered in its place
    assert len(spy.asked) == (2 if route else 1)


def test_a_hooks_own_empty_plan_is_searched_once() -> None:
    spy = Spy(memory(), [DatabaseError("once")])
    with pytest.raises(DatabaseError, match="once"):
        LearnedRouter(spy, hook=Hook(lambda _: QueryPlan())).search(QUERIES, k=5)
    assert len(spy.asked) == 1


class Slow(Spy):
    """Takes a while to fail."""

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        if plan.cells is not None:
            time.sleep(0.05)
            raise TimeoutError("too slow")
        return super().search(request, plan)


def test_a_timeout_is_one_deadline_for_both_searches(folder: Path) -> None:
    spy = Slow(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    hits = router.search(QUERIES[0], k=5, n_probes=2, timeout=30.0)
    assert hits.trace.fallback == "search: TimeoutError"
    left = spy.asked[0][0].timeout
    assert left is not None
    assert 20.0 < left <= 29.95
    with pytest.raises(TimeoutError, match="too slow"):
        router.search(QUERIES[0], k=5, n_probes=2, timeout=0.01)
    assert len(spy.asked) == 1


# Short answers are completed


def only(*keys: int) -> Callable[[Id, Mapping[str, Any]], bool]:
    """A filter that few keys pass."""
    return lambda key, _: key in keys


def members_of(folder: Path, cell: int) -> list[int]:
    rows: list[int] = np.flatnonzero(np.load(folder / "known_cells.npy") == cell).tolist()
    return rows


def test_a_narrow_filter_is_answered_in_full(folder: Path) -> None:
    """The keys it leaves lie in cells that the model did not choose."""
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder)
    (cell,) = router.search(QUERIES[0], k=1, n_probes=1, explain=True).trace.cells
    elsewhere = members_of(folder, (cell + 1) % N_CELLS)[:3]
    keep = only(*elsewhere)
    hits = router.search(QUERIES[0], k=3, n_probes=1, filter=keep, fields=["group"])
    assert hits.trace == Trace("native", n_probes=1, version="v1", fallback=TOO_FEW)
    assert {hit.id for hit in hits} == set(elsewhere)
    assert pairs(hits) == native(collection, 3, filter=keep)[0]
    assert [dict(hit.fields) for hit in hits] == [{"group": hit.id % 3} for hit in hits]
    assert router.fallbacks == {TOO_FEW: 1}


def test_a_filter_that_nothing_passes_gives_nothing(folder: Path) -> None:
    router = LearnedRouter(laid_out(folder), bundle=folder)
    hits = router.search(QUERIES[0], k=3, n_probes=2, filter=only())
    assert list(hits) == []
    assert hits.trace.fallback == TOO_FEW


def test_cells_with_fewer_than_k_keys_are_completed(folder: Path) -> None:
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder)
    k = 1 + int(np.bincount(np.load(folder / "known_cells.npy")).max())
    found = router.search(QUERIES, k=k, n_probes=1)
    assert [pairs(hits) for hits in found] == native(collection, k)
    assert {hits.trace.fallback for hits in found} == {TOO_FEW}


def test_only_the_short_rows_of_a_batch_are_searched_again(folder: Path) -> None:
    """Cells 0 and 1 for the rows by turns; in cell 1 the filter leaves one key."""
    spy = Spy(laid_out(folder))
    many, few = members_of(folder, 0), members_of(folder, 1)
    cells = np.tile([[0], [1]], (len(QUERIES) // 2, 1))
    plan = QueryPlan(cells=cells, layout=spy.layout())
    router = LearnedRouter(spy, hook=Hook(lambda _: plan))
    keep = only(*many, few[0])
    found = router.search(QUERIES, k=2, filter=keep, params={"ef": 3}, explain=True)
    (first, routed), (second, natively) = spy.asked
    assert (len(first.queries), routed) == (len(QUERIES), plan)
    assert natively is NATIVE
    np.testing.assert_array_equal(second.queries, QUERIES[1::2])
    assert (second.k, second.filter, second.params) == (2, keep, {"ef": 3})
    exact = native(spy, 2, filter=keep)
    for row, hits in enumerate(found):
        trace = hits.trace
        assert trace.plan_us is not None
        assert trace.search_ms is not None
        if row % 2:
            assert pairs(hits) == exact[row]
            assert (trace.mode, trace.fallback) == ("native", TOO_FEW)
            assert (trace.n_probes, trace.cells, trace.scanned) == (1, (1,), None)
        else:
            assert {hit.id for hit in hits} <= set(many)
            assert (trace.mode, trace.fallback, trace.cells) == ("route", None, (0,))
    assert router.fallbacks == {TOO_FEW: 1}  # one more search, however many rows


def test_a_full_answer_is_not_searched_again(folder: Path) -> None:
    spy = Spy(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    router.search(QUERIES, k=1, n_probes=1)
    assert len(spy.asked) == 1
    assert not router.fallbacks


def test_a_rewrite_that_finds_too_few_is_completed(keynet: Path) -> None:
    class Stingy(Spy):
        """An index that gives half of what a rewritten query asks for."""

        def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
            found = super().search(request, plan)
            return [hits[:2] for hits in found] if plan.rewritten is not None else found

    spy = Stingy(memory())
    router = LearnedRouter(spy, bundle=keynet)
    found = router.search(QUERIES, k=5)
    assert [pairs(hits) for hits in found] == native(memory())
    assert {hits.trace for hits in found} == {Trace("native", version="v1", fallback=TOO_FEW)}
    assert len(spy.asked) == 2


def test_a_native_search_is_never_completed() -> None:
    spy = Spy(memory())
    hits = LearnedRouter(spy, hook=NativeHook()).search(QUERIES[0], k=5, filter=only(3))
    assert [hit.id for hit in hits] == [3]
    assert hits.trace == Trace("native")
    assert len(spy.asked) == 1


class Late(Spy):
    """Takes a while for a routed search."""

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        if plan.cells is not None:
            time.sleep(0.05)
        return super().search(request, plan)


def test_completing_keeps_the_callers_one_deadline(folder: Path) -> None:
    spy = Late(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    router.search(QUERIES[0], k=COUNT, n_probes=1, timeout=30.0)
    (_, _), (again, _) = spy.asked
    assert again.timeout is not None
    assert 20.0 < again.timeout <= 29.95
    # With no time left the caller has what was found, and no search comes after the deadline.
    hits = router.search(QUERIES[0], k=COUNT, n_probes=1, timeout=0.01)
    assert len(spy.asked) == 3
    assert 0 < len(hits) < COUNT
    assert (hits.trace.mode, hits.trace.fallback) == ("route", None)


def test_an_error_while_completing_is_the_databases(folder: Path) -> None:
    class Second(Spy):
        def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
            if plan is NATIVE:
                raise DatabaseError("gone")
            return super().search(request, plan)

    router = LearnedRouter(Second(laid_out(folder)), bundle=folder)
    with pytest.raises(DatabaseError, match="gone"):
        router.search(QUERIES[0], k=COUNT, n_probes=1)
    assert not router.fallbacks
