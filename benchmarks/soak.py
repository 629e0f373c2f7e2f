"""A soak: searches at full load while bundles are swapped and everything fails in turn.

    python benchmarks/soak.py [--minutes 15] [--json soak.json] [--figure docs/figures/soak.svg]

Two routers on 20,000 keys in memory, so that the load is ours and not a database's, one of them
with a user's hook; one on a Milvus server of its own (``--milvus`` names another, a path is Milvus
Lite). Threads and tasks search, others write and delete, with metrics, spans and query logs on.
Every few seconds a bundle is published, pinned or rolled back, and then one of eight things fails
for a while. Every answer is checked; at the end so are memory, threads and open files.

It ends with an error where a router raised what the bare client would not have, gave an answer
that cannot be, did not find back to its model, or holds more and more.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry, generate_latest
from pymilvus import DataType, MilvusClient

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs as a file

from amips_plugins import AsyncLearnedRouter, LearnedRouter, MemoryCollection, Registry
from amips_plugins.bundle.loading import load_hook
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import CollectionKey, collection_key
from amips_plugins.files import replace_file
from amips_plugins.health.monitor import HealthMonitor
from amips_plugins.layout import lay_out
from amips_plugins.observe.metrics import RouterMetrics
from amips_plugins.observe.query_log import QueryLog
from amips_plugins.observe.tracing import SearchSpans
from amips_plugins.vectors import FloatArray
from benchmarks.soak_data import METRIC, Corpus, K, make_corpus, write_bundle
from benchmarks.soak_faults import (
    BAD,
    Away,
    SharedMemory,
    Trouble,
    Unsteady,
    Watched,
    damaged,
    slept,
)
from benchmarks.soak_watch import Sample, Sampler, draw, growth
from integration_tests.containers import MilvusContainer, no_engine
from integration_tests.servers import MilvusProcess

_DIM = 64
_SPARE = 200  # ids that come and go
_VERSIONS = 4
_REFRESH = 0.5  # seconds
_PLAN_TIMEOUT = 0.05
_PATIENCE = 90.0  # seconds that a router may take to use its model again: a breaker rests up to 60
_MOST_MEMORY = 24.0  # MiB that may be gained; the bundles alone are swapped hundreds of times
_MOST_THREADS = 4.0
_MOST_FILES = 4.0
_JUDGED = 4.0  # minutes from which on that is judged: before, it is all warm-up
_CLOSE = 1e-4  # of a score
_EXACT = 50  # one answer in so many is compared with a full scan


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the soak found.

    Attributes
    ----------
    minutes
        How long it took.
    searches, writes
        Calls of the routers, by who made them.
    modes
        Queries answered, by mode.
    away
        Errors that the bare client would have had, too.
    wrong
        Everything that must not be.
    fallbacks
        Of all routers, by reason.
    swaps
        Publications, pins and rollbacks; each for every collection with a registry.
    faults
        How often each thing went wrong.
    logged
        Warnings.
    rss_start, rss_end, rss_growth
        MiB: at the end of the warm-up, at the end, and between the medians of the first and the
        last quarter of what lies between.
    threads_growth, files_growth
        The same of threads and open files.
    samples
        One a second.
    """

    minutes: float
    searches: dict[str, int]
    writes: dict[str, int]
    modes: dict[str, int]
    away: int
    wrong: list[str]
    fallbacks: dict[str, int]
    swaps: int
    faults: dict[str, int]
    logged: int
    rss_start: float
    rss_end: float
    rss_growth: float
    threads_growth: float
    files_growth: float
    samples: list[Sample]


class Tally:
    """Counts for any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.searches: Counter[str] = Counter()
        self.writes: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.away = 0
        self.wrong: Counter[str] = Counter()

    def searched(self, who: str, found: Sequence[Any]) -> None:
        """Count one search."""
        with self._lock:
            self.searches[who] += 1
            self.modes.update(hits.trace.mode for hits in found)

    def failed(self, who: str, exc: BaseException) -> None:
        """Count an error: an injected one of the database, or one that must not be."""
        with self._lock:
            if isinstance(exc, Away):
                self.away += 1
            else:
                self.wrong[f"{who}: {type(exc).__name__}: {exc}"[:300]] += 1

    def check(self, who: str, *, true: bool, what: str) -> None:
        """Count an answer that cannot be."""
        if not true:
            with self._lock:
                self.wrong[f"{who}: {what}"] += 1


class Warnings(logging.Handler):
    """Counts what the package warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        """Count one."""
        self.count += 1


class Checker:
    """Checks answers against the keys, of which each id has one for ever."""

    def __init__(self, corpus: Corpus, tally: Tally) -> None:
        self._corpus = corpus
        self._tally = tally

    def __call__(self, who: str, queries: FloatArray, found: Sequence[Any], *, full: bool) -> None:
        """Check the answers to a batch; ``full`` compares native ones with a full scan."""
        check = self._tally.check
        for query, hits in zip(queries, found, strict=True):
            ids = [int(hit.id) for hit in hits]
            check(who, true=len(set(ids)) == K, what=f"{len(set(ids))} different hits for k={K}")
            scores = np.array([hit.score for hit in hits])
            own = self._corpus.keys[ids] @ query
            check(who, true=bool(np.allclose(scores, own, atol=_CLOSE)), what="wrong scores")
            ranked = bool((np.diff(scores) <= _CLOSE).all())
            check(who, true=ranked, what="hits out of order")
            check(who, true=hits.trace.version != BAD, what="a damaged bundle serves")
            if full and hits.trace.mode == "native" and scores.size:
                stays = self._corpus.keys[: self._corpus.count] @ query
                better = set(np.flatnonzero(stays > scores[-1] + _CLOSE).tolist())
                check(who, true=better <= set(ids), what="a better key was missed natively")


def _milvus(client: MilvusClient, corpus: Corpus) -> str:
    """Make a collection of the corpus's keys behind an alias, and return the alias."""
    schema = client.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=_DIM)
    index = client.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type=METRIC.name)
    client.create_collection("soak", schema=schema, index_params=index, num_shards=1)
    rows = [{"id": row, "vector": corpus.keys[row]} for row in range(corpus.count)]
    for start in range(0, len(rows), 1000):
        client.insert("soak", rows[start : start + 1000])
    client.flush("soak")
    client.create_alias("soak", "soak_live")
    return "soak_live"


@contextmanager
def _server(given: str | None) -> Iterator[str]:
    if given is not None:
        yield given
        return
    with MilvusContainer() if no_engine() is None else MilvusProcess() as server:
        yield server.uri


class Crowd:
    """Threads that do something again and again until they are stopped."""

    def __init__(self, stop: threading.Event, tally: Tally) -> None:
        self._stop = stop
        self._tally = tally
        self._threads: list[threading.Thread] = []

    def again(self, who: str, once: Callable[[], object]) -> None:
        """Do it again and again, on a thread of its own."""

        def work() -> None:
            while not self._stop.is_set():
                try:
                    once()
                except Exception as exc:  # noqa: BLE001, PERF203 - counted, and told at the end
                    self._tally.failed(who, exc)
                    self._stop.wait(0.01)

        self.on(work)

    def on(self, work: Callable[[], object]) -> None:
        """Start a thread."""
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self) -> None:
        """Wait until all have stopped."""
        for thread in self._threads:
            thread.join(60)


def _searcher(
    who: str, router: LearnedRouter, corpus: Corpus, tally: Tally, seed: int
) -> Callable[[], None]:
    rng, check = np.random.default_rng(seed), Checker(corpus, tally)
    drawn = corpus.queries(rng, 4096)
    options: list[dict[str, Any]] = [{}, {"n_probes": 4}, {"recall": 0.9}, {"timeout": 30.0}]

    def once() -> None:
        rows = rng.integers(len(drawn), size=int(rng.choice([1, 1, 1, 8])))
        queries = drawn[rows]
        asked = options[rng.integers(len(options))]
        try:
            found = router.search(queries, K, **asked)
        except Exception as exc:
            if not isinstance(exc, Away):  # would the bare client have had it, too?
                _as_the_client(router, queries, exc)
            raise
        check(who, queries, found, full=bool(rng.integers(_EXACT) == 0))
        tally.searched(who, found)

    return once


def _as_the_client(router: LearnedRouter, queries: FloatArray, exc: Exception) -> None:
    """Ask the bare Milvus client the same; where it fails alike, the error is the database's."""
    collection = router.collection
    if not isinstance(collection, Watched):
        return
    try:
        collection.client.search(
            collection.info.name, data=queries, anns_field="vector", limit=K, timeout=30.0
        )
    except Exception as own:  # noqa: BLE001 - whatever it is, it is the database's
        raise Away(f"the database's own: {own}") from exc


def _writer(
    who: str, router: LearnedRouter, corpus: Corpus, tally: Tally, stop: threading.Event
) -> Callable[[], None]:
    rng = np.random.default_rng(7)
    spare = np.arange(corpus.count, corpus.count + _SPARE)

    def once() -> None:
        ids = rng.choice(spare, 5, replace=False)
        if rng.random() < 0.4:
            router.delete(ids.tolist())
        else:
            router.upsert(ids.tolist(), corpus.keys[ids])
        tally.writes[who] += 1  # one thread a router
        stop.wait(0.1)

    return once


async def _tasks(
    router: LearnedRouter, corpus: Corpus, tally: Tally, stop: threading.Event, count: int
) -> None:
    """Search from several tasks of one loop."""
    shared, check = AsyncLearnedRouter(router, None), Checker(corpus, tally)

    async def work(seed: int) -> None:
        rng = np.random.default_rng(1000 + seed)
        drawn = corpus.queries(rng, 1024)
        while not stop.is_set():
            queries = drawn[rng.integers(len(drawn), size=1)]
            try:
                found = await shared.search(queries, K)
                check("tasks", queries, found, full=bool(rng.integers(_EXACT) == 0))
                tally.searched("tasks", found)
            except Exception as exc:  # noqa: BLE001 - counted, and told at the end
                tally.failed("tasks", exc)
            await asyncio.sleep(0.002)

    await asyncio.gather(*(work(seed) for seed in range(count)))


class Soak:
    """The routers, and who uses them.

    Parameters
    ----------
    home
        A folder for everything.
    uri
        Of Milvus.
    stack
        Closes what is opened.
    """

    def __init__(self, home: Path, uri: str, stack: ExitStack) -> None:
        self.tally, self.stop = Tally(), threading.Event()
        self.faults = Watched.faults
        self.large = make_corpus(20_000, _SPARE, _DIM, 64)
        self.small = make_corpus(4_000, _SPARE, _DIM, 16)
        client = MilvusClient(uri)
        stack.callback(client.close)
        alias = _milvus(client, self.small)

        inner = MemoryCollection(self.large.keys[: self.large.count], metric=METRIC, name="soak")
        keys = {
            collection_key(inner.info): self.large,
            CollectionKey(database="milvus", name="soak", field="vector"): self.small,
        }
        versions = {
            key: [
                write_bundle(home / key.database / f"v{at}", corpus, key, f"v{at}", 20.0 + at)
                for at in range(1, _VERSIONS + 1)
            ]
            for key, corpus in keys.items()
        }
        registry = Registry(home / "registry")
        for key, folders in versions.items():
            for folder in reversed(folders):
                registry.publish(folder)
            damaged(home / "registry", key, folders[0].name)
        first = {key.database: Bundle.in_folder(folders[0]) for key, folders in versions.items()}
        lay_out(inner, first["memory"])
        lay_out(Watched(client, alias), first["milvus"], work=home)

        logs = [home / "log-memory", home / "log-milvus"]
        kept = [
            stack.enter_context(QueryLog(log, max_queries=2_000, flush_every=5.0)) for log in logs
        ]
        spans = SearchSpans(TracerProvider())
        memory, milvus = SharedMemory(inner, self.faults), Watched(client, alias)
        self.hook = Unsteady(load_hook(first["memory"]))
        refresh: dict[str, Any] = {"refresh": _REFRESH, "plan_timeout": _PLAN_TIMEOUT}

        def watch() -> HealthMonitor:
            return HealthMonitor(share=0.01, at_most_every=0.2, at_most_busy=0.2)

        self.routers = {
            "memory": LearnedRouter(
                memory,
                registry=registry,
                observers=[kept[0], spans],
                watch=watch(),
                **refresh,
            ),
            "hook": LearnedRouter(
                memory, hook=self.hook, observers=[kept[0], spans], watch=watch(), **refresh
            ),
            "milvus": LearnedRouter(
                milvus,
                registry=registry,
                observers=[kept[1], spans],
                watch=watch(),
                **refresh,
            ),
        }
        self.corpora = {"memory": self.large, "hook": self.large, "milvus": self.small}
        self.metrics = CollectorRegistry()
        RouterMetrics(*self.routers.values(), registry=self.metrics)
        self.registry = registry
        self.trouble = Trouble(registry, home / "registry", versions, self.hook, self.faults, logs)

    def run(self, minutes: float, hold: float) -> list[Sample]:
        """Have everybody at work for so long; return the samples."""
        sampler, crowd = Sampler(), Crowd(self.stop, self.tally)
        for who, threads in (("memory", 2), ("hook", 1), ("milvus", 2)):
            for at in range(threads):
                search = _searcher(who, self.routers[who], self.corpora[who], self.tally, at)
                crowd.again(who, search)
        for who in ("memory", "milvus"):
            write = _writer(who, self.routers[who], self.corpora[who], self.tally, self.stop)
            crowd.again(f"{who} writer", write)
        crowd.on(
            lambda: asyncio.run(
                _tasks(self.routers["memory"], self.large, self.tally, self.stop, 8)
            )
        )

        def sample() -> None:
            sampler.take(self.tally.searches.total())
            generate_latest(self.metrics)
            self.stop.wait(1.0)

        crowd.again("sampler", sample)
        until, pause = time.monotonic() + 60 * minutes, slept(self.stop)
        while time.monotonic() < until:
            self.trouble.go_on(hold, pause)
        self.find_back()
        self.stop.set()
        crowd.join()
        return sampler.samples

    def find_back(self) -> None:
        """Once nothing fails any more, every router uses its model, of the version that serves."""
        for who, router in self.routers.items():
            until = time.monotonic() + _PATIENCE
            query = self.corpora[who].centres[0]
            while True:
                trace = router.search(query, K, n_probes=2).trace
                wanted = None
                if who != "hook":
                    wanted = self.registry.current(collection_key(router.collection.info))
                if trace.mode == "route" and trace.version == wanted:
                    break
                if time.monotonic() > until:
                    self.tally.check(who, true=False, what=f"it did not find back: {trace}")
                    break
                time.sleep(0.2)


def _report(
    soak: Soak, minutes: float, warm_up: float, logged: int, samples: list[Sample]
) -> Report:
    tally, fallbacks = soak.tally, Counter[str]()
    for router in soak.routers.values():
        fallbacks.update(router.fallbacks)
    judged = [sample for sample in samples if sample.seconds >= warm_up]
    grown = {name: growth(judged, name) for name in ("rss", "threads", "files")}
    wrong = [f"{what} ({count} times)" for what, count in tally.wrong.most_common()]
    for name, most in (("rss", _MOST_MEMORY), ("threads", _MOST_THREADS), ("files", _MOST_FILES)):
        if grown[name] > most and minutes >= _JUDGED:
            wrong.append(f"{name} grew by {grown[name]:.1f}, more than {most}")
    idle = [name for name, count in soak.trouble.counts.items() if count == 0]
    if idle and minutes >= _JUDGED:
        wrong.append(f"never happened: {', '.join(idle)}")
    return Report(
        minutes=minutes,
        searches=dict(tally.searches),
        writes=dict(tally.writes),
        modes=dict(tally.modes),
        away=tally.away,
        wrong=wrong,
        fallbacks=dict(fallbacks.most_common()),
        swaps=soak.trouble.swaps,
        faults=soak.trouble.counts,
        logged=logged,
        rss_start=judged[0].rss,
        rss_end=judged[-1].rss,
        rss_growth=grown["rss"],
        threads_growth=grown["threads"],
        files_growth=grown["files"],
        samples=samples,
    )


def _print(report: Report) -> None:
    rows: list[tuple[str, object]] = [
        ("minutes", f"{report.minutes:.1f}"),
        *((f"searches: {who}", count) for who, count in report.searches.items()),
        *((f"writes: {who}", count) for who, count in report.writes.items()),
        *((f"queries answered by mode {mode}", n) for mode, n in report.modes.items()),
        ("swaps of the bundle", report.swaps),
        *((f"fault: {name}", count) for name, count in report.faults.items()),
        *((f"fallback: {reason}", count) for reason, count in report.fallbacks.items()),
        ("errors that the bare client had, too", report.away),
        ("warnings logged", report.logged),
        ("RSS after the warm-up, MiB", f"{report.rss_start:.0f}"),
        ("RSS at the end, MiB", f"{report.rss_end:.0f}"),
        ("RSS, first to last quarter, MiB", f"{report.rss_growth:+.1f}"),
        ("threads, first to last quarter", f"{report.threads_growth:+.0f}"),
        ("open files, first to last quarter", f"{report.files_growth:+.0f}"),
        ("what must not be", len(report.wrong)),
    ]
    click.echo("| what | |\n| --- | ---: |")
    for name, value in rows:
        click.echo(f"| {name} | {value} |")


@click.command()
@click.option("--minutes", default=15.0, show_default=True)
@click.option("--hold", default=2.0, show_default=True, help="Seconds of each fault.")
@click.option("--milvus", "uri", help="A server's URI or a path; left out, a server of its own.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File of the report.")
@click.option("--figure", type=click.Path(path_type=Path), help="File of the figure.")
def main(
    minutes: float, hold: float, uri: str | None, json_file: Path | None, figure: Path | None
) -> None:
    """Search at full load while bundles are swapped and everything fails in turn."""
    warnings = Warnings()
    package = logging.getLogger("amips_plugins")
    package.addHandler(warnings)
    package.propagate = False
    # At the end a router may be looking at the server that goes; what searches raise is counted.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        soak = Soak(home, stack.enter_context(_server(uri)), stack)
        started = time.monotonic()
        samples = soak.run(minutes, hold)
        taken = (time.monotonic() - started) / 60.0
        warm_up = min(120.0, 12.0 * minutes)
        report = _report(soak, taken, warm_up, warnings.count, samples)
    _print(report)
    if json_file is not None:
        replace_file(json_file, msgspec.json.encode(report))
    if figure is not None:
        title = f"Soak of {taken:.0f} minutes: {sum(report.searches.values()):,} searches"
        draw(samples, warm_up, title, figure)
    if report.wrong:
        raise click.ClickException("This must not be:\n" + "\n".join(report.wrong))


if __name__ == "__main__":
    main()
