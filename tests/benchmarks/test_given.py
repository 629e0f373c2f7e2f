"""The benchmark of given partitions, on a small collection."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import given
from tests.support import given_data


@pytest.mark.nightly
@pytest.mark.slow
def test_every_method_is_measured_on_queries_that_nothing_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(given, "HELD_OUT", 150)
    monkeypatch.setattr(given, "HEADS", 3)
    np.save(tmp_path / "keys.npy", given_data.keys())
    np.save(tmp_path / "sections.npy", given_data.topics() % given_data.PARTS)
    np.save(tmp_path / "queries_train.npy", given_data.queries(11_000))
    np.save(tmp_path / "queries_test.npy", given_data.queries(300, seed=8))
    out = tmp_path / "rows.json"
    arguments = [str(tmp_path), "--json", str(out), "--few", "200"]
    result = CliRunner().invoke(given.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    rows = [given.Row(**row) for row in json.loads(out.read_text())]
    by = {(row.situation, row.method, row.recall, row.train_queries > 1_000): row for row in rows}
    full = {method for situation, method, _, many in by if situation == "sections" and many}
    assert full == {
        *("all", "largest first", "nearest mean", "votes", "linear", "mlp"),
        *("heads (3)", "heads (3), keys", "heads (3), promised", "heads (3), keys, promised"),
    }
    for recall in given.RECALLS:
        everything, heads = (
            by["sections", "all", recall, True],
            by["sections", "heads (3)", recall, True],
        )
        assert (everything.searches, everything.keys) == (given_data.PARTS, 1.0)
        assert heads.found > recall - 0.03
        assert heads.searches < 0.5 * by["sections", "largest first", recall, True].searches
        assert by["sections", "heads (3)", recall, False].train_queries == 200
        few = by["permuted", "linear", recall, True].searches
        assert few > 2 * heads.searches
    assert {row.situation for row in rows} == {"sections", "permuted", "topical"}
    assert {(row.k, row.storage) for row in rows} == {(10, 1.0)}
    assert by["sections", "heads (3), promised", 0.9, True].found > 0.89
    more = ["--seed", "1", "--only-heads", "--few", "300"]
    again = [str(tmp_path), "--json", str(out), *more]
    CliRunner().invoke(given.main, again, catch_exceptions=False)
    rows = [given.Row(**row) for row in json.loads(out.read_text())]
    assert {(row.seed, row.situation) for row in rows} == {(1, "sections")}
    assert {row.method.partition(",")[0] for row in rows} == {"heads (3)"}
