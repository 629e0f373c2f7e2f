"""Keys in several cells, as far as that takes no server; the rest stands in integration_tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amips_plugins.adapters.milvus.cells import CellProperties
from amips_plugins.adapters.milvus.collection import MilvusCollection
from amips_plugins.adapters.milvus.overwritten import around
from amips_plugins.adapters.milvus.search import Call
from amips_plugins.cell_layout import find_stale
from amips_plugins.errors import InvalidInput
from amips_plugins.vectors import Metric
from tests.support.milvus_collection import make, spec, vectors

pytestmark = pytest.mark.slow

CELLS = CellProperties("abc", 2, "v1", "partitions", "docs", "hnsw", "docs", shared=True)


def test_properties_say_whether_keys_are_shared() -> None:
    written = CELLS.properties()
    assert CellProperties.read(written) == CELLS
    assert CellProperties.read(replace(CELLS, shared=False).properties()) != CELLS
    del written["amips.shared"]  # as older versions wrote them
    older = CellProperties.read(written)
    assert older is not None
    assert not older.shared


def test_milvus_lite_and_a_field_are_refused(client: Any, tmp_path: Path) -> None:
    collection = make(client)
    shared = spec(shared=True, work=tmp_path)
    for refused, reason in (
        (shared, "one row of an id"),
        (replace(shared, storage="field"), "one cell"),
    ):
        with pytest.raises(InvalidInput, match=f"{reason}.*--spill 0"):
            collection.layouts.plan(refused)


def test_calls_around_overwritten_keys_find_them_in_the_overflow_only(client: Any) -> None:
    table = replace(MilvusCollection(client, make(client).info.name).table(), cells=CELLS)
    first, second = (CELLS.partition(cell) for cell in range(2))
    there = ["_default", first, second, "added"]
    calls = [
        Call([0], {"filter": "a > 1", "partition_names": [first, "_default", "added"]}),
        Call([1], {"filter": "", "partition_names": [second]}),
        Call([2], {"filter": "", "partition_names": ["_default"]}),
        Call([3], {"filter": "", "partition_names": None}),
    ]
    found = [(call.rows, *call.arguments.values()) for call in around(calls, {7, 5}, table, there)]
    but = "not (key in [5, 7])"
    assert found == [
        ([0], f"(a > 1) and ({but})", [first]),
        ([0], "a > 1", ["_default", "added"]),
        ([1], f"({but})", [second]),
        ([2], "", ["_default"]),
        ([3], f"({but})", [first, second]),
        ([3], "", ["_default", "added"]),
    ]


def test_a_row_in_any_of_its_keys_cells_is_not_stale() -> None:
    ids, cells = [0, 1, 2], np.array([0, 1, 1])
    members = np.array([[0, 1], [0, 1], [0, 0]])
    judged, stale = find_stale(ids, vectors()[:3], cells, [None] * 3, Metric.IP, lambda *_: members)
    assert (judged.tolist(), stale.tolist()) == ([True] * 3, [False, False, True])
