"""What a bundle's model says of held-out queries: what live queries are compared with.

Each output is sorted by itself. The test of ``health.drift`` needs no more than that, and so no
query can be worked out from the file: a row of a linear router's outputs, W x + b, would give x
away, and a row of a KeyNet's nearly so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amips_plugins.arrays import read_npz, readable, write_npz
from amips_plugins.errors import BundleCorrupt
from amips_plugins.vectors import FloatArray

__all__ = ["REFERENCE_LIMIT", "Reference"]

REFERENCE_LIMIT = 16 << 20  # bytes

_ROWS = 512
_HEADERS = 4096  # bytes of the archive that are no numbers


@dataclass(frozen=True)
class Reference:
    """What a model says of held-out queries, ``(n_queries, n_outputs)``, each column sorted."""

    outputs: FloatArray

    @classmethod
    def of(cls, outputs: FloatArray) -> Reference:
        """Keep no more of the outputs, ``(n_queries, n_outputs)``, than a test needs."""
        most = (REFERENCE_LIMIT - _HEADERS) // (4 * outputs.shape[1])
        return cls(np.sort(outputs[: min(_ROWS, most)], axis=0))

    def to_bytes(self) -> bytes:
        """Serialise as an npz archive (plain arrays, no pickle)."""
        return write_npz(outputs=self.outputs)

    @classmethod
    def from_bytes(cls, data: bytes) -> Reference:
        """Read what ``to_bytes`` wrote, or raise ``BundleCorrupt``."""
        with readable("The bundle's reference"):
            outputs = np.asarray(read_npz(data, ("outputs",))["outputs"], dtype=np.float32)
        sound = outputs.ndim == 2 and outputs.size > 0 and bool(np.isfinite(outputs).all())
        if not sound or not bool((outputs[1:] >= outputs[:-1]).all()):
            raise BundleCorrupt("The bundle's reference has impossible values; publish it again.")
        return cls(outputs)
