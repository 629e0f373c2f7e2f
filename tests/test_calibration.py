from __future__ import annotations

import io
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.calibration import Calibration
from amips_plugins.errors import BundleCorrupt, InvalidInput

GUARANTEED = np.array([[0.5, 0.8, 0.95, 1.0], [0.3, 0.6, 0.87654, 0.87654]], dtype=np.float32)
SCANNED = np.array([0.2, 0.5, 0.8, 1.0], dtype=np.float32)
CALIBRATION = Calibration(GUARANTEED, GUARANTEED, SCANNED, 0.95)


def test_shape() -> None:
    assert (CALIBRATION.max_k, CALIBRATION.n_cells) == (2, 4)


@pytest.mark.parametrize(
    ("k", "recall", "probes"),
    [(1, 0.01, 1), (1, 0.5, 1), (1, 0.51, 2), (1, 0.95, 3), (1, 1.0, 4), (2, 0.87, 3)],
)
def test_the_fewest_probes_that_reach_the_target(k: int, recall: float, probes: int) -> None:
    assert CALIBRATION.probes(k, recall) == probes
    assert CALIBRATION.default_probes(k, recall) == probes


def test_probes_never_shrink_as_the_target_grows() -> None:
    asked = np.linspace(0.01, 1.0, 50)
    probes = [CALIBRATION.probes(1, float(recall)) for recall in asked]
    assert probes == sorted(probes)


@pytest.mark.parametrize("recall", [0.0, -0.1, 1.0001, 90, float("nan"), float("inf")])
def test_a_target_is_a_share(recall: float) -> None:
    with pytest.raises(InvalidInput, match=r"pass a number in \(0, 1\]"):
        CALIBRATION.probes(1, recall)


def test_k_over_the_calibrated_ones() -> None:
    with pytest.raises(InvalidInput, match="up to k=2, not k=3; pass n_probes"):
        CALIBRATION.probes(3, 0.5)
    assert CALIBRATION.default_probes(3, 0.5) == CALIBRATION.probes(2, 0.5)


def test_an_unreachable_target_names_the_best_one() -> None:
    with pytest.raises(InvalidInput, match=r"95% confidence.*best target is 0\.876") as caught:
        CALIBRATION.probes(2, 0.9)
    named = re.search(r"best target is ([\d.]+)\.", str(caught.value))
    assert named is not None
    assert CALIBRATION.probes(2, float(named[1])) == 3
    assert CALIBRATION.default_probes(2, 0.9) == 4


def test_bytes_and_back() -> None:
    read = Calibration.from_bytes(CALIBRATION.to_bytes())
    np.testing.assert_array_equal(read.recall, CALIBRATION.recall)
    np.testing.assert_array_equal(read.guaranteed, CALIBRATION.guaranteed)
    np.testing.assert_array_equal(read.scanned, CALIBRATION.scanned)
    assert read.confidence == 0.95


def archive(**changes: Any) -> bytes:
    arrays: dict[str, Any] = {
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
