"""Copies that a Milvus server builds for ``amips tune``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from amips_plugins.adapters.milvus.tuning import MilvusTuning
from amips_plugins.tuning import GRAPH_EFFORTS, NO_KNOB, Build, Knob
from amips_plugins.vectors import Metric


class Client:
    """A server whose segments have an index only once they have been looked at."""

    def __init__(self) -> None:
        self.looks = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: SimpleNamespace(add_index=lambda **_: None)

    def query(self, *_: Any, **__: Any) -> Any:
        return [{"count(*)": 2_000}]

    def list_loaded_segments(self, _: str) -> Any:
        self.looks += 1
        index = "vector" if self.looks > 1 else ""
        return [SimpleNamespace(num_rows=2_000, index_name=index)]


@pytest.mark.parametrize(
    ("build", "looks"),
    [
        (Build("HNSW", Knob("ef", GRAPH_EFFORTS), 32.0, {"index_type": "HNSW"}), 2),
        (Build("FLAT", NO_KNOB, 32.0, {"index_type": "FLAT"}), 0),
    ],
)
def test_a_copy_waits_for_the_index_that_there_will_be(
    build: Build, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client()
    info = SimpleNamespace(field="vector", metric=Metric.COSINE)
    table: Any = SimpleNamespace(client=client, is_lite=False, info=info)
    monkeypatch.setattr("time.sleep", lambda _: None)
    MilvusTuning(SimpleNamespace(table=lambda: table))._index_and_load(  # type: ignore[arg-type]
        "docs__amips_tune", build, 2_000
    )
    assert client.looks == looks
