from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amips_plugins.errors import BundleCorrupt
from amips_plugins.models import cells as module
from amips_plugins.models.cells import Cells, KnownCells, View, place_keys
from amips_plugins.sketch import sketch
from amips_plugins.vectors import FloatArray, Metric, normalise
from tests.support.bundles import DIM, vectors


def drawn(*shape: int, seed: int = 7) -> FloatArray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


SIZES = np.array([3, 0, 5], dtype=np.int64)
CENTROIDS, OFFSETS = vectors(seed=9, count=3), drawn(3, seed=10)
WIDE = drawn(3, DIM + 1, seed=11)  # one more column, for the heat
VIEW = View(drawn(DIM, DIM), 2.0, drawn(DIM + 1, seed=12))
PLAIN = Cells(CENTROIDS, OFFSETS, SIZES)
VIEWED = Cells(WIDE, OFFSETS, SIZES, VIEW)


def seen_one_by_one(key: FloatArray, metric: Metric, view: View | None) -> FloatArray:
    """The documented formula, for one key and in double precision."""
    place = np.asarray(key, dtype=np.float64)
    if metric is not Metric.L2:
        place = place / np.linalg.norm(place)
    if view is None:
        return place.astype(np.float32)
    towards = place @ view.matrix
    z = place + view.weight * towards / np.linalg.norm(towards)
    if metric is not Metric.L2:
        z = z / np.linalg.norm(z)
    return np.append(z, place @ view.popularity[:-1] + view.popularity[-1]).astype(np.float32)


@pytest.mark.parametrize("metric", Metric)
@pytest.mark.parametrize("cells", [PLAIN, VIEWED], ids=["plain", "viewed"])
def test_a_key_belongs_to_the_cell_of_the_largest_product(cells: Cells, metric: Metric) -> None:
    keys = vectors(seed=3)
    z = np.stack([seen_one_by_one(key, metric, cells.view) for key in keys])
    nearness = z @ cells.centroids.T + cells.offsets
    assert cells.assign(keys, metric).tolist() == nearness.argmax(axis=1).tolist()
    assert len(set(nearness.argmax(axis=1))) > 1


def test_half_the_squared_length_makes_the_rule_the_nearest_centroid() -> None:
    keys = vectors(seed=3)
    cells = Cells(CENTROIDS, -0.5 * (CENTROIDS**2).sum(axis=1), SIZES)
    distances = ((keys[:, None] - CENTROIDS[None]) ** 2).sum(axis=2)
    assert cells.assign(keys, Metric.L2).tolist() == distances.argmin(axis=1).tolist()


@pytest.mark.parametrize("metric", Metric)
def test_the_view_of_a_key_is_the_formula(metric: Metric) -> None:
    keys = vectors(seed=3, count=5)
    expected = np.stack([seen_one_by_one(key, metric, VIEW) for key in keys])
    seen = VIEW.see(place_keys(keys, metric), metric)
    assert seen.dtype == np.float32
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6)


def test_places_are_directions_unless_the_metric_is_l2() -> None:
    keys = vectors(seed=3, count=5)
    np.testing.assert_array_equal(place_keys(keys, Metric.L2), keys)
    for metric in (Metric.IP, Metric.COSINE):
        np.testing.assert_array_equal(place_keys(keys, metric), normalise(keys))


@pytest.mark.parametrize("metric", Metric)
def test_a_new_keys_heat_comes_from_the_map_and_decides_its_cell(metric: Metric) -> None:
    """Two cells that only heat tells apart: the map alone says which keys are hot."""
    keys = vectors(seed=3)
    heat = np.append(drawn(DIM, seed=5), np.float32(0.1))
    view = View(np.zeros((DIM, DIM), dtype=np.float32), 0.0, heat)
    columns: FloatArray = np.zeros((2, DIM + 1), dtype=np.float32)
    columns[1, -1] = 1.0
    cells = Cells(columns, np.array([0.0, 0.0], dtype=np.float32), SIZES[:2], view)
    hot = place_keys(keys, metric) @ heat[:-1] + heat[-1] > 0
    assert 0 < hot.sum() < len(keys)
    assert cells.assign(keys, metric).tolist() == hot.astype(int).tolist()
    alone = [int(cells.assign(key[None], metric)[0]) for key in keys]
    assert alone == hot.astype(int).tolist()  # the same alone, in a batch and every time


@pytest.mark.parametrize("cells", [PLAIN, VIEWED], ids=["plain", "viewed"])
def test_a_zero_key_has_a_cell(cells: Cells) -> None:
    for metric in Metric:
        (cell,) = cells.assign(np.zeros((1, DIM), dtype=np.float32), metric)
        assert 0 <= cell < cells.n_cells


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
    np.testing.assert_array_equal(read.offsets, cells.offsets)
    np.testing.assert_array_equal(read.sizes, cells.sizes)
    assert (read.view is None) == (cells.view is None)
    if read.view is not None and cells.view is not None:
        np.testing.assert_array_equal(read.view.matrix, cells.view.matrix)
        np.testing.assert_array_equal(read.view.popularity, cells.view.popularity)
        assert read.view.weight == cells.view.weight
    assert read.layout() == cells.layout()
    keys = vectors(seed=3)
    assert read.assign(keys, Metric.IP).tolist() == cells.assign(keys, Metric.IP).tolist()


def test_the_layout_names_the_partition() -> None:
    """Another rule, or the same rule over a snapshot whose keys lie otherwise, is another name."""
    others = [
        VIEWED,
        Cells(CENTROIDS[::-1].copy(), OFFSETS, SIZES),
        Cells(CENTROIDS, OFFSETS + 1, SIZES),
        Cells(CENTROIDS, OFFSETS, SIZES + 1),
        Cells(WIDE, OFFSETS, SIZES, View(VIEW.matrix, 1.0, VIEW.popularity)),
        Cells(WIDE, OFFSETS, SIZES, View(VIEW.matrix.T.copy(), 2.0, VIEW.popularity)),
        Cells(WIDE, OFFSETS, SIZES, View(VIEW.matrix, 2.0, VIEW.popularity + 1)),
    ]
    names = {PLAIN.layout(), *(cells.layout() for cells in others)}
    assert len(names) == 8
    assert all(name.isalnum() and name == name.lower() and len(name) <= 16 for name in names)
    assert Cells(CENTROIDS.copy(), OFFSETS.copy(), SIZES.copy()).layout() == PLAIN.layout()


def archive(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def lone_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, CENTROIDS)
    return buffer.getvalue()


PARTS: dict[str, Any] = {"centroids": CENTROIDS, "offsets": OFFSETS, "sizes": SIZES}
VIEW_PARTS: dict[str, Any] = {
    "centroids": WIDE,
    "offsets": OFFSETS,
    "sizes": SIZES,
    "view": VIEW.matrix,
    "weight": np.ones(1),
    "popularity": VIEW.popularity,
}


def test_whole_parts_are_read() -> None:
    assert Cells.from_bytes(archive(**PARTS)).view is None
    assert Cells.from_bytes(archive(**VIEW_PARTS)).view is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an archive",
        b"PK\x03\x04 nor this",
        lone_array(),
        *(archive(**{n: a for n, a in PARTS.items() if n != name}) for name in PARTS),
        archive(**PARTS | {"sizes": SIZES[:2]}),
        archive(**PARTS | {"offsets": OFFSETS[:2]}),
        archive(**PARTS | {"offsets": OFFSETS[:, None]}),
        archive(**PARTS | {"centroids": CENTROIDS[0]}),
        archive(**PARTS | {"centroids": np.float32(1.0)}),
        archive(**PARTS | {"centroids": np.array([[object()]])}),
        archive(**{n: a for n, a in VIEW_PARTS.items() if n != "weight"}),
        archive(**{n: a for n, a in VIEW_PARTS.items() if n != "popularity"}),
        archive(**VIEW_PARTS | {"view": VIEW.matrix[:2]}),
        archive(**VIEW_PARTS | {"view": VIEW.matrix[:, :2]}),
        archive(**VIEW_PARTS | {"popularity": VIEW.popularity[:-1]}),
        archive(**VIEW_PARTS | {"weight": np.ones(0)}),
        archive(**VIEW_PARTS | {"centroids": CENTROIDS}),  # without the column of the popularity
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
    np.testing.assert_array_equal(read.centroids, WIDE)


# Known keys


def known(
    ids: list[int | str], cells: list[int], keys: FloatArray, metric: Metric = Metric.COSINE
) -> KnownCells:
    recorded = np.stack([np.array(cells, dtype=np.int32), sketch(keys, metric)], axis=1)
    return KnownCells(PLAIN, metric, ids, recorded)


def test_known_keys_keep_their_cell_and_others_follow_the_rule() -> None:
    keys = vectors(seed=3, count=4)
    rule = PLAIN.assign(keys, Metric.COSINE)
    recorded = int(rule[0] + 1) % 3  # not what the rule says
    assign = known(["a", 7], [recorded, 0], keys[[0, 2]])
    chosen = assign(["a", "b", 7, "7"], keys)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == [recorded, rule[1], 0, rule[3]]
    assert assign([], keys[:0]).tolist() == []
    assert known([], [], keys[:0])(["a"], keys[:1]).tolist() == [rule[0]]


def test_a_key_written_again_with_another_vector_goes_by_the_rule() -> None:
    keys = vectors(seed=3, count=20)
    rule = PLAIN.assign(keys, Metric.COSINE)
    assign = known(list(range(20)), ((rule + 1) % 3).tolist(), keys)
    assert (assign(range(20), keys) == (rule + 1) % 3).all()
    assert (assign(range(20), normalise(keys)) == (rule + 1) % 3).all()
    assert (assign(range(20), -keys) == PLAIN.assign(-keys, Metric.COSINE)).all()


def test_keys_whose_hashes_collide_are_told_apart_by_their_vectors() -> None:
    keys = vectors(seed=3, count=2)
    assert hash(-1) == hash(-2)
    rule = PLAIN.assign(keys, Metric.COSINE)
    other = [(int(cell) + 1) % 3 for cell in rule]
    first, second = known([-1, -2], other, keys)([-1, -2], keys)
    assert first == other[0]
    assert second == rule[1]  # taken for the first, and its vector says that it is not
