"""The benchmark of a router over given partitions as it serves, on a small collection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import given, given_served
from tests.support import given_data


@pytest.mark.nightly
@pytest.mark.slow
def test_promise_plan_and_calls_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"HEADS": 3, "RESAMPLED": 3, "CALIBRATED": 400, "HELD_OUT": 200, "POOL": 800}
    few = {"ROUNDS": 2, "REPEATED": 2, "TIMED": 4, "KS": (1, 10), "CALL": 2e-3, "AT_ONCE": 2}
    for name, value in (small | few).items():
        monkeypatch.setattr(given_served, name, value)
    np.save(tmp_path / "keys.npy", given_data.keys())
    np.save(tmp_path / "sections.npy", given_data.topics() % given_data.PARTS)
    np.save(tmp_path / "queries_train.npy", given_data.queries(4_000))
    np.save(tmp_path / "queries_test.npy", given_data.queries(300, seed=8))
    monkeypatch.setattr(given_served, "MANY", 500)
    out = tmp_path / "rows.json"
    many = CliRunner().invoke(given_served.main, [str(tmp_path), "--many", "--json", str(out)])
    assert many.exit_code == 0
    (eight, full) = json.loads(out.read_text())
    assert eight["megabytes"] < full["megabytes"]
    arguments = [str(tmp_path), "--json", str(out)]
    result = CliRunner().invoke(given_served.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    rows = [given_served.Row(**row) for row in json.loads(out.read_text())]
    promised = [row for row in rows if row.situation == "resampled"]
    assert [(row.k, row.recall) for row in promised] == [
        (k, recall) for k in (1, 10) for recall in given.RECALLS
    ]
    assert all(row.value > row.recall - 0.05 for row in promised)
    assert {row.what for row in rows if row.situation == "plan"} == {
        *("as served", "8 bits", "32 bits"),
    }
    calls = [row for row in rows if row.situation == "calls"]
    assert calls[0].searches == given_data.PARTS
    assert all(row.searches < given_data.PARTS for row in calls[1:])
