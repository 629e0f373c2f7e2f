from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from amips_plugins.adapters.cell_file.codes import Coder, Scorer
from amips_plugins.adapters.cell_file.collection import CellFileCollection
from amips_plugins.adapters.cell_file.file_format import Bits
from amips_plugins.adapters.cell_file.opened import OpenCellFile
from amips_plugins.collection import SearchRequest
from amips_plugins.errors import InvalidInput
from amips_plugins.plan import QueryPlan
from amips_plugins.vectors import IntArray, Metric, lift_keys, lift_queries
from tests.adapters.cell_file.made import clustered, queries, write

EVERY = get_args(Bits)


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("bits", EVERY)
def test_codes_score_about_as_vectors_do(bits: Bits, metric: Metric) -> None:
    keys, asked = clustered()[0][:1500], queries(5)  # more than are decoded at once
    coder = Coder(metric, keys.shape[1], bits)
    run = coder.encode(keys)
    assert len(run) == coder.n_bytes(len(keys))
    wanted = lift_queries(asked, metric) @ lift_keys(keys, metric).T
    placed = lift_queries(asked, metric)[:, : keys.shape[1]]
    found = Scorer(coder, placed).score(run, len(keys), [3, 1])
    off = np.std(found - wanted[[3, 1]]) / np.std(wanted[[3, 1]])
    assert off < {2: 0.5, 4: 0.15, 8: 0.02}[bits]
    assert off > 1e-5  # codes they are


@pytest.mark.parametrize("bits", EVERY)
def test_distances_are_told_as_well_far_from_zero(bits: Bits) -> None:
    """As of keys whose coordinates are all positive, such as counts."""
    keys, asked = clustered()[0][:300], queries(30)
    found = []
    for shift in (0, 20):
        coder = Coder(Metric.L2, keys.shape[1], bits)
        run = coder.encode(keys + np.float32(shift))
        scores = Scorer(coder, asked + np.float32(shift)).score(run, 300, list(range(30)))
        found.append(scores - scores.mean(axis=1, keepdims=True))  # of which only the order counts
    near, far = found
    assert np.std(near - far) < 0.01 * np.std(near)


def candidates_read(collection: CellFileCollection, k: int, params: Any = None) -> int:
    """How many vectors a search for k hits of one query reads."""
    file, read = collection._now().file, []
    plain = OpenCellFile.read_rows

    def counted(self: OpenCellFile, numbers: IntArray, deadline: float | None) -> Any:
        read.append(len(numbers))
        return plain(self, numbers, deadline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenCellFile, "read_rows", counted)
        (hits,) = collection.search(SearchRequest(queries(1), k=k, params=params))
    assert len(hits) == k
    assert file is collection._now().file
    return sum(read)


def test_candidates_are_as_many_as_was_asked_and_enough_for_few_hits(tmp_path: Path) -> None:
    wanted: dict[Bits, dict[int, int]] = {
        2: {1: 12, 2: 12, 10: 40},
        4: {1: 4, 10: 20},
        8: {1: 2, 10: 15},
    }
    for bits, by_k in wanted.items():
        collection = CellFileCollection(write(tmp_path / f"{bits}.cells", bits))
        assert {k: candidates_read(collection, k) for k in by_k} == by_k
        for times in (1, 2.5, np.float32(2.5), np.int64(3)):
            read = candidates_read(collection, 3, {"oversampling": times})
            assert read == int(np.ceil(3 * times))


@pytest.mark.parametrize("times", [0.99, 1_001, float("nan"), True, "2", -1])
def test_an_oversampling_that_cannot_be_is_refused(tmp_path: Path, times: Any) -> None:
    collection = CellFileCollection(write(tmp_path / "docs.cells"))
    with pytest.raises(InvalidInput, match=r"oversampling=.* cannot be; pass how many"):
        collection.search(SearchRequest(queries(1), k=3, params={"oversampling": times}))


@pytest.mark.parametrize("bits", EVERY)
def test_a_dimension_that_fills_no_byte(bits: Bits) -> None:
    keys = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    coder = Coder(Metric.IP, 5, bits)
    scores = Scorer(coder, keys[:3]).score(coder.encode(keys), 40, [0, 1, 2])
    assert np.corrcoef(scores.ravel(), (keys[:3] @ keys.T).ravel())[0, 1] > 0.9


@pytest.mark.parametrize("bits", EVERY)
def test_equal_keys_and_a_single_one(bits: Bits) -> None:
    coder = Coder(Metric.IP, 4, bits)
    keys = np.full((3, 4), 0.5, dtype=np.float32)
    for some in (keys, keys[:1]):
        scores = Scorer(coder, keys[:1]).score(coder.encode(some), len(some), [0])
        np.testing.assert_allclose(scores, 1.0, rtol=1e-6)
    assert coder.encode(keys[:0]) == b""


@pytest.mark.parametrize("metric", list(Metric))
@pytest.mark.parametrize("bits", EVERY)
def test_cells_are_searched_by_codes_as_exactly_as_by_vectors(
    tmp_path: Path, bits: Bits, metric: Metric
) -> None:
    collection = CellFileCollection(write(tmp_path / "docs.cells", bits, metric))
    asked, (keys, cells) = queries(), clustered()
    plan = QueryPlan(cells=np.tile([[1, 2, 5]], (len(asked), 1)), layout="abc")
    found = collection.search(SearchRequest(asked, k=10), plan)
    inside = np.flatnonzero(np.isin(cells, [1, 2, 5]))
    scores = lift_queries(asked, metric) @ lift_keys(keys[inside], metric).T
    best = inside[np.argsort(-scores, axis=1)[:, :10]]
    agree = [len({h.id for h in hits} & set(b)) / 10 for hits, b in zip(found, best, strict=True)]
    assert np.mean(agree) > {2: 0.96, 4: 0.98, 8: 0.995}[bits]
    # The scores are those of the vectors, not of the codes.
    (exact,) = collection.exact(SearchRequest(asked[:1], k=3000))
    by_vector = {hit.id: hit.score for hit in exact}
    for hit in found[0]:
        assert hit.score == pytest.approx(by_vector[hit.id], abs=1e-5)


@pytest.mark.parametrize("kernel_can", [True, False])
def test_what_a_sample_is_judged_by_is_next_to_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_can: bool
) -> None:
    collection = CellFileCollection(write(tmp_path / "docs.cells"))
    if not kernel_can:

        def cannot(*_: object) -> int:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "preadv", cannot)
    request = SearchRequest(queries(), k=10, params={"no such parameter": 1})
    pairs = zip(collection.thorough(request), collection.exact(request), strict=True)
    agree = [len({h.id for h in one} & {h.id for h in other}) / 10 for one, other in pairs]
    assert np.mean(agree) > 0.995
