"""What searches of given partitions cost engines: how efforts are chosen, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import given, given_costs
from benchmarks.given_costs import Costs, Found, cheapest, not_negative, recall_of
from tests.support import given_data

EFFORTS = (10, 20, 40)


def found_at(rng: np.random.Generator, log_p: np.ndarray) -> Found:
    """Hits that lie where they probably are, of which the efforts find .5, .8 and all."""
    shares = np.exp(log_p)
    cells = np.stack([rng.choice(len(row), 10, p=row / row.sum()) for row in shares])
    drawn = rng.random(cells.shape)
    return Found(EFFORTS, np.stack([drawn < share for share in (0.5, 0.8, 1.0)]), cells)


def test_efforts_and_partitions_are_chosen_together() -> None:
    rng = np.random.default_rng(0)
    scores = 3 * rng.standard_normal((400, 12))
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    found = found_at(rng, log_p)
    costs = Costs(1.0, np.outer([1.0, 1.6, 3.0], np.ones(12)))
    spent = {}
    for own in (False, True):
        rule = cheapest(found, log_p, costs, 0.9, own_efforts=own)
        assert rule is not None
        places = rule.places(log_p)
        assert 0.9 <= recall_of(places, found) < 0.93
        asked = np.where(places >= 0, np.take_along_axis(costs.search, places, axis=0), 0)
        spent[own] = asked.sum(axis=1).mean()
        assert (places >= 0).sum(axis=1).min() >= 1
    assert spent[True] < spent[False] < 0.7 * 12 * 3.0
    probable = np.exp(log_p)[places == 2].mean()
    assert probable > np.exp(log_p)[places == 1].mean()  # farther where more is to be found
    nowhere = Found(EFFORTS, found.at & False, found.hit_cells)
    assert cheapest(nowhere, log_p, costs, 0.9, own_efforts=True) is None


def test_costs_are_fitted_without_any_below_nothing() -> None:
    rng = np.random.default_rng(0)
    table = rng.random((30, 3))
    assert not_negative(table, table @ [2.0, 0.5, 1.0]) == pytest.approx([2.0, 0.5, 1.0])
    without = not_negative(table, table @ [2.0, 0.0, 1.0] - 0.1 * table[:, 1])
    assert without[1] == 0.0
    assert (without >= 0).all()


@pytest.mark.nightly
@pytest.mark.slow
def test_an_engine_is_asked_in_every_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("qdrant_edge")
    monkeypatch.setattr(given, "HELD_OUT", 150)
    monkeypatch.setattr(given, "HEADS", 3)
    monkeypatch.setattr(given_costs, "_IDLE_SECONDS", 0.1)
    np.save(tmp_path / "keys.npy", given_data.keys())
    np.save(tmp_path / "sections.npy", given_data.topics() % given_data.PARTS)
    np.save(tmp_path / "queries_train.npy", given_data.queries(2_000))
    np.save(tmp_path / "queries_test.npy", given_data.queries(80, seed=8))
    out = tmp_path / "rows.json"
    arguments = [str(tmp_path), "--json", str(out), "--engine", "edge", "--asked", "100", "80"]
    work = ["--work", str(tmp_path / "work")]
    result = CliRunner().invoke(given.main, [*arguments, *work], catch_exceptions=False)
    assert result.exit_code == 0
    rows = [given_costs.EngineRow(**row) for row in json.loads(out.read_text())]
    by = {(row.method, row.recall): row for row in rows}
    ways = {"all partitions", "one graph", "largest first", "routed", "routed, one ef"}
    assert by.keys() == {(way, recall) for way in ways for recall in given.RECALLS}
    for recall in given.RECALLS:
        assert by["all partitions", recall].searches == given_data.PARTS
        assert by["one graph", recall].searches == 1.0
        assert by["routed", recall].found > recall - 0.05
    routed, everything = by["routed", 0.9], by["all partitions", 0.9]
    assert routed.searches < 0.9 * given_data.PARTS
    assert min(routed.cpu_ms, everything.cpu_ms) > 0
    assert (tmp_path / "work" / "0" / "heads.npz").exists()
