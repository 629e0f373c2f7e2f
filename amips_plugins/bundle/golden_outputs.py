"""Golden outputs: what a model gave when it was published, it has to give where it is loaded.

A sound file may still run wrongly: another version of the runtime, another processor, another
model under the same name. The queries are random directions, nobody's own, and none of those where
the last bit decides: a router in two levels that just prefers one group of cells to another scores
the other's where another processor rounds otherwise.
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
_DRAWN, _NUDGES, _NUDGE = 32, 4, 1e-3  # queries to choose among; how often and far they are moved
_TOLERANCE = 1e-3  # of the largest output: two processors differ by a hundredth of it


@dataclass(frozen=True)
class GoldenOutputs:
    """Queries, ``(n, dim)`` float32, and what the model gave for them, ``(n, n_outputs)``."""

    queries: FloatArray
    outputs: FloatArray

    @classmethod
    def record(cls, model: OnnxModel, output: str, dim: int) -> GoldenOutputs:
        """Run the output that searches use on queries of a dimension.

        Of those that are drawn the steadiest stay: their outputs change least when they move.
        """
        rng = np.random.default_rng(0)
        drawn = rng.standard_normal((_DRAWN, dim), dtype=np.float32)
        (outputs,) = model.run([output], {"queries": drawn})
        change = np.zeros(_DRAWN, dtype=np.float32)
        for _ in range(_NUDGES):
            nudge = np.float32(_NUDGE) * rng.standard_normal(drawn.shape, dtype=np.float32)
            for moved in (drawn + nudge, drawn - nudge):  # over a border from either side
                (others,) = model.run([output], {"queries": moved})
                change = np.maximum(change, np.abs(others - outputs).max(axis=1))
        steady = np.sort(np.argsort(change, kind="stable")[:_COUNT])
        return cls(drawn[steady], outputs[steady])

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
