"""Keys of a collection, drawn for copies, and the best of them for a query."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from amips_plugins.bundle.key_sample import SAMPLED
from amips_plugins.collection import Collection, Id, KeyBatch
from amips_plugins.progress import Progress
from amips_plugins.tune.measuring import exact_truth, scanned_truth
from amips_plugins.tune.recalls import Truth
from amips_plugins.vectors import FloatArray

__all__ = ["DrawnKeys", "draw", "truth_of"]

_BATCH = 5_000
_EXACT_UP_TO = 300_000  # keys


@dataclass(frozen=True)
class DrawnKeys:
    """Keys that were drawn; whether they are ``whole``: all that there are."""

    ids: list[Id]
    vectors: FloatArray
    whole: bool

    def batches(self) -> Iterator[KeyBatch]:
        """Go through them."""
        for low in range(0, len(self.ids), _BATCH):
            yield KeyBatch(self.ids[low : low + _BATCH], self.vectors[low : low + _BATCH])

    def sample(self) -> KeyBatch:
        """Return some of them."""
        rows = np.random.default_rng(0).permutation(len(self.ids))[:SAMPLED]
        return KeyBatch([self.ids[row] for row in rows.tolist()], self.vectors[rows])


def draw(collection: Collection, wanted: int, seed: int, progress: Progress) -> DrawnKeys:
    """Draw keys evenly from all of them; memory holds no more than those."""
    count = collection.count()
    rows = np.sort(np.random.default_rng(seed).permutation(count)[:wanted])
    ids: list[Id] = []
    parts: list[FloatArray] = []
    low = 0
    with progress("read keys", count, 0, "keys") as step:
        for batch in collection.scan(_BATCH):
            first, last = np.searchsorted(rows, [low, low + len(batch.ids)])
            here = rows[first:last] - low
            ids += [batch.ids[row] for row in here.tolist()]
            parts.append(batch.vectors[here])
            low += len(batch.ids)
            step.advance(len(batch.ids))
    return DrawnKeys(ids, np.concatenate(parts), wanted >= count)


def truth_of(
    collection: Collection,
    queries: FloatArray,
    depth: int,
    progress: Progress,
    drawn: DrawnKeys | None = None,
) -> Truth:
    """Find the true best keys: by the database where it looks at all of them, else by reading.

    Of many keys reading all of them once takes less than an exact search for each query; where all
    were ``drawn`` they are not read again.
    """
    if collection.exhaustive and collection.count() <= _EXACT_UP_TO:
        return exact_truth(collection, queries, depth, progress)
    with progress("exact answers", collection.count(), 0, "keys") as step:
        known = drawn if drawn is not None and drawn.whole else None
        batches = collection.scan(_BATCH) if known is None else known.batches()
        return scanned_truth(batches, collection.info.metric, queries, depth, step.advance)
