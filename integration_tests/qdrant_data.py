"""Collections on a Qdrant server whose vectors are in a graph, laid out by what the vectors are.

A collection below its ``indexing_threshold`` hides half of what can go wrong: points are replaced
and not moved, and payload is dropped that an indexed segment keeps.
"""

from __future__ import annotations

import io
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models

from amips_plugins.adapters.qdrant.collection import QdrantCollection
from amips_plugins.cell_layout import LayoutSpec
from amips_plugins.cli import main
from amips_plugins.collection import Id, SearchRequest
from amips_plugins.plan import QueryPlan, Target
from amips_plugins.vectors import FloatArray, IntArray

__all__ = [
    "DIM",
    "KEY",
    "LAYOUT",
    "NIGHTLY",
    "N_CELLS",
    "TRANSPORTS",
    "Background",
    "EveryCell",
    "Reader",
    "amips",
    "by_sign",
    "check",
    "contents",
    "create",
    "error_of",
    "fill",
    "keys",
    "queries",
    "spec",
    "until",
    "wait_until_indexed",
    "wrong_cells",
]

DIM = 16
GROUPS = 16
N_CELLS = 4
LAYOUT = "signs"
KEY = f"amips_cell_{LAYOUT}"
NIGHTLY = "AMIPS_NIGHTLY" in os.environ
TRANSPORTS = ("rest", "grpc") if NIGHTLY else ("grpc",)  # which keeps the most payload
_PATIENCE = 120.0


def keys(count: int, seed: int = 0) -> FloatArray:
    """Vectors in groups, so that few cells hold a query's neighbours."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((GROUPS, DIM)) * 2
    spread = rng.standard_normal((count, DIM))
    return (centres[np.arange(count) % GROUPS] + spread).astype(np.float32)


def queries(count: int, seed: int = 1) -> FloatArray:
    rng = np.random.default_rng(seed)
    near = keys(2000)[rng.integers(2000, size=count)]
    return (near + 0.7 * rng.standard_normal((count, DIM))).astype(np.float32)


def by_sign(_: Sequence[Id], vectors: FloatArray) -> IntArray:
    """A cell by the signs of the first two numbers: a vector tells which cell is its own."""
    cells: IntArray = ((vectors[:, 0] > 0) * 2 + (vectors[:, 1] > 0)).astype(np.int64)
    return cells


def spec(assign: Callable[[Sequence[Id], FloatArray], IntArray] = by_sign) -> LayoutSpec:
    return LayoutSpec(LAYOUT, N_CELLS, assign, "v1")


class EveryCell:
    """Routes every query to every cell, so that the answer is known."""

    def plan(self, asked: FloatArray, target: Target) -> QueryPlan:
        return QueryPlan(cells=np.tile(np.arange(N_CELLS), (len(asked), 1)), layout=LAYOUT)


def create(
    client: QdrantClient,
    *,
    field: str = "",
    distance: models.Distance = models.Distance.DOT,
    size: int = DIM,
    threshold: int = 20,
    **more: Any,
) -> str:
    """Make a collection with a random name that builds a graph from ``threshold`` kB on."""
    name = f"amips_{secrets.token_hex(4)}"
    params = models.VectorParams(size=size, distance=distance)
    client.create_collection(
        name,
        {field: params} if field else params,
        optimizers_config=models.OptimizersConfigDiff(
            indexing_threshold=threshold, default_segment_number=1
        ),
        **more,
    )
    return name


def fill(client: QdrantClient, name: str, vectors: FloatArray, field: str = "") -> None:
    """Upload the vectors, ids being their rows, with a payload, and wait for the graph."""
    arrays: Any = {field: vectors} if field else vectors
    client.upload_collection(
        name,
        arrays,
        payload=[{"row": row} for row in range(len(vectors))],
        ids=range(len(vectors)),
        wait=True,
    )
    wait_until_indexed(client, name, len(vectors) // 2)


def wait_until_indexed(client: QdrantClient, name: str, at_least: int = 0) -> None:
    """Wait until the server has done optimising, and so many vectors are in a graph."""

    def done() -> bool:
        found = client.get_collection(name)
        green = found.status is models.CollectionStatus.GREEN
        return green and (found.indexed_vectors_count or 0) >= at_least

    until(done, every=0.05)


def until(true: Callable[[], object], patience: float = _PATIENCE, every: float = 0.1) -> None:
    deadline = time.monotonic() + patience
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(every)


def contents(client: QdrantClient, name: str, **more: Any) -> dict[Any, models.Record]:
    """Every point, each of which is there once."""
    found: dict[Any, models.Record] = {}
    offset: Any = None
    while True:
        records, offset = client.scroll(name, limit=2000, offset=offset, with_vectors=True, **more)
        for record in records:
            assert record.id not in found
            found[record.id] = record
        if offset is None:
            return found


def wrong_cells(points: dict[Any, models.Record], key: str = KEY) -> list[Any]:
    """The points whose cell is not that of their vector; overflow, or a claim, is in no cell."""
    ids = [one for one, point in points.items() if (point.payload or {}).get(key, -1) >= 0]
    if not ids:
        return []
    own = by_sign(ids, np.array([points[one].vector for one in ids], dtype=np.float32))
    return [
        one
        for one, cell in zip(ids, own.tolist(), strict=True)
        if (points[one].payload or {})[key] != cell
    ]


def check(
    client: QdrantClient, name: str, expected: dict[Any, FloatArray], *, overflow: int = 0
) -> None:
    """The points are there as last written, each in the cell of its vector or without one."""
    points = contents(client, name)
    lost, risen = sorted(set(expected) - set(points)), sorted(set(points) - set(expected))
    assert (lost, risen) == ([], []), f"lost {lost}, risen {risen}"
    for one, point in points.items():
        assert np.allclose(np.array(point.vector), expected[one], atol=1e-5), one
    assert wrong_cells(points) == []
    without = [one for one, p in points.items() if (p.payload or {}).get(KEY, -1) < 0]
    assert len(without) <= overflow, f"without a cell: {without[:20]}"


def error_of(call: Callable[[], object]) -> Exception | None:
    """What a call raises."""
    try:
        call()
    except Exception as exc:  # noqa: BLE001 - looked at by the caller
        return exc
    return None


def amips(*arguments: object) -> tuple[int, str]:
    """Run the command line; its exit status, and what it says."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            main([str(one) for one in arguments])
        except SystemExit as exc:
            return int(exc.code or 0), said.getvalue()
    return 0, said.getvalue()


class Reader:
    """Searches every cell, natively where there are none, for a key that is always the best."""

    def __init__(self, collection: QdrantCollection, best: int) -> None:
        self._collection = collection
        self._best = best

    def __call__(self) -> None:
        self._collection = self._collection.current()
        plan = QueryPlan()
        if self._collection.layout() is not None:
            plan = QueryPlan(cells=np.arange(N_CELLS)[None], layout=LAYOUT)
        ones = np.ones((1, DIM), dtype=np.float32)
        (hits,) = self._collection.search(SearchRequest(ones, k=10), plan)
        assert len({hit.id for hit in hits}) == 10
        assert hits[0].id == self._best


class Background:
    """Does something again and again in a thread, and keeps what it raised.

    It goes on after an error, as a service does.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self.wrong: list[Exception] = []
        self.times = 0
        self._work = work
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            found = error_of(self._work)
            if found is None:
                self.times += 1
            else:
                self.wrong.append(found)
            self._stop.wait(0.005 if found is None else 0.05)  # others have the processor too

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(120)
        assert not self._thread.is_alive()
