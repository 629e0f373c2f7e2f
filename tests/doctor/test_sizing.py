"""The advice for a memory is what was cheapest when memory was capped to it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amips_plugins.doctor.sizing import size_up

KEYS, DIM = 300_000, 384
FLOATS = KEYS * DIM * 4


@pytest.mark.parametrize(
    ("share", "keep"),
    [
        (1.2, "vectors"),
        (0.50, "codes and graph"),  # 4-bit graph 1.3 ms, scan of codes 2.7 ms
        (0.25, "codes and graph"),  # 4-bit graph .53 ms of CPU, routed codes 1.1
        (0.13, "codes in cells"),  # routed codes 1.7 ms, 2-bit graph 7.1
        (0.10, "codes in cells"),  # routed codes 2.2 ms, inline storage 11
        (0.065, "cell file"),  # one read a cell 2.4 ms, inline storage 11, routed 24
        (0.05, "cell file"),  # one read a cell 3.9 ms, inline storage 12.9, routed 31
    ],
)
def test_the_measured_rows(share: float, keep: str) -> None:
    found = size_up(KEYS, DIM, int(share * FLOATS))
    assert found.keep == keep
    assert found.text.count(". ") == 0


def test_few_codes_are_scanned() -> None:
    assert size_up(80_000, DIM, int(0.1 * 80_000 * DIM * 4)).keep == "codes, scanned"


@given(keys=st.integers(1, 10**9), dim=st.integers(2, 4096), memory=st.integers(10**6, 10**13))
def test_what_is_advised_fits_and_more_memory_never_keeps_less(
    keys: int, dim: int, memory: int
) -> None:
    found, more = size_up(keys, dim, memory), size_up(keys, dim, 2 * memory)
    assert found.needed <= memory or found.keep == "cell file"
    assert more.bits >= found.bits
