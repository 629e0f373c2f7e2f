"""Killed at every step, and at random: nothing is lost, and building again goes on."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.collection import Id
from amips_plugins.vectors import FloatArray, IntArray
from tests.support.qdrant_data import A1, KEYS, by_row, cells_of, fill, ids_found

# What a server is asked for, and local mode does not have.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect:UserWarning"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact:UserWarning"),
]

WRITES = (
    "update_collection",
    "create_payload_index",
    "delete_payload_index",
    "batch_update_points",
    "delete_payload",
)
ROWS = {row: row % 4 for row in range(len(KEYS))}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


class Boundaries:
    """Dies once, before or behind the n-th write that the client is asked for."""

    def __init__(self, client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = -1
        self.behind = False
        for name in WRITES:
            monkeypatch.setattr(client, name, self._guarded(getattr(client, name)))

    def _guarded(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and not self.behind:
                raise Killed
            answer = method(*args, **kwargs)
            if self.left == 0:
                raise Killed
            return answer

        return call

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let everything through for a while."""
        left, self.left = self.left, -1
        yield
        self.left = left

    def each(self) -> Iterator[None]:
        """Set every boundary in turn, until the work gets through."""
        for number in range(1, 100):
            for self.behind in (False, True):
                self.left = number
                yield
                if self.left > 0:
                    return
        raise AssertionError("the work never got through")


@pytest.fixture(params=[True, False], ids=["local", "server"])
def local(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def client() -> Iterator[QdrantClient]:
    opened = QdrantClient(":memory:")
    yield opened
    opened.close()


@pytest.fixture
def boundaries(client: QdrantClient, monkeypatch: pytest.MonkeyPatch) -> Boundaries:
    monkeypatch.setattr("amips_plugins.adapters.qdrant.store._WRITE_BATCH", 10)
    monkeypatch.setattr("amips_plugins.adapters.qdrant.local_store._PAGE", 10)
    return Boundaries(client, monkeypatch)


def reopened(client: QdrantClient, local: bool) -> QdrantCollection:
    collection = QdrantCollection(client, "docs")
    collection._local = local
    return collection


def attempt(work: Callable[[], object]) -> bool:
    """Tell whether the work got through."""
    try:
        work()
    except Killed:
        return False
    return True


def halves(ids: Sequence[Id], _: FloatArray) -> IntArray:
    return np.array([int(key) // 20 for key in ids])


def both_halves(ids: Sequence[Id], vectors: FloatArray) -> IntArray:
    """Every fifth key lies in both."""
    own = halves(ids, vectors)
    other = np.where(np.array([int(key) % 5 for key in ids]) == 0, 1 - own, own)
    return np.stack([own, other], axis=1)


HALVES = LayoutSpec("b2", 2, halves)
SHARED = LayoutSpec("b2", 2, both_halves, shared=True)


def stored(spec: LayoutSpec) -> dict[Any, Any]:
    """What a layout stores, by row."""
    if not spec.shared:
        return {row: row // 20 for row in range(40)}
    return {row: [row // 20, 1 - row // 20] if row % 5 == 0 else row // 20 for row in range(40)}


@pytest.mark.parametrize("spec", [HALVES, SHARED], ids=["one cell", "several"])
def test_a_build_dies_at_every_boundary(
    client: QdrantClient, boundaries: Boundaries, local: bool, spec: LayoutSpec
) -> None:
    died = 0
    for _ in boundaries.each():
        with boundaries.away():
            client.delete_collection("docs")
            fill(client)
            reopened(client, local).layouts.build(A1)
        through = attempt(lambda: reopened(client, local).layouts.build(spec))
        died += not through
        with boundaries.away():
            collection = reopened(client, local)
            assert collection.count() == len(KEYS)
            if collection.layout() == "a1":  # in force until the other one is complete
                assert not through
                assert ids_found(collection, 1) == list(range(1, 40, 4))
                collection.layouts.build(spec)
            collection = reopened(client, local)
            assert (collection.layout(), collection.overflow()) == ("b2", 0)
            assert cells_of(client, "b2") == stored(spec)
            assert cells_of(client) == ROWS
            assert collection.layouts.status().unfinished == ()
            assert collection.layouts.roll_back().layout() == "a1"
    assert died >= 12


def test_roll_back_backfill_and_drop_die_at_every_boundary(
    client: QdrantClient, boundaries: Boundaries, local: bool
) -> None:
    def work() -> None:
        layouts = reopened(client, local).layouts
        if layouts.status().layout == "b2":
            layouts = layouts.roll_back().layouts  # type: ignore[assignment]
        layouts.backfill(by_row)
        layouts.drop_old()

    died = 0
    for _ in boundaries.each():
        with boundaries.away():
            client.delete_collection("docs")
            fill(client)
            reopened(client, local).layouts.build(A1)
            reopened(client, local).layouts.build(HALVES)
            lost = models.Filter(must=[models.HasIdCondition(has_id=list(range(0, 40, 3)))])
            client.delete_payload("docs", ["amips_cell_a1"], lost)
        through = attempt(work)
        died += not through
        with boundaries.away():
            collection = reopened(client, local)
            assert collection.count() == len(KEYS)
            if not through:
                work()
            collection = collection.current()
            assert collection.layout() == "a1"
            assert cells_of(client) == ROWS
            assert set(cells_of(client, "b2").values()) == {None}
            status = collection.layouts.status()
            assert (status.older, status.unfinished, status.overflow) == ((), (), 0)
    assert died >= 10


BUILDER = """
import sys
import numpy as np
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.adapters.qdrant.collection import QdrantCollection

def assign(ids, vectors):
    print(flush=True)  # what follows is the writing
    return np.asarray(ids) % 4

collection = QdrantCollection.connect(sys.argv[1], "docs")
collection.layouts.build(LayoutSpec("a1", 4, assign))
"""


def test_a_folder_survives_kills_at_random(tmp_path: Path) -> None:
    keys = np.random.default_rng(1).standard_normal((400, 4)).astype(np.float32)
    folder = str(tmp_path / "database")
    client = QdrantClient(path=folder)
    client.create_collection(
        "docs", vectors_config=models.VectorParams(size=4, distance=models.Distance.DOT)
    )
    QdrantCollection(client, "docs").upsert(
        list(range(400)), keys, [{"row": row} for row in range(400)]
    )
    client.close()
    chance = random.Random(7)  # noqa: S311 - not for secrets
    placed = 0
    for _ in range(3):
        with subprocess.Popen(  # noqa: S603 - the interpreter that runs this test
            [sys.executable, "-c", BUILDER, folder], stdout=subprocess.PIPE
        ) as builder:
            assert builder.stdout is not None
            builder.stdout.readline()
            time.sleep(chance.uniform(0.0, 0.3))
            builder.kill()
        client = QdrantClient(path=folder)
        found = cells_of(client)
        assert len(found) == 400
        assert all(cell in (None, int(key) % 4) for key, cell in found.items())
        now = sum(cell is not None for cell in found.values())
        assert now >= placed  # nothing that was placed is lost, and the next one goes on
        placed = now
        client.close()
    collection = QdrantCollection.connect(folder, "docs")
    if collection.layout() is None:
        collection = collection.layouts.build(A1)  # type: ignore[assignment]
    assert cells_of(collection._client) == {key: key % 4 for key in range(400)}
    (batch,) = collection.scan(1000)
    np.testing.assert_allclose(batch.vectors, keys, atol=1e-6)
    records, _ = collection._client.scroll("docs", limit=400)
    assert [(record.payload or {})["row"] for record in records] == list(range(400))
    assert collection.layouts.status().unfinished == ()
    collection.close()
