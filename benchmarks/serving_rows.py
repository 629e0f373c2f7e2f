"""The rows of the serving benchmark, the file that keeps them, and the fit over their sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from amips_plugins.errors import InvalidInput
from amips_plugins.files import replace_file

__all__ = ["Growth", "Served", "ServedStore", "cheaper", "growth"]

_SIZES = 3  # that show how cost grows


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What one method costs one engine at one recall.

    Attributes
    ----------
    data, keys
        Name of the data, and number of keys.
    engine, method
        ``milvus`` or ``edge``, and how it was searched.
    target
        Recall@10 that the setting was tuned to reach on the calibration queries; 1 for an exact
        search.
    setting
        What it took, such as ``nprobe 24``.
    recall
        Recall@10 on the test queries.
    scanned
        Mean share of the keys in the cells searched; None where there are no cells of ours.
    p50, p99
        Milliseconds of a search by the only client.
    rate_1, rate_4, rate_16
        Queries a second that so many clients get together.
    rate_batch
        Queries a second of one client in batches of 64.
    cpu, cpu_batch
        CPU seconds of the server for 1,000 queries of those clients, or in batches; what it uses
        when idle is taken off. An embedded engine's are those of the whole process.
    cpu_client
        CPU seconds of the asking process for 1,000 single queries; None if it is the same.
    build, build_cpu
        Seconds from nothing (for cells of Milvus: from the loaded source) to a collection that
        serves, and the server's CPU seconds meanwhile.
    memory
        Megabytes of resident memory that loading adds to the server.
    """

    data: str
    keys: int
    engine: str
    method: str
    target: float
    setting: str
    recall: float
    scanned: float | None
    p50: float
    p99: float
    rate_1: float
    rate_4: float
    rate_16: float
    rate_batch: float
    cpu: float
    cpu_batch: float
    cpu_client: float | None
    build: float
    build_cpu: float
    memory: float


class ServedStore:
    """Rows, in a JSON file if there is one.

    Parameters
    ----------
    path
        A JSON array of rows; None keeps them in memory.

    Raises
    ------
    InvalidInput
        The file holds something else.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: list[Served] = []
        if path is not None and path.exists():
            try:
                self.rows = msgspec.json.decode(path.read_bytes(), type=list[Served])
            except msgspec.MsgspecError as exc:
                raise InvalidInput(f"{path} holds no rows of this benchmark ({exc}).") from exc

    def has(self, data: str, keys: int, engine: str, method: str) -> bool:
        """Whether a method has been measured: all its targets come at once."""
        return any(
            (row.data, row.keys, row.engine, row.method) == (data, keys, engine, method)
            for row in self.rows
        )

    def add(self, rows: Iterable[Served]) -> None:
        """Keep the rows of a method, on disk before this returns."""
        self.rows += rows
        if self._path is not None:
            lines = b",\n".join(msgspec.json.encode(row) for row in self.rows)
            replace_file(self._path, b"[\n" + lines + b"\n]\n")


@dataclass(frozen=True)
class Growth:
    """CPU seconds for 1,000 queries as ``fixed + slope * n / 100,000``.

    Attributes
    ----------
    fixed, slope
        By least squares over the sizes measured, the slope not below 0.
    """

    fixed: float
    slope: float

    def at(self, keys: float) -> float:
        """Return the cost at a number of keys."""
        return self.fixed + self.slope * keys / 1e5


def growth(rows: Sequence[Served]) -> Growth | None:
    """Fit how the cost of one method at one recall grows; None for fewer than three sizes.

    A line through two measurements always fits, and the noise of both is then taken for growth.
    """
    sizes = np.array([row.keys for row in rows], dtype=np.float64) / 1e5
    costs = np.array([row.cpu for row in rows])
    if len(set(sizes.tolist())) < _SIZES:
        return None
    # Relative residuals: the largest collection shall not decide alone.
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / costs[:, None]
    (fixed, slope), *_ = np.linalg.lstsq(design, np.ones_like(sizes), rcond=None)
    if slope < 0:
        return Growth(float(costs.mean()), 0.0)
    return Growth(float(fixed), float(slope))


def cheaper(one: Growth, other: Growth) -> tuple[float, float] | None:
    """Return between which numbers of keys ``one`` costs less than ``other``; None for nowhere."""
    if one.slope == other.slope:
        return (0.0, math.inf) if one.fixed < other.fixed else None
    crossing = (one.fixed - other.fixed) / (other.slope - one.slope) * 1e5
    if one.slope < other.slope:
        return max(0.0, crossing), math.inf
    return (0.0, crossing) if crossing > 0 else None
