"""Whether a router over partitions that a collection has already would pay."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from amips_plugins.collection import Collection
from amips_plugins.doctor.findings import Verdict
from amips_plugins.doctor.verdict import RECALLS
from amips_plugins.errors import InvalidInput, TrainingError
from amips_plugins.partitions import Partitions, Value
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray

if TYPE_CHECKING:
    from amips_plugins.export.partition_trial import PartitionCost, PartitionTrial

__all__ = ["PartitionDiagnosis", "diagnose_partitions", "judge_partitions"]

_MOST_READ = 2_000_000
_BATCH = 5_000
_K = 10
_WORTH = 0.9  # of what the largest first cost
_FEW = 200  # test queries
_MUCH_OVERFLOW = 0.3
_HAS_ONE = (
    "Leave it as it is: a native search follows a graph over all keys already, which costs less "
    "than any choice among its parts."
)


class PartitionDiagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """All that was found."""

    collection: str
    field: str | None
    trial: PartitionTrial | None
    verdict: Verdict


def diagnose_partitions(
    collection: Collection,
    named: str,
    queries: FloatArray | None = None,
    *,
    sample: int,
    seed: int = 0,
    progress: Progress = no_progress,
) -> PartitionDiagnosis:
    """Try a router over the partitions that a field tells apart; nothing is changed.

    Of several collections as one each is a partition, and ``named`` is ``native``.

    Raises
    ------
    InvalidInput
        The collection cannot be told apart so.
    """
    from amips_plugins.export.partition_trial import run_partition_trial
    from amips_plugins.export.quick_trial import TrialOptions

    seen = collection.partitioned(Partitions.named(named))
    info, count = collection.info, collection.count()
    field = None if seen.partitions is None else seen.partitions.field
    # What is read part by part is read to the end: the first keys would be of the first parts.
    read = count if field is None else min(count, _MOST_READ)
    keys, values = _read(seen, sample, read, seed, progress)
    wanted = TrialOptions(2, RECALLS, _K, None, count, read, seed)
    has_one = collection.describe().native == "graph" and seen.break_even < 1.0
    trial: PartitionTrial | None = None
    try:
        if len(keys) <= _K:
            raise TrainingError(f"{len(keys)} keys are too few to try anything on.")
        trial = run_partition_trial(keys, values, field, info.metric, queries, wanted, progress)
        verdict = judge_partitions(trial, several=info.database == "several")
        if has_one:
            verdict = Verdict(answer="leave", text=_HAS_ONE)
    except TrainingError as exc:
        verdict = Verdict(answer="unclear", text=f"Cannot say: {exc}")
    return PartitionDiagnosis(collection=info.name, field=field, trial=trial, verdict=verdict)


def judge_partitions(trial: PartitionTrial, *, several: bool = False) -> Verdict:
    """Say what one graph over all keys would cost, and then what to do about given partitions.

    ``several`` collections are partitions by themselves, and need no option.
    """
    found = _judge(trial, "snapshot" if several else "snapshot --partitions")
    one = _at(trial, "one graph", RECALLS[-1])
    if one is None:
        return found
    told = (
        f"One graph over all keys reaches recall@{trial.k} {one.recall:.2f} in a single search "
        f"that compares a query with {one.keys:.1%} of them: where it can be had, have that. "
    )
    return Verdict(answer=found.answer, text=told + found.text)


def _judge(trial: PartitionTrial, snapshot: str) -> Verdict:
    recall = RECALLS[-1]
    first, routed = _at(trial, "largest first", recall), _at(trial, "linear", recall)
    assert first is not None  # noqa: S101 - for the type checker
    assert routed is not None  # noqa: S101
    compared = (
        f"recall@{trial.k} {recall:.2f} takes {routed.searches:.1f} of {trial.partitions} "
        f"partitions with {routed.keys:.0%} of the keys, and {first.searches:.1f} with "
        f"{first.keys:.0%} if the largest are searched first, whatever is asked"
    )
    if trial.overflow > _MUCH_OVERFLOW:
        return Verdict(
            answer="leave",
            text=f"Leave it as it is: {trial.overflow:.0%} of the keys have no value, and every "
            f"query searches these.",
        )
    if trial.guessed:
        return Verdict(
            answer="unclear",
            text=f"Cannot say: {compared}, of queries that were guessed from the keys; log real "
            f"ones (QueryLog) and ask again with --queries-log.",
        )
    if trial.ratio_high > _WORTH > trial.ratio_low and trial.test_queries < _FEW:
        return Verdict(
            answer="unclear",
            text=f"Cannot say: {compared}, but {trial.test_queries} test queries are too few to "
            f"tell; collect some thousands.",
        )
    if trial.ratio_high > _WORTH:
        return Verdict(
            answer="leave",
            text=f"Your partitions say nothing of the vectors: leave it. {compared[0].upper()}"
            f"{compared[1:]}, which any labels would save.",
        )
    return Verdict(
        answer="route",
        text=f"Worth it where every partition is a search of its own: {compared}. Go on with "
        f"amips {snapshot}, train, publish.",
    )


def _at(trial: PartitionTrial, search: str, recall: float) -> PartitionCost | None:
    asked = search, recall
    return next((one for one in trial.costs if (one.search, one.recall) == asked), None)


def _read(
    seen: Collection, sample: int, read: int, seed: int, progress: Progress
) -> tuple[FloatArray, list[Value | None]]:
    """Draw keys evenly from those that are read, with their values."""
    if sample < 1:
        raise InvalidInput(f"A sample of {sample} keys tells nothing; try some thousands.")
    rows = np.arange(read)
    if read > sample:
        rows = np.sort(np.random.default_rng(seed).choice(read, sample, replace=False))
    chosen = np.zeros(read, dtype=np.bool_)
    chosen[rows] = True
    keys: list[FloatArray] = []
    values: list[Value | None] = []
    low = 0
    with progress("read keys", read, 0, "keys") as step:
        for batch in seen.scan(_BATCH):
            here = chosen[low : low + len(batch.ids)]
            keys.append(batch.vectors[: len(here)][here])
            values += itertools.compress(batch.values or (), here.tolist())
            low += len(batch.ids)
            step.advance(len(here))
            if low >= read:
                break
    none = np.empty((0, seen.info.dim), dtype=np.float32)
    return np.concatenate([none, *keys]), values
