from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.fanout import METHODS, main
from tests.support.training_data import clustered_keys, narrow_queries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DIM = 12


def bench(folder: Path, path: Path, *options: str) -> list[dict[str, Any]]:
    where = ["--json", str(path), "--cache", str(folder.parent / "cache")]
    result = CliRunner().invoke(main, [str(folder), "--segments", "8", *where, *options])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


def test_rows_say_what_every_way_costs(tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    folder.mkdir()
    queries = narrow_queries(1_400, DIM)
    np.save(folder / "keys.npy", clustered_keys(3_000, DIM))
    np.save(folder / "queries_train.npy", queries[:1_200])
    np.save(folder / "queries_test.npy", queries[1_200:])
    path = tmp_path / "rows.json"
    rows = bench(folder, path)
    assert {(row["method"], row["segments"]) for row in rows} == {
        (method, 1 if method == "one-graph" else 8) for method in METHODS
    }
    by = {(row["method"], row["k"], row["target"]): row for row in rows}
    for (method, k, target), row in by.items():
        if row["distances"] is None:
            continue
        assert row["recall"] > target - 0.1
        assert 0 < row["distances"] < 8 * 3_000
        assert row["effort"] >= min(k, 100)
        if method == "routed-spill":
            assert 1.05 < row["storage"] <= 1.27
        else:
            assert row["storage"] == 1.0
        if method == "fan-out":
            assert row["graphs"] == 8
    costs = {method: by[method, 10, 0.9]["distances"] for method in METHODS}
    assert costs["routed"] < costs["fan-out"]
    written = path.stat().st_mtime_ns
    assert bench(folder, path) == rows  # nothing is measured twice
    assert path.stat().st_mtime_ns == written
