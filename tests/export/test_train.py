from __future__ import annotations

import errno
import io
import json
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from amips_plugins import LearnedRouter
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.loading import load_hook, load_reference
from amips_plugins.bundle.package import Bundle
from amips_plugins.errors import AmipsError, InvalidInput, MetricNotSupported, TrainingError
from amips_plugins.export.candidates import Candidate
from amips_plugins.export.cost_curves import (
    Curve,
    calibrate,
    curve,
    levels_by_threshold,
    thresholds_for,
)
from amips_plugins.export.nets import LinearRouter
from amips_plugins.export.promises import Promise
from amips_plugins.export.queries import split_queries
from amips_plugins.export.selection import recommend
from amips_plugins.export.snapshot import Snapshot, take_snapshot
from amips_plugins.export.train import Run, TrainOptions, train
from amips_plugins.health.drift import compare, outputs_of
from amips_plugins.layout import lay_out
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.cells import Cells
from amips_plugins.models.hooks import NativeHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import FloatArray, IntArray, Metric, lift_keys, lift_queries, normalise
from tests.support.progress_recorder import Recorder
from tests.support.training_data import clustered_keys, gaussian, narrow_queries
from tests.support.training_tasks import make_task

N, DIM, CELLS, EPOCHS = 1500, 16, 24, 12
QUERIES = narrow_queries(2000, DIM)
Model = str
TRAININGS: list[tuple[Model, Metric]] = [
    ("linear", Metric.COSINE),
    ("supportnet", Metric.COSINE),
    ("keynet", Metric.COSINE),
    ("native", Metric.COSINE),
    ("auto", Metric.COSINE),
    ("linear", Metric.IP),
    ("linear", Metric.L2),
    ("keynet", Metric.L2),
]


def options(model: Model = "linear", **changes: Any) -> TrainOptions:
    # Keys in several cells stand in test_spilling.
    values: dict[str, Any] = {"n_cells": CELLS, "epochs": EPOCHS, "recall": 0.9, "k": 5}
    values["spill"] = 0.0
    return TrainOptions(model=model, **{**values, **changes})  # type: ignore[arg-type]


def collection_of(
    metric: Metric = Metric.COSINE, n: int = N, model: Model = "linear"
) -> MemoryCollection:
    """Keys of different lengths, but for a KeyNet, which cannot serve those."""
    keys = clustered_keys(n, DIM)
    return MemoryCollection(normalise(keys) if model == "keynet" else keys, metric=metric)


@pytest.fixture(scope="module")
def snapshot_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Snapshot]:
    taken: dict[tuple[Metric, int, bool], Snapshot] = {}

    def get(metric: Metric = Metric.COSINE, n: int = N, model: Model = "linear") -> Snapshot:
        key = (metric, n, model == "keynet")
        if key not in taken:
            folder = tmp_path_factory.mktemp("snapshot")
            taken[key] = take_snapshot(collection_of(metric, n, model), folder)
        return taken[key]

    return get


@pytest.fixture(scope="module")
def run_of(
    snapshot_of: Callable[..., Snapshot], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Model, Metric], Run]:
    """Trainings, each done once."""
    runs: dict[tuple[Model, Metric], Run] = {}

    def get(model: Model, metric: Metric = Metric.COSINE) -> Run:
        if (model, metric) not in runs:
            folder = tmp_path_factory.mktemp("run")
            snapshot = snapshot_of(metric, model=model)
            runs[model, metric] = train(snapshot, QUERIES, folder, options(model))
        return runs[model, metric]

    return get


def opened(run: Run) -> Bundle:
    return Bundle.in_folder(run.bundle)


@pytest.mark.parametrize(("model", "metric"), TRAININGS)
@pytest.mark.slow
def test_a_bundle_holds_what_it_says(
    model: Model, metric: Metric, run_of: Callable[..., Run], snapshot_of: Callable[..., Snapshot]
) -> None:
    run = run_of(model, metric)
    bundle, snapshot = opened(run), snapshot_of(metric, model=model)
    manifest = bundle.manifest
    assert manifest == run.manifest
    for name in manifest.files:
        bundle.read(name)
    assert {path.name for path in run.bundle.iterdir()} == {"manifest.json", *manifest.files}
    assert manifest.model == model or (model, manifest.model) in {
        ("auto", "linear"),
        ("auto", "supportnet"),
    }
    assert (manifest.metric, manifest.dim, manifest.count) == (metric, DIM, N)
    assert manifest.snapshot == snapshot.manifest.fingerprint
    assert manifest.collection == snapshot.manifest.collection
    assert manifest.queries == "log"
    assert manifest.targets == "exact"
    assert (manifest.default_k, manifest.default_recall) == (5, 0.9)
    assert manifest.parameters > 0
    if model == "keynet":
        assert (manifest.n_cells, manifest.layout) == (0, "")
        return
    cells = Cells.from_bytes(bundle.read("cells.npz"))
    assert manifest.n_cells == cells.n_cells
    assert manifest.layout == cells.layout()
    assert cells.sizes.sum() == N
    assert (cells.view is None) == (model == "native")
    assert bundle.read("ids.jsonl") == snapshot.ids_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(("model", "metric"), TRAININGS)
def test_the_reference_is_of_queries_that_no_training_has_seen(
    model: Model, metric: Metric, run_of: Callable[..., Run]
) -> None:
    bundle = opened(run_of(model, metric))
    reference, hook = load_reference(bundle), load_hook(bundle)
    assert reference is not None
    held_out = outputs_of(hook, split_queries(QUERIES, seed=0).calibrate)
    assert held_out is not None
    assert reference.outputs.shape == held_out.shape
    np.testing.assert_allclose(reference.outputs, np.sort(held_out, axis=0), atol=1e-5)
    # Sorted column by column: what it says of one query is nowhere in the file.
    assert not {row.tobytes() for row in held_out} & {row.tobytes() for row in reference.outputs}
    fresh = outputs_of(hook, narrow_queries(400, DIM, seed=5))
    other = outputs_of(hook, gaussian(400, DIM, seed=5))
    assert fresh is not None
    assert other is not None
    assert not compare(reference, fresh).found
    assert compare(reference, other).found


@pytest.mark.parametrize(("model", "metric"), TRAININGS)
def test_figures_of_every_candidate_are_there(
    model: Model, metric: Metric, run_of: Callable[..., Run]
) -> None:
    manifest = run_of(model, metric).manifest
    expected = {
        "linear": {"native", "linear"},
        "native": {"native", "linear"},
        "supportnet": {"native", "linear", "supportnet"},
        "auto": {"native", "linear", "supportnet"},
        "keynet": {"native", "linear", "keynet"},
    }[model]
    counts = Counter(figure.candidate for figure in manifest.figures)
    assert set(counts) == expected
    assert set(counts.values()) == {8}  # k of 1 and 5 at four recalls
    for figure in manifest.figures:
        assert figure.model > 0
        if figure.total is not None and figure.scanned is not None:
            assert figure.total == pytest.approx(figure.scanned + figure.model)
    assert manifest.choice in expected
    assert "recall@5 0.90" in manifest.reason


@pytest.mark.parametrize(("model", "metric"), TRAININGS)
def test_a_router_serves_it(model: Model, metric: Metric, run_of: Callable[..., Run]) -> None:
    run, collection = run_of(model, metric), collection_of(metric, model=model)
    if model != "keynet":
        lay_out(collection, opened(run))
    router = LearnedRouter(collection, bundle=run.path)
    unseen = narrow_queries(100, DIM, seed=5)
    routed = router.search(unseen, k=5, explain=True)
    exact = LearnedRouter(collection, hook=NativeHook()).search(unseen, k=5)
    assert not router.fallbacks
    assert {hits.trace.mode for hits in routed} == {"rewrite" if model == "keynet" else "route"}
    wanted = [{hit.id for hit in hits} for hits in exact]
    found = [{hit.id for hit in hits} for hits in routed]
    recall = np.mean([len(a & b) / 5 for a, b in zip(wanted, found, strict=True)])
    if model != "keynet":  # whose probes are the database's
        assert recall >= 0.85
        assert np.mean([hits.trace.scanned for hits in routed]) < 0.9
    assert recall > 0.5
    for a, b in zip(exact, routed, strict=True):
        known = {hit.id: hit.score for hit in a}
        assert all(hit.score == pytest.approx(known.get(hit.id, hit.score)) for hit in b)


@pytest.mark.parametrize(("model", "metric"), [t for t in TRAININGS if t[0] != "keynet"])
def test_promises_come_from_calibration_and_figures_from_test_queries(
    model: Model, metric: Metric, run_of: Callable[..., Run], snapshot_of: Callable[..., Snapshot]
) -> None:
    """Both recomputed from nothing but the bundle and the log."""
    bundle, keys = opened(run_of(model, metric)), snapshot_of(metric).vectors()
    known = np.load(io.BytesIO(bundle.read("known_cells.npy")))[:, 0]
    onnx, splits = OnnxModel(bundle.read("model.onnx")), split_queries(QUERIES, 0)
    sizes = np.bincount(known, minlength=bundle.manifest.n_cells)

    def served(queries: FloatArray) -> tuple[FloatArray, IntArray]:
        """Priorities of the queries, and the cells of their five best keys."""
        (priority,) = onnx.run(["priority"], {"queries": queries})
        scores = lift_queries(queries, metric) @ lift_keys(keys, metric).T
        return priority, known[np.argsort(-scores, axis=1)[:, :5]]

    def measured(queries: FloatArray) -> Curve:
        priority, hit_cells = served(queries)
        levels = levels_by_threshold(priority, calibration.thresholds)
        return curve(levels, len(calibration.thresholds), hit_cells, sizes, 0.0)

    calibration = Calibration.from_bytes(bundle.read("calibration.npz"))
    # The validation split chose the thresholds. Runtimes round differently, and queries may tie.
    np.testing.assert_allclose(
        np.quantile(calibration.thresholds[:-1], [0.1, 0.5, 0.9]),
        np.quantile(thresholds_for(*served(splits.validate))[:-1], [0.1, 0.5, 0.9]),
        atol=1e-2,
    )
    # So few queries are cross-fitted: what counts is like what the served model has not seen.
    unseen = measured(splits.calibrate)
    assert abs(calibration.recall[4] - unseen.mean_recall(5)).mean() < 0.02
    assert abs(calibration.scanned - unseen.scanned.mean(axis=0)).mean() < 0.02
    if model == "native":  # centroids have learned from no query: all of them count
        everything = measured(np.concatenate([splits.calibrate, splits.train]))
        np.testing.assert_allclose(calibration.recall[4], everything.mean_recall(5), atol=5e-3)
    tested = measured(splits.test)
    for figure in bundle.manifest.figures:
        if figure.candidate != bundle.manifest.model or figure.k != 5:
            continue
        assert figure.scanned is not None
        if model == "native":  # by number of probes, as an index does
            order = np.argsort(-served(splits.test)[0], axis=1)
            searched = order[:, : int(figure.n_probes or 0)]
            hits = served(splits.test)[1]
            found = (hits[:, :, None] == searched[:, None, :]).any(axis=2).mean()
            assert found >= figure.recall - 5e-3
        else:
            assert figure.scanned == pytest.approx(tested.cost(5, figure.recall), abs=2e-2)


@pytest.mark.slow
def test_a_learned_router_is_chosen_where_it_helps(tmp_path: Path) -> None:
    """Keys without clusters, and queries that tell them apart by a few directions only."""
    snapshot = take_snapshot(MemoryCollection(gaussian(N, DIM)), tmp_path / "snap")
    manifest = train(snapshot, QUERIES, tmp_path / "run", options("auto")).manifest
    assert manifest.model == manifest.choice
    totals = {f.candidate: f.total for f in manifest.figures if (f.k, f.recall) == (5, 0.9)}
    assert manifest.choice in ("linear", "supportnet")
    learned, native = totals[manifest.choice], totals["native"]
    assert learned is not None
    assert native is not None
    assert learned < 0.8 * native
    assert manifest.served_cost is not None
    assert learned - 0.05 < manifest.served_cost < native
    assert f"{manifest.served_cost:.1%}" in manifest.reason


@pytest.mark.slow
def test_native_is_chosen_where_nothing_can_be_learned(tmp_path: Path) -> None:
    """Two far clusters, and each query wants one of them: centroids already know which."""
    sides = np.where(np.arange(600) % 2, 1.0, -1.0).astype(np.float32)[:, None]
    axis = np.zeros((1, DIM), dtype=np.float32)
    axis[0, 0] = 10.0
    keys = sides * axis + 0.1 * gaussian(600, DIM)
    queries = sides * axis + 0.1 * gaussian(600, DIM, 1)
    snapshot = take_snapshot(MemoryCollection(keys), tmp_path / "snap")
    manifest = train(snapshot, queries, tmp_path / "run", options("auto", n_cells=2)).manifest
    assert manifest.choice == "native"
    assert manifest.reason.startswith("Use the native search")
    assert manifest.model in ("linear", "supportnet"), "what was asked for is there to look at"


def flat_curve(level: int, n: int = 60, price: float = 0.1) -> Curve:
    """Everything is found at one of ten levels, each of which searches as much more."""
    scanned = np.tile(np.linspace(price, 10 * price, 10, dtype=np.float32), (n, 1))
    return Curve(np.full((n, 10), level), scanned, np.arange(1.0, 11.0), 0.01)


@pytest.mark.parametrize(
    ("native", "linear", "price", "choice", "why"),
    [
        (5, 3, 0.1, "linear", "reaches recall@5 0.90 at 41.0%.*as many cells takes 61.0%"),
        (5, 5, 0.1, "native", "takes 61.0%, and linear, which takes 61.0%, is not sure"),
        (3, 5, 0.1, "native", "takes 41.0%, and linear, which takes 61.0%, is not sure"),
        (10, 3, 0.1, "linear", "cannot reach it"),
        (10, 8, 0.2, "native", "linear, which takes 181.0%, is dearer than a full scan"),
        (5, 9, 0.1, "native", "cannot be promised with 95% confidence from 60 queries"),
    ],
)
def test_the_promised_cost_has_to_beat_the_native_search(
    native: int, linear: int, price: float, choice: str, why: str, tmp_path: Path
) -> None:
    task = make_task(tmp_path)
    learned = flat_curve(linear, price=price)
    thresholds = np.append(-np.arange(9.0), -np.inf).astype(np.float32)
    calibration = calibrate(learned, thresholds, 5)
    nothing = np.zeros(1, dtype=np.int64)
    cells = Cells(gaussian(10, 3), np.zeros(10, dtype=np.float32), np.ones(10, dtype=np.int64))
    pair = [
        Candidate(kind, LinearRouter(3, 10), None, cells, nothing, 3, [], lambda _: learned, None)
        for kind in ("linear", "native")
    ]
    promised = Promise(calibration, learned, flat_curve(native))
    chosen, reason, cost = recommend(pair[0], pair[1], task, promised)
    assert chosen == choice
    assert re.search(why, reason)
    assert (cost is None) == ("cannot be promised" in why)


@pytest.mark.slow
def test_no_log_says_so_loudly(snapshot_of: Callable[..., Snapshot], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="only as good as that guess"):
        run = train(snapshot_of(n=400), None, tmp_path, options(guesses=400, n_cells=8))
    assert run.manifest.queries == "guess"


def test_a_finished_run_is_returned_as_it_is(
    run_of: Callable[..., Run], snapshot_of: Callable[..., Snapshot]
) -> None:
    run = run_of("linear")
    recorder = Recorder()
    again = train(snapshot_of(), QUERIES, run.path, options("linear"), recorder)
    assert again == run
    assert not recorder.totals


def refused(
    error: type[AmipsError],
    match: str,
    snapshot: Snapshot,
    queries: FloatArray | None,
    out: Path,
    asked: TrainOptions,
) -> None:
    """The call fails with a clear error and leaves nothing behind that is in the way."""
    there = sorted(out.rglob("*")) if out.exists() else None
    with pytest.raises(error, match=match):
        train(snapshot, queries, out, asked)
    assert (sorted(out.rglob("*")) if out.exists() else None) == there


def with_nan() -> FloatArray:
    queries = np.array(QUERIES)
    queries[4, 2] = np.nan
    return queries


@pytest.mark.parametrize(
    ("error", "match", "queries", "changes"),
    [
        (InvalidInput, "dimension 16", gaussian(100, DIM - 1), {}),
        (InvalidInput, "Query 4 holds a NaN", with_nan(), {}),
        (InvalidInput, "empty", gaussian(0, DIM), {}),
        (TrainingError, "30 distinct queries are too few", QUERIES[:30], {}),
        (InvalidInput, "k=401 does not fit the 400 keys", QUERIES, {"k": 401}),
        (InvalidInput, "k=0", QUERIES, {"k": 0}),
        (InvalidInput, "recall=0.0 is no target", QUERIES, {"recall": 0.0}),
        (InvalidInput, "recall=1.0 is no target", QUERIES, {"recall": 1.0}),
        (InvalidInput, "recall=nan is no target", QUERIES, {"recall": float("nan")}),
        (InvalidInput, "no preset 'best'; there are: default", QUERIES, {"preset": "best"}),
        (TrainingError, "400 keys cannot fill 401 cells; ask for fewer", QUERIES, {"n_cells": 401}),
        (TrainingError, "0 cells cut nothing", QUERIES, {"n_cells": 0}),
        (InvalidInput, "'forest'", QUERIES, {"model": "forest"}),
        (InvalidInput, "'grid'", QUERIES, {"layout": "grid"}),
        (InvalidInput, "'tpu'", QUERIES, {"device": "tpu"}),
        (InvalidInput, "seed", QUERIES, {"seed": -1}),
        (InvalidInput, "epochs", QUERIES, {"epochs": 0}),
        (InvalidInput, "seed", QUERIES, {"seed": 2**40}),
        (InvalidInput, "guesses", None, {"guesses": -1}),
    ],
)
def test_bad_input_is_one_clear_error(
    error: type[AmipsError],
    match: str,
    queries: FloatArray | None,
    changes: dict[str, Any],
    snapshot_of: Callable[..., Snapshot],
    tmp_path: Path,
) -> None:
    asked = options(changes.pop("model", "linear"), **changes)
    refused(error, match, snapshot_of(n=400), queries, tmp_path / "run", asked)


@pytest.mark.slow
def test_a_refused_call_leaves_the_folder_to_the_next(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    for queries, asked in ((QUERIES[:30], options()), (QUERIES, options(n_cells=401))):
        with pytest.raises(TrainingError):
            train(snapshot_of(n=400), queries, tmp_path / "run", asked)
    asked = options(n_cells=6, epochs=1)
    assert train(snapshot_of(n=400), QUERIES, tmp_path / "run", asked).manifest.n_cells == 6


def test_no_cell_is_larger_than_was_asked(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    for asked in (
        options(layout="native", max_cell=1.2),
        options("native", max_cell=1.2),
        options(partitions="topic", max_cell=1.2),
    ):
        refused(InvalidInput, "--max-cell", snapshot_of(n=400), QUERIES, tmp_path / "no", asked)
    asked = options("linear", n_cells=8, epochs=1, max_cell=1.1)
    run = train(snapshot_of(n=400), QUERIES, tmp_path / "run", asked)
    assert Cells.from_bytes((run.bundle / "cells.npz").read_bytes()).sizes.max() <= 1.1 * 400 / 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_that_is_not_there(snapshot_of: Callable[..., Snapshot], tmp_path: Path) -> None:
    asked = options(device="cuda")
    refused(InvalidInput, "CUDA", snapshot_of(n=400), QUERIES, tmp_path / "run", asked)


@pytest.mark.parametrize("model", ["auto", "keynet", "native"])
@pytest.mark.parametrize("metric", [Metric.COSINE, Metric.L2])
@pytest.mark.parametrize("n", [2, 20])
def test_a_tiny_collection_trains(n: int, metric: Metric, model: Model, tmp_path: Path) -> None:
    """Fewer keys than the targets are deep, and than a KeyNet rescores."""
    snapshot = take_snapshot(collection_of(metric, n, model), tmp_path / "snap")
    asked = options(model, n_cells=2, k=1, epochs=1)
    run = train(snapshot, QUERIES[:200], tmp_path / "run", asked)
    collection = collection_of(metric, n, model)
    if run.manifest.layout:
        lay_out(collection, opened(run))
    hits = LearnedRouter(collection, bundle=run.path).search(QUERIES[0], k=n)
    assert len(hits) <= n


def test_keys_with_names_keep_them(tmp_path: Path) -> None:
    names = [f"doc {n}" for n in range(300)]
    collection = MemoryCollection(clustered_keys(300, DIM), names)
    snapshot = take_snapshot(collection, tmp_path / "snap")
    run = train(snapshot, QUERIES[:200], tmp_path / "run", options(n_cells=4, epochs=1))
    router = LearnedRouter(lay_out(collection, opened(run)), bundle=run.path)
    hits = router.search(QUERIES[0], k=3)
    assert hits.trace.mode in ("route", "native")
    assert not router.fallbacks
    assert {hit.id for hit in hits} <= set(names)


@pytest.mark.parametrize("metric", [Metric.IP, Metric.L2])
def test_keynet_refuses_keys_of_different_lengths(
    metric: Metric, snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    snapshot = snapshot_of(metric, 400)
    refused(
        MetricNotSupported,
        f"metric {metric} over keys of different lengths.* Train --model linear or supportnet",
        snapshot,
        QUERIES,
        tmp_path / "run",
        options("keynet"),
    )
    keys = clustered_keys(400, DIM)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    equal = take_snapshot(MemoryCollection(keys, metric=metric), tmp_path / "equal")
    run = train(equal, QUERIES, tmp_path / "run", options("keynet", epochs=1))
    assert run.manifest.model == "keynet"


def test_a_folder_with_something_else_is_refused(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.tex"):
        refused(InvalidInput, "name another folder", snapshot_of(n=400), QUERIES, out, options())
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_folder_answers_one_question_only(
    run_of: Callable[..., Run], snapshot_of: Callable[..., Snapshot]
) -> None:
    path = run_of("linear").path
    match = "other data or options; name another folder"
    for asked in (options("native"), options(seed=1), options(n_cells=CELLS + 1), options(k=4)):
        refused(InvalidInput, match, snapshot_of(), QUERIES, path, asked)
    refused(InvalidInput, match, snapshot_of(), QUERIES[:-1], path, options())
    # The same keys under another metric are another question.
    refused(InvalidInput, match, snapshot_of(Metric.L2), QUERIES, path, options())
    assert opened(run_of("linear")).manifest == run_of("linear").manifest


def test_few_queries_for_many_cells_warn(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="training queries cannot tell 60 cells apart"):
        run = train(snapshot_of(n=400), QUERIES[:70], tmp_path, options(n_cells=60, epochs=1))
    assert 1 < run.manifest.n_cells < 60


@pytest.mark.slow
def test_cells_that_come_out_empty_warn(tmp_path: Path) -> None:
    keys = np.repeat(gaussian(4, DIM), 100, axis=0)
    snapshot = take_snapshot(MemoryCollection(keys), tmp_path / "snap")
    with pytest.warns(UserWarning, match="cells came out empty"):
        run = train(snapshot, QUERIES, tmp_path / "run", options(n_cells=16, epochs=1))
    assert run.manifest.n_cells < 16


class StopAt:
    """Interrupts a stage: when it opens (0), or at its first report (1)."""

    def __init__(self, title: str, report: int) -> None:
        self.title = title
        self.report = report
        self.titles: list[str] = []

    @contextmanager
    def __call__(self, title: str, total: int, done: int = 0, unit: str = "") -> Iterator[StopAt]:
        self.titles.append(title)
        if title == self.title and self.report == 0:
            raise KeyboardInterrupt
        yield self

    def advance(self, amount: int = 1, note: str = "") -> None:
        if self.titles[-1] == self.title:
            raise KeyboardInterrupt


INTERRUPTED = [("supportnet", Metric.L2), ("keynet", Metric.COSINE)]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "metric"), INTERRUPTED)
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_a_training_interrupted_anywhere_ends_with_the_same_bytes(
    model: Model, metric: Metric, preset: str, snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    snapshot, queries = snapshot_of(metric, 400), QUERIES[:200]
    asked = options(model, n_cells=6, epochs=2, preset=preset)
    straight = StopAt("", 0)
    wanted = train(snapshot, queries, tmp_path / "straight", asked, straight)
    stages = list(dict.fromkeys(straight.titles))
    assert len(stages) >= 5
    for number, stage in enumerate(stages):
        out = tmp_path / str(number)
        for report in (0, 1):
            with pytest.raises(KeyboardInterrupt):
                train(snapshot, queries, out, asked, StopAt(stage, report))
            assert not (out / "bundle").exists()
        resumed = train(snapshot, queries, out, asked)
        for name in wanted.manifest.files:
            given = (resumed.bundle / name).read_bytes()
            if not name.endswith(".npz"):  # archives carry the time
                assert given == (wanted.bundle / name).read_bytes(), (stage, name)
        assert resumed.manifest.figures == wanted.manifest.figures
        assert resumed.manifest.layout == wanted.manifest.layout
        shutil.rmtree(out)


@pytest.mark.slow
def test_an_epoch_in_the_middle_is_where_training_goes_on(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    snapshot, queries, asked = snapshot_of(n=400), QUERIES[:200], options(n_cells=6, epochs=4)

    class ThirdEpoch(StopAt):
        seen = 0

        def advance(self, amount: int = 1, note: str = "") -> None:
            self.seen += self.titles[-1] == "train linear"
            if self.seen == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(snapshot, queries, tmp_path / "run", asked, ThirdEpoch("", 0))
    recorder = Recorder()
    run = train(snapshot, queries, tmp_path / "run", asked, recorder)
    assert 3 in recorder.started_at
    straight = train(snapshot, queries, tmp_path / "straight", asked)
    assert (run.bundle / "model.onnx").read_bytes() == (straight.bundle / "model.onnx").read_bytes()


@pytest.mark.slow
def test_an_interrupted_write_of_the_bundle_leaves_none(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, asked = snapshot_of(n=400), options(n_cells=6, epochs=1)
    written: list[str] = []

    def killed(path: Path, data: bytes) -> None:
        written.append(path.name)
        if path.name == "manifest.json":
            raise KeyboardInterrupt
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["amips_plugins.bundle.contents"], "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            train(snapshot, QUERIES, tmp_path, asked)
    assert "model.onnx" in written
    assert not (tmp_path / "bundle").exists()
    assert opened(train(snapshot, QUERIES, tmp_path, asked)).read("model.onnx")
    assert not (tmp_path / "bundle.tmp").exists()


@pytest.mark.slow
def test_a_run_holds_no_pickle(run_of: Callable[..., Run]) -> None:
    path = run_of("auto").path
    assert json.loads((path / "options.json").read_text())["options"]["model"] == "auto"
    kinds = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert kinds <= {".json", ".jsonl", ".npy", ".npz", ".onnx", ".safetensors"}
    for file in path.rglob("*.np[yz]"):
        np.load(file, allow_pickle=False)
    for file in path.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert tensors.keys()


@pytest.mark.slow
def test_training_warns_of_nothing_when_all_is_well(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(snapshot_of(n=400), QUERIES, tmp_path, options(n_cells=6, epochs=1))


@pytest.mark.slow
def test_two_trainings_cannot_have_one_folder(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    snapshot, asked = snapshot_of(n=400), options(n_cells=6, epochs=1)
    second: list[str] = []

    class Meanwhile(StopAt):
        @contextmanager
        def __call__(
            self, title: str, total: int, done: int = 0, unit: str = ""
        ) -> Iterator[StopAt]:
            if not second:
                with pytest.raises(InvalidInput) as refusal:
                    train(snapshot, QUERIES, tmp_path, asked)
                second.append(str(refusal.value))
            yield self

        def advance(self, amount: int = 1, note: str = "") -> None:
            pass

    assert train(snapshot, QUERIES, tmp_path, asked, Meanwhile("", 0)).manifest.count == 400
    assert "Another training is at work" in second[0]


@pytest.mark.slow
def test_damaged_leftovers_are_told_or_made_again(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path
) -> None:
    snapshot, asked = snapshot_of(n=400), options(n_cells=6, epochs=2)
    wanted = train(snapshot, QUERIES, tmp_path / "wanted", asked)
    out = tmp_path / "run"
    train(snapshot, QUERIES, out, asked)
    shutil.rmtree(out / "bundle")
    for file in filter(Path.is_file, (out / "work").rglob("*")):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    again = train(snapshot, QUERIES, out, asked)
    for name in ("model.onnx", "known_cells.npy"):
        assert (again.bundle / name).read_bytes() == (wanted.bundle / name).read_bytes()
    (out / "options.json").write_bytes(b'{"snapshot": "')
    refused(InvalidInput, r"options\.json is damaged", snapshot, QUERIES, out, asked)


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_no_lost_work(
    snapshot_of: Callable[..., Snapshot], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot, asked = snapshot_of(n=400), options(n_cells=6, epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000))
        match = "needs about .* GB more than its disk holds now"
        refused(InvalidInput, match, snapshot, QUERIES, tmp_path / "run", asked)
    saved, done = np.savez, list[int]()

    def full(path: Path, **arrays: Any) -> None:
        done.append(int(arrays["done"]))
        if len(done) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(path, **arrays)

    monkeypatch.setattr("amips_plugins.export.run_folder._BETWEEN", 0.0)
    monkeypatch.setattr("amips_plugins.export.keys._SHARD", 100)
    monkeypatch.setattr("amips_plugins.export.keys.BLOCK", 50)
    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(TrainingError, match="is full; make room and run the same command"):
            train(snapshot, QUERIES, tmp_path / "run", asked)
    recorder = Recorder()
    assert train(snapshot, QUERIES, tmp_path / "run", asked, recorder).manifest.count == 400
    assert recorder.started_at[0] == 100  # keys that were looked through before
