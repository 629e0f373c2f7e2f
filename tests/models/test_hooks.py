from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from amips_plugins.bundle.contents import MODEL
from amips_plugins.bundle.loading import load_hook
from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.models.hooks import (
    ModelFault,
    NativeHook,
    RewriteHook,
    RouteHook,
    best_cells,
    cells_above,
)
from amips_plugins.models.onnx_session import OnnxModel
from amips_plugins.plan import EXACT, NATIVE, PreQueryHook, QueryPlan, Target
from amips_plugins.vectors import FloatArray, Metric, native_scores
from tests.support.bundles import DIM, N_CELLS, K, make_files, open_bundle, vectors, write_bundle
from tests.support.terminal import written

QUERIES = vectors(seed=5, count=7)


def graph(inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], fill: float = 0.0) -> bytes:
    """A model whose outputs are ``fill``, whatever the queries are."""

    def info(name: str, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes, constants = [], []
    for name, shape in outputs.items():
        width = shape[-1] if isinstance(shape[-1], int) else 1
        plain = np.isfinite(fill)
        # A constant that is not finite would be refused; a division by zero shows in a search.
        divisor = 1.0 if plain else 0.0
        top = fill if plain else np.sign(np.nan_to_num(fill))
        values = {"zeros": np.zeros((width, DIM)), "top": top, "divisor": divisor}
        for part, value in values.items():
            array = np.asarray(value, dtype=np.float32)
            constants.append(numpy_helper.from_array(array, f"{name}_{part}"))
        steps = [
            ("Gemm", next(iter(inputs)), f"{name}_zeros", f"{name}_wide"),
            ("Add", f"{name}_wide", f"{name}_top", f"{name}_moved"),
            ("Div", f"{name}_moved", f"{name}_divisor", name),
        ]
        for op, x, y, z in steps:
            attributes: dict[str, Any] = {"transB": 1} if op == "Gemm" else {}
            nodes.append(helper.make_node(op, [x, y], [z], **attributes))
    made = helper.make_graph(
        nodes,
        "test",
        [info(name, shape) for name, shape in inputs.items()],
        [info(name, shape) for name, shape in outputs.items()],
        constants,
    )
    opset = [helper.make_opsetid("", 17)]
    data: bytes = helper.make_model(made, opset_imports=opset, ir_version=8).SerializeToString()
    return data


ROUTER_IN: dict[str, list[Any]] = {"queries": ["n", DIM]}
ROUTER_OUT: dict[str, list[Any]] = {"priority": ["n", N_CELLS]}


def replace_model(data: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(files: dict[str, bytes]) -> None:
        files[MODEL] = data

    return change


@pytest.fixture(scope="module")
def route(tmp_path_factory: pytest.TempPathFactory) -> RouteHook:
    hook = load_hook(open_bundle(write_bundle(tmp_path_factory.mktemp("bundle"))))
    assert isinstance(hook, RouteHook)
    return hook


@pytest.fixture(scope="module")
def rewrite(tmp_path_factory: pytest.TempPathFactory) -> RewriteHook:
    folder = write_bundle(tmp_path_factory.mktemp("bundle"), model="keynet")
    hook = load_hook(open_bundle(folder))
    assert isinstance(hook, RewriteHook)
    return hook


def test_all_are_hooks(route: RouteHook, rewrite: RewriteHook) -> None:
    for hook in (route, rewrite, NativeHook()):
        assert isinstance(hook, PreQueryHook)


def test_the_native_hook_plans_nothing() -> None:
    assert NativeHook().plan(QUERIES, Target(k=3, recall=0.5)) is NATIVE


@pytest.mark.parametrize("n_probes", [1, 2, N_CELLS - 1])
def test_a_route_names_the_best_cells_first(route: RouteHook, n_probes: int) -> None:
    plan = route.plan(QUERIES, Target(k=3, n_probes=n_probes))
    assert plan.rewritten is None
    assert plan.layout == route.layout
    assert plan.cells is not None
    assert plan.cells.shape == (len(QUERIES), n_probes)
    (priority,) = route.model.run(["priority"], {"queries": QUERIES})
    np.testing.assert_array_equal(plan.cells, np.argsort(-priority, axis=1)[:, :n_probes])


def test_the_best_cells_are_searched_farther(route: RouteHook) -> None:
    (priority,) = route.model.run(["priority"], {"queries": QUERIES})
    n_levels = len(route.calibration.thresholds)
    least = float(np.median(priority.max(axis=1)))  # half of the queries have no cell above it
    calibration = replace(
        route.calibration,
        efforts=np.full(n_levels, 64),
        near=np.full(n_levels, least, dtype=np.float32),
        far_efforts=np.full(n_levels, 16),
    )
    plan = replace(route, calibration=calibration).plan(QUERIES, Target(k=3))
    assert plan.effort == 64
    assert plan.cells is not None
    assert plan.efforts is not None
    for cells, efforts, own in zip(plan.cells, plan.efforts, priority, strict=True):
        for cell, effort in zip(cells, efforts, strict=True):
            if cell >= 0:
                near = own[cell] >= least or cell == own.argmax()
                assert effort == (64 if near else 16)
    by_number = replace(route, calibration=calibration).plan(QUERIES, Target(k=3, n_probes=2))
    assert by_number.efforts is None
    assert route.plan(QUERIES, Target(k=3)).efforts is None


def test_a_batch_is_planned_as_its_queries(route: RouteHook, rewrite: RewriteHook) -> None:
    target = Target(k=3)
    cells, rewritten = route.plan(QUERIES, target).cells, rewrite.plan(QUERIES, target).rewritten
    assert cells is not None
    assert rewritten is not None
    assert len(set((cells >= 0).sum(axis=1))) > 1  # each query has its own number
    for row in range(len(QUERIES)):
        one = QUERIES[row : row + 1]
        planned = route.plan(one, target).cells
        assert planned is not None
        assert planned[0].tolist() == [cell for cell in cells[row].tolist() if cell >= 0]
        alone = rewrite.plan(one, target).rewritten
        assert alone is not None
        np.testing.assert_allclose(alone, rewritten[row : row + 1], rtol=1e-6)


@pytest.mark.parametrize("n_probes", [N_CELLS, N_CELLS + 1, 10**9])
def test_every_cell_is_the_native_search(route: RouteHook, n_probes: int) -> None:
    assert route.plan(QUERIES, Target(k=3, n_probes=n_probes)) is NATIVE
    assert route.plan(QUERIES, Target(k=3, recall=1.0)) is EXACT


@pytest.mark.parametrize("recall", [0.3, 0.5, 0.8, 0.9, None])
@pytest.mark.parametrize("k", [1, 3, K])
def test_cells_come_from_the_target(route: RouteHook, k: int, recall: float | None) -> None:
    if recall is None:
        threshold = route.calibration.default_threshold(k, route.default_recall)
    else:
        threshold = route.calibration.threshold(k, recall)
    (priority,) = route.model.run(["priority"], {"queries": QUERIES})
    plan = route.plan(QUERIES, Target(k=k, recall=recall))
    assert plan.recall == (route.default_recall if recall is None else recall)
    assert route.plan(QUERIES, Target(k=k, recall=recall, n_probes=1)).recall is None
    assert (plan.layout, plan.rewritten) == (route.layout, None)
    assert threshold > -np.inf
    np.testing.assert_array_equal(plan.cells, cells_above(priority, threshold))


def test_more_recall_is_more_cells(route: RouteHook) -> None:
    counts, sets = [], []
    for recall in (0.3, 0.7, 0.9, 0.95):
        cells = route.plan(QUERIES, Target(k=5, recall=recall)).cells
        assert cells is not None
        counts.append(int((cells >= 0).sum()))
        sets.append([set(row) - {-1} for row in cells.tolist()])
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]
    for narrow, wide in itertools.pairwise(sets):
        assert all(few <= many for few, many in zip(narrow, wide, strict=True))


def test_a_widened_plan_searches_so_many_times_the_share_of_the_keys(route: RouteHook) -> None:
    planned = route.plan(QUERIES, Target(K, 0.5))
    assert planned.cells is not None
    for factor in (1.5, 2.0):
        wider = route.plan(QUERIES, Target(K, 0.5, widen=factor))
        assert wider.cells is not None
        assert (wider.cells >= 0).sum() > (planned.cells >= 0).sum()
        for few, more in zip(planned.cells.tolist(), wider.cells.tolist(), strict=True):
            assert set(few) <= {*more, -1}
    assert route.plan(QUERIES, Target(K, 0.5, widen=100.0)) is EXACT
    assert route.plan(QUERIES, Target(K, widen=np.inf)) is NATIVE


def test_probes_of_the_callers_own_are_never_widened(route: RouteHook) -> None:
    for factor in (4.0, np.inf):
        plan = route.plan(QUERIES, Target(K, n_probes=2, widen=factor))
        assert plan.cells is not None
        assert plan.cells.shape == (len(QUERIES), 2)


def test_probes_override_the_target(route: RouteHook) -> None:
    cells = route.plan(QUERIES, Target(k=3, recall=0.9, n_probes=2)).cells
    assert cells is not None
    assert cells.shape == (len(QUERIES), 2)


@pytest.mark.parametrize("recall", [None, 0.99999])
def test_what_cannot_be_promised_is_the_native_search_and_says_so(
    route: RouteHook, recall: float | None
) -> None:
    bold = replace(route, default_recall=0.99999)
    assert bold.plan(QUERIES, Target(3, recall)) == QueryPlan(reason="target: not promised")
    deep = QueryPlan(reason="target: k not calibrated")
    assert route.plan(QUERIES, Target(K + 1, recall)) == deep
    assert route.plan(QUERIES, Target(K + 1, 1.0)) is EXACT  # as was asked for
    assert route.plan(QUERIES, Target(K + 1, n_probes=2)).cells is not None


def naive_cells_above(priority: FloatArray, threshold: float) -> list[set[int]]:
    """One query after the other, as the docstring says it."""
    result = []
    for row in priority.tolist():
        best = max(range(len(row)), key=row.__getitem__)
        result.append({cell for cell, value in enumerate(row) if value >= threshold} | {best})
    return result


@given(
    priority=arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 7)),
        # Few values, so that ties and equality with the threshold are frequent.
        elements=st.sampled_from([-30.0, -2.5, -1.0, -0.5, 0.0]),
    ),
    threshold=st.sampled_from([-np.inf, -31.0, -30.0, -2.5, -0.75, 0.0, 3.0]),
)
@settings(max_examples=300, deadline=None)
def test_cells_above_are_those_of_a_naive_loop(priority: FloatArray, threshold: float) -> None:
    before = priority.copy()
    cells = cells_above(priority, threshold)
    expected = naive_cells_above(priority, threshold)
    assert cells.dtype == np.int64
    assert cells.shape == (len(priority), max(len(chosen) for chosen in expected))
    for row, chosen in zip(cells.tolist(), expected, strict=True):
        assert row == sorted(chosen) + [-1] * (len(row) - len(chosen))
    np.testing.assert_array_equal(priority, before)
    for number in range(len(priority)):  # a query is planned alone as in a batch
        alone = cells_above(priority[number : number + 1], threshold)
        assert alone.dtype == np.int64
        assert alone.tolist() == [sorted(expected[number])]


@given(seed=st.integers(0, 10**6), steps=st.sampled_from([2, 9, 10**6]))
@settings(max_examples=60, deadline=None)
def test_large_batches_are_chosen_for_as_by_a_naive_loop(seed: int, steps: int) -> None:
    """At sizes that are served, with many ties, some and none."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 130)), int(rng.integers(1, 600)))
    priority = (rng.integers(-steps, 1, size=shape) / 64).astype(np.float32)
    for threshold in (float(np.quantile(priority, 0.97)), float(priority.max())):
        rows = [sorted(chosen) for chosen in naive_cells_above(priority, threshold)]
        most = max(map(len, rows))
        wanted = [row + [-1] * (most - len(row)) for row in rows]
        assert cells_above(priority, threshold).tolist() == wanted
    n_probes = int(rng.integers(1, shape[1] + 1))
    ordered = np.argsort(-priority, axis=1, kind="stable")
    best = best_cells(priority, n_probes)
    assert best.dtype == np.int64
    np.testing.assert_array_equal(best, ordered[:, :n_probes])


@given(
    priority=arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 7)),
        elements=st.sampled_from([-30.0, -1.0, -0.0, 0.0, 1.0, 3e38]),
    ),
    n_probes=st.integers(1, 7),
)
@settings(max_examples=300, deadline=None)
def test_the_best_cells_are_those_of_a_stable_sort(priority: FloatArray, n_probes: int) -> None:
    n_probes = min(n_probes, priority.shape[1])
    before = priority.copy()
    ordered = np.argsort(-priority, axis=1, kind="stable")
    np.testing.assert_array_equal(best_cells(priority, n_probes), ordered[:, :n_probes])
    np.testing.assert_array_equal(priority, before)


def test_the_best_cell_is_always_searched() -> None:
    priority = np.array([[-9.0, -7.0, -8.0], [-3.0, -1.0, -2.0]], dtype=np.float32)
    assert cells_above(priority, -1.5).tolist() == [[1], [1]]
    assert cells_above(priority, 5.0).tolist() == [[1], [1]]
    assert cells_above(priority, -2.0).tolist() == [[1, -1], [1, 2]]
    assert cells_above(priority, -np.inf).tolist() == [[0, 1, 2], [0, 1, 2]]
    # The threshold itself is reached.
    assert cells_above(priority[:1], -8.0).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    "target",
    [Target(k=3, n_probes=0), Target(k=3, recall=1.5), Target(k=K + 1, recall=-0.5)],
)
def test_a_target_that_makes_no_sense(route: RouteHook, target: Target) -> None:
    with pytest.raises(InvalidInput):
        route.plan(QUERIES, target)


@pytest.mark.parametrize("target", [Target(k=3, n_probes=4), Target(k=3, recall=0.9)])
def test_a_rewrite_leaves_the_probes_to_the_index(rewrite: RewriteHook, target: Target) -> None:
    with pytest.raises(InvalidInput, match="params="):
        rewrite.plan(QUERIES, target)


def test_an_untrained_residual_keynet_asks_for_the_direction_of_the_query(
    rewrite: RewriteHook,
) -> None:
    plan = rewrite.plan(QUERIES, Target(k=3))
    assert plan.cells is None
    assert plan.rescore == RewriteHook.candidates(3) == 100
    assert RewriteHook.candidates(100) == 2000
    assert plan.rewritten is not None
    assert plan.rewritten.dtype == np.float32
    for query, rewritten in zip(QUERIES, plan.rewritten, strict=True):
        cosine = native_scores(query, rewritten[None], Metric.COSINE)
        np.testing.assert_allclose(cosine, 1.0, atol=1e-6)


@pytest.mark.parametrize("fill", [3e38, -3e38])
@pytest.mark.parametrize("target", [Target(k=1), Target(k=1, n_probes=1)])
def test_huge_numbers_that_are_finite_are_an_answer(
    fill: float, target: Target, route: RouteHook
) -> None:
    """Their sum is infinite."""
    hook = replace(route, model=OnnxModel(graph(ROUTER_IN, ROUTER_OUT, fill)))
    everything = list(range(N_CELLS)) if fill > 0 and target.n_probes is None else [0]
    for queries in (QUERIES[:1], QUERIES):
        plan = hook.plan(queries, target)
        assert plan.cells is not None
        assert plan.cells.tolist() == [everything] * len(queries)  # all are equal: the first


def test_one_cell_that_is_not_finite_is_a_fault(route: RouteHook) -> None:
    for top in (0.0, 1.0, -1.0):  # a division by zero makes NaN or an infinity of it
        made = onnx.load_from_string(graph(ROUTER_IN, ROUTER_OUT))
        for tensor in made.graph.initializer:
            row = np.ones(N_CELLS, dtype=np.float32)
            if tensor.name == "priority_top":
                row[2] = top
                tensor.CopyFrom(numpy_helper.from_array(row, tensor.name))
            if tensor.name == "priority_divisor":
                row[2] = 0.0
                tensor.CopyFrom(numpy_helper.from_array(row, tensor.name))
        hook = replace(route, model=OnnxModel(made.SerializeToString()))
        for target in (Target(k=1), Target(k=1, n_probes=1)):
            for queries in (QUERIES[:1], QUERIES):
                with pytest.raises(ModelFault, match="not finite"):
                    hook.plan(queries, target)


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), float("-inf")])
def test_output_that_is_not_finite_is_a_fault(fill: float, route: RouteHook) -> None:
    router = OnnxModel(graph(ROUTER_IN, ROUTER_OUT, fill))
    with pytest.raises(ModelFault, match="not finite"):
        replace(route, model=router).plan(QUERIES, Target(k=1, n_probes=1))
    keynet = OnnxModel(graph({"queries": ["n", DIM]}, {"rewritten": ["n", DIM]}, fill))
    with pytest.raises(ModelFault, match="not finite"):
        RewriteHook(keynet).plan(QUERIES, Target(k=1))


@pytest.mark.parametrize(
    "model",
    [
        graph({"queries": ["n", DIM + 1]}, ROUTER_OUT),
        graph({**ROUTER_IN, "n_probes": [1]}, ROUTER_OUT),
        graph({"query": ["n", DIM]}, ROUTER_OUT),
        graph({"queries": []}, ROUTER_OUT),
        graph(ROUTER_IN, {"scores": ["n", N_CELLS]}),
        graph(ROUTER_IN, {"priority": ["n", N_CELLS + 1]}),
        graph(ROUTER_IN, {"priority": ["n", "p"]}),
        graph(ROUTER_IN, {"rewritten": ["n", DIM]}),
    ],
)
def test_a_model_of_other_inputs_or_outputs_is_refused(tmp_path: Path, model: bytes) -> None:
    folder = write_bundle(tmp_path, change=replace_model(model))
    with pytest.raises(BundleCorrupt, match=r"not what a linear must|model is refused"):
        load_hook(open_bundle(folder))


def test_a_keynet_of_another_dimension_is_refused(tmp_path: Path) -> None:
    model = graph({"queries": ["n", DIM]}, {"rewritten": ["n", DIM + 1]})
    folder = write_bundle(tmp_path, model="keynet", change=replace_model(model))
    with pytest.raises(BundleCorrupt, match="not what a keynet must"):
        load_hook(open_bundle(folder))


@pytest.mark.parametrize("data", [b"", b"no model", make_files()[MODEL][:100]])
def test_what_is_no_model_is_refused(
    tmp_path: Path, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_bundle(tmp_path, change=replace_model(data))
    with pytest.raises(BundleCorrupt, match="model is refused"):
        load_hook(open_bundle(folder))
    assert written(capfd) == ""  # nor does the runtime write to the terminal


def test_external_data_is_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(make_files()[MODEL])
    onnx.save(
        model, tmp_path / "model.onnx", save_as_external_data=True, location="w", size_threshold=0
    )
    folder = write_bundle(
        tmp_path / "b", change=replace_model((tmp_path / "model.onnx").read_bytes())
    )
    with pytest.raises(BundleCorrupt, match="model is refused"):
        load_hook(open_bundle(folder))


def test_what_serves_computes_nothing_else(route: RouteHook, rewrite: RewriteHook) -> None:
    assert route.model.outputs == {"priority": ["n", N_CELLS]}
    assert rewrite.model.outputs == {"rewritten": ["n", DIM]}
    for hook in (route, rewrite):
        assert hook.model.inputs == {"queries": ["n", DIM]}
