from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amips_plugins import MemoryCollection, Metric
from amips_plugins.progress import no_progress
from amips_plugins.tune import keys as drawing
from amips_plugins.tune.keys import draw, truth_of
from amips_plugins.tune.rows import Row
from amips_plugins.tune.trials import Finished, Trials
from tests.support import edge_graph as graph
from tests.support.tuned import optimistic


@pytest.mark.parametrize("metric", list(Metric))
def test_many_keys_are_read_once_and_the_same_are_best(
    metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    collection = MemoryCollection(graph.keys(), metric=metric)
    asked = graph.queries(1, 20)
    by_search = truth_of(collection, asked, 10, no_progress)
    monkeypatch.setattr(drawing, "_EXACT_UP_TO", 100)
    by_reading = truth_of(collection, asked, 10, no_progress)
    assert by_reading.ranks == by_search.ranks
    assert by_search.scores is not None
    assert by_reading.scores is None
    some, whole = (draw(collection, count, 0, no_progress) for count in (500, 10_000))
    assert truth_of(collection, asked, 10, no_progress, some).ranks == by_search.ranks

    def scan(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(collection, "scan", scan)
    assert truth_of(collection, asked, 10, no_progress, whole).ranks == by_search.ranks


def test_keys_are_drawn_from_all_of_them_with_their_own_vectors() -> None:
    collection = MemoryCollection(graph.keys(), [f"k{n:05}" for n in range(graph.COUNT)])
    some = draw(collection, 500, 0, no_progress)
    rows = [int(str(key)[1:]) for key in some.ids]
    assert (len(set(rows)), some.whole) == (500, False)
    assert np.array_equal(some.vectors, graph.keys()[rows])
    assert 1300 < np.mean(rows) < 1700
    whole = draw(collection, 10_000, 0, no_progress)
    assert (len(whole.ids), whole.whole) == (graph.COUNT, True)
    sample = whole.sample()
    assert np.array_equal(sample.vectors, graph.keys()[[int(str(k)[1:]) for k in sample.ids]])


def test_trials_are_kept_for_the_same_question_and_no_other(tmp_path: Path) -> None:
    one = Finished(Row(search="int8 codes", effort=16), optimistic((16, 32)))
    Trials(tmp_path, b"first").put(one)
    kept = Trials(tmp_path, b"first").get("int8 codes")
    assert kept is not None
    assert kept.row == one.row
    assert kept.calibration is not None
    assert Trials(tmp_path, b"first").get("4-bit codes") is None
    (tmp_path / "trials" / "int8-codes.npz").write_bytes(b"PK")
    assert Trials(tmp_path, b"first").get("int8 codes") is None  # damaged: measured again
    Trials(tmp_path, b"first").put(one)
    assert Trials(tmp_path, b"second").get("int8 codes") is None
