"""Writing through the router: keys have cells, and are in the generation that serves."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest

from amips_plugins import LearnedRouter, MemoryCollection, Registry
from amips_plugins.bundle.contents import CELLS, IDS, KNOWN_CELLS
from amips_plugins.bundle.package import Bundle
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.errors import CollectionError, InvalidInput
from amips_plugins.models.cells import Cells
from amips_plugins.models.hooks import NativeHook
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import FloatArray, IntArray, Metric
from tests.support.bundles import (
    COUNT,
    DIM,
    N_CELLS,
    laid_out,
    make_files,
    memory,
    other_cells,
    vectors,
    write_bundle,
)
from tests.support.generations import Handle, World, generation
from tests.support.routing_data import DatabaseError, Spy, logged, recorded_cells

NEW = vectors(seed=8, count=6)
IDS_OF_NEW = list(range(1000, 1006))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


def rule(keys: FloatArray, change: Any = lambda _: None) -> IntArray:
    files = make_files()
    change(files)
    return Cells.from_bytes(files[CELLS]).assign(keys, Metric.COSINE)


def cell_of(collection: MemoryCollection, key: Id) -> int:
    """The cell whose search finds a key; -1 if they all do."""
    layout = collection.layout()
    found = []
    for cell in range(N_CELLS):
        plan = QueryPlan(cells=np.array([[cell]]), layout=layout)
        (hits,) = collection.search(SearchRequest(NEW[:1], k=COUNT * 2), plan)
        if key in {hit.id for hit in hits}:
            found.append(cell)
    assert len(found) in (1, N_CELLS)
    return found[0] if len(found) == 1 else -1


def test_new_keys_get_their_cells_and_fields(folder: Path) -> None:
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder)
    router.upsert(IDS_OF_NEW, NEW, [{"group": 7}] * 6)
    assert collection.overflow() == 0
    assert [cell_of(collection, key) for key in IDS_OF_NEW] == rule(NEW).tolist()
    hits = router.search(NEW[0], k=1, fields=["group"])
    assert (hits[0].id, hits[0].fields["group"]) == (1000, 7)
    assert router.search(NEW[0], k=COUNT + 6, n_probes=N_CELLS)
    router.delete([1000, 1001, 4711])
    assert collection.count() == COUNT + 4
    assert not router.fallbacks


def test_a_known_key_keeps_its_recorded_cell_until_it_is_another(tmp_path: Path) -> None:
    """Cells that the rule would not give: those of the first two have swapped places."""

    def swap(files: dict[str, bytes]) -> None:
        known = files[KNOWN_CELLS]
        other_cells(files)
        files[KNOWN_CELLS] = known

    folder = write_bundle(tmp_path, change=swap)
    collection, recorded = laid_out(folder), recorded_cells(folder)
    router = LearnedRouter(collection, bundle=folder)
    keys = np.flatnonzero(recorded < 2)[:4]
    ids = keys.tolist()
    router.upsert(ids, vectors()[keys] * np.float32(0.5))
    assert [cell_of(collection, key) for key in ids] == recorded[keys].tolist()
    router.upsert(ids, -vectors()[keys])
    assert [cell_of(collection, key) for key in ids] == rule(-vectors()[keys], swap).tolist()
    assert collection.count() == COUNT


def test_one_vector_and_numpy_ids(folder: Path) -> None:
    spy = Spy(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder)
    router.upsert([1000], NEW[0])
    router.upsert(np.array([1001, 1002]), NEW[1:3].tolist())  # type: ignore[arg-type]
    router.delete(np.array([1002]))  # type: ignore[arg-type]
    ids = [key for batch in spy.scan(COUNT * 2) for key in batch.ids]
    assert ids[COUNT:] == [1000, 1001]
    assert {type(key) for key in ids} == {int}


def test_uuid_objects_are_the_ids_that_they_spell() -> None:
    first, second = uuid4(), uuid4()
    collection = MemoryCollection(vectors()[:2], [str(first), "other"])
    router = LearnedRouter(collection, hook=NativeHook())
    router.upsert([first, second], NEW[:2])  # type: ignore[list-item]
    assert collection.count() == 3
    router.delete([first, second])  # type: ignore[list-item]
    assert [key for batch in collection.scan(9) for key in batch.ids] == ["other"]


def test_without_cells_of_the_bundle_keys_are_overflow(folder: Path, tmp_path: Path) -> None:
    other = write_bundle(tmp_path, version="v2", change=other_cells)
    sources: list[tuple[MemoryCollection, dict[str, Any]]] = [
        (laid_out(folder), {"hook": NativeHook()}),
        (laid_out(folder), {"bundle": other}),
        (laid_out(folder), {"registry": tmp_path / "empty"}),
    ]
    for collection, source in sources:
        LearnedRouter(collection, **source).upsert(IDS_OF_NEW, NEW)
        assert collection.overflow() == 6
    plain = memory()
    LearnedRouter(plain, bundle=folder).upsert(IDS_OF_NEW, NEW)
    assert plain.count() == COUNT + 6


def test_damaged_records_do_not_stop_a_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_bundle(tmp_path)
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder)
    (folder / IDS).write_bytes(b"1\n")
    for row in (0, 1):
        router.upsert([1000 + row], NEW[row])
    assert collection.overflow() == 2
    assert router.fallbacks == {"write: BundleCorrupt": 2}
    assert len(logged(caplog)) == 1


def test_records_are_read_once_and_not_before_the_first_write(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = Bundle.read

    def note(bundle: Bundle, name: str) -> bytes:
        read.append(name)
        return whole(bundle, name)

    collection = laid_out(folder)
    monkeypatch.setattr(Bundle, "read", note)
    router = LearnedRouter(collection, bundle=folder)
    router.search(NEW[0], k=1)
    assert KNOWN_CELLS not in read
    for _ in range(3):
        router.upsert(IDS_OF_NEW, NEW)
    assert (read.count(KNOWN_CELLS), read.count(IDS)) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ids": [1, 1], "vectors": NEW[:2]}, "An id comes twice"),
        ({"ids": [1, np.int64(1)], "vectors": NEW[:2]}, "An id comes twice"),
        ({"ids": [1, 2], "vectors": NEW[:1]}, "2 ids came with vectors of shape"),
        ({"ids": [1], "vectors": NEW[:1, :-1]}, f"Vectors have shape .* dimension {DIM}"),
        ({"ids": [1], "vectors": [[np.nan] * DIM]}, "Vector 0 holds a NaN"),
        ({"ids": [1, 2], "vectors": [[1.0] * DIM, [np.inf] * DIM]}, "Vector 1 holds"),
        ({"ids": [1], "vectors": "text"}, "Vectors must be numbers"),
        ({"ids": [], "vectors": np.zeros((0, DIM))}, "Vectors are empty"),
        ({"ids": [1], "vectors": NEW[:1], "fields": []}, "1 ids came with fields for 0"),
        ({"ids": "ab", "vectors": NEW[:2]}, "ids='ab' is one id"),
        ({"ids": 7, "vectors": NEW[:1]}, "ids=7 is no list of ids"),
        ({"ids": [1.5], "vectors": NEW[:1]}, "The id 1.5 is no whole number and no string"),
        ({"ids": [True], "vectors": NEW[:1]}, "The id True"),
        ({"ids": [None], "vectors": NEW[:1]}, "The id None"),
    ],
)
def test_keys_that_cannot_be_written_are_refused(
    folder: Path, arguments: dict[str, Any], says: str
) -> None:
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder)
    with pytest.raises(InvalidInput, match=says):
        router.upsert(**arguments)
    assert collection.count() == COUNT
    assert not router.fallbacks


@pytest.mark.parametrize("ids", ["ab", 7, [1, 1], [1.5], [None]])
def test_ids_that_cannot_be_deleted_are_refused(ids: Any) -> None:
    collection = memory()
    with pytest.raises(InvalidInput):
        LearnedRouter(collection, hook=NativeHook()).delete(ids)
    assert collection.count() == COUNT


def test_errors_of_the_database_surface(folder: Path) -> None:
    class ReadOnly(Spy):
        def upsert(self, *_: Any, **__: Any) -> None:
            raise DatabaseError("read only")

        def delete(self, ids: Sequence[Id]) -> None:
            raise DatabaseError("read only")

    router = LearnedRouter(ReadOnly(laid_out(folder)), bundle=folder)
    with pytest.raises(DatabaseError):
        router.upsert([1], NEW[:1])
    with pytest.raises(DatabaseError):
        router.delete([1])
    assert not router.fallbacks


# Generations


@pytest.fixture
def registry(folder: Path, tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "registry")
    registry.publish(folder)
    registry.publish(write_bundle(tmp_path / "v2", version="v2", change=other_cells))
    return registry


def test_a_write_goes_to_the_generation_that_serves(
    folder: Path, registry: Registry, tmp_path: Path
) -> None:
    first, second = generation(1, folder), generation(2, tmp_path / "v2")
    world = World(first)
    router = LearnedRouter(world.open(), registry=registry, refresh=None)
    world.switch(second)
    router.upsert(IDS_OF_NEW, NEW)
    assert (first.count(), second.count()) == (COUNT, COUNT + 6)
    assert second.overflow() == 0
    assert [cell_of(second, key) for key in IDS_OF_NEW] == rule(NEW, other_cells).tolist()
    assert router.search(NEW[0], k=1)[0].id == 1000  # what was written is searched
    router.delete([1000])
    assert second.count() == COUNT + 5


class SwitchesDuring(Handle):
    """A generation that is replaced while it is written to."""

    def __init__(self, world: World, held: MemoryCollection, after: list[MemoryCollection]) -> None:
        super().__init__(world, held)
        self.after = after

    def current(self) -> Any:
        self.world.looked += 1
        same = self.world.serves is self.generation
        return self if same else SwitchesDuring(self.world, self.world.serves, self.after)

    def _switch(self) -> None:
        if self.after:
            self.world.switch(self.after.pop(0))

    def upsert(
        self,
        ids: Sequence[Id],
        vectors: FloatArray,
        fields: Sequence[Mapping[str, Any]] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        self.generation.upsert(ids, vectors, fields, cells)
        self._switch()

    def delete(self, ids: Sequence[Id]) -> None:
        self.generation.delete(ids)
        self._switch()


def test_a_write_follows_a_switch_that_comes_between(
    folder: Path, registry: Registry, tmp_path: Path
) -> None:
    generations = [generation(1, folder), generation(2, tmp_path / "v2"), generation(3, folder)]
    world = World(generations[0])
    handle = SwitchesDuring(world, generations[0], generations[1:])
    router = LearnedRouter(handle, registry=registry, refresh=None)
    router.upsert(IDS_OF_NEW, NEW)
    assert world.serves is generations[2]
    assert [each.count() for each in generations] == [COUNT + 6] * 3
    assert [each.overflow() for each in generations] == [0, 0, 0]
    assert router.collection.info.name == "docs__g3"
    world.switch(generations[0])
    handle.after.extend(generations[1:])
    router.delete(IDS_OF_NEW)
    assert [each.count() for each in generations] == [COUNT] * 3


def test_a_collection_that_never_rests_is_an_error(folder: Path) -> None:
    world = World(generation(1))
    handle = SwitchesDuring(world, world.serves, [generation(n) for n in range(2, 40)])
    router = LearnedRouter(handle, bundle=folder, refresh=None)
    with pytest.raises(CollectionError, match="was replaced 10 times during one write"):
        router.upsert([1000], NEW[:1])


def test_a_database_that_cannot_be_looked_at_takes_no_write(folder: Path) -> None:
    world = World(generation(1, folder))
    router = LearnedRouter(world.open(), bundle=folder, refresh=None)
    world.failure = DatabaseError("away")
    with pytest.raises(DatabaseError):
        router.upsert([1000], NEW[:1])
    assert world.serves.count() == COUNT


def test_every_acknowledged_write_is_in_the_generation_that_serves(
    folder: Path, registry: Registry, tmp_path: Path
) -> None:
    """Writers while the collection is copied and replaced, over and over."""
    lock = threading.Lock()  # MemoryCollection knows no threads

    class Locked(Handle):
        def current(self) -> Any:
            same = self.world.serves is self.generation
            return self if same else Locked(self.world, self.world.serves)

        def upsert(self, *asked: Any, **more: Any) -> None:
            with lock:
                self.generation.upsert(*asked, **more)

    world = World(generation(1, folder))
    router = LearnedRouter(Locked(world, world.serves), registry=registry, refresh=None)
    acknowledged: list[list[int]] = [[] for _ in range(3)]
    stop = threading.Event()

    def write(number: int) -> None:
        for key in range(1000 * (number + 1), 1000 * (number + 1) + 500):
            if stop.is_set():
                return
            router.upsert([key], NEW[key % 6])
            acknowledged[number].append(key)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    folders = [folder, tmp_path / "v2"]
    for number in range(2, 10):
        stop.wait(0.03)
        with lock:  # the copy and the switch of a real migration, in one step
            old, new = world.serves, generation(number, folders[(number - 1) % 2])
            for batch in old.scan(10_000):
                new.upsert(batch.ids, batch.vectors)
            world.switch(new)
    stop.set()
    for thread in threads:
        thread.join()
    there = {key for batch in world.serves.scan(10_000) for key in batch.ids}
    written = {key for keys in acknowledged for key in keys}
    assert len(written) > 50
    assert written <= there
