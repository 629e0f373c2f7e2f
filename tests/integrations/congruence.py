"""What every integration promises; a framework brings a ``World``."""

from __future__ import annotations

import asyncio
import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.bundle.loading import known_cells
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import Collection
from amips_plugins.proxies.records import of_others
from amips_plugins.routing.observers import Observation
from tests.handmade import publish
from tests.integrations.corpus import TARGET, calibration, unseen
from tests.support.known_filters import KnowsEveryFilter
from tests.support.proxy_data import EveryCell, Rewrite

N_CELLS = 10

Found = list[tuple[Any, ...]]
Ask = Callable[[Any], Any]


class World(Protocol):
    """A collection, and stores of it that the framework builds."""

    registry: Path

    def store(self) -> Any:
        """Build a store as the framework's README does."""
        ...

    def routed(self, router: LearnedRouter | None, **options: Any) -> Any:
        """Build a store with the integration's one argument or line more."""
        ...

    def collection(self) -> Collection:
        """The collection that the stores are of, as it is now."""
        ...

    def best(self, store: Any, text: str) -> list[Any]:
        """The ids of the ten best."""
        ...

    def add(self, store: Any, text: str) -> Any:
        """Add a text, and return its id."""
        ...

    def delete(self, store: Any, key: Any) -> None:
        """Delete it again."""
        ...

    def read(self, store: Any, key: Any) -> tuple[Any, Any, Any]:
        """Read a document by its id: it, its text, and what is known about it."""
        ...

    def write_again(self, store: Any, key: Any, document: Any, text: str, title: str) -> None:
        """Write a document that was read, with another text and title, under the same id."""
        ...

    def router_of(self, store: Any) -> LearnedRouter:
        """The router of a routed store."""
        ...


def lay_out(collection: Collection, folder: Path, storage: str | None = None) -> Path:
    """Lay a collection out in cells; return the registry of its bundle."""
    more: dict[str, Any] = {"n_cells": N_CELLS, "recall": TARGET, "storage": storage}
    publish(collection, calibration(), folder, **more)
    return folder / "registry"


class Counted:
    """A hook that counts what it planned."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.planned = 0

    def plan(self, queries: Any, target: Any) -> Any:
        self.planned += 1
        return self.inner.plan(queries, target)


class Congruence:
    """The suite.

    ``ways`` are the ways to search that the framework has, each giving what it found, best first;
    ``unrouted`` names those that pass the router by, ``tied`` those in which a server has no order
    among hits of equal scores: ranks that are fused, words that are counted.
    """

    ways: ClassVar[Mapping[str, Ask]] = {}
    unrouted: ClassVar[frozenset[str]] = frozenset()
    tied: ClassVar[frozenset[str]] = frozenset()

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def loop(cls) -> Iterator[asyncio.AbstractEventLoop]:
        loop = asyncio.new_event_loop()  # one for all calls: clients belong to theirs
        yield loop
        loop.close()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "way" in metafunc.fixturenames:
            metafunc.parametrize("way", sorted(self.ways))

    @pytest.mark.parametrize("hook", ["cells", "rewrite", "none"])
    def test_equals_the_bare_store(
        self, world: World, way: str, hook: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        collection = world.collection()
        layout = collection.layout()
        assert layout is not None
        kinds = {"cells": EveryCell(layout, N_CELLS), "rewrite": Rewrite(), "none": Broken()}
        counted = Counted(kinds[hook])
        store = world.routed(LearnedRouter(collection, hook=counted, watch=KnowsEveryFilter()))
        expected = answer(self.ways[way], world.store(), loop)
        found = answer(self.ways[way], store, loop)
        assert expected
        (assert_tied if way in self.tied else assert_same)(found, expected)
        assert (counted.planned == 0) == (way in self.unrouted)
        fallbacks = world.router_of(store).fallbacks
        if hook != "none":
            assert not fallbacks
        elif way not in self.unrouted:
            assert set(fallbacks) == {"model: RuntimeError"}

    def test_filters_that_nothing_is_known_of_are_the_stores_own(
        self, world: World, loop: asyncio.AbstractEventLoop
    ) -> None:
        filtered = [way for way in self.ways if "filter" in way and way not in self.unrouted]
        if not filtered:
            pytest.skip("no way has a filter")
        collection = world.collection()
        layout = collection.layout()
        assert layout is not None
        counted = Counted(EveryCell(layout, N_CELLS))
        store = world.routed(LearnedRouter(collection, hook=counted))
        for way in filtered:
            same = assert_tied if way in self.tied else assert_same
            same(answer(self.ways[way], store, loop), answer(self.ways[way], world.store(), loop))
        assert counted.planned == 0
        assert set(world.router_of(store).fallbacks) == {"filter: not measured"}

    def test_a_broken_bundle_leaves_the_bare_store(
        self, world: World, loop: asyncio.AbstractEventLoop, tmp_path: Path
    ) -> None:
        registry = tmp_path / "registry"
        shutil.copytree(world.registry, registry)
        (model,) = registry.glob("*/*/*/*/model.onnx")
        model.write_bytes(model.read_bytes()[:-1] + b"?")
        store, bare = world.routed(None, registry=str(registry)), world.store()
        for way, ask in self.ways.items():
            same = assert_tied if way in self.tied else assert_same
            same(answer(ask, store, loop), answer(ask, bare, loop))
            if way not in self.unrouted:
                assert set(world.router_of(store).fallbacks) == {"bundle: BundleCorrupt"}

    def test_keeps_the_recall_of_unseen_questions(self, world: World) -> None:
        store, bare = world.routed(None, registry=str(world.registry)), world.store()
        router = world.router_of(store)
        seen: list[Observation] = []
        found = []
        router.observe(seen.append)
        for text in unseen():
            expected = world.best(bare, text)
            found.append(len(set(world.best(store, text)) & set(expected)) / len(expected))
        assert router.manifest is not None
        assert not router.fallbacks
        assert np.mean(found) >= TARGET
        assert sum(one.routed for one in seen) > 0.9 * len(found)
        assert sum(one.probes for one in seen) < 0.8 * N_CELLS * len(found)

    def test_what_is_added_is_found_and_what_is_deleted_is_not(self, world: World) -> None:
        store = world.routed(None, registry=str(world.registry))
        text = "zebra quagga okapi tapir: a text like no other"
        key = world.add(store, text)
        assert world.best(store, text)[0] == key
        assert world.best(world.store(), text)[0] == key
        world.delete(store, key)
        assert key not in world.best(store, text)
        assert key not in world.best(world.store(), text)

    def test_what_is_read_changed_and_written_again_is_where_it_belongs(self, world: World) -> None:
        """Once through the routed store, and once through a bare one, which is then mended."""
        collection = world.collection()
        (bundle,) = [Bundle.in_folder(one.parent) for one in world.registry.rglob("manifest.json")]
        assign, count, overflow = known_cells(bundle), collection.count(), collection.overflow()
        store = world.routed(None, registry=str(world.registry))
        for by, text in (
            (store, "zebra quagga okapi tapir: a text like no other"),
            (world.store(), "gneiss schist basalt gabbro: again another one"),
        ):
            for key in world.best(store, "the files that lie in a folder")[:3]:
                document, before, known = world.read(by, key)
                assert before
                assert by is not store or "amips_" not in repr((document, known))
                world.write_again(by, key, document, f"{text} {before}", "another title")
                _, after, changed = world.read(store, key)
                assert after == f"{text} {before}"
                # A bare store of Haystack's takes a cell for the document's own metadata.
                changed = changed if by is store else of_others(changed)
                assert {**of_others(known), "title": "another title"} == changed
                if by is not store:
                    world.collection().layouts.backfill(assign, verify=True)
                    world.router_of(store).refresh()
                assert world.best(store, after)[0] == key
                assert world.best(world.store(), after)[0] == key
            found = world.collection()
            assert (found.count(), found.layouts.audit(count, assign).stale) == (count, 0)
            assert found.overflow() <= overflow + 3


class Broken:
    """A model that raises."""

    def plan(self, queries: Any, target: Any) -> Any:
        raise RuntimeError("the model is broken")


def answer(ask: Ask, store: Any, loop: asyncio.AbstractEventLoop) -> Found:
    """What a way to search finds in a store."""
    result = ask(store)
    found: Found = loop.run_until_complete(result) if inspect.isawaitable(result) else result
    return found


def assert_tied(found: Found, expected: Found) -> None:
    """Equal, but for the order of hits of one score, and which of the last ones were cut off."""
    scores = [round(one[-1], 5) for one in expected]
    assert [round(one[-1], 5) for one in found] == scores
    for score in set(scores) - {scores[-1]}:
        assert_same(*(_of_score(hits, score) for hits in (found, expected)))


def _of_score(hits: Found, score: float) -> Found:
    return sorted((one for one in hits if round(one[-1], 5) == score), key=repr)


def assert_same(found: Any, expected: Any) -> None:
    """Equal, types and order included, but for the last bits of numbers."""
    assert type(found) is type(expected)
    if isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, dict):
        shown = of_others(expected)  # a bare store may show the cell, a routed one does not
        assert list(found) == list(shown)
        for key, value in shown.items():
            assert_same(found[key], value)
    else:
        assert found == expected
