"""Keys without a cell are counted, and too many of them are said."""

from __future__ import annotations

from pathlib import Path

import pytest

from amips_plugins import LearnedRouter
from amips_plugins.models.hooks import NativeHook
from tests.support.bundles import COUNT, laid_out, memory, write_bundle
from tests.support.routing_data import QUERIES, Spy, logged


def test_overflow_past_the_threshold_is_logged_once_a_crossing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_bundle(tmp_path)
    collection = laid_out(folder)
    router = LearnedRouter(collection, bundle=folder, refresh=None)
    assert router.overflow_share() == 0.0
    collection.upsert([1000, 1001], QUERIES[:2])
    router.refresh()
    assert logged(caplog) == []
    assert router.overflow_share() == pytest.approx(2 / (COUNT + 2))
    for crossing in (1, 2):
        collection.upsert(range(1000, 1006), QUERIES)
        for _ in range(3):
            router.refresh()
        assert len(logged(caplog)) == crossing
        assert "11.1 % of the keys of 'docs' have no cell" in logged(caplog)[-1]
        assert "amips backfill" in logged(caplog)[-1]
        collection.delete(range(1000, 1006))
        router.refresh()


def test_without_cells_there_is_no_overflow() -> None:
    spy = Spy(memory())
    router = LearnedRouter(spy, hook=NativeHook(), refresh=None)
    counted = spy.counted
    assert router.overflow_share() == 0.0
    assert spy.counted == counted
