"""Asking a database as many clients do, and what that costs it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amips_plugins.errors import InvalidInput
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Meter", "Search", "Traffic", "drive", "recall_of", "smallest"]

Search = Callable[[FloatArray], Sequence[Sequence[Any]]]
"""Answers ``(n_queries, dim)`` queries: for each its hits, best first, which have an ``id``."""

_BATCH = 64


@dataclass(frozen=True)
class Traffic:
    """What some clients saw.

    Attributes
    ----------
    latencies
        Milliseconds of every call.
    queries
        Queries answered.
    seconds
        From the first call to the end of the last.
    """

    latencies: npt.NDArray[np.float64]
    queries: int
    seconds: float

    @property
    def rate(self) -> float:
        """Queries a second."""
        return self.queries / self.seconds

    def quantile(self, share: float) -> float:
        """Return a quantile of the latencies in milliseconds."""
        return float(np.quantile(self.latencies, share))


@dataclass(frozen=True)
class Meter:
    """What a process has used, as Linux counts it.

    Attributes
    ----------
    pid
        Which process; its threads are counted in.
    """

    pid: int

    def cpu(self) -> float:
        """Return the CPU seconds used so far, in user and kernel mode."""
        # Behind the command, which may hold blanks; proc(5) counts fields from 1.
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return the resident memory in megabytes (10^6 bytes)."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise InvalidInput(f"Process {self.pid} has ended; nothing can be measured.")


def drive(
    search: Search, queries: FloatArray, clients: int, seconds: float, batch: int = 1
) -> Traffic:
    """Let clients ask one query (or batch) after another, each on a thread, for some seconds.

    Parameters
    ----------
    search
        What they call.
    queries
        ``(n, dim)``; every client begins at another place, and at the start again at the end.
    clients
        Number of threads.
    seconds
        No call begins later.
    batch
        Queries in one call.

    Raises
    ------
    Exception
        Whatever a search raised first.
    """
    parts = [queries[low : low + batch] for low in range(0, len(queries) - batch + 1, batch)]
    if not parts:
        raise InvalidInput(f"{len(queries)} queries are too few for batches of {batch}.")
    times: list[list[float]] = [[] for _ in range(clients)]
    faults: list[Exception] = []
    together = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        place = number * len(parts) // clients
        together.wait()
        until = time.perf_counter() + seconds
        try:
            while not times[number] or time.perf_counter() < until:
                started = time.perf_counter()
                search(parts[place % len(parts)])
                times[number].append((time.perf_counter() - started) * 1e3)
                place += 1
        except Exception as exc:  # noqa: BLE001 - raised below, on the caller's thread
            faults.append(exc)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    together.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - started
    if faults:
        raise faults[0]
    latencies = np.concatenate(times)
    return Traffic(latencies, len(latencies) * batch, taken)


def recall_of(search: Search, queries: FloatArray, hits: IntArray, k: int) -> float:
    """Return mean recall@k.

    Parameters
    ----------
    search
        Answers with ids that are rows of the keys.
    queries
        ``(n, dim)``.
    hits
        ``(n, depth)`` int64 true top keys, best first.
    k
        How many of them are wanted.
    """
    found = 0
    for low in range(0, len(queries), _BATCH):
        answers = search(queries[low : low + _BATCH])
        for answer, true in zip(answers, hits[low : low + _BATCH, :k].tolist(), strict=True):
            found += len({hit.id for hit in answer[:k]} & set(true))
    return found / (k * len(queries))


def smallest(reaches: Callable[[int], float], target: float, low: int, high: int) -> int | None:
    """Find the smallest setting that reaches a target, by bisection.

    Parameters
    ----------
    reaches
        What a setting reaches; it must not fall as the setting grows, but for noise.
    target
        What is wanted.
    low, high
        The settings to look among, both included.

    Returns
    -------
    int or None
        None where even ``high`` does not reach the target.
    """
    known = {}

    def enough(setting: int) -> bool:
        if setting not in known:
            known[setting] = reaches(setting) >= target
        return known[setting]

    # Doubling first: small settings are the cheap ones to try.
    top = low
    while not enough(top):
        if top == high:
            return None
        low, top = top + 1, min(2 * top, high)
    while low < top:
        middle = (low + top) // 2
        low, top = (low, middle) if enough(middle) else (middle + 1, top)
    return top
