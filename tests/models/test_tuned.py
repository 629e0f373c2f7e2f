from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.models.tuned import EffortParameter, TunedHook, check_tuned
from amips_plugins.plan import Target
from tests.support.tuned import optimistic

QUERIES = np.zeros((2, 4), dtype=np.float32)


def hook(name: str = "hnsw_ef", *, rescored: bool = False) -> TunedHook:
    made = optimistic([16, 32, 64, 128])
    made.guaranteed[:] = np.array([0.8, 0.9, 0.95, 0.98, 1.0], dtype=np.float32)
    return TunedHook(EffortParameter(name, rescored), made, 0.9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "effort"),
    [
        (Target(10, 0.5), 16),
        (Target(10, 0.9), 32),
        (Target(10), 32),
        (Target(10, 0.95), 64),
        (Target(40), 40),  # a graph keeps as many candidates as there are to be hits
        (Target(10, 0.9, widen=1.5), 64),
        (Target(10, 0.9, widen=2.5), 128),
        (Target(10, 0.98, widen=4.0), 128),  # there is nothing wider
    ],
)
def test_the_least_effort_that_is_promised_and_as_many_times_as_much(
    target: Target, effort: int
) -> None:
    plan = hook().plan(QUERIES, target)
    assert (plan.params, plan.mode, plan.reason) == ({"hnsw_ef": effort}, "tuned", None)


def test_probes_need_not_be_as_many_as_the_hits() -> None:
    assert hook("nprobe").plan(QUERIES, Target(100)).params == {"nprobe": 32}


def test_as_many_candidates_are_rescored_whatever_k_is() -> None:
    for k in (1, 10, 32):
        params = hook(rescored=True).plan(QUERIES, Target(k)).params
        assert params is not None
        quantised = params["quantization"]
        assert quantised == {"rescore": True, "oversampling": 32 / k}


def test_as_many_candidates_are_put_in_order_whatever_k_is() -> None:
    scann = replace(hook(), parameter=EffortParameter("nprobe", reorder_k=40))
    for k, candidates in ((1, 40), (10, 40), (100, 100)):
        assert scann.plan(QUERIES, Target(k)).params == {"nprobe": 32, "reorder_k": candidates}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (Target(10, 0.99), "target: not promised"),
        (Target(101, 0.9), "target: k not calibrated"),
    ],
)
def test_what_is_not_promised_is_searched_as_far_as_there_is_and_says_so(
    target: Target, reason: str
) -> None:
    plan = hook().plan(QUERIES, target)
    assert plan.params == {"hnsw_ef": max(128, target.k)}
    assert plan.reason == reason


def test_a_recall_of_one_is_exact() -> None:
    assert hook().plan(QUERIES, Target(10, 1.0)).exact


def test_a_number_of_cells_and_what_is_no_share_are_refused() -> None:
    with pytest.raises(InvalidInput, match="a tuned bundle has none"):
        hook().plan(QUERIES, Target(10, n_probes=3))
    with pytest.raises(InvalidInput, match="no share"):
        hook().plan(QUERIES, Target(10, 1.5))


def test_a_parameter_comes_back_from_its_bytes_and_nothing_else_does() -> None:
    for parameter in (EffortParameter("ef", rescored=True), EffortParameter("nprobe", False, 200)):
        assert EffortParameter.from_bytes(parameter.to_bytes()) == parameter
    for damaged in (b"", b"{}", b'{"name": "limit"}', b'{"name": "ef", "more": 1}'):
        with pytest.raises(BundleCorrupt):
            EffortParameter.from_bytes(damaged)


def test_a_calibration_of_something_else_is_refused() -> None:
    good = optimistic([16, 32])
    check_tuned(good, "here")
    with pytest.raises(BundleCorrupt, match="search parameter"):
        check_tuned(replace(good, efforts=None), "here")
    with pytest.raises(BundleCorrupt, match="search parameter"):
        check_tuned(replace(good, efforts=np.array([32, 16, 16])), "here")
