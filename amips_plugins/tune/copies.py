"""Trying other builds of an index on copies, one after the other, as long as there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from amips_plugins.collection import Collection
from amips_plugins.errors import AmipsError
from amips_plugins.models.calibration import Calibration
from amips_plugins.plan import NATIVE, QueryPlan, Target
from amips_plugins.progress import Progress
from amips_plugins.tune.calibrating import calibrated, enough_for, planned
from amips_plugins.tune.keys import DrawnKeys
from amips_plugins.tune.measuring import AGAIN, scanned_truth, try_both
from amips_plugins.tune.queries import QueryParts
from amips_plugins.tune.recalls import Truth
from amips_plugins.tune.rows import NATIVE_ROW, compared, dropped
from amips_plugins.tune.trials import Finished, Trials
from amips_plugins.tuning import Build, Tuning
from amips_plugins.vectors import FloatArray

__all__ = ["Copies"]

_ROOM = 4.0  # times the vectors that a copy takes on the disk
_LONGEST = 200  # characters of a refusal
_NO_SAMPLE = "not tried: a copy of a sample has fewer pieces anyway; --sample takes more keys"
_TIME_UP = "not tried: the time is up (--budget-minutes)"

Way = tuple[Collection, QueryPlan, Truth]


@dataclass(frozen=True)
class Copies:
    """What trials on copies need.

    ``calibrate`` and ``compare`` are the true best keys of those queries in the whole collection;
    ``native`` is how the collection itself was calibrated, or searched where nothing can be set.
    """

    collection: Collection
    tuning: Tuning
    found: Build
    target: Target
    parts: QueryParts
    calibrate: Truth
    compare: Truth
    keys: DrawnKeys
    native: Finished
    work: Path
    clock: Callable[[], float]
    progress: Progress

    def try_all(self, builds: Sequence[Build], seconds: float, trials: Trials) -> list[Finished]:
        """Try every build; the time is looked at before each."""
        started, last = time.monotonic(), 0.0
        results: list[Finished] = []
        too_little = self._too_little()
        with ExitStack() as stack:
            base: Way | None = None
            for build in builds:
                kept = trials.get(build.name)
                late = time.monotonic() - started + last > seconds
                why = too_little or (_TIME_UP if late else None)
                if build.merges and not self.keys.whole:
                    why = _NO_SAMPLE
                if kept is not None or why is not None:
                    results.append(kept or Finished(dropped(build.name, why or "")))
                    continue
                began = time.monotonic()
                try:
                    base = base or self._base(stack)
                except Exception as exc:  # noqa: BLE001 - no copy at all can be made
                    too_little = _refusal(exc)
                    results.append(Finished(dropped(build.name, too_little)))
                    continue
                tried = self._try(build, base)
                # What was refused may be allowed the next time.
                results.append(tried if tried.row.dropped is not None else trials.put(tried))
                last = time.monotonic() - began
        return results

    def _too_little(self) -> str | None:
        room, wanted = self.tuning.free_bytes(self.work), _ROOM * self.keys.vectors.nbytes
        if room is None or room >= wanted:
            return None
        return f"a copy takes about {wanted / 1e6:,.0f} MB, and {room / 1e6:,.0f} MB are free"

    def _base(self, stack: ExitStack) -> Way:
        """Return what copies are compared with: the collection, or a copy of it as it is built."""
        made, collection = self.native.calibration, self.collection
        if not self.keys.whole:
            collection = stack.enter_context(self._scratch(self.found, "base"))
        if not self.found.knob.efforts:
            return collection, NATIVE, self._compared_by(self.found)
        if not self.keys.whole:
            made = self._calibrated(collection, self.found)
        assert made is not None  # noqa: S101 - it was calibrated
        plan = planned(NATIVE_ROW, self.found, made, self.target)[1]
        return collection, plan or NATIVE, self._compared_by(self.found)

    def _scratch(self, build: Build, name: str) -> AbstractContextManager[Collection]:
        keys, work = self.keys, self.work / name
        return self.tuning.scratch(build, keys.batches(), len(keys.ids), work, self.progress)

    def _try(self, build: Build, base: Way) -> Finished:
        began = self.clock()
        try:
            with self._scratch(build, "trial") as copy:
                took = self.clock() - began
                made = self._calibrated(copy, build)
                row, plan = planned(build.name, build, made, self.target)
                way = copy, plan or NATIVE, self._compared_by(build)
                ours, theirs = try_both(
                    [way, base],
                    self.parts.compare,
                    self.target.k,
                    self.clock,
                    self.progress,
                    f"compare {build.name}",
                    AGAIN if self.tuning.in_process else 1,
                )
                row = replace(row, build_seconds=took)
                return Finished(compared(row, ours, theirs, self.native.row), made)
        except Exception as exc:  # noqa: BLE001 - whatever a database refuses, the others are tried
            return Finished(dropped(build.name, _refusal(exc)))

    def _calibrated(self, copy: Collection, build: Build) -> Calibration:
        """Calibrate for the k asked for alone, and no further than the target takes."""
        truth = self.calibrate if self.keys.whole else self._among_drawn(self.parts.calibrate)
        go_on = enough_for(self.target)
        queries, k = self.parts.calibrate, self.target.k
        return calibrated(copy, build, queries, truth.top(k), self.progress, go_on)

    def _compared_by(self, build: Build) -> Truth:
        truth = self.compare if self.keys.whole else self._among_drawn(self.parts.compare)
        return truth if build.exact_scores else truth.by_ids()

    def _among_drawn(self, queries: FloatArray) -> Truth:
        metric = self.collection.info.metric
        return scanned_truth(self.keys.batches(), metric, queries, self.target.k)


def _refusal(exc: Exception) -> str:
    if isinstance(exc, AmipsError):
        return str(exc)
    line = " ".join(str(exc).split()) or type(exc).__name__
    return f"the database refuses it: {line[:_LONGEST]}"
