"""From a snapshot and queries to a bundle that can be published.

::

    run/
        options.json   what was asked for; another question needs another folder
        work/          targets, cells and checkpoints, so that an interrupted run resumes
        curves.json    what was measured on the way, for amips report; never published
        bundle/        the result; it appears whole, when everything else is done
"""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amips_plugins.errors import InvalidInput, MetricNotSupported, require

for _module in ("torch", "faiss", "safetensors", "onnx"):
    require(_module, "train")

import msgspec
import numpy as np
import torch

from amips_plugins.bundle.manifest import MANIFEST, Bundle, Manifest
from amips_plugins.export.bundling import write_bundle
from amips_plugins.export.clustering import check_enough_keys, native_cells, query_aware_cells
from amips_plugins.export.dataset import Candidate, Problem, Split
from amips_plugins.export.keynet import train_keynet
from amips_plugins.export.options import TrainOptions
from amips_plugins.export.queries import QuerySplits, guess_queries, split_queries
from amips_plugins.export.recipes import PRESETS, Preset
from amips_plugins.export.routers import native_candidate, train_router
from amips_plugins.export.snapshot import Snapshot
from amips_plugins.export.targets import top_keys
from amips_plugins.files import replace_file
from amips_plugins.models.cells import Cells
from amips_plugins.models.hooks import RewriteHook
from amips_plugins.progress import Progress, no_progress
from amips_plugins.vectors import (
    FloatArray,
    IntArray,
    Metric,
    as_queries,
    lift_keys,
    lift_queries,
    lifted_dim,
    normalise,
)

__all__ = ["Run", "TrainOptions", "train"]

_ASKED = "options.json"
_DEPTH = 30
_BLOCK = 16_384


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
    if queries is not None:
        queries, _ = as_queries(queries, snapshot.manifest.dim)
    folder = Path(out)
    asked = _asked(snapshot, queries, options)
    _check_folder(folder, asked)
    if (folder / "bundle" / MANIFEST).exists():
        return Run(folder, _open(folder / "bundle").manifest)
    splits = _splits(snapshot, queries, options)
    # Only now is there nothing left to complain of: the folder belongs to this question.
    replace_file(folder / _ASKED, msgspec.json.format(msgspec.json.encode(asked), indent=2))
    problem = _problem(snapshot, splits, options, folder / "work", progress)
    work = _train_keynet if options.model == "keynet" else _train_routers
    manifest = write_bundle(folder, snapshot, splits, problem, options, work(problem, options))
    return Run(folder, manifest)


def _check(snapshot: Snapshot, options: TrainOptions) -> None:
    try:
        msgspec.convert(msgspec.to_builtins(options), TrainOptions)
    except msgspec.ValidationError as exc:
        raise InvalidInput(f"The training options cannot be used: {exc}.") from exc
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InvalidInput("torch sees no CUDA device; train on 'cpu', or leave it to 'auto'.")
    check_enough_keys(snapshot.manifest.count, options.n_cells)
    if options.preset not in PRESETS:
        raise InvalidInput(
            f"There is no preset {options.preset!r}; there are: {', '.join(PRESETS)}."
        )
    if not 1 <= options.k <= snapshot.manifest.count:
        raise InvalidInput(
            f"k={options.k} does not fit the {snapshot.manifest.count} keys of the snapshot."
        )
    if not 0.0 < options.recall < 1.0:
        raise InvalidInput(f"recall={options.recall} is no target; pass a number between 0 and 1.")
    if options.model == "keynet" and snapshot.manifest.metric is not Metric.COSINE:
        vectors = snapshot.vectors()
        lengths = np.concatenate(
            [
                np.linalg.norm(vectors[low : low + _BLOCK], axis=1)
                for low in range(0, len(vectors), _BLOCK)
            ]
        )
        if lengths.max() > 1.01 * lengths.min():
            raise MetricNotSupported(
                f"A KeyNet cannot serve the metric {snapshot.manifest.metric} over keys of "
                f"different lengths: it predicts a direction, and the lengths would decide. "
                f"Train --model linear or supportnet."
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


def _check_folder(folder: Path, asked: dict[str, Any]) -> None:
    """Refuse a folder that holds anything but this question."""
    path = folder / _ASKED
    if path.exists():
        if msgspec.json.decode(path.read_bytes()) != asked:
            raise InvalidInput(
                f"{folder} holds a training with other data or options; name another folder."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"{folder} is not empty and holds no training; name another folder.")


def _splits(snapshot: Snapshot, queries: FloatArray | None, options: TrainOptions) -> QuerySplits:
    if queries is not None:
        return split_queries(queries, options.seed)
    guessed = guess_queries(snapshot.vectors(), options.guesses, options.seed)
    return split_queries(guessed, options.seed, "guess")


def _problem(
    snapshot: Snapshot, splits: QuerySplits, options: TrainOptions, work: Path, progress: Progress
) -> Problem:
    metric = snapshot.manifest.metric
    chosen = options.device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(chosen)
    work.mkdir(parents=True, exist_ok=True)
    lifted = _lifted_keys(snapshot, work / "keys.npy", progress)
    depth = min(max(_DEPTH, options.k), len(lifted))

    def split(name: str, rows: FloatArray) -> Split:
        unit = normalise(lift_queries(rows, metric))
        hits = _cached(
            work / f"hits-{name}.npy",
            lambda: top_keys(unit, lifted, depth, device, progress, f"targets ({name})")[0],
        )
        return Split(rows, unit, hits)

    return Problem(
        keys=snapshot.vectors(),
        lifted=lifted,
        metric=metric,
        train=split("train", splits.train),
        validate=split("validate", splits.validate),
        calibrate=split("calibrate", splits.calibrate),
        test=split("test", splits.test),
        k=options.k,
        recall=options.recall,
        seed=options.seed,
        device=device,
        work=work,
        progress=progress,
    )


def _lifted_keys(snapshot: Snapshot, path: Path, progress: Progress) -> FloatArray:
    """Write the lifted keys to a file that can be memory-mapped, unless they are the keys."""
    keys, metric = snapshot.vectors(), snapshot.manifest.metric
    if metric is Metric.IP:
        return keys
    if not path.exists():
        temporary = path.with_name("keys.tmp.npy")
        shape = (len(keys), lifted_dim(keys.shape[1], metric))
        out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        with progress("prepare keys", len(keys), 0, "keys") as step:
            for low in range(0, len(keys), _BLOCK):
                block = np.asarray(keys[low : low + _BLOCK])
                out[low : low + _BLOCK] = lift_keys(block, metric)
                step.advance(len(block))
        out.flush()
        del out
        temporary.replace(path)
    mapped: FloatArray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _cached(path: Path, compute: Callable[[], IntArray]) -> IntArray:
    """Compute an array once in the life of a run."""
    if not path.exists():
        temporary = path.with_name(f"tmp-{path.name}")
        np.save(temporary, compute(), allow_pickle=False)
        temporary.replace(path)
    array: IntArray = np.load(path, allow_pickle=False)
    return array


def _train_routers(problem: Problem, options: TrainOptions) -> list[Candidate]:
    """Train the routers asked for; the baseline and the linear router are always among them."""
    n_cells = options.n_cells
    if len(problem.train.queries) < n_cells:
        n_cells = len(problem.train.queries)
        warnings.warn(
            f"{n_cells} training queries cannot tell {options.n_cells} cells apart: cutting "
            f"{n_cells} cells. Collect more queries, or ask for fewer cells.",
            stacklevel=3,
        )
    native, native_assignment = native_cells(problem.keys, problem.metric, n_cells, problem.seed)
    baseline = native_candidate(problem, native, native_assignment)
    cells, assignment = native, native_assignment
    if options.layout == "query-aware":
        cells, assignment = _query_aware(problem, n_cells)
    if cells.n_cells < n_cells:
        warnings.warn(
            f"{n_cells - cells.n_cells} of {n_cells} cells came out empty and are left out; the "
            f"keys hold fewer clusters than that.",
            stacklevel=3,
        )
    presets = _recipes(options)
    trained = [train_router("linear", presets["linear"], problem, cells, assignment)]
    if options.model in ("auto", "supportnet"):
        trained.append(
            train_router("supportnet", presets["supportnet"], problem, cells, assignment)
        )
    return [baseline, *trained]


def _query_aware(problem: Problem, n_cells: int) -> tuple[Cells, IntArray]:
    train = problem.train
    return query_aware_cells(
        problem.keys, problem.metric, n_cells, problem.seed, train.queries, train.hits
    )


def _train_keynet(problem: Problem, options: TrainOptions) -> list[Candidate]:
    """Train a KeyNet; beside the baseline, a linear router says what a layout would save."""
    # A seed of its own: the KeyNet must not have seen the cells it is measured on.
    cells, assignment = native_cells(
        problem.keys, problem.metric, options.n_cells, problem.seed + 104_729
    )
    baseline = native_candidate(problem, cells, assignment)
    presets = _recipes(options)
    rescore = RewriteHook.candidates(options.k)
    trained = train_keynet(presets["keynet"], problem, cells, assignment, rescore)
    n_cells = min(options.n_cells, len(problem.train.queries))
    linear = train_router("linear", presets["linear"], problem, *_query_aware(problem, n_cells))
    return [baseline, linear, trained]


def _recipes(options: TrainOptions) -> dict[str, Preset]:
    presets = PRESETS[options.preset]
    if options.epochs is None:
        return dict(presets)
    return {
        kind: replace(preset, schedule=replace(preset.schedule, epochs=options.epochs))
        for kind, preset in presets.items()
    }


def _open(folder: Path) -> Bundle:
    return Bundle.in_folder(folder)
