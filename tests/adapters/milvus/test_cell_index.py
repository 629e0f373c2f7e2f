from __future__ import annotations

import json
from typing import Any

import pytest

from amips_plugins.adapters.milvus.cell_index import index_arguments, is_scanned, unindexed_cells
from amips_plugins.cell_layout import CellIndex
from amips_plugins.vectors import Metric

HNSW = {
    "index_type": "HNSW",
    "metric_type": "IP",
    "field_name": "v",
    "index_name": "mine",
    "M": "30",
    "efConstruction": "360",
    "total_rows": 5,
    "state": "Finished",
}
IVF = {"index_type": "IVF_FLAT", "field_name": "v", "index_name": "mine", "nlist": "99"}


def arguments(
    wanted: CellIndex, source: dict[str, Any] | None, *, is_lite: bool = False
) -> dict[str, Any]:
    return index_arguments(wanted, source, "v", Metric.IP, 2_500.0, is_lite=is_lite)


@pytest.mark.parametrize(
    ("wanted", "source"), [("auto", HNSW), ("hnsw", HNSW), ("auto", IVF), ("ivf_flat", IVF)]
)
def test_a_kind_that_the_source_has_keeps_its_parameters(
    wanted: CellIndex, source: dict[str, Any]
) -> None:
    found = arguments(wanted, source)
    assert found == {k: v for k, v in source.items() if k not in ("total_rows", "state")}


def test_another_kind_gets_parameters_for_a_cell() -> None:
    own = {"field_name": "v", "index_name": "v", "metric_type": "IP"}
    assert arguments("flat", HNSW) == {**own, "index_type": "FLAT"}
    assert arguments("auto", None) == {**own, "index_type": "FLAT"}
    assert arguments("hnsw", IVF) == {
        **own,
        "index_type": "HNSW",
        "params": {"M": 16, "efConstruction": 200},
    }
    assert arguments("ivf_flat", HNSW)["params"] == {"nlist": 50}
    nested = arguments("ivf_flat", HNSW, is_lite=True)["params"]
    assert json.loads(nested["params"]) == {"nlist": 50}


def test_cells_that_get_no_index_are_counted() -> None:
    assert unindexed_cells((1_023, 1_024, 5, 9_000), 100_000, 4) == 2
    assert unindexed_cells((), 4_000, 4) == 4
    assert unindexed_cells((), 5_000, 4) == 0
    assert is_scanned({"index_type": "flat"})
    assert is_scanned({})
    assert not is_scanned(HNSW)
