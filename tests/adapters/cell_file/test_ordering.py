"""Near keys lie side by side, and pages that touch are one read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amips_plugins.adapters.cell_file.ordering import near_ones_together
from amips_plugins.adapters.cell_file.ranges import pages_of
from amips_plugins.adapters.cell_file.rotation import rotated
from amips_plugins.vectors import Metric, normalise


@pytest.mark.parametrize("metric", list(Metric))
def test_keys_are_followed_by_near_ones(metric: Metric) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((50, 16))
    group = rng.integers(50, size=3_000)
    keys = (centres[group] + 0.05 * rng.standard_normal((3_000, 16))).astype(np.float32)
    order = near_ones_together(keys, metric)
    assert sorted(order.tolist()) == list(range(3_000))
    changes = int((np.diff(group[order]) != 0).sum())
    assert changes < 3 * 60  # in each of three blocks a group is left about once
    assert len(near_ones_together(keys[:0], metric)) == 0
    assert near_ones_together(keys[:1], metric).tolist() == [0]


@given(st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 20_000)), max_size=20))
def test_pages_cover_the_spans_once(wanted: list[tuple[int, int]]) -> None:
    spans = [(start, start + length) for start, length in wanted]
    found = pages_of(spans)
    touched = {page for start, end in spans for page in range(start // 4096, -(-end // 4096))}
    assert [page for low, high in found for page in range(low // 4096, high // 4096)] == sorted(
        touched
    )
    assert all(before[1] < after[0] for before, after in itertools.pairwise(found))


@given(dim=st.integers(1, 100), seed=st.integers(0, 100))
def test_turning_keeps_inner_products_and_spreads_what_one_coordinate_holds(
    dim: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    some = rng.standard_normal((5, dim)).astype(np.float32)
    turned = rotated(some)
    np.testing.assert_allclose(turned @ turned.T, some @ some.T, rtol=1e-4, atol=1e-3)
    assert (rotated(some[1:3]) == turned[1:3]).all()


def test_no_coordinate_holds_more_than_others_once_turned() -> None:
    for dim in (200, 384, 700):
        single = np.zeros((dim, dim), dtype=np.float32)
        np.fill_diagonal(single, 1.0)
        assert np.abs(rotated(single)).max() < 10 * dim**-0.5
    uneven = np.random.default_rng(0).standard_normal((500, 384)).astype(np.float32)
    uneven[:, :4] *= 30
    spread = rotated(normalise(uneven)).std(axis=0)
    assert spread.max() < 3 * spread.mean()
