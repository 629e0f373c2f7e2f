"""A watch over real searches: it finds out, says so, and stays out of the callers' way."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.memory import MemoryCollection
from amips_plugins.collection import Hit, SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.health.drift import WINDOW
from amips_plugins.health.gate import SLACK, WIDENINGS, Health
from amips_plugins.health.monitor import HealthMonitor, Watch
from amips_plugins.health.shadow_search import ServedQuery, search_wider, shadow_search
from amips_plugins.models.hooks import NativeHook, RouteHook
from amips_plugins.plan import EXACT, NATIVE, QueryPlan, Target
from amips_plugins.vectors import FloatArray
from tests.support.routing_data import Hook, logged
from tests.support.simulated_router import (
    DIM,
    RECALL,
    Driver,
    K,
    collection,
    keynet,
    mend,
    queries,
    reference,
    router,
    scramble,
)


def everything(**options: Any) -> HealthMonitor:
    """A watch that looks at every query."""
    eager = {"share": 1.0, "at_most_every": 0.0, "at_most_busy": 1.0, "drift_share": 1.0}
    return HealthMonitor(**{**eager, **options})


def state(watch: HealthMonitor) -> str:
    assert watch.health is not None
    return watch.health.state


# The whole way


@pytest.mark.slow
def test_cells_that_went_bad_are_noticed_and_their_mending_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[Health] = []
    watch = everything(on_change=told.append)
    driver = Driver(collection(), router(), watch, reference=reference())
    driver.run(queries(7, 550))
    assert state(watch) == "healthy"
    assert watch.health is not None
    assert watch.health.recall is not None
    assert watch.health.recall.mean >= RECALL
    assert watch.health.drift is not None
    assert not watch.health.drift.found

    scramble(driver.collection)  # type: ignore[arg-type] # it is in memory
    assert driver.run(queries(8, 60), "widened") <= 20
    assert driver.run(queries(9, 200), "native") <= 60
    (query,) = queries(10, 1)
    exact = driver.collection.exact(SearchRequest(query[None], K))[0]
    assert [hit.id for hit in driver.search(query, Target(K))] == [hit.id for hit in exact]
    driver.run(queries(11, 300))
    assert state(watch) == "native"

    mend(driver.collection)  # type: ignore[arg-type] # as above
    assert driver.run(queries(12, 1000), "widened") <= 300
    assert driver.run(queries(13, 2000), "healthy") <= 1000
    assert told[0].widening == WIDENINGS[-1]  # as far as that misses
    widenings = [health.widen for health in told]
    assert widenings == [4.0, math.inf, 4.0, 2.5, 1.5, 1.0]
    assert not watch.failures
    records = [record for record in caplog.records if record.name == "amips_plugins"]
    assert [record.levelno for record in records] == [
        logging.WARNING
    ] * 2  # the way back is no bad news
    fields = vars(records[0])
    assert records[0].getMessage() == (
        "The router of 'world' is widened 4 times; recall is below its target."
    )
    assert (fields["amips_collection"], fields["amips_state"]) == ("world", "widened")
    assert fields["amips_recall"] < 0.95


@pytest.mark.slow
def test_harder_queries_are_widened_and_stay_so() -> None:
    watch = everything()
    driver = Driver(collection(), router(), watch, reference=reference())
    driver.run(queries(14, 200, noise=0.35), "widened")
    driver.run(queries(15, 1200, noise=0.35))
    health = watch.health
    assert health is not None
    assert health.state == "widened"
    assert health.widening < WIDENINGS[-1]  # no further than it takes
    assert health.recall is not None
    assert health.recall.mean > RECALL - SLACK
    assert health.drift is not None
    assert health.drift.found


@pytest.mark.slow
def test_a_shift_that_costs_no_recall_costs_nothing() -> None:
    watch = everything()
    driver = Driver(collection(), router(), watch, reference=reference())
    driver.run(queries(16, 1200, noise=0.12))  # nearer to the keys
    health = watch.health
    assert health is not None
    assert health.drift is not None
    assert health.drift.found
    assert (health.state, health.reasons) == ("healthy", ())


@pytest.mark.slow
def test_the_recall_asked_for_is_the_target() -> None:
    watch = everything()
    driver = Driver(collection(), router(), watch)
    # Harder queries would miss the default target of .9, and reach .5 all the same.
    driver.run(queries(14, 400, noise=0.35), target=Target(K, recall=0.5))
    assert state(watch) == "healthy"


def coarse() -> RouteHook:
    """A router that knows no level between a few tenths of the keys and all of them."""
    hook, all_of_it = router(), router().calibration
    kept = (all_of_it.scanned <= 0.3) | np.isneginf(all_of_it.thresholds)
    calibration = replace(
        all_of_it,
        thresholds=all_of_it.thresholds[kept],
        recall=all_of_it.recall[:, kept],
        guaranteed=all_of_it.guaranteed[:, kept],
        scanned=all_of_it.scanned[kept],
    )
    return replace(hook, calibration=calibration)


@pytest.mark.slow
def test_widening_may_come_to_every_key() -> None:
    target, over = Target(K, recall=0.99), collection()
    (query,) = queries(19, 1)
    assert coarse().plan(query[None], target) is not NATIVE
    assert coarse().plan(query[None], replace(target, widen=WIDENINGS[-1])) is EXACT
    watch = everything()
    driver = Driver(over, coarse(), watch)
    scramble(over)
    driver.run(queries(20, 50), "widened", target)
    driver.run(queries(21, 200), target=target)
    assert state(watch) == "widened"
    mend(over)
    driver.run(queries(22, 1500), "healthy", target)


@pytest.mark.slow
def test_a_keynet_is_as_good_as_the_native_search_or_gone() -> None:
    watch = everything()
    Driver(collection(), keynet(), watch).run(queries(16, 300))
    assert state(watch) == "healthy"
    bad = Hook(lambda rows: QueryPlan(rewritten=-rows, rescore=20))
    driver = Driver(collection(), bad, watch)
    assert driver.run(queries(17, 60), "native") <= 40
    bad.give = lambda rows: QueryPlan(rewritten=rows, rescore=20)
    driver.run(queries(18, 1000), "healthy")


class Approximate(MemoryCollection):
    """A native search that is not exact: it finds four of the ten best keys."""

    def __init__(self, inner: MemoryCollection) -> None:
        self.__dict__ = inner.__dict__

    def search(self, request: SearchRequest, plan: QueryPlan = NATIVE) -> list[list[Hit]]:
        found = super().search(request, plan)
        return [hits[:4] for hits in found] if plan.cells is None else found

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        return super().search(request)


@pytest.mark.slow
def test_a_native_search_that_finds_less_does_not_take_over() -> None:
    over = Approximate(collection())
    scramble(over, 0.4)
    watch = everything()
    driver = Driver(over, router(), watch)
    driver.run(queries(14, 100), "widened")
    driver.run(queries(15, 800))
    health = watch.health
    assert health is not None
    assert health.recall is not None
    assert 0.5 < health.recall.low < health.recall.high < RECALL - 0.1
    assert health.state == "widened"


# What is examined


def sample_of(driver: Driver, query: FloatArray, **changes: Any) -> ServedQuery:
    request = SearchRequest(query[None], K)
    found = search_wider(1.0, driver.collection, driver.hook, Target(K), request)
    fields: dict[str, Any] = {
        "collection": driver.collection,
        "hook": driver.hook,
        "query": query,
        "target": Target(K),
        "found": found,
        "mode": "route",
        "widen": 1.0,
    }
    return ServedQuery(**{**fields, **changes})


def test_what_a_healthy_sample_shows() -> None:
    driver = Driver(collection(), router(), everything())
    for query in queries(20, 20):
        sample = sample_of(driver, query)
        shadow = shadow_search(sample, None, None)
        assert shadow is not None
        exact = {hit.id for hit in driver.collection.exact(SearchRequest(query[None], K))[0]}
        assert shadow.served.recall == len(exact & {hit.id for hit in sample.found}) / K
        assert (shadow.served.target, shadow.served.relative) == (RECALL, False)
        assert shadow.better is None


def test_what_a_native_answer_in_a_healthy_state_shows() -> None:
    driver = Driver(collection(), router(), everything())
    (query,) = queries(20, 1)
    assert shadow_search(sample_of(driver, query, mode="native"), None, None) is None
    # recall 1 has every cell searched, in whichever state
    whole = sample_of(driver, query, mode="native", widen=math.inf, target=Target(K, recall=1.0))
    assert shadow_search(whole, 4.0, None) is None


def test_a_short_answer_is_completed_as_the_router_does() -> None:
    over = collection()
    request = SearchRequest(queries(20, 1), K)
    tiny = Hook(lambda rows: QueryPlan(cells=np.full((len(rows), 1), -1), layout="cells1"))
    assert search_wider(1.0, over, tiny, Target(K), request) == over.search(request)[0]
    assert search_wider(1.0, over, NativeHook(), Target(K), request) is None


# Out of the way


class Failing(MemoryCollection):
    def __init__(self, inner: MemoryCollection) -> None:
        self.__dict__ = inner.__dict__

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        raise ConnectionError("the database is gone")


def test_a_failing_exact_search_is_counted_and_counts_for_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = everything()
    Driver(Failing(collection()), router(), watch).run(queries(21, 5))
    assert dict(watch.failures) == {"ConnectionError": 5}
    assert watch.health is not None
    assert (watch.health.state, watch.health.recall) == ("healthy", None)
    assert logged(caplog) == [
        "A sampled search cannot be repeated: ConnectionError: the database is gone"
    ]


class Slow(MemoryCollection):
    """An exact search that waits until it may go on."""

    def __init__(self, inner: MemoryCollection) -> None:
        self.__dict__ = {**inner.__dict__}
        self.go_on = threading.Event()
        self.at_once = self.most_at_once = self.asked = 0
        self.timeouts: set[float | None] = set()

    def exact(self, request: SearchRequest) -> list[list[Hit]]:
        self.asked += 1
        self.timeouts.add(request.timeout)
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        assert self.go_on.wait(20)
        self.at_once -= 1
        return super().exact(request)


def test_callers_wait_for_nothing_and_what_is_too_much_is_left_aside() -> None:
    over = Slow(collection())
    watch = everything(timeout=3.0)
    driver = Driver(over, router(), watch)
    for query in queries(22, 40):
        driver.search(query, Target(K))  # would not return if it waited
    over.go_on.set()
    assert watch.idle(20)
    assert 1 <= over.asked <= 5
    assert over.most_at_once == 1
    assert over.timeouts == {3.0}


def test_samples_are_apart_in_time() -> None:
    over = Slow(collection())
    over.go_on.set()
    driver = Driver(over, router(), everything(at_most_every=3600.0))
    driver.run(queries(22, 20))
    assert over.asked == 1


def test_the_database_is_left_to_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("amips_plugins.health.monitor.time.monotonic", lambda: clock[0])

    class Dear(MemoryCollection):
        def exact(self, request: SearchRequest) -> list[list[Hit]]:
            clock[0] += 2.0
            asked.append(clock[0])
            return super().search(request)

    asked: list[float] = []
    over = Dear(np.eye(DIM, dtype=np.float32))
    over.__dict__.update(collection().__dict__)
    driver = Driver(over, router(), everything(at_most_busy=0.1))
    for query in queries(22, 100):
        driver.search(query, Target(K))
        assert driver.watch.idle(20)
        clock[0] += 1.0
    # Two seconds of work, then eighteen of rest.
    gaps = np.diff(asked)
    assert len(asked) >= 5
    assert set(gaps) <= {20.0, 21.0}


def test_the_coin() -> None:
    # Ten times the share: what is done with it depends on what there is to decide.
    watch = HealthMonitor(share=0.001, drift_share=0.0)
    assert not any(watch.chosen() for _ in range(1000))  # nothing is watched
    watch.begin(Watch(collection(), router()))
    assert 60 <= sum(watch.chosen() for _ in range(10_000)) <= 140
    assert 700 <= sum(watch.chosen(8) for _ in range(10_000)) <= 900
    watch.begin(None)
    assert watch.health is None
    assert not any(watch.chosen(64) for _ in range(1000))


@pytest.mark.slow
def test_both_purposes_get_their_share() -> None:
    over = Slow(collection())
    over.go_on.set()
    watch = everything(share=0.1, drift_share=0.5)
    driver = Driver(over, router(), watch, reference=reference())
    driver.run(queries(23, 1500))
    assert 110 <= over.asked <= 190
    assert watch.health is not None
    assert watch.health.drift is not None
    assert watch.health.drift.n == 500


@pytest.mark.slow
def test_repeated_queries_are_no_drift() -> None:
    """Popular questions, and one that is asked all the time, are of the population trained on."""
    known, rng = queries(30, 900), np.random.default_rng(30)
    popular = 1.0 / np.arange(1, len(known) + 1)
    rows = rng.choice(len(known), 4000, p=popular / popular.sum())
    rows[rng.random(len(rows)) < 0.5] = 7
    watch = everything(share=0.0)
    driver = Driver(collection(), router(), watch, reference=reference())
    driver.run(known[rows])
    assert watch.health is not None
    assert watch.health.drift is not None  # there were enough that differ
    assert watch.health.drift.n == WINDOW
    assert not watch.health.drift.found
    assert state(watch) == "healthy"
    few = Driver(collection(), router(), watch, reference=reference())
    few.run(np.tile(known[:250], (4, 1)))  # a list of questions, over and over
    assert watch.health.drift is None


def test_foreign_queries_are_drift_however_often_they_come() -> None:
    foreign = np.repeat(-np.abs(queries(31, 600)), 3, axis=0)
    watch = everything(share=0.0)
    Driver(collection(), router(), watch, reference=reference()).run(foreign)
    assert watch.health is not None
    assert watch.health.drift is not None
    assert watch.health.drift.found


def test_a_sample_is_of_what_is_watched_now() -> None:
    watch = everything()
    before = Driver(collection(), router(), watch)
    (query,) = queries(24, 1)
    sample = sample_of(before, query)
    Driver(collection(), router(), watch)
    watch.sample(before.watched, sample)
    assert watch.idle(20)
    assert watch.health is not None
    assert watch.health.recall is None


def test_starting_over_is_healthy_and_said() -> None:
    told: list[Health] = []
    watch = everything(on_change=told.append)
    driver = Driver(collection(), router(), watch)
    watch.add_overflow(0.9, 0.4)
    Driver(collection(), driver.hook, watch)
    assert [health.state for health in told] == ["native", "healthy"]
    watch.begin(None)
    watch.add_overflow(0.9, 0.4)
    assert watch.health is None


def test_the_vector_is_copied() -> None:
    over = Slow(collection())
    watch = everything()
    driver = Driver(over, router(), watch)
    (query,) = queries(25, 1)
    watch.sample(driver.watched, sample_of(driver, query))
    query[:] = np.nan
    over.go_on.set()
    assert watch.idle(20)
    assert not watch.failures
    assert watch.health is not None
    assert watch.health.recall is not None


def test_a_failing_listener_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_: Health) -> None:
        raise RuntimeError("no listener")

    watch = everything(on_change=fail, on_health=fail)
    Driver(collection(), router(), watch)
    for share in (0.9, 0.0, 0.9):
        watch.add_overflow(share, 0.4)
    assert state(watch) == "native"
    said = [line for line in logged(caplog) if "no listener" in line]
    assert said == [
        "on_health fails, and is called on all the same: no listener",
        "on_change fails, and is called on all the same: no listener",
    ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"share": 2.0}, "share=2.0"),
        ({"drift_share": -0.1}, "drift_share"),
        ({"at_most_every": -1.0}, "at_most_every"),
        ({"at_most_busy": 0.0}, "at_most_busy"),
        ({"timeout": 0.0}, "timeout"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        HealthMonitor(**options)  # type: ignore[arg-type] # that is the point


# Forks


def in_child(work: Any) -> None:
    """Run something in a forked process, and fail if it does not end well in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    watchdog = threading.Timer(30, os.kill, (child, 9))
    watchdog.start()
    _, status = os.waitpid(child, 0)
    watchdog.cancel()
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_amid_an_examination_leaves_a_child_that_works() -> None:
    over = Slow(collection())
    watch = everything()
    driver = Driver(over, router(), watch)
    watch.add_overflow(0.9, 0.4)
    watch.add_overflow(0.0, 0.4)
    for query in queries(26, 4):
        driver.search(query, Target(K))

    def work() -> None:
        over.go_on = threading.Event()
        over.go_on.set()
        driver.run(queries(27, 20))
        assert watch.health is not None
        assert watch.health.recall is not None
        assert watch.health.recall.n == 20

    in_child(work)
    over.go_on.set()
    assert watch.idle(20)
    assert watch.health is not None
    assert watch.health.recall is not None


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.slow
def test_forks_while_evidence_is_weighed() -> None:
    watch = everything()
    driver = Driver(collection(), router(), watch)
    stop = threading.Event()

    def weigh() -> None:
        while not stop.is_set():
            for share in (0.9, 0.0):
                watch.add_overflow(share, 0.4)

    weighing = threading.Thread(target=weigh)
    weighing.start()
    try:
        for _ in range(10):
            in_child(lambda: watch.add_overflow(0.9, 0.4))
    finally:
        stop.set()
        weighing.join()
    driver.run(queries(28, 3))


def test_many_threads_share_a_watch() -> None:
    watch = everything(share=0.5)
    driver = Driver(collection(), router(), watch, reference=reference())
    failed: list[Exception] = []

    def search(rows: Sequence[FloatArray]) -> None:
        try:
            for query in rows:
                driver.search(query, Target(K))
        except Exception as exc:  # noqa: BLE001 - shown below
            failed.append(exc)

    threads = [
        threading.Thread(target=search, args=(list(queries(seed, 60)),)) for seed in range(8)
    ]
    for thread in threads:
        thread.start()
    for _ in range(5):
        driver.begin(reference())
    for thread in threads:
        thread.join()
    assert watch.idle(20)
    assert not failed
    assert not watch.failures
