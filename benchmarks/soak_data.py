"""What the soak searches: keys in clusters, and bundles for them that are trained in no time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from amips_plugins.bundle.contents import (
    CALIBRATION,
    CELLS,
    GOLDEN_OUTPUTS,
    IDS,
    KEY_SAMPLE,
    KNOWN_CELLS,
    MODEL,
    REFERENCE,
    BundleContents,
    write_ids,
)
from amips_plugins.bundle.golden_outputs import GoldenOutputs
from amips_plugins.bundle.key_sample import SAMPLED, KeySample
from amips_plugins.bundle.reference import Reference
from amips_plugins.collection import CollectionKey
from amips_plugins.export.cost_curves import calibrate, curve, levels_by_threshold, thresholds_for
from amips_plugins.export.nets import LinearRouter
from amips_plugins.export.to_onnx import Order, to_onnx
from amips_plugins.models.cells import Cells
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.sketch import sketch
from amips_plugins.vectors import FloatArray, Metric, normalise

__all__ = ["METRIC", "Corpus", "K", "make_corpus", "write_bundle"]

K = 10
METRIC = Metric.IP  # of unit vectors
_SPREAD = 0.15  # of a key around its cell, in each coordinate


@dataclass(frozen=True)
class Corpus:
    """Keys and where they come from.

    Attributes
    ----------
    keys
        ``(n + spare, dim)`` unit vectors; an id is a row. The last ``spare`` come and go, but an
        id has one vector for ever, so that every score can be checked.
    count
        ``n``, the keys that stay.
    centres
        ``(n_cells, dim)`` unit vectors.
    """

    keys: FloatArray
    count: int
    centres: FloatArray

    def queries(self, rng: np.random.Generator, count: int) -> FloatArray:
        """Draw queries as the keys were drawn."""
        return _around(self.centres, rng, count)


def _around(centres: FloatArray, rng: np.random.Generator, count: int) -> FloatArray:
    chosen = centres[rng.integers(len(centres), size=count)]
    noise = rng.standard_normal(chosen.shape, dtype=np.float32)
    return normalise(chosen + np.float32(_SPREAD) * noise)


def make_corpus(count: int, spare: int, dim: int, n_cells: int) -> Corpus:
    """Draw keys around as many centres as there will be cells."""
    rng = np.random.default_rng(0)
    centres = normalise(rng.standard_normal((n_cells, dim), dtype=np.float32))
    return Corpus(_around(centres, rng, count + spare), count, centres)


def write_bundle(
    folder: Path, corpus: Corpus, collection: CollectionKey, version: str, scale: float
) -> Path:
    """Write a bundle of the corpus's cells; another scale is another model with the same cells."""
    keys = corpus.keys[: corpus.count]
    n_cells, dim = corpus.centres.shape
    drawn = (keys @ corpus.centres.T).argmax(axis=1).astype(np.int64)
    sizes = np.bincount(drawn, minlength=n_cells).astype(np.int64)
    cells = Cells(corpus.centres, np.zeros(n_cells, dtype=np.float32), sizes)
    net = LinearRouter(dim, n_cells)
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(corpus.centres))
    order = Order(scale, np.zeros(n_cells, dtype=np.float32))

    rng = np.random.default_rng(1)
    asked = corpus.queries(rng, 1000)
    hits = drawn[np.argsort(-(asked @ keys.T), axis=1)[:, :K]]
    priority = order.priority(asked @ corpus.centres.T)
    thresholds = thresholds_for(priority[:500], hits[:500])
    levels = levels_by_threshold(priority[500:], thresholds)
    measured = curve(levels, len(thresholds), hits[500:], cells.sizes, n_cells)

    model = to_onnx(net, dim, METRIC, order)
    session = OnnxModel(model)
    (outputs,) = session.run(["priority"], {"queries": asked})
    contents = BundleContents(
        {
            MODEL: model,
            GOLDEN_OUTPUTS: GoldenOutputs.record(session, "priority", dim),
            REFERENCE: Reference.of(outputs),
            CELLS: cells,
            CALIBRATION: calibrate(measured, thresholds, K),
            KNOWN_CELLS: np.stack([drawn.astype(np.int32), sketch(keys, METRIC)], axis=1),
            KEY_SAMPLE: KeySample.of(range(SAMPLED), keys[:SAMPLED], METRIC),
            IDS: write_ids(range(corpus.count)),
        }
    )
    contents.write(
        folder,
        version=version,
        collection=collection,
        metric=METRIC,
        dim=dim,
        snapshot="0" * 64,
        count=corpus.count,
        model="linear",
        preset="soak",
        parameters=dim * n_cells,
        queries="guess",
        default_k=K,
        default_recall=0.9,
        choice="linear",
        reason="made for the soak",
        figures=[],
        tools={},
    )
    return folder
