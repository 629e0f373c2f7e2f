"""A sample of the queries served, for the next training; needs the extra ``query-log``.

::

    queries/
        .lock                                  held while a file is written or removed
        20261122T203000Z-4711-9f2c.parquet     one file a process, replaced as the sample moves

Vectors only: no text, no ids, no filter, nothing of who asked. A vector still tells much of the
text it was made from (Morris et al. 2023, arXiv 2310.06816): keep the folder as the text itself.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import secrets
import threading
import weakref
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import numpy as np

from amips_plugins.background.single_flight import PeriodicJob
from amips_plugins.collection import CollectionInfo, CollectionKey, collection_key
from amips_plugins.errors import InvalidInput, require
from amips_plugins.files import held, replace_file
from amips_plugins.observe.sample import FORMAT, Reservoir, Sample, SampleHeader, encode_sample
from amips_plugins.routing.observers import Observation
from amips_plugins.vectors import Metric

__all__ = ["QueryLog"]

_log = logging.getLogger("amips_plugins")
_LEAST = 64 * 1024  # bytes: a file's header and a few queries
_PATTERN = "*.parquet"


class QueryLog:
    """An observer that keeps a uniform sample of the queries of one collection.

    A search adds to a sample in memory, and waits for nothing; a thread that lives no longer than
    the work writes it out now and then, and once more when the process ends. A process that is
    killed loses what came since it last wrote. Any number of processes may log into one folder.

    Parameters
    ----------
    folder
        Where to; created for its owner alone if need be.
    max_queries
        Most queries that this process keeps, in memory and in its file.
    max_bytes
        What all files of the folder may take together. The oldest go first; a sample that is
        larger by itself is thinned out.
    flush_every
        Seconds from one writing to the next; None to write on ``flush`` and ``close`` only.

    Raises
    ------
    InvalidInput
        An argument cannot be used.
    MissingExtra
        pyarrow is not installed.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from amips_plugins import LearnedRouter, MemoryCollection
    >>> with tempfile.TemporaryDirectory() as folder, QueryLog(folder) as log:
    ...     router = LearnedRouter(MemoryCollection(np.eye(3)), observers=[log])
    ...     _ = router.search([0.0, 1.0, 0.0], k=1)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        max_queries: int = 20_000,
        max_bytes: int = 2**30,
        flush_every: float | None = 300.0,
    ) -> None:
        if max_queries < 1:
            raise InvalidInput(f"max_queries={max_queries!r} keeps nothing; pass 1 or more.")
        if max_bytes < _LEAST:
            raise InvalidInput(f"max_bytes={max_bytes!r} holds nothing; pass {_LEAST} or more.")
        if flush_every is not None and not flush_every > 0:
            raise InvalidInput(
                f"flush_every={flush_every!r} is no time; pass seconds above 0, or None."
            )
        require("pyarrow.parquet", "query-log")  # not first when the process ends
        self._folder = Path(folder)
        self._max_queries = max_queries
        self._max_bytes = max_bytes
        self._every = flush_every
        self._rng = random.Random()  # noqa: S311 - a sample, no secret
        self._closed = False
        self._written = 0
        self._info: CollectionInfo | None = None
        self._about: tuple[CollectionKey, Metric, int] | None = None
        self._reservoir: Reservoir | None = None
        self._start_over()
        _LIVE.add(self)

    def __call__(self, observation: Observation) -> None:
        """Show the sample a search's queries; raise ``InvalidInput`` for another collection."""
        if not self._lock.acquire(blocking=False):
            return  # the sample is being copied: no search waits, and what it asks says no more
        try:
            if observation.collection is not self._info:
                self._follow(observation.collection)
            if self._reservoir is None:
                return
            self._reservoir.add(observation.queries)
        finally:
            self._lock.release()
        self._flusher.run_if_due()

    def flush(self) -> None:
        """Write the sample out now.

        Raises
        ------
        OSError
            The folder cannot be written to.
        """
        with self._flushing:
            with self._lock:
                sample = self._sample()
                seen = 0 if sample is None else sample.header.seen
            if sample is None or seen == self._written:
                return
            content = _fitted(sample, self._max_bytes, self._rng)
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with held(self._folder / ".lock", 0o600):
                _make_room(self._folder, self._max_bytes - len(content), self._name)
                replace_file(self._folder / self._name, content)
            self._written = seen

    def close(self) -> None:
        """Write the sample out, and log nothing more."""
        self.flush()
        with self._lock:
            self._closed = True
            self._info, self._reservoir = None, None

    def __enter__(self) -> QueryLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start_over(self) -> None:
        """Begin an empty sample under a name of its own."""
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._flusher = PeriodicJob(self._flush_quietly, self._every)
        self._rng.seed()
        self._name = f"{_now():%Y%m%dT%H%M%SZ}-{os.getpid()}-{secrets.token_hex(4)}.parquet"
        self._info, self._about, self._reservoir = None, None, None
        self._started, self._written = "", 0
        self._failing = False

    def _follow(self, info: CollectionInfo) -> None:
        """Take the first collection seen, or a later generation of it."""
        if self._closed:
            return
        about = collection_key(info), info.metric, info.dim
        if self._about is None:
            fits = (self._max_bytes - _LEAST // 2) // (4 * info.dim)
            if fits < 1:
                raise InvalidInput(
                    f"max_bytes={self._max_bytes} holds no query of {info.dim} dimensions; "
                    f"pass more."
                )
            self._reservoir = Reservoir(min(self._max_queries, fits), info.dim, self._rng)
            self._about = about
            self._started = _now().isoformat(timespec="seconds")
        elif about != self._about:
            raise InvalidInput(
                f"The query log {self._folder} is of collection {self._about[0].name!r}, not "
                f"{info.name!r}; give every collection a log in a folder of its own."
            )
        self._info = info

    def _sample(self) -> Sample | None:
        if self._reservoir is None or self._about is None:
            return None
        key, metric, dim = self._about
        header = SampleHeader(
            format=FORMAT,
            collection=key,
            metric=metric,
            dim=dim,
            seen=self._reservoir.seen,
            started=self._started,
            ended=_now().isoformat(timespec="seconds"),
        )
        return Sample(header, self._reservoir.rows())

    def _flush_quietly(self) -> None:
        try:
            self.flush()
        except Exception as exc:  # noqa: BLE001 - a full disk must not end the process
            if not self._failing:
                _log.warning("The query log %s cannot be written: %s", self._folder, exc)
            self._failing = True
        else:
            self._failing = False


_LIVE: weakref.WeakSet[QueryLog] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    for log in list(_LIVE):
        log._flush_quietly()


def _in_child() -> None:
    """Give a forked process samples of its own: its parent writes what they have in common."""
    for log in list(_LIVE):
        log._start_over()


os.register_at_fork(after_in_child=_in_child)


def _fitted(sample: Sample, most: int, rng: random.Random) -> bytes:
    """Return the file, thinned out at random until it fits."""
    while True:
        content = encode_sample(sample)
        kept = len(sample.queries)
        if len(content) <= most or kept == 0:
            return content
        fewer = min(kept - 1, int(kept * most / len(content) * 0.98))
        rows = np.sort(rng.sample(range(kept), fewer))
        sample = replace(sample, queries=sample.queries[rows])


def _make_room(folder: Path, room: int, own: str) -> None:
    """Remove the oldest files until what stays, without our own, fits."""
    found = []
    for path in folder.glob(_PATTERN):
        if path.name != own:
            status = path.stat()
            found.append((status.st_mtime_ns, path.name, status.st_size, path))
    total = sum(size for _, _, size, _ in found)
    for _, _, size, path in sorted(found):
        if total <= room:
            return
        path.unlink(missing_ok=True)
        total -= size


def _now() -> datetime:
    return datetime.now(timezone.utc)
