"""What goes wrong during the soak, and the collections and the hook through which it does."""

from __future__ import annotations

import copy
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amips_plugins import MemoryCollection, Registry
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.bundle.contents import MODEL
from amips_plugins.collection import CollectionInfo, CollectionKey, Hit, Id, SearchRequest
from amips_plugins.files import replace_file
from amips_plugins.plan import NATIVE, PreQueryHook, QueryPlan, Target
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["BAD", "Away", "Broken", "Faults", "SharedMemory", "Unsteady", "Watched"]

BAD = "v0-damaged"  # sorts before every sound version


class Away(ConnectionError):
    """The database is away: the bare client has this error, too."""


class Broken(RuntimeError):
    """Only searches by cells fail: the bare client has no such error."""


class Faults:
    """Switches that the collections look at."""

    def __init__(self) -> None:
        self.away = False
        self.cells_broken = False

    def strike(self, plan: QueryPlan) -> None:
        """Fail where a switch says so.

        Raises
        ------
        Away, Broken
            It does.
        """
        if self.away:
            raise Away("injected: the database is away")
        if self.cells_broken and plan.cells is not None:
            raise Broken("injected: searches by cells fail")


class SharedMemory(MemoryCollection):
    """Keys in memory that may be written while they are searched: a write makes a copy."""

    def __init__(self, inner: MemoryCollection, faults: Faults) -> None:
        self._now = inner
        self._faults = faults
        self._writing = threading.Lock()

    @property
    def info(self) -> CollectionInfo:
        """What the collection is."""
        return self._now.info

    def count(self) -> int:
        """Return the number of keys."""
        return self._now.count()

    def layout(self) -> str | None:
        """Return the identifier of the cells, or None."""
        return self._now.layout()

    def overflow(self) -> int:
        """Return the number of keys without a cell."""
        return self._now.overflow()

    def upsert(
        self,
        ids: Sequence[Id],
        vectors: FloatArray,
        fields: Sequence[Mapping[str, Any]] | None = None,
        cells: IntArray | None = None,
    ) -> None:
        """Write keys."""
        self._write(lambda draft: draft.upsert(ids, vectors, fields, cells))

    def delete(self, ids: Sequence[Id]) -> None:
        """Delete keys."""
        self._write(lambda draft: draft.delete(ids))

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search what is there now, or fail."""
        self._faults.strike(plan)
        return self._now.search(request, plan)

    async def search_async(
        self,
        client: object,  # noqa: ARG002 - there is nothing to connect to
        request: SearchRequest,
        plan: QueryPlan = NATIVE,
    ) -> list[list[Hit]]:
        """Search as ``search`` does."""
        return self.search(request, plan)

    def _write(self, change: Callable[[MemoryCollection], None]) -> None:
        with self._writing:
            draft = copy.copy(self._now)
            change(draft)  # replaces what it changes
            self._now = draft


class Watched(MilvusCollection):
    """A Milvus collection whose searches fail where a switch says so."""

    faults = Faults()

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        """Search, or fail."""
        self.faults.strike(plan)
        return super().search(request, plan)


class Unsteady:
    """A user's hook that at times hangs, raises or answers nonsense."""

    def __init__(self, sound: PreQueryHook) -> None:
        self._sound = sound
        self._go_on = threading.Event()
        self.mood = "sound"

    def plan(self, queries: FloatArray, target: Target) -> QueryPlan:
        """Plan, or not."""
        if self.mood == "raises":
            raise RuntimeError("injected: the model raises")
        if self.mood == "hangs":
            self._go_on.wait()
        if self.mood == "nonsense":
            return QueryPlan(rewritten=queries[:, :1], rescore=1)
        return self._sound.plan(queries, target)

    @contextmanager
    def being(self, mood: str) -> Iterator[None]:
        """Be in a mood for a while; what hangs is let go afterwards."""
        self._go_on.clear()
        self.mood = mood
        try:
            yield
        finally:
            self.mood = "sound"
            self._go_on.set()


class Trouble:
    """Swaps and faults, one after the other, each for a few seconds.

    Parameters
    ----------
    registry, folder
        Where bundles are published, and its folder.
    versions
        Sound versions of each collection, each in a folder, oldest first.
    hook
        What is made to hang.
    faults
        The switches of the collections.
    logs
        Folders of the query logs.
    """

    def __init__(
        self,
        registry: Registry,
        folder: Path,
        versions: Mapping[CollectionKey, Sequence[Path]],
        hook: Unsteady,
        faults: Faults,
        logs: Sequence[Path],
    ) -> None:
        self._registry = registry
        self._folder = folder
        self._versions = versions
        self._faults = faults
        self._logs = logs
        self._turn = itertools.count()
        self._faulty: Mapping[str, Callable[[], Any]] = {
            "a bundle damaged in the registry": self._damaged,
            "a model that raises": lambda: hook.being("raises"),
            "a model that hangs": lambda: hook.being("hangs"),
            "a model that gives nonsense": lambda: hook.being("nonsense"),
            "searches by cells fail": lambda: self._switched("cells_broken"),
            "the database is away": lambda: self._switched("away"),
            "the registry is away": lambda: _moved(self._folder),
            "the query logs cannot be written": self._unwritable,
        }
        self.swaps = 0
        self.counts = dict.fromkeys(self._faulty, 0)

    def go_on(self, seconds: float, pause: Callable[[float], object]) -> None:
        """Swap the bundles, wait, let one thing go wrong for a while, and wait again."""
        self._swap(next(self._turn))
        self.swaps += 1
        pause(seconds)
        name = list(self._faulty)[self.swaps % len(self._faulty)]
        with self._faulty[name]():
            self.counts[name] += 1
            pause(seconds)
        pause(seconds)

    def _swap(self, turn: int) -> None:
        for key, folders in self._versions.items():
            place = turn // 4 % len(folders)
            if turn % 4 == 0:
                self._registry.publish(folders[place])
            elif turn % 4 == 1:
                self._registry.pin(key, folders[place - 1].name)
            elif turn % 4 == 2:
                self._registry.unpin(key)
            else:
                self._registry.roll_back(key)

    @contextmanager
    def _damaged(self) -> Iterator[None]:
        pointers = {path: path.read_bytes() for path in self._folder.rglob("latest.json")}
        for key in self._versions:
            self._registry.pin(key, BAD)
        try:
            yield
        finally:
            for path, before in pointers.items():
                replace_file(path, before)

    @contextmanager
    def _switched(self, name: str) -> Iterator[None]:
        setattr(self._faults, name, True)
        try:
            yield
        finally:
            setattr(self._faults, name, False)

    @contextmanager
    def _unwritable(self) -> Iterator[None]:
        moved = [log.rename(log.with_name(f"{log.name}-away")) for log in self._logs]
        for log in self._logs:
            log.touch()  # a file, where a folder should be
        try:
            yield
        finally:
            for log, away in zip(self._logs, moved, strict=True):
                log.unlink()
                away.rename(log)


@contextmanager
def _moved(folder: Path) -> Iterator[None]:
    away = folder.rename(folder.with_name(f"{folder.name}-away"))
    try:
        yield
    finally:
        away.rename(folder)


def damaged(registry_folder: Path, key: CollectionKey, sound: str) -> None:
    """Put a version into a registry whose model is not what its manifest says."""
    (home,) = registry_folder.glob(f"{key.database}/{key.name}/*")
    bad = shutil.copytree(home / sound, home / BAD)
    model = bad / MODEL
    model.write_bytes(model.read_bytes()[:-1])


def slept(stop: threading.Event) -> Callable[[float], object]:
    """Return a way to sleep that a stop ends."""

    def pause(seconds: float) -> None:
        until = time.monotonic() + seconds
        while not stop.is_set() and time.monotonic() < until:
            stop.wait(min(0.1, seconds))

    return pause
