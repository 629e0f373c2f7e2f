"""Training routers over the users' own partitions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.bundle.contents import CALIBRATION, CELLS, PARTITIONS, load
from amips_plugins.bundle.loading import check_loads
from amips_plugins.errors import InvalidInput, SnapshotError, TrainingError
from amips_plugins.export.clustering import centre_of
from amips_plugins.export.dataset import TrainingTask, choose_device, pose
from amips_plugins.export.given import Given, largest_first, many_heads, train_given, with_keys
from amips_plugins.export.nets import TwoLevelRouter
from amips_plugins.export.queries import split_queries
from amips_plugins.export.recipes import PRESETS
from amips_plugins.export.snapshot import take_snapshot
from amips_plugins.export.to_onnx import to_onnx
from amips_plugins.export.train import Run, TrainOptions, train
from amips_plugins.export.training_loop import Schedule
from amips_plugins.layout import plan_layout
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.partitions import Partitions, Value
from amips_plugins.progress import no_progress
from amips_plugins.routing.serving import bundle_in
from amips_plugins.vectors import Metric, lift_keys, lift_queries, normalise
from tests.support import given_data

PARTS = tuple(f"part {number}" for number in range(given_data.PARTS))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return given_data.short_run(tmp_path_factory.mktemp("given"))


@pytest.mark.slow
def test_a_bundle_holds_values_and_no_layout(run: Run) -> None:
    bundle = bundle_in(run.path)
    check_loads(bundle)
    given = load(bundle)[PARTITIONS]
    counted = [value for value in given_data.values() if value is not None]
    assert given.partitions == Partitions("part", PARTS)
    assert given.sizes.tolist() == [counted.count(value) for value in PARTS]
    assert given.overflow == given_data.COUNT - len(counted)
    assert CELLS not in bundle.manifest.files
    assert (bundle.manifest.n_cells, bundle.manifest.layout) == (10, given.layout())
    assert load(bundle)[CALIBRATION].max_k >= 10
    with pytest.raises(InvalidInput, match="nothing to lay out"):
        plan_layout(given_data.collection(), bundle)


def test_the_control_is_beaten_where_partitions_say_something(run: Run) -> None:
    costs = {f.candidate: f.total for f in run.manifest.figures if (f.k, f.recall) == (10, 0.9)}
    assert set(costs) == {"native", "linear", "supportnet"}
    assert costs["native"] is not None
    assert costs["supportnet"] is not None
    assert costs["supportnet"] < 0.5 * costs["native"]
    assert run.manifest.choice == run.manifest.model != "native"
    assert "to search the largest first takes" in run.manifest.reason


@pytest.mark.slow
def test_permuted_labels_save_next_to_nothing(tmp_path: Path) -> None:
    permuted = np.random.default_rng(5).permutation(given_data.COUNT)
    values: list[Value | None] = [given_data.values()[row] for row in permuted]
    taken = given_data.snapshot(tmp_path, given_data.collection(values))
    options = TrainOptions(epochs=3, recall=0.9)
    run = train(taken, given_data.queries(), tmp_path / "run", options)
    # With so few keys it is learned which of them are asked for; no more than that.
    served = run.manifest.served_cost
    assert served is not None
    assert served > 0.8


def test_keys_of_no_value_are_searched_by_every_query(run: Run) -> None:
    share = load(bundle_in(run.path))[PARTITIONS].overflow / given_data.COUNT
    least = min(f.scanned for f in run.manifest.figures if f.scanned is not None)
    assert least > share > 0


def a_task(tmp_path: Path, metric: Metric = Metric.COSINE) -> tuple[TrainingTask, Given]:
    keys, queries = given_data.keys(), given_data.queries(600)
    centre = centre_of(keys, metric)
    task = pose(
        keys,
        lift_keys(keys, metric, centre),
        metric,
        split_queries(queries, 0),
        k=5,
        recall=0.9,
        seed=0,
        device=choose_device("cpu"),
        work=tmp_path,
        progress=no_progress,
        centre=centre,
    )
    return task, Given.of(given_data.snapshot(tmp_path), None)


def test_what_is_to_be_saved_decides_what_a_large_part_has_to_hold(tmp_path: Path) -> None:
    task, given = a_task(tmp_path)
    quick = {"linear": replace(PRESETS["default"]["linear"], schedule=Schedule(epochs=1))}
    for count, power in (("searches", 0.0), ("keys", 0.5)):
        options = msgspec.convert({"count": count, "model": "linear"}, TrainOptions)
        work = tmp_path / count
        work.mkdir()
        _, linear = train_given(replace(task, work=work), given, options, quick)
        assert linear.order is not None
        np.testing.assert_allclose(
            linear.order.offset, -power * np.log(given.cells.sizes), rtol=1e-5
        )


@pytest.mark.parametrize("metric", list(Metric))
def test_heads_begin_where_the_topics_of_a_part_are(metric: Metric, tmp_path: Path) -> None:
    task, given = a_task(tmp_path, metric)
    net = many_heads(task, given, 3)
    right = 0
    for cell in range(given_data.PARTS):
        rows = np.flatnonzero(given.assignment == cell)
        unit = normalise(lift_queries(task.keys[rows], metric, task.centre))
        with torch.no_grad():
            right += int((net(torch.from_numpy(unit)).argmax(dim=1) == cell).sum())
    assert right > 0.9 * (given.assignment >= 0).sum()
    few = many_heads(task, given, 300)  # more than a part has keys: some of them twice
    assert torch.isfinite(few.weight).all()


def test_keys_ask_for_their_neighbours_and_not_for_themselves(tmp_path: Path) -> None:
    task, _ = a_task(tmp_path)
    mixed, queries = with_keys(task).train, len(task.train.queries)
    count = len(mixed.queries) - given_data.COUNT
    assert count == queries * round(given_data.COUNT / queries)
    np.testing.assert_array_equal(mixed.queries[count:], task.keys)
    own = np.arange(given_data.COUNT)[:, None]
    assert not (mixed.hits[count:] == own).any()
    unit = normalise(np.asarray(task.keys))
    scores = unit @ unit.T
    np.fill_diagonal(scores, -1)
    np.testing.assert_array_equal(mixed.hits[count:, 0], scores.argmax(axis=1))
    # Of the other splits nothing is in it.
    held_out = {row.tobytes() for row in np.concatenate([task.validate.queries, task.test.queries])}
    assert held_out.isdisjoint(row.tobytes() for row in mixed.queries)


def test_the_control_orders_parts_by_their_hits_whatever_is_asked(tmp_path: Path) -> None:
    task, given = a_task(tmp_path)
    control = largest_first(task, given)
    assert control.priority is not None
    priority = control.priority(task.test)
    hits = given.assignment[task.train.hits[:, : task.k]]
    held = np.bincount(hits[hits >= 0], minlength=given_data.PARTS)
    assert (priority == priority[0]).all()
    assert held[np.argsort(-priority[0])].tolist() == sorted(held.tolist(), reverse=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a"] * 40, "1 different values"),
        ([None] * 39 + ["a"], "1 different values"),
        ([1, "a"] * 20, "whole numbers and texts"),
    ],
)
def test_nothing_to_choose_among(values: list[Value | None], message: str, tmp_path: Path) -> None:
    fields = [{"part": value} for value in values]
    made = MemoryCollection(given_data.keys()[:40], fields=fields)
    taken = take_snapshot(made.partitioned(Partitions("part")), tmp_path / "snap")
    with pytest.raises(TrainingError, match=message):
        Given.of(taken, None)


def test_what_is_no_keyword_is_refused(tmp_path: Path) -> None:
    for wrong in (0.5, True, {"a": 1}):
        made = MemoryCollection(given_data.keys()[:2], fields=[{"part": "a"}, {"part": wrong}])
        with pytest.raises(InvalidInput, match="whole numbers or texts; name another"):
            take_snapshot(made.partitioned(Partitions("part")), tmp_path / f"{wrong}"[:3])


def test_another_field_than_the_snapshots_is_refused(tmp_path: Path) -> None:
    taken = given_data.snapshot(tmp_path)
    for asked in ("topic", "native"):
        with pytest.raises(InvalidInput, match="has the partitions 'part', not"):
            train(taken, None, tmp_path / "run", TrainOptions(partitions=asked))
    with pytest.raises(InvalidInput, match="chooses no partitions"):
        train(taken, None, tmp_path / "run", TrainOptions(model="keynet"))
    plain = take_snapshot(given_data.collection(), tmp_path / "plain")
    with pytest.raises(SnapshotError, match="does not say where its keys belong"):
        train(plain, None, tmp_path / "run", TrainOptions(partitions="part"))
    assert not (tmp_path / "run").exists()


def test_values_by_the_thousand_are_scored_in_two_levels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In groups that hold alike contents; several heads are not tried where they cannot pay."""
    monkeypatch.setattr("amips_plugins.export.routers._MANY_CELLS", given_data.PARTS - 1)
    monkeypatch.setattr("amips_plugins.export.given._MANY_VALUES", given_data.PARTS - 1)
    monkeypatch.setattr("amips_plugins.export.given._MOST_MODEL", 0.0)
    monkeypatch.setattr("amips_plugins.export.routers.fewest_groups", lambda *_: 1.0)
    task, given = a_task(tmp_path)
    recipe = replace(PRESETS["default"]["linear"], schedule=Schedule(epochs=2, learning_rate=2e-2))
    _, linear = train_given(task, given, TrainOptions(), {"linear": recipe})
    assert isinstance(linear.net, TwoLevelRouter)
    assert linear.priority is not None
    (priority,) = OnnxModel(to_onnx(linear.net, task.keys.shape[1], task.metric, linear.order)).run(
        ["priority"], {"queries": task.test.queries}
    )
    np.testing.assert_allclose(priority, linear.priority(task.test), atol=2e-4, rtol=1e-4)
    asked = msgspec.structs.replace(TrainOptions(), model="supportnet")
    recipes = {"linear": recipe, "heads": replace(recipe, heads=4)}
    assert len(train_given(task, given, asked, recipes)) == 3
