"""The end of the demo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from amips_plugins import connect
from amips_plugins.demo.run import _tune
from amips_plugins.tune.run import TuneResult
from tests.support.progress_recorder import Recorder

edge = pytest.importorskip("qdrant_edge")


def test_keys_too_few_for_a_graph_are_no_failure(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    params = edge.EdgeVectorParams(size=8, distance=edge.Distance.Cosine)
    edge.EdgeShard.create(str(tmp_path / "docs"), edge.EdgeConfig(vectors=params)).close()
    said: list[str] = []

    def show(_: TuneResult) -> str:
        raise AssertionError("there is nothing to show")

    with connect(f"qdrant-edge://{tmp_path}?collection=docs") as place:
        place.upsert(range(200), keys)
        _tune(place, keys[:60], tmp_path / "tune", said.append, show, Recorder())
    assert "There is nothing to tune" in said[0]
