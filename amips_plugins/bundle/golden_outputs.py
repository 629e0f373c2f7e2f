"""Canned queries: what a model gave when it was published, it has to give where it is loaded.

A sound file may still run wrongly: another version of the runtime, another processor, another
model under the same name. The queries are random directions, nobody's own.
"""

from __future__ import annotations

import io

import numpy as np

from amips_plugins.arrays import read_npz
from amips_plugins.errors import BundleCorrupt
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import FloatArray

__all__ = ["check_canned", "record_canned"]

_COUNT = 8
_TOLERANCE = 1e-3  # of the largest output: two processors differ by a hundredth of it


def record_canned(model: OnnxModel, output: str, dim: int) -> bytes:
    """Run a model on canned queries, and return both as an npz archive.

    Parameters
    ----------
    model
        What is to be published.
    output
        The output that searches use.
    dim
        Dimension of the queries.
    """
    queries = np.random.default_rng(0).standard_normal((_COUNT, dim), dtype=np.float32)
    (outputs,) = model.run([output], {"queries": queries})
    buffer = io.BytesIO()
    np.savez(buffer, queries=queries, outputs=outputs)
    return buffer.getvalue()


def check_canned(data: bytes, model: OnnxModel, output: str, location: str) -> None:
    """Refuse a model that does not give what was recorded.

    Parameters
    ----------
    data
        What ``record_canned`` returned.
    model, output
        What is to be checked.
    location
        Where the bundle is, for messages.

    Raises
    ------
    BundleCorrupt
        The outputs differ, or the archive cannot be read.
    """
    try:
        archive = read_npz(data, ("queries", "outputs"))
        queries: FloatArray = np.asarray(archive["queries"], dtype=np.float32)
        expected: FloatArray = np.asarray(archive["outputs"], dtype=np.float32)
        (given,) = model.run([output], {"queries": queries})
    except Exception as exc:  # a damaged archive raises whatever zipfile, numpy and the model raise
        raise BundleCorrupt(
            f"The canned queries of {location} cannot be run ({exc}); publish it again."
        ) from exc
    if given.shape != expected.shape or not np.isfinite(expected).all():
        raise BundleCorrupt(f"The canned queries of {location} do not fit its model.")
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite differs
        furthest = float(np.abs(given - expected).max(initial=0.0))
    if not furthest <= _TOLERANCE * max(1.0, float(np.abs(expected).max(initial=0.0))):
        raise BundleCorrupt(
            f"The model of {location} gives other results here than where it was published (by "
            f"{furthest:.2g}); compare the versions of onnxruntime."
        )
