"""Whether a router keeps its promise while it serves: under filters, and with traffic's repeats.

On a Qdrant Edge shard with a graph, indexed payload and cells. Filters are of nine classes: a label
that has nothing to do with the vector, the cluster that holds the query's best key, and another
cluster, each held by 20, 5 and 1 % of the keys. Costs under filters are seconds of CPU that this
process spends in the engine, one search at a time (the router's own microseconds are in
docs/reliability.md); those of traffic are shares of the keys looked at. Every search that is timed
finds the processor's caches full of something else, as one does that comes after a wait: else
whichever has less Python before it looks cheaper.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amips_plugins import LearnedRouter
from amips_plugins.bundle.package import Bundle
from amips_plugins.cli.progress import show_progress
from amips_plugins.collection import Collection, Hit, SearchRequest
from amips_plugins.export.clustering import native_cells
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.health.recall import recall_at_k
from amips_plugins.layout import lay_out
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray, IntArray, Metric, normalise
from benchmarks.promise_rows import Row

__all__ = ["World", "filtered", "traffic"]

K, TARGET = 10, 0.95
SHARES = (20, 5, 1)
KINDS = ("any", "own cluster", "another cluster")
_BATCH = 1_000
_SOMETHING_ELSE = np.ones(
    1 << 23, dtype=np.float32
)  # 32 MiB: more than a core's share of its caches


class Switched(HealthMonitor):
    """Looks at every search at once, while it is on."""

    on = True

    def chosen(self, n_queries: int = 1) -> bool:
        """Leave searches alone while it is off."""
        return self.on and super().chosen(n_queries)


@dataclass(frozen=True)
class World:
    """A shard in cells, and what it holds.

    Attributes
    ----------
    collection
        The shard.
    bundle
        Trained for it.
    keys
        ``(n, dim)`` unit keys.
    labels
        For each class of filters ``(n,)`` the label of every key.
    """

    collection: Any
    bundle: Path
    keys: FloatArray
    labels: dict[tuple[str, int], IntArray]

    @classmethod
    @contextmanager
    def built(
        cls, keys: FloatArray, queries: FloatArray, n_cells: int, work: Path
    ) -> Iterator[World]:
        """Build the shard, train on ``queries``, and lay it out."""
        import qdrant_edge as edge

        from amips_plugins.adapters.qdrant_edge.collection import QdrantEdgeCollection

        keys = normalise(keys)
        rng = np.random.default_rng(0)
        labels: dict[tuple[str, int], IntArray] = {}
        for share in SHARES:
            clusters = native_cells(keys, Metric.COSINE, 100 // share, 0)[1]
            labels["any", share] = rng.integers(100 // share, size=len(keys))
            labels["own cluster", share] = labels["another cluster", share] = clusters
        graph = edge.HnswIndexConfig(16, 100, 1_000)
        params = edge.EdgeVectorParams(
            size=keys.shape[1], distance=edge.Distance.Cosine, hnsw_config=graph
        )
        shard = edge.EdgeShard.create(str(work / "docs"), edge.EdgeConfig(vectors=params))
        for kind, share in labels:
            index = edge.PayloadSchemaType.Integer
            shard.update(edge.UpdateOperation.create_field_index(_name(kind, share), index))
        shard.close()
        collection = QdrantEdgeCollection.connect(str(work), "docs")
        try:
            names = {_name(*which): found.tolist() for which, found in labels.items()}
            for low in range(0, len(keys), _BATCH):
                rows = range(low, min(low + _BATCH, len(keys)))
                fields = [{name: found[row] for name, found in names.items()} for row in rows]
                collection.upsert(rows, keys[rows.start : rows.stop], fields)
            snapshot = take_snapshot(collection, work / "snap", progress=show_progress)
            options = TrainOptions(model="linear", n_cells=n_cells, recall=TARGET)
            run = train(snapshot, queries, work / "run", options, show_progress)
            laid = lay_out(collection, Bundle.in_folder(run.bundle), show_progress)
            collection.optimize()
            yield cls(laid, run.bundle, keys, labels)
        finally:
            collection.close()

    def condition(self, kind: str, share: int, query: FloatArray, rng: random.Random) -> Any:
        """Return a filter of a class for a query."""
        import qdrant_edge as edge

        labels, count = self.labels[kind, share], 100 // share
        label = int(labels[int((self.keys @ query).argmax())])
        if kind != "own cluster":
            label = (label + rng.randrange(1, count)) % count
        match = edge.MatchValue(label)
        return edge.Filter(must=[edge.FieldCondition(_name(kind, share), match=match)])


class Metered:
    """A collection that notes the CPU that its searches take."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search, and note what it takes."""
        _SOMETHING_ELSE.sum()
        started = time.process_time()
        found: list[list[Hit]] = self._inner.search(request, plan)
        self.seconds += time.process_time() - started
        return found


def filtered(world: World, practice: FloatArray, test: FloatArray) -> Iterator[Row]:
    """Serve each class of filters until it is known, then measure; and as if always routed."""
    rng = random.Random(0)  # noqa: S311 - a benchmark
    for kind, share in world.labels:
        name = f"filter: {kind}, {share} %"
        watch = Switched(share=1.0, at_most_every=0.0, at_most_busy=1.0, drift_share=0.0)
        collection = Metered(world.collection)
        router = LearnedRouter(collection, bundle=world.bundle, refresh=None, watch=watch)
        for query in practice:
            router.search(query, K, filter=world.condition(kind, share, query, rng))
            watch.idle(60)
        watch.on = False
        asked = [(query, world.condition(kind, share, query, rng)) for query in test]
        yield _measure(name, router, collection, asked)
        known = HealthMonitor(share=0.0, drift_share=0.0, filters=[asked[0][1]])
        blind = LearnedRouter(collection, bundle=world.bundle, refresh=None, watch=known)
        yield _measure(f"{name}, routed at once", blind, collection, asked)


def _measure(
    name: str, router: LearnedRouter, collection: Metered, asked: list[tuple[FloatArray, Any]]
) -> Row:
    routed = 0
    found: list[float] = []
    native: list[float] = []
    seconds = {True: 0.0, False: 0.0}
    for number, (query, condition) in enumerate(asked):
        request = SearchRequest(query[None], K, condition)
        (exact,) = collection.exact(request)
        answers: dict[bool, Any] = {}
        for natively in (number % 2 == 0, number % 2 == 1):  # neither always comes first
            collection.seconds = 0.0
            if natively:
                answers[natively] = collection.search(request)[0]
            else:
                answers[natively] = router.search(query, K, filter=condition)
            seconds[natively] += collection.seconds
        for natively, kept in ((True, native), (False, found)):
            kept.append(recall_at_k(answers[natively], exact, K, larger_is_better=True))
        routed += answers[False].trace.mode == "route"
    return Row(
        situation=name,
        target=TARGET,
        k=K,
        recall=float(np.mean(found)),
        native_recall=float(np.mean(native)),
        cost_ratio=seconds[False] / seconds[True],
        answered_by="learned" if routed > len(asked) / 2 else "native",
    )


class Remembering:
    """A collection that searches for the same thing once: popular questions come again."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._known: dict[Any, list[Hit]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search, or remember."""
        cells = None if plan.cells is None else plan.cells.tobytes()
        return [self._once((request.queries.tobytes(), cells), request, plan)]

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        """Search exactly, or remember."""
        return [self._once((request.queries.tobytes(), "exact"), request, None)]

    def _once(self, what: Any, request: SearchRequest, plan: QueryPlan | None) -> list[Hit]:
        if what not in self._known:
            inner = self._inner
            found = inner.exact(request) if plan is None else inner.search(request, plan)
            (self._known[what],) = found
        return self._known[what]


def traffic(world: World, unseen: FloatArray, count: int) -> Iterator[Row]:
    """Serve so many queries of each kind of traffic; measure the last tenth."""
    rng = np.random.default_rng(0)
    popular = 1.0 / np.arange(1, len(unseen) + 1)
    heavy = rng.integers(len(unseen), size=count)
    heavy[rng.random(count) < 0.5] = 0
    collection: Collection = Remembering(world.collection)
    noisy = unseen + rng.normal(0.0, 0.01, unseen.shape).astype(np.float32)
    kinds = {
        "traffic: each once in a while": (unseen, rng.integers(len(unseen), size=count)),
        "traffic: Zipf(1)": (unseen, rng.choice(len(unseen), count, p=popular / popular.sum())),
        "traffic: half of it one query": (unseen, heavy),
        "traffic: 250 questions": (unseen, rng.integers(250, size=count)),
        "traffic: with a little noise": (normalise(noisy), rng.integers(len(unseen), size=count)),
    }
    for name, (queries, order) in kinds.items():
        # As many samples as there would be at so many searches a second.
        watch = HealthMonitor(at_most_every=0.0, at_most_busy=1.0)
        router = LearnedRouter(collection, bundle=world.bundle, refresh=None, watch=watch)
        first = len(order) - len(order) // 10
        recalls, natives, modes, scanned = [], [], [], []
        for number, row in enumerate(order.tolist()):
            hits = router.search(queries[row], K, explain=number >= first)
            if number % 100 == 0:
                watch.idle(60)
            if number >= first:
                request = SearchRequest(queries[row][None], K)
                (exact,) = collection.exact(request)
                (native,) = collection.search(request)
                recalls.append(recall_at_k(hits, exact, K, larger_is_better=True))
                natives.append(recall_at_k(native, exact, K, larger_is_better=True))
                modes.append(hits.trace.mode == "route")
                scanned.append(1.0 if hits.trace.scanned is None else hits.trace.scanned)
        quiet = HealthMonitor(share=0.0, drift_share=0.0)
        calm = LearnedRouter(collection, bundle=world.bundle, refresh=None, watch=quiet)
        planned = [calm.search(queries[row], K, explain=True) for row in order[first:].tolist()]
        as_planned = [1.0 if hits.trace.scanned is None else hits.trace.scanned for hits in planned]
        yield Row(
            situation=f"{name}, after {first:,}",
            target=TARGET,
            k=K,
            recall=float(np.mean(recalls)),
            native_recall=float(np.mean(natives)),
            cost_ratio=float(np.mean(scanned) / np.mean(as_planned)),
            answered_by="learned" if np.mean(modes) >= 0.95 else "native",
        )


def _name(kind: str, share: int) -> str:
    return f"{kind} {share}".replace(" ", "_")
