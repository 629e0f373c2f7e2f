"""What a process holds while it works: memory, threads and files, sampled and drawn."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import msgspec
import numpy as np
from matplotlib.figure import Figure

__all__ = ["Sample", "Sampler", "draw", "growth"]

_MIB = 2.0**20
_TRIM = 15  # samples from one return of free memory to the next


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What the process held at one moment.

    Attributes
    ----------
    seconds
        Since the start.
    rss
        Resident memory, MiB.
    threads, files
        How many.
    searches
        Done so far.
    """

    seconds: float
    rss: float
    threads: int
    files: int
    searches: int


class Sampler:
    """Takes a sample every second until it is stopped.

    Now and then what is free goes back to the system: the allocator keeps it, in a heap for every
    thread that there ever was, and it would hide whether what is in use grows.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        self._started = time.monotonic()

    def take(self, searches: int) -> None:
        """Take a sample."""
        if self._trim is not None and len(self.samples) % _TRIM == 0:
            gc.collect()
            self._trim(0)
        with Path("/proc/self/statm").open() as file:
            pages = int(file.read().split()[1])
        self.samples.append(
            Sample(
                seconds=time.monotonic() - self._started,
                rss=pages * os.sysconf("SC_PAGE_SIZE") / _MIB,
                threads=threading.active_count(),
                files=len(os.listdir("/proc/self/fd")),
                searches=searches,
            )
        )


def growth(samples: Sequence[Sample], name: str) -> float:
    """Return how much more there is of something in the last quarter than in the first.

    Both are medians, so that a moment's peak is none.
    """
    values = np.array([getattr(sample, name) for sample in samples], dtype=np.float64)
    quarter = max(1, len(values) // 4)
    return float(np.median(values[-quarter:]) - np.median(values[:quarter]))


def draw(
    samples: Sequence[Sample],
    warm_up: float,
    title: str,
    path: Path,
) -> None:
    """Plot memory, searches a second, threads and files over time.

    Parameters
    ----------
    samples
        One a second.
    warm_up
        Seconds that are not judged.
    title
        Of the figure.
    path
        The picture.
    """
    mpl.rcParams["svg.hashsalt"] = "amips"  # the same samples give the same file
    figure = Figure(figsize=(8.0, 6.4), layout="constrained")
    minutes = np.array([sample.seconds for sample in samples]) / 60.0
    searches = np.array([sample.searches for sample in samples], dtype=np.float64)
    rate = np.diff(searches) / np.diff(minutes * 60.0)
    lines: Mapping[str, Sequence[tuple[str, Sequence[float]]]] = {
        "resident memory, MiB": [("", [sample.rss for sample in samples])],
        "searches a second": [("", [float("nan"), *rate.tolist()])],
        "count": [
            ("threads", [sample.threads for sample in samples]),
            ("open files", [sample.files for sample in samples]),
        ],
    }
    axes = figure.subplots(len(lines), 1, sharex=True)
    for axis, (label, drawn) in zip(axes, lines.items(), strict=True):
        axis.axvspan(0.0, warm_up / 60.0, color="#999999", alpha=0.25, linewidth=0)
        for (name, values), colour in zip(drawn, ("#0072b2", "#009e73"), strict=False):
            axis.plot(minutes, values, color=colour, linewidth=1.0, label=name)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0.0)
        axis.grid(alpha=0.3)
        if len(drawn) > 1:
            axis.legend(fontsize="small")
    axes[-1].set_xlabel("minutes")
    axes[-1].set_xlim(0.0, float(minutes[-1]))
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
