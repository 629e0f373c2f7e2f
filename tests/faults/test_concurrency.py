"""Threads and tasks that search while everything is exchanged beneath them."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from amips_plugins import AsyncLearnedRouter, LearnedRouter, MilvusCollection, Registry
from amips_plugins.background.circuit_breaker import Breaker
from amips_plugins.bundle.contents import MODEL
from amips_plugins.collection import Hit, Id, collection_key
from amips_plugins.layout import lay_out
from tests.support.bundles import DIM, memory, open_bundle, other_cells, vectors, write_bundle
from tests.support.generations import Gone, World, generation

pymilvus = pytest.importorskip("pymilvus")

THREADS, TASKS, SWAPS = 64, 500, 20
K, N_PROBES = 4, 2
QUERIES = vectors(seed=100, count=8)
Answer = list[tuple[Id, float]]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Swapped:
    """A router whose generations and bundles are exchanged, and what may be answered meanwhile.

    Odd generations have the cells of one bundle, even ones those of another; both hold the same
    keys. Newer bundles have the cells of the first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry(folder / "registry")
        self.key = collection_key(memory().info)
        self.bundles = [
            write_bundle(folder / "odd", version="odd1"),
            write_bundle(folder / "even", version="even1", change=other_cells),
        ]
        for bundle in reversed(self.bundles):
            self.registry.publish(bundle)
        self.number = 1
        self.world = World(generation(1, self.bundles[0]))
        self.router = LearnedRouter(self.world.open(), registry=self.registry, refresh=0.001)
        self.allowed = [self._answers(bundle) for bundle in self.bundles]
        self.seen: set[tuple[int, str | None, str]] = set()
        self.searches = 0
        self.failures: list[BaseException] = []

    def _answers(self, bundle: Path) -> dict[str, list[Answer]]:
        """What each way of searching finds."""
        router = LearnedRouter(generation(1, bundle), bundle=bundle, refresh=None)
        whole = LearnedRouter(generation(1, bundle), bundle=bundle, refresh=None)
        whole.enabled = False
        return {
            "route": [pairs(h) for h in router.search(QUERIES, k=K, n_probes=N_PROBES)],
            "native": [pairs(h) for h in whole.search(QUERIES, k=K)],
        }

    def check(self, rows: Sequence[int], found: Sequence[Any]) -> None:
        """One generation answers a call, with what its own bundle finds there."""
        (number,) = {hit.fields["generation"] for hits in found for hit in hits}
        for row, hits in zip(rows, found, strict=True):
            trace = hits.trace
            assert pairs(hits) == self.allowed[(number - 1) % 2][trace.mode][row]
            self.seen.add((number, trace.version, trace.mode))
        self.searches += 1

    def swap(self, turn: int) -> None:
        """Change one thing, and wait until it serves or searches have passed it by."""
        if turn % 4 in (0, 1):
            self.number += 1
            bundle = self.bundles[(self.number - 1) % 2]
            self.world.switch(generation(self.number, bundle), drop=True)
            name = self.world.serves.info.name
            wait_until(lambda: bool(self.failures) or self.router.collection.info.name == name)
            wait_until(lambda: bool(self.failures) or self._routed_here())
        elif turn % 4 == 2:
            folder = self.folder / f"new{turn}"
            version = f"odd{turn}"
            self.registry.publish(write_bundle(folder, version=version))
            wait_until(lambda: bool(self.failures) or self._serves(version))
        elif turn % 8 == 3:
            self.registry.roll_back(self.key)
            wait_until(lambda: bool(self.failures) or not self._serves(f"odd{turn - 1}"))
        else:
            (model,) = (self.folder / "registry").rglob(f"odd{turn - 1}/{MODEL}")
            good = model.read_bytes()
            (latest,) = (self.folder / "registry").rglob("latest*")
            pointer = latest.read_bytes()
            latest.write_bytes(b"{")
            model.write_bytes(good[: len(good) // 2])
            self.let_pass()
            latest.write_bytes(pointer)
            model.write_bytes(good)
        self.let_pass()

    def _routed_here(self) -> bool:
        """Whether the generation that serves has been searched by a plan."""
        return any((number, mode) == (self.number, "route") for number, _, mode in set(self.seen))

    def _serves(self, version: str) -> bool:
        manifest = self.router.manifest
        return manifest is not None and manifest.version == version

    def let_pass(self) -> None:
        """Wait for some searches to end."""
        enough = self.searches + 20
        wait_until(lambda: bool(self.failures) or self.searches > enough)

    def finish(self) -> None:
        if self.failures:
            raise self.failures[0]
        assert len({number for number, _, _ in self.seen}) == self.number
        routes = {(number % 2, version) for number, version, mode in self.seen if mode == "route"}
        assert {version for _, version in routes} >= {"odd1", "even1", "odd2"}
        for odd, version in routes:
            assert version is not None
            assert version.startswith("odd" if odd else "even")
        # Nothing has stayed behind: the model plans, and the searches by it are trusted.
        wait_until(lambda: not self.router._refresher._busy.locked())
        self.router.refresh()
        trace = self.router.search(QUERIES[0], k=K, n_probes=N_PROBES).trace
        assert (trace.mode, trace.fallback) == ("route", None)
        expected = {"search: Gone", "breaker: search"}
        assert set(self.router.fallbacks) <= expected


def pairs(hits: Sequence[Hit]) -> Answer:
    return [(hit.id, hit.score) for hit in hits]


def some(turn: int) -> list[int]:
    """The rows of one search: one query, or a few."""
    return [turn % len(QUERIES)] if turn % 3 else [0, 3, 5]


@pytest.fixture
def swapped(tmp_path: Path) -> Iterator[Swapped]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 10)  # more threads see what another one is at
    yield Swapped(tmp_path)
    sys.setswitchinterval(before)


ASKED: dict[str, Any] = {"k": K, "n_probes": N_PROBES, "fields": ["generation"]}


@pytest.mark.slow
def test_threads_during_hot_swaps(swapped: Swapped) -> None:
    stop = threading.Event()

    def search(turn: int) -> None:
        try:
            while not stop.is_set():
                turn += 1
                rows = some(turn)
                swapped.check(rows, swapped.router.search(QUERIES[rows], **ASKED))
        except BaseException as exc:  # noqa: BLE001 - it is the test's to raise
            swapped.failures.append(exc)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    try:
        swapped.let_pass()
        for turn in range(SWAPS):
            swapped.swap(turn)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    swapped.finish()


@pytest.mark.slow
def test_tasks_during_hot_swaps(swapped: Swapped) -> None:
    async def main() -> None:
        router, stop = AsyncLearnedRouter(swapped.router, None), False

        async def search(turn: int) -> None:
            try:
                while not stop:
                    turn += 1
                    rows = some(turn)
                    swapped.check(rows, await router.search(QUERIES[rows], **ASKED))
            except BaseException as exc:  # noqa: BLE001 - as above
                swapped.failures.append(exc)

        tasks = [asyncio.create_task(search(number)) for number in range(TASKS)]
        try:
            await asyncio.to_thread(swapped.let_pass)
            for turn in range(SWAPS):
                await asyncio.to_thread(swapped.swap, turn)
        finally:
            stop = True
            await asyncio.gather(*tasks)

    asyncio.run(main())
    swapped.finish()


def test_failures_that_were_under_way_do_not_lengthen_the_rest() -> None:
    """A hiccup that 64 threads run into is one hiccup."""
    breaker = Breaker(5, rest=0.05, longest=60.0)
    assert [breaker.fail() for _ in range(THREADS)].count(True) == 1
    wait_until(breaker.allows)
    assert not breaker.fail()
    assert not breaker.fail()
    assert breaker._rest == pytest.approx(0.1)


def test_a_search_follows_generations_that_go_one_after_the_other(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "odd", version="odd1")
    world = World(generation(1, bundle))
    left = 4

    class Leaving(type(world.open())):  # type: ignore[misc]
        """Gone as soon as somebody knows of it, while any are left."""

        def current(self) -> Any:
            nonlocal left
            now = Leaving(world, world.serves)
            if left:
                left -= 1
                world.switch(generation(2, bundle), drop=True)
            return now

    router = LearnedRouter(Leaving(world, world.serves), bundle=bundle, refresh=None)
    world.switch(generation(2, bundle), drop=True)
    hits = router.search(QUERIES[0], **ASKED)
    assert {hit.fields["generation"] for hit in hits} == {2}
    assert hits.trace.fallback == "search: Gone"
    assert left == 0
    left = 1000
    world.switch(generation(2, bundle), drop=True)
    with pytest.raises(Gone):
        router.search(QUERIES[0], **ASKED)
    assert left == 990


# A real engine


class Lite:
    """A Milvus Lite file with two generations of one collection behind an alias."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "docs.db")
        self.client = pymilvus.MilvusClient(self.path)
        schema = self.client.create_schema()
        schema.add_field("id", pymilvus.DataType.INT64, is_primary=True)
        schema.add_field("vector", pymilvus.DataType.FLOAT_VECTOR, dim=DIM)
        index = self.client.prepare_index_params()
        index.add_index("vector", index_type="FLAT", metric_type="COSINE")
        self.client.create_collection("docs", schema=schema, index_params=index)
        self.client.create_alias("docs", "live")
        rows = [{"id": row, "vector": key.tolist()} for row, key in enumerate(vectors())]
        self.client.insert("docs", rows)
        key = collection_key(MilvusCollection(self.client, "live").info)
        self.registry = Registry(folder / "registry")
        self.names: dict[str | None, str] = {}
        self.allowed: dict[str | None, dict[str, list[Answer]]] = {}
        for version, change in (("odd1", lambda _: None), ("even1", other_cells)):
            bundle = write_bundle(folder / version, version=version, change=change, collection=key)
            self.registry.publish(bundle)
            built = lay_out(MilvusCollection(self.client, "live"), open_bundle(bundle))
            self.names[version] = built.info.name
            router = LearnedRouter(built, bundle=bundle, refresh=None)
            found = router.search(QUERIES, k=K, n_probes=N_PROBES)
            router.enabled = False
            whole = router.search(QUERIES, k=K)
            assert {hits.trace.mode for hits in found} == {"route"}
            self.allowed[version] = {
                "route": [pairs(hits) for hits in found],
                "native": [pairs(hits) for hits in whole],
            }
        self.failures: list[BaseException] = []
        self.seen: list[str | None] = []

    def check(self, rows: Sequence[int], found: Sequence[Any]) -> None:
        (version,) = {hits.trace.version for hits in found}
        for row, hits in zip(rows, found, strict=True):
            assert [hit.id for hit in hits] == [
                key for key, _ in self.allowed[version][hits.trace.mode][row]
            ]
        self.seen.append(version)

    def swap(self) -> None:
        """Move the alias back and forth, and wait until searches have followed."""
        for version in ["odd1", "even1"] * 3:
            self.client.alter_alias(self.names[version], "live")
            done = len(self.seen)
            wait_until(lambda: bool(self.failures) or version in self.seen[done:])  # noqa: B023

    def finish(self, router: LearnedRouter) -> None:
        if self.failures:
            raise self.failures[0]
        assert set(self.seen) == {"odd1", "even1"}
        assert set(router.fallbacks) <= {"cells: of another bundle"}


@pytest.fixture
def lite(tmp_path: Path) -> Iterator[Lite]:
    pytest.importorskip("milvus_lite")
    made = Lite(tmp_path)
    yield made
    made.client.close()


@pytest.mark.slow
def test_threads_while_an_alias_moves(lite: Lite) -> None:
    collection = MilvusCollection(lite.client, "live")
    router = LearnedRouter(collection, registry=lite.registry, refresh=0.02)
    stop = threading.Event()

    def search(turn: int) -> None:
        try:
            while not stop.is_set():
                turn += 1
                rows = some(turn)
                lite.check(rows, router.search(QUERIES[rows], k=K, n_probes=N_PROBES))
        except BaseException as exc:  # noqa: BLE001 - as above
            lite.failures.append(exc)

    threads = [threading.Thread(target=search, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    try:
        lite.swap()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    lite.finish(router)


@pytest.mark.slow
def test_tasks_while_an_alias_moves_and_all_share_one_client(lite: Lite) -> None:
    async def main() -> None:
        client, stop = pymilvus.AsyncMilvusClient(lite.path), False
        router = await AsyncLearnedRouter.open(client, "live", registry=lite.registry, refresh=0.02)

        async def search(turn: int) -> None:
            try:
                while not stop:
                    turn += 1
                    rows = some(turn)
                    lite.check(rows, await router.search(QUERIES[rows], k=K, n_probes=N_PROBES))
            except BaseException as exc:  # noqa: BLE001 - as above
                lite.failures.append(exc)

        tasks = [asyncio.create_task(search(number)) for number in range(30)]
        try:
            await asyncio.to_thread(lite.swap)
        finally:
            stop = True
            await asyncio.gather(*tasks)
            await client.close()
        lite.finish(router.router)

    asyncio.run(main())
