"""Some keys of a snapshot, by which a bundle tells the collection it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from amips_plugins.arrays import readable
from amips_plugins.collection import Id, KeyBatch
from amips_plugins.errors import BundleCorrupt
from amips_plugins.sketch import same_vectors, sketch
from amips_plugins.vectors import FloatArray, Metric

__all__ = ["SAMPLED", "KeySample"]

SAMPLED = 128
"""Keys that are drawn."""

_Rows = list[tuple[int | str, int]]


@dataclass(frozen=True)
class KeySample:
    """Some keys of a snapshot: their ids, and the sketches of their vectors, ``(n,)`` int32."""

    ids: Sequence[Id]
    sketches: npt.NDArray[np.int32]

    @classmethod
    def of(cls, ids: Sequence[Id], vectors: FloatArray, metric: Metric) -> KeySample:
        """Sketch keys that were drawn at random."""
        return cls(ids, sketch(vectors, metric))

    def count_same(self, found: KeyBatch, metric: Metric) -> int:
        """Count those of the keys found that have about the vector they had."""
        then = dict(zip(self.ids, self.sketches.tolist(), strict=True))
        before = np.array([then.get(key, 0) for key in found.ids], dtype=np.int32)
        return int(same_vectors(before, sketch(found.vectors, metric)).sum())

    def to_bytes(self) -> bytes:
        """Serialise as JSON: pairs of an id and a sketch."""
        return msgspec.json.encode(list(zip(self.ids, self.sketches.tolist(), strict=True)))

    @classmethod
    def from_bytes(cls, data: bytes) -> KeySample:
        """Read what ``to_bytes`` wrote, or raise ``BundleCorrupt``."""
        with readable("The bundle's sample of keys"):
            rows = msgspec.json.decode(data, type=_Rows)
            sketches = np.array([row[1] for row in rows], dtype=np.int32)
        if not rows:
            raise BundleCorrupt("The bundle's sample of keys is empty; publish it again.")
        return cls([row[0] for row in rows], sketches)
