"""How far to search for a recall target, and what may be promised about it.

A router gives every cell a priority, and searches the cells above a threshold: an easy query
searches few, a hard one many. Lower thresholds find more and cost more; calibration says how much.

The promise is distribution-free: with probability at least ``confidence`` over the calibration
queries, the mean recall@k of fresh queries from the same distribution is at least the value in
``guaranteed``. It is learn-then-test (Angelopoulos, Bates, Candes, Jordan and Lei, 2021,
arXiv 2110.01052) with fixed-sequence testing from all cells downwards and a betting p-value
(Waudby-Smith and Ramdas, 2024, arXiv 2010.09686), inverted once per threshold, so that any one
target can be looked up later. It speaks of unfiltered searches. ``export.cost_curves`` makes it.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from amips_plugins.arrays import read_npz, readable, write_npz
from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.vectors import FloatArray, IntArray

__all__ = ["Calibration"]

_ARRAYS = ("thresholds", "recall", "guaranteed", "scanned")
_OPTIONAL = ("efforts", "lists", "near", "far_efforts")
_MOST_EFFORT = 1 << 16


@dataclass(frozen=True)
class Calibration:
    """Recall as a function of the threshold.

    Attributes
    ----------
    thresholds
        ``(n_levels,)`` float32, falling; the last is minus infinity, which searches every cell.
    recall
        ``(max_k, n_levels)`` float32: mean recall@(row + 1) on the calibration queries.
    guaranteed
        ``(max_k, n_levels)`` float32: lower bounds of the same that hold with ``confidence``,
        never falling along the levels.
    scanned
        ``(n_levels,)`` float32: mean share of the keys in the cells above the threshold.
    confidence
        Probability, over the calibration queries, that a bound holds.
    efforts
        ``(n_levels,)`` int64, rising: how far the graph inside a cell is searched (HNSW's ef) for
        the recalls to hold; None where cells are scanned.
    near, far_efforts
        ``(n_levels,)`` where graphs are searched with two efforts: what a cell has to reach for
        ``efforts``, falling, and the effort of those that do not, rising. None for one effort.
    lists
        Where cells hold an IVF index of codes, the number of its lists; ``efforts`` are then how
        many of them are searched (nprobe). None for graphs.
    """

    thresholds: FloatArray
    recall: FloatArray
    guaranteed: FloatArray
    scanned: FloatArray
    confidence: float
    efforts: IntArray | None = None
    lists: int | None = None
    near: FloatArray | None = None
    far_efforts: IntArray | None = None

    @property
    def max_k(self) -> int:
        """Largest k that was calibrated."""
        return len(self.recall)

    def threshold(self, k: int, recall: float) -> float:
        """Return the highest threshold whose recall@k is guaranteed to reach the target.

        Raises ``InvalidInput`` where k was not calibrated, the target is no share, or only a search
        of every cell is known to reach it; the message names the best target there is.
        """
        if not 0.0 < recall <= 1.0:
            raise InvalidInput(f"recall={recall} is no share; pass a number in (0, 1].")
        if recall == 1.0:
            return -np.inf  # for any k: only a search of every cell finds every key for certain
        if k > self.max_k:
            raise InvalidInput(
                f"Recall targets are calibrated up to k={self.max_k}, not k={k}; "
                f"pass n_probes instead, or train with --k {k}."
            )
        rising = self._rising[k - 1]
        level = bisect_left(rising, float(np.float32(recall)))  # bounds are of 32 bits
        if level >= len(rising) - 1:
            best = np.floor(max(rising[:-1], default=0.0) * 1000) / 1000
            raise InvalidInput(
                f"recall={recall} at k={k} cannot be promised with {self.confidence:.0%} "
                f"confidence from the calibration queries; the best target is {best:.3f}, or 1.0 "
                f"for the native search. Train with more queries to promise more."
            )
        return float(self.thresholds[level])

    @cached_property
    def _rising(self) -> list[list[float]]:
        """The guarantees as plain numbers: every search looks one up."""
        rising: list[list[float]] = np.maximum.accumulate(self.guaranteed, axis=1).tolist()
        return rising

    def effort(self, threshold: float) -> int | None:
        """Return how far the index inside cells is searched; None where cells are scanned."""
        if self.efforts is None:
            return None
        return int(self.efforts[int((self.thresholds <= threshold).argmax())])

    def far(self, threshold: float) -> tuple[float, int] | None:
        """Return below which priority graphs are searched less far, and how far; None if nowhere.

        The threshold is one of the calibration's.
        """
        if self.near is None or self.far_efforts is None:
            return None
        level = int((self.thresholds <= threshold).argmax())
        return float(self.near[level]), int(self.far_efforts[level])

    def unpromised(self, k: int, recall: float) -> str | None:
        """Say in a few words why a recall@k is not promised, or None; a share is refused if none.

        Raises ``InvalidInput`` where the target is no share.
        """
        if k > self.max_k and 0.0 < recall < 1.0:
            return "target: k not calibrated"
        try:
            self.threshold(k, recall)
        except InvalidInput:
            if not 0.0 < recall <= 1.0:
                raise
            return "target: not promised"
        return None

    def default_threshold(self, k: int, recall: float) -> float:
        """Like ``threshold``, but search every cell where nothing can be promised."""
        try:
            return self.threshold(k, recall)
        except InvalidInput:
            return -np.inf

    def widen(self, threshold: float, factor: float) -> float:
        """Return the highest threshold that searches ``factor`` times the share of the keys."""
        if factor <= 1.0:
            return threshold
        level = int((self.thresholds <= threshold).argmax())
        wanted = factor * float(self.scanned[level])
        enough = self.scanned[:-1] >= wanted
        if wanted >= 1.0 or not enough.any():
            return -np.inf
        return float(self.thresholds[int(enough.argmax())])

    def to_bytes(self) -> bytes:
        """Serialise as an npz archive (plain arrays, no pickle)."""
        return write_npz(
            **({} if self.efforts is None else {"efforts": self.efforts}),
            **({} if self.lists is None else {"lists": [self.lists]}),
            **({} if self.near is None else {"near": self.near}),
            **({} if self.far_efforts is None else {"far_efforts": self.far_efforts}),
            thresholds=self.thresholds,
            recall=self.recall,
            guaranteed=self.guaranteed,
            scanned=self.scanned,
            confidence=[self.confidence],
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Calibration:
        """Read what ``to_bytes`` wrote, or raise ``BundleCorrupt`` where its shapes do not fit."""
        with readable("The bundle's calibration"):
            archive = read_npz(data, (*_ARRAYS, "confidence", *_OPTIONAL))
            arrays: list[npt.NDArray[np.float32]] = [
                np.asarray(archive[name], dtype=np.float32) for name in _ARRAYS
            ]
            confidence = float(archive["confidence"][0])
            efforts = archive.get("efforts")
            efforts = None if efforts is None else np.asarray(efforts, dtype=np.int64)
            lists = int(archive["lists"][0]) if "lists" in archive else None
            near, far = archive.get("near"), archive.get("far_efforts")
            near = None if near is None else np.asarray(near, dtype=np.float32)
            far = None if far is None else np.asarray(far, dtype=np.int64)
        thresholds, recall, guaranteed, scanned = arrays
        per_level = thresholds.shape
        if (
            recall.ndim != 2
            or guaranteed.shape != recall.shape
            or not per_level == scanned.shape == recall.shape[1:]
            or not np.isneginf(thresholds[-1:]).any()  # nor is there none
            or any(a is not None and a.shape != per_level for a in (efforts, near, far))
            or (near is None) != (far is None)
        ):
            raise BundleCorrupt("The bundle's calibration has unfitting shapes; publish it again.")
        finite = all(np.isfinite(array).all() for array in (thresholds[:-1], *arrays[1:]))
        possible = all(
            bool(((a > 0) & (a < _MOST_EFFORT)).all()) for a in (efforts, far) if a is not None
        )
        if near is not None:
            possible = possible and efforts is not None and not np.isnan(near).any()
        if lists is not None:
            possible = possible and efforts is not None and 0 < lists < _MOST_EFFORT
        if not finite or not possible or not 0.0 <= confidence <= 1.0:
            raise BundleCorrupt("The bundle's calibration has impossible values; publish it again.")
        return cls(thresholds, recall, guaranteed, scanned, confidence, efforts, lists, near, far)
