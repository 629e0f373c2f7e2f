from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.errors import BundleCorrupt, InvalidInput
from amips_plugins.models.calibration import Calibration

# The last level searches every cell, so it finds every key.
GUARANTEED = np.array([[0.5, 0.8, 0.95, 1.0], [0.3, 0.6, 0.87654, 1.0]], dtype=np.float32)
SCANNED = np.array([0.2, 0.5, 0.8, 1.0], dtype=np.float32)
THRESHOLDS = np.array([-1.0, -2.0, -3.5, -np.inf], dtype=np.float32)
CALIBRATION = Calibration(THRESHOLDS, GUARANTEED, GUARANTEED, SCANNED, 0.95)


def test_shape() -> None:
    assert CALIBRATION.max_k == 2


@pytest.mark.parametrize(
    ("k", "recall", "threshold"),
    [
        (1, 0.01, -1.0),
        (1, 0.5, -1.0),
        (1, 0.51, -2.0),
        (1, 0.95, -3.5),
        (1, 1.0, -np.inf),
        (2, 0.87, -3.5),
        (2, 1.0, -np.inf),
    ],
)
def test_the_highest_threshold_that_reaches_the_target(
    k: int, recall: float, threshold: float
) -> None:
    assert CALIBRATION.threshold(k, recall) == threshold
    assert CALIBRATION.default_threshold(k, recall) == threshold


def test_thresholds_never_rise_as_the_target_grows() -> None:
    asked = [*np.linspace(0.01, 0.95, 50).astype(np.float32), 1.0]
    thresholds = [CALIBRATION.threshold(1, float(recall)) for recall in asked]
    assert thresholds == sorted(thresholds, reverse=True)


@pytest.mark.parametrize("recall", [0.0, -0.1, 1.0001, 90, float("nan"), float("inf")])
def test_a_target_is_a_share(recall: float) -> None:
    with pytest.raises(InvalidInput, match=r"pass a number in \(0, 1\]"):
        CALIBRATION.threshold(1, recall)


def test_k_over_the_calibrated_ones() -> None:
    with pytest.raises(InvalidInput, match=r"up to k=2, not k=3; pass n_probes.*--k 3"):
        CALIBRATION.threshold(3, 0.5)
    assert CALIBRATION.default_threshold(3, 0.5) == -np.inf


def test_an_unreachable_target_names_the_best_one() -> None:
    """Only all cells would do: the caller is told what can be had for less."""
    with pytest.raises(InvalidInput, match=r"95% confidence.*best target is 0\.876") as caught:
        CALIBRATION.threshold(2, 0.9)
    assert "or 1.0 for the native search" in str(caught.value)
    named = re.search(r"best target is ([\d.]+),", str(caught.value))
    assert named is not None
    assert CALIBRATION.threshold(2, float(named[1])) == -3.5
    assert CALIBRATION.default_threshold(2, 0.9) == -np.inf


def test_one_level_promises_the_native_search_only() -> None:
    one = np.ones((1, 1), dtype=np.float32)
    single = Calibration(np.array([-np.inf], dtype=np.float32), one, one, one[0], 0.9)
    assert single.threshold(1, 1.0) == -np.inf
    with pytest.raises(InvalidInput, match=r"best target is 0\.000"):
        single.threshold(1, 0.1)


def test_bytes_and_back() -> None:
    read = Calibration.from_bytes(CALIBRATION.to_bytes())
    np.testing.assert_array_equal(read.thresholds, CALIBRATION.thresholds)
    np.testing.assert_array_equal(read.recall, CALIBRATION.recall)
    np.testing.assert_array_equal(read.guaranteed, CALIBRATION.guaranteed)
    np.testing.assert_array_equal(read.scanned, CALIBRATION.scanned)
    assert read.confidence == 0.95


def archive(**changes: Any) -> bytes:
    arrays: dict[str, Any] = {
        "thresholds": THRESHOLDS,
        "recall": GUARANTEED,
        "guaranteed": GUARANTEED,
        "scanned": SCANNED,
        "confidence": np.array([0.95]),
    }
    buffer = io.BytesIO()
    kept = {name: array for name, array in (arrays | changes).items() if array is not None}
    np.savez(buffer, **kept)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 nothing",
        archive(recall=None),
        archive(thresholds=None),
        archive(thresholds=THRESHOLDS[:3]),
        archive(thresholds=THRESHOLDS[:, None]),
        archive(thresholds=np.arange(4.0)[::-1]),  # no level searches every cell
        archive(
            **dict.fromkeys(("recall", "guaranteed"), GUARANTEED[:, :0]),
            **dict.fromkeys(("thresholds", "scanned"), SCANNED[:0]),
        ),
        archive(confidence=None),
        archive(confidence=np.zeros(0)),
        archive(guaranteed=GUARANTEED[:1]),
        archive(recall=GUARANTEED[0], guaranteed=GUARANTEED[0]),
        archive(scanned=SCANNED[:3]),
        archive(recall=np.array([["a"]])),
    ],
)
def test_what_is_no_calibration_is_corrupt(data: bytes) -> None:
    with pytest.raises(BundleCorrupt, match="publish it again"):
        Calibration.from_bytes(data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_corrupt_or_harmless_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(CALIBRATION.to_bytes())
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read = Calibration.from_bytes(bytes(damaged))
    except BundleCorrupt:
        return
    np.testing.assert_array_equal(read.guaranteed, GUARANTEED)


@pytest.mark.parametrize(
    ("threshold", "factor", "wider"),
    [
        (-1.0, 1.0, -1.0),
        (-1.0, 1.5, -2.0),  # .3 of the keys: the first level with as many
        (-1.0, 2.5, -2.0),  # exactly .5
        (-1.0, 4.0, -3.5),
        (-1.0, 5.0, -np.inf),
        (-2.0, 1.7, -np.inf),  # .85, which only every cell has
        (-3.5, 4.0, -np.inf),
        (-np.inf, 4.0, -np.inf),
        (-1.0, np.inf, -np.inf),
    ],
)
def test_widening_searches_so_many_times_the_keys(
    threshold: float, factor: float, wider: float
) -> None:
    assert CALIBRATION.widen(threshold, factor) == wider


def test_a_wider_search_never_has_fewer_cells() -> None:
    for threshold in THRESHOLDS.tolist():
        wider = [CALIBRATION.widen(threshold, factor) for factor in (1.0, 1.2, 2.0, 4.0, 9.0)]
        assert wider == sorted(wider, reverse=True)
        assert max(wider) <= threshold


@given(
    bounds=st.lists(st.integers(0, 20), min_size=1, max_size=9),
    recall=st.one_of(st.integers(1, 20).map(lambda n: n / 20), st.floats(1e-3, 1.0)),
)
@settings(max_examples=300, deadline=None)
def test_a_look_up_is_a_walk_down_the_levels(bounds: list[int], recall: float) -> None:
    """Also where bounds fall along the way, or the last is not 1."""
    guaranteed = (np.array([bounds]) / 20).astype(np.float32)
    thresholds = -np.arange(len(bounds), dtype=np.float32)
    thresholds[-1] = -np.inf
    calibration = Calibration(thresholds, guaranteed, guaranteed, guaranteed[0], 0.95)
    reaching = [level for level, bound in enumerate(guaranteed[0]) if bound >= np.float32(recall)]
    if recall == 1.0:
        assert calibration.threshold(1, recall) == -np.inf
    elif not reaching or reaching[0] == len(bounds) - 1:
        with pytest.raises(InvalidInput, match="cannot be promised"):
            calibration.threshold(1, recall)
        assert calibration.default_threshold(1, recall) == -np.inf
    else:
        assert calibration.threshold(1, recall) == thresholds[reaching[0]]


def test_efforts_stand_beside_the_thresholds() -> None:
    efforts = np.array([16, 24, 24, 100])
    with_efforts = replace(CALIBRATION, efforts=efforts)
    read = Calibration.from_bytes(with_efforts.to_bytes())
    assert [read.effort(float(one)) for one in THRESHOLDS] == efforts.tolist()
    assert read.effort(-3.0) == 24
    assert CALIBRATION.effort(-2.0) is None
    assert Calibration.from_bytes(CALIBRATION.to_bytes()).efforts is None
    with_lists = replace(with_efforts, lists=100)
    assert Calibration.from_bytes(with_lists.to_bytes()).lists == 100
    assert read.lists is None
    for impossible in (replace(with_efforts, lists=0), replace(CALIBRATION, lists=4)):
        with pytest.raises(BundleCorrupt):
            Calibration.from_bytes(impossible.to_bytes())


def test_two_efforts_stand_beside_the_thresholds() -> None:
    efforts, far = np.array([16, 24, 24, 100]), np.array([10, 10, 16, 100])
    near = np.array([0.5, 0.5, -1.0, -np.inf], dtype=np.float32)
    whole = replace(CALIBRATION, efforts=efforts, near=near, far_efforts=far)
    read = Calibration.from_bytes(whole.to_bytes())
    found = [read.far(float(one)) for one in THRESHOLDS]
    assert found == list(zip(near.tolist(), far.tolist(), strict=True))
    assert CALIBRATION.far(float(THRESHOLDS[0])) is None
    for impossible in (
        replace(whole, efforts=None),
        replace(whole, near=None),
        replace(whole, far_efforts=None),
        replace(whole, far_efforts=np.array([0, 1, 2, 3])),
        replace(whole, far_efforts=far[:3]),
        replace(whole, near=np.array([0.5, np.nan, -1.0, -2.0])),
    ):
        with pytest.raises(BundleCorrupt):
            Calibration.from_bytes(impossible.to_bytes())


@pytest.mark.parametrize("efforts", [[1, 2, 3], [0, 1, 2, 3], [1, 2, 3, 1 << 20], [[1, 2, 3, 4]]])
def test_efforts_that_cannot_be_are_refused(efforts: list[Any]) -> None:
    damaged = replace(CALIBRATION, efforts=np.array(efforts))
    with pytest.raises(BundleCorrupt):
        Calibration.from_bytes(damaged.to_bytes())
