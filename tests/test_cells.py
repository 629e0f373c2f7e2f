from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins import cells as module
from amips_plugins.cells import Cells, KnownCells, view_keys
from amips_plugins.errors import BundleCorrupt
from amips_plugins.vectors import Metric, normalise
from tests.bundles import DIM, vectors

RNG = np.random.default_rng(7)
SIZES = np.array([3, 0, 5], dtype=np.int64)
CENTROIDS = vectors(seed=9, count=3)
VIEW = RNG.standard_normal((DIM, DIM)).astype(np.float32)
PLAIN = Cells(CENTROIDS, SIZES)
VIEWED = Cells(CENTROIDS, SIZES, VIEW, 2.0)


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("cells", [PLAIN, VIEWED], ids=["plain", "viewed"])
def test_a_key_belongs_to_the_nearest_centroid_of_its_view(cells: Cells, metric: Metric) -> None:
    keys = vectors(seed=3)
    z = view_keys(keys, metric, cells.view, cells.weight)
    distances = ((z[:, None] - cells.centroids[None]) ** 2).sum(axis=2)
    assert cells.assign(keys, metric).tolist() == distances.argmin(axis=1).tolist()


def test_the_view_of_a_key_is_the_formula() -> None:
    keys = vectors(seed=3, count=2)
    unit = normalise(keys)
    expected = normalise(unit + 2.0 * normalise(unit @ VIEW))
    np.testing.assert_allclose(view_keys(keys, Metric.IP, VIEW, 2.0), expected, rtol=1e-6)
    np.testing.assert_array_equal(view_keys(keys, Metric.L2, None, 0.0), keys)
    np.testing.assert_array_equal(view_keys(keys, Metric.COSINE, None, 0.0), unit)


@pytest.mark.parametrize("cells", [PLAIN, VIEWED], ids=["plain", "viewed"])
def test_blocks_change_nothing(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = vectors(seed=3)
    whole = cells.assign(keys, Metric.COSINE)
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert cells.assign(keys, Metric.COSINE).tolist() == whole.tolist()
    assert cells.assign(keys[:0], Metric.COSINE).tolist() == []


@pytest.mark.parametrize("cells", [PLAIN, VIEWED], ids=["plain", "viewed"])
def test_bytes_and_back(cells: Cells) -> None:
    read = Cells.from_bytes(cells.to_bytes())
    np.testing.assert_array_equal(read.centroids, cells.centroids)
    np.testing.assert_array_equal(read.sizes, cells.sizes)
    assert read.weight == cells.weight
    assert (read.view is None) == (cells.view is None)
    assert read.layout() == cells.layout()


def test_the_layout_names_the_rule() -> None:
    others = [
        VIEWED,
        Cells(CENTROIDS[::-1].copy(), SIZES),
        Cells(CENTROIDS, SIZES, VIEW, 1.0),
        Cells(CENTROIDS, SIZES, VIEW.T.copy(), 2.0),
    ]
    names = {PLAIN.layout(), *(cells.layout() for cells in others)}
    assert len(names) == 5
    assert all(name.isalnum() and name == name.lower() and len(name) <= 16 for name in names)
    # Sizes describe a snapshot, not the rule.
    assert Cells(CENTROIDS, SIZES + 1).layout() == PLAIN.layout()


def archive(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def lone_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, CENTROIDS)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an archive",
        b"PK\x03\x04 nor this",
        lone_array(),
        archive(centroids=CENTROIDS),
        archive(centroids=CENTROIDS, sizes=SIZES[:2]),
        archive(centroids=CENTROIDS[0], sizes=SIZES),
        archive(centroids=np.float32(1.0), sizes=SIZES),
        archive(centroids=CENTROIDS, sizes=SIZES, view=VIEW),
        archive(centroids=CENTROIDS, sizes=SIZES, view=VIEW[:2], weight=np.ones(1)),
        archive(centroids=CENTROIDS, sizes=SIZES, view=VIEW, weight=np.ones(0)),
        archive(centroids=np.array([[object()]]), sizes=SIZES),
    ],
)
def test_what_is_no_cells_archive_is_corrupt(data: bytes) -> None:
    with pytest.raises(BundleCorrupt, match="publish it again"):
        Cells.from_bytes(data)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damage_is_corrupt_or_harmless_and_nothing_else(data: st.DataObject) -> None:
    whole = VIEWED.to_bytes()
    damaged = bytearray(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        read = Cells.from_bytes(bytes(damaged))
    except BundleCorrupt:
        return
    np.testing.assert_array_equal(read.centroids, CENTROIDS)


def test_known_keys_keep_their_cell_and_others_follow_the_rule() -> None:
    keys = vectors(seed=3, count=4)
    rule = PLAIN.assign(keys, Metric.COSINE)
    recorded = int(rule[0] + 1) % 3  # not what the rule says
    assign = KnownCells(PLAIN, Metric.COSINE, {"a": recorded, 7: 0})
    chosen = assign(["a", "b", 7, "7"], keys)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == [recorded, rule[1], 0, rule[3]]
    assert assign([], keys[:0]).tolist() == []
