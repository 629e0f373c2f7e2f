"""Registries that are away, slow, half written or moving, and clocks that jump.

Each with the state afterwards: which version serves, and what was logged, once. What happens to
the files of a bundle themselves stands in ``test_bundle_faults``.
"""

from __future__ import annotations

import datetime
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from amips_plugins import LearnedRouter, MemoryCollection, Registry
from amips_plugins.bundle.contents import CALIBRATION, CELLS, MODEL
from amips_plugins.bundle.manifest import MANIFEST
from amips_plugins.collection import collection_key
from amips_plugins.errors import BundleCorrupt
from amips_plugins.observe import query_log
from amips_plugins.observe.query_log import QueryLog
from amips_plugins.observe.sample import read_sample
from amips_plugins.observe.tracing import SearchSpans
from amips_plugins.routing.serving import serving_bundle
from tests.support.bundles import laid_out, memory, write_bundle
from tests.support.generations import World
from tests.support.routing_data import QUERIES, assert_native, logged

KEY = collection_key(memory().info)
LATEST = "latest.json"


class Storage(MemoryFileSystem):  # type: ignore[misc] # fsspec has no types
    """An object store in memory, whose reads can be tampered with."""

    protocol = "tampered"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own way
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    tamper: Callable[[str, bytes], bytes] = staticmethod(lambda _, data: data)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        return Storage.tamper(path, super().cat_file(path, start, end, **more))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions, of the same cells."""
    home = tmp_path_factory.mktemp("versions")
    return {version: write_bundle(home / version, version=version) for version in ("v1", "v2")}


@pytest.fixture
def registry() -> Iterator[Registry]:
    fsspec.register_implementation("tampered", Storage, clobber=True)
    Storage.store.clear()
    Storage.pseudo_dirs[:] = [""]
    yield Registry("tampered://models")
    Storage.tamper = staticmethod(lambda _, data: data)


@pytest.fixture
def router(registry: Registry, folders: dict[str, Path]) -> LearnedRouter:
    """It runs v1, and looks when it is told to."""
    registry.publish(folders["v1"])
    return LearnedRouter(laid_out(folders["v1"]), registry=registry, refresh=None)


def tamper(change: Callable[[str, bytes], bytes]) -> None:
    Storage.tamper = staticmethod(change)


def sound(_: str, data: bytes) -> bytes:
    return data


def away(*_: object) -> bytes:
    raise ConnectionError("the store is away")


def serves(router: LearnedRouter, version: str) -> None:
    for hits in router.search(QUERIES, k=3, n_probes=2):
        assert (hits.trace.mode, hits.trace.version, hits.trace.fallback) == (
            "route",
            version,
            None,
        )


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Away


def test_a_store_that_is_away_at_start_and_comes_back(
    registry: Registry, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish(folders["v1"])
    tamper(away)
    router = LearnedRouter(laid_out(folders["v1"]), registry=registry, refresh=None)
    for _ in range(3):
        assert_native(router, "bundle: ConnectionError")
        assert not router.refresh()
    assert ["the store is away" in line for line in logged(caplog)] == [True]
    tamper(sound)
    assert router.refresh()
    serves(router, "v1")
    assert router.fallbacks == {"bundle: ConnectionError": 3}
    assert len(logged(caplog)) == 1


def test_a_folder_that_is_moved_away_and_back(
    tmp_path: Path, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "registry"
    registry = Registry(home)
    registry.publish(folders["v1"])
    router = LearnedRouter(laid_out(folders["v1"]), registry=registry, refresh=None)
    registry.publish(folders["v2"])
    home.rename(tmp_path / "away")
    for _ in range(3):
        assert not router.refresh()
        serves(router, "v1")
    (line,) = logged(caplog)
    assert "serves 'docs' on" in line
    fresh = LearnedRouter(laid_out(folders["v1"]), registry=registry, refresh=None)
    assert_native(fresh, "bundle: BundleNotFound")
    (tmp_path / "away").rename(home)
    for each in (router, fresh):
        assert each.refresh()
        serves(each, "v2")


# Slow


@pytest.mark.parametrize("name", [LATEST, MANIFEST, MODEL, CELLS])
def test_no_search_waits_for_a_store_that_hangs(
    registry: Registry, folders: dict[str, Path], name: str
) -> None:
    registry.publish(folders["v1"])
    router = LearnedRouter(laid_out(folders["v1"]), registry=registry, refresh=0.01)
    entered, go_on = threading.Event(), threading.Event()
    inside = most = 0

    def hang(path: str, data: bytes) -> bytes:
        nonlocal inside, most
        if path.endswith(name):
            inside += 1
            most = max(most, inside)
            entered.set()
            assert go_on.wait(20)
            inside -= 1
        return data

    registry.publish(folders["v2"])
    tamper(hang)
    try:
        wait_until(lambda: bool(router.search(QUERIES, k=3)) and entered.is_set())
        looking = threading.active_count()
        for _ in range(200):
            serves(router, "v1")
        assert not go_on.is_set()  # every one of them was answered while the store hung
        assert (inside, most) == (1, 1)
        assert threading.active_count() <= looking
    finally:
        go_on.set()
    wait_until(lambda: router.search(QUERIES[0], k=3, n_probes=2).trace.version == "v2")
    serves(router, "v2")
    assert not router.fallbacks


# Midway


def spoilt(good: int, damage: str) -> Callable[[str, bytes], bytes]:
    """The read after so many good ones goes wrong."""
    reads = itertools.count()

    def read(path: str, data: bytes) -> bytes:
        if next(reads) != good:
            return data
        if damage == "fails":
            raise TimeoutError(f"reading {path}")
        return data[: len(data) // 2]

    return read


@pytest.mark.parametrize("damage", ["fails", "ends early"])
def test_a_store_that_fails_midway(
    registry: Registry,
    router: LearnedRouter,
    folders: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    """At every read of a look in turn: nothing half-loaded serves, and the next look heals."""
    registry.publish(folders["v2"])
    for good in itertools.count():
        tamper(spoilt(good, damage))
        caplog.clear()
        if router.refresh():
            break
        tamper(sound)
        serves(router, "v1")
        (line,) = logged(caplog)
        assert "Bundle" in line or "bundle" in line
        tamper(spoilt(good, damage))
        fresh = LearnedRouter(router.collection, registry=registry, refresh=None)
        tamper(sound)
        assert_native(fresh, "bundle: ")
        assert fresh.refresh()
        serves(fresh, "v2")
        assert not router.fallbacks
    assert good >= 5  # the pointer, the manifest, the model, calibration and cells
    tamper(sound)
    serves(router, "v2")


# Half published


def test_a_version_without_its_manifest_does_not_serve_until_it_has_one(
    registry: Registry,
    router: LearnedRouter,
    folders: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Somebody copies a version with a tool of their own: the pointer first, the manifest last."""
    home = registry._home(KEY)
    files = sorted(folders["v2"].iterdir(), key=lambda path: path.name == MANIFEST)
    registry._fs.pipe_file(f"{home}/{LATEST}", b'{"version":"v2"}')
    for path in files:
        assert not router.refresh()
        serves(router, "v1")
        assert registry.versions(KEY) == ["v1"]
        registry._fs.pipe_file(f"{home}/v2/{path.name}", path.read_bytes())
    assert ["v2" in line for line in logged(caplog)] == [True]  # once for all of these looks
    assert router.refresh()
    serves(router, "v2")
    assert registry.versions(KEY) == ["v1", "v2"]
    assert not router.fallbacks


def test_a_manifest_before_its_files_is_refused_until_they_are_there(
    registry: Registry,
    router: LearnedRouter,
    folders: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    home = registry._home(KEY)
    manifest = (folders["v2"] / MANIFEST).read_bytes()
    registry._fs.pipe_file(f"{home}/v2/{MANIFEST}", manifest)
    registry._fs.pipe_file(f"{home}/{LATEST}", b'{"version":"v2"}')
    for name in (MODEL, CALIBRATION, CELLS):
        assert not router.refresh()
        serves(router, "v1")
        registry._fs.pipe_file(f"{home}/v2/{name}", (folders["v2"] / name).read_bytes())
    missing = [line for line in logged(caplog) if "serves 'docs' on" in line]
    assert len(missing) == len(logged(caplog)) <= 3  # one for each file that was missing
    for path in folders["v2"].iterdir():
        registry._fs.pipe_file(f"{home}/v2/{path.name}", path.read_bytes())
    assert router.refresh()
    serves(router, "v2")


# Moving


def test_the_pointer_that_moves_during_a_look_is_followed_by_the_next_look(
    registry: Registry, router: LearnedRouter, folders: dict[str, Path]
) -> None:
    """Forth, back and forth again: what was loaded is not taken for what is the latest."""
    pointer = f"{registry._home(KEY)}/{LATEST}"
    registry.publish(folders["v2"])
    reads = itertools.count()

    def move(path: str, data: bytes) -> bytes:
        if path.endswith(LATEST) and next(reads) == 0:
            registry._fs.pipe_file(pointer, b'{"version":"v1"}')  # behind this read
        return data

    tamper(move)
    router.refresh()
    tamper(sound)
    registry._fs.pipe_file(pointer, b'{"version":"v2"}')
    router.refresh()
    serves(router, "v2")
    registry._fs.pipe_file(pointer, b'{"version":"v1"}')
    assert router.refresh()
    serves(router, "v1")


@pytest.mark.slow
@pytest.mark.parametrize("local", [True, False], ids=["folder", "store"])
def test_the_pointer_is_replaced_all_the_time(
    registry: Registry,
    folders: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    local: bool,
) -> None:
    registry = Registry(tmp_path / "registry") if local else registry
    for version in ("v1", "v2"):
        registry.publish(folders[version])
    router = LearnedRouter(laid_out(folders["v1"]), registry=registry, refresh=0.001)
    stop, seen = threading.Event(), set()

    def move() -> None:
        for version in itertools.cycle(("v1", "v2")):
            registry.pin(KEY, version)
            if stop.wait(0.001):
                return

    mover = threading.Thread(target=move)
    mover.start()
    try:
        deadline = time.monotonic() + 20
        for searches in itertools.count():
            for hits in router.search(QUERIES, k=3, n_probes=2):
                assert hits.trace.mode == "route"
                seen.add(hits.trace.version)
            if seen == {"v1", "v2"} and searches > 500:
                break
            assert time.monotonic() < deadline
    finally:
        stop.set()
        mover.join()
    registry.pin(KEY, "v1")
    wait_until(lambda: router.search(QUERIES[0], k=3, n_probes=2).trace.version == "v1")
    assert not router.fallbacks
    assert logged(caplog) == []


def test_the_latest_version_is_asked_for_once_a_look(
    registry: Registry, folders: dict[str, Path]
) -> None:
    for version in ("v1", "v2"):
        registry.publish(folders[version])
    collection = laid_out(folders["v1"])
    assert serving_bundle(collection, registry).manifest.version == "v2"
    assert serving_bundle(collection, registry, "v1").manifest.version == "v1"


# And the database with it


def test_registry_and_database_away_at_once(
    registry: Registry, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    registry.publish(folders["v1"])
    world = World(laid_out(folders["v1"]))
    router = LearnedRouter(world.open(), registry=registry, refresh=None)
    registry.publish(folders["v2"])
    tamper(away)
    world.failure = ConnectionError("the database is away")
    for _ in range(3):
        assert not router.refresh()
    world.failure = None  # the registry stays away
    for _ in range(3):
        assert not router.refresh()
    first, second = logged(caplog)
    assert "the database is away" in first
    assert "the store is away" in second
    serves(router, "v1")
    tamper(sound)
    assert router.refresh()
    serves(router, "v2")


def test_a_damaged_pointer_is_named_and_the_running_version_serves(
    registry: Registry, router: LearnedRouter, caplog: pytest.LogCaptureFixture
) -> None:
    pointer = f"{registry._home(KEY)}/{LATEST}"
    registry._fs.pipe_file(pointer, b'{"version":')
    with pytest.raises(BundleCorrupt, match=r"latest\.json"):
        registry.current(KEY)
    for _ in range(3):
        assert not router.refresh()
        serves(router, "v1")
    assert ["latest.json" in line for line in logged(caplog)] == [True]
    registry.pin(KEY, "v1")
    assert not router.refresh()  # the same version
    serves(router, "v1")


# Clocks


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock jumps by days, forth and back, each time it is read."""
    days = itertools.cycle([0, 40, -40, 3650, -3650])
    wall, wall_ns = time.time, time.time_ns

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Jumping:
            return cls.fromtimestamp(wall() + 86400 * next(days), tz)

    monkeypatch.setattr(time, "time", lambda: wall() + 86400 * next(days))
    monkeypatch.setattr(time, "time_ns", lambda: wall_ns() + 86400 * 10**9 * next(days))
    monkeypatch.setattr(query_log, "datetime", Jumping)


@pytest.mark.usefixtures("jumping")
def test_clocks_that_jump_delay_no_refresh_and_no_query_log(
    registry: Registry, folders: dict[str, Path], tmp_path: Path
) -> None:
    registry.publish(folders["v1"])
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    with QueryLog(tmp_path / "log", flush_every=0.02) as log:
        router = LearnedRouter(
            laid_out(folders["v1"]),
            registry=registry,
            refresh=0.02,
            observers=[log, SearchSpans(provider)],
        )

        def searched(version: str | None = None) -> bool:
            hits = router.search(QUERIES[0], k=3, n_probes=2, timeout=5.0, explain=True)
            assert (hits.trace.mode, hits.trace.fallback) == ("route", None)
            assert hits.trace.plan_us is not None
            assert hits.trace.search_ms is not None
            assert 0 <= hits.trace.plan_us < 5e6
            assert 0 <= hits.trace.search_ms < 5e3
            return version in (None, hits.trace.version)

        for version in ("v2", "v1", "v2"):
            registry.publish(folders[version])
            wait_until(partial(searched, version))
        files = (tmp_path / "log").glob
        wait_until(lambda: searched() and any(files("*.parquet")))
        (file,) = files("*.parquet")
        written = read_sample(file).header.seen
        wait_until(lambda: searched() and read_sample(file).header.seen > written)
    for span in spans.get_finished_spans():
        assert span.start_time is not None
        assert span.end_time is not None
        assert 0 <= span.end_time - span.start_time < 5e9
    assert not router.fallbacks


@pytest.mark.usefixtures("jumping")
def test_clocks_that_jump_end_no_search_before_its_deadline(folders: dict[str, Path]) -> None:
    """The second search of a call gets what is left of the caller's time, by a steady clock."""

    class Slow(MemoryCollection):
        left: list[float] = []  # noqa: RUF012

        def search(self, request: Any, *plan: Any) -> Any:
            self.left.append(request.timeout)
            if len(self.left) % 2:
                raise ConnectionError("searches by cells fail")
            return super().search(request, *plan)

    collection = laid_out(folders["v1"])
    slow = Slow.__new__(Slow)
    slow.__dict__ = collection.__dict__
    router = LearnedRouter(slow, bundle=folders["v1"], refresh=None)
    for _ in range(5):
        assert len(router.search(QUERIES[0], k=3, n_probes=2, timeout=30.0)) == 3
    assert len(slow.left) == 10
    assert all(0 < left <= 30.0 for left in slow.left)
    assert all(again > 20.0 for again in slow.left[1::2])
    assert logging.getLogger("amips_plugins").handlers == []
