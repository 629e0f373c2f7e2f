from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.fanout import main
from benchmarks.fanout_ways import METHODS
from tests.support.training_data import clustered_keys, narrow_queries

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DIM = 12


def bench(folder: Path, path: Path, *options: str) -> list[dict[str, Any]]:
    where = ["--json", str(path), "--cache", str(folder.parent / "cache")]
    result = CliRunner().invoke(main, [str(folder), "--segments", "8", *where, *options])
    assert result.exit_code == 0, result.output
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "narrow"
    folder.mkdir()
    queries = narrow_queries(1_400, DIM)
    np.save(folder / "keys.npy", clustered_keys(3_000, DIM))
    np.save(folder / "queries_train.npy", queries[:1_200])
    np.save(folder / "queries_test.npy", queries[1_200:])
    return folder


def test_an_engine_tells_what_it_used(folder: Path, tmp_path: Path) -> None:
    options = ["--engine", "edge", "--k", "10", "--batch", "20", "--only", "fan-out,routed-spill"]
    rows = bench(folder, tmp_path / "rows.json", *options)
    assert {(row["method"], row["batch"]) for row in rows} == {
        (method, batch)
        for method in ("fan-out", "routed-spill", "routed-spill, two efforts")
        for batch in (1, 20)
    }
    for row in rows:
        assert row["distances"] is None
        if row["recall"] is not None:
            assert row["recall"] > row["target"] - 0.1
            assert 0 < row["cpu_s_per_1000"] < 100
            assert 0 < row["graphs"] <= 8
            assert row["p50_ms"] > 0
            if "two efforts" in row["method"]:
                assert 10 <= row["far_effort"] < row["effort"]
                assert 0 < row["near_graphs"] <= row["graphs"]
    fan_out, routed = (
        [row for row in rows if row["method"] == method and row["target"] == 0.9]
        for method in ("fan-out", "routed-spill")
    )
    assert all(row["graphs"] == 8 for row in fan_out)
    assert all(row["graphs"] < 8 for row in routed)


def test_where_visits_cost_fewer_graphs_are_searched_farther(folder: Path, tmp_path: Path) -> None:
    options = ["--k", "10", "--only", "routed", "--visit", "0,100000"]
    rows = bench(folder, tmp_path / "rows.json", *options)
    free, dear = (
        [row for row in rows if row["method"] == name and row["distances"] is not None]
        for name in ("routed", "routed, a visit 100000")
    )
    assert len(free) == len(dear) > 0
    for one, other in zip(free, dear, strict=True):
        assert other["graphs"] <= one["graphs"]
        assert other["effort"] >= one["effort"]
    assert any(other["graphs"] < one["graphs"] for one, other in zip(free, dear, strict=True))


def test_every_way_trains_its_own_router(folder: Path, tmp_path: Path) -> None:
    options = ["--segments", "4,8", "--k", "10", "--only", "routed,routed-spill"]
    rows = bench(folder, tmp_path / "together.json", *options)
    alone = bench(folder, tmp_path / "alone.json", *options[2:-1], "routed-spill")
    assert {row["segments"] for row in rows} == {4, 8}
    same = [row for row in rows if row["segments"] == 8 and "spill" in row["method"]]
    assert same == alone


def test_too_few_queries_for_a_batch_are_told(folder: Path, tmp_path: Path) -> None:
    where = ["--json", str(tmp_path / "rows.json"), "--cache", str(folder.parent / "cache")]
    options = ["--engine", "edge", "--k", "10", "--segments", "8", "--only", "fan-out"]
    result = CliRunner().invoke(main, [str(folder), *where, *options])
    assert result.exit_code == 1
    assert "too few" in result.output
    assert "--batch" in result.output


def test_rows_say_what_every_way_costs(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = bench(folder, path)
    assert {(row["method"], row["segments"]) for row in rows} == {
        (method, 1 if method == "one-graph" else 8)
        for method in (*METHODS, "routed, two efforts", "routed-spill, two efforts")
    }
    by = {(row["method"], row["k"], row["target"]): row for row in rows}
    for (method, k, target), row in by.items():
        if row["distances"] is None:
            continue
        assert row["recall"] > target - 0.1
        assert 0 < row["distances"] < 8 * 3_000
        assert row["effort"] >= min(k, 100)
        if "two efforts" in method:
            assert min(k, 100) <= row["far_effort"] < row["effort"]
            assert 0 < row["near_graphs"] <= row["graphs"]
            # Chosen on calibration queries, and read on a few test queries of small graphs.
            assert row["distances"] < 1.3 * by[method.partition(",")[0], k, target]["distances"]
        if "spill" in method:
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
