"""From a snapshot and queries to a bundle that can be published.

::

    run/
        options.json   what was asked for; another question needs another folder
        work/          targets, cells and checkpoints, so that an interrupted run resumes
        bundle/        the result; it appears whole, when everything else is done
"""

# ruff: noqa: E402 - what is missing has to be said before the imports that need it

from __future__ import annotations

import hashlib
import io
import platform
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from amips_plugins.errors import InvalidInput, MetricNotSupported, require

for _module in ("torch", "faiss", "safetensors", "onnx"):
    require(_module, "train")

import msgspec
import numpy as np
import torch

from amips_plugins.bundle import (
    CALIBRATION,
    CELLS,
    FORMAT,
    IDS,
    KNOWN_CELLS,
    MANIFEST,
    MODEL,
    Bundle,
    Figure,
    Manifest,
    describe_file,
)
from amips_plugins.calibration import Calibration
from amips_plugins.cells import Cells
from amips_plugins.export.clustering import check_enough_keys, native_cells, query_aware_cells
from amips_plugins.export.measure import (
    TARGETS,
    calibrate,
    curve,
    figures,
    levels_by_threshold,
    thresholds_for,
)
from amips_plugins.export.presets import PRESETS, Preset
from amips_plugins.export.problem import Candidate, Problem, Split
from amips_plugins.export.queries import QuerySplits, guess_queries, split_queries
from amips_plugins.export.rewriter import train_keynet
from amips_plugins.export.routers import native_candidate, train_router
from amips_plugins.export.snapshot import Snapshot
from amips_plugins.export.targets import top_keys
from amips_plugins.export.to_onnx import to_onnx
from amips_plugins.files import replace_file
from amips_plugins.hooks import RewriteHook
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

Layout = Literal["query-aware", "native"]
_ASKED = "options.json"
_DEPTH = 30
_BLOCK = 16_384


class TrainOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to train.

    Attributes
    ----------
    model
        The net to publish; ``auto`` takes the cheapest learned router, ``native`` publishes the
        centroids of plain k-means cells, the baseline.
    n_cells
        Number of cells; for a KeyNet the number of lists of the index it is measured on.
    layout
        How routers cut the keys: as queries see them, or plain k-means.
    preset
        The recipe, see ``presets.PRESETS``.
    k, recall
        The target to be cheap at, and the default of the published router.
    seed
        Decides every random choice.
    epochs
        Passes over the training queries; None for the recipe's own.
    guesses
        Queries to make up where no log is given.
    device
        ``cpu``, ``cuda``, or ``auto``.
    """

    model: Literal["auto", "linear", "supportnet", "keynet", "native"] = "auto"
    n_cells: int = 64
    layout: Layout = "query-aware"
    preset: str = "default"
    k: int = 10
    recall: float = 0.95
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**30)] = 0
    epochs: Annotated[int, msgspec.Meta(ge=1)] | None = None
    guesses: Annotated[int, msgspec.Meta(ge=0)] = 20_000
    device: Literal["auto", "cpu", "cuda"] = "auto"


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
    manifest = _write_bundle(folder, snapshot, splits, problem, options, work(problem, options))
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


def _write_bundle(
    folder: Path,
    snapshot: Snapshot,
    splits: QuerySplits,
    problem: Problem,
    options: TrainOptions,
    candidates: list[Candidate],
) -> Manifest:
    """Write the files to a folder nobody looks at, then give it its name."""
    published = _published(candidates, problem, options)
    files = {MODEL: to_onnx(published.net, snapshot.manifest.dim, problem.metric, published.order)}
    if published.priority is not None:
        files[CALIBRATION] = _calibrate(published, published.priority, problem).to_bytes()
        files[CELLS] = published.cells.to_bytes()
        files[KNOWN_CELLS] = _npy(published.assignment.astype(np.int32))
        files[IDS] = snapshot.ids_bytes()
    ks = tuple(sorted({1, options.k}))
    measured_figures = [
        figure
        for candidate in candidates
        for figure in figures(candidate.kind, candidate.measure(problem.test), ks, options.seed)
    ]
    choice, reason = choose(candidates, problem, measured_figures)
    created = datetime.now(timezone.utc)
    content = hashlib.sha256(b"".join(files[name] for name in sorted(files))).hexdigest()
    manifest = Manifest(
        format=FORMAT,
        version=f"{created:%Y%m%dT%H%M%S}-{content[:8]}",
        created=created.isoformat(timespec="seconds"),
        collection=snapshot.manifest.collection,
        metric=snapshot.manifest.metric,
        dim=snapshot.manifest.dim,
        snapshot=snapshot.manifest.fingerprint,
        count=snapshot.manifest.count,
        model=published.kind,
        preset=options.preset,
        parameters=published.parameters,
        n_cells=0 if published.kind == "keynet" else published.cells.n_cells,
        layout="" if published.kind == "keynet" else published.cells.layout(),
        queries=splits.source,
        default_k=options.k,
        default_recall=options.recall,
        choice=choice,
        reason=reason,
        figures=measured_figures,
        tools={
            "python": platform.python_version(),
            **{name: version(name) for name in ("amips-plugins", "numpy", "onnx", "torch")},
        },
        files={name: describe_file(data) for name, data in files.items()},
    )
    building = folder / "bundle.tmp"
    shutil.rmtree(building, ignore_errors=True)
    for name, data in files.items():
        replace_file(building / name, data)
    replace_file(building / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2))
    building.rename(folder / "bundle")
    return manifest


def _calibrate(
    published: Candidate, priority: Callable[[Split], FloatArray], problem: Problem
) -> Calibration:
    """Measure recall by threshold; the validation split chose the thresholds."""
    assignment, sizes = published.assignment, published.cells.sizes
    thresholds = thresholds_for(
        priority(problem.validate), assignment[problem.validate.hits[:, : problem.k]]
    )
    levels = levels_by_threshold(priority(problem.calibrate), thresholds)
    hit_cells = assignment[problem.calibrate.hits]
    model_keys = published.parameters / problem.lifted.shape[1]
    measured = curve(levels, len(thresholds), hit_cells, sizes, model_keys)
    return calibrate(measured, thresholds, hit_cells.shape[1])


def _published(candidates: list[Candidate], problem: Problem, options: TrainOptions) -> Candidate:
    """Return the candidate asked for; the cheapest learned one where that is left open."""
    wanted = [
        candidate
        for candidate in candidates
        if candidate.kind == options.model
        or (options.model == "auto" and candidate.kind != "native")
    ]
    return min(wanted, key=lambda c: c.measure(problem.validate).cost(options.k, options.recall))


def choose(
    candidates: list[Candidate], problem: Problem, measured: list[Figure]
) -> tuple[str, str]:
    """Name the cheapest candidate at the target, and say why.

    The validation split chooses; the test split has to confirm that a learned winner beats the
    native baseline, else the answer is ``native``.
    """
    costs = {
        c.kind: c.measure(problem.validate).cost(problem.k, problem.recall) for c in candidates
    }
    best = min(costs, key=lambda kind: costs[kind])
    at = {
        f.candidate: f
        for f in measured
        if f.k == problem.k and abs(f.recall - _reported(problem.recall)) < 1e-9
    }
    target = f"recall@{problem.k} {_reported(problem.recall):.2f}"
    native, winner = at["native"].total, at[best].total
    if best != "native" and winner is not None and (native is None or winner < native):
        shown = "cannot reach it" if native is None else f"takes {native:.1%}"
        return best, (
            f"On held-out queries {best} reaches {target} at {winner:.1%} of the cost of a full "
            f"scan, its own cost included; native search with as many cells {shown}."
        )
    shown = "no learned router reaches it" if native is None else f"takes {native:.1%}"
    return "native", (
        f"Use the native search: at {target} it {shown}, and no learned candidate is cheaper on "
        f"held-out queries."
    )


def _reported(recall: float) -> float:
    """Return the nearest recall that figures are reported at."""
    return min(TARGETS, key=lambda target: abs(target - recall))


def _npy(array: IntArray | np.typing.NDArray[np.int32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _open(folder: Path) -> Bundle:
    return Bundle.open(str(folder), lambda name: (folder / name).read_bytes())
