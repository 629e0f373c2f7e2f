"""Putting a bundle together: it appears whole, or not at all."""

from __future__ import annotations

import platform
import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from amips_plugins.bundle.contents import (
    CALIBRATION,
    CELLS,
    FURTHER_CELLS,
    GOLDEN_OUTPUTS,
    IDS,
    KEY_SAMPLE,
    KNOWN_CELLS,
    MODEL,
    PARTITIONS,
    REFERENCE,
    BundleContents,
)
from amips_plugins.bundle.golden_outputs import GoldenOutputs
from amips_plugins.bundle.key_sample import SAMPLED, KeySample
from amips_plugins.bundle.manifest import Manifest
from amips_plugins.bundle.reference import Reference
from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cost_curves import figures
from amips_plugins.export.curves import record_curves
from amips_plugins.export.dataset import Split, TrainingTask
from amips_plugins.export.efforts import VISITS
from amips_plugins.export.keys import Keys, Shard, blocks, shards
from amips_plugins.export.promises import Refit, promise
from amips_plugins.export.queries import QuerySplits
from amips_plugins.export.recipes import TrainOptions
from amips_plugins.export.selection import recommend, select_model
from amips_plugins.export.snapshot import Snapshot
from amips_plugins.export.spilling import first_cells
from amips_plugins.export.to_onnx import to_onnx
from amips_plugins.files import replace_file
from amips_plugins.models.cells import further_cells
from amips_plugins.models.given import GivenCells
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.report.training_record import CURVES
from amips_plugins.sketch import sketch
from amips_plugins.vectors import FloatArray, Metric

__all__ = ["served_model", "write_bundle"]

# Root mean square error of a priority, which is the log of a share: within a twentieth of it.
# At .02 no figure of npm2pypi moved (docs/method.md).
_ROUNDING = 0.05


def write_bundle(
    folder: Path,
    snapshot: Snapshot,
    splits: QuerySplits,
    problem: TrainingTask,
    options: TrainOptions,
    candidates: list[Candidate],
    refit: Refit,
    given: GivenCells | None = None,
) -> Manifest:
    """Write the files to a folder nobody looks at, then give it its name."""
    published = select_model(candidates, problem, options)
    dim, model = snapshot.manifest.dim, served_model(published, problem)
    session = OnnxModel(model)
    output = "rewritten" if published.kind == "keynet" else "priority"
    (outputs,) = session.run([output], {"queries": problem.calibrate.queries})
    values: dict[str, Any] = {
        MODEL: model,
        GOLDEN_OUTPUTS: GoldenOutputs.record(session, output, dim),
        REFERENCE: Reference.of(outputs),
        KEY_SAMPLE: _some_keys(snapshot, options.seed),
    }
    native = next(c for c in candidates if c.kind == "native")
    promised = priorities = None
    if published.priority is not None:
        priorities = _priorities(session, problem.test)
        measure = partial(_priorities, session)
        index = None if given is not None or options.index == "flat" else options.index
        database = snapshot.manifest.collection.database
        promised = promise(
            published,
            native,
            problem,
            measure,
            refit,
            index=index,
            two_efforts=database == "qdrant-edge",  # no other asks the cells one by one
            visit=VISITS.get(database, 0.0) if index == "hnsw" else 0.0,
        )
        values[CALIBRATION] = promised.calibration
    if given is not None:
        values[PARTITIONS] = given
    elif published.priority is not None:
        rule = snapshot.keys(), problem.metric
        sketches = np.concatenate(
            list(problem.executor.map(_sketches, rule, shards(snapshot.manifest.count)))
        )
        own_cells = first_cells(published.assignment)
        values |= {
            CELLS: published.cells,
            KNOWN_CELLS: np.stack([own_cells.astype(np.int32), sketches], axis=1),
            IDS: snapshot.ids_bytes(),
        }
        if published.assignment.ndim == 2:
            values[FURTHER_CELLS] = further_cells(published.assignment)
    ks = tuple(sorted({1, options.k}))
    measured_figures = [
        figure
        for candidate in candidates
        for figure in figures(candidate.kind, candidate.measure(problem.test), ks, options.seed)
    ]
    choice, reason, served_cost = recommend(
        published, native, problem, promised, given=given is not None
    )
    building = folder / "bundle.tmp"
    shutil.rmtree(building, ignore_errors=True)
    manifest = BundleContents(values).write(
        building,
        collection=snapshot.manifest.collection,
        metric=snapshot.manifest.metric,
        dim=dim,
        snapshot=snapshot.manifest.fingerprint,
        count=snapshot.manifest.count,
        model=published.kind,
        preset=options.preset,
        parameters=published.parameters,
        queries=splits.source,
        targets="exact",
        default_k=options.k,
        default_recall=options.recall,
        choice=choice,
        reason=reason,
        served_cost=served_cost,
        copies=len(values.get(FURTHER_CELLS, ())),
        figures=measured_figures,
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("amips-plugins", "numpy", "onnx", "torch")},
        },
    )
    kept = record_curves(
        manifest.version,
        problem,
        candidates,
        published,
        None if promised is None else promised.calibration,
        priorities,
        options.recall,
    )
    replace_file(folder / CURVES, msgspec.json.encode(kept))
    building.rename(folder / "bundle")
    return manifest


def _sketches(rule: tuple[Keys, Metric], shard: Shard) -> npt.NDArray[np.int32]:
    keys, metric = rule
    return np.concatenate([sketch(block, metric) for _, block in blocks(keys, shard)])


def _some_keys(snapshot: Snapshot, seed: int) -> KeySample:
    count = snapshot.manifest.count
    drawn = np.sort(np.random.default_rng(seed).permutation(count)[:SAMPLED])
    wanted = set(drawn.tolist())
    ids = [key for row, key in enumerate(snapshot.ids()) if row in wanted]
    return KeySample.of(ids, snapshot.keys()[drawn], snapshot.manifest.metric)


def served_model(published: Candidate, problem: TrainingTask) -> bytes:
    """Write the model, in 8 bits where that leaves a router's priorities what they are."""
    net, dim, order = published.net, problem.keys.shape[1], published.order
    exact = to_onnx(net, dim, problem.metric, order, centre=problem.centre)
    # A priority without a scale is no logarithm, so that its error says nothing by itself. And
    # beside the long queries that L2 may see, the 1 that lifts them is less than a step.
    if order is None or order.scale is None or problem.metric is Metric.L2:
        return exact
    rounded = to_onnx(net, dim, problem.metric, order, int8=True)
    error = _priorities(OnnxModel(rounded), problem.validate)
    error -= _priorities(OnnxModel(exact), problem.validate)
    return rounded if np.sqrt(np.mean(error**2)) <= _ROUNDING else exact


def _priorities(model: OnnxModel, split: Split) -> FloatArray:
    (priority,) = model.run(["priority"], {"queries": split.queries})
    return priority
