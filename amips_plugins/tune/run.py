"""Measuring every way to search a collection that its database offers, and choosing one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from amips_plugins.adapters.tuning import tuning_of
from amips_plugins.collection import (
    Collection,
    CollectionInfo,
    KeyBatch,
    SearchRequest,
    collection_key,
)
from amips_plugins.collection.construction import Construction
from amips_plugins.collection.sizing import bytes_of_build, size_up
from amips_plugins.errors import InvalidInput
from amips_plugins.files import read_file, replace_file
from amips_plugins.models.calibration import Calibration
from amips_plugins.plan import NATIVE, Target
from amips_plugins.progress import Progress, no_progress
from amips_plugins.tune.calibrating import calibrated, planned
from amips_plugins.tune.copies import Copies
from amips_plugins.tune.keys import DrawnKeys, draw, truth_of
from amips_plugins.tune.measuring import AGAIN, try_both
from amips_plugins.tune.queries import QueryParts, split
from amips_plugins.tune.recalls import CONFIDENCE, Truth
from amips_plugins.tune.rows import FOUND, NATIVE_ROW, Choice, Row, choose, compared, dropped
from amips_plugins.tune.trials import Finished, Trials
from amips_plugins.tune.untried import untried
from amips_plugins.tuning import Build, Tuning
from amips_plugins.vectors import FloatArray

__all__ = [
    "MAX_K",
    "Measured",
    "NothingToTune",
    "TuneOptions",
    "TuneResult",
    "deepest",
    "measure",
]

_PATIENCE = 80.0  # seconds for the calibration of the collection itself
_FEW, _PACE, _PACED = 200, "queries", 20
_NOTHING_TO_SET = "every search looks at all keys, and no parameter changes that"
MAX_K = 100
"""Largest k that is calibrated."""


class NothingToTune(InvalidInput):
    """The collection is best left as it is, for nothing can be set, or not yet."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions:
    """What to aim at, and how long to look.

    ``seconds`` are all that trials of other builds may take together; ``sample`` is the number of
    keys that a copy has at most. What takes more than so many bytes of ``memory`` is left out.
    """

    recall: float = 0.95
    k: int = 10
    seconds: float = 1_200.0
    sample: int = 100_000
    seed: int = 0
    memory: int | None = None


class TuneResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, and what to do.

    Attributes
    ----------
    collection, database, keys, sampled
        What was looked at; the number of keys in copies.
    construction
        How it is built: pairs of a name and a text.
    queries, calibrated, compared
        Whether queries were logged or guessed, how many calibrated, and how many compared.
    k, recall, confidence
        The target.
    unit
        What ``cost`` counts: milliseconds of the engine's ``cpu``, or of ``time``.
    rows, choice, notes
        Every way to search; which to take; what to know beside.
    """

    collection: str
    database: str
    keys: int
    sampled: int
    construction: tuple[tuple[str, str], ...]
    queries: str
    calibrated: int
    compared: int
    k: int
    recall: float
    confidence: float
    unit: str
    rows: tuple[Row, ...]
    choice: Choice
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """A result, and what carrying it out takes.

    ``sample`` are some keys, by which the collection is known again.
    """

    result: TuneResult
    tuning: Tuning
    found: Build
    builds: dict[str, Build]
    calibrations: dict[str, Calibration]
    parts: QueryParts
    sample: KeyBatch


def measure(
    collection: Collection,
    queries: FloatArray | None,
    options: TuneOptions,
    work: Path,
    progress: Progress = no_progress,
    clock: Callable[[], float] | None = None,
) -> Measured:
    """Measure, and change nothing of the collection.

    ``clock`` is for whoever can read the CPU seconds of the engine's process.

    Raises ``NothingToTune`` where there is nothing to set, ``InvalidInput`` where the queries do
    not do, or the database allows too little.
    """
    info, tuning = collection.info, tuning_of(collection)
    built, count, found = collection.describe(), collection.count(), tuning.as_found()
    if found is None or count <= options.k:
        raise NothingToTune(_nothing(built.first, count, local=getattr(collection, "local", False)))
    if found.knob.efforts and built.native == "scan":  # the index is not searched yet
        raise NothingToTune(_nothing(" ".join(built.notes), count, local=False))
    builds, depth = tuning.builds(), deepest(collection, count)
    if depth < options.k:
        raise InvalidInput(f"The database allows {depth} hits a search; ask for no more (--k).")
    sized: tuple[str, ...] = ()
    if options.memory is not None:
        sized = (size_up(count, info.dim, options.memory, info.database, built.kept).text,)
    fitting, large = _fitting(info, builds, count, options.memory, built)
    empty = np.zeros((1, info.dim), dtype=np.float32)
    reason = collection.unroutable(SearchRequest(empty, options.k), rewritten=False)
    if reason is not None:
        raise InvalidInput(f"The collection allows no search parameters of ours ({reason}).")
    keys = draw(collection, options.sample, options.seed, progress)
    parts = split(queries, keys.vectors, options.seed)
    about = _about(collection, keys, count, options)
    parts = parts.at_most(_affordable(collection, found, parts, options.k, work, about))
    trials = Trials(work, msgspec.json.encode([about, _digest(parts)]))
    target = Target(options.k, options.recall)
    calibrate = truth_of(collection, parts.calibrate, depth, progress, keys)
    compare = truth_of(collection, parts.compare, depth, progress, keys)
    unit = "time" if clock is None and not tuning.in_process else "cpu"
    clock = clock or (time.process_time if tuning.in_process else time.perf_counter)
    first, native = trials.get(FOUND), trials.get(NATIVE_ROW)
    if first is None or native is None:
        again = AGAIN if tuning.in_process else 1
        first, native = _native(
            collection, found, target, parts, calibrate, compare, clock, progress, again
        )
        trials.put(native)
        trials.put(first)
    copies = Copies(
        collection,
        tuning,
        found,
        target,
        parts,
        calibrate,
        compare,
        keys,
        native if found.knob.efforts else first,
        work,
        clock,
        progress,
    )
    done = [first, native, *copies.try_all(fitting, options.seconds, trials)]
    by_name = {FOUND: found, NATIVE_ROW: found, **{build.name: build for build in builds}}
    seen = [_with_memory(one.row, by_name, info, built, count) for one in done]
    rows = (*seen, *large, *untried(info.database, built, builds))
    notes = [*_notes(built.notes, parts, count, len(keys.ids), collection.count()), *sized]
    result = TuneResult(
        collection=info.name,
        database=info.database,
        keys=count,
        sampled=len(keys.ids),
        construction=built.facts,
        queries=parts.source,
        calibrated=len(parts.calibrate),
        compared=len(parts.compare),
        k=options.k,
        recall=options.recall,
        confidence=CONFIDENCE,
        unit=unit,
        rows=rows,
        choice=choose(rows, options.recall, options.k),
        notes=tuple(notes),
    )
    known = {one.row.search: one.calibration for one in done if one.calibration is not None}
    return Measured(result, tuning, found, by_name, known, parts, keys.sample())


def _fitting(
    info: CollectionInfo,
    builds: Sequence[Build],
    keys: int,
    memory: int | None,
    built: Construction,
) -> tuple[list[Build], list[Row]]:
    """Return the builds that fit into the memory, and rows that say so of the others."""
    fitting, large = list[Build](), list[Row]()
    for build in builds:
        needed = _memory_of(build, info, built, keys)
        if memory is None or needed <= memory:
            fitting.append(build)
        else:
            why = f"takes about {needed / 1e9:,.2g} GB of the {memory / 1e9:,.2g} GB of --memory"
            large.append(dropped(build.name, why))
    return fitting, large


def _with_memory(
    row: Row, builds: dict[str, Build], info: CollectionInfo, built: Construction, keys: int
) -> Row:
    """Fill in what is kept in memory; of Milvus Lite nobody knows."""
    if row.dropped is not None or (info.database == "milvus" and built.kept is None):
        return row
    size = _memory_of(builds[row.search], info, built, keys)
    return msgspec.structs.replace(row, memory_bytes=size)


def _memory_of(build: Build, info: CollectionInfo, built: Construction, keys: int) -> int:
    return bytes_of_build(
        keys,
        info.dim,
        build.name,
        build.bytes_per_key,
        built.kept,
        vectors_on_disk=built.vectors_on_disk,
    )


def deepest(collection: Collection, count: int) -> int:
    """Return the largest k that can be calibrated: a database may allow fewer hits a search."""
    allowed = collection.max_candidates
    return min(MAX_K, count, MAX_K if allowed is None else allowed)


def _native(
    collection: Collection,
    found: Build,
    target: Target,
    parts: QueryParts,
    calibrate: Truth,
    compare: Truth,
    clock: Callable[[], float],
    progress: Progress,
    again: int,
) -> tuple[Finished, Finished]:
    """Calibrate the collection itself, and compare that with how it is searched now."""
    if not found.knob.efforts:
        ways, title = [(collection, NATIVE, compare)], "compare native"
        (as_is,) = try_both(ways, parts.compare, target.k, clock, progress, title, again)
        row = Row(search=FOUND, bytes_per_key=found.bytes_per_key)
        nothing = Finished(dropped(NATIVE_ROW, _NOTHING_TO_SET))
        return Finished(compared(row, as_is, as_is, None)), nothing
    made = calibrated(collection, found, parts.calibrate, calibrate, progress)
    row, plan = planned(NATIVE_ROW, found, made, target)
    truth = compare if found.exact_scores else compare.by_ids()
    ways = [(collection, NATIVE, truth), (collection, plan or NATIVE, truth)]
    title = "compare native"
    as_is, tuned = try_both(ways, parts.compare, target.k, clock, progress, title, again)
    first = compared(Row(search=FOUND, bytes_per_key=found.bytes_per_key), as_is, as_is, None)
    return Finished(first), Finished(compared(row, tuned, as_is, first), made)


def _affordable(
    collection: Collection, found: Build, parts: QueryParts, k: int, work: Path, about: str
) -> int:
    """Return how many queries calibrate within a minute or so; as the same question found first."""
    path, asked = work / _PACE, [about, _digest(parts)]
    try:
        *same, count = msgspec.json.decode(read_file(path, 1_000), type=tuple[str, str, int])
        if same == asked:
            return count
    except (OSError, msgspec.MsgspecError):
        pass
    some = parts.calibrate[:_PACED]
    started = time.perf_counter()
    for query in some:
        collection.search(SearchRequest(query[None], k))
    each = (time.perf_counter() - started) / len(some)
    count = int(_PATIENCE / max(each * max(1, len(found.knob.efforts)), 1e-9))
    count = min(max(count, _FEW), len(parts.calibrate))
    replace_file(path, msgspec.json.encode([*asked, count]))
    return count


def _about(collection: Collection, keys: DrawnKeys, count: int, options: TuneOptions) -> str:
    """Return a digest of all but the queries that the figures depend on."""
    facts = collection.describe().facts
    about = [options.recall, options.k, options.sample, options.seed]
    digest = hashlib.sha256(
        msgspec.json.encode([collection_key(collection.info), count, facts, about, keys.ids])
    )
    digest.update(np.ascontiguousarray(keys.vectors).data)
    return digest.hexdigest()


def _digest(parts: QueryParts) -> str:
    return hashlib.sha256(parts.calibrate.tobytes() + parts.compare.tobytes()).hexdigest()


def _nothing(first: str, count: int, *, local: bool) -> str:
    if first:
        return f"There is nothing to tune yet. {first}"
    if local:
        return (
            "There is nothing to tune: Qdrant's local mode looks at every key, whatever index is "
            "configured, and so holds any target. Tune the collection on the server that it is "
            "meant for, or in Qdrant Edge."
        )
    return (
        f"There is nothing to tune: every search of these {count:,} keys looks at all of them, and "
        f"no parameter changes that; amips doctor says whether cells would pay."
    )


def _notes(
    of_database: tuple[str, ...], parts: QueryParts, count: int, sampled: int, now: int
) -> Iterator[str]:
    yield from of_database
    if parts.source == "guess":
        yield (
            "Queries were guessed: keys with noise. What is promised holds for such queries, and "
            "says little of yours; log some hundred real ones (QueryLog) and tune again."
        )
    if sampled < count:
        yield (
            f"Other builds were tried on {sampled:,} of {count:,} keys: their ratios are "
            f"estimates, measured anew on the collection before anything is set."
        )
    if abs(now - count) > 0.01 * count:
        yield f"The collection changed meanwhile, from {count:,} to {now:,} keys; tune again."
