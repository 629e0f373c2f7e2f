from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.loading import known_cells, load_hook
from amips_plugins.bundle.package import Bundle
from amips_plugins.errors import InvalidInput
from amips_plugins.export.cell_graphs import CellGraphs
from amips_plugins.export.cell_lists import CellLists
from amips_plugins.export.cost_curves import Curve
from amips_plugins.export.efforts import EFFORTS, VISITS, choose_efforts
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.models.hooks import RouteHook
from amips_plugins.plan import Target
from amips_plugins.tuning import lists_in_cells
from amips_plugins.vectors import normalise
from tests.support.training_data import clustered_keys, narrow_queries

N, DIM, CELLS = 3_000, 16, 8
KEYS = normalise(clustered_keys(N, DIM, clusters=300))
OPTIONS = TrainOptions(
    model="linear", n_cells=CELLS, epochs=4, recall=0.9, k=10, spill=0.0, index="hnsw"
)


def a_curve(recalls: list[float], costs: list[float]) -> Curve:
    """A curve of 100 queries with one hit each."""
    found = np.full((100, 1), len(recalls))
    for level, recall in reversed(list(enumerate(recalls))):
        found[: round(100 * recall)] = level
    scanned = np.tile(np.array(costs, dtype=np.float32), (100, 1))
    return Curve(found, scanned, np.ones(len(recalls)), 0.0)


def test_every_level_gets_the_effort_that_reaches_its_recall_for_the_least() -> None:
    little = a_curve([0.5, 0.7, 0.72, 0.74], [1, 2, 3, 4])
    much = a_curve([0.5, 0.8, 0.9, 0.95], [3, 6, 9, 12])
    assert choose_efforts([little, much], [10, 50], 1).tolist() == [10, 50, 50, 50]
    assert choose_efforts([much], [50], 1).tolist() == [50] * 4


def test_efforts_never_fall() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        curves = [
            a_curve(np.sort(rng.random(9)).tolist(), np.sort(rng.random(9)).tolist())
            for _ in range(3)
        ]
        efforts = choose_efforts(curves, [10, 20, 40], 1)
        assert (np.diff(efforts) >= 0).all()


def test_where_a_visit_is_dear_fewer_cells_are_searched_farther(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = take_snapshot(MemoryCollection(KEYS), tmp_path / "snap")
    queries, asked = narrow_queries(3_000, DIM), []
    for visit in (0.0, 1e6):
        monkeypatch.setitem(VISITS, snapshot.manifest.collection.database, visit)
        run = train(snapshot, queries, tmp_path / f"run-{visit:.0f}", OPTIONS)
        hook = load_hook(Bundle.in_folder(run.bundle))
        assert hook is not None
        plan = hook.plan(narrow_queries(300, DIM, seed=9), Target(k=10, recall=0.8))
        assert plan.cells is not None
        assert plan.effort is not None
        asked.append(((plan.cells >= 0).sum(), plan.effort))
    assert asked[1][0] < asked[0][0]
    assert asked[1][1] > asked[0][1]


def test_models_that_choose_no_cells_have_no_graphs(tmp_path: Path) -> None:
    snapshot = take_snapshot(MemoryCollection(KEYS[:500]), tmp_path / "snap")
    for model in ("keynet", "native"):
        options = msgspec.structs.replace(OPTIONS, model=model)
        with pytest.raises(InvalidInput, match="--index"):
            train(snapshot, narrow_queries(500, DIM), tmp_path / "run", options)


@pytest.mark.slow
def test_targets_hold_in_lists_of_codes(tmp_path: Path) -> None:
    """As in graphs: lists that are not searched and what codes rank too low are counted."""
    snapshot = take_snapshot(MemoryCollection(KEYS), tmp_path / "snap")
    options = msgspec.structs.replace(OPTIONS, index="ivf_sq8")
    run = train(snapshot, narrow_queries(9_000, DIM), tmp_path / "run", options)
    bundle = Bundle.in_folder(run.bundle)
    hook = load_hook(bundle)
    assert isinstance(hook, RouteHook)
    calibration = hook.calibration
    assert calibration.efforts is not None
    assert calibration.lists == lists_in_cells(N / CELLS)
    assert (np.diff(calibration.efforts) >= 0).all()
    members = known_cells(bundle)(list(range(N)), KEYS)[:, None]
    cells = CellLists(KEYS, members, CELLS)
    unseen = narrow_queries(600, DIM, seed=9)
    hits = np.argsort(-(normalise(unseen) @ KEYS.T), axis=1)[:, :100]
    for k, recall in ((1, 0.9), (10, 0.9), (10, 0.8), (100, 0.9)):
        plan = hook.plan(unseen, Target(k=k, recall=recall))
        assert plan.cells is not None, (k, recall, plan.reason)
        assert plan.effort is None
        assert plan.probes is not None
        visited = np.zeros((len(unseen), CELLS + 1), dtype=bool)
        np.put_along_axis(visited, plan.cells, True, axis=1)
        finds = cells.search(normalise(unseen), hits, visited[:, :CELLS], [plan.probes])
        assert finds.found[0, :, :k].mean() >= recall - 0.01, (k, recall)
    by_number = hook.plan(unseen, Target(k=10, n_probes=3))
    assert by_number.probes == calibration.lists


@pytest.mark.slow
def test_targets_hold_in_graphs(tmp_path: Path) -> None:
    """For several k, on queries that nothing has seen, the graphs' own misses counted."""
    snapshot = take_snapshot(MemoryCollection(KEYS), tmp_path / "snap")
    run = train(snapshot, narrow_queries(9_000, DIM), tmp_path / "run", OPTIONS)
    bundle = Bundle.in_folder(run.bundle)
    hook = load_hook(bundle)
    assert isinstance(hook, RouteHook)
    efforts = hook.calibration.efforts
    assert efforts is not None
    assert set(efforts.tolist()) <= set(EFFORTS)
    assert (np.diff(efforts) >= 0).all()
    members = known_cells(bundle)(list(range(N)), KEYS)[:, None]
    graphs = CellGraphs(KEYS, members, CELLS)
    unseen = narrow_queries(600, DIM, seed=9)
    hits = np.argsort(-(normalise(unseen) @ KEYS.T), axis=1)[:, :100]
    for k, recall in ((1, 0.9), (10, 0.9), (10, 0.8), (100, 0.9)):
        plan = hook.plan(unseen, Target(k=k, recall=recall))
        assert plan.cells is not None, (k, recall, plan.reason)
        assert plan.effort is not None
        visited = np.zeros((len(unseen), CELLS + 1), dtype=bool)
        np.put_along_axis(visited, plan.cells, True, axis=1)
        effort = max(plan.effort, k)  # as engines have it
        finds = graphs.search(normalise(unseen), hits, visited[:, :CELLS], [effort])
        assert finds.found[0, :, :k].mean() >= recall - 0.01, (k, recall)
    by_number = hook.plan(unseen, Target(k=10, n_probes=3))
    assert by_number.effort == max(efforts)
