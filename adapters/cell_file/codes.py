"""Codes of the keys of a run: how far each coordinate is from the run's mean, in even steps.

The steps are those that lose least of a normal distribution (Max, 1960); at 8 bits they reach the
farthest key. Codes live where inner products say how near a key is (``vectors.lift_keys``); the
last coordinate that L2 adds there is kept beside them, less what the codes' error adds to the inner
product of key and mean: what is left is the error of a query's own way from the mean, however far
from zero all of them are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amips_plugins.adapters.cell_file.file_format import Bits
from amips_plugins.vectors import FloatArray, Metric, normalise

__all__ = ["OVERSAMPLING", "Coder", "Scorer"]

OVERSAMPLING: dict[Bits, float] = {8: 1.5, 4: 2.0, 2: 4.0}
"""Candidates for every hit that are scored by their vectors, so that next to none is lost."""

_STEPS = {2: 0.9957, 4: 0.3352}  # of a standard deviation
_ROWS = 1024  # decoded at once, so that they stay in the processor's cache


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
        """Bytes before the keys' own: the mean and the step."""
        return 4 * (self.dim + 1)

    @property
    def beside(self) -> int:
        """Bytes of a key beside its code."""
        return 4 if self.metric is Metric.L2 else 0

    def n_bytes(self, keys: int) -> int:
        """Return how long a run of so many keys is."""
        return self.head + keys * (self.width + self.beside) if keys else 0

    def encode(self, keys: FloatArray) -> bytes:
        """Return the run of keys, ``(n, dim)``."""
        if not len(keys):
            return b""
        placed = normalise(keys) if self.metric is Metric.COSINE else keys
        mean = placed.mean(axis=0, dtype=np.float64).astype("<f4")
        away = placed - mean
        levels = 2**self.bits
        if self.bits == 8:
            step = 2 * float(np.abs(away).max()) / (levels - 1)
        else:
            step = float(away.std(dtype=np.float64)) * _STEPS[self.bits]
        scaled = away / np.float32(step) if step > 1e-30 else np.zeros_like(away)
        codes = np.zeros((len(keys), self.width * (8 // self.bits)), dtype=np.uint8)
        codes[:, : self.dim] = np.clip(np.floor(scaled + levels / 2), 0, levels - 1)
        packed = np.zeros((len(keys), self.width), dtype=np.uint8)
        for place in range(8 // self.bits):
            part = codes[:, place * self.width : (place + 1) * self.width]
            packed |= part << np.uint8(place * self.bits)
        parts = [mean.tobytes(), np.array([step], "<f4").tobytes(), packed.tobytes()]
        if self.beside:
            half = -0.5 * np.einsum("ij,ij->i", keys, keys, dtype=np.float64)
            decoded = (codes[:, : self.dim] - np.float32((levels - 1) / 2)) * np.float32(step)
            half -= (decoded - away) @ mean.astype(np.float64)
            parts.append(half.astype("<f4").tobytes())
        return b"".join(parts)


class Scorer:
    """Scores the codes of one run after the other by some queries, ``(m, dim)``."""

    def __init__(self, coder: Coder, queries: FloatArray) -> None:
        self._coder = coder
        self._queries = queries
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
        head = np.frombuffer(run, "<f4", coder.dim + 1)
        mean, step = head[:-1], head[-1]
        codes = np.frombuffer(run, np.uint8, keys * coder.width, coder.head)
        codes = codes.reshape(keys, coder.width)
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
        scores *= step
        scores += (self._queries[asked] @ mean - step * self._sums[asked])[:, None]
        if coder.beside:
            scores += np.frombuffer(run, "<f4", keys, coder.head + keys * coder.width)
        return scores
