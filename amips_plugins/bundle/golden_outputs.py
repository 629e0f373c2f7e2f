"""Golden outputs: what a model gave when it was published, it has to give where it is loaded.

A sound file may still run wrongly: another version of the runtime, another processor, another
model under the same name. The queries are random directions, nobody's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amips_plugins.arrays import read_npz, readable, write_npz
from amips_plugins.errors import BundleCorrupt
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import FloatArray

__all__ = ["GoldenOutputs"]

_COUNT = 8
_TOLERANCE = 1e-3  # of the largest output: two processors differ by a hundredth of it


@dataclass(frozen=True)
class GoldenOutputs:
    """Queries, ``(n, dim)`` float32, and what the model gave for them, ``(n, n_outputs)``."""

    queries: FloatArray
    outputs: FloatArray

    @classmethod
    def record(cls, model: OnnxModel, output: str, dim: int) -> GoldenOutputs:
        """Run the output that searches use on queries of a dimension."""
        queries = np.random.default_rng(0).standard_normal((_COUNT, dim), dtype=np.float32)
        return cls(queries, model.run([output], {"queries": queries})[0])

    def check(self, model: OnnxModel, output: str, location: str) -> None:
        """Raise ``BundleCorrupt`` for a model that does not give what was recorded."""
        try:
            (given,) = model.run([output], {"queries": self.queries})
        except Exception as exc:  # queries of another width make the runtime raise its own
            raise BundleCorrupt(
                f"The golden outputs of {location} cannot be run ({exc}); publish it again."
            ) from exc
        expected = self.outputs
        if given.shape != expected.shape or not np.isfinite(expected).all():
            raise BundleCorrupt(f"The golden outputs of {location} do not fit its model.")
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite differs
            furthest = float(np.abs(given - expected).max(initial=0.0))
        if not furthest <= _TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0.0))):
            raise BundleCorrupt(
                f"The model of {location} gives other results here than where it was published "
                f"(by {furthest:.2g}); compare the versions of onnxruntime."
            )

    def to_bytes(self) -> bytes:
        """Serialise as an npz archive (plain arrays, no pickle)."""
        return write_npz(queries=self.queries, outputs=self.outputs)

    @classmethod
    def from_bytes(cls, data: bytes) -> GoldenOutputs:
        """Read what ``to_bytes`` wrote, or raise ``BundleCorrupt``."""
        with readable("The bundle's golden outputs"):
            archive = read_npz(data, ("queries", "outputs"))
            queries, outputs = (
                np.asarray(archive[name], dtype=np.float32) for name in ("queries", "outputs")
            )
        return cls(queries, outputs)
