"""A small collection in partitions of its users' own, and queries that see some of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.export.snapshot import Snapshot, take_snapshot
from amips_plugins.export.train import Run, TrainOptions, train
from amips_plugins.partitions import Partitions, Value
from amips_plugins.vectors import FloatArray, IntArray

DIM, COUNT, PARTS = 12, 1_200, 10
_TOPICS = 3 * PARTS
_CENTRES = np.random.default_rng(0).standard_normal((_TOPICS, DIM))


def topics() -> IntArray:
    return np.random.default_rng(1).integers(0, _TOPICS, COUNT)


def keys() -> FloatArray:
    rng = np.random.default_rng(2)
    points: FloatArray = (_CENTRES[topics()] + 0.3 * rng.standard_normal((COUNT, DIM))).astype(
        np.float32
    )
    return points


def values() -> list[Value | None]:
    """Three topics that have nothing to do with each other make a part; some keys are in none."""
    return [
        None if row % 40 == 7 else f"part {topic % PARTS}" for row, topic in enumerate(topics())
    ]


def queries(count: int = 1_500, seed: int = 3) -> FloatArray:
    rng = np.random.default_rng(seed)
    about = rng.integers(0, _TOPICS, count)
    points: FloatArray = (_CENTRES[about] + 0.3 * rng.standard_normal((count, DIM)) + 0.1).astype(
        np.float32
    )
    return points


def collection(of: list[Value | None] | None = None) -> MemoryCollection:
    fields = [{} if value is None else {"part": value} for value in of or values()]
    return MemoryCollection(keys(), name="docs", fields=fields)


def snapshot(folder: Path, of: MemoryCollection | None = None) -> Snapshot:
    seen = (of or collection()).partitioned(Partitions("part"))
    return take_snapshot(seen, folder / "snap")


def short_run(folder: Path, **options: object) -> Run:
    """Train on that collection, a few epochs."""
    wanted = TrainOptions(epochs=3, recall=0.9, **options)  # type: ignore[arg-type]
    return train(snapshot(folder), queries(), folder / "run", wanted)
