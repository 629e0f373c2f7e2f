from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.scale import READ, Row, measure, shown
from benchmarks.scale_sizing import main, work
from tests.support.training_data import clustered_keys, narrow_queries

pytest.importorskip("pyarrow")


@pytest.mark.nightly
@pytest.mark.slow
def test_a_training_is_measured_stage_by_stage(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "keys.npy", clustered_keys(900, 16))
    np.save(data / "queries_train.npy", narrow_queries(600, 16))
    np.save(data / "queries_test.npy", narrow_queries(60, 16, seed=1))
    rows = measure(str(data), 1_600, "local", 2.0, "linear", tmp_path / "cache", 20, 500)
    whole = rows[-1]
    assert {(row.cells, row.queries) for row in rows} == {(20, 500)}
    assert (whole.stage, whole.keys, whole.engine) == ("all", 1_600, "local")
    assert {READ, "exact answers", "cut cells", "train linear"} <= {row.stage for row in rows}
    assert whole.seconds == pytest.approx(sum(row.seconds for row in rows[:-1]), abs=0.01)
    assert whole.peak_mb == max(row.peak_mb for row in rows) > 50
    assert whole.total_90 is not None
    assert f"{whole.seconds:.1f}" in shown(rows)
    assert {path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith("t")} == (
        set()
    )


def test_sizes_follow_from_the_rates(tmp_path: Path) -> None:
    rate, cutting, rows = 160e9, 40e9, []
    for keys, peak in ((100_000, 900.0), (300_000, 1_000.0)):
        todo = work(keys, 40_000, 384)
        stages = {
            "exact answers": todo.answers / rate,
            "cut cells": todo.passes / cutting,
            "cut cells as queries see them": todo.k_means / cutting,
            READ: 4 * 384 * keys / 1e9,
            "train linear": 60.0,
        }
        stages["all"] = sum(stages.values())
        rows += [
            Row(
                keys=keys,
                engine="local",
                workers=1,
                stage=stage,
                seconds=taken,
                cpu_s=taken,
                peak_mb=peak,
                total_90=keys**-0.5 if stage == "all" else None,
                total_95=keys**-0.25 if stage == "all" else None,
            )
            for stage, taken in stages.items()
        ]
    (tmp_path / "rows.json").write_bytes(msgspec.json.encode(rows))
    done = CliRunner().invoke(main, [str(tmp_path / "rows.json")], catch_exceptions=False)
    assert "160.0 GFLOP/s in exact answers, 40.0 in cells, 1000 MB/s read" in done.output
    line = next(line for line in done.output.splitlines() if line.startswith("10,000,000"))
    answers = 2.0 * 1e7 * 40_000 * 384 / rate / 3600
    cells = (work(10**7, 40_000, 384).passes + work(10**7, 40_000, 384).k_means) / cutting / 3600
    rest = 60.0 * 10_000_000 / 300_000 / 3600
    assert answers + cells + rest < float(line.split()[2]) < 1.1 * (answers + cells + rest)
    assert "recall@10 .90 costs grow as n^0.50" in done.output
    assert "recall@10 .95 costs grow as n^0.75" in done.output
