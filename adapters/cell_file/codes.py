"""Codes of the keys of a run: how far each coordinate is from the run's mean, in even steps.

Keys are turned about (``rotation``), so that no coordinate holds more than others, and each key
has steps of its own: those that lose least of a normal distribution (Max, 1960), at 8 bits those
that reach its farthest coordinate. What is kept of a key's steps is their length times what makes
the code's inner product with the key itself right (as RaBitQ has it, Gao and Long, 2024), so that
scores of the nearest keys are not too low.

Codes live where inner products say how near a key is (``vectors.lift_keys``); the last coordinate
that L2 adds there is kept beside them, less what the codes' error adds to the inner product of key
and mean: what is left is the error of a query's own way from the mean, however far from zero all of
them are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amips_plugins.adapters.cell_file.file_format import Bits
from amips_plugins.adapters.cell_file.rotation import rotated
from amips_plugins.vectors import FloatArray, Metric, normalise

__all__ = ["LEAST", "Coder", "Scorer", "oversampling_of"]

LEAST: dict[Bits, int] = {8: 2, 4: 4, 2: 12}
"""Candidates of a search for few hits, which the codes rank less surely than ten."""

_OVERSAMPLING: dict[Bits, float] = {8: 1.5, 4: 2.0, 2: 4.0}
_LONG = 256  # dimensions, over which errors even out
_OF_LONG = 0.75
_STEPS = {2: 0.9957, 4: 0.3352}  # of a standard deviation
_ROWS = 1024  # decoded at once, so that they stay in the processor's cache
_TINY = 1e-30


def oversampling_of(bits: Bits, dim: int) -> float:
    """Return how many candidates to score by their vectors for every hit, so that few are lost.

    Of npm2pypi's keys, 384 dimensions at 2 bits, 3 lose as few of the best ten (3 in 1,000) as 4
    lost of codes whose keys had steps in common.
    """
    shorter = bits == 2 and dim >= _LONG
    return _OVERSAMPLING[bits] * (_OF_LONG if shorter else 1.0)


@dataclass(frozen=True)
class Coder:
    """Writes the codes of a run."""

    metric: Metric
    dim: int
    bits: Bits

    @property
    def width(self) -> int:
        """Bytes of a key's code."""
        return -(-self.dim * self.bits // 8)

    @property
    def head(self) -> int:
        """Bytes before the keys' own: the mean."""
        return 4 * self.dim

    @property
    def beside(self) -> int:
        """Bytes of a key beside its code: the length of its steps, and what L2 adds."""
        return 8 if self.metric is Metric.L2 else 4

    def n_bytes(self, keys: int) -> int:
        """Return how long a run of so many keys is."""
        return self.head + keys * (self.width + self.beside) if keys else 0

    def encode(self, keys: FloatArray) -> bytes:
        """Return the run of keys, ``(n, dim)``."""
        if not len(keys):
            return b""
        placed = rotated(normalise(keys) if self.metric is Metric.COSINE else keys)
        mean = placed.mean(axis=0, dtype=np.float64).astype("<f4")
        away = placed - mean
        levels = 2**self.bits
        if self.bits == 8:
            steps = 2 * np.abs(away).max(axis=1) / (levels - 1)
        else:
            steps = _STEPS[self.bits] * np.sqrt((away**2).mean(axis=1))
        scaled = away / np.maximum(steps, _TINY)[:, None]
        codes = np.zeros((len(keys), self.width * (8 // self.bits)), dtype=np.uint8)
        codes[:, : self.dim] = np.clip(np.floor(scaled + levels / 2), 0, levels - 1)
        decoded = codes[:, : self.dim] - np.float32((levels - 1) / 2)
        along = np.einsum("ij,ij->i", away, decoded)
        lengths = np.einsum("ij,ij->i", away, away) / np.maximum(along, _TINY)
        lengths[steps <= _TINY] = 0.0  # a key that is the mean
        packed = np.zeros((len(keys), self.width), dtype=np.uint8)
        for place in range(8 // self.bits):
            part = codes[:, place * self.width : (place + 1) * self.width]
            packed |= part << np.uint8(place * self.bits)
        parts = [mean.tobytes(), packed.tobytes(), lengths.astype("<f4").tobytes()]
        if self.metric is Metric.L2:
            half = -0.5 * np.einsum("ij,ij->i", keys, keys, dtype=np.float64)
            half -= (decoded * lengths[:, None] - away) @ mean.astype(np.float64)
            parts.append(half.astype("<f4").tobytes())
        return b"".join(parts)


class Scorer:
    """Scores the codes of one run after the other by some queries, ``(m, dim)``."""

    def __init__(self, coder: Coder, queries: FloatArray) -> None:
        self._coder = coder
        self._queries = queries = rotated(queries)
        n_parts = 8 // coder.bits
        padded = np.zeros((len(queries), n_parts * coder.width), dtype=np.float32)
        padded[:, : coder.dim] = queries
        # A byte shifted by i codes still holds all above: what these add is taken off again.
        weights = padded.copy()
        for place in range(1, n_parts):
            here = slice(place * coder.width, (place + 1) * coder.width)
            below = slice((place - 1) * coder.width, place * coder.width)
            weights[:, here] -= 2**coder.bits * padded[:, below]
        self._weights = weights
        self._sums = queries.sum(axis=1) * (2**coder.bits - 1) / 2
        self._decoded = np.empty((_ROWS, padded.shape[1]), dtype=np.float32)
        self._shifted = np.empty((_ROWS, coder.width), dtype=np.uint8)

    def score(self, run: bytes, keys: int, asked: list[int]) -> FloatArray:
        """Return about the inner products of the queries ``asked`` with keys, ``(m, keys)``."""
        coder = self._coder
        mean = np.frombuffer(run, "<f4", coder.dim)
        codes = np.frombuffer(run, np.uint8, keys * coder.width, coder.head)
        codes = codes.reshape(keys, coder.width)
        behind = coder.head + keys * coder.width
        weights = self._weights[asked]
        scores = np.empty((len(asked), keys), dtype=np.float32)
        for low in range(0, keys, _ROWS):
            part = codes[low : low + _ROWS]
            decoded = self._decoded[: len(part)]
            decoded[:, : coder.width] = part
            for place in range(1, 8 // coder.bits):
                shifted = np.right_shift(
                    part, np.uint8(place * coder.bits), out=self._shifted[: len(part)]
                )
                decoded[:, place * coder.width : (place + 1) * coder.width] = shifted
            scores[:, low : low + len(part)] = weights @ decoded.T
        scores -= self._sums[asked][:, None]
        scores *= np.frombuffer(run, "<f4", keys, behind)
        scores += (self._queries[asked] @ mean)[:, None]
        if coder.metric is Metric.L2:
            scores += np.frombuffer(run, "<f4", keys, behind + 4 * keys)
        return scores
