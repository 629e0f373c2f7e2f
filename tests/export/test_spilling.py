from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

from amips_plugins import LearnedRouter
from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.loading import known_cells, load_hook
from amips_plugins.bundle.package import Bundle
from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.export import spilling as module
from amips_plugins.export.clustering import query_aware_cells
from amips_plugins.export.cost_curves import curve, levels_by_threshold
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.routers import train_router
from amips_plugins.export.snapshot import Snapshot, take_snapshot
from amips_plugins.export.spilling import share_of_copies, spilled, worthwhile_spill
from amips_plugins.export.train import TrainOptions, train
from amips_plugins.layout import lay_out
from amips_plugins.models.calibration import Calibration
from amips_plugins.models.cells import further_cells
from amips_plugins.models.hooks import RouteHook
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.vectors import normalise
from tests.support.training_data import clustered_keys, narrow_queries
from tests.support.training_tasks import CELLS, make_task, short

N, DIM = 900, 12
KEYS = normalise(clustered_keys(N, DIM))
QUERIES = narrow_queries(1500, DIM)
OPTIONS = TrainOptions(model="linear", n_cells=16, epochs=4, recall=0.9, k=5, spill=0.3)


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    return take_snapshot(MemoryCollection(KEYS), tmp_path_factory.mktemp("snapshot"))


@pytest.fixture(scope="module")
def bundle(snapshot: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    run = train(snapshot, QUERIES, tmp_path_factory.mktemp("run"), OPTIONS)
    return Bundle.in_folder(run.bundle)


@pytest.mark.slow
def test_a_bundle_with_shared_keys_keeps_its_promise(bundle: Bundle) -> None:
    assert 0.2 * N < bundle.manifest.copies <= 0.3 * N
    collection = lay_out(MemoryCollection(KEYS), bundle)
    assert (collection.count(), collection.overflow()) == (N, 0)
    members = known_cells(bundle)(list(range(N)), KEYS)
    assert len(further_cells(members)) == bundle.manifest.copies
    unseen = narrow_queries(300, DIM, seed=5)
    router = LearnedRouter(collection, bundle=Path(bundle.location))
    routed = router.search(unseen, k=5, explain=True)
    scores = normalise(unseen) @ KEYS.T
    wanted = np.argsort(-scores, axis=1)[:, :5]
    recall = np.mean(
        [len({h.id for h in hits} & set(row)) / 5 for hits, row in zip(routed, wanted, strict=True)]
    )
    assert recall >= 0.87
    assert not router.fallbacks
    assert {len({h.id for h in hits}) for hits in routed} == {5}
    # What was promised counts copies, as the plan does.
    hook = load_hook(bundle)
    assert isinstance(hook, RouteHook)
    sizes = np.array([(members == cell).any(axis=1).sum() for cell in range(16)])
    np.testing.assert_allclose(hook.shares[:-1], sizes / N, rtol=1e-6)


@pytest.mark.slow
def test_calibration_counts_a_key_in_any_of_its_cells(bundle: Bundle) -> None:
    calibration = Calibration.from_bytes(bundle.read("calibration.npz"))
    members = known_cells(bundle)(list(range(N)), KEYS)
    unseen = narrow_queries(1_000, DIM, seed=6)
    (priority,) = OnnxModel(bundle.read("model.onnx")).run(["priority"], {"queries": unseen})
    hits = np.argsort(-(normalise(unseen) @ KEYS.T), axis=1)[:, :5]
    levels = levels_by_threshold(priority, calibration.thresholds)
    sizes = np.array([(members == cell).any(axis=1).sum() for cell in range(16)])
    measured = curve(levels, len(calibration.thresholds), members[hits], sizes, 0.0, n_keys=N)
    assert abs(calibration.recall[4] - measured.mean_recall(5)).mean() < 0.02
    assert abs(calibration.scanned - measured.scanned.mean(axis=0)).mean() < 0.03


@pytest.mark.slow
def test_further_cells_that_do_not_fit_are_refused(bundle: Bundle) -> None:
    other = msgspec.structs.replace(bundle.manifest, copies=1)
    with pytest.raises(BundleCorrupt, match="do not fit"):
        known_cells(replace(bundle, manifest=other, values={}))


def test_what_cannot_share_keys_is_refused(snapshot: Snapshot, tmp_path: Path) -> None:
    for change, reason in (
        ({"model": "keynet"}, "one cell"),
        ({"model": "native"}, "one cell"),
        ({"spill": -0.1}, "spill"),
    ):
        with pytest.raises(InvalidInput, match=reason):
            train(snapshot, QUERIES, tmp_path, msgspec.structs.replace(OPTIONS, **change))


def test_votes_give_cells_that_count_copies(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    train_split = task.train
    cells, assignment = query_aware_cells(
        task.keys, task.metric, CELLS, 0, train_split.queries, train_split.hits
    )
    assert spilled(task, cells, assignment, 0.0) == (cells, assignment)
    shared, members = spilled(task, cells, assignment, 0.2)
    assert shared.sizes.sum() == len(task.keys) + len(further_cells(members))
    assert share_of_copies(members) == pytest.approx(0.2, abs=0.01)
    assert share_of_copies(assignment) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(("price", "pays"), [(1.0, True), (5.0, False)])
def test_keys_are_shared_where_that_is_cheaper(
    price: float, pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, n=2_000)
    split = task.train
    cut = query_aware_cells(task.keys, task.metric, CELLS, 0, split.queries, split.hits)
    linear = partial(train_router, "linear", short(PRESETS["default"]["linear"]), task)
    plain = linear(*cut)
    monkeypatch.setattr(module, "_SECOND_CONDITION", price)
    chosen = worthwhile_spill(task, plain, linear)
    assert (chosen.assignment.ndim == 2) == pays
    if pays:
        costs = [one.measure(task.validate).cost(task.k, task.recall) for one in (chosen, plain)]
        assert costs[0] < costs[1]
    else:
        assert chosen is plain
