"""Models that hang or are slow, deadlines, and what is set aside for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from amips_plugins import LearnedRouter
from amips_plugins.background import circuit_breaker as breaker
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import NATIVE, QueryPlan
from amips_plugins.vectors import FloatArray
from tests.support.bundles import (
    DIM,
    N_CELLS,
    laid_out,
    memory,
    replace_model,
    vectors,
    write_bundle,
)
from tests.support.routing_data import QUERIES, Hook, Spy, assert_native, logged


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


class Clock:
    """The breaker's clock, which moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(breaker, "time", clock)
    return clock


@pytest.fixture
def hanging() -> Iterator[Hook]:
    """A hook that never answers while the test runs."""
    over = threading.Event()

    def hang(_: FloatArray) -> QueryPlan:
        over.wait()
        return QueryPlan()

    yield Hook(hang)
    over.set()


def test_a_hook_that_hangs_is_waited_for_so_long_and_no_longer(hanging: Hook) -> None:
    router = LearnedRouter(memory(), hook=hanging, plan_timeout=0.05)
    assert_native(router, "model: TimeoutError")


def test_a_hook_that_hangs_takes_a_quarter_of_the_callers_time(hanging: Hook) -> None:
    spy = Spy(memory())
    router = LearnedRouter(spy, hook=hanging, plan_timeout=100.0)
    hits = router.search(QUERIES[0], k=5, timeout=2.0)
    assert hits.trace.fallback == "model: TimeoutError"
    ((request, plan),) = spy.asked
    assert plan is NATIVE
    assert request.timeout == 2.0  # the caller's own arguments


def test_a_hook_that_hangs_is_soon_not_asked(
    hanging: Hook, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    hook = Hook(lambda queries: asked.append(1) or hanging.plan(queries, None))  # type: ignore[func-returns-value,arg-type]
    router = LearnedRouter(memory(), hook=hook, plan_timeout=0.01)
    for _ in range(20):
        router.search(QUERIES[0], k=5)
    assert len(asked) == 5
    assert router.fallbacks == {"model: TimeoutError": 5, "breaker: model": 15}
    assert len(logged(caplog)) == 3  # the reason, the rest, the reason from then on
    clock.now += 1.01
    for _ in range(5):
        router.search(QUERIES[0], k=5)
    assert len(asked) == 6  # one trial


def test_a_model_that_recovers_is_used_again(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    broken = [True]

    def plan(queries: FloatArray) -> QueryPlan:
        if broken[0]:
            raise RuntimeError("out of memory")
        return QueryPlan(rewritten=queries, rescore=30)

    router = LearnedRouter(memory(), hook=Hook(plan))
    for _ in range(6):
        assert_native(router, "")
    broken[0] = False
    assert router.search(QUERIES[0], k=3).trace.fallback == "breaker: model"
    clock.now += 1.01
    assert router.search(QUERIES[0], k=3).trace.mode == "rewrite"
    assert router.search(QUERIES[0], k=3).trace.mode == "rewrite"
    assert "again." in logged(caplog)[-1]
    broken[0] = True
    before = len(logged(caplog))
    assert_native(router, "model: RuntimeError")
    assert len(logged(caplog)) == before + 1  # news again


def test_one_odd_query_in_many_does_not_set_the_model_aside() -> None:
    count = [0]

    def plan(queries: FloatArray) -> QueryPlan:
        count[0] += 1
        if count[0] % 2:
            raise RuntimeError("odd")
        return QueryPlan(rewritten=queries, rescore=30)

    router = LearnedRouter(memory(), hook=Hook(plan))
    modes = [router.search(QUERIES[0], k=3).trace.mode for _ in range(40)]
    assert modes == ["native", "rewrite"] * 20


def test_routed_searches_that_fail_are_set_aside(
    folder: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Spy):
        broken = True

        def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
            self.asked.append((request, plan))
            if plan.cells is not None and self.broken:
                raise ConnectionError("partition gone")
            return super().search(request, plan)

    spy = Broken(laid_out(folder))
    router = LearnedRouter(spy, bundle=folder, refresh=None)
    for _ in range(10):
        assert_native(router, "")
    assert router.fallbacks == {"search: ConnectionError": 5, "breaker: search": 5}
    Broken.broken = False
    clock.now += 1.01
    assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"
    assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"
    assert "again." in logged(caplog)[-1]


@pytest.mark.usefixtures("clock")
def test_routed_searches_that_take_all_the_time_are_set_aside(folder: Path) -> None:
    class Slow(Spy):
        def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
            if plan.cells is not None:
                assert request.timeout is not None
                time.sleep(request.timeout)
                raise TimeoutError("too slow")
            return super().search(request, plan)

    router = LearnedRouter(Slow(laid_out(folder)), bundle=folder, refresh=None)
    for _ in range(5):
        with pytest.raises(TimeoutError, match="too slow"):
            router.search(QUERIES[0], k=3, n_probes=2, timeout=0.02)
    assert router.search(QUERIES[0], k=3, n_probes=2, timeout=5.0).trace.fallback == (
        "breaker: search"
    )


def test_a_database_that_is_down_is_not_held_against_the_plan(folder: Path) -> None:
    spy = Spy(laid_out(folder), [ConnectionError("down")] * 40)
    router = LearnedRouter(spy, bundle=folder, refresh=None)
    for _ in range(20):
        with pytest.raises(ConnectionError):
            router.search(QUERIES[0], k=3, n_probes=2)
    assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"


def heavy(width: int, layers: int) -> bytes:
    """A sound router that takes long: one large matrix, used time and again."""
    rng = np.random.default_rng(0)
    constants = [
        numpy_helper.from_array(rng.standard_normal((width, DIM)).astype(np.float32), "first"),
        numpy_helper.from_array(
            (rng.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32), "again"
        ),
        numpy_helper.from_array(np.zeros((N_CELLS, width), dtype=np.float32), "last"),
    ]
    names = ["queries", *(f"x{at}" for at in range(layers + 1)), "priority"]
    weights = ["first", *["again"] * layers, "last"]
    nodes = [
        helper.make_node("Gemm", [names[at], weight], [names[at + 1]], transB=1)
        for at, weight in enumerate(weights)
    ]
    graph = helper.make_graph(
        nodes,
        "heavy",
        [helper.make_tensor_value_info("queries", TensorProto.FLOAT, ["n", DIM])],
        [helper.make_tensor_value_info("priority", TensorProto.FLOAT, ["n", N_CELLS])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def test_a_bundle_whose_model_is_slow(tmp_path: Path) -> None:
    # 7e7 multiplications a query: a millisecond on any machine
    folder = write_bundle(tmp_path / "heavy", change=replace_model(heavy(1024, 64)))
    router = LearnedRouter(laid_out(folder), bundle=folder, plan_timeout=1e-4)
    # The caller itself may be put aside for as long as the model takes: then the plan is there.
    asked = [router.search(vectors(seed=3, count=1)[0], k=3, n_probes=2) for _ in range(20)]
    assert "model: TimeoutError" in [hits.trace.fallback for hits in asked]
    assert [len(hits) for hits in asked] == [3] * 20


def test_the_model_can_be_switched_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    router = LearnedRouter(laid_out(folder), bundle=folder)
    router.enabled = False
    assert_native(router, "disabled")
    router.enabled = True
    assert router.search(QUERIES[0], k=3, n_probes=2).trace.mode == "route"
    monkeypatch.setenv("AMIPS_DISABLED", "1")
    assert_native(LearnedRouter(laid_out(folder), bundle=folder), "disabled")
    monkeypatch.setenv("AMIPS_DISABLED", "0")
    assert LearnedRouter(laid_out(folder), bundle=folder).enabled


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
def test_a_plan_timeout_that_is_none(seconds: float) -> None:
    with pytest.raises(InvalidInput, match="plan_timeout"):
        LearnedRouter(memory(), plan_timeout=seconds)


def test_a_hook_never_gets_the_callers_own_array() -> None:
    def spoil(queries: FloatArray) -> QueryPlan:
        queries[:] = 0.0
        return QueryPlan()

    mine = QUERIES.copy()
    LearnedRouter(memory(), hook=Hook(spoil)).search(mine, k=3)
    np.testing.assert_array_equal(mine, QUERIES)
