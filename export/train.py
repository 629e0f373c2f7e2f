"""From a snapshot and queries to a bundle that can be published (``run_folder`` says where)."""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from amips_plugins.errors import InvalidInput, MetricNotSupported, require

for _module in ("torch", "faiss", "safetensors", "onnx"):
    require(_module, "train")

import msgspec
import numpy as np
import torch

from amips_plugins.bundle.manifest import Manifest, ModelKind
from amips_plugins.bundle.package import Bundle
from amips_plugins.export.bundle_writer import write_bundle
from amips_plugins.export.candidates import Candidate
from amips_plugins.export.clustering import (
    QueryAware,
    centre_of,
    check_enough_keys,
    native_cells,
    query_aware_cells,
)
from amips_plugins.export.dataset import TrainingTask, choose_device, pose
from amips_plugins.export.disk import check_room, says_when_full
from amips_plugins.export.executors import Executor, opened
from amips_plugins.export.given import Given, refit_given, train_given
from amips_plugins.export.keynet import train_keynet
from amips_plugins.export.keys import LiftedKeys, Shard, blocks
from amips_plugins.export.queries import QuerySplits, guess_queries, split_queries
from amips_plugins.export.recipes import PRESETS, Preset, TrainOptions
from amips_plugins.export.routers import native_candidate, train_router
from amips_plugins.export.run_folder import RunFolder
from amips_plugins.export.snapshot import Snapshot
from amips_plugins.export.spilling import share_of_copies, spilled, worthwhile_spill
from amips_plugins.export.strangers import strangers
from amips_plugins.models.cells import Cells
from amips_plugins.models.hooks import RewriteHook
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import FloatArray, IntArray, Metric, as_queries

__all__ = ["Run", "TrainOptions", "train"]


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes
    ----------
    path
        The run's folder.
    manifest
        What its bundle says of itself.
    """

    path: Path
    manifest: Manifest

    @property
    def bundle(self) -> Path:
        """Folder of the bundle."""
        return self.path / "bundle"


def train(
    snapshot: Snapshot,
    queries: FloatArray | None,
    out: str | Path,
    options: TrainOptions | None = None,
    progress: Progress = no_progress,
    *,
    engine: str = "local",
    memory: float = 2.0,
) -> Run:
    """Train every candidate, compare them on held-out queries, and write a bundle.

    An interrupted training is resumed by the same call; a finished one is returned as it is.

    Parameters
    ----------
    snapshot
        The keys.
    queries
        ``(n, dim)`` queries of the collection's users; None to guess some from the keys.
    out
        The run's folder.
    options
        What to train.
    progress
        Watches the work.
    engine
        Who does what is done key by key: ``local``, the threads of this process; ``ray``, a Ray
        cluster of this machine alone; ``ray:ADDRESS``, a cluster that is there. It changes how
        long a training takes, and no bit of the result.
    memory
        GiB that the workers of this machine may take together, beside the nets: it decides how
        many there are.

    Raises
    ------
    InvalidInput
        The options or the queries cannot be used, or the folder holds another run.
    MetricNotSupported
        The model cannot serve the collection's metric.
    TrainingError
        Too few keys or queries.
    """
    options = options or TrainOptions()
    _check(snapshot, options)
    if memory <= 0.0:
        raise InvalidInput(f"memory={memory} GiB is no bound; pass 1 or more.")
    if queries is not None:
        queries, _ = as_queries(queries, snapshot.manifest.dim)
    given = _given(snapshot, options)
    folder = RunFolder(Path(out), _asked(snapshot, queries, options))
    folder.check()
    if not folder.finished:
        with opened(engine, memory, snapshot.manifest.dim) as executor:
            _fill(folder, snapshot, queries, options, given, progress, executor)
    return Run(folder.path, Bundle.in_folder(folder.path / "bundle").manifest)


def _fill(
    folder: RunFolder,
    snapshot: Snapshot,
    queries: FloatArray | None,
    options: TrainOptions,
    given: Given | None,
    progress: Progress,
    executor: Executor,
) -> None:
    splits = _splits(snapshot, queries, options, executor)
    check_room(folder.path, _room(snapshot, splits))
    # Only now is there nothing left to complain of: the folder belongs to this question.
    with folder.claimed(), says_when_full(folder.path):
        task = _pose(snapshot, splits, options, folder, progress, executor)
        copies = snapshot.manifest.collection.database != "milvus" and options.index == "flat"
        if options.spill == "auto" and not copies:
            options = msgspec.structs.replace(options, spill=0.0)
        if given is None:
            work = _train_keynet if options.model == "keynet" else _train_routers
            candidates = work(task, options)
            refit = partial(_refit, options, share_of_copies(candidates[-1].assignment))
        else:
            if snapshot.manifest.collection.database == "several":
                _warn_of_strangers(task, given)
            presets = _recipes(options)
            candidates = train_given(task, given, options, presets)
            refit = partial(refit_given, given, options, presets, candidates)
        cells = None if given is None else given.cells
        write_bundle(folder.path, snapshot, splits, task, options, candidates, refit, cells)


def _check(snapshot: Snapshot, options: TrainOptions) -> None:
    try:
        msgspec.convert(msgspec.to_builtins(options), TrainOptions)
    except msgspec.ValidationError as exc:
        raise InvalidInput(f"The training options cannot be used: {exc}.") from exc
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("torch sees no CUDA device; train on 'cpu', or leave it to 'auto'.")
    if options.partitions is None and snapshot.manifest.partitions is None:
        check_enough_keys(snapshot.manifest.count, options.n_cells)
    if options.preset not in PRESETS:
        raise InvalidInput(
            f"There is no preset {options.preset!r}; there are: {', '.join(PRESETS)}."
        )
    if not 1 <= options.k <= snapshot.manifest.count:
        raise InvalidInput(
            f"k={options.k} does not fit the {snapshot.manifest.count} keys of the snapshot."
        )
    if options.index != "flat" and options.model in ("keynet", "native"):
        raise InvalidInput(
            f"A model of the kind {options.model!r} does not say how far to search an index inside "
            f"cells; leave --index out."
        )
    if options.max_cell is not None and (
        options.model in ("keynet", "native") or options.layout == "native" or options.partitions
    ):
        raise InvalidInput(
            "Only query-aware cells can have a largest size; leave --max-cell out, or --layout, "
            "--partitions and --model."
        )
    if options.spill not in ("auto", 0.0) and options.model in ("keynet", "native"):
        raise InvalidInput(
            f"A model of the kind {options.model!r} gives keys one cell; leave --spill out."
        )
    if not 0.0 < options.recall < 1.0:
        raise InvalidInput(f"recall={options.recall} is no target; pass a number between 0 and 1.")
    if options.model == "keynet" and snapshot.manifest.metric is not Metric.COSINE:
        whole = Shard(0, snapshot.manifest.count)
        lengths = [np.linalg.norm(block, axis=1) for _, block in blocks(snapshot.keys(), whole)]
        if max(map(np.max, lengths)) > 1.01 * min(map(np.min, lengths)):
            raise MetricNotSupported(
                f"A KeyNet cannot serve the metric {snapshot.manifest.metric} over keys of "
                f"different lengths: it predicts a direction, and the lengths would decide. "
                f"Train --model linear or supportnet."
            )


def _given(snapshot: Snapshot, options: TrainOptions) -> Given | None:
    """Return the partitions to choose among, or None to cut cells."""
    if options.partitions is None and snapshot.manifest.partitions is None:
        return None
    if options.model == "keynet":
        raise InvalidInput(
            "A KeyNet rewrites queries and chooses no partitions; train --model linear or "
            "supportnet."
        )
    return Given.of(snapshot, options.partitions)


def _warn_of_strangers(task: TrainingTask, given: Given) -> None:
    found = strangers(task.keys, given.assignment, given.cells.n_cells, task.seed)
    if found:
        named = ", ".join(repr(one) for one in given.cells.partitions.chosen(found))
        warnings.warn(
            f"The keys of {named} lie in other directions than those of the other collections. If "
            f"they come from another model of embedding, their scores do not compare: leave them "
            f"out.",
            stacklevel=3,
        )


def _asked(snapshot: Snapshot, queries: FloatArray | None, options: TrainOptions) -> dict[str, Any]:
    """Return what identifies this question, so that nothing is resumed with other data."""
    digest = hashlib.sha256(b"guess" if queries is None else queries.tobytes()).hexdigest()
    return {
        "collection": msgspec.to_builtins(snapshot.manifest.collection),
        "metric": str(snapshot.manifest.metric),
        "snapshot": snapshot.manifest.fingerprint,
        "queries": digest,
        "options": msgspec.to_builtins(options),
    }


def _splits(
    snapshot: Snapshot, queries: FloatArray | None, options: TrainOptions, executor: Executor
) -> QuerySplits:
    if queries is not None:
        return split_queries(queries, options.seed)
    keys, metric = snapshot.keys(), snapshot.manifest.metric
    centre = centre_of(keys, metric, executor)
    guessed = guess_queries(keys, options.guesses, options.seed, centre=centre)
    return split_queries(guessed, options.seed, "guess")


def _room(snapshot: Snapshot, splits: QuerySplits) -> int:
    """Estimate the bytes of a run's files."""
    about = snapshot.manifest
    answers = 12 * 30 * sum(len(getattr(splits, name)) for name in ("train", "calibrate", "test"))
    return about.count * 16 + about.ids_bytes + 2 * answers


def _pose(
    snapshot: Snapshot,
    splits: QuerySplits,
    options: TrainOptions,
    folder: RunFolder,
    progress: Progress,
    executor: Executor,
) -> TrainingTask:
    keys, metric = snapshot.keys(), snapshot.manifest.metric
    # A KeyNet predicts a direction from the origin.
    centre = None if options.model == "keynet" else centre_of(keys, metric, executor)
    lifted, device = LiftedKeys(keys, metric, centre), choose_device(options.device)
    return pose(
        keys,
        lifted,
        metric,
        splits,
        k=options.k,
        recall=options.recall,
        seed=options.seed,
        device=device,
        work=folder.work,
        progress=progress,
        centre=centre,
        executor=executor,
        look_up=folder.look_up(lifted, device, progress, executor),
    )


def _train_routers(task: TrainingTask, options: TrainOptions) -> list[Candidate]:
    """Train the routers asked for; the baseline and the linear router are always among them."""
    n_cells = options.n_cells
    if len(task.train.queries) < n_cells:
        n_cells = len(task.train.queries)
        warnings.warn(
            f"{n_cells} training queries cannot tell {options.n_cells} cells apart: cutting "
            f"{n_cells} cells. Collect more queries, or ask for fewer cells.",
            stacklevel=3,
        )
    native, native_assignment = _native(task, n_cells, task.seed)
    baseline = native_candidate(task, native, native_assignment)
    cells, assignment = native, native_assignment
    if options.layout == "query-aware":
        cells, assignment = _query_aware(task, n_cells, options.max_cell)
    if cells.n_cells < n_cells:
        warnings.warn(
            f"{n_cells - cells.n_cells} of {n_cells} cells came out empty and are left out; the "
            f"keys hold fewer clusters than that.",
            stacklevel=3,
        )
    presets = _recipes(options)
    graphs = options.index == "hnsw"
    linear = partial(train_router, "linear", presets["linear"], task, graphs=graphs)
    if options.spill == "auto":
        trained = [linear(cells, assignment)]
        if options.model != "native":
            trained = [worthwhile_spill(task, trained[0], linear, options.max_cell)]
    else:
        shared = spilled(task, cells, assignment, options.spill, options.max_cell)
        trained = [linear(*shared)]
    cells, assignment = trained[0].cells, trained[0].assignment
    if options.model in ("auto", "supportnet"):
        recipe = presets["supportnet"]
        net = train_router("supportnet", recipe, task, cells, assignment, graphs=graphs)
        trained.append(net)
    return [baseline, *trained]


def _refit(options: TrainOptions, copies: float, kind: ModelKind, task: TrainingTask) -> Candidate:
    """Cut and train one kind of router anew, on a part of the training queries."""
    n_cells = min(options.n_cells, len(task.train.queries))
    if options.layout == "native":
        cut = _native(task, n_cells, task.seed)
    else:
        cut = _query_aware(task, n_cells, options.max_cell)
    routing: Literal["linear", "supportnet"] = "linear" if kind == "linear" else "supportnet"
    shared = spilled(task, *cut, copies, options.max_cell)
    return train_router(routing, _recipes(options)[kind], task, *shared)


def _native(task: TrainingTask, n_cells: int, seed: int) -> tuple[Cells, IntArray]:
    with task.progress("cut cells", 1, 0, "partitions") as step:
        cut = native_cells(task.keys, task.metric, n_cells, seed, executor=task.executor)
        step.advance()
    return cut


def _query_aware(
    task: TrainingTask, n_cells: int, max_cell: float | None
) -> tuple[Cells, IntArray]:
    keys, metric, train, do = task.keys, task.metric, task.train, task.executor
    with task.progress("cut cells as queries see them", 1, 0, "partitions") as step:
        cut = query_aware_cells(
            keys,
            metric,
            n_cells,
            task.seed,
            train.queries,
            train.hits,
            QueryAware(max_cell=max_cell),
            do,
        )
        step.advance()
    return cut


def _train_keynet(task: TrainingTask, options: TrainOptions) -> list[Candidate]:
    """Train a KeyNet; beside the baseline, a linear router says what a layout would save."""
    # A seed of its own: the KeyNet must not have seen the cells it is measured on.
    cells, assignment = _native(task, options.n_cells, task.seed + 104_729)
    baseline = native_candidate(task, cells, assignment)
    presets = _recipes(options)
    rescore = RewriteHook.candidates(options.k)
    trained = train_keynet(presets["keynet"], task, cells, assignment, rescore)
    n_cells = min(options.n_cells, len(task.train.queries))
    linear = train_router("linear", presets["linear"], task, *_query_aware(task, n_cells, None))
    return [baseline, linear, trained]


def _recipes(options: TrainOptions) -> dict[str, Preset]:
    presets = PRESETS[options.preset]
    if options.epochs is None:
        return dict(presets)
    return {
        kind: replace(preset, schedule=replace(preset.schedule, epochs=options.epochs))
        for kind, preset in presets.items()
    }
