"""Which codes are searched, and how widely."""

from __future__ import annotations

from typing import Any

import pytest

from amips_plugins.adapters.qdrant.codes import Codes, break_even_of, codes_of

NO_GRAPH: dict[str, Any] = {"m": 0, "payload_m": None, "full_scan_threshold": 10_000}


@pytest.mark.parametrize(
    ("quantised", "oversampling"),
    [
        ({"scalar": {"type": "int8"}}, 1.5),
        ({"turbo": {"bits": "bits4"}}, 2.0),
        ({"turbo": {"bits": "bits2"}}, 4.0),
        ({"binary": {"encoding": "two_bits"}}, 4.0),
        ({"binary": {"encoding": None}}, 16.0),
        ({"product": {"compression": "x16"}}, 16.0),
    ],
)
def test_coarser_codes_take_more_candidates(quantised: dict[str, Any], oversampling: float) -> None:
    assert codes_of(quantised, NO_GRAPH, 384, 10_000) == Codes(oversampling)


@pytest.mark.parametrize("quantised", [None, {}, {"scalar": None}])
def test_without_codes_there_are_none(quantised: dict[str, Any] | None) -> None:
    assert codes_of(quantised, NO_GRAPH, 384, 10_000) is None


@pytest.mark.parametrize("graph", [{"m": 16}, {"m": 0, "payload_m": 16}])
def test_beside_a_graph_only_what_is_surely_scanned(graph: dict[str, Any]) -> None:
    codes = codes_of({"scalar": {}}, {**graph, "full_scan_threshold": 3000}, 384, 10_000)
    assert codes is not None
    assert codes.share == pytest.approx(0.1)  # half of the 2,000 vectors that 3,000 kB are
    assert codes.scan(0.05)
    assert not codes.scan(0.2)
    assert not codes.scan(None)


def test_without_a_graph_everything_is_scanned() -> None:
    assert Codes(2.0).scan(1.0)
    assert Codes(2.0).scan(None)


def test_cells_always_read_less_of_vectors_on_a_disk() -> None:
    every, some = Codes(4.0), Codes(4.0, 0.1)
    assert break_even_of(0.3, None, on_disk=False) == 0.3
    assert break_even_of(0.3, None, on_disk=True) == 1.0
    assert break_even_of(0.3, every, on_disk=True) == 0.3  # all codes are scanned in its place
    assert break_even_of(0.3, some, on_disk=True) == 1.0
    assert every.thorough()["quantization"] == {"rescore": True, "oversampling": 16.0}
