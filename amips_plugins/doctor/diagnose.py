"""Looking at a collection from outside, then at a sample of its keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from amips_plugins.collection import Collection, SearchRequest
from amips_plugins.collection.sizing import size_up
from amips_plugins.doctor.findings import Diagnosis, Verdict
from amips_plugins.doctor.verdict import RECALLS, judge, judge_unseen
from amips_plugins.errors import InvalidInput, TrainingError
from amips_plugins.export.trial_result import Trial
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray

__all__ = ["SAMPLE", "diagnose"]

SAMPLE = 50_000  # keys
_MOST_READ = 2_000_000  # keys: beyond, reading them all would take longer than one waits
_BATCH = 5_000
_K = 10
_COUNTED = 50  # native searches whose cost the engine is asked for


def diagnose(
    collection: Collection,
    queries: FloatArray | None = None,
    *,
    n_cells: int = 64,
    sample: int = SAMPLE,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress = no_progress,
) -> Diagnosis:
    """Find out how a collection is built and whether a router would pay; nothing is changed.

    Queries of None are guessed from the keys; ``sample`` keys at most are tried. With ``memory``,
    in bytes, a note says how to keep the collection in it.
    """
    if n_cells < 2 or sample < n_cells:
        raise InvalidInput(
            f"{n_cells} cells of {sample} keys tell nothing; try 2 cells or more, on as many keys "
            f"or more."
        )
    info, count, built = collection.info, collection.count(), collection.describe()
    # All that is asked of the database comes before the trial: its connection may not outlive it.
    share, break_even = collection.overflow() / max(1, count), collection.break_even
    sized: tuple[str, ...] = ()
    if memory is not None:
        sized = (size_up(count, info.dim, memory, info.database, built.kept).text,)
    facts = (*built.facts, *_counted(collection, queries, count))
    verdict = judge_unseen(built, count, collection.layout(), share)
    trial: Trial | None = None
    try:
        trial = _try(collection, queries, (n_cells, sample, seed), built.lists, progress)
        verdict = verdict or judge(built, break_even, trial)
    except TrainingError as exc:
        verdict = verdict or Verdict(answer="unclear", text=f"Cannot say: {exc}")
    return Diagnosis(
        database=info.database,
        collection=info.name,
        field=info.field,
        metric=str(info.metric),
        dim=info.dim,
        keys=count,
        construction=facts,
        notes=(*built.notes, *sized),
        native=built.native,
        break_even=break_even,
        trial=trial,
        verdict=verdict,
    )


def _counted(
    collection: Collection, queries: FloatArray | None, count: int
) -> Iterator[tuple[str, str]]:
    """Say what the engine itself counts of native searches, where it counts anything."""
    reader: Any = collection
    if getattr(collection, "local", True) or not count:
        return
    first = next(iter(collection.scan(_COUNTED)), None) if queries is None else None
    asked = queries if first is None else first.vectors
    if asked is None:
        return
    rows = np.ascontiguousarray(asked[:_COUNTED], dtype=np.float32)
    with reader.metered() as counted:
        for row in rows:
            reader.search(SearchRequest(row[None], min(_K, count)))
    total = counted.total
    told = "not told by the server (service.hardware_reporting)"
    if total is not None:
        told = f"{total / len(rows) / 1e6:.2f} MB of vectors a native search"
    yield "scored", told


def _try(
    collection: Collection,
    queries: FloatArray | None,
    asked: tuple[int, int, int],
    lists: int | None,
    progress: Progress,
) -> Trial:
    from amips_plugins.export.quick_trial import TrialOptions, run_trial

    n_cells, sample, seed = asked
    count = collection.count()
    if count < _K:
        raise TrainingError(f"{count} keys are too few to try anything on.")
    read = min(count, _MOST_READ)
    keys = _draw(collection, sample, read, seed, progress)
    wanted = TrialOptions(n_cells, RECALLS, _K, lists, count, read, seed)
    return run_trial(keys, collection.info.metric, queries, wanted, progress)


def _draw(
    collection: Collection, sample: int, read: int, seed: int, progress: Progress
) -> FloatArray:
    """Draw keys evenly from those that are read; memory holds no more than the sample."""
    rows = np.arange(read)
    if read > sample:
        rows = np.sort(np.random.default_rng(seed).choice(read, sample, replace=False))
    keys = np.empty((len(rows), collection.info.dim), dtype=np.float32)
    filled = 0
    with progress("read keys", read, 0, "keys") as step:
        for low, vectors in _batches(collection, read):
            here = rows[(rows >= low) & (rows < low + len(vectors))] - low
            keys[filled : filled + len(here)] = vectors[here]
            filled += len(here)
            step.advance(len(vectors))
    return keys[:filled]  # fewer where others deleted some meanwhile


def _batches(collection: Collection, read: int) -> Iterator[tuple[int, FloatArray]]:
    low = 0
    for batch in collection.scan(_BATCH):
        vectors = batch.vectors[: read - low]
        if len(vectors):
            yield low, vectors
        low += len(vectors)
        if low >= read:
            return
