"""Measuring one collection in all the ways it can be searched."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from amips_plugins import LearnedRouter
from amips_plugins.collection import Collection
from amips_plugins.models.hooks import NativeHook, RewriteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.plan import PreQueryHook, Target
from amips_plugins.vectors import FloatArray, IntArray
from benchmarks.engines import Built, quiet
from benchmarks.learned import Routing
from benchmarks.serving_rows import Served
from benchmarks.traffic import Meter, Search, drive, recall_of, smallest

__all__ = [
    "Exam",
    "K",
    "Method",
    "exact",
    "examine",
    "examine_edge",
    "rewritten",
    "routed",
    "tuned",
]

K = 10
_CLIENTS = (1, 4, 16)
_BATCH = 64


@dataclass(frozen=True)
class Exam:
    """The queries, and how long to ask them.

    Attributes
    ----------
    data, count
        Name of the data, and number of keys.
    tune, tune_hits
        Queries that settings are chosen on, and their true top keys.
    test, test_hits
        Queries that are reported on.
    targets
        Recalls to reach.
    seconds
        Length of each measurement.
    """

    data: str
    count: int
    tune: FloatArray
    tune_hits: IntArray
    test: FloatArray
    test_hits: IntArray
    targets: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class Ready:
    """A method with a setting.

    Attributes
    ----------
    search
        Answers queries.
    setting
        How, in words.
    scanned
        Mean share of the keys in the cells searched, or None.
    """

    search: Search
    setting: str
    scanned: float | None = None


@dataclass(frozen=True)
class Method:
    """A way to search.

    Attributes
    ----------
    name
        What its rows are filed under.
    prepare
        Makes of a collection what tunes the method to a recall; that gives None where it does not
        reach the recall.
    is_exact
        It has no setting, and finds everything.
    """

    name: str
    prepare: Callable[[Collection, Exam], Callable[[float], Ready | None]]
    is_exact: bool = False


def exact(name: str, params: dict[str, Any] | None = None) -> Method:
    """Search everything."""

    def prepare(collection: Collection, exam: Exam) -> Callable[[float], Ready]:  # noqa: ARG001
        router = _router(collection, NativeHook())
        ready = Ready(lambda queries: router.search(queries, K, params=params), "exact")
        return lambda _: ready

    return Method(name, prepare, is_exact=True)


def tuned(name: str, knob: str, low: int, high: int, hook: PreQueryHook | None = None) -> Method:
    """Search natively (or with a hook that rewrites), with the smallest setting that does."""

    def prepare(collection: Collection, exam: Exam) -> Callable[[float], Ready | None]:
        router = _router(collection, hook or NativeHook())

        def search(setting: int) -> Search:
            return lambda queries: router.search(queries, K, params={knob: setting})

        @cache
        def reaches(setting: int) -> float:
            return recall_of(search(setting), exam.tune, exam.tune_hits, K)

        def tune(recall: float) -> Ready | None:
            setting = smallest(reaches, recall, low, high)
            return None if setting is None else Ready(search(setting), f"{knob} {setting}")

        return tune

    return Method(name, prepare)


def rewritten(name: str, model: bytes, knob: str, low: int, high: int) -> Method:
    """Search for what a KeyNet predicts, and rescore."""
    return tuned(name, knob, low, high, RewriteHook(OnnxModel(model)))


def routed(name: str, routing: Routing) -> Method:
    """Search the cells that a router chooses, above the threshold that does."""
    hook = routing.hook()

    def prepare(collection: Collection, exam: Exam) -> Callable[[float], Ready]:
        router = _router(collection, hook)

        def tune(recall: float) -> Ready:
            plan = hook.plan(exam.test, Target(K, recall))
            assert plan.cells is not None
            assert plan.shares is not None
            probes = float((plan.cells >= 0).sum(axis=1).mean())
            return Ready(
                lambda queries: router.search(queries, K, recall=recall),
                f"{probes:.1f} of {routing.n_cells} cells",
                float(plan.shares.mean(dtype=np.float64)),
            )

        return tune

    return Method(name, prepare)


def _router(collection: Collection, hook: PreQueryHook) -> LearnedRouter:
    return LearnedRouter(collection, hook=hook, refresh=None)


def examine(
    engine: str,
    method: Method,
    collection: Collection,
    exam: Exam,
    meter: Meter,
    built: Built,
    memory: float,
) -> Iterator[Served]:
    """Measure a method at every target.

    Parameters
    ----------
    engine
        ``milvus`` or ``edge``.
    method
        How to search.
    collection
        What to search.
    exam
        The queries.
    meter
        Of the process that serves.
    built, memory
        What is known of the collection already.
    """
    idle = quiet(meter)
    embedded = meter.pid == os.getpid()
    tune = method.prepare(collection, exam)
    for target in (1.0,) if method.is_exact else exam.targets:
        ready = tune(target)
        if ready is None:
            continue
        drive(ready.search, exam.test, 1, min(1.0, exam.seconds))  # warm
        begun = _Usage.of(meter)
        one, four, sixteen = (drive(ready.search, exam.test, n, exam.seconds) for n in _CLIENTS)
        single = begun.until_now(meter, idle)
        begun = _Usage.of(meter)
        batch = drive(ready.search, exam.test, 1, exam.seconds, _BATCH)
        batched = begun.until_now(meter, idle)
        queries = one.queries + four.queries + sixteen.queries
        yield Served(
            data=exam.data,
            keys=exam.count,
            engine=engine,
            method=method.name,
            target=target,
            setting=ready.setting,
            recall=recall_of(ready.search, exam.test, exam.test_hits, K),
            scanned=ready.scanned,
            p50=one.quantile(0.5),
            p99=one.quantile(0.99),
            rate_1=one.rate,
            rate_4=four.rate,
            rate_16=sixteen.rate,
            rate_batch=batch.rate,
            cpu=1e3 * single.server / queries,
            cpu_batch=1e3 * batched.server / batch.queries,
            cpu_client=None if embedded else 1e3 * single.client / queries,
            build=built.seconds,
            build_cpu=built.cpu,
            memory=memory,
        )


@dataclass(frozen=True)
class _Usage:
    """CPU seconds of the server and of this process, and the time."""

    server: float
    client: float
    at: float

    @classmethod
    def of(cls, meter: Meter) -> _Usage:
        return cls(meter.cpu(), time.process_time(), time.perf_counter())

    def until_now(self, meter: Meter, idle: float) -> _Usage:
        """Return what was used since, less what the server uses anyway."""
        now = self.of(meter)
        seconds = now.at - self.at
        return _Usage(
            max(0.0, now.server - self.server - idle * seconds), now.client - self.client, seconds
        )


def examine_edge(folder: Path, built: Built, exam: Exam, routing: Routing | None) -> list[Served]:
    """Measure a Qdrant Edge shard; for a process of its own, whose memory is counted.

    Parameters
    ----------
    folder
        Folder of shards.
    built
        The shard.
    exam
        The queries.
    routing
        The cells it has, or None for HNSW.
    """
    from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

    methods = [tuned("HNSW", "hnsw_ef", K, 2_000)]
    if routing is not None:
        methods = [exact("full scan", {"exact": True}), routed("cells", routing)]
    meter = Meter(os.getpid())
    before = meter.memory()
    collection = QdrantEdgeCollection.connect(str(folder), built.name)
    try:
        _router(collection, NativeHook()).search(exam.tune, K)  # what is mapped is read now
        memory = meter.memory() - before
        return [
            row
            for method in methods
            for row in examine("edge", method, collection, exam, meter, built, memory)
        ]
    finally:
        collection.close()
